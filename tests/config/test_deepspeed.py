"""DeepSpeed's configurations: real ones are accepted, every key is accounted for, the rest is refused."""

from __future__ import annotations

import contextlib
import json
import logging
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from angelptm.config import load_config
from angelptm.config.deepspeed import from_deepspeed, is_deepspeed
from angelptm.config.deepspeed.keys import SCALARS, SECTIONS
from angelptm.config.load import load_config_with_report
from angelptm.errors import ConfigError

OWN: dict[str, Any] = {"tiers": {"device": "64MiB", "host": "256MiB"}}

# The file that Hugging Face's examples ship for ZeRO-3 with everything left to the trainer.
HF_ZERO3: dict[str, Any] = {
    "fp16": {
        "enabled": "auto",
        "loss_scale": 0,
        "loss_scale_window": 1000,
        "initial_scale_power": 16,
        "hysteresis": 2,
        "min_loss_scale": 1,
    },
    "bf16": {"enabled": "auto"},
    "optimizer": {
        "type": "AdamW",
        "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"},
    },
    "scheduler": {
        "type": "WarmupLR",
        "params": {"warmup_min_lr": "auto", "warmup_max_lr": "auto", "warmup_num_steps": "auto"},
    },
    "zero_optimization": {
        "stage": 3,
        "offload_optimizer": {"device": "cpu", "pin_memory": True},
        "offload_param": {"device": "cpu", "pin_memory": True},
        "overlap_comm": True,
        "contiguous_gradients": True,
        "sub_group_size": 1e9,
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto",
        "stage3_max_live_parameters": 1e9,
        "stage3_max_reuse_distance": 1e9,
        "stage3_gather_16bit_weights_on_model_save": True,
    },
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "steps_per_print": 2000,
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "wall_clock_breakdown": False,
}

NVME: dict[str, Any] = {
    "train_batch_size": 32,
    "train_micro_batch_size_per_gpu": 4,
    "bf16": {"enabled": True},
    "optimizer": {"type": "Adam", "params": {"lr": 0.001, "betas": [0.8, 0.99], "eps": 1e-9}},
    "scheduler": {
        "type": "WarmupDecayLR",
        "params": {"warmup_min_lr": 0, "warmup_max_lr": 0.002, "warmup_num_steps": 10, "total_num_steps": 100},
    },
    "zero_optimization": {
        "stage": 3,
        "offload_param": {"device": "nvme", "nvme_path": "/nvme0", "max_in_cpu": 0},
        "offload_optimizer": {"device": "nvme", "nvme_path": "/nvme1", "ratio": 0.9},
    },
    "aio": {"block_size": 1048576, "queue_depth": 32, "intra_op_parallelism": 2},
    "activation_checkpointing": {"partition_activations": False, "number_checkpoints": 24},
    "gradient_clipping": 0.0,
    "flops_profiler": {"enabled": False, "detailed": {"anything": 1}},
    "angelptm": OWN,
}


