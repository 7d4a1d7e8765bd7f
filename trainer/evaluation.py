"""Held-out evaluation: the training losses, without dropout, on rows that training never sees."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from sharding.corpora import Corpora
from sharding.manifest import Corpus, TaskInfo
from sharding.stream import Batch, sequential
from trainer.capture import Captured
from trainer.columns import Columns
from trainer.layout import row_counts
from trainer.meter import CorpusMeter
from trainer.metrics import score
from trainer.models import Inputs
from trainer.transfer import Transfer
from trainer.world import World, gather_over_ranks

Encode = Callable[[Inputs], Captured]
"""Runs an encoder on a micro batch; for a student, hidden states come projected to the teacher's width."""


@torch.no_grad()
def evaluate(
    teacher: Encode,
    students: Sequence[tuple[Encode, Transfer]],
    teacher_hidden_size: int,
    corpora: Corpus | Corpora,
    rows: int,
    micro_batch_rows: int,
    world: World,
    mask_damaged: bool = False,
    separator: int | None = None,
    columns: Columns | None = None,
    trim: bool = False,
    beat: Callable[[], object] = lambda: None,
) -> list[dict[str, float]]:
    """Return each student's losses, ``total`` first, over the first held-out rows (collective).

    Of several corpora each gives rows by its weight, ``rows`` in all, and its own losses come under
    ``corpus/<name>/`` as well. Every row is read by one rank; sums and counts are added up over all ranks, so
    the result does not depend on their number. All ranks make the same number of forward calls, which ZeRO
    stage 3 needs; a rank whose rows are used up repeats one and leaves it out. Before each comes ``beat``.

    Students with a task's head are scored besides, under ``score/<metric>``, on the same rows of the task.

    Raises: CorpusError for a damaged block, unless its rows are to be masked.
    """
    corpora = Corpora.of(corpora)
    names = [part.name for part in corpora.parts]
    meters = [CorpusMeter(names, transfer, teacher_hidden_size) for _, transfer in students]
    scores = [TaskScore(corpora.task if transfer.task else None) for _, transfer in students]
    for number, (corpus, share) in enumerate(zip(corpora.corpora, corpora.shares, strict=True)):
        own_rows = min(max(1, round(rows * share)), corpus.split("heldout").rows)
        turns = equal_turns(
            corpus,
            "heldout",
            own_rows,
            micro_batch_rows,
            world,
            mask_damaged=mask_damaged,
            node_cache=corpora.node_cache,
        )
        for batch, counted in turns:
            beat()
            batch = replace(batch, corpus_B=torch.full_like(batch.length_B, number))
            inputs = Inputs.of(batch, slice(None), world.device, separator, columns, trim)
            counts_B3 = row_counts(batch.ids_BS, batch.length_B, separator)
            targets = teacher(inputs)
            for (encode, transfer), meter, scored in zip(students, meters, scores, strict=True):
                captured = encode(inputs)
                sums = inputs.distil(captured, targets, transfer)
                if counted:
                    meter.add(sums, batch.corpus_B.to(world.device), counts_B3.to(world.device))
                    scored.add(captured, inputs)
    return [meter.means(world.device) | scored.result() for meter, scored in zip(meters, scores, strict=True)]


class TaskScore:
    """A task's metrics over the rows of all ranks; nothing where there is no task."""

    def __init__(self, task: TaskInfo | None) -> None:
        self.task = task
        self.rows: list[tuple[NDArray[np.float32], NDArray[np.float32]]] = []  # logits and labels

    def add(self, captured: Captured, inputs: Inputs) -> None:
        """Add a micro batch."""
        if self.task is not None:
            assert captured.logits is not None and inputs.labels_BK is not None
            found = captured.logits.float()
            if found.dim() == 3:  # of spans: rows of different batches have different lengths
                found = found.masked_fill(~inputs.layout.mask_BS.unsqueeze(-1), -torch.inf)
            self.rows += zip(found.cpu().numpy(), inputs.labels_BK.cpu().numpy(), strict=True)

    def result(self) -> dict[str, float]:
        """Return the metrics by ``score/<metric>`` (collective)."""
        if self.task is None:
            return {}
        rows = [row for rows in gather_over_ranks(self.rows) for row in rows]
        longest = max(len(logits) for logits, _ in rows)
        logits = np.stack(
            [
                np.pad(
                    found, [(0, longest - len(found)), *[(0, 0)] * (found.ndim - 1)], constant_values=-np.inf
                )
                for found, _ in rows
            ]
        )
        labels = np.stack([label for _, label in rows])
        return {f"score/{name}": value for name, value in score(self.task, logits, labels).items()}


def equal_turns(
    corpus: Corpus, split: str, rows: int, micro_batch_rows: int, world: World, **settings: Any
) -> Iterator[tuple[Batch, bool]]:
    """Yield (batch, counted) equally often on all ranks; ``settings`` as of ``sequential``."""
    read = partial(sequential, corpus, split, **settings)
    turns = -(-rows // (micro_batch_rows * world.size))
    own = read(rows=rows, batch_rows=micro_batch_rows, rank=world.rank, world_size=world.size)
    filler = next(read(rows=1, batch_rows=1, rank=0, world_size=1))
    for _ in range(turns):
        batch = next(own, None)
        yield (filler, False) if batch is None else (batch, True)
