"""Several processes that train one model: who they are, what they agree on, and what they send each other."""

from angelptm.ranks.gather import Arrival, Gatherer
from angelptm.ranks.join import join
from angelptm.ranks.ranks import Ranks
from angelptm.ranks.reduce import Reducer

__all__ = ["Arrival", "Gatherer", "Ranks", "Reducer", "join"]
