"""Shapes: a student's ``transformers`` config, and whether it can learn from a teacher. No weights here."""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PreTrainedConfig

from configs.student_schema import StudentConfig
from sharding.manifest import TaskInfo
from trainer.attention_loss import common_heads
from trainer.checkpoint import is_student
from trainer.encoders import new_encoder, read_config
from trainer.layer_map import resolve
from trainer.task_loss import REGRESSION, SPANS
from trainer.transfer import Relation, Transfer, head_of


def check_students(
    students: Sequence[StudentConfig],
    teacher: PreTrainedConfig,
    seq_len: int,
    task: TaskInfo | None = None,
) -> list[str]:
    """Return every reason why these students cannot learn from this teacher on rows of ``seq_len``."""
    problems = []
    if seq_len > _positions(teacher):
        problems.append(f"the corpus has rows of {seq_len} tokens, the teacher takes {_positions(teacher)}")
    for index, student in enumerate(students):
        for check in (transfer, partial(_check_config, seq_len=seq_len)):
            try:
                check(student, teacher, task=task)
            except ValueError as error:
                problems.append(f"students.{index} ({student.name}): {error}")
    return problems


def transfer(student: StudentConfig, teacher: PreTrainedConfig, task: TaskInfo | None = None) -> Transfer:
    """Return what the student learns from which teacher layer, resolved.

    Args:
        task: the corpus's, if it has one.

    Raises:
        ValueError: a layer map out of range, head counts that cannot be mapped, a task's losses without a
            task, a teacher of another task.
    """
    layer_map = resolve(student.layer_map, student.layers, teacher.num_hidden_layers)
    losses = student.losses
    if losses.logits or losses.labels:
        _check_task(student, teacher, task)
    return Transfer(
        layer_map=layer_map,
        attention_heads=common_heads(student.heads, teacher.num_attention_heads, losses.attention_heads),
        embedding=losses.embedding,
        hidden=losses.hidden,
        attention=losses.attention,
        layers=tuple(losses.layers or [1.0] * student.layers),
        cosine=losses.cosine,
        relation=_relation(student, teacher) if losses.relation.weight else None,
        prediction=losses.prediction,
        temperature=losses.temperature,
        logits=losses.logits,
        labels=losses.labels,
        task=task.kind if task is not None and (losses.logits or losses.labels) else None,
    )


def _check_task(student: StudentConfig, teacher: PreTrainedConfig, task: TaskInfo | None) -> None:
    """Raise ValueError unless there is a task, which the teacher has learned where it is needed."""
    losses = student.losses
    if task is None:
        raise ValueError(
            f"losses.logits={losses.logits} and losses.labels={losses.labels} need a task's corpus, and this "
            "one has no labels; build one with launcher/task.py stage=data, or set them to 0"
        )
    if not losses.logits or task.kind == SPANS:
        return
    outputs = max(1, len(task.labels))
    if teacher.num_labels != outputs:
        raise ValueError(
            f"losses.logits={losses.logits} compares {outputs} outputs of task {task.name}, the teacher has "
            f"{teacher.num_labels}; fine-tune it on the task first (launcher/task.py stage=teacher), or name "
            "one that is"
        )
    by_index: dict[Any, str] = teacher.id2label or {}
    named = [by_index[index] for index in sorted(by_index)]
    if set(named) == set(task.labels) and named != list(task.labels):
        raise ValueError(
            f"the teacher's outputs are {', '.join(named)}, the corpus's classes {', '.join(task.labels)}: "
            f"the same names in another order; build the corpus with labels=[{', '.join(named)}]"
        )


def task_settings(task: TaskInfo | None) -> dict[str, Any]:
    """Return the settings of a ``transformers`` config that say what a task's head has for outputs."""
    if task is None or task.kind == SPANS:
        return {}
    names = task.labels or ("score",)
    problem = "regression" if task.kind == REGRESSION else "single_label_classification"
    ids = {name: index for index, name in enumerate(names)}
    return {"id2label": dict(enumerate(names)), "label2id": ids, "problem_type": problem}


