"""The parsers of what others wrote. A new one is a class or a `Content`, and a line in TARGETS."""

from __future__ import annotations

import functools
import gzip
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch import nn

from angelptm.checkpoint.checksum import crc32c
from angelptm.checkpoint.folder import CheckpointFolder
from angelptm.checkpoint.format import Manifest, manifest_name
from angelptm.checkpoint.reader import CommitReader
from angelptm.checkpoint.records import Kind
from angelptm.data import max_token, open_tokenizer
from angelptm.data.batches import TokenBatches
from angelptm.data.cache import cached_tokens
from angelptm.data.corpus import Document
from angelptm.data.megatron import open_megatron
from angelptm.data.nanogpt import open_nanogpt
from angelptm.data.tokenize import ByteTokenizer
from angelptm.data.tokens import TokenSource
from angelptm.errors import CheckpointError, ConfigError, DataError
from angelptm.model.materialize import materialize, source_of
from angelptm.model.sources import SafetensorsValues
from angelptm.timeline import load as load_timeline
from angelptm.timeline import save as save_timeline
from angelptm.timeline.figures import figures_of
from angelptm.timeline.perfetto import trace_events
from angelptm.timeline.report import render_report
from angelptm.timeline.run_files import RunFiles, read_run
from io_engine import IoError

from ..checkpoint.builder import Commit, make_commit
from ..timeline.runs import make_run as make_timeline_run
from ..timeline.runs import timeline as make_timeline
from .mutations import Field, Files

OUTSIDE = "outside"
"""A folder beside the target's: what lies there must not be read."""
MARK = 12345
"""A token, and a weight, that occurs in no seed but in what lies outside."""


class Target:
    """A parser, honest inputs for it, and what it may raise."""

    name = ""
    allowed: tuple[type[BaseException], ...] = (DataError,)
    fields: Sequence[Field] = ()
    suite_count = 1500
    """Inputs in the test suite."""

    def seeds(self) -> list[Files]:
        raise NotImplementedError

    def outside(self) -> Files:
        """What lies in the folder beside, for links to lead to."""
        return {}

    def links(self) -> list[str]:
        """Where links may lead, seen from the folder."""
        return [f"../{OUTSIDE}/{name}" for name in self.outside()] + ["nowhere", "/dev/zero", "."]

    def run(self, folder: Path) -> bool:
        """Whether the content of the folder is accepted. Raises one of ``allowed``, or asserts what must hold."""
        raise NotImplementedError


@dataclass(kw_only=True)
class Content(Target):
    """A parser of bytes in memory: ``parse`` gets the content of the one file "content"."""

    name: str
    parse: Callable[[bytes], object]
    content_seeds: Callable[[], list[bytes]]
    allowed: tuple[type[BaseException], ...]
    fields: Sequence[Field] = ()
    suite_count: int = 1500
    file: str = "content"
    """With the ending .json, damage knows JSON."""

    def seeds(self) -> list[Files]:
        return [{self.file: content} for content in self.content_seeds()]

    def links(self) -> list[str]:
        return []

    def run(self, folder: Path) -> bool:
        path = folder / self.file
        self.parse(path.read_bytes() if path.exists() else b"")
        return True


