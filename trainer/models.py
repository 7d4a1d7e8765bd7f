"""Teacher and students: ordinary ``transformers`` encoders, and what a student adds for training.

Letters: B rows, S sequence, E hidden dim, M student layers, N teacher layers.
"""

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_MAPPING
from transformers.utils import cached_file
from transformers.utils import logging as hf_logging

from configs.schema import Precision, Projection, StudentConfig, TeacherConfig
from sharding.files import sha256
from sharding.stream import Batch
from trainer.capture import capture, enable_capture
from trainer.layer_map import resolve
from trainer.losses import Transfer, relation_heads

DTYPES = {Precision.fp32: torch.float32, Precision.bf16: torch.bfloat16, Precision.fp16: torch.float16}


@dataclass(frozen=True)
class Inputs:
    """One micro batch on the device, as an encoder takes it."""

    ids_BS: Tensor  # int64
    mask_BS: Tensor  # bool, True where the token is valid
    token_type_BS: Tensor  # int64, 1 from segment B on

    @classmethod
    def of(cls, batch: Batch, rows: slice, device: torch.device) -> "Inputs":
        """Return ``rows`` of a batch on ``device``."""
        ids_BS = batch.ids_BS[rows].to(device, non_blocking=True)
        length_B1 = batch.length_B[rows, None].to(device, non_blocking=True)
        segment_B1 = batch.segment_B[rows, None].to(device, non_blocking=True)
        index_S = torch.arange(ids_BS.shape[1], device=device)
        mask_BS = index_S < length_B1
        return cls(ids_BS, mask_BS, ((index_S >= segment_B1) & mask_BS).long())


class Student(nn.Module):
    """An encoder and the projections that carry its hidden states to the teacher's width.

    The projections learn with the encoder and stay behind when it is exported.
    """

    def __init__(self, encoder: PreTrainedModel, teacher_hidden_size: int, projection: Projection) -> None:
        super().__init__()
        self.encoder = encoder
        layers, hidden_size = encoder.config.num_hidden_layers, encoder.config.hidden_size
        self.projection_of_layer = {  # index of the projection for layers 0 (embeddings), 1, ..., M
            Projection.shared: [0] * (layers + 1),
            Projection.separate: [0] + [1] * layers,
            Projection.per_layer: list(range(layers + 1)),
        }[projection]
        self.projections = nn.ModuleList(
            nn.Linear(hidden_size, teacher_hidden_size, bias=False)
            for _ in range(max(self.projection_of_layer) + 1)
        )
        for weight in self.projections.parameters():
            nn.init.normal_(weight, std=encoder.config.initializer_range)

    def forward(self, ids_BS: Tensor, mask_BS: Tensor, token_type_BS: Tensor) -> dict[str, list]:
        """Return the fields of the encoder's ``Captured``, hidden states projected to the teacher's width.

        A plain dict, because wrappers (DeepSpeed, DistributedDataParallel) hook the tensors that they find
        in tuples, lists and dicts; without these hooks DeepSpeed's bf16 optimizer adds gradients up twice.
        """
        captured = capture(self.encoder, ids_BS, mask_BS, token_type_BS)
        projected = [
            self.projections[index](hidden_BSE)
            for index, hidden_BSE in zip(self.projection_of_layer, captured.hidden, strict=True)
        ]
        return {**vars(captured), "hidden": projected}


def load_teacher_config(config: TeacherConfig) -> PreTrainedConfig:
    """Return the teacher's ``transformers`` config.

    Raises:
        ValueError: the folder or hub name cannot be read.
    """
    return _read_config("teacher.model", config.model, revision=config.revision)


def load_tokenizer(config: TeacherConfig) -> Any:
    """Return the teacher's fast tokenizer; the students use the same one.

    Raises:
        ValueError: it cannot be read.
    """
    try:
        return AutoTokenizer.from_pretrained(config.model, revision=config.revision)
    except (OSError, ValueError) as error:
        raise ValueError(f"teacher.model={config.model!r} has no tokenizer to read: {error}") from error


