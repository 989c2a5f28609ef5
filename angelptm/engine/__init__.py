"""The engine: fetches units around their use, takes their gradients, hands them to the updater."""

from angelptm.engine.engine import Engine, initialize

__all__ = ["Engine", "initialize"]
