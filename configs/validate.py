"""Combinations that cannot work, found from the config alone: pure functions that return problems.

What needs the world's size, the teacher or the corpus is checked by the launcher once these are known.
"""

import math
import re
from collections import Counter

from configs.corpus_schema import CorpusConfig, SourceKind
from configs.deepspeed import DERIVED, conflicts, micro_batches
from configs.evaluate_schema import EvaluateConfig
from configs.schema import (
    DataConfig,
    Offload,
    Placement,
    Precision,
    Quantization,
    RunConfig,
    TeacherConfig,
    TrainConfig,
)
from configs.student_schema import LossConfig, OptimizerConfig, StudentConfig

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_MAX_SEQ_LEN = 65_535  # row lengths are stored as uint16


def check_run(config: RunConfig) -> list[str]:
    """Return every problem of a run's config, each with key, value, rule and way out."""
    problems = _check_lengths(config) + _check_data(config.data) + _check_deepspeed(config)
    problems += _check_teacher(config.teacher) + _check_checkpoint(config)
    if not _NAME.fullmatch(config.name):
        problems.append(f"name={config.name!r} must be letters, digits, '-', '_' and '.'")
    problems += _check_under(config.tracking.under)
    for name, count in Counter(student.name for student in config.students).items():
        if count > 1:
            problems.append(f"students: the name {name!r} is used {count} times; give each its own")
    for index, student in enumerate(config.students):
        problems += _check_student(f"students.{index}", student)
        if student.compile and config.deepspeed.zero_stage == 3:
            problems.append(
                f"students.{index}.compile=true needs deepspeed.zero_stage 0, 1 or 2, not 3: parameters come "
                "and go between layers"
            )
    return problems


def _check_under(under: list[str]) -> list[str]:
    return [
        f"tracking.under.{index}={name!r} must be letters, digits, '-', '_' and '.'"
        for index, name in enumerate(under)
        if not _NAME.fullmatch(name)
    ]


def check_batch(train: TrainConfig, world_size: int) -> list[str]:
    """Return the problem, if any, of dealing a global batch to ``world_size`` ranks in micro batches."""
    global_batch_rows, micro_batch_rows = train.global_batch_rows, train.micro_batch_rows
    unit = micro_batch_rows * world_size
    if global_batch_rows % unit == 0:
        return []
    if train.elastic:
        if global_batch_rows // world_size >= micro_batches(train, world_size):
            return []
        return [
            f"train.global_batch_rows={global_batch_rows} is too small for {world_size} ranks: with "
            f"micro_batch_rows={micro_batch_rows} some would have a micro batch without rows; raise one of "
            "the two, or use fewer ranks"
        ]
    below, above = global_batch_rows // unit * unit, (global_batch_rows // unit + 1) * unit
    nearest = ", ".join(str(rows) for rows in (below, above) if rows > 0)
    return [
        f"train.global_batch_rows={global_batch_rows} is not a multiple of {unit} "
        f"(micro batch {micro_batch_rows} x {world_size} ranks); nearest: {nearest}; "
        "or allow any number of ranks with train.elastic=true"
    ]


def check_corpus(config: CorpusConfig) -> list[str]:
    """Return every problem of a corpus build's config."""
    problems = _positive(
        ("min_document_chars", config.min_document_chars, 0),
        ("max_documents", config.max_documents, 1),
        ("processes", config.processes, 1),
        ("block_rows", config.block_rows, 1),
    )
    if not 8 <= config.seq_len <= _MAX_SEQ_LEN:
        problems.append(f"seq_len={config.seq_len} must be between 8 and {_MAX_SEQ_LEN}")
    if not 0 <= config.heldout_share < 1:
        problems.append(f"heldout_share={config.heldout_share} must be at least 0 and below 1")
    row_bytes = config.seq_len * 4 + 4
    if config.max_shard_bytes < config.block_rows * row_bytes:
        problems.append(
            f"max_shard_bytes={config.max_shard_bytes} cannot hold one block "
            f"({config.block_rows} rows of up to {row_bytes} bytes); raise it or lower block_rows"
        )
    if config.source.kind is not SourceKind.datasets and config.source.subset is not None:
        problems.append(f"source.subset={config.source.subset!r} goes with source.kind=datasets only")
    if not 0 < config.near_threshold < 1:
        problems.append(f"near_threshold={config.near_threshold} must be above 0 and below 1")
    if config.shuffle_seed is not None and not 0 <= config.shuffle_seed < 2**64:
        problems.append(f"shuffle_seed={config.shuffle_seed} must be at least 0 and below 2**64, or null")
    if config.source.kind is not SourceKind.text and config.source.one_per_line:
        problems.append("source.one_per_line=true goes with source.kind=text only")
    return problems


