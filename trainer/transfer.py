"""Transfer: what one student learns from the teacher, and the total loss that follows.

A *term* is one summand of the loss, under one key:

    embedding                       MSE of the embedding outputs
    hidden/m, cosine/m              MSE and cosine distance of hidden states, student layer m from g(m)
    attention/m                     MSE of attention scores before the softmax, student layer m from g(m)
    relation/qq, .../kk, .../vv     MiniLMv2's self-attention relations, of one layer
    prediction                      divergence of the masked-language-model predictions
    logits, labels                  error of the task's logits, against the teacher's and against labels

Every term is a sum over valid elements, divided by a global count (``denominators``). ``trainer.losses`` and
the modules named ``..._loss`` have the maths. Letters: B rows, M student layers, E hidden dim, R heads that
are compared, S sequence, D head dim.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from trainer.attention_loss import attention_error_sum, group_heads, grouped_scaling
from trainer.capture import Captured, Head, Need, Prediction
from trainer.layout import Counts, Layout
from trainer.losses import cosine_distance_sum, squared_error_sum
from trainer.prediction_loss import prediction_divergence_sum
from trainer.relation_loss import relation_divergence_sum, relation_heads
from trainer.task_loss import SPANS, labels_error, logits_error

Kept = TypeVar("Kept", Tensor, Prediction)


@dataclass(frozen=True)
class Relation:
    """MiniLMv2 (Wang et al., arXiv:2012.15828): one student layer learns one teacher layer's relations."""

    weight: float
    heads: int
    """Relation heads: queries, keys and values of all heads together are split anew into so many."""
    student_layer: int
    """1-based."""
    teacher_layer: int
    """1-based."""


@dataclass(frozen=True)
class Transfer:
    """What one student learns from the teacher. Terms and layers of weight 0 are never computed."""

    layer_map: tuple[int, ...]
    """g(1..M), 1-based teacher layers."""
    attention_heads: int
    """R, the number of heads on which attention scores are compared."""
    embedding: float
    """Weight of L_embd."""
    hidden: float
    """Weight of L_hidn."""
    attention: float
    """Weight of L_attn."""
    layers: tuple[float, ...]
    """lambda_1..lambda_M, of ``hidden``, ``cosine`` and ``attention``."""
    cosine: float = 0.0
    """Weight of the cosine distance of hidden states."""
    relation: Relation | None = None
    """None: relations are not compared."""
    prediction: float = 0.0
    """Weight of the prediction divergence."""
    temperature: float = 1.0
    """Of the prediction divergence and of the task's logits."""
    logits: float = 0.0
    """Weight of the error of the task's logits against the teacher's."""
    labels: float = 0.0
    """Weight of their error against labels."""
    task: str | None = None
    """What the task's head says: ``classification``, ``regression`` or ``spans``."""

    @property
    def head(self) -> Head:
        """What the student has on top."""
        return head_of(self.prediction, self.logits, self.labels, self.task)


def head_of(prediction: float, logits: float, labels: float, task: str | None) -> Head:
    """Return the head that losses of these weights need."""
    if prediction:
        return Head.masked_lm
    if not logits and not labels:
        return Head.none
    return Head.spans if task == SPANS else Head.sequence


def weights(transfer: Transfer) -> dict[str, float]:
    """Weight of every term in the total, by key. No zeros."""
    every = {"embedding": transfer.embedding}
    for m, lambda_m in enumerate(transfer.layers, start=1):
        every[f"hidden/{m}"] = transfer.hidden * lambda_m
        every[f"cosine/{m}"] = transfer.cosine * lambda_m
        every[f"attention/{m}"] = transfer.attention * lambda_m
    if transfer.relation is not None:
        every |= {f"relation/{kind}": transfer.relation.weight for kind in ("qq", "kk", "vv")}
    every |= {"prediction": transfer.prediction, "logits": transfer.logits, "labels": transfer.labels}
    return {key: weight for key, weight in every.items() if weight}


def student_need(transfer: Transfer) -> Need:
    """What of the student's own forward pass the losses look at."""
    return _need(transfer, tuple(range(1, len(transfer.layer_map) + 1)), of_student=True)


def teacher_need(transfers: Iterable[Transfer]) -> Need:
    """What of the teacher's forward pass some student learns from."""
    found = Need()
    for transfer in transfers:
        found |= _need(transfer, transfer.layer_map, of_student=False)
    return found


def _need(transfer: Transfer, layers: tuple[int, ...], of_student: bool) -> Need:
    wanted = weights(transfer)
    pairs = list(enumerate(layers, start=1))
    hidden = {g for m, g in pairs if f"hidden/{m}" in wanted or f"cosine/{m}" in wanted}
    scores = {g for m, g in pairs if f"attention/{m}" in wanted}
    values: set[int] = set()
    if "embedding" in wanted:
        hidden.add(0)
    if (relation := transfer.relation) is not None:
        values.add(relation.student_layer if of_student else relation.teacher_layer)
    return Need(
        hidden=frozenset(hidden),
        scores=frozenset(scores | values),
        values=frozenset(values),
        head=transfer.head if of_student or {"prediction", "logits"} & wanted.keys() else Head.none,
    )


