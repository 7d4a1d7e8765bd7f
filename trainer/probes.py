"""Probes: what a student's hidden states tell of small tasks, while it is still being distilled.

A linear model (scikit-learn's logistic regression, or ridge regression of a value) learns a task from the
mean over valid tokens of the frozen encoder's last hidden states. Nothing of the run changes by it.

Letters: n rows, B rows of a micro batch, S sequence, E hidden dim, C classes, or 1 for a value.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from configs.schema import ProbeConfig, TeacherConfig
from sharding.blocks import Reader
from sharding.labels import read_labels, task_of
from sharding.manifest import Corpus, TaskInfo, open_corpus
from sharding.tokens import check_tokenizer
from trainer import metrics
from trainer.capture import Need
from trainer.encoders import load_teacher_config, load_tokenizer
from trainer.engine import Engine
from trainer.layout import layout
from trainer.models import Inputs, attention_mask
from trainer.teacher import load_teacher
from trainer.world import World, gather_over_ranks, on_main

MAX_HELDOUT_ROWS = 2048
Hidden = Callable[[Inputs], Tensor]
"""The last hidden states [B, S, E] of a micro batch."""


@dataclass(frozen=True)
class ProbeTask:
    """Rows of one small task, in memory: those to learn from, then those to judge by."""

    info: TaskInfo
    ids_nS: Tensor  # int64
    length_n: Tensor
    segment_n: Tensor
    labels_nK: NDArray[np.float32]
    train_rows: int


def open_probes(config: ProbeConfig, teacher: TeacherConfig) -> list[ProbeTask]:
    """Read the tasks' rows: at most ``config.rows`` to learn from, evenly spaced over the split.

    Raises:
        ValueError: no task's corpus, damaged, of spans, of another tokenizer than the teacher's, a task named
            twice, or rows of one class only.
    """
    found: dict[str, ProbeTask] = {}
    for location in config.tasks:
        corpus = open_corpus(location)
        check_tokenizer(corpus.manifest, load_tokenizer(teacher))
        info = task_of(corpus)
        if info.kind == "spans" or info.name in found:
            raise ValueError(
                f"probes.tasks: {location} is of task {info.name} ({info.kind}); name each task once, and "
                "tasks of classification or regression only"
            )
        train, heldout = _read(corpus, "train", config.rows), _read(corpus, "heldout", MAX_HELDOUT_ROWS)
        if info.kind == "classification" and len(np.unique(train[3])) < 2:
            raise ValueError(f"probes.rows={config.rows}: the rows taken of {location} are all of one class")
        tensors = [
            torch.from_numpy(np.concatenate(pair)) for pair in zip(train[:3], heldout[:3], strict=True)
        ]
        labels_nK = np.concatenate([train[3], heldout[3]])
        found[info.name] = ProbeTask(info, tensors[0], tensors[1], tensors[2], labels_nK, len(train[3]))
    return list(found.values())


def _read(
    corpus: Corpus, split: str, rows: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]:
    """At most so many rows, evenly spaced: ids, lengths, segment starts, labels."""
    starts = np.cumsum([0, *corpus.split(split).block_rows])
    total = int(starts[-1])
    chosen = np.linspace(0, total - 1, min(rows, total)).round().astype(np.int64)
    block = np.searchsorted(starts, chosen, side="right") - 1
    read = Reader(corpus, split, cache_blocks=2).rows(block, chosen - starts[block])
    ids, lengths, segments = (array.astype(np.int64) for array in read[:3])
    return ids, lengths, segments, read_labels(corpus, split)[chosen]


@contextmanager
def hidden_of_student(engine: Engine) -> Iterator[Hidden]:
    """A student in evaluation mode, called as held-out evaluation calls it (collective at ZeRO stage 3)."""
    kept: list[Tensor] = []

    def hidden(inputs: Inputs) -> Tensor:
        engine(inputs)
        return kept.pop()

    encoder = engine.module.encoder.base_model
    handle = encoder.register_forward_hook(lambda module, args, output: kept.append(output[0]))
    engine.train(False)
    try:
        yield hidden
    finally:
        engine.train(True)
        handle.remove()


def hidden_of_teacher(config: TeacherConfig, world: World) -> Hidden:
    """The whole teacher, loaded for this (collective): in training its last layer may not run to its end."""
    last = load_teacher_config(config).num_hidden_layers
    teacher = load_teacher(config, Need(hidden=frozenset({last})), world)

    def hidden(inputs: Inputs) -> Tensor:
        last_BSE = teacher(inputs).hidden[-1]
        assert last_BSE is not None
        return last_BSE

    return hidden


@torch.no_grad()
def probe_tasks(
    tasks: list[ProbeTask], hidden: Hidden, micro_batch_rows: int, world: World, beat: Callable[[], object]
) -> dict[str, float]:
    """Return an encoder's scores, ``<task>/<metric>``, equal on all ranks (collective).

    Before each forward pass and each fit comes ``beat``. No random number is drawn.
    """
    scores: dict[str, float] = {}
    for task in tasks:
        features_nE = _features(task, hidden, micro_batch_rows, world, beat)
        beat()
        found = on_main(world, partial(_fit, task, features_nE))
        scores |= {f"{task.info.name}/{metric}": value for metric, value in found.items()}
    return scores


def _features(
    task: ProbeTask, hidden: Hidden, micro_batch_rows: int, world: World, beat: Callable[[], object]
) -> NDArray[np.float32]:
    """Mean hidden states of all rows [n, E], on every rank (collective).

    Micro batches are dealt to the ranks in turn. All make the same number of calls, which ZeRO stage 3 needs:
    a rank without a batch repeats the first and leaves it out. All have the same width, for compiled layers.
    """
    batches = torch.arange(len(task.length_n)).split(micro_batch_rows)
    own: dict[int, NDArray[np.float32]] = {}
    for turn in range(-(-len(batches) // world.size)):
        beat()
        number = turn * world.size + world.rank
        rows = batches[number] if number < len(batches) else batches[0]
        inputs = _inputs(task, rows, world.device)
        mask_BS1 = inputs.layout.mask_BS[:, :, None]
        sums_BE = hidden(inputs).float().masked_fill(~mask_BS1, 0).sum(dim=1)
        if number < len(batches):
            own[number] = (sums_BE / mask_BS1.sum(dim=1)).cpu().numpy()
    together = {number: part for parts in gather_over_ranks(own) for number, part in parts.items()}
    return np.concatenate([together[number] for number in range(len(batches))])


def _inputs(task: ProbeTask, rows: Tensor, device: torch.device) -> Inputs:
    ids_BS, segment_B1 = task.ids_nS[rows], task.segment_n[rows, None]
    found = layout(ids_BS, task.length_n[rows])
    types_BS = ((torch.arange(ids_BS.shape[1]) >= segment_B1) & found.mask_BS).long()
    found = found.to(device)
    return Inputs(ids_BS.to(device), found, attention_mask(found), types_BS.to(device))


def _fit(task: ProbeTask, features_nE: NDArray[np.float32]) -> dict[str, float]:
    """Learn from the first rows, judge by the others."""
    x, y, count = features_nE.astype(np.float64), task.labels_nK[:, 0], task.train_rows
    if task.info.kind == "regression":
        ridge = make_pipeline(StandardScaler(), Ridge()).fit(x[:count], y[:count])
        logits_nC = ridge.predict(x[count:])[:, None]
    else:
        linear = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=1000))
        linear.fit(x[:count], y[:count])
        logits_nC = np.full(
            (len(y) - count, len(task.info.labels)), -np.inf
        )  # of classes that it has not seen
        logits_nC[:, linear.classes_.astype(int)] = linear.predict_log_proba(x[count:])
    return metrics.score(task.info, logits_nC.astype(np.float32), task.labels_nK[count:])
