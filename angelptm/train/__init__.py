"""Training runs: from a config to a trained model and a run folder."""

from angelptm.train.result import RunResult
from angelptm.train.run import train

__all__ = ["RunResult", "train"]
