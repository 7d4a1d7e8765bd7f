"""The stage ``augment``: a task's corpus with more examples, made by ``trainer.replacement``.

A part of the training examples becomes a shard, whole or not at all, and is made from its own examples
alone: the bytes depend neither on the number of ranks nor on interruptions, and what is finished is not made
again.
"""

import contextlib
import errno
import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch.distributed as dist

from configs.corpus_schema import CorpusConfig
from configs.task_schema import TaskConfig, TaskKind
from sharding.examples import read_examples
from sharding.files import new_file, sha256
from sharding.glue import task_of
from sharding.manifest import Shard, open_corpus
from sharding.merge import finished_shard, mark_finished
from sharding.task_corpus import encode, split_of, write_part
from sharding.tokens import check_tokenizer, load_tokenizer
from sharding.workspace import Workspace, open_workspace
from trainer.replacement import Augmentor
from trainer.world import World, on_main, set_timeouts, share_cores

log = logging.getLogger("distil")

VERSION = 1
"""Of the algorithm: raised when the same settings give other examples."""
RECIPE_NAME = "augmentation.json"
"""In the corpus: all that decided its bytes."""
LONGEST_S = 7 * 86_400.0
"""That ranks wait for one that still works; no collective's own limit is meant for it."""
POLL_S = 0.2


def augment(config: TaskConfig, world: World, beat: Callable[[str], None] = lambda place: None) -> None:
    """Make the corpus OUTPUT/augmented of a task's corpus (collective): its training examples and their
    copies; the other splits are the task corpus's own shards, byte for byte.

    Interrupted, it goes on where it was; a corpus that is there and was made with the same settings stays.
    All ranks read and write the same folder.

    Args:
        config: of the task.
        world: the ranks, which share the parts.
        beat: called with the place wherever this rank moves, at least between two forward passes, and while
            it waits for the others, which may take longer than a collective may.

    Raises:
        ValueError: a task of spans, settings or files with which it cannot be done, or another corpus there.
        OSError: the disk is full or broken.
    """
    share_cores(world, None)
    stage = Stage(config, world)
    if on_main(world, stage.is_done):
        return
    with stage.opened(shared=True) as work:
        unfinished = on_main(world, lambda: stage.unfinished(work))
        for number in unfinished[world.rank :: world.size]:
            stage.make(work, number, beat)
    meet(world, beat)
    on_main(world, stage.join)