def check_evaluate(config: EvaluateConfig) -> list[str]:
    """Return every problem of an evaluation's config."""
    latency, arms = config.latency, {arm for task in config.tasks for arm in task.arms}
    problems = _positive(
        ("batch_rows", config.batch_rows, 1),
        ("latency.seq_len", latency.seq_len, 1),
        ("latency.repeats", latency.repeats, 1),
        ("latency.threads", latency.threads, 1),
        *((f"latency.batch_rows.{number}", rows, 1) for number, rows in enumerate(latency.batch_rows)),
    )
    problems += _check_under(config.tracking.under)
    if not latency.batch_rows:
        problems.append("latency.batch_rows=[] must hold at least one number of rows")
    if not config.aim > 0:
        problems.append(f"aim={config.aim} must be above 0: it is a share of the teacher's score")
    for arm in sorted(arms):
        if not _NAME.fullmatch(arm) or arm == "teacher":
            problems.append(
                f"tasks: the arm {arm!r} must be letters, digits, '-', '_' and '.', and not 'teacher'"
            )
    for number, task in enumerate(config.tasks):
        empty = [arm for arm, models in task.arms.items() if not models]
        problems += [
            f"tasks.{number}.arms.{arm} names no model; name a folder, or leave it out" for arm in empty
        ]
    problems += [
        f"ship: no task has the arm {arm!r}; its arms are {', '.join(sorted(arms)) or 'missing'}"
        for arm in config.ship
        if arm not in arms
    ]
    return problems


def _check_lengths(config: RunConfig) -> list[str]:
    train = config.train
    problems = _positive(
        ("train.global_batch_rows", train.global_batch_rows, 1),
        ("train.micro_batch_rows", train.micro_batch_rows, 1),
        ("train.steps", train.steps, 1),
        ("train.threads", train.threads, 1),
        ("train.max_skipped_steps", train.max_skipped_steps, 1),
        ("train.seed", train.seed, 0),
        ("data.group_blocks", config.data.group_blocks, 1),
        ("data.workers", config.data.workers, 0),
        ("data.prefetch_steps", config.data.prefetch_steps, 1),
        ("data.prefetch_blocks", config.data.prefetch_blocks, 0),
        ("data.cache.max_bytes", config.data.cache.max_bytes, 0),
        ("evaluation.every_steps", config.evaluation.every_steps, 1),
        ("train.max_rollbacks", train.max_rollbacks, 1),
        ("evaluation.rows", config.evaluation.rows, 1),
        ("probes.every_steps", config.probes.every_steps, 1),
        ("probes.rows", config.probes.rows, 2),
        ("checkpoint.every_steps", config.checkpoint.every_steps, 1),
        ("checkpoint.keep_last", config.checkpoint.keep_last, 1),
        ("checkpoint.keep_every_steps", config.checkpoint.keep_every_steps, 1),
        ("log.every_steps", config.log.every_steps, 1),
    )
    if (train.epochs is None) == (train.steps is None):
        problems.append(
            f"train.epochs={train.epochs} and train.steps={train.steps}: set exactly one of the two"
        )
    if (config.probes.every_steps is None) != (not config.probes.tasks):
        problems.append(
            f"probes.every_steps={config.probes.every_steps} and probes.tasks with "
            f"{len(config.probes.tasks)} corpora: set both, or none"
        )
    if not 0 < train.rollback_lr_factor < 1:
        problems.append(
            f"train.rollback_lr_factor={train.rollback_lr_factor} must be above 0 and below 1: at the "
            "same rate a student would fail again"
        )
    for key, value in (
        ("train.max_hours", train.max_hours),
        ("timeouts.start_s", config.timeouts.start_s),
        ("timeouts.step_s", config.timeouts.step_s),
    ):
        if value is not None and not value > 0:
            problems.append(f"{key}={value} must be above 0")
    if train.epochs is not None and not train.epochs > 0:
        problems.append(f"train.epochs={train.epochs} must be above 0")
    if train.micro_batch_rows >= 1:  # with one rank it must already come out even
        problems += check_batch(train, world_size=1)
    return problems


