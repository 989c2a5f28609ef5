"""Loading: what is accepted, and that whatever is wrong is one ConfigError that says where and what instead."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from angelptm.config import Config, load_config
from angelptm.config.problem import UnknownKeyError, key_paths
from angelptm.errors import ConfigError

TIERS: dict[str, Any] = {"device": "24MiB", "host": "96MiB", "ssd": [{"path": "/nvme"}]}
BASE: dict[str, Any] = {"tiers": TIERS}


def refused(*overrides: str, source: Any = BASE) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        load_config(source, overrides)
    return caught.value


def test_four_sections_are_enough_for_initialize() -> None:
    config = load_config({**BASE, "page_size": "1MiB", "precision": "bf16", "optimizer": {"type": "adamw", "lr": 1e-4}})
    assert (config.tiers.device, config.tiers.host, config.page_size) == (24 * 2**20, 96 * 2**20, 2**20)
    assert config.tiers.ssd[0].path == Path("/nvme")
    assert config.tiers.ssd[0].size is None
    assert (config.training.steps, config.data.kind, config.data.path, config.data.tokenizer) == (
        0,
        "text",
        None,
        "byte",
    )
    assert not config.model.given


def test_config_is_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        load_config(BASE).page_size = 1  # type: ignore[misc]


def test_building_a_config_directly_refuses_like_loading() -> None:
    assert Config(**BASE) == load_config(BASE)
    with pytest.raises(ConfigError, match=r"tiers\.host: found 'much'"):
        Config(tiers={"device": 1, "host": "much"})


@pytest.mark.parametrize(
    ("kind", "betas", "decay"), [("AdamW", (0.9, 0.999), 0.01), ("SGD", (0.9, 0.999), 0.0), ("lion", (0.9, 0.99), 0.0)]
)
def test_optimizer_defaults_follow_the_type(kind: str, betas: tuple[float, float], decay: float) -> None:
    optimizer = load_config(BASE, [f"optimizer.type={kind}"]).optimizer
    assert (optimizer.type, optimizer.betas, optimizer.weight_decay) == (kind.lower(), betas, decay)
    assert load_config(BASE, [f"optimizer.type={kind}", "optimizer.weight_decay=0.3"]).optimizer.weight_decay == 0.3
    # The default of one type does not stick when the type is changed later.
    changed = load_config(load_config(BASE, [f"optimizer.type={kind}"]), ["optimizer.type=adamw"])
    assert changed.optimizer.weight_decay == 0.01


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("optimizer.lr=-1", ["optimizer.lr", "-1", "at least 0"]),
        ("optimizer.lr=.nan", ["optimizer.lr", "finite"]),
        ("optimizer.lr=fast", ["optimizer.lr", "'fast'", "a number"]),
        ("optimizer.betas=[0.9, 1.0]", ["optimizer.betas.1", "below 1"]),
        ("optimizer.betas=[0.9]", ["optimizer.betas.1", "required"]),
        ("optimizer.type=adam", ["optimizer.type", "adamw with weight_decay: 0"]),
        ("optimizer.type=adanw", ["Did you mean 'adamw'?"]),
        ("optimizer.nesterov=true", ["optimizer.momentum", "above 0"]),
        ("optimizer.groups=[{params: [], lr: 1}]", ["optimizer.groups.0.params", "at least 1"]),
        ("tiers.host=12 parsecs", ["tiers.host", "'12 parsecs'", "'512MiB'"]),
        ("tiers.host=-5", ["tiers.host", "-5", "size in bytes"]),
        ("tiers.host=true", ["tiers.host", "True"]),
        ("tiers.device=1MiB", ["tiers.device", "at least one page (4194304 bytes)", "lower page_size"]),
        ("tiers.ssd=/nvme", ["tiers.ssd", "'/nvme'", "a list"]),
        ("tiers.ssd.0.path=''", ["tiers.ssd.0.path", "empty"]),
        ('hardware="a\\0b"', ["hardware", "byte 0"]),
        ("run_dir=~nobody-of-this-name/runs", ["run_dir", "~ names a user"]),
        ("page_size=3MiB", ["page_size", "power of two"]),
        ("page_size=4KiB", ["page_size", "at least 64KiB"]),
        ("precision=fp16", ["precision", "use bf16"]),
        ("precision=fp23", ["precision", "'fp32' or 'bf16'"]),
        ("device=cuda:x", ["device", "cuda:x", "cpu, cuda or cuda:N"]),
        ("placement.states=1.5", ["placement.states", "1.5", "0.0 to 1.0"]),
        ("placement.grad=device", ["placement.grad", "'host'"]),
        ("update.threads=0", ["update.threads", "'auto'", "at least 1"]),
        ("update.mode=async", ["update.mode", "'sync'", "'lock_free'"]),
        ("update.max_staleness=2", ["update.max_staleness", "null", "update.mode: bounded"]),
        ("update={mode: lock_free, max_staleness: 1}", ["update.max_staleness", "bounded"]),
        ("update={mode: bounded, max_staleness: -1}", ["update.max_staleness", "0"]),
        ("update={mode: bounded, patience: 1.5}", ["update.patience", "1"]),
        ("update={mode: lock_free, patience: 0.1}", ["update.patience", "null", "update.mode: bounded"]),
        ("io.backend=libaio", ["io.backend", "'uring'"]),
        ("io.queue_depth=0", ["io.queue_depth", "at least 1"]),
        ("io=", ["config: io", "a mapping with the keys backend"]),
        ("gradient_clipping=0", ["gradient_clipping", "above 0"]),
        ("gradient_accumulation_steps=1.5", ["gradient_accumulation_steps", "a whole number"]),
        ("training.steps=true", ["training.steps", "not true or false"]),
        ("training=[1]", ["training", "a mapping"]),
        ("model.preset=gpt2-xxl", ["model.preset", "Did you mean 'gpt2-xl'?"]),
        ("model.weights=/nonexistent", ["model.weights", "config.json", "model.preset"]),
        ("model.config={n_layer: 2}", ["model.config", "a preset or model_type"]),
        ("data.kind=megatron", ["data.path", "found nothing", "megatron"]),
        ("data.extensions=[txt]", ["data.extensions", "begin with a dot"]),
        ("data.validation_fraction=1", ["data.validation_fraction", "below 1"]),
        ("hardware=/nonexistent.yaml", ["hardware", "/nonexistent.yaml", "No such file"]),
    ],
)
def test_bad_value_names_key_value_and_expectation(override: str, parts: list[str]) -> None:
    text = str(refused(override))
    assert all(part in text for part in parts), text
    assert "\n" not in text


@pytest.mark.parametrize(
    ("key", "suggestion"),
    [
        ("optimiser", "optimizer"),
        ("optimizer.learning_rate", "optimizer.lr"),
        ("optimizer.Weight-Decay", "optimizer.weight_decay"),
        ("lr", "optimizer.lr"),
        ("tiers.gpu", "tiers.device"),
        ("tiers.cpu", "tiers.host"),
        ("tiers.ssd.0.pth", "tiers.ssd.0.path"),
        ("data.seq_len", "data.sequence_length"),
        ("num_threads", "update.threads"),
        ("page_bytes", "page_size"),
    ],
)
def test_unknown_key_gets_the_near_spelling(key: str, suggestion: str) -> None:
    error = refused(f"{key}=1")
    assert isinstance(error, UnknownKeyError)
    assert str(error) == f"config: unknown key {key!r}; did you mean {suggestion!r}?"
    assert error.key == key


def test_unknown_key_without_a_near_one_lists_what_there_is() -> None:
    assert "known here: " in str(refused("units.zzz=1"))
    assert "classes" in str(refused("units.zzz=1"))


# Malformed values where a mapping, list, number or text belongs: whatever they are, the answer is a ConfigError.
junk = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5) | st.integers(), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=300, deadline=None)
@given(path=st.sampled_from([path for path, _ in key_paths(Config)]), value=junk)
def test_any_junk_at_any_key_is_accepted_or_a_config_error(path: str, value: Any) -> None:
    content: dict[str, Any] = {"tiers": dict(TIERS)}
    section, (*above, last) = content, path.split(".")
    for part in above:
        inner = section.setdefault(part, {})
        section = inner if isinstance(inner, dict) else dict(inner[0])
    section[last] = value
    with contextlib.suppress(ConfigError):
        config = load_config(content)
        assert load_config(yaml.safe_load(config.resolved_yaml())) == config


def test_missing_key_is_said_to_be_required_and_a_typo_comes_first() -> None:
    assert "tiers: found nothing" in str(refused(source={}))
    error = refused(source={"teirs": TIERS})
    assert str(error).startswith("config: unknown key 'teirs'; did you mean 'tiers'?")


def test_all_problems_are_told_at_once() -> None:
    text = str(refused("optimizer.lr=-1", "page_size=3", "precision=fp16"))
    assert all(part in text for part in ("optimizer.lr", "page_size", "precision", "Also: "))


def test_ssd_placement_needs_an_ssd_tier() -> None:
    for override in ("placement.param=ssd", "placement.grad=ssd", "placement.states=ssd", "placement.states=0.5"):
        text = str(refused("tiers.ssd=[]", override))
        assert override.partition("=")[0] in text
        assert "tiers.ssd: [{path: FOLDER}]" in text
    assert load_config(BASE, ["tiers.ssd=[]", "placement.states=1.0"]).placement.states == 1.0


def test_overrides_reach_lists_numbers_and_new_sections() -> None:
    config = load_config(
        BASE,
        [
            "tiers.ssd.0.size=1GiB",
            "tiers.ssd.1.path=/other",
            "optimizer.lr=3e-4",
            "model.model_type=llama",
            "model.config.rms_norm_eps=1e-5",
            "units.classes=[Block]",
            "run_dir=~/runs=1",
        ],
    )
    assert config.tiers.ssd[0].size == 2**30
    assert config.tiers.ssd[1].path == Path("/other")
    assert config.optimizer.lr == 3e-4
    assert config.model.architecture() == ("llama", {"rms_norm_eps": 1e-5})
    assert config.units.classes == ["Block"]
    assert config.run_dir == Path("~/runs=1").expanduser()
    assert TIERS["ssd"] == [{"path": "/nvme"}], "the caller's mapping stays as it was"


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("optimizer.lr", "KEY=VALUE"),
        ("=3", "KEY=VALUE"),
        ("optimizer..lr=3", "KEY=VALUE"),
        ("optimizer.lr=[", "a YAML value"),
        ("tiers.ssd.4.path=/a", "a list index of at most 1"),
        ("tiers.host.size=3", "'size' would be inside the value '96MiB'"),
    ],
)
def test_malformed_override_is_refused(override: str, part: str) -> None:
    text = str(refused(override))
    assert "--set" in text
    assert part in text


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        ("a.yaml", "tiers:\n  device: [1\nprecision: fp32\n", ["a.yaml, line 3", "valid YAML"]),
        ("a.yaml", "tiers: {device: 1MiB}\ntiers: {host: 1MiB}\n", ["line 2", "'tiers' occurs twice"]),
        ("a.yaml", "- 1\n- 2\n", ["a mapping of keys"]),
        ("a.yaml", "", ["None", "a mapping of keys"]),
        ("a.yaml", "a: \x07\n", ["valid YAML"]),
        ("a.yaml", "tiers: {3: 4}\n", ["tiers.3", "a key that is text"]),
        ("a.yaml", "on: 4\n", ["True", "a key that is text"]),
        ("a.yaml", "? [a]\n: b\n", ["valid YAML"]),
        ("a.json", '{"tiers":\n {"device": 1,}\n}', ["a.json, line 2", "valid JSON"]),
        ("a.json", '{"tiers": 1, "tiers": 2}', ["key 'tiers' twice"]),
    ],
)
def test_malformed_file_is_refused_with_its_line(tmp_path: Path, name: str, content: str, parts: list[str]) -> None:
    (tmp_path / name).write_text(content)
    text = str(refused(source=tmp_path / name))
    assert all(part in text for part in parts), text


def test_unreadable_sources_are_refused(tmp_path: Path) -> None:
    (tmp_path / "latin.yaml").write_bytes(b"run_dir: \xe9\n")
    assert "No such file" in str(refused(source=tmp_path / "none.yaml"))
    assert "UTF-8" in str(refused(source=str(tmp_path / "latin.yaml")))
    assert "directory" in str(refused(source=tmp_path)).lower()
    assert "the path of" in str(refused(source="a\0b"))
    assert "a path, a mapping or a Config" in str(refused(source=3))


def test_yaml_numbers_without_a_dot_are_numbers(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(
        "tiers: {device: 24MiB, host: 1e9}\nmodel: {model_type: gpt2, config: {layer_norm_epsilon: 1e-6}}\n"
    )
    with pytest.raises(ConfigError, match="size in bytes"):
        load_config(path)
    config = load_config(path, ["tiers.host=1GB"])
    assert config.model.config == {"layer_norm_epsilon": 1e-6}
    assert config.tiers.host == 10**9


def test_resolved_yaml_loads_to_an_equal_config_with_exact_sizes() -> None:
    config = load_config(BASE, ["tiers.host=100000001", "optimizer.type=lion", "placement.states=0.25"])
    content = yaml.safe_load(config.resolved_yaml())
    assert content["tiers"] == {
        "device": "24MiB",
        "host": 100000001,
        "ssd": [{"path": "/nvme", "size": None, "drive_capacity": None}],
        "keep_freed": "auto",
    }
    assert load_config(content) == config
    assert load_config(content).hash == config.hash


def test_what_is_kept_of_freed_memory_follows_the_budgets_unless_it_is_said() -> None:
    def kept(**keys: object) -> tuple[object, int]:
        config = load_config({"tiers": {**TIERS, **keys}})
        return yaml.safe_load(config.resolved_yaml())["tiers"]["keep_freed"], config.tiers.keep_freed_bytes

    assert kept(device="24MiB", host="64MiB") == ("auto", 64 * 2**20)
    assert kept(device="256MiB", host="3840MiB") == ("auto", 512 * 2**20)
    assert kept(keep_freed="1GiB") == ("1GiB", 2**30)
    assert kept(keep_freed=0) == (0, 0)
    for wrong in ("some", -1, 1.5):
        with pytest.raises(ConfigError, match=r"tiers\.keep_freed.*'auto' or a size in bytes"):
            kept(keep_freed=wrong)


def test_hash_tells_work_apart_and_ignores_run_dir() -> None:
    config = load_config(BASE)
    assert len(config.hash) == 64
    assert load_config(BASE, ["run_dir=/elsewhere"]).hash == config.hash
    assert load_config({"tiers": {**TIERS, "device": 24 * 2**20}}).hash == config.hash
    assert load_config(BASE, ["training.seed=1"]).hash != config.hash
    # A change of this value means that runs recorded before cannot be told to be the same work.
    script = f"from angelptm.config import load_config; print(load_config({BASE!r}).hash)"
    again = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert again.stdout.strip() == config.hash


def test_hardware_file_gives_io_defaults_that_the_user_may_override(tmp_path: Path) -> None:
    path = tmp_path / "hardware.yaml"
    rates = {"path": "/nvme", "read_bytes_per_s": 2e9, "write_bytes_per_s": 1e9, "mixed_bytes_per_s": 1.5e9}
    measured = {"ssd": [rates], "io": {"backend": "threads", "queue_depth": 64, "block_bytes": 4194304}, "machine": "m"}
    path.write_text(yaml.safe_dump({**measured, "date": "2024-05-01"}))
    config = load_config(BASE, [f"hardware={path}"])
    assert (config.io.backend, config.io.queue_depth, config.io.direct) == ("threads", 64, True)
    chosen = load_config(config, ["io.queue_depth=8"])
    assert (chosen.io.backend, chosen.io.queue_depth) == ("threads", 8)
    path.write_text(yaml.safe_dump({**measured, "io": {"backend": "floppy"}}))
    assert "io.backend: found 'floppy'" in str(refused(f"hardware={path}"))
    path.write_text(yaml.safe_dump({**measured, "speed": 3}))
    assert "unknown key" in str(refused(f"hardware={path}"))
    path.write_text("a: [")
    assert "valid YAML" in str(refused(f"hardware={path}"))


def test_preset_with_overrides_is_an_architecture() -> None:
    model = load_config(BASE, ["model.preset=gpt2-medium", "model.config.n_positions=64"]).model
    assert model.architecture() == ("gpt2", {"n_layer": 24, "n_embd": 1024, "n_head": 16, "n_positions": 64})
    assert "Keep one of the two" in str(refused("model.preset=gpt2", "model.model_type=gpt2"))


def test_weights_with_their_config_name_the_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    model = load_config(BASE, [f"model.weights={tmp_path}"]).model
    assert model.given
    assert model.architecture() is None


def test_warmup_fits_into_the_training() -> None:
    assert "at most training.steps (5)" in str(refused("training.steps=5", "schedule.warmup_steps=6"))


def test_every_key_is_described() -> None:
    def missing(section: Any) -> list[str]:
        own = [f"{section.__name__}.{name}" for name, field in section.model_fields.items() if not field.description]
        return own + [name for part in section.__subclasses__() for name in missing(part)]

    from angelptm.config.schema.types import Section

    assert missing(Section) == []
    assert json.dumps(Config.model_json_schema())


def test_config_imports_neither_torch_nor_the_native_module() -> None:
    heavy = ("torch", "transformers", "angelptm_native")
    script = f"import sys, angelptm.config; print([name for name in {heavy} if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
