"""Corpora, tokenizers, the token cache, and files that others wrote."""

from __future__ import annotations

import json
import os
import random
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from angelptm.config.schema import Data
from angelptm.data import max_token, open_dataset, open_tokenizer
from angelptm.data.cache import cached_tokens
from angelptm.data.corpus import Document, split_documents, stdlib_documents, text_documents
from angelptm.data.megatron import MegatronTokens, open_megatron
from angelptm.data.nanogpt import open_nanogpt
from angelptm.data.tokenize import ByteTokenizer
from angelptm.data.tokens import TokenFile, TokenSource, split_tail
from angelptm.errors import DataError


def everything(source: TokenSource) -> list[int]:
    return [int(token) for token in source.read(0, len(source))]


def folder_of(path: Path, texts: dict[str, bytes]) -> Path:
    for name, content in texts.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    return path


def test_stdlib_corpus_is_sorted_text_without_packages() -> None:
    documents = stdlib_documents()
    names = [document.name for document in documents]
    assert names == sorted(names, key=os.fsencode)
    assert len(names) > 400
    assert "json/decoder.py" in names
    assert not [name for name in names if "site-packages" in name or "__pycache__" in name or not name.endswith(".py")]


def test_folder_order_does_not_depend_on_the_order_of_creation(tmp_path: Path) -> None:
    names = ["b.txt", "a/z.txt", "B.txt", "a.txt", "é.txt", "a/y.md", "skip.bin", "c/__pycache__/x.txt"]
    found = []
    for run in range(2):
        random.Random(run).shuffle(names)
        folder = folder_of(tmp_path / str(run), dict.fromkeys(names, b"x"))
        (folder / "link.txt").symlink_to(folder / "a.txt")
        found.append([document.name for document in text_documents(folder, [".txt", ".md"])])
    assert found[0] == found[1] == ["B.txt", "a.txt", "a/y.md", "a/z.txt", "b.txt", "é.txt"]


def test_split_is_by_name_disjoint_complete_and_stable_under_growth() -> None:
    documents = [Document(f"{index}.txt", Path(f"{index}.txt"), 1, 1) for index in range(2000)]
    train, validation = split_documents(documents, 0.1)
    assert sorted(train + validation, key=documents.index) == documents
    assert 150 < len(validation) < 250
    smaller_train, smaller_validation = split_documents(documents[:1000], 0.1)
    assert set(smaller_train) <= set(train)
    assert set(smaller_validation) <= set(validation)
    for fraction in (1e-9, 0.999999):
        train, validation = split_documents(documents[:3], fraction)
        assert train
        assert validation
    assert split_documents(documents, 0.0) == (documents, [])


def test_byte_tokens_are_the_documents_with_separators_and_are_written_once(tmp_path: Path) -> None:
    folder = folder_of(
        tmp_path / "text", {"a.txt": b"one\n", "b.txt": "zwö".encode(), "c.txt": b"not\0text", "d.txt": b""}
    )
    documents = text_documents(folder, [".txt"])
    seen: list[tuple[int, int]] = []
    tokens = cached_tokens(
        documents, ByteTokenizer(), tmp_path / "cache", lambda done, total: seen.append((done, total))
    )
    assert bytes(everything(tokens)) == b"one\n\0" + "zwö".encode() + b"\0" + b"\0"
    assert max_token(tokens) == 0xC3
    assert seen[-1] == (16, 16)
    again = cached_tokens(documents, ByteTokenizer(), tmp_path / "cache", lambda *_: pytest.fail("tokenized again"))
    assert everything(again) == everything(tokens)
    assert not [name for name in os.listdir(tmp_path / "cache") if name.startswith(".")]


def test_tokens_of_a_document_that_turns_out_not_to_be_text_are_taken_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("angelptm.data.cache._PIECE_BYTES", 2)
    folder = folder_of(
        tmp_path / "text", {"a.txt": b"one", "b.txt": b"long before the \0", "c.txt": b"t", "d.txt": b"xxxx\0"}
    )
    tokens = cached_tokens(text_documents(folder, [".txt"]), ByteTokenizer(), tmp_path / "cache")
    assert bytes(everything(tokens)) == b"one\0t\0"
    assert "2 files are not text and were left out: ['b.txt', 'd.txt']" in caplog.text


def test_cut_cache_file_is_written_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    documents = text_documents(folder_of(tmp_path / "text", {"a.txt": b"abc", "b.txt": b"def"}), [".txt"])
    tokens = cached_tokens(documents, ByteTokenizer(), tmp_path / "cache")
    expected = everything(tokens)
    tokens.path.write_bytes(b"ab")
    assert everything(cached_tokens(documents, ByteTokenizer(), tmp_path / "cache")) == expected
    assert "written anew" in caplog.text
    tokens.path.with_suffix(".json").write_text("[")
    assert everything(cached_tokens(documents, ByteTokenizer(), tmp_path / "cache")) == expected


