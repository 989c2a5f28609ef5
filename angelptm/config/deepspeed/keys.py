"""Every key of a DeepSpeed configuration that we know, and what happens to it.

MAPPED keys are handled in rules.py; IGNORED ones are listed with the reason; REFUSED ones stop the run when they are
switched on, as they would change what is computed. Sections in OPEN are ignored as a whole, whatever is inside.
"""

from __future__ import annotations


def _keys(section: str, names: str) -> list[str]:
    return [f"{section}.{name}" if section else name for name in names.split()]


MARKS = frozenset({"angelptm", "train_batch_size", "train_micro_batch_size_per_gpu", "zero_optimization"})
"""Top-level keys that make a mapping a DeepSpeed configuration, whatever stands beside them."""

WEAK_MARKS = frozenset({"bf16", "bfloat16", "fp16", "aio", "steps_per_print", "activation_checkpointing"})
"""Top-level keys that do so unless our own ``tiers`` stands beside them."""

MAPPED = frozenset(
    [
        *_keys("", "train_batch_size train_micro_batch_size_per_gpu gradient_accumulation_steps gradient_clipping"),
        "steps_per_print",
        *_keys("optimizer", "type"),
        *_keys("optimizer.params", "lr betas eps weight_decay momentum dampening nesterov torch_adam adam_w_mode"),
        *_keys("scheduler", "type"),
        *_keys("scheduler.params", "warmup_min_lr warmup_max_lr warmup_num_steps warmup_type total_num_steps"),
        *_keys("scheduler.params", "warmup_min_ratio cos_min_ratio"),
        *_keys("bf16", "enabled"),
        *_keys("bfloat16", "enabled"),
        *_keys("fp16", "enabled"),
        *_keys("zero_optimization", "stage cpu_offload cpu_offload_param cpu_offload_params"),
        *_keys("zero_optimization.offload_optimizer", "device nvme_path"),
        *_keys("zero_optimization.offload_param", "device nvme_path"),
        *_keys("aio", "queue_depth"),
        *_keys("activation_checkpointing", "partition_activations cpu_checkpointing number_checkpoints"),
        *_keys("activation_checkpointing", "contiguous_memory_optimization"),
    ]
)

_REASONS: dict[str, list[str]] = {
    "moves are planned ahead from one traced step, within the tiers' budgets": [
        *_keys("zero_optimization", "stage3_max_live_parameters stage3_max_reuse_distance"),
        *_keys("zero_optimization", "stage3_prefetch_bucket_size stage3_param_persistence_threshold"),
        *_keys("zero_optimization", "stage3_model_persistence_threshold stage3_module_granularity_threshold"),
        *_keys("zero_optimization", "max_live_parameters max_reuse_distance prefetch_bucket_size"),
        *_keys("zero_optimization", "param_persistence_threshold model_persistence_threshold"),
        *_keys(
            "zero_optimization", "module_granularity_threshold log_trace_cache_warnings stage3_allgather_sequential"
        ),
        *_keys("zero_optimization", "stage3_partition_stream_chunk_size"),
    ],
    "updates go span by span, a page of each state; see page_size": [
        *_keys("zero_optimization", "sub_group_size"),
        *_keys("zero_optimization.offload_optimizer", "buffer_count ratio super_offload cpuadam_cores_perc"),
        *_keys("zero_optimization.offload_optimizer", "convert_grad_on_cpu fast_init"),
    ],
    "tiers.host bounds what stays in DRAM; pools are allocated once": [
        *_keys("zero_optimization", "cpu_offload_use_pin_memory"),
        *_keys("zero_optimization.offload_optimizer", "pin_memory"),
        *_keys("zero_optimization.offload_param", "pin_memory buffer_count buffer_size max_in_cpu"),
    ],
    "reading, updating and writing always overlap; see update.ring_depth": _keys(
        "zero_optimization.offload_optimizer", "pipeline_read pipeline_write pipeline"
    ),
    "one process: there is no communication to tune": [
        *_keys("", "communication_data_type seq_parallel_comm_data_type seq_parallel_communication_data_type"),
        *_keys("", "prescale_gradients gradient_predivide_factor fp32_allreduce disable_allgather sparse_gradients"),
        *_keys("", "data_parallel_size sequence_parallel_size use_data_before_expert_parallelism"),
        *_keys("zero_optimization", "overlap_comm reduce_scatter reduce_bucket_size allgather_bucket_size"),
        *_keys("zero_optimization", "allgather_partitions contiguous_gradients round_robin_gradients"),
        *_keys("zero_optimization", "use_multi_rank_bucket_allreduce use_all_reduce_for_fetch_params"),
        *_keys("zero_optimization", "stage3_use_all_reduce_for_fetch_params zero_hpz_partition_size"),
        *_keys("zero_optimization", "zero_quantized_gradients mics_shard_size mics_hierarchical_params_gather"),
        *_keys("zero_optimization", "legacy_stage1 elastic_checkpoint"),
    ],
    "export_safetensors gathers the weights unit by unit": [
        *_keys("zero_optimization", "stage3_gather_16bit_weights_on_model_save gather_16bit_weights_on_model_save"),
        *_keys("zero_optimization", "stage3_gather_fp16_weights_on_model_save load_from_fp32_weights"),
    ],
    "part of DeepSpeed's own machinery": [
        *_keys("", "zero_allow_untested_optimizer zero_force_ds_cpu_optimizer graph_harvesting dump_state"),
        *_keys("", "dataloader_drop_last vocabulary_size"),
        *_keys("optimizer", "legacy_fusion"),
        *_keys("optimizer.params", "fused foreach cuda_aware comm_backend_name"),
        *_keys("zero_optimization", "ignore_unused_parameters memory_efficient_linear pipeline_loading_checkpoint"),
        *_keys("zero_optimization", "override_module_apply enable_sanity_checks save_muon_momentum_buffer_in_memory"),
        *_keys("bf16", "immediate_grad_update check_grad_overflow"),
        *_keys("bfloat16", "immediate_grad_update check_grad_overflow"),
        *_keys("activation_checkpointing", "synchronize_checkpoint_boundary profile"),
    ],
    "loss scaling belongs to fp16, which is off": [
        *_keys("fp16", "auto_cast loss_scale initial_scale_power loss_scale_window hysteresis"),
        *_keys("fp16", "consecutive_hysteresis min_loss_scale fused_mode fp16_master_weights_and_grads"),
    ],
    "Apex AMP is off": _keys("amp", "opt_level"),
    "torch_autocast is off": _keys("torch_autocast", "dtype lower_precision_safe_modules"),
    "gradients accumulate in fp32": _keys("data_types", "grad_accum_dtype"),
    "I/O goes page by page; see page_size": _keys("aio", "block_size"),
    "the I/O engine batches and overlaps by itself; see io and update.threads": _keys(
        "aio", "thread_count intra_op_parallelism single_submit overlap_events use_gds"
    ),
    "every run records its phases and bytes": _keys("", "wall_clock_breakdown memory_breakdown"),
}

