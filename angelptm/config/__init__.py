"""Configuration: what the user writes, checked and resolved before anything is allocated."""

from angelptm.config.load import load_config
from angelptm.config.schema import Config

__all__ = ["Config", "load_config"]