def test_failed_tokenization_leaves_nothing_behind(tmp_path: Path) -> None:
    documents = text_documents(folder_of(tmp_path / "text", {"a.txt": b"abc", "b.txt": b"def"}), [".txt"])
    documents[1].path.unlink()
    with pytest.raises(DataError, match=r"b\.txt"):
        cached_tokens(documents, ByteTokenizer(), tmp_path / "cache")
    assert os.listdir(tmp_path / "cache") == []
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="token cache"):
        cached_tokens(documents[:1], ByteTokenizer(), tmp_path / "file")


def write_tokenizer(path: Path) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<|endoftext|>", "[UNK]", "def", "return", "x"]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.enable_truncation(2)
    tokenizer.save(str(path))
    return path


def test_file_tokenizer_encodes_whole_documents(tmp_path: Path) -> None:
    tokenizer = open_tokenizer(str(write_tokenizer(tmp_path / "tokenizer.json")))
    assert (tokenizer.vocabulary_size, tokenizer.separator, tokenizer.dtype) == (5, 0, "uint16")
    documents = text_documents(
        folder_of(tmp_path / "text", {"a.txt": b"def x\nreturn x\ndef", "b.txt": b"x \xff", "c.txt": "é x".encode()}),
        [".txt"],
    )
    tokens = cached_tokens(documents, tokenizer, tmp_path / "cache")
    assert everything(tokens) == [2, 4, 3, 4, 2, 0, 1, 4, 0], "no truncation; b.txt is not UTF-8"
    split = [piece.tolist() for piece in tokenizer.encode([b"def x\nret", b"urn x \xc3", b"\xa9"])]
    assert [token for piece in split for token in piece] == [2, 4, 3, 4, 1]
    assert tokenizer.decode([2, 4]) == "def x"


def test_byte_tokenizer_round_trips_text() -> None:
    tokenizer = open_tokenizer("byte")
    assert tokenizer.decode(tokenizer.encode_text("zwölf\n")) == "zwölf\n"
    assert tokenizer.decode([0xFF, 65, 0]) == "\ufffdA"


@pytest.mark.parametrize(
    ("content", "part"),
    [(None, "No such file"), ("{", "tokenizer.json"), ("[]", "tokenizer.json"), ("\ud800", "tokenizer")],
)
def test_bad_tokenizer_file_is_a_data_error(tmp_path: Path, content: str | None, part: str) -> None:
    path = tmp_path / "t.json"
    if content is not None:
        path.write_bytes(content.encode("utf-8", "surrogatepass"))
    with pytest.raises(DataError, match=part) as caught:
        open_tokenizer(str(path))
    assert str(path) in str(caught.value)