def leaves(content: dict[str, Any], prefix: str = "") -> set[str]:
    found: set[str] = set()
    for key, value in content.items():
        found |= leaves(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {prefix + key}
    return found


def with_(**changes: Any) -> dict[str, Any]:
    return {"train_micro_batch_size_per_gpu": 1, "angelptm": OWN, **changes}


def refused(content: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(content)
    return str(caught.value)


@pytest.mark.parametrize("content", [HF_ZERO3, NVME], ids=["hf_zero3", "nvme"])
def test_every_key_is_in_the_report_once(content: dict[str, Any]) -> None:
    own = content.get("angelptm", {})
    _, report = from_deepspeed(content)
    keys = [entry.key for entry in report.entries]
    expected = leaves({key: value for key, value in content.items() if key != "angelptm"})
    assert sorted(keys) == sorted(expected | {f"angelptm.{key}" for key in own})
    assert all(entry.target or entry.why for entry in report.entries if entry.outcome != "not set"), str(report)


def test_hugging_face_auto_counts_as_not_set() -> None:
    config, report = load_config_with_report(HF_ZERO3, ["tiers.device=64MiB", "tiers.host=256MiB"])
    assert report is not None
    assert {entry.value for entry in report.of("not set")} == {"auto"}
    assert config.precision == "fp32"
    assert config.optimizer.lr == 1e-3
    assert (config.placement.param, config.placement.states) == ("host", "host")
    assert config.training.log_every == 2000
    assert config.optimizer.weight_decay == 0.0, "DeepSpeed's AdamW does not decay unless told"


def test_nvme_offload_is_mapped() -> None:
    config = load_config(NVME)
    assert [str(ssd.path) for ssd in config.tiers.ssd] == ["/nvme1", "/nvme0"]
    assert (config.placement.param, config.placement.states) == ("ssd", "ssd")
    assert (config.data.micro_batch_size, config.gradient_accumulation_steps) == (4, 8)
    assert (config.precision, config.gradient_clipping, config.io.queue_depth) == ("bf16", None, 32)
    assert (config.optimizer.type, config.optimizer.betas, config.optimizer.eps) == ("adamw", (0.8, 0.99), 1e-9)
    assert config.optimizer.lr == 0.002, "the scheduler's peak replaces the optimizer's lr"
    assert (config.schedule.type, config.schedule.warmup_steps, config.training.steps) == ("linear", 10, 100)
    assert config.gradient_checkpointing


def test_missing_tier_sizes_are_asked_for_and_never_guessed() -> None:
    text = refused(HF_ZERO3)
    assert "tiers.device and tiers.host" in text
    assert '"angelptm": {"tiers": {"device": "8GiB", "host": "32GiB"}}' in text
    assert "--set tiers.device=8GiB" in text


def test_own_block_wins_over_what_is_mapped() -> None:
    content = {
        **NVME,
        "angelptm": {"tiers": {**OWN["tiers"], "ssd": [{"path": "/big", "size": "1TB"}]}, "precision": "fp32"},
    }
    config = load_config(content)
    assert [(str(ssd.path), ssd.size) for ssd in config.tiers.ssd] == [("/big", 10**12)]
    assert config.precision == "fp32"
    assert config.optimizer.lr == 0.002


@pytest.mark.parametrize(
    ("total", "micro", "accumulation", "result"),
    [
        (32, 4, None, (4, 8)),
        (32, None, 4, (8, 4)),
        (32, None, None, (32, 1)),
        (32, 8, 4, (8, 4)),
        (None, 2, None, (2, 1)),
        (None, 2, 3, (2, 3)),
        ("auto", 2, "auto", (2, 1)),
    ],
)
def test_batch_arithmetic(total: Any, micro: Any, accumulation: Any, result: tuple[int, int]) -> None:
    sizes = {
        "train_batch_size": total,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": accumulation,
    }
    config = load_config({**sizes, "angelptm": OWN})
    assert (config.data.micro_batch_size, config.gradient_accumulation_steps) == result


def test_batch_of_several_processes_is_refused_with_the_way_to_keep_it() -> None:
    text = refused(with_(train_batch_size=256, train_micro_batch_size_per_gpu=8, gradient_accumulation_steps=4))
    assert "train_batch_size: found 256" in text
    assert "8 x 4" in text
    assert "gradient_accumulation_steps: 32" in text
    assert "train_batch_size" in refused(with_(train_batch_size=10, train_micro_batch_size_per_gpu=4))


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"fp16": {"enabled": True}}, ["fp16.enabled", "bf16"]),
        ({"fp16": {"enabled": "yes"}}, ["fp16.enabled", "true, false or 'auto'"]),
        ({"amp": {"enabled": True, "opt_level": "O1"}}, ["amp.enabled", "bf16"]),
        ({"bf16": True}, ["bf16", "a mapping with the keys", "enabled"]),
        ({"train_batch_size": {"a": 1}}, ["train_batch_size", "a single value"]),
        ({"train_batch_size": 0}, ["train_batch_size", "at least 1"]),
        ({"train_batch_size": 1.5}, ["train_batch_size", "a whole number"]),
        ({"optimizer": {"type": "OneBitAdam", "params": {"lr": 1}}}, ["optimizer.type", "OneBitAdam", "AdamW"]),
        ({"optimizer": {"type": "Adam", "params": {"amsgrad": True}}}, ["amsgrad", "false"]),
        ({"optimizer": {"type": "Adam", "params": {"bias_correction": False}}}, ["bias_correction", "true"]),
        ({"optimizer": {"type": "Adam", "params": {"adam_w_mode": False, "weight_decay": 0.1}}}, ["adam_w_mode", "L2"]),
        ({"optimizer": {"type": "Adam", "params": {"lr": -1}}}, ["optimizer.lr", "at least 0"]),
        ({"scheduler": {"type": "OneCycle", "params": {}}}, ["scheduler.type", "WarmupCosineLR", "engine.optimizer"]),
        ({"zero_optimization": {"offload_param": {"device": "disk"}}}, ["offload_param.device", "'nvme'"]),
        ({"zero_optimization": {"offload_param": {"device": "nvme"}}}, ["placement.param", "tiers.ssd"]),
        ({"zero_optimization": {"stagee": 3}}, ["'zero_optimization.stagee'", "'zero_optimization.stage'"]),
        ({"zero_optimization": {"offload_param": {"divice": "cpu"}}}, ["offload_param.device"]),
        ({"train_micro_batchsize_per_gpu": 3}, ["did you mean 'train_micro_batch_size_per_gpu'?"]),
        ({"aio": {"queue_dept": 3}}, ["did you mean 'aio.queue_depth'?"]),
        ({"tiers": {"device": 1}}, ['"angelptm": {"tiers": ...}']),
        ({"compression_training": {"weight_quantization": {"a": 1}}}, ["compression_training", "not offered"]),
        ({"curriculum_learning": {"enabled": True}}, ["curriculum_learning.enabled", "false"]),
        ({"angelptm": 3}, ["angelptm", "a mapping"]),
    ],
)
def test_what_cannot_be_honoured_is_refused(changes: dict[str, Any], parts: list[str]) -> None:
    text = refused(with_(**changes))
    assert all(part in text for part in parts), text


