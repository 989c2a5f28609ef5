"""Text to tokens, as a stream: bytes, or a ``tokenizers`` tokenizer.json."""

from __future__ import annotations

import base64
import codecs
import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from angelptm.data.tokens import TokenArray
from angelptm.errors import DataError
from angelptm.foreign import parse_json, read_whole

MAX_TOKENS = 1 << 24
"""Sixteen times the largest vocabulary in use."""
MAX_GROWTH = 256

_LIMIT_BYTES = 256 << 20
_LINE_CHARACTERS = 4 << 20
_SEPARATOR_NAMES = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[SEP]")


class NotTextError(Exception):
    """A document is not text for this tokenizer; the message says why."""


class Tokenizer(Protocol):
    """``separator`` is written after each document, ``fingerprint`` differs if tokens would."""

    vocabulary_size: int
    separator: int | None
    dtype: str
    fingerprint: str

    def encode(self, pieces: Iterable[bytes]) -> Iterator[TokenArray]:
        """The tokens of one document that arrives in pieces. Raises NotTextError."""
        ...

    def encode_text(self, text: str) -> list[int]: ...

    def decode(self, tokens: Sequence[int]) -> str: ...


def open_tokenizer(name: str) -> Tokenizer:
    """``"byte"``, or the path of a tokenizer.json. Raises DataError."""
    return ByteTokenizer() if name == "byte" else FileTokenizer(Path(os.path.expanduser(name)))


class ByteTokenizer:
    """A token is a byte. Token 0 ends a document, since no text contains the byte 0."""

    vocabulary_size = 256
    separator: int | None = 0
    dtype = "uint8"
    fingerprint = "byte"

    def encode(self, pieces: Iterable[bytes]) -> Iterator[TokenArray]:
        for piece in pieces:
            if 0 in piece:
                raise NotTextError("a byte 0")
            yield np.frombuffer(piece, dtype=np.uint8)

    def encode_text(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, tokens: Sequence[int]) -> str:
        return bytes(token for token in tokens if token != self.separator).decode("utf-8", "replace")


class FileTokenizer:
    """A tokenizer.json. Text is encoded in pieces of about 1 MiB, cut after a line where there is one.

    The file may come from others. It is data, and checked as such: no token beyond MAX_TOKENS, no rule that multiplies
    text, nothing but DataError from the library that reads it. Its regular expressions do run, and a malicious one can
    take as long as it likes.
    """

    def __init__(self, path: Path) -> None:
        from tokenizers import Tokenizer as Encoder

        self._path = path
        content = read_whole(path, _LIMIT_BYTES, "'byte' or a tokenizer.json")
        with self._reading("a tokenizer.json of the tokenizers library"):
            _check_growth(path, content)
            self._encoder: Any = Encoder.from_str(content.decode("utf-8"))
            # Truncation and padding serve inference; here they would drop or invent tokens.
            self._encoder.no_truncation()
            self._encoder.no_padding()
            vocabulary: dict[str, int] = self._encoder.get_vocab(with_added_tokens=True)
        # Not the number of tokens: a vocabulary may have holes, and a model needs a row for the last one.
        self.vocabulary_size: int = max(vocabulary.values(), default=-1) + 1
        if not 1 <= self.vocabulary_size <= MAX_TOKENS:
            raise DataError(str(path), f"tokens up to {self.vocabulary_size - 1}", f"1 to {MAX_TOKENS} tokens")
        self.dtype = "uint16" if self.vocabulary_size <= 2**16 else "uint32"
        self.fingerprint = hashlib.sha256(content).hexdigest()
        self.separator: int | None = next((vocabulary[name] for name in _SEPARATOR_NAMES if name in vocabulary), None)

    def encode(self, pieces: Iterable[bytes]) -> Iterator[TokenArray]:
        decoder, rest = codecs.getincrementaldecoder("utf-8")(), ""
        try:
            for piece in pieces:
                rest += decoder.decode(piece)
                # A file without lines is cut after a word, or anywhere, so that it is never in memory whole.
                cut = rest.rfind("\n") + 1
                if not cut and len(rest) >= _LINE_CHARACTERS:
                    cut = max(rest.rfind(" "), 0) or len(rest)  # before the space: it belongs to the next word
                if cut:
                    yield self._array(rest[:cut])
                    rest = rest[cut:]
            rest += decoder.decode(b"", final=True)
        except UnicodeDecodeError as error:
            raise NotTextError(f"bytes that are not UTF-8 ({error.reason})") from error
        if rest:
            yield self._array(rest)

    def encode_text(self, text: str) -> list[int]:
        with self._reading("a tokenizer for this text"):
            tokens = list(self._encoder.encode(text, add_special_tokens=False).ids)
            if tokens and max(tokens) >= self.vocabulary_size:
                raise ValueError(f"token {max(tokens)}, which is not in its vocabulary")
        return tokens

    def decode(self, tokens: Sequence[int]) -> str:
        with self._reading("a tokenizer for these tokens"):
            return str(self._encoder.decode(list(tokens)))

    def _array(self, text: str) -> TokenArray:
        return np.asarray(self.encode_text(text), dtype=self.dtype)

    @contextmanager
    def _reading(self, expected: str) -> Iterator[None]:
        """Makes a DataError of what the tokenizers library raises: plain Exception with its parser's message, or where
        it gave up on an assumption a PanicException, which is no Exception at all."""
        try:
            yield
        except (DataError, MemoryError):
            raise
        except BaseException as error:
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            raise DataError(str(self._path), " ".join(str(error).split())[:300], expected) from error


def _check_growth(path: Path, content: bytes) -> None:
    """DataError if the rules that rewrite text could make it more than MAX_GROWTH times longer, one after another.

    Twenty rules "replace a by aa" turn one letter into a million.
    """
    document = parse_json(content, path, "a tokenizer.json of the tokenizers library")
    if not isinstance(document, dict):
        return
    for section in ("normalizer", "pre_tokenizer", "decoder"):
        growth, left = 1, [document.get(section)]
        while left and growth <= MAX_GROWTH:
            node = left.pop()
            if isinstance(node, list):
                left.extend(node)
            elif isinstance(node, dict):
                growth *= _growth(node)
                left.extend(value for value in node.values() if isinstance(value, (dict, list)))
        if growth > MAX_GROWTH:
            raise DataError(str(path), f"a {section} that multiplies text", f"at most {MAX_GROWTH} characters from one")


def _growth(rule: dict[str, Any]) -> int:
    """Characters that one character can become."""
    if rule.get("type") == "Precompiled":
        return _charsmap_growth(rule.get("precompiled_charsmap"))
    replacement = rule.get("content") if rule.get("type") == "Replace" else rule.get("prepend")
    return max(1, len(replacement)) if isinstance(replacement, str) else 1


def _charsmap_growth(encoded: Any) -> int:
    """SentencePiece's map: in base64 a uint32, the bytes of a trie, the trie, and replacements with a byte 0 each."""
    try:
        blob = base64.b64decode(encoded)
        trie_bytes = int.from_bytes(blob[:4], "little")
    except (TypeError, ValueError):
        return 1  # the library refuses it
    return max(1, *(len(text.decode("utf-8", "replace")) for text in blob[4 + trie_bytes :].split(b"\0")))
