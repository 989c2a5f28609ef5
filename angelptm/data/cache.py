"""Tokens of a list of documents, written once to a file and found again by what they were made from.

``NAME.bin`` holds the tokens, ``NAME.json`` what they are. The .json is renamed into place last, so it vouches for a
complete .bin; whatever ends early leaves neither under its final name.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np

from angelptm.data.corpus import Document
from angelptm.data.tokenize import NotTextError, Tokenizer
from angelptm.data.tokens import Progress, TokenFile
from angelptm.errors import DataError
from angelptm.foreign import check_inside, parse_json, read_whole

_log = logging.getLogger("angelptm")
_FORMAT = 1
_PIECE_BYTES = 1 << 20
_LIMIT_BYTES = 64 << 20
_EXPECTED = "the description of a token cache"


def cached_tokens(
    documents: Sequence[Document], tokenizer: Tokenizer, cache_dir: Path, progress: Progress | None = None
) -> TokenFile:
    """The documents' tokens, one after another, each ended by the tokenizer's separator.

    A document that is not text is left out with a warning; if it is the only one, DataError. progress counts bytes.
    """
    name = _fingerprint(documents, tokenizer)
    found = _lookup(cache_dir / name, tokenizer)
    if found is not None:
        return found
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        with _replacing(cache_dir / f"{name}.bin") as file:
            facts = _write(file, documents, tokenizer, progress)
        with _replacing(cache_dir / f"{name}.json") as file:
            file.write(json.dumps(facts, indent=1).encode())
    except OSError as error:
        raise DataError(
            str(error.filename or cache_dir), error.strerror or str(error), "a folder to write the token cache to"
        ) from error
    if facts["skipped"]:
        _log.warning("data: %d files are not text and were left out: %s", len(facts["skipped"]), facts["skipped"][:5])
    return TokenFile(cache_dir / f"{name}.bin", tokenizer.dtype, facts["max_token"])


def _fingerprint(documents: Sequence[Document], tokenizer: Tokenizer) -> str:
    digest = hashlib.sha256(f"{_FORMAT} {tokenizer.fingerprint} {tokenizer.separator}\n".encode())
    for document in documents:
        digest.update(repr((document.name, document.size_bytes, document.mtime_ns)).encode("utf-8", "surrogateescape"))
    return f"tokens-{digest.hexdigest()[:24]}"


def _lookup(stem: Path, tokenizer: Tokenizer) -> TokenFile | None:
    """The tokens if both files are there, are files, and agree; what they say is checked as if others wrote them."""
    description, content = stem.with_suffix(".json"), stem.with_suffix(".bin")
    if not os.path.lexists(description):
        return None
    try:
        check_inside(description, stem.parent)
        check_inside(content, stem.parent)
        facts = parse_json(read_whole(description, _LIMIT_BYTES, _EXPECTED), description, _EXPECTED)
        largest, count = (facts.get("max_token"), facts.get("token_count")) if isinstance(facts, dict) else (None, None)
        if type(largest) is int and -1 <= largest < tokenizer.vocabulary_size:
            tokens = TokenFile(content, tokenizer.dtype, largest)
            if type(count) is int and len(tokens) == count:
                return tokens
    except DataError:
        pass
    _log.warning("data: %s does not match its description and is written anew", content)
    return None


def _write(
    file: IO[bytes], documents: Sequence[Document], tokenizer: Tokenizer, progress: Progress | None
) -> dict[str, Any]:
    total_bytes, done_bytes, largest = sum(document.size_bytes for document in documents), 0, -1
    skipped: list[str] = []
    for document in documents:
        start = file.tell()
        try:
            for tokens in tokenizer.encode(_pieces(document.path)):
                if len(tokens):
                    largest = max(largest, int(tokens.max()))
                    file.write(tokens.tobytes())
            if tokenizer.separator is not None:
                file.write(np.asarray([tokenizer.separator], dtype=tokenizer.dtype).tobytes())
                largest = max(largest, tokenizer.separator)
        except NotTextError as error:
            if len(documents) == 1:
                raise DataError(str(document.path), str(error), "a text file") from error
            file.seek(start)
            file.truncate()
            skipped.append(document.name)
        done_bytes += document.size_bytes
        if progress is not None:
            progress(done_bytes, total_bytes)
    token_count = file.tell() // np.dtype(tokenizer.dtype).itemsize
    return {"token_count": token_count, "dtype": tokenizer.dtype, "max_token": largest, "skipped": skipped}


def _pieces(path: Path) -> Iterator[bytes]:
    try:
        with path.open("rb") as file:
            while piece := file.read(_PIECE_BYTES):
                yield piece
    except OSError as error:
        raise DataError(str(path), error.strerror or "an error", "a readable text file") from error


@contextmanager
def _replacing(path: Path) -> Iterator[IO[bytes]]:
    """A temporary file beside ``path`` that takes its name when the block ends well, and is gone when it does not."""
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
