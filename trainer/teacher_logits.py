"""The fine-tuned teacher's logits: computed once for every row of a task's corpora, and kept.

The prediction stage goes over the same rows again and again, for every epoch, seed and student, and learns
nothing of the teacher but these. They are plain arrays beside each other in a folder, named after the
corpus's fingerprint, the teacher's weights and its number format: another corpus or teacher never finds them.

Letters: S sequence, C outputs.
"""

import logging
import uuid
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import pad

from configs.schema import TeacherConfig
from sharding.corpora import Corpora
from sharding.files import new_file
from sharding.manifest import Corpus, TaskInfo
from trainer import encoders
from trainer.capture import Captured, Head, Need
from trainer.evaluation import Encode, equal_turns
from trainer.metrics import doubt, score
from trainer.models import Inputs
from trainer.teacher import load_teacher
from trainer.world import World, barrier, on_main

log = logging.getLogger("distil")


class TeacherLogits:
    """The logits of one teacher, kept in ``teacher.logits_folder``."""

    def __init__(self, config: TeacherConfig, head: Head, rows: int, world: World) -> None:
        """Args: ``head`` is the teacher's; ``rows`` are its micro batches, per rank."""
        assert config.logits_folder is not None
        self.config, self.head, self.rows, self.world = config, head, rows, world
        self.folder = Path(config.logits_folder)
        self._weights = on_main(world, lambda: encoders.weights_sha256(config))
        self._teacher: Encode | None = None  # loaded where logits are missing

    def of(self, corpora: Corpora, split: str) -> list[NDArray[np.float32]]:
        """The logits of all rows of a split, of each corpus: [rows, C], or [rows, S, 2] with -inf at padding
        (collective).

        Raises:
            ValueError: the teacher's weights cannot be read, or have no head.
            CorpusError: a shard is damaged.
        """
        return [self._of_corpus(corpus, split) for corpus in corpora.corpora]

    def _of_corpus(self, corpus: Corpus, split: str) -> NDArray[np.float32]:
        number_format = f"{self.config.precision.value}-{self.config.quantization.value}"
        name = f"{corpus.fingerprint[:16]}-{split}-{self._weights[:16]}-{number_format}.npy"
        path = self.folder / name
        if not on_main(self.world, path.is_file):
            self._compute(corpus, split, path)
        return np.load(path, mmap_mode="r", allow_pickle=False)

    def _compute(self, corpus: Corpus, split: str, path: Path) -> None:
        """Write the logits (collective): every rank those of its rows, then rank 0 all of them."""
        total, size = corpus.split(split).rows, self.world.size
        log.info("the teacher's logits of %d rows (%s) are computed once, into %s", total, split, path)
        if self._teacher is None:
            self._teacher = load_teacher(self.config, Need(head=self.head), self.world)
        rows: list[NDArray[np.int64]] = []
        found: list[NDArray[np.float32]] = []
        for batch, counted in equal_turns(corpus, split, total, self.rows, self.world):
            inputs = Inputs.of(batch, slice(None), self.world.device, trim=True)
            logits = self._teacher(inputs).logits
            if counted:
                assert logits is not None
                own = logits.float()
                if own.dim() == 3:  # an answer lies within its row, and rows come trimmed
                    own = own.masked_fill(~inputs.layout.mask_BS.unsqueeze(-1), -torch.inf)
                    own = pad(own, (0, 0, 0, corpus.manifest.seq_len - own.shape[1]), value=-torch.inf)
                rows.append(batch.row_B.numpy())
                found.append(own.cpu().numpy())
        self.folder.mkdir(parents=True, exist_ok=True)
        job = on_main(self.world, lambda: uuid.uuid4().hex)  # another may be computing the same
        parts = [path.with_suffix(f".{job}-{rank}-of-{size}.npz") for rank in range(size)]
        with new_file(parts[self.world.rank]) as file:
            np.savez(
                file,
                rows=np.concatenate([np.empty(0, np.int64), *rows]),
                logits=np.concatenate(found) if found else np.empty((0, 0), np.float32),
            )
        barrier(self.world)
        on_main(self.world, lambda: _join(parts, total, path))


def kept(inputs: Inputs) -> Captured:
    """The teacher, where all that is learned of it comes with the rows."""
    return Captured([], [], [], [], [], logits=inputs.logits)


def no_teacher(inputs: Inputs) -> Captured:
    """The teacher where nothing is learned of one: students learn from labels alone."""
    return Captured([], [], [], [], [])


def check_score(
    task: TaskInfo, logits: Sequence[NDArray[np.float32]], labels: Sequence[NDArray[np.float32]], model: str
) -> dict[str, float]:
    """Return the teacher's own metrics on held-out rows.

    Raises:
        ValueError: ``trainer.metrics.doubt``.
    """
    outputs, right = np.concatenate(logits), np.concatenate(labels)
    if (doubtful := doubt(task, outputs, right)) is not None:
        classes = f" (the corpus has them as {', '.join(task.labels)})" if task.labels else ""
        raise ValueError(
            f"teacher.model={model} has, on held-out rows of {task.name}, {doubtful}: it was fine-tuned on "
            f"another task or on other data, or has its classes in another order{classes}. Name a teacher of "
            "this task, fine-tune one with launcher/task.py stage=teacher, or build the corpus again with "
            "labels=[...] in its order"
        )
    return score(task, outputs, right)


def _join(parts: Sequence[Path], total: int, path: Path) -> None:
    whole: NDArray[np.float32] | None = None
    for part in parts:
        with np.load(part, allow_pickle=False) as own:
            logits = own["logits"]
            if len(logits):  # a rank may have had no rows
                whole = np.empty((total, *logits.shape[1:]), np.float32) if whole is None else whole
                whole[own["rows"]] = logits
    assert whole is not None, "a split has rows"
    with new_file(path) as file:
        np.save(file, whole, allow_pickle=False)
    for part in parts:
        part.unlink()
