"""Labels of a task's corpus: read by themselves, once, and looked up by ``Batch.row_B``."""

import numpy as np
from numpy.typing import NDArray

from sharding import blocks
from sharding.manifest import Corpus, CorpusError, TaskInfo


def task_of(corpus: Corpus) -> TaskInfo:
    """What the corpus's labels mean. Raises: CorpusError for a corpus without labels."""
    if corpus.manifest.task is None:
        raise CorpusError(
            f"corpus {corpus.store.location} has no labels: it is not a task's; build one with "
            "`python launcher/task.py stage=data`"
        )
    return corpus.manifest.task


def read_labels(corpus: Corpus, split: str) -> NDArray[np.float32]:
    """The labels of all rows of a split, in stored order: float32 [rows, K], K as ``TaskInfo.kind`` says.

    Raises: CorpusError for a corpus without labels, a missing split, or a block that is damaged.
    """
    task_of(corpus)
    return np.concatenate(
        [
            blocks.read_labels(corpus.store, shard, block)
            for shard in corpus.split(split).shards
            for block in shard.blocks
        ]
    )