def distil(
    student: Captured,
    teacher: Captured,
    layout: Layout,
    transfer: Transfer,
    labels_BK: Tensor | None = None,
) -> dict[str, Tensor]:
    """The error sums of one batch's rows, [B] for each key of ``weights(transfer)``.

    The student's hidden states are already projected to the teacher's width. ``labels_BK``: of a task's rows.
    """
    wanted = weights(transfer)
    sums: dict[str, Tensor] = {}
    for m, g in enumerate((0, *transfer.layer_map)):
        if (key := f"hidden/{m}" if m else "embedding") in wanted:
            sums[key] = squared_error_sum(_kept(student.hidden[m]), _kept(teacher.hidden[g]), layout.mask)
        if (key := f"cosine/{m}") in wanted:
            sums[key] = cosine_distance_sum(_kept(student.hidden[m]), _kept(teacher.hidden[g]), layout.mask)
        if (key := f"attention/{m}") in wanted:
            sums[key] = _attention(student, m, teacher, g, layout, transfer.attention_heads)
    if (relation := transfer.relation) is not None:
        sums |= _relations(student, teacher, layout, relation)
    if "prediction" in wanted:
        own, target = _kept(student.prediction), _kept(teacher.prediction)
        sums["prediction"] = prediction_divergence_sum(own, target, transfer.temperature, layout.mask)
    if "logits" in wanted:
        own_logits, target_logits, kind = _kept(student.logits), _kept(teacher.logits), transfer.task or ""
        sums["logits"] = logits_error(own_logits, target_logits, kind, transfer.temperature, layout.mask)
    if "labels" in wanted:
        sums["labels"] = labels_error(
            _kept(student.logits), _kept(labels_BK), transfer.task or "", layout.mask
        )
    return sums


def _attention(student: Captured, m: int, teacher: Captured, g: int, layout: Layout, heads: int) -> Tensor:
    q_S, k_S, scaling_S = _grouped(student, m, heads)
    q_T, k_T, scaling_T = _grouped(teacher, g, heads)
    error_sum = partial(attention_error_sum, scaling_S=scaling_S, scaling_T=scaling_T)
    return _within_documents(error_sum, layout, q_S, k_S, q_T, k_T)


def _relations(student: Captured, teacher: Captured, layout: Layout, relation: Relation) -> dict[str, Tensor]:
    found = {}
    for kind in ("queries", "keys", "values"):
        x_S = _kept(getattr(student, kind)[relation.student_layer - 1])
        x_T = _kept(getattr(teacher, kind)[relation.teacher_layer - 1])
        split = (relation_heads(x, relation.heads) for x in (x_S, x_T))
        found[f"relation/{kind[0] * 2}"] = _within_documents(relation_divergence_sum, layout, *split)
    return found


def _within_documents(loss: Callable[..., Tensor], layout: Layout, *tensors_BRSD: Tensor) -> Tensor:
    """A loss over pairs of tokens, of rows or, where they are kept apart, of their documents: [B]."""
    if layout.documents is None:
        return loss(*tensors_BRSD, mask_BS=layout.mask)
    by_row = [
        some.by_row(loss(*(some.take(x) for x in tensors_BRSD), mask_BS=some.mask), len(layout.mask_BS))
        for some in layout.documents
    ]
    return torch.stack(by_row).sum(dim=0)


def _grouped(captured: Captured, layer: int, heads: int) -> tuple[Tensor, Tensor, float]:
    """Grouped queries and keys of a 1-based layer, and the scaling of their scores."""
    query, key = _kept(captured.queries[layer - 1]), _kept(captured.keys[layer - 1])
    scaling = grouped_scaling(captured.scalings[layer - 1], query.shape[1], heads)
    return group_heads(query, heads), group_heads(key, heads), scaling


def _kept(x: Kept | None) -> Kept:
    assert x is not None, "the capture left out a layer that the loss needs"
    return x


def denominators(transfer: Transfer, counts: Counts, teacher_hidden_size: int) -> dict[str, float]:
    """Element count of every term from GLOBAL counts.

    Hidden states: tokens * E. Attention: R * pairs. Relations: their heads * tokens (a divergence per head
    and query). Cosine and prediction: tokens. Logits and labels: rows.
    """
    tokens, pairs, rows = counts
    count = {
        "embedding": tokens * teacher_hidden_size,
        "hidden": tokens * teacher_hidden_size,
        "cosine": tokens,
        "attention": transfer.attention_heads * pairs,
        "relation": tokens * (transfer.relation.heads if transfer.relation is not None else 0),
        "prediction": tokens,
        "logits": rows,
        "labels": rows,
    }
    return {key: count[key.split("/")[0]] for key in weights(transfer)}


def total(
    sums: Mapping[str, Tensor], denominators: Mapping[str, float], weights: Mapping[str, float]
) -> Tensor:
    """L_model = sum over terms and rows of weight * sum / denominator. Scalar, differentiable."""
    return torch.stack([weights[key] / denominators[key] * value_B for key, value_B in sums.items()]).sum()
