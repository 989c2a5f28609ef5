"""The sections of a configuration, one noun per class. Read tiers, optimizer, execution, training, then config."""

from angelptm.config.schema.config import Config
from angelptm.config.schema.execution import Checkpoint, Execution, Io, Units, Update
from angelptm.config.schema.hardware import Hardware, load_hardware
from angelptm.config.schema.optimizer import Optimizer, ParamGroup
from angelptm.config.schema.tiers import Placement, SsdPath, Tiers
from angelptm.config.schema.training import Data, Model, Schedule, Training

__all__ = [
    "Checkpoint",
    "Config",
    "Data",
    "Execution",
    "Hardware",
    "Io",
    "Model",
    "Optimizer",
    "ParamGroup",
    "Placement",
    "Schedule",
    "SsdPath",
    "Tiers",
    "Training",
    "Units",
    "Update",
    "load_hardware",
]
