"""The folder in which a build works, ``<output>.partial``, with which one that was interrupted goes on.

recipe.json          all that decides the bytes: the folder is of use to no other build
runs/                first phase: the documents of each part of the source, tokenised and sorted
plan.npz             which documents go to which shard
shards/<split>/      second phase: a file for each shard that is complete
corpus/<split>/      the shards
lock                 held alone by a whole build and by its last step, together by the tasks of an array
"""

import contextlib
import errno
import fcntl
import json
import logging
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.corpus_schema import CorpusConfig
from sharding.files import UNFINISHED, install_folder, new_file, sync
from sharding.manifest import MANIFEST_NAME, CorpusError, Manifest

log = logging.getLogger(__name__)

NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)
"""What file systems say that have no locks, such as Lustre mounted without them."""


@dataclass(frozen=True)
class Workspace:
    """Paths of one build."""

    output: Path
    partial: Path

    @property
    def runs(self) -> Path:
        return self.partial / "runs"

    @property
    def plan(self) -> Path:
        return self.partial / "plan.npz"

    @property
    def corpus(self) -> Path:
        return self.partial / "corpus"

    def marker(self, shard_path: str) -> Path:
        """The file that says that a shard is complete."""
        return self.partial / "shards" / Path(shard_path).with_suffix(".json")

    def install(self, manifest: Manifest) -> None:
        """Complete the corpus, give it its name, and remove everything else."""
        with new_file(self.corpus / MANIFEST_NAME) as file:
            file.write(manifest.to_json().encode())
        self.remove_unfinished()
        for folder in self.corpus.rglob("*/"):
            sync(folder)
        install_folder(self.corpus, self.output)
        # Under another name at once: a folder that is half removed must not pass for an interrupted build.
        finished = self.partial.with_name(f".{self.partial.name}.finished")
        shutil.rmtree(finished, ignore_errors=True)
        self.partial.rename(finished)
        shutil.rmtree(finished, ignore_errors=True)

    def remove_unfinished(self) -> None:
        """Remove what killed processes left; nobody else may be at work."""
        for left in self.partial.rglob(UNFINISHED):
            left.unlink(missing_ok=True)

    def disk_full(self, share: float | None) -> CorpusError:
        """The error for a disk that is full; ``share`` of the source's bytes that was read, if known."""
        written = 0
        for file in self.partial.rglob("*"):
            with contextlib.suppress(FileNotFoundError):  # another task may have renamed it
                written += file.stat().st_size if file.is_file() else 0
        needed = f"more than {written:,} bytes are needed"
        if share:
            needed = f"about {int(2.2 * written / share):,} bytes are needed in all"  # runs, then shards
        return CorpusError(
            f"no space left for {self.output}: {written:,} bytes were written to {self.partial}, "
            f"{shutil.disk_usage(self.partial).free:,} are free, {needed}; free that much and start the same "
            "command again, or set output to another disk"
        )


@contextlib.contextmanager
def open_workspace(config: CorpusConfig, recipe: dict[str, Any], *, shared: bool) -> Iterator[Workspace]:
    """The folder of this build, new or as an interrupted build left it. ``shared``: with other tasks.

    Raises: CorpusError when the output is taken, the folder belongs to another recipe, or is in use.
    """
    output = Path(config.output)
    _require_free(output, config.overwrite)
    work = Workspace(output, output.with_name(f"{output.name}.partial"))
    try:
        work.partial.mkdir(parents=True, exist_ok=True)
        lock = _lock(work.partial / "lock", shared)
    except OSError as error:
        raise CorpusError(f"output={output} cannot be written: {work.partial}: {error.strerror}") from error
    try:
        _require_recipe(work, recipe)
        if not shared:
            work.remove_unfinished()
        for folder in (work.runs, work.corpus):
            folder.mkdir(exist_ok=True)
        try:
            yield work
        except BaseException:
            if any(work.runs.glob("*.npz")):
                log.warning("what is finished stays in %s; the same command goes on with it", work.partial)
            raise
    finally:
        os.close(lock)


def _require_free(output: Path, overwrite: bool) -> None:
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    if not (output / MANIFEST_NAME).is_file():
        raise CorpusError(
            f"output={output} exists and is no corpus; it is never replaced: choose another name"
        )
    if not overwrite:
        raise CorpusError(f"output={output} already holds a corpus; set overwrite=true to replace it")


def _lock(path: Path, shared: bool) -> int:
    """An open file that is locked. A lock goes with its process, however that ends."""
    # Network file systems want a file that is open for writing.
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise CorpusError(
            f"another build is writing {path.parent}; wait for it or choose another output"
        ) from None
    except OSError as error:
        if error.errno not in NO_LOCKS:
            os.close(descriptor)
            raise
        log.warning("%s: this file system has no locks; start no second build of the same output", path)
    return descriptor


def _require_recipe(work: Workspace, recipe: dict[str, Any]) -> None:
    path = work.partial / "recipe.json"
    # Asked in this order: a task that starts at the same time writes the recipe first.
    begun = work.runs.exists() or work.corpus.exists()
    if not path.exists():
        if begun:
            raise CorpusError(f"{work.partial} was not left by a build; remove it or choose another output")
        with new_file(path) as file:
            file.write(json.dumps(recipe, indent=1).encode())
        return
    stored = json.loads(path.read_text())
    recipe = json.loads(json.dumps(recipe))
    if differing := [key for key in {**stored, **recipe} if stored.get(key) != recipe.get(key)]:
        changes = "; ".join(f"{key}: {stored.get(key)!r} then, {recipe.get(key)!r} now" for key in differing)
        raise CorpusError(
            f"{work.partial} holds the unfinished work of another build ({changes}); finish that one, remove "
            "the folder, or choose another output"
        )