def _check_data(data: DataConfig) -> list[str]:
    problems = []
    if (data.corpus is None) == (not data.mixture):
        problems.append(
            f"data.corpus={data.corpus} and data.mixture with {len(data.mixture)} corpora: set one of the two"
        )
    given = [entry.weight for entry in data.mixture if entry.weight is not None]
    if given and len(given) < len(data.mixture):
        problems.append(
            f"data.mixture: {len(given)} of {len(data.mixture)} corpora have a weight; set all of them, or "
            "none (then each has the weight of its rows)"
        )
    for number, entry in enumerate(data.mixture):
        if entry.weight is not None and not 0 < entry.weight < math.inf:
            problems.append(f"data.mixture.{number}.weight={entry.weight} must be above 0 and finite")
        if entry.name is not None and not _NAME.fullmatch(entry.name):
            problems.append(
                f"data.mixture.{number}.name={entry.name!r} must be letters, digits, '-', '_' and '.'"
            )
    return problems


def _check_checkpoint(config: RunConfig) -> list[str]:
    saves, kept = config.checkpoint.every_steps, config.checkpoint.keep_every_steps
    evaluations = config.evaluation.every_steps
    if min(saves or 1, kept or 1, evaluations or 1) < 1:
        return []  # which is said elsewhere
    problems = []
    if kept is not None and (saves is None or kept % saves):
        problems.append(
            f"checkpoint.keep_every_steps={kept} is not a multiple of checkpoint.every_steps={saves}: those "
            "steps are not saved"
        )
    if not config.checkpoint.keep_best:
        return problems
    if saves is None or evaluations is None:
        problems.append(
            f"checkpoint.keep_best=true needs checkpoint.every_steps={saves} and evaluation.every_steps="
            f"{evaluations} to be set: the best are those saves that are evaluated"
        )
    elif saves % evaluations and evaluations % saves:
        problems.append(
            "checkpoint.keep_best=true needs saves that are evaluated, but neither of checkpoint.every_steps="
            f"{saves} and evaluation.every_steps={evaluations} is a multiple of the other"
        )
    return problems


def _check_teacher(teacher: TeacherConfig) -> list[str]:
    problems = []
    quantization, placement = teacher.quantization, teacher.placement
    if quantization is Quantization.fp8 and teacher.precision is not Precision.bf16:
        problems.append(
            f"teacher.quantization=fp8 needs teacher.precision=bf16, not {teacher.precision.value}"
        )
    if placement is not Placement.replicated and quantization is not Quantization.none:
        problems.append(
            f"teacher.quantization={quantization.value} needs teacher.placement=replicated, not "
            f"{placement.value}: DeepSpeed partitions plain tensors only"
        )
    if placement is not Placement.replicated and teacher.compile:
        problems.append(
            f"teacher.compile=true needs teacher.placement=replicated, not {placement.value}: parameters "
            "come and go between layers"
        )
    if placement is not Placement.offload and teacher.offload_folder is not None:
        problems.append(
            f"teacher.offload_folder={teacher.offload_folder!r} goes with teacher.placement=offload, not "
            f"{placement.value}"
        )
    return problems


def _check_deepspeed(config: RunConfig) -> list[str]:
    deepspeed = config.deepspeed
    problems = []
    if deepspeed.zero_stage not in (0, 1, 2, 3):
        problems.append(f"deepspeed.zero_stage={deepspeed.zero_stage} must be 0, 1, 2 or 3")
    if deepspeed.offload_optimizer is not Offload.none and deepspeed.zero_stage == 0:
        problems.append("deepspeed.offload_optimizer=cpu needs deepspeed.zero_stage 1, 2 or 3, not 0")
    if deepspeed.offload_parameters is not Offload.none and deepspeed.zero_stage != 3:
        problems.append(
            f"deepspeed.offload_parameters=cpu needs deepspeed.zero_stage 3, not {deepspeed.zero_stage}"
        )
    if deepspeed.precision is not Precision.fp32 and deepspeed.zero_stage == 0:
        problems.append(
            f"deepspeed.precision={deepspeed.precision.value} needs deepspeed.zero_stage 1, 2 or 3, "
            "which keep float32 master weights; stage 1 costs no more than 0, even on one rank"
        )
    for key in conflicts(deepspeed.extra):
        problems.append(f"deepspeed.extra.{key} follows from {DERIVED[key]}; set that instead")
    return problems


