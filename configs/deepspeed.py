"""The DeepSpeed config, derived: one place for batch arithmetic, ZeRO, offload and precision."""

from collections.abc import Mapping, Sequence
from typing import Any

from configs.schema import Offload, Precision, RunConfig, TrainConfig
from configs.student_schema import StudentConfig

DERIVED = {
    "train_batch_size": "train.global_batch_rows",
    "train_micro_batch_size_per_gpu": "train.micro_batch_rows",
    "gradient_accumulation_steps": "train.global_batch_rows and train.micro_batch_rows",
    "gradient_clipping": "students.N.optimizer.max_grad_norm",
    "optimizer": "students.N.optimizer",
    "scheduler": "students.N.optimizer",
    "bf16.enabled": "deepspeed.precision",
    "fp16.enabled": "deepspeed.precision",
    "data_types.grad_accum_dtype": "deepspeed.precision",
    "zero_optimization.stage": "deepspeed.zero_stage",
    "zero_optimization.offload_optimizer.device": "deepspeed.offload_optimizer",
    "zero_optimization.offload_param.device": "deepspeed.offload_parameters",
}
"""DeepSpeed keys (dotted) that follow from other settings, and the setting that each follows from."""


def micro_batches(train: TrainConfig, world_size: int) -> int:
    """Return how many micro batches every rank runs in a step: enough for the rank with the most rows."""
    most_rows = -(-train.global_batch_rows // world_size)
    return -(-most_rows // train.micro_batch_rows)


def derive(config: RunConfig, student: StudentConfig, world_size: int, pin_memory: bool) -> dict[str, Any]:
    """Return the DeepSpeed config of one student.

    ``train_batch_size = micro_batch_rows * gradient_accumulation_steps * world_size``; where ranks do not
    divide the batch (``train.elastic``), it is what they would have if all had as many rows as the one with
    most. DeepSpeed only wants it consistent: losses come divided by global counts. The student's
    optimizer is a ``torch.optim.AdamW`` made by us, in every mode: its CPU kernel is fused and vectorised,
    so offload needs no compiled extension (``zero_force_ds_cpu_optimizer: false``).

    Args:
        config: a validated run config whose batch ``check_batch`` finds right for ``world_size``.
        student: the student whose clipping applies.
        world_size: number of data-parallel ranks.
        pin_memory: page-lock offloaded state (CUDA only).
    """
    train, steps = config.train, micro_batches(config.train, world_size)
    even = train.global_batch_rows % (train.micro_batch_rows * world_size) == 0
    assert even or train.elastic, "check_batch comes first"
    micro_rows = -(-train.global_batch_rows // (world_size * steps))
    settings = config.deepspeed
    zero: dict[str, Any] = {"stage": settings.zero_stage}
    if settings.offload_optimizer is not Offload.none:
        zero["offload_optimizer"] = {"device": settings.offload_optimizer.value, "pin_memory": pin_memory}
    if settings.offload_parameters is not Offload.none:
        zero["offload_param"] = {"device": settings.offload_parameters.value, "pin_memory": pin_memory}
    derived: dict[str, Any] = {
        "train_batch_size": micro_rows * steps * world_size,
        "train_micro_batch_size_per_gpu": micro_rows,
        "gradient_accumulation_steps": steps,
        "gradient_clipping": student.optimizer.max_grad_norm or 0.0,  # 0 is DeepSpeed's "off"
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,
    }
    if settings.precision is Precision.bf16:
        # float32 accumulation: in bf16 a small micro-batch gradient vanishes beside the running sum
        derived |= {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
    if settings.precision is Precision.fp16:
        derived |= {"fp16": {"enabled": True}}
    return _merge(derived, settings.extra)


def conflicts(extra: Mapping[str, Any]) -> list[str]:
    """Return the derived keys that ``extra`` tries to set, or to replace with all above them; sorted."""
    return sorted(key for key in DERIVED if _sets(extra, key.split(".")))


def _merge(base: Mapping[str, Any], extra: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in extra.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _sets(tree: Any, path: Sequence[str]) -> bool:
    """Tell whether merging ``tree`` would set ``path``: itself, or a value in place of a branch above it."""
    if not path or not isinstance(tree, Mapping):
        return True
    return path[0] in tree and _sets(tree[path[0]], path[1:])
