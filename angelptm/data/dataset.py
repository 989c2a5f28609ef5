"""From the ``data`` section to batches for training and validation."""

from __future__ import annotations

from pathlib import Path

from angelptm.config.schema import Data
from angelptm.data.batches import TokenBatches
from angelptm.data.cache import cached_tokens
from angelptm.data.corpus import split_documents, stdlib_documents, text_documents
from angelptm.data.megatron import open_megatron
from angelptm.data.nanogpt import open_nanogpt
from angelptm.data.tokenize import open_tokenizer
from angelptm.data.tokens import Progress, TokenSource, split_tail


def open_dataset(
    data: Data,
    seed: int,
    cache_dir: Path | str,
    vocabulary_size: int | None = None,
    progress: Progress | None = None,
    rank: int = 0,
    rank_count: int = 1,
) -> tuple[TokenBatches, TokenBatches | None]:
    """(train, validation); validation is None if data.validation_fraction is 0 and the data brings none of its own.

    cache_dir: where the tokens of text are written once. progress: called with bytes done and total while they are.
    Raises DataError.
    """
    train, validation = _sources(data, Path(cache_dir), progress)

    def batches(tokens: TokenSource) -> TokenBatches:
        return TokenBatches(
            tokens, data.sequence_length, data.micro_batch_size, seed, vocabulary_size, rank, rank_count
        )

    return batches(train), batches(validation) if validation is not None else None


def _sources(data: Data, cache_dir: Path, progress: Progress | None) -> tuple[TokenSource, TokenSource | None]:
    train: TokenSource
    if data.kind == "text":
        return _text(data, cache_dir, progress)
    assert data.path is not None  # the schema sees to it
    if data.kind == "megatron":
        train = open_megatron(data.path)
    else:
        train, validation = open_nanogpt(data.path, data.dtype)
        if validation is not None:
            return train, validation
    return split_tail(train, data.validation_fraction, data.sequence_length)


def _text(data: Data, cache_dir: Path, progress: Progress | None) -> tuple[TokenSource, TokenSource | None]:
    """Split by file; a single file is split like a token file, at its tail."""
    documents = stdlib_documents() if data.path is None else text_documents(data.path, data.extensions)
    tokenizer = open_tokenizer(data.tokenizer)
    train, validation = split_documents(documents, data.validation_fraction)
    tokens = cached_tokens(train, tokenizer, cache_dir, progress)
    if len(documents) == 1:
        return split_tail(tokens, data.validation_fraction, data.sequence_length)
    return tokens, cached_tokens(validation, tokenizer, cache_dir, progress) if validation else None