IGNORED: dict[str, str] = {key: reason for reason, keys in _REASONS.items() for key in keys}

OPEN: dict[str, str] = {
    "zero_optimization.zenflow": "updates are synchronous and overlap all the same",
    "zero_optimization.leaf_module": "see units.classes",
    "zero_optimization.zeropp_loco_param": "one process: there is no communication to tune",
    "checkpoint": "checkpoints are this package's own",
    "nebula": "checkpoints are this package's own",
    "flops_profiler": "every run records its phases and bytes",
    "comms_logger": "one process: there is no communication to log",
    "tensorboard": "the run folder holds this package's own records",
    "wandb": "the run folder holds this package's own records",
    "csv_monitor": "the run folder holds this package's own records",
    "comet": "the run folder holds this package's own records",
    "monitor_config": "the run folder holds this package's own records",
    "autotuning": "the plan follows from the budgets and measured rates",
    "elasticity": "one process",
    "tensor_parallel": "one process",
    "pipeline": "one process",
    "timers": "every run records its phases and bytes",
    "hybrid_engine": "generate() works between steps without it",
    "compile": "part of DeepSpeed's own machinery",
}

REFUSED: dict[str, tuple[str, str]] = {
    "amp.enabled": ("false", "Apex AMP is not offered; use bf16: {enabled: true}."),
    "torch_autocast.enabled": ("false", "Autocast is not offered; use bf16: {enabled: true}."),
    "optimizer.params.amsgrad": ("false", "AMSGrad is not offered."),
    "optimizer.params.maximize": ("false", "Maximizing is not offered; negate the loss."),
    "bf16.bf16_master_weights_and_grads": ("false", "Master weights are fp32 here; remove the key."),
    "bf16.bf16_optimizer_states": ("false", "Optimizer states are fp32 here; remove the key."),
    "zero_optimization.zero_quantized_weights": ("false", "Weights are not quantized here."),
    "zero_optimization.zero_quantized_nontrainable_weights": ("false", "Weights are not quantized here."),
    "progressive_layer_drop.enabled": ("false", "Layer drop is not offered."),
    "eigenvalue.enabled": ("false", "Quantized training is not offered."),
    "curriculum_learning.enabled": ("false", "Curriculum learning is not offered."),
    "data_efficiency.enabled": ("false", "Data efficiency is not offered."),
}
"""key → (what is expected, remedy)."""

REFUSED_SECTIONS: dict[str, str] = {
    "compression_training": "Compression is not offered.",
    "quantize_training": "Quantized training is not offered.",
    "sparse_attention": "Sparse attention belongs in the model.",
}

SWITCHED_SECTIONS = frozenset(key.split(".")[0] for key in REFUSED if key.endswith(".enabled")) - {"fp16", "bf16"}
"""Sections of which only ``enabled`` counts: while it is off, what else they hold has no effect."""

TRUE_ONLY = {"optimizer.params.bias_correction": "Adam without bias correction is not offered."}
"""Keys whose value false is refused."""

SCALARS = MAPPED | IGNORED.keys() | REFUSED.keys() | TRUE_ONLY.keys()
SECTIONS = OPEN.keys() | REFUSED_SECTIONS.keys() | SWITCHED_SECTIONS
TOP_LEVEL = frozenset(key.split(".")[0] for key in SCALARS | SECTIONS)
