"""AngelPTM trains PyTorch models whose states exceed GPU memory and DRAM.

``initialize`` takes a model over and returns the engine that trains it; ``materialize`` builds a model without ever
having it in memory whole.

The names are imported on first use, so that ``angelptm.plan`` and ``angelptm.config`` work where torch or the native
module do not.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from angelptm.version import __version__

if TYPE_CHECKING:
    from angelptm.config import Config, load_config
    from angelptm.engine import Engine, initialize
    from angelptm.errors import AngelPTMError, CapacityError, ConfigError, DataError, NonFiniteError, ParkedError
    from angelptm.model.materialize import init_on_meta, materialize


__all__ = [
    "AngelPTMError",
    "CapacityError",
    "Config",
    "ConfigError",
    "DataError",
    "Engine",
    "NonFiniteError",
    "ParkedError",
    "__version__",
    "init_on_meta",
    "initialize",
    "load_config",
    "materialize",
]

_MODULE_OF = {
    "AngelPTMError": "angelptm.errors",
    "CapacityError": "angelptm.errors",
    "Config": "angelptm.config",
    "ConfigError": "angelptm.errors",
    "DataError": "angelptm.errors",
    "Engine": "angelptm.engine",
    "NonFiniteError": "angelptm.errors",
    "ParkedError": "angelptm.errors",
    "init_on_meta": "angelptm.model.materialize",
    "initialize": "angelptm.engine",
    "load_config": "angelptm.config",
    "materialize": "angelptm.model.materialize",
}


def __getattr__(name: str) -> object:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(importlib.import_module(_MODULE_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
