"""The order of batches: a permutation each epoch, a function of (seed, position), and resumable."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from angelptm.config.schema import Data
from angelptm.data import TokenBatches, open_dataset
from angelptm.data.batches import permuted
from angelptm.data.tokens import TokenFile
from angelptm.errors import DataError


@pytest.fixture
def tokens(tmp_path: Path) -> TokenFile:
    np.arange(1003, dtype="<u2").tofile(tmp_path / "a.bin")
    return TokenFile(tmp_path / "a.bin", "uint16")


@given(count=st.integers(1, 700), seed=st.integers(0, 2**63 - 1), epoch=st.integers(0, 2**40))
def test_each_epoch_is_a_permutation(count: int, seed: int, epoch: int) -> None:
    assert sorted(permuted(place, count, seed, epoch) for place in range(count)) == list(range(count))


def test_epochs_and_seeds_give_different_well_mixed_orders() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        return [permuted(place, 1000, seed, epoch) for place in range(1000)]

    orders = [order(0, 0), order(0, 1), order(1, 0), order(1, 1)]
    for one, other in itertools.combinations([list(range(1000)), *orders], 2):
        assert sum(a == b for a, b in zip(one, other)) < 12, "about one place in 1000 agrees by chance"
        assert abs(np.corrcoef(one, other)[0, 1]) < 0.15
    # The order is part of what a resumed run relies on: it must not change between versions.
    assert [permuted(place, 10, 7, 3) for place in range(10)] == [3, 0, 6, 4, 2, 7, 1, 5, 8, 9]


def test_one_epoch_shows_every_sample_once(tokens: TokenFile) -> None:
    batches = TokenBatches(tokens, 10, 4, seed=5)
    assert batches.sample_count == 100
    rows = torch.cat([next(batches)["input_ids"] for _ in range(25)])
    assert sorted(rows[:, 0].tolist()) == list(range(0, 1000, 10))
    assert torch.equal(rows - rows[:, :1], torch.arange(10).repeat(100, 1)), "each row is consecutive tokens"


def test_batches_are_int64_with_labels_of_their_own(tokens: TokenFile) -> None:
    batch = next(TokenBatches(tokens, 10, 4, seed=5))
    assert batch["input_ids"].shape == (4, 10)
    assert batch["input_ids"].dtype == batch["labels"].dtype == torch.int64
    assert torch.equal(batch["input_ids"], batch["labels"])
    assert batch["input_ids"].data_ptr() != batch["labels"].data_ptr()


def test_order_resumes_in_the_middle_of_an_epoch(tokens: TokenFile) -> None:
    whole = TokenBatches(tokens, 10, 7, seed=3)
    expected = [next(whole)["input_ids"] for _ in range(40)]
    first = TokenBatches(tokens, 10, 7, seed=3)
    for _ in range(17):
        next(first)
    second = TokenBatches(tokens, 10, 7, seed=3)
    second.load_state_dict(first.state_dict())
    rest = [next(second)["input_ids"] for _ in range(23)]
    assert all(torch.equal(a, b) for a, b in zip(expected[17:], rest, strict=True))
    assert torch.equal(second.batch(2)["input_ids"], expected[2]), "any batch is computable from its position"


def test_ranks_share_the_samples_and_any_number_goes_on(tokens: TokenFile) -> None:
    def rows(batch: dict[str, torch.Tensor]) -> list[Any]:
        return [tuple(row) for row in batch["input_ids"].tolist()]

    alone = TokenBatches(tokens, 10, 1, seed=3)
    expected = [row for _ in range(36) for row in rows(next(alone))]
    ranks = [TokenBatches(tokens, 10, 2, seed=3, rank=rank, rank_count=3) for rank in range(3)]
    found = [row for _ in range(4) for one in ranks for row in rows(next(one))]
    assert found == expected[:24]
    others = [TokenBatches(tokens, 10, 3, seed=3, rank=rank, rank_count=2) for rank in range(2)]
    for one in others:
        one.load_state_dict(ranks[1].state_dict())
    assert [row for _ in range(2) for one in others for row in rows(next(one))] == expected[24:]


@pytest.mark.parametrize("change", [{"seed": 4}, {"sequence_length": 11}])
def test_state_of_another_order_is_refused(tokens: TokenFile, change: dict[str, Any]) -> None:
    shape: dict[str, Any] = {"sequence_length": 10, "micro_batch_size": 7, "seed": 3}
    state = TokenBatches(tokens, **shape).state_dict()
    with pytest.raises(DataError, match=next(iter(change))):
        TokenBatches(tokens, **{**shape, **change}).load_state_dict(state)


def test_token_beyond_the_vocabulary_is_a_data_error(tokens: TokenFile, tmp_path: Path) -> None:
    batches = TokenBatches(tokens, 10, 100, seed=0, vocabulary_size=500)
    with pytest.raises(DataError, match="tokens from 0 to 499"):
        next(batches)
    assert batches.samples == 0
    np.full(100, -1, "<i4").tofile(tmp_path / "n.bin")
    with pytest.raises(DataError, match="token -1"):
        next(TokenBatches(TokenFile(tmp_path / "n.bin", "int32"), 10, 2, seed=0))


def test_too_few_tokens_are_refused(tokens: TokenFile) -> None:
    with pytest.raises(DataError, match="1003 tokens, expected at least one sequence of 1004"):
        TokenBatches(tokens, 1004, 1, seed=0)


def test_text_folder_is_split_by_file(tmp_path: Path) -> None:
    folder = tmp_path / "text"
    folder.mkdir()
    for index in range(50):
        (folder / f"{index}.txt").write_bytes(bytes([65 + index]) * 63)
    data = Data(path=folder, sequence_length=64, micro_batch_size=1, validation_fraction=0.3)
    train, validation = open_dataset(data, 0, tmp_path / "cache")
    assert validation is not None

    def files(batches: TokenBatches) -> set[int]:
        return {int(batches.batch(position)["input_ids"][0, 0]) for position in range(batches.sample_count)}

    assert files(train) | files(validation) == set(range(65, 115))
    assert not files(train) & files(validation)
    assert open_dataset(data.model_copy(update={"validation_fraction": 0.0}), 0, tmp_path / "cache")[1] is None


def test_single_text_file_and_token_files_are_split_at_the_tail(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(bytes(range(1, 201)))
    for data in (
        Data(path=tmp_path / "a.txt", sequence_length=8, validation_fraction=0.25),
        Data(kind="nanogpt", path=tmp_path / "a.bin", sequence_length=8, validation_fraction=0.25),
    ):
        np.arange(1, 202, dtype="<u2").tofile(tmp_path / "a.bin")
        train, validation = open_dataset(data, 0, tmp_path / "cache")
        assert validation is not None
        assert (len(train.tokens), len(validation.tokens)) == (151, 50)
        assert validation.tokens.read(0, 3).tolist() == [152, 153, 154]


def test_demo_corpus_is_the_same_each_time(tmp_path: Path) -> None:
    data = Data(sequence_length=32, micro_batch_size=2)
    runs = [open_dataset(data, 1, tmp_path / name) for name in ("a", "b")]
    for one, other in zip(*runs, strict=True):
        assert one is not None
        assert other is not None
        assert len(one.tokens) == len(other.tokens)
        assert all(torch.equal(one.batch(k)["input_ids"], other.batch(k)["input_ids"]) for k in (0, 1, 10**6))
    assert 10 * len(runs[0][1].tokens if runs[0][1] else []) < len(runs[0][0].tokens)
