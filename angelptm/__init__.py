"""AngelPTM trains PyTorch models whose states exceed GPU memory and DRAM.

``initialize`` takes a model over and returns the engine that trains it; ``materialize`` builds a model without ever
having it in memory whole.
"""

from angelptm.config import Config, load_config
from angelptm.engine import Engine, initialize
from angelptm.errors import (
    AngelPTMError,
    CapacityError,
    ConfigError,
    DataError,
    NonFiniteError,
    ParkedError,
)
from angelptm.model.materialize import init_on_meta, materialize

__version__ = "0.1.0"

__all__ = [
    "AngelPTMError",
    "CapacityError",
    "Config",
    "ConfigError",
    "DataError",
    "Engine",
    "NonFiniteError",
    "ParkedError",
    "init_on_meta",
    "initialize",
    "load_config",
    "materialize",
]
