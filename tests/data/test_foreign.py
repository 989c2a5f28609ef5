"""Token files, caches and tokenizers that somebody else wrote: what the fuzzer and reading found, each by hand."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from angelptm.data import open_tokenizer
from angelptm.data.cache import cached_tokens
from angelptm.data.corpus import text_documents
from angelptm.data.megatron import open_megatron
from angelptm.data.nanogpt import open_nanogpt
from angelptm.data.tokenize import MAX_TOKENS, ByteTokenizer, FileTokenizer
from angelptm.data.tokens import TokenFile
from angelptm.errors import DataError


def write_tokenizer(path: Path, vocabulary: dict[str, int], **sections: Any) -> Path:
    model = {"type": "WordLevel", "vocab": vocabulary, "unk_token": "[UNK]"}
    document = {"version": "1.0", "added_tokens": [], "pre_tokenizer": {"type": "WhitespaceSplit"}, "model": model}
    path.write_text(json.dumps({**document, **sections}))
    return path


@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
@pytest.mark.parametrize("part", ["a.bin", "a.idx", "tokenizer.json"])
@pytest.mark.timeout(20)
def test_what_is_no_regular_file_is_not_opened(tmp_path: Path, part: str, kind: str) -> None:
    for name in {"a.bin", "a.idx"} - {part}:
        (tmp_path / name).write_bytes(b"\0" * 64)
    if kind == "pipe":
        os.mkfifo(tmp_path / part)
    elif kind == "device":
        (tmp_path / part).symlink_to("/dev/zero")
    else:
        (tmp_path / part).mkdir()
    opened: dict[str, Callable[[], object]] = {
        "a.bin": lambda: TokenFile(tmp_path / "a.bin", "uint16"),
        "a.idx": lambda: open_megatron(tmp_path / "a"),
        "tokenizer.json": lambda: open_tokenizer(str(tmp_path / "tokenizer.json")),
    }
    with pytest.raises(DataError, match="no regular file"):
        opened[part]()


@pytest.mark.parametrize("name", ["train.bin", "val.bin"])
def test_link_out_of_a_folder_of_tokens_is_refused_and_one_inside_is_not(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    for path in (tmp_path / "secret.bin", folder / "tokens.bin", folder / "train.bin"):
        np.arange(9, dtype="<u2").tofile(path)
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to("tokens.bin")
    assert len(open_nanogpt(folder, "uint16")[0]) == 9
    (folder / name).unlink()
    (folder / name).symlink_to("../secret.bin")
    with pytest.raises(DataError, match=r"a link to .*secret\.bin, expected a file inside"):
        open_nanogpt(folder, "uint16")
    assert len(open_nanogpt(folder / name, "uint16")[0]) == 9, "who names the file means it"


@pytest.mark.parametrize(
    "description",
    [
        '{"token_count": 4, "max_token": 1e999}',
        f'{{"token_count": 4, "max_token": {2**70}}}',
        '{"token_count": 4, "max_token": -2}',
        '{"token_count": 4, "max_token": 256}',
        '{"token_count": 4, "max_token": "99"}',
        '{"token_count": 4, "max_token": true}',
        '{"token_count": 4.0, "max_token": 99}',
        "[" * 100_000 + "]" * 100_000,
        "[]",
        "4",
    ],
    ids=lambda text: text[:50],
)
def test_description_of_a_cache_is_not_believed(tmp_path: Path, description: str) -> None:
    (tmp_path / "a.txt").write_bytes(b"abc")
    documents = text_documents(tmp_path / "a.txt", [".txt"])
    path = cached_tokens(documents, ByteTokenizer(), tmp_path / "cache").path.with_suffix(".json")
    path.write_text(description)
    tokens = cached_tokens(documents, ByteTokenizer(), tmp_path / "cache")
    assert (tokens.known_max_token, len(tokens)) == (99, 4)
    assert json.loads(path.read_text())["max_token"] == 99, "it is written anew"


def test_cache_that_is_a_link_is_replaced_and_what_it_leads_to_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"abc")
    (tmp_path / "secret").write_bytes(b"wxyz")
    documents = text_documents(tmp_path / "a.txt", [".txt"])
    path = cached_tokens(documents, ByteTokenizer(), tmp_path / "cache").path
    path.unlink()
    path.symlink_to("../secret")
    tokens = cached_tokens(documents, ByteTokenizer(), tmp_path / "cache")
    assert tokens.read(0, 4).tobytes() == b"abc\0"
    assert (tmp_path / "secret").read_bytes() == b"wxyz"


def test_vocabulary_with_holes_counts_up_to_its_last_token(tmp_path: Path) -> None:
    tokenizer = open_tokenizer(str(write_tokenizer(tmp_path / "t.json", {"[UNK]": 0, "a": 70_000})))
    assert (tokenizer.vocabulary_size, tokenizer.dtype) == (70_001, "uint32")
    assert [piece.tolist() for piece in tokenizer.encode([b"a b"])] == [[70_000, 0]]
    with pytest.raises(DataError, match=f"tokens up to {MAX_TOKENS}"):
        open_tokenizer(str(write_tokenizer(tmp_path / "t.json", {"[UNK]": 0, "a": MAX_TOKENS})))
    with pytest.raises(DataError, match="tokens up to -1"):
        open_tokenizer(str(write_tokenizer(tmp_path / "t.json", {})))


def test_text_that_a_tokenizer_cannot_encode_is_a_data_error(tmp_path: Path) -> None:
    tokenizer = open_tokenizer(str(write_tokenizer(tmp_path / "t.json", {"a": 0})))
    with pytest.raises(DataError, match=r"t\.json.*UNK"):
        tokenizer.encode_text("b")


def test_a_library_that_panics_is_a_data_error(tmp_path: Path) -> None:
    class PanicException(BaseException):
        """As pyo3 raises it: no Exception."""

    class Panics:
        def encode(self, *_: Any, **__: Any) -> None:
            raise PanicException("called `Option::unwrap()` on a `None` value")

    tokenizer = FileTokenizer(write_tokenizer(tmp_path / "t.json", {"[UNK]": 0}))
    tokenizer._encoder = Panics()
    with pytest.raises(DataError, match="unwrap"):
        tokenizer.encode_text("a")


@pytest.mark.parametrize("section", ["normalizer", "decoder"])
def test_rules_that_multiply_text_are_refused(tmp_path: Path, section: str) -> None:
    def rules(count: int) -> dict[str, Any]:
        rule = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
        return {"type": "Sequence", f"{section}s": [rule] * count}

    vocabulary = {"[UNK]": 0, "a": 1}
    tokenizer = open_tokenizer(str(write_tokenizer(tmp_path / "t.json", vocabulary, **{section: rules(8)})))
    assert tokenizer.encode_text("a") == ([0] if section == "normalizer" else [1])
    with pytest.raises(DataError, match=f"a {section} that multiplies text"):
        open_tokenizer(str(write_tokenizer(tmp_path / "t.json", vocabulary, **{section: rules(60)})))


def test_text_without_lines_is_not_gathered_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("angelptm.data.tokenize._LINE_CHARACTERS", 64)
    tokenizer = open_tokenizer(str(write_tokenizer(tmp_path / "t.json", {"[UNK]": 0, "ab": 1})))
    found = [piece.tolist() for piece in tokenizer.encode([b"ab " * 8] * 50)]
    assert len(found) > 10
    assert [token for piece in found for token in piece] == [1] * 400, "no word is cut"
    assert [len(piece) for piece in tokenizer.encode([b"x" * 100] * 3)] == [1, 1, 1]


def test_deeply_nested_or_huge_tokenizer_is_a_data_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "t.json"
    path.write_text("[" * 100_000 + "]" * 100_000)
    with pytest.raises(DataError, match="recursion"):
        open_tokenizer(str(path))
    monkeypatch.setattr("angelptm.data.tokenize._LIMIT_BYTES", 1000)
    with pytest.raises(DataError, match="at most 1000 bytes"):
        open_tokenizer(str(path))
