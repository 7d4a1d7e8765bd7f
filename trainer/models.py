"""Students: an encoder and the projections that it learns with.

Letters: B rows, S sequence, E hidden dim, M student layers, N teacher layers.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from configs.student_schema import Projection, StudentConfig
from sharding.manifest import TaskInfo
from sharding.stream import Batch
from trainer.capture import Captured, Head, Need, capture, compile_layers, enable_capture, layers_of
from trainer.checkpoint import WEIGHTS, is_student, verify, weight_shapes
from trainer.columns import Columns
from trainer.encoders import load_encoder, new_encoder
from trainer.layout import Layout, document_BS, layout
from trainer.shapes import encoder_config, task_settings, transfer
from trainer.transfer import Transfer, distil, student_need

TRIM_MULTIPLE = 16
"""Trimmed rows have a multiple of so many tokens: few shapes, and sizes that matrix units like."""


@dataclass(frozen=True)
class Inputs:
    """One micro batch on the device, as an encoder takes it."""

    ids_BS: Tensor  # int64
    layout: Layout  # what losses count
    attention_mask: (
        Tensor | None
    )  # bool, what encoders attend to: None (all), [B, S] tokens, [B, 1, S, S] pairs
    token_type_BS: Tensor  # int64, 1 from segment B on
    labels_BK: Tensor | None = None  # float32, of a task's rows
    logits: Tensor | None = None  # float32 [B, C] or [B, S, 2]: the teacher's, where they were kept

    @classmethod
    def of(
        cls,
        batch: Batch,
        rows: slice,
        device: torch.device,
        separator: int | None = None,
        columns: Columns | None = None,
        trim: bool = False,
    ) -> "Inputs":
        """Return ``rows`` of a batch on ``device``, with what ``columns`` hold of them.

        A ``separator`` id keeps a row's documents apart. With ``trim`` what is padding in every row is cut
        off: rows of a task are short, and nothing counts padding.
        """
        ids_BS, length_B = batch.ids_BS[rows], batch.length_B[rows]
        width = ids_BS.shape[1]
        if trim:
            longest = int(length_B.max())
            width = min(width, max(1, -(-longest // TRIM_MULTIPLE)) * TRIM_MULTIPLE)
            ids_BS = ids_BS[:, :width].contiguous()
        found = layout(ids_BS, length_B, separator).to(device)
        segment_B1 = batch.segment_B[rows, None].to(device, non_blocking=True)
        index_S = torch.arange(ids_BS.shape[1], device=device)
        token_type_BS = ((index_S >= segment_B1) & found.mask_BS).long()
        columns = columns or Columns()
        labels_BK, logits = columns.take_labels(batch, rows), columns.take_logits(batch, rows)
        if logits is not None:
            logits = (logits[:, :width] if logits.dim() == 3 else logits).to(device, non_blocking=True)
        return cls(
            ids_BS.to(device, non_blocking=True),
            found,
            attention_mask(found),
            token_type_BS,
            None if labels_BK is None else labels_BK.to(device, non_blocking=True),
            logits,
        )

    def distil(self, student: Captured, teacher: Captured, transfer: Transfer) -> dict[str, Tensor]:
        """Return the error sums of these rows: ``trainer.transfer.distil``."""
        return distil(student, teacher, self.layout, transfer, self.labels_BK)


def attention_mask(layout: Layout) -> Tensor | None:
    """Return what encoders attend to, bool.

    None where every token sees its whole row, [B, S] of valid tokens, or [B, 1, S, S] of pairs within a
    document. A softmax over nothing has no value, so a query without a valid key sees one all the same;
    what comes of it is masked in every loss.
    """
    if layout.documents is not None:
        number_BS = document_BS(layout)
        return (number_BS[:, :, None] == number_BS[:, None, :])[:, None]
    if layout.full:
        return None
    mask_BS = layout.mask_BS.clone()
    mask_BS[:, 0] = True
    return mask_BS


class Student(nn.Module):
    """An encoder and the projections that carry its hidden states to the teacher's width.

    The projections learn with the encoder and stay behind when it is exported.
    """

    def __init__(
        self,
        encoder: PreTrainedModel,
        teacher_hidden_size: int,
        projection: Projection,
        need: Need | None = None,
    ) -> None:
        """Args: ``need`` is what the losses look at; everything when None.

        Where no loss looks at hidden states there are no projections.
        """
        super().__init__()
        self.encoder = encoder
        self.need = need
        layers, hidden_size = encoder.config.num_hidden_layers, encoder.config.hidden_size
        self.projection_of_layer = {  # index of the projection for layers 0 (embeddings), 1, ..., M
            Projection.shared: [0] * (layers + 1),
            Projection.separate: [0] + [1] * layers,
            Projection.per_layer: list(range(layers + 1)),
        }[projection]
        self.projections = nn.ModuleList(
            nn.Linear(hidden_size, teacher_hidden_size, bias=False)
            for _ in range(max(self.projection_of_layer) + 1 if need is None or need.hidden else 0)
        )
        for weight in self.projections.parameters():
            nn.init.normal_(weight, std=encoder.config.initializer_range)

    def forward(self, ids_BS: Tensor, attention_mask: Tensor | None, token_type_BS: Tensor) -> dict[str, Any]:
        """Return the fields of the encoder's ``Captured``, hidden states projected to the teacher's width.

        A plain dict, because wrappers (DeepSpeed, DistributedDataParallel) hook the tensors that they find
        in tuples, lists and dicts; without these hooks DeepSpeed's bf16 optimizer adds gradients up twice.
        """
        captured = capture(self.encoder, ids_BS, attention_mask, token_type_BS, need=self.need)
        projected = [
            None if hidden_BSE is None else self.projections[index](hidden_BSE)
            for index, hidden_BSE in zip(self.projection_of_layer, captured.hidden, strict=True)
        ]
        return {**vars(captured), "hidden": projected}

    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Take over weights by parameter name; a tied weight bears the first of its names."""
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                parameter.copy_(weights[name])