def load_teacher(config: TeacherConfig, device: torch.device) -> PreTrainedModel:
    """Return the teacher in its precision on ``device``: no pooler, evaluation mode, nothing to train.

    Raises:
        ValueError: the weights file is not the one that ``teacher.sha256`` names, or the encoder's
            attention cannot be captured.
    """
    if config.sha256 is not None:
        _check_sha256(config)
    teacher = load_encoder(config.model, revision=config.revision, dtype=DTYPES[config.precision])
    enable_capture(teacher)
    teacher.to(device)  # type: ignore[arg-type]  # its decorator hides nn.Module's signature
    return teacher.eval().requires_grad_(False)


def load_encoder(model: str, **settings: Any) -> PreTrainedModel:
    """Load an encoder without a pooler, quietly, unless weights are missing.

    Heads in the file that an encoder does not have are left unread; a weight that the file lacks would be
    random, and nothing should learn from that unknowingly.

    Args:
        model: folder or hub name.
        settings: of ``AutoModel.from_pretrained``, and of the encoder's config, where they replace its own.

    Raises:
        ValueError: the weights cannot be read, or some are missing.
    """
    config = _read_config("model", model, revision=settings.get("revision"))
    verbosity = hf_logging.get_verbosity()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        encoder, report = AutoModel.from_pretrained(
            model, **settings, **_no_pooler(config), output_loading_info=True
        )
    except (OSError, SafetensorError) as error:
        raise ValueError(f"the weights of {model} cannot be read: {error}") from error
    finally:
        hf_logging.set_verbosity(verbosity)
    if report["missing_keys"]:
        raise ValueError(
            f"{model} lacks {len(report['missing_keys'])} weights of a {config.model_type} encoder, such as "
            f"{sorted(report['missing_keys'])[0]}; they would be random. Use a complete pretrained encoder"
        )
    return encoder


def check_students(students: Sequence[StudentConfig], teacher: PreTrainedConfig, seq_len: int) -> list[str]:
    """Return every reason why these students cannot learn from this teacher on rows of ``seq_len``."""
    problems = []
    if seq_len > _positions(teacher):
        problems.append(f"the corpus has rows of {seq_len} tokens, the teacher takes {_positions(teacher)}")
    for index, student in enumerate(students):
        for check in (transfer, partial(_check_config, seq_len=seq_len)):
            try:
                check(student, teacher)
            except ValueError as error:
                problems.append(f"students.{index} ({student.name}): {error}")
    return problems


def transfer(student: StudentConfig, teacher: PreTrainedConfig) -> Transfer:
    """Return what the student learns from which teacher layer, resolved.

    Raises:
        ValueError: a layer map out of range, head counts that cannot be mapped.
    """
    layer_map = resolve(student.layer_map, student.layers, teacher.num_hidden_layers)
    losses = student.losses
    return Transfer(
        layer_map=layer_map,
        relation_heads=relation_heads(student.heads, teacher.num_attention_heads, losses.relation_heads),
        embedding=losses.embedding,
        hidden=losses.hidden,
        attention=losses.attention,
        layers=tuple(losses.layers or [1.0] * student.layers),
    )


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


def build_student(
    student: StudentConfig, teacher: PreTrainedModel, teacher_config: PreTrainedConfig, seed: int
) -> Student:
    """Return the student with its initial weights in float32 on CPU, ready to capture.

    The weights depend on ``seed`` and the student alone, not on the process or on other students.

    Args:
        student: its config, checked by ``check_students``.
        teacher: read when ``student.init`` is ``teacher``.
        teacher_config: the teacher's config.
        seed: of the random weights.

    Raises:
        ValueError: ``init`` cannot be read, or a teacher layer does not fit its student layer.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = student_hf_config(student, teacher_config)
        if student.init in ("random", "teacher"):
            encoder = AutoModel.from_config(config, dtype=torch.float32, **_no_pooler(config))
        else:
            encoder = load_encoder(student.init, dtype=torch.float32, **student.overrides)
        module = Student(encoder, teacher_config.hidden_size, student.projection)
    if student.init == "teacher":
        copy_layers(
            encoder, teacher, resolve(student.layer_map, student.layers, teacher_config.num_hidden_layers)
        )
        for weight in module.projections.parameters():
            nn.init.eye_(weight)
    enable_capture(encoder)
    return module


def copy_layers(encoder: PreTrainedModel, teacher: PreTrainedModel, layer_map: Sequence[int]) -> None:
    """Copy the teacher's embeddings, outer norms and layers g(1..M) into an encoder of the same width."""
    own_layers, teacher_layers = _layers(encoder), _layers(teacher)
    for number, (own, source) in enumerate(zip(own_layers, layer_map, strict=True), start=1):
        weights = teacher_layers[source - 1].state_dict()
        if differing := own.state_dict().keys() ^ weights.keys():
            # ModernBERT's first layer lacks a norm that the others have.
            raise ValueError(
                f"init=teacher: layer {number} cannot start from teacher layer {source}: only one of them "
                f"has {', '.join(sorted(differing))}; set another layer_map or init=random"
            )
        own.load_state_dict(weights)
    inside = {id(value) for value in own_layers.state_dict(keep_vars=True).values()}
    weights = teacher.state_dict()
    with torch.no_grad():
        for name, value in encoder.state_dict(keep_vars=True).items():
            if id(value) not in inside:
                value.copy_(weights[name])


