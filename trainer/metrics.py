"""Metrics of a task: what its predictions are worth, by torchmetrics.

Letters: n rows, C classes, S sequence length.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torchmetrics.functional as metrics
import torchmetrics.functional.classification as classification
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torchmetrics.functional.text import squad

from sharding.glue import METRICS, positive
from sharding.manifest import TaskInfo
from sharding.squad import Window, answer_texts


def score(task: TaskInfo, logits: NDArray[np.float32], labels: NDArray[np.float32]) -> dict[str, float]:
    """The metrics of ``task.metrics``, in this order: the first is the task's score. All are at most 1.

    Args:
        logits: a model's outputs: classification [n, C], regression [n, 1], spans [n, S, 2] (for being the
            first and the last token of the answer).
        labels: [n, K] as the task's corpus holds them.

    ``accuracy``; ``f1`` of one class of two (``sharding.glue.positive``); ``matthews`` correlation
    coefficient; ``pearson`` and ``spearman`` correlation; ``exact``: share of rows whose first and last token
    are both right. What is not defined (correlation with a constant, F1 without positives) is 0.

    Raises: ValueError for a metric that the kind of task does not have, and arrays that do not fit.
    """
    _check(task, logits, labels)
    target = torch.from_numpy(np.ascontiguousarray(labels))
    outputs = torch.from_numpy(np.ascontiguousarray(logits)).float()
    if task.kind == "regression":
        return {name: _value(task, name, outputs[:, 0], target[:, 0]) for name in task.metrics}
    if task.kind == "spans":
        right = (outputs.argmax(dim=1) == target.long()).all(dim=1)
        return {"exact": float(right.double().mean())}
    predicted = outputs.argmax(dim=1)
    return {name: _value(task, name, predicted, target[:, 0].long()) for name in task.metrics}


def chance(task: TaskInfo, labels: NDArray[np.float32]) -> float:
    """The score of the best constant prediction for rows with these labels [n, K]: what any model must beat.

    For spans that of "not in this row", the best one in practice.
    """
    if task.kind == "regression":
        return 0.0
    if task.kind == "spans":
        return float((labels == 0).all(axis=1).mean())
    constants = np.eye(len(task.labels), dtype=np.float32)
    return max(
        next(iter(score(task, np.tile(logits, (len(labels), 1)), labels).values())) for logits in constants
    )


def doubt(task: TaskInfo, logits: NDArray[np.float32], labels: NDArray[np.float32]) -> str | None:
    """Return what speaks against these being the outputs of a model that was trained on the task, or None.

    That is a score no better than the best constant answer's, or classes whose names, dealt out anew, would
    make more answers right than they do: by three standard deviations of the difference of two equally good
    models that differ on as many rows.
    """
    (name, value), least = next(iter(score(task, logits, labels).items())), chance(task, labels)
    if order := _other_order(task, logits, labels):
        return f"{name} {value:.3f}, and far more answers were right if its classes were {', '.join(order)}"
    if value <= least:
        return f"{name} {value:.3f}, no more than the {least:.3f} of a constant answer"
    return None


def _other_order(
    task: TaskInfo, logits: NDArray[np.float32], labels: NDArray[np.float32]
) -> tuple[str, ...] | None:
    """The names of the outputs under which clearly more of them are right."""
    if task.kind != "classification":
        return None
    counts = np.zeros((len(task.labels),) * 2, np.int64)  # by answer and label
    np.add.at(counts, (logits.argmax(axis=1), labels[:, 0].astype(int)), 1)
    _, named = linear_sum_assignment(counts, maximize=True)
    moved = named != np.arange(len(named))
    now = int(np.diagonal(counts)[moved].sum())
    then = int(counts[moved, named[moved]].sum())
    if then - now <= 3 * (then + now) ** 0.5:
        return None
    return tuple(task.labels[index] for index in named)


def text_score(windows: Sequence[Window], logits: NDArray[np.float32]) -> dict[str, float]:
    """SQuAD's own measures, of text: ``exact`` and ``f1``, means over questions of the best match with any of
    the right answers, articles and punctuation left out. Both are at most 1.

    Args:
        windows: [n], ``sharding.squad.read_windows``.
        logits: [n, S, 2], for the rows of the same split in stored order.
    """
    found = [{"id": id, "prediction_text": text} for id, text in answer_texts(windows, logits).items()]
    answers = {window.id: window.answers for window in windows}
    right = [
        {"id": id, "answers": {"text": list(texts), "answer_start": [0] * len(texts)}}
        for id, texts in answers.items()
    ]
    values = squad(found, right)  # type: ignore[arg-type]
    return {"exact": float(values["exact_match"]) / 100, "f1": float(values["f1"]) / 100}


def _value(task: TaskInfo, name: str, predicted: Tensor, target: Tensor) -> float:
    """One metric of predictions [n] (classes, or values): NaN, where it is not defined, is 0."""
    constant = predicted.unique().numel() == 1 or target.unique().numel() == 1
    if constant and name in ("pearson", "spearman", "matthews"):
        return 0.0
    if name in ("pearson", "spearman"):
        correlation = metrics.pearson_corrcoef if name == "pearson" else metrics.spearman_corrcoef
        value = correlation(predicted.double(), target.double())
    elif name == "f1":
        of = positive(task)
        value = classification.binary_f1_score(predicted == of, (target == of).int())
    elif name == "matthews":
        value = classification.multiclass_matthews_corrcoef(predicted, target, len(task.labels))
    else:
        value = classification.multiclass_accuracy(predicted, target, len(task.labels), average="micro")
    return float(torch.nan_to_num(value))


def _check(task: TaskInfo, logits: NDArray[np.float32], labels: NDArray[np.float32]) -> None:
    unknown = [name for name in task.metrics if name not in METRICS[task.kind]]
    if unknown or ("f1" in task.metrics and len(task.labels) != 2):
        raise ValueError(
            f"metrics={list(task.metrics)}: task={task.name} ({task.kind}, {len(task.labels)} classes) is "
            f"judged by {', '.join(METRICS[task.kind])} (f1: of two classes)"
        )
    outputs = {"classification": (len(task.labels),), "regression": (1,), "spans": (logits.shape[-2], 2)}
    columns = 2 if task.kind == "spans" else 1
    if logits.shape != (len(labels), *outputs[task.kind]) or labels.shape != (len(labels), columns):
        raise ValueError(
            f"logits {logits.shape} and labels {labels.shape} do not fit task={task.name}: {task.kind} of "
            f"{len(task.labels)} classes"
        )