def _relation(student: StudentConfig, teacher: PreTrainedConfig) -> Relation:
    """Return which relations are compared, resolved.

    Raises:
        ValueError: a layer that does not exist, or heads that do not divide both widths.
    """
    asked = student.losses.relation
    common = math.gcd(student.hidden_size, teacher.hidden_size)
    heads = asked.heads or max(r for r in range(1, 49) if common % r == 0)
    if common % heads:
        raise ValueError(
            f"losses.relation.heads={heads} must divide both hidden sizes (student {student.hidden_size}, "
            f"teacher {teacher.hidden_size}); their greatest common divisor is {common}"
        )
    student_layer = asked.student_layer or student.layers
    teacher_layer = asked.teacher_layer or teacher.num_hidden_layers
    for key, layer, layers in (
        ("student_layer", student_layer, student.layers),
        ("teacher_layer", teacher_layer, teacher.num_hidden_layers),
    ):
        if not 1 <= layer <= layers:
            raise ValueError(f"losses.relation.{key}={layer} must be between 1 and {layers}")
    return Relation(asked.weight, heads, student_layer, teacher_layer)


def as_student(name: str, model: str, config: PreTrainedConfig) -> StudentConfig:
    """Return a pretrained encoder as a student that starts from itself, to be fine-tuned."""
    return StudentConfig(
        name=name,
        layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        heads=config.num_attention_heads,
        intermediate_size=getattr(config, _intermediate_key(config)),
        init=model,
    )


def encoder_config(
    student: StudentConfig, teacher: PreTrainedConfig, task: TaskInfo | None = None
) -> PreTrainedConfig:
    """Return the ``transformers`` config of a student's encoder: its shape, or what it starts from as it is.

    Raises:
        ValueError: it cannot be made, or read.
    """
    if not (student.losses.logits or student.losses.labels):
        task = None
    if student.init in ("random", "teacher") or is_student(student.init):
        config = student_hf_config(student, teacher)
        for key, value in task_settings(task).items():
            setattr(config, key, value)
        return config
    return read_config("init", student.init, **student.overrides, **task_settings(task))


def student_hf_config(student: StudentConfig, teacher: PreTrainedConfig) -> PreTrainedConfig:
    """Return the student's ``transformers`` config: the teacher's, with the student's shape.

    Of the teacher's own settings those that belong to its depth (lists with an entry per layer) are left
    to the architecture's defaults. A student of another architecture takes over the vocabulary, the
    special tokens and the number of positions only.

    Raises:
        ValueError: an unknown architecture, or an override that the architecture does not take.
    """
    architecture = student.architecture or teacher.model_type
    try:
        default = AutoConfig.for_model(architecture)
    except ValueError as error:
        raise ValueError(f"architecture={architecture!r} is not one that transformers knows") from error
    special = {key for key in vars(default) if key.endswith("_token_id")}
    kept = {key: getattr(teacher, key, None) for key in special} | {"vocab_size": teacher.vocab_size}
    if architecture == teacher.model_type:
        settings = teacher.to_diff_dict()
        own = {key for key in settings if not _per_layer(settings[key], teacher.num_hidden_layers)}
        kept |= {key: getattr(teacher, key) for key in own - _NOT_A_SETTING if hasattr(teacher, key)}
    config = AutoConfig.for_model(architecture, **kept)
    kept["max_position_embeddings"] = _positions(teacher) + _position_offset(config)
    shape = {
        "num_hidden_layers": student.layers,
        "hidden_size": student.hidden_size,
        "num_attention_heads": student.heads,
        _intermediate_key(config): student.intermediate_size,
    }
    _check_overrides(student, default, shape)
    if getattr(config, "embedding_size", None) is not None and student.init != "teacher":
        shape["embedding_size"] = student.hidden_size
    try:
        return AutoConfig.for_model(architecture, **{**kept, **_renamed(config, shape), **student.overrides})
    except StrictDataclassError as error:
        raise ValueError(f"overrides do not make a {architecture} config: {error}") from error