def parameters(module: nn.Module) -> int:
    """Return the number of parameters of a module."""
    return sum(parameter.numel() for parameter in module.parameters())


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


def _no_pooler(config: PreTrainedConfig) -> dict[str, bool]:
    model_class: Any = MODEL_MAPPING[type(config)]
    has_pooler = "add_pooling_layer" in inspect.signature(model_class).parameters
    return {"add_pooling_layer": False} if has_pooler else {}


def _position_offset(config: PreTrainedConfig) -> int:
    """RoBERTa-like encoders number positions from ``pad_token_id + 1``, so that many have no place."""
    return config.pad_token_id + 1 if config.model_type in ("roberta", "xlm-roberta", "camembert") else 0


def _positions(config: PreTrainedConfig) -> int:
    """Return the most tokens that a row may have."""
    return config.max_position_embeddings - _position_offset(config)


def _read_config(key: str, model: str, **settings: Any) -> PreTrainedConfig:
    try:
        return AutoConfig.from_pretrained(model, **settings)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{key}={model!r} cannot be read as the folder or hub name of an encoder: {error}"
        ) from error


def _check_overrides(student: StudentConfig, default: PreTrainedConfig, shape: dict[str, Any]) -> None:
    unknown = [key for key in student.overrides if not hasattr(default, key)]
    if unknown:
        raise ValueError(f"overrides {unknown} are not settings of a {default.model_type} config")
    derived = [key for key in student.overrides if key in shape or key in _renamed(default, shape)]
    if derived:
        raise ValueError(f"overrides {derived} follow from layers, hidden_size, heads and intermediate_size")


def _check_config(student: StudentConfig, teacher: PreTrainedConfig, seq_len: int) -> None:
    """Raise ValueError when the student cannot be made, or cannot read the teacher's rows."""
    config = student_hf_config(student, teacher)
    keys = ["model_type", "hidden_size", "num_attention_heads", "vocab_size", _intermediate_key(config)]
    if student.init == "teacher":
        inner = ["embedding_size", "max_position_embeddings", "type_vocab_size"]
        _check_same(student.init, config, teacher, [*keys, *inner])
    elif student.init != "random":
        asked, config = config, _read_config("init", student.init, **student.overrides)
        _check_same(student.init, asked, config, [*keys, "num_hidden_layers"])
    if config.vocab_size < teacher.vocab_size:
        raise ValueError(f"vocab_size {config.vocab_size} is below the teacher's {teacher.vocab_size}")
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


def _layers(encoder: PreTrainedModel) -> nn.ModuleList:
    """Return the encoder's list of Transformer layers, whatever the architecture calls it."""
    depth = encoder.config.num_hidden_layers
    found: Iterator[nn.ModuleList] = (
        module for module in encoder.modules() if isinstance(module, nn.ModuleList) and len(module) == depth
    )
    return next(found)


def _check_sha256(config: TeacherConfig) -> None:
    path = Path(config.model, "model.safetensors")
    if not path.parent.is_dir():
        path = Path(str(cached_file(config.model, "model.safetensors", revision=config.revision)))
    if not path.is_file():
        raise ValueError(
            f"teacher.sha256 is set, but {path} does not exist; unset it or name another teacher"
        )
    digest = sha256(path)
    if digest != config.sha256:
        raise ValueError(
            f"teacher.sha256={config.sha256} does not match {path} ({digest}): the file is damaged or "
            "another model; fetch it again, or correct the checksum"
        )