def _sweep(tokens: TokenSource) -> bool:
    """Reads all of a source the ways that training does. Raises DataError where tokens cannot be used."""
    count = len(tokens)
    assert count >= 0
    tokens.read(0, 0)
    if count > 0:
        assert len(tokens.read(count - 1, 1)) == 1
        piece = tokens.read(count // 2, min(count - count // 2, 4096))
        assert MARK not in piece.tolist(), "tokens from outside the folder"
    if count < 1 << 20:
        assert max_token(tokens) < 2**63
    batches = TokenBatches(tokens, 4, 2, seed=1, vocabulary_size=1000)
    batch = next(batches)["input_ids"]
    assert batch.shape == (2, 4)
    assert 0 <= int(batch.min()) <= int(batch.max()) < 1000
    return True


class NanoGpt(Target):
    name = "nanogpt"

    def seeds(self) -> list[Files]:
        tokens = np.arange(64) % 50
        return [
            {"train.bin": tokens.astype("<u2").tobytes()},
            {"train.bin": tokens.astype("<u2").tobytes(), "val.bin": tokens.astype("<u2").tobytes()},
        ]

    def outside(self) -> Files:
        return {"train.bin": np.full(64, MARK, "<u2").tobytes()}

    def run(self, folder: Path) -> bool:
        train, validation = open_nanogpt(folder, "uint16")
        _sweep(train)
        if validation is not None:
            _sweep(validation)
        return True


class Megatron(Target):
    name = "megatron"
    fields: Sequence[Field] = (
        *(Field("a.idx", offset, form) for offset, form in ((9, "<Q"), (17, "<B"), (18, "<Q"), (26, "<Q"))),
        *(Field("a.idx", 34 + 4 * index, "<i") for index in range(4)),
        *(Field("a.idx", 34 + 16 + 8 * index, "<q") for index in range(4)),
        *(Field("a.idx", 34 + 48 + 8 * index, "<q") for index in range(5)),
    )

    def seeds(self) -> list[Files]:
        lengths = np.asarray([5, 0, 9, 2], "<i4")
        seeds: list[Files] = []
        for code, dtype in ((8, "<u2"), (4, "<i4"), (5, "<i8"), (1, "u1")):
            item = np.dtype(dtype).itemsize
            for begins in ([0, 5, 5, 14], [7, 0, 1, 0]):  # back to back; and anywhere, overlapping
                index = [b"MMIDIDX\0\0", np.asarray([1], "<u8").tobytes(), bytes([code])]
                index += [np.asarray([4, 5], "<u8").tobytes(), lengths.tobytes()]
                index += [(np.asarray(begins, "<i8") * item).tobytes(), np.arange(5, dtype="<i8").tobytes()]
                seeds.append({"a.idx": b"".join(index), "a.bin": np.arange(16).astype(dtype).tobytes()})
        return seeds

    def links(self) -> list[str]:
        return ["nowhere", "/dev/zero", "."]  # the user names the two files: a link there is the user's own

    def run(self, folder: Path) -> bool:
        tokens = open_megatron(folder / "a")
        if len(tokens) < 4096 and (folder / "a.bin").is_file():
            found = tokens.read(0, len(tokens))
            assert set(found.tolist()) <= set(np.fromfile(folder / "a.bin", found.dtype).tolist())
        return _sweep(tokens)


class Cache(Target):
    """A damaged cache is written anew: refused, and the tokens are right all the same."""

    name = "cache"

    def _open(self, folder: Path) -> TokenSource:
        for name in ("a.txt", "b.txt"):
            (folder / name).write_bytes(bytes(range(65, 91)))
        documents = [Document(name, folder / name, 26, 1) for name in ("a.txt", "b.txt")]
        return cached_tokens(documents, ByteTokenizer(), folder)

    def outside(self) -> Files:
        return {"tokens.bin": bytes([251]) * 54, "tokens.json": b'{"token_count": 54, "max_token": 251}'}

    @functools.cache  # noqa: B019 (a target lives as long as the process)
    def _seed(self) -> Files:
        with tempfile.TemporaryDirectory() as work:
            folder = Path(work)
            self._open(folder)
            return {path.name: path.read_bytes() for path in folder.glob("tokens-*")}

    def seeds(self) -> list[Files]:
        return [self._seed()]

    def run(self, folder: Path) -> bool:
        (name,) = (Path(name).stem for name in self._seed() if name.endswith(".json"))
        path = folder / f"{name}.bin"
        before = _inode(path)
        tokens = self._open(folder)
        assert type(tokens.known_max_token) is int
        assert -1 <= tokens.known_max_token <= 255
        assert len(tokens) == path.lstat().st_size
        tokens.read(0, len(tokens))
        return _inode(path) == before


def _inode(path: Path) -> int | None:
    """Which file this is; replacing a file makes another one."""
    try:
        return path.lstat().st_ino
    except FileNotFoundError:
        return None


class TokenizerJson(Target):
    name = "tokenizer"
    text = "def f(x):\n    return 'é\u4e16 [UNK]' <|endoftext|>\n  hello hello\tworld 12345\n" * 2

    @functools.cache  # noqa: B019
    def seeds(self) -> list[Files]:
        from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

        special = ["<|endoftext|>", "[UNK]"]
        word = Tokenizer(models.WordLevel({"<|endoftext|>": 0, "[UNK]": 1, "def": 2, "return": 3}, unk_token="[UNK]"))
        word.pre_tokenizer = pre_tokenizers.Whitespace()
        word.enable_truncation(4)
        pairs = Tokenizer(models.BPE())
        pairs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        pairs.decoder, pairs.post_processor = decoders.ByteLevel(), processors.ByteLevel(trim_offsets=False)
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())[:60]
        pairs.train_from_iterator(
            [self.text],
            trainers.BpeTrainer(vocab_size=120, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
        )
        gram = Tokenizer(models.Unigram())
        gram.normalizer = normalizers.Sequence(
            [normalizers.NFKC(), normalizers.Replace("12", "21"), normalizers.Prepend("▁")]
        )
        gram.pre_tokenizer, gram.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
        gram.train_from_iterator(
            [self.text],
            trainers.UnigramTrainer(vocab_size=60, special_tokens=special, unk_token="[UNK]", show_progress=False),
        )
        piece = Tokenizer(models.WordPiece({"[UNK]": 0, "def": 1, "h": 2, "##e": 3, "##llo": 4}, unk_token="[UNK]"))
        piece.normalizer, piece.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
        piece.decoder = decoders.WordPiece()
        piece.enable_padding(length=16)
        split = Tokenizer(
            models.BPE({"<0x41>": 0, "a": 1, "b": 2, "ab": 3}, [("a", "b")], unk_token="a", byte_fallback=True)
        )
        split.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
        split.decoder = decoders.Sequence([decoders.Replace("a", "b"), decoders.ByteFallback(), decoders.Fuse()])
        return [{"tokenizer.json": encoder.to_str().encode()} for encoder in (word, pairs, gram, piece, split)]

    def links(self) -> list[str]:
        return ["nowhere", "/dev/zero", "."]  # as with Megatron's files, the user names it

    def run(self, folder: Path) -> bool:
        tokenizer = open_tokenizer(str(folder / "tokenizer.json"))
        found = [int(token) for piece in tokenizer.encode([self.text.encode()]) for token in piece]
        assert tokenizer.vocabulary_size < 2**31
        assert all(0 <= token < tokenizer.vocabulary_size for token in found)
        assert tokenizer.separator is None or 0 <= tokenizer.separator < tokenizer.vocabulary_size
        assert len(tokenizer.decode(found)) < 1 << 20
        return True


class _Small(nn.Module):
    """(4, 3) and (4,) parameters and a buffer, to be filled."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 4)
        self.register_buffer("steps", torch.zeros(2))


class Safetensors(Target):
    name = "safetensors"

    def seeds(self) -> list[Files]:
        weight, bias, steps = torch.ones(4, 3), torch.zeros(4), torch.zeros(2)
        return [
            {"model.safetensors": save({"inner.weight": weight, "inner.bias": bias, "steps": steps})},
            {
                "model-1.safetensors": save({"inner.weight": weight.bfloat16()}, {"format": "pt"}),
                "model-2.safetensors": save({"inner.bias": bias.half(), "other": torch.zeros(0, 5)}),
            },
        ]

    def outside(self) -> Files:
        marked = {"inner.weight": torch.full((4, 3), float(MARK)), "inner.bias": torch.full((4,), float(MARK))}
        return {"model.safetensors": save(marked)}

    def run(self, folder: Path) -> bool:
        model = _Small()
        source = SafetensorsValues(folder)
        source.load_buffers(model)
        params: Any = [
            SimpleNamespace(name=f"inner.{name}", owners=[("inner", name)], shape=tuple(param.shape))
            for name, param in model.inner.named_parameters()
        ]
        unit: Any = SimpleNamespace(name="inner", params=params)
        values = source.values(model, unit)
        for param in params:
            value = values[param.name]
            assert tuple(value.shape) == param.shape
            assert value.is_floating_point()
            assert not bool((value.float() == MARK).any()), "weights from outside the folder"
        return True


class WeightsFolder(Target):
    """config.json beside safetensors: a model is built from it."""

    name = "weights-folder"
    allowed: tuple[type[BaseException], ...] = (DataError, ConfigError)
    suite_count = 300

    @functools.cache  # noqa: B019
    def seeds(self) -> list[Files]:
        from transformers import AutoConfig, AutoModelForCausalLM

        gpt2 = AutoConfig.for_model(
            "gpt2", n_layer=1, n_embd=8, n_head=2, vocab_size=16, n_positions=8, bos_token_id=0, eos_token_id=0
        )
        llama = AutoConfig.for_model(
            "llama",
            num_hidden_layers=1,
            hidden_size=8,
            num_attention_heads=2,
            vocab_size=16,
            intermediate_size=8,
            max_position_embeddings=32,
        )
        found: list[Files] = []
        for config in (gpt2, llama):
            with tempfile.TemporaryDirectory() as work:
                AutoModelForCausalLM.from_config(config).save_pretrained(work)
                names = ("config.json", "model.safetensors")
                found.append({name: Path(work, name).read_bytes() for name in names})
        remote = json.loads(found[0]["config.json"])  # type: ignore[arg-type]
        remote["auto_map"] = {"AutoModelForCausalLM": "evil--code.Model", "AutoConfig": "code.Config"}
        remote["trust_remote_code"] = True
        found.append({**found[0], "config.json": json.dumps(remote).encode()})
        return found

    def outside(self) -> Files:
        return self.seeds()[0]

    def run(self, folder: Path) -> bool:
        model = materialize(folder)
        assert all(param.device.type == "meta" for param in model.parameters())
        assert type(model).__module__.startswith("transformers.models.")
        assert source_of(model) is not None
        return True


def _decode_with_its_checksum(content: bytes) -> None:
    """Decodes a manifest whose last 4 bytes are made right, so that damage gets past them."""
    body = content[:-4]
    manifest = Manifest.decode(body + crc32c(body).to_bytes(4, "little"), "manifest")
    for unit in manifest.header.units:
        for param in unit.params:
            manifest.find(param.name, Kind.MASTER)
    manifest.encode()


@functools.cache
def _commits() -> tuple[Commit, ...]:
    return (make_commit(), make_commit(precision="bf16", optimizer="lion"))


class Checkpoint(Target):
    """A folder of commits with its slot files: listed, read and verified."""

    name = "checkpoint"
    allowed: tuple[type[BaseException], ...] = (CheckpointError, IoError)
    suite_count = 800

    @functools.cache  # noqa: B019
    def seeds(self) -> list[Files]:
        return [self._files(commit) for commit in _commits()]

    def _files(self, commit: Commit) -> Files:
        with tempfile.TemporaryDirectory() as work:
            commit.write_files(Path(work))
            found: Files = {path.name: path.read_bytes() for path in Path(work).iterdir()}
        stores = {"format_version": 1, "store_ids": [commit.manifest.header.store_id]}
        found["stores.json"] = json.dumps(stores).encode()
        return {**found, "manifest": commit.manifest.encode()}

    def outside(self) -> Files:
        return self._files(_commits()[0])

    def run(self, folder: Path) -> bool:
        name = manifest_name(_commits()[0].manifest.header.step)
        (folder / "commits").mkdir()
        try:
            if os.path.lexists(folder / "manifest"):
                (folder / "manifest").rename(folder / "commits" / name)
            return self._read(folder)
        finally:
            (folder / "commits" / name).unlink(missing_ok=True)
            (folder / "commits").rmdir()

    def _read(self, folder: Path) -> bool:
        with CheckpointFolder.read(folder) as opened:
            opened.store_ids()
            with opened.hold() as manifest, CommitReader(manifest, [folder], deadline_seconds=5) as reader:
                reader.buffers()
                return not reader.verify()


class TimelineFile(Target):
    """A timeline by itself, and what is made of it."""

    name = "timeline"

    @functools.cache  # noqa: B019
    def seeds(self) -> list[Files]:
        with tempfile.TemporaryDirectory() as work:
            path = Path(work) / "timeline.json"
            save_timeline(make_timeline(steps=1), path)
            return [{"timeline.json": gzip.decompress(path.read_bytes())}, {"timeline.json": path.read_bytes()}]

    def run(self, folder: Path) -> bool:
        found = load_timeline(folder / "timeline.json")
        trace_events(found)
        return _report(RunFiles(folder, found))


class RunFolderFiles(Target):
    """The planner's files and the run's own, beside a timeline that is whole: the report says what it cannot read."""

    name = "run-files"
    suite_count = 600

    @functools.cache  # noqa: B019
    def seeds(self) -> list[Files]:
        with tempfile.TemporaryDirectory() as work:
            run = make_timeline_run(Path(work) / "run")
            return [{path.name: path.read_bytes() for path in run.iterdir()}]

    def run(self, folder: Path) -> bool:
        return _report(read_run(folder))


def _report(run: RunFiles) -> bool:
    content = render_report(run, figures_of(run))
    assert "<script" not in content
    assert len(content) < 1 << 24
    return True


TARGETS: list[Target] = [
    NanoGpt(),
    Megatron(),
    Cache(),
    TokenizerJson(),
    Safetensors(),
    WeightsFolder(),
    Content(
        name="manifest",
        parse=_decode_with_its_checksum,
        content_seeds=lambda: [commit.manifest.encode() for commit in _commits()],
        allowed=(CheckpointError,),
    ),
    Checkpoint(),
    TimelineFile(),
    RunFolderFiles(),
]