_NOT_A_SETTING = {
    "model_type",
    "architectures",
    "dtype",
    "torch_dtype",
    "transformers_version",
    "_name_or_path",
}


def _per_layer(value: Any, layers: int) -> bool:
    return isinstance(value, list | tuple) and len(value) == layers


def _intermediate_key(config: PreTrainedConfig) -> str:
    """DistilBERT calls the width of its feed-forward layers ``hidden_dim``."""
    return "intermediate_size" if hasattr(config, "intermediate_size") else "hidden_dim"


def _renamed(config: PreTrainedConfig, settings: dict[str, Any]) -> dict[str, Any]:
    """Return settings under the architecture's own names, so that a config takes them at construction."""
    return {config.attribute_map.get(key, key): value for key, value in settings.items()}


def _position_offset(config: PreTrainedConfig) -> int:
    """RoBERTa-like encoders number positions from ``pad_token_id + 1``, so that many have no place."""
    return config.pad_token_id + 1 if config.model_type in ("roberta", "xlm-roberta", "camembert") else 0


def _positions(config: PreTrainedConfig) -> int:
    """Return the most tokens that a row may have."""
    return config.max_position_embeddings - _position_offset(config)


def _check_overrides(student: StudentConfig, default: PreTrainedConfig, shape: dict[str, Any]) -> None:
    unknown = [key for key in student.overrides if not hasattr(default, key)]
    if unknown:
        raise ValueError(f"overrides {unknown} are not settings of a {default.model_type} config")
    derived = [key for key in student.overrides if key in shape or key in _renamed(default, shape)]
    if derived:
        raise ValueError(f"overrides {derived} follow from layers, hidden_size, heads and intermediate_size")


def _check_config(
    student: StudentConfig, teacher: PreTrainedConfig, seq_len: int, task: TaskInfo | None = None
) -> None:
    """Raise ValueError when the student cannot be made, or cannot read the teacher's rows."""
    config = student_hf_config(student, teacher)
    keys = ["model_type", "hidden_size", "num_attention_heads", "vocab_size", _intermediate_key(config)]
    if student.init == "teacher":
        inner = ["embedding_size", "max_position_embeddings", "type_vocab_size"]
        _check_same(student.init, config, teacher, [*keys, *inner])
    elif student.init != "random" and not is_student(student.init):
        asked, config = config, encoder_config(student, teacher, task)
        _check_same(student.init, asked, config, [*keys, "num_hidden_layers"])
    else:
        with torch.device("meta"):  # proves that it can be made and captured, without its memory
            losses, kind = student.losses, task.kind if task is not None else None
            head = head_of(losses.prediction, losses.logits, losses.labels, kind)
            new_encoder(encoder_config(student, teacher, task), head)
    if config.vocab_size < teacher.vocab_size:
        raise ValueError(f"vocab_size {config.vocab_size} is below the teacher's {teacher.vocab_size}")
    if student.losses.prediction and config.vocab_size != teacher.vocab_size:
        raise ValueError(
            f"losses.prediction={student.losses.prediction} compares predictions of the same tokens, but the "
            f"vocabularies have {config.vocab_size} and {teacher.vocab_size} entries; set it to 0"
        )
    if seq_len > _positions(config):
        raise ValueError(f"the corpus has rows of {seq_len} tokens, the student takes {_positions(config)}")


def _check_same(init: str, own: PreTrainedConfig, other: PreTrainedConfig, keys: Sequence[str]) -> None:
    differing = [
        f"{key} {getattr(own, key, None)} against {getattr(other, key, None)}"
        for key in keys
        if getattr(own, key, None) != getattr(other, key, None)
    ]
    if differing:
        raise ValueError(
            f"init={init!r} needs an encoder of the same shape, but: {', '.join(differing)}; "
            "change the student's sizes or set init=random"
        )