def _check_student(prefix: str, student: StudentConfig) -> list[str]:
    problems = _positive(
        (f"{prefix}.layers", student.layers, 1),
        (f"{prefix}.heads", student.heads, 1),
        (f"{prefix}.hidden_size", student.hidden_size, 1),
        (f"{prefix}.intermediate_size", student.intermediate_size, 1),
    )
    if not _NAME.fullmatch(student.name):
        problems.append(f"{prefix}.name={student.name!r} must be letters, digits, '-', '_' and '.'")
    if student.heads >= 1 and student.hidden_size % student.heads:
        problems.append(
            f"{prefix}.hidden_size={student.hidden_size} is not a multiple of heads={student.heads}"
        )
    if not isinstance(student.layer_map, str | list):
        problems.append(
            f"{prefix}.layer_map={student.layer_map!r} must be uniform, last, skip or a list of integers"
        )
    return problems + _check_losses(prefix, student) + _check_optimizer(prefix, student.optimizer)


def _check_losses(prefix: str, student: StudentConfig) -> list[str]:
    losses: LossConfig = student.losses
    problems = []
    terms = {
        "embedding": losses.embedding,
        "hidden": losses.hidden,
        "attention": losses.attention,
        "cosine": losses.cosine,
        "relation.weight": losses.relation.weight,
        "prediction": losses.prediction,
        "logits": losses.logits,
        "labels": losses.labels,
    }
    for name, weight in terms.items():
        if not weight >= 0:
            problems.append(f"{prefix}.losses.{name}={weight} must be at least 0")
    if not any(weight > 0 for weight in terms.values()):
        problems.append(f"{prefix}.losses: every weight is 0, so nothing would be learned")
    if losses.prediction and (losses.logits or losses.labels):
        problems.append(
            f"{prefix}.losses.prediction={losses.prediction} needs a masked-language-model head, logits and "
            "labels a task's, and a student has one; set one of them to 0"
        )
    if not 0 < losses.temperature < math.inf:
        problems.append(f"{prefix}.losses.temperature={losses.temperature} must be above 0 and finite")
    relation = losses.relation
    problems += _positive(
        (f"{prefix}.losses.attention_heads", losses.attention_heads, 1),
        (f"{prefix}.losses.relation.heads", relation.heads, 1),
        (f"{prefix}.losses.relation.student_layer", relation.student_layer, 1),
        (f"{prefix}.losses.relation.teacher_layer", relation.teacher_layer, 1),
    )
    if losses.layers is not None and len(losses.layers) != student.layers:
        problems.append(
            f"{prefix}.losses.layers has {len(losses.layers)} weights for {student.layers} layers"
        )
    if losses.layers is not None and any(not weight >= 0 for weight in losses.layers):
        problems.append(f"{prefix}.losses.layers={losses.layers} must all be at least 0")
    return problems


def _check_optimizer(prefix: str, optimizer: OptimizerConfig) -> list[str]:
    prefix = f"{prefix}.optimizer"
    problems = []
    if not 0 < optimizer.lr < math.inf:
        problems.append(f"{prefix}.lr={optimizer.lr} must be above 0 and finite")
    if len(optimizer.betas) != 2 or not all(0 <= beta < 1 for beta in optimizer.betas):
        problems.append(f"{prefix}.betas={optimizer.betas} must be two numbers, at least 0 and below 1")
    if not optimizer.eps > 0:
        problems.append(f"{prefix}.eps={optimizer.eps} must be above 0")
    if not optimizer.weight_decay >= 0:
        problems.append(f"{prefix}.weight_decay={optimizer.weight_decay} must be at least 0")
    if optimizer.max_grad_norm is not None and not optimizer.max_grad_norm > 0:
        problems.append(f"{prefix}.max_grad_norm={optimizer.max_grad_norm} must be above 0, or null for none")
    for name, share in (("warmup", optimizer.warmup), ("min_lr_ratio", optimizer.min_lr_ratio)):
        if not 0 <= share <= 1:
            problems.append(f"{prefix}.{name}={share} must be between 0 and 1: it is a share")
    return problems


def _positive(*entries: tuple[str, int | None, int]) -> list[str]:
    return [
        f"{name}={value} must be at least {least}"
        for name, value, least in entries
        if value is not None and value < least
    ]