def test_bad_text_paths_are_data_errors(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file or folder"):
        text_documents(tmp_path / "none", [".txt"])
    with pytest.raises(DataError, match=r"no file that ends in \.txt"):
        text_documents(tmp_path, [".txt"])
    path = tmp_path / "one.dat"
    path.write_bytes(b"a\0b" * 1000)
    with pytest.raises(DataError, match="a byte 0"):
        open_dataset(Data(path=path, validation_fraction=0), 0, tmp_path / "cache")


def test_nanogpt_file_and_folder(tmp_path: Path) -> None:
    tokens = np.arange(100, dtype="<u2") * 500
    tokens.tofile(tmp_path / "train.bin")
    train, validation = open_nanogpt(tmp_path, "uint16")
    assert validation is None
    assert everything(train) == tokens.tolist()
    tokens[:10].tofile(tmp_path / "val.bin")
    assert everything(open_nanogpt(tmp_path, "uint16")[1] or train) == tokens[:10].tolist()
    assert len(open_nanogpt(tmp_path / "train.bin", "uint32")[0]) == 50
    (tmp_path / "train.bin").write_bytes(b"abc")
    with pytest.raises(DataError, match="3 bytes"):
        open_nanogpt(tmp_path, "uint16")
    with pytest.raises(DataError, match=r"no train\.bin"):
        open_nanogpt(folder_of(tmp_path / "empty", {"x/y": b""}), "uint16")
    with pytest.raises(DataError, match="No such file"):
        open_nanogpt(tmp_path / "none.bin", "uint16")


def test_file_that_shrinks_after_opening_is_a_data_error(tmp_path: Path) -> None:
    np.arange(100, dtype="<u2").tofile(tmp_path / "a.bin")
    tokens = TokenFile(tmp_path / "a.bin", "uint16")
    (tmp_path / "a.bin").write_bytes(b"\0" * 50)
    with pytest.raises(DataError, match="15 of 30 values at byte 20"):
        tokens.read(10, 30)
    (tmp_path / "a.bin").unlink()
    with pytest.raises(DataError, match="No such file"):
        tokens.read(10, 30)


def test_tail_split_holds_out_whole_sequences(tmp_path: Path) -> None:
    np.arange(1000, dtype="<u2").tofile(tmp_path / "a.bin")
    tokens = TokenFile(tmp_path / "a.bin", "uint16")
    train, validation = split_tail(tokens, 0.1, 16)
    assert validation is not None
    assert everything(train) + everything(validation) == list(range(1000))
    assert len(validation) == 100
    assert len(split_tail(tokens, 0.001, 16)[1] or []) == 16
    assert split_tail(tokens, 0.0, 16) == (tokens, None)
    assert (max_token(train), max_token(validation)) == (899, 999)


def write_megatron(
    prefix: Path, sequences: list[list[int]], code: int = 8, dtype: str = "<u2", offsets: list[int] | None = None
) -> None:
    np.asarray([token for sequence in sequences for token in sequence], dtype).tofile(prefix.with_suffix(".bin"))
    lengths = [len(sequence) for sequence in sequences]
    begins = np.cumsum([0, *lengths[:-1]]) * np.dtype(dtype).itemsize if offsets is None else offsets
    prefix.with_suffix(".idx").write_bytes(
        b"MMIDIDX\x00\x00"
        + struct.pack("<QBQQ", 1, code, len(sequences), len(sequences) + 1)
        + np.asarray(lengths, "<i4").tobytes()
        + np.asarray(begins, "<i8").tobytes()
        + np.arange(len(sequences) + 1, dtype="<i8").tobytes()
    )


@pytest.mark.parametrize(("code", "dtype"), [(1, "u1"), (4, "<i4"), (5, "<i8"), (8, "<u2")])
@pytest.mark.parametrize("suffix", ["", ".bin", ".idx"])
def test_megatron_tokens_are_the_sequences_in_order(tmp_path: Path, code: int, dtype: str, suffix: str) -> None:
    write_megatron(tmp_path / "a", [[1, 2, 3], [], [4], [5, 6]], code, dtype)
    tokens = open_megatron(tmp_path / f"a{suffix}")
    assert isinstance(tokens, TokenFile)
    assert everything(tokens) == [1, 2, 3, 4, 5, 6]


def test_megatron_sequences_may_lie_anywhere_in_the_bin(tmp_path: Path) -> None:
    sequences = [[1, 2], [4], [], [5, 6, 7]]
    write_megatron(tmp_path / "b", sequences, offsets=[8, 0, 4, 2])
    moved = open_megatron(tmp_path / "b")
    assert isinstance(moved, MegatronTokens)
    expected = [6, 7, 1, 2, 4, 5]
    assert everything(moved) == expected
    for start in range(len(expected)):
        for stop in range(start, len(expected) + 1):
            assert moved.read(start, stop - start).tolist() == expected[start:stop]


@pytest.mark.parametrize(
    ("offset", "content", "part"),
    [
        (0, b"TNTIDX\x00\x00\x00", "the first bytes"),
        (9, struct.pack("<Q", 2), "version 2"),
        (17, b"\x07", "float32"),
        (17, b"\x63", "unknown"),
        (18, struct.pack("<Q", 2**63), "expected .* bytes for"),
        (26, struct.pack("<Q", 2**64 - 1), "document indices"),
        (34, struct.pack("<i", -1), "negative sequence length"),
        (34, struct.pack("<i", 2**31 - 1), "beyond the .bin"),
        (42, struct.pack("<q", -2), "negative byte offset"),
        (42, struct.pack("<q", 1), "inside a token"),
        (42, struct.pack("<q", 2**63 - 2), "beyond the .bin"),
        (58, struct.pack("<q", 5), "document indices out of order"),
    ],
)
def test_malformed_megatron_index_says_what_is_wrong(tmp_path: Path, offset: int, content: bytes, part: str) -> None:
    write_megatron(tmp_path / "a", [[1, 2, 3], [4, 5]])
    index = bytearray((tmp_path / "a.idx").read_bytes())
    index[offset : offset + len(content)] = content
    (tmp_path / "a.idx").write_bytes(index)
    with pytest.raises(DataError, match=part):
        open_megatron(tmp_path / "a")


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    edits=st.lists(st.tuples(st.integers(0, 95), st.integers(0, 255)), max_size=6),
    cut=st.integers(0, 100),
    extra=st.binary(max_size=8),
)
def test_damaged_megatron_index_is_read_in_bounds_or_a_data_error(
    tmp_path: Path, edits: list[tuple[int, int]], cut: int, extra: bytes
) -> None:
    write_megatron(tmp_path / "a", [[1, 2, 3], [4, 5]])
    index = bytearray((tmp_path / "a.idx").read_bytes())
    for position, value in edits:
        index[position % len(index)] = value
    (tmp_path / "a.idx").write_bytes(bytes(index[: len(index) - cut if cut < 50 else len(index)]) + extra)
    try:
        tokens = open_megatron(tmp_path / "a")
    except DataError:
        return
    assert set(np.unique(everything(tokens)).tolist()) <= set(
        np.fromfile(tmp_path / "a.bin", tokens.read(0, 0).dtype).tolist()
    )


def test_corrupt_sidecar_types_do_not_crash(tmp_path: Path) -> None:
    documents = text_documents(folder_of(tmp_path / "text", {"a.txt": b"abc"}), [".txt"])
    tokens = cached_tokens(documents, ByteTokenizer(), tmp_path / "cache")
    for facts in ({"token_count": 4}, {"token_count": 4, "max_token": None}, {"token_count": "4", "max_token": 1}):
        tokens.path.with_suffix(".json").write_text(json.dumps(facts))
        assert bytes(everything(cached_tokens(documents, ByteTokenizer(), tmp_path / "cache"))) == b"abc\0"