def outline(
    student: StudentConfig, teacher_config: PreTrainedConfig, task: TaskInfo | None = None
) -> Student:
    """Return the student without weights, on the meta device: what there is, by name and shape.

    Raises:
        ValueError: ``init`` is not there, or the student cannot be made.
    """
    need = student_need(transfer(student, teacher_config, task))
    with torch.device("meta"):
        encoder = new_encoder(encoder_config(student, teacher_config, task), need.head)
        return Student(encoder, teacher_config.hidden_size, student.projection, need)


def check_starts(
    students: Sequence[StudentConfig], teacher_config: PreTrainedConfig, task: TaskInfo | None = None
) -> list[str]:
    """Return every reason why students cannot start from those in checkpoints that their ``init`` names.

    Every byte of these weights is read once.
    """
    problems = []
    for index, student in enumerate(students):
        if not is_student(student.init):
            continue
        folder, named = Path(student.init), f"students.{index} ({student.name}): init={student.init!r}"
        if damage := verify(folder.parent, [f"{folder.name}/{WEIGHTS}"]):
            problems.append(f"{named} is damaged: {'; '.join(damage)}. Use another checkpoint")
            continue
        found = weight_shapes(folder)
        asked = {
            name: tuple(own.shape) for name, own in outline(student, teacher_config, task).named_parameters()
        }
        differing = [
            f"{name} {found.get(name, 'missing')} instead of {asked.get(name, 'nothing')}"
            for name in sorted(found.keys() | asked.keys())
            if found.get(name) != asked.get(name)
        ]
        if differing:
            problems.append(
                f"{named} is not the same student: {', '.join(differing)}. Take over the sizes, projection "
                "and losses.prediction of the run that saved it, or start from its export"
            )
    return problems


def build_student(
    student: StudentConfig,
    teacher: Callable[[Head], PreTrainedModel],
    teacher_config: PreTrainedConfig,
    seed: int,
    task: TaskInfo | None = None,
) -> Student:
    """Return the student with its initial weights in float32 on CPU, ready to capture.

    The weights depend on ``seed`` and the student alone, not on the process or on other students.

    Args:
        student: its config, checked by ``check_students`` and ``check_starts``.
        teacher: gives the teacher on CPU in float32, with the head that is asked for; called when
            ``student.init`` is ``teacher``.
        teacher_config: the teacher's config.
        seed: of the random weights, those of a new task's head among them.
        task: the corpus's, if it has one.

    Raises:
        ValueError: ``init`` cannot be read, or a teacher layer does not fit its student layer.
    """
    learned = transfer(student, teacher_config, task)
    need = student_need(learned)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if student.init in ("random", "teacher") or is_student(student.init):
            encoder = new_encoder(encoder_config(student, teacher_config, task), need.head)
        else:
            encoder = load_encoder(
                student.init,
                need.head,
                new_head=need.head in (Head.sequence, Head.spans),
                dtype=torch.float32,
                **student.overrides,
                **task_settings(task if learned.task else None),
            )
            enable_capture(encoder)
        module = Student(encoder, teacher_config.hidden_size, student.projection, need)
    if is_student(student.init):
        module.load(load_file(Path(student.init, WEIGHTS)))
    if student.init == "teacher":
        if need.head is Head.masked_lm:
            copy_layers(encoder, teacher(need.head), learned.layer_map)
        else:  # a task's head is new
            base: Any = encoder.base_model
            copy_layers(base, teacher(Head.none), learned.layer_map)
        for weight in module.projections.parameters():
            nn.init.eye_(weight)
    if student.compile:
        compile_layers(layers_of(encoder))
    return module


def copy_layers(encoder: PreTrainedModel, teacher: PreTrainedModel, layer_map: Sequence[int]) -> None:
    """Copy the teacher's embeddings, outer norms and layers g(1..M) into an encoder of the same width."""
    own_layers, teacher_layers = layers_of(encoder), layers_of(teacher)
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
            if id(value) not in inside and not name.startswith("pooler."):  # which a teacher is without
                value.copy_(weights[name])


def parameters(module: nn.Module) -> int:
    """Return the number of parameters of a module."""
    return sum(parameter.numel() for parameter in module.parameters())
