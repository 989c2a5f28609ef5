"""What cannot be committed, and what cannot be loaded: said clearly, with nothing changed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from angelptm.checkpoint.folder import CheckpointFolder
from angelptm.checkpoint.records import NONE, Kind
from angelptm.engine import Engine
from angelptm.errors import AngelPTMError, CheckpointError, CorruptPageError

from .commits import DEVICE_HOST, HOST, assert_continues, config_of, hashes, record, step_of, steps_in
from .models import GPT2, LLAMA, loss_of
from .training import PAGE, tight_config, train


def corrupt(folder: Path, kind: Kind) -> str:
    """Changes one byte of a page of the newest commit; returns its slot file's path."""
    with CheckpointFolder.read(folder / "run") as opened:
        manifest = opened.load()
    pages = manifest.pages[(manifest.pages["kind"] == kind) & (manifest.pages["file"] != NONE)]
    (path,) = folder.rglob(manifest.header.files[int(pages["file"][0])].name)
    with path.open("r+b") as file:
        file.seek(int(pages["slot"][0]) * manifest.header.page_bytes + 100)
        byte = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte[0] ^ 1]))
    return str(path)


@pytest.mark.parametrize("keys", [{}, {"page_size": 2 * PAGE}, {"placement": HOST}], ids=["adopted", "read", "host"])
def test_corrupt_page_is_named_and_leaves_the_folder_as_it_is(keys: dict[str, Any], tmp_path: Path) -> None:
    engine = Engine(GPT2.model(), config_of(GPT2.model(), tmp_path))
    train(engine, GPT2, 1)
    engine.save_checkpoint()
    engine.close()
    path = corrupt(tmp_path, Kind.MASTER)
    manifests = hashes(tmp_path / "run" / "commits")
    with pytest.raises(CorruptPageError, match=r"MASTER of \w+\.\w+") as raised:
        Engine(GPT2.model(), config_of(GPT2.model(), tmp_path, **keys), resume=tmp_path / "run")
    assert raised.value.path == path
    assert hashes(tmp_path / "run" / "commits") == manifests
    corrupt(tmp_path, Kind.MASTER)  # changes the byte back
    Engine(GPT2.model(), config_of(GPT2.model(), tmp_path), resume=tmp_path / "run").close()


def test_state_that_json_cannot_hold(tmp_path: Path) -> None:
    engine = Engine(GPT2.model(), config_of(GPT2.model(), tmp_path))
    circle: dict[str, Any] = {}
    circle["itself"] = circle
    for state in ({"model": object()}, {"bytes": b"x"}, circle, {"\ud800": 1}):
        with pytest.raises(AngelPTMError, match="JSON cannot hold"):
            engine.save_checkpoint(client_state=state)
    engine.save_checkpoint(client_state={"array": np.float32(2.5), "tensor": torch.tensor(3)}, wait=True)
    assert engine.load_checkpoint()[1] == {"array": 2.5, "tensor": 3}
    engine.close()


def test_between_backward_and_step_there_is_nothing_to_commit(tmp_path: Path) -> None:
    engine = Engine(GPT2.model(), config_of(GPT2.model(), tmp_path))
    engine.backward(loss_of(engine(**GPT2.batch(0))))
    with pytest.raises(AngelPTMError, match=r"Commit after step\(\).*zero_grad"):
        engine.save_checkpoint()
    engine.step()
    engine.save_checkpoint(wait=True)
    assert steps_in(tmp_path / "run") == [1]
    engine.close()


def test_commit_of_something_else_changes_nothing(tmp_path: Path) -> None:
    frozen = GPT2.model()
    frozen.transformer.wpe.weight.requires_grad_(False)  # type: ignore[union-attr]
    others = {
        "no parameter": (LLAMA.model(), {}),
        "shape": (GPT2.model(n_embd=32), {}),
        "states of sgd": (GPT2.model(), {"optimizer": {"type": "sgd", "lr": 0.1}}),
        "frozen": (frozen, {}),
    }
    plain = Engine(GPT2.model(), tight_config(GPT2.model(), tmp_path))
    run = record(plain, step_of(GPT2), 4)
    plain.close()
    for number, (model, keys) in enumerate(others.values()):
        engine = Engine(model, config_of(model, tmp_path, name=f"other{number}", **keys))
        engine.save_checkpoint()
        engine.close()
    engine = Engine(GPT2.model(), config_of(GPT2.model(), tmp_path, placement=DEVICE_HOST))
    train(engine, GPT2, 2)
    for number, text in enumerate(others):
        with pytest.raises(CheckpointError, match=text):
            engine.load_checkpoint(tmp_path / f"other{number}")
    with pytest.raises(CheckpointError, match="no checkpoint"):
        engine.load_checkpoint(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"commits of step 0, .*one of step 7"):
        engine.load_checkpoint(tmp_path / "other0", step=7)
    assert_continues(engine, step_of(GPT2), run, 2)
    engine.close()
