"""Text to tokens, as a stream: bytes, or a ``tokenizers`` tokenizer.json."""

from __future__ import annotations

import codecs
import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from angelptm.data.tokens import TokenArray
from angelptm.errors import DataError

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
    """A tokenizer.json. Text is encoded in pieces of about 1 MiB, cut after a line where there is one."""

    def __init__(self, path: Path) -> None:
        from tokenizers import Tokenizer as Encoder

        try:
            content = path.read_bytes()
            self._encoder: Any = Encoder.from_str(content.decode("utf-8"))
        except OSError as error:
            raise DataError(str(path), error.strerror or "an error", "'byte' or a tokenizer.json") from error
        except Exception as error:  # tokenizers raises plain Exception, with the parser's message
            raise DataError(
                str(path), " ".join(str(error).split()), "a tokenizer.json of the tokenizers library"
            ) from error
        # Truncation and padding serve inference; here they would drop or invent tokens.
        self._encoder.no_truncation()
        self._encoder.no_padding()
        self.vocabulary_size: int = self._encoder.get_vocab_size(with_added_tokens=True)
        self.dtype = "uint16" if self.vocabulary_size <= 2**16 else "uint32"
        self.fingerprint = hashlib.sha256(content).hexdigest()
        ids = (self._encoder.token_to_id(name) for name in _SEPARATOR_NAMES)
        self.separator: int | None = next((token for token in ids if token is not None), None)

    def encode(self, pieces: Iterable[bytes]) -> Iterator[TokenArray]:
        decoder, rest = codecs.getincrementaldecoder("utf-8")(), ""
        try:
            for piece in pieces:
                rest += decoder.decode(piece)
                cut = rest.rfind("\n") + 1
                if cut:
                    yield self._array(rest[:cut])
                    rest = rest[cut:]
            rest += decoder.decode(b"", final=True)
        except UnicodeDecodeError as error:
            raise NotTextError(f"bytes that are not UTF-8 ({error.reason})") from error
        if rest:
            yield self._array(rest)

    def encode_text(self, text: str) -> list[int]:
        return list(self._encoder.encode(text, add_special_tokens=False).ids)

    def decode(self, tokens: Sequence[int]) -> str:
        return str(self._encoder.decode(list(tokens)))

    def _array(self, text: str) -> TokenArray:
        return np.asarray(self.encode_text(text), dtype=self.dtype)