@settings(max_examples=300, deadline=None)
@given(
    path=st.sampled_from(sorted(SCALARS | SECTIONS)),
    value=st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.lists(st.integers(), max_size=2)
    | st.text(max_size=4),
)
def test_any_junk_at_any_key_is_reported_or_a_config_error(path: str, value: Any) -> None:
    content: dict[str, Any] = {"angelptm": OWN, "optimizer": {"type": "Adam"}, "scheduler": {"type": "WarmupCosineLR"}}
    section, (*above, last) = content, path.split(".")
    for part in above:
        section = section.setdefault(part, {})
    section[last] = value
    with contextlib.suppress(ConfigError):
        _, report = load_config_with_report(content)
        assert report is not None
        assert path in [entry.key for entry in report.entries]


def test_features_that_are_off_are_listed_and_not_refused() -> None:
    content = with_(
        amp={"enabled": False}, curriculum_learning={"enabled": False, "params": {"x": 1}}, sparse_gradients=True
    )
    _, report = load_config_with_report(content)
    assert report is not None
    ignored = {entry.key for entry in report.of("ignored")}
    assert ignored == {
        "amp.enabled",
        "curriculum_learning.enabled",
        "curriculum_learning.params.x",
        "sparse_gradients",
    }


def test_adam_with_l2_mode_but_no_decay_is_plain_adam() -> None:
    config = load_config(with_(optimizer={"type": "Adam", "params": {"adam_w_mode": False}}))
    assert (config.optimizer.type, config.optimizer.weight_decay) == ("adamw", 0.0)


def test_differences_are_told_as_approximations_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="angelptm"):
        _, report = load_config_with_report(
            with_(scheduler={"type": "WarmupLR", "params": {"warmup_num_steps": 7, "warmup_min_lr": 1e-5}})
        )
    assert report is not None
    assert {entry.key for entry in report.of("approximated")} == {
        "scheduler.params.warmup_num_steps",
        "scheduler.params.warmup_min_lr",
    }
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert any("logarithmic" in text for text in warnings)
    assert any("mapped" in record.getMessage() for record in caplog.records if record.levelno == logging.INFO)


def test_the_two_forms_are_told_apart() -> None:
    assert is_deepspeed(HF_ZERO3)
    assert is_deepspeed({"optimizer": {"type": "Adam", "params": {}}})
    assert is_deepspeed({"bf16": {"enabled": True}})
    assert not is_deepspeed({**OWN, "optimizer": {"type": "adamw"}, "gradient_clipping": 1.0})
    assert not is_deepspeed({**OWN, "bf16": True})
    assert not is_deepspeed({})
    assert load_config_with_report(OWN)[1] is None


def test_json_file_is_detected(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(NVME))
    assert load_config(path).hash == load_config(NVME).hash
    assert load_config(path, ["data.micro_batch_size=2"]).data.micro_batch_size == 2