class Stage:
    """The parts of one task's augmented corpus."""

    def __init__(self, config: TaskConfig, world: World) -> None:
        task = task_of(config)
        if task.kind is TaskKind.spans:
            raise ValueError(
                f"task={config.task}: its answers are places in the text, which do not stay where they are "
                "when words are replaced, so it is not augmented; leave the stage out and set "
                "intermediate.augmented=false prediction.augmented=false"
            )
        if config.augmented is not None:
            raise ValueError(
                f"augmented={config.augmented} names a corpus that is there; the stage augment makes "
                "OUTPUT/augmented: leave the key out to make one, or leave the stage out"
            )
        self.config = config
        self.output = Path(config.output) / "augmented"
        self.corpus = open_corpus(config.corpus or Path(config.output) / "data")
        self.tokenizer = load_tokenizer(config.teacher.model, config.teacher.revision)
        self.examples = read_examples(config, "train")
        self._check_corpus()
        copies = config.augmentation.per_example or task.per_example
        self.augmentor = Augmentor(config.augmentation, copies, self.tokenizer, config.seq_len, world.device)
        self.recipe = self._recipe(copies)

    def _check_corpus(self) -> None:
        """Raise ValueError unless the task's corpus is made of these very examples."""
        manifest = self.corpus.manifest
        check_tokenizer(manifest, self.tokenizer)
        stored, found = self.corpus.split("train").documents, len(self.examples)
        for what, then, now in (
            ("seq_len", manifest.seq_len, self.config.seq_len),
            ("training examples", stored, found),
            ("task", manifest.task, task_of(self.config).info),
        ):
            if then != now:
                raise ValueError(
                    f"{self.corpus.store.location} was made with another {what} ({then}) than is asked for "
                    f"now ({now}); run stage=data again, or change it back"
                )

    def _recipe(self, copies: int) -> dict[str, Any]:
        """All that decides the bytes, under the names that a person knows it by."""
        settings = self.config.augmentation
        masked, vectors = self.augmentor.masked, settings.vectors
        return {
            "version": VERSION,
            "corpus": self.corpus.fingerprint,
            **{
                f"augmentation.{key}": getattr(value, "value", value)
                for key, value in asdict(settings).items()
            },
            # What they hold, not where they are.
            "augmentation.masked_lm": masked and masked.sha256(),
            "augmentation.vectors": vectors and sha256(Path(vectors)),
            "augmentation.per_example": copies,
        }

    def is_done(self) -> bool:
        """Say whether the corpus is there already.

        Raises:
            ValueError: it was made with other settings, or something else bears its name.
        """
        if not self.output.exists():
            return False
        try:
            stored = json.loads((self.output / RECIPE_NAME).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{self.output} exists and was not made by the stage augment; remove it, or choose another "
                "output"
            ) from error
        if stored == self.recipe:
            log.info("%s is there already", self.output)
            return True
        keys = {key: None for key in (*stored, *self.recipe) if stored.get(key) != self.recipe.get(key)}
        changes = "; ".join(f"{key}: {stored.get(key)} then, {self.recipe.get(key)} now" for key in keys)
        raise ValueError(
            f"{self.output} was made with other settings ({changes}); remove it to make it anew, or change "
            "them back"
        )

    @contextlib.contextmanager
    def opened(self, *, shared: bool) -> Iterator[Workspace]:
        """The folder in which the corpus grows, new or as an interrupted run left it.

        Raises:
            ValueError: it was begun with other settings, is in use, or the disk is full.
        """
        with open_workspace(CorpusConfig(output=str(self.output)), self.recipe, shared=shared) as work:
            try:
                yield work
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise
                raise work.disk_full(None) from error

    def unfinished(self, work: Workspace) -> list[int]:
        """Numbers of the parts that are to be made."""
        left = [number for number, shard in enumerate(self._shards(work)) if shard is None]
        log.info("augmentation: %d of %d parts to be made", len(left), len(self._shards(work)))
        return left

    def make(self, work: Workspace, number: int, beat: Callable[[str], None]) -> None:
        """Make one part: its examples and their copies, as one shard."""
        started_s, size = time.monotonic(), self.config.augmentation.part_examples
        examples = self.examples[number * size :][:size]
        made = self.augmentor.augmented(examples, beat)
        rows, labels = encode(made, self.tokenizer, self.config.seq_len)
        marker = work.marker(_path(number))
        marker.parent.mkdir(parents=True, exist_ok=True)
        mark_finished(marker, len(made), write_part(work.corpus, _path(number), rows, labels))
        taken_s = time.monotonic() - started_s
        log.info("part %d: %d examples made of %d in %.1f s", number, len(made), len(examples), taken_s)

    def join(self) -> None:
        """Give the corpus its manifest and its name, after all parts."""
        with self.opened(shared=False) as work:
            shards = [shard for shard in self._shards(work) if shard is not None]
            assert len(shards) == len(self._shards(work)), "a part is missing"
            splits = dict(self.corpus.manifest.splits)
            splits["train"] = split_of(shards, sum(sum(shard.rows) for shard in shards))
            self._copy_others(work.corpus)
            with new_file(work.corpus / RECIPE_NAME) as file:
                file.write((json.dumps(self.recipe, indent=1) + "\n").encode())
            work.install(replace(self.corpus.manifest, splits=splits))
        log.info("%s: %d examples of %d", self.output, splits["train"].documents, len(self.examples))

    def _shards(self, work: Workspace) -> list[Shard | None]:
        """The shard of every part; None while it is not there whole."""
        parts = range(-(-len(self.examples) // self.config.augmentation.part_examples))
        found = (finished_shard(work.marker(_path(n)), work.corpus, _path(n)) for n in parts)
        return [None if each is None else each[1] for each in found]

    def _copy_others(self, folder: Path) -> None:
        for name, split in self.corpus.manifest.splits.items():
            if name == "train":
                continue
            (folder / name).mkdir(exist_ok=True)
            for shard in split.shards:
                content = self.corpus.store.read(shard.path)
                if hashlib.sha256(content).hexdigest() != shard.sha256:
                    raise ValueError(
                        f"shard {self.corpus.store.location}/{shard.path} is damaged; run stage=data again"
                    )
                with new_file(folder / shard.path) as file:
                    file.write(content)


def meet(world: World, beat: Callable[[str], None]) -> None:
    """Wait until all ranks are here (collective), however long one of them still works.

    Its watchdog sees to a rank that hangs; one that ends ends the wait, as it does any collective.
    """
    if world.size == 1:
        return
    set_timeouts(LONGEST_S)
    barrier = dist.barrier(async_op=True)
    while not barrier.is_completed():
        beat("augmentation: waiting for other ranks")
        time.sleep(POLL_S)
    barrier.wait()


def _path(number: int) -> str:
    return f"train/{number:05d}.tar"
