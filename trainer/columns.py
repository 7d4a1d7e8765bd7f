"""Columns: what belongs to a split's rows beside their tokens: labels, the teacher's logits."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sharding.corpora import Corpora
from sharding.labels import read_labels
from sharding.stream import Batch


@dataclass(frozen=True)
class Columns:
    """One split's columns, an array for each corpus of the run, or None where the run does not need them."""

    labels: Sequence[NDArray[np.float32]] | None = None
    """[rows, K]: a class's index or a number (K = 1), an answer's first and last token (K = 2)."""
    logits: Sequence[NDArray[np.float32]] | None = None
    """[rows, C], or [rows, S, 2] for spans: the fine-tuned teacher's."""

    @classmethod
    def read(cls, corpora: Corpora, split: str) -> "Columns":
        """The labels of a split of a task's corpora; no columns for corpora without a task.

        Raises:
            CorpusError: a shard is damaged.
        """
        if any(corpus.manifest.task is None for corpus in corpora.corpora):
            return cls()
        return cls([read_labels(corpus, split) for corpus in corpora.corpora])

    def take_labels(self, batch: Batch, rows: slice) -> Tensor | None:
        """float32 [B, K]; None without labels."""
        return _take(self.labels, batch, rows)

    def take_logits(self, batch: Batch, rows: slice) -> Tensor | None:
        """float32 [B, C] or [B, S, 2]; None without logits."""
        return _take(self.logits, batch, rows)


def _take(column: Sequence[NDArray[np.float32]] | None, batch: Batch, rows: slice) -> Tensor | None:
    if column is None:
        return None
    places = zip(batch.corpus_B[rows].tolist(), batch.row_B[rows].tolist(), strict=True)
    return torch.from_numpy(np.stack([column[corpus][row] for corpus, row in places]))
