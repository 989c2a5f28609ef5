"""Batches in a shuffled order that is a function of (seed, position) alone, so that a run resumes where it stopped, on
as many ranks as before or on others."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from angelptm.data.tokens import TokenSource
from angelptm.errors import DataError

_MASK = 2**64 - 1
_ROUNDS = 6


class TokenBatches:
    """An endless iterator over micro-batches.

    Sample i is the i-th run of ``sequence_length`` tokens; an epoch is a permutation of all samples, computed and not
    stored; batch k takes the next ``micro_batch_size`` samples of the epochs strung together. A rest shorter than a
    sample is left out. With ``vocabulary_size``, a token beyond it is a DataError instead of an index error.

    Of several ranks each takes its batch of those that come next, one for each rank: together they see what one rank
    would, of batches as large as theirs together.
    """

    def __init__(
        self,
        tokens: TokenSource,
        sequence_length: int,
        micro_batch_size: int,
        seed: int,
        vocabulary_size: int | None = None,
        rank: int = 0,
        rank_count: int = 1,
    ) -> None:
        self.rank, self.rank_count = rank, rank_count
        self.tokens, self.sequence_length, self.micro_batch_size = tokens, sequence_length, micro_batch_size
        self.seed, self.vocabulary_size = seed, vocabulary_size
        self.samples = 0
        """Samples that all ranks together have taken."""
        self.sample_count = len(tokens) // sequence_length
        if self.sample_count == 0:
            raise DataError(
                str(tokens.path),
                f"{len(tokens)} tokens",
                f"at least one sequence of {sequence_length}",
                "Shorten data.sequence_length, change data.validation_fraction, or give more text.",
            )

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        return self

    def __next__(self) -> dict[str, torch.Tensor]:
        batch = self._batch(self.samples + self.rank * self.micro_batch_size)
        self.samples += self.rank_count * self.micro_batch_size
        return batch

    def batch(self, position: int) -> dict[str, torch.Tensor]:
        """``input_ids`` and ``labels``, (micro_batch_size, sequence_length) int64 each; the model shifts the labels.
        Any one of all batches, whichever rank's it is."""
        return self._batch(position * self.micro_batch_size)

    def _batch(self, first: int) -> dict[str, torch.Tensor]:
        rows = [self._sample(index) for index in range(first, first + self.micro_batch_size)]
        input_ids = torch.from_numpy(np.stack(rows))
        return {"input_ids": input_ids, "labels": input_ids.clone()}

    def state_dict(self) -> dict[str, Any]:
        return {"samples": self.samples, **self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues after the samples that were taken, with batches of any size on any number of ranks: none comes
        twice and none is left out. Raises DataError if the state belongs to another order of other data."""
        for name, value in self._identity().items():
            if state.get(name) != value:
                raise DataError(
                    str(self.tokens.path), f"{name} {value}", f"{state.get(name)}, as when the state was saved"
                )
        self.samples = int(state["samples"])

    def _identity(self) -> dict[str, int]:
        return {
            "seed": self.seed,
            "sequence_length": self.sequence_length,
            "token_count": len(self.tokens),
        }

    def _sample(self, index: int) -> Any:
        epoch, place = divmod(index, self.sample_count)
        start = permuted(place, self.sample_count, self.seed, epoch) * self.sequence_length
        tokens = self.tokens.read(start, self.sequence_length).astype(np.int64)
        limit = self.vocabulary_size if self.vocabulary_size is not None else 2**63
        if tokens.min() < 0 or tokens.max() >= limit:
            wrong = int(tokens.min()) if tokens.min() < 0 else int(tokens.max())
            raise DataError(
                str(self.tokens.path),
                f"token {wrong} near token index {start}",
                f"tokens from 0 to {limit - 1}, the model's vocabulary",
                "The file is damaged, has another data.dtype, or was made with another tokenizer.",
            )
        return tokens


def permuted(place: int, count: int, seed: int, epoch: int) -> int:
    """Where a pseudorandom permutation of range(count) sends ``place``.

    A Feistel network permutes the next power of four; results outside the range are sent through it again until they
    fall inside, which keeps it a permutation and takes fewer than four turns on average.
    """
    assert 0 <= place < count
    half = max(1, ((count - 1).bit_length() + 1) // 2)
    mask, key = (1 << half) - 1, _mix(_mix(seed) ^ epoch)
    while True:
        left, right = place >> half, place & mask
        for turn in range(_ROUNDS):
            left, right = right, left ^ (_mix(key + (turn << 58) + right) & mask)
        place = left << half | right
        if place < count:
            return place


def _mix(value: int) -> int:
    """The 64-bit finalizer of SplitMix64 (Steele, Lea and Flood, 2014)."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ value >> 30) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ value >> 27) * 0x94D049BB133111EB) & _MASK
    return value ^ value >> 31
