"""The second phase of a build, in worker processes: documents from all runs -> rows -> one shard."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sharding.files import new_file
from sharding.manifest import Shard, shard_from
from sharding.packing import Packer, Rows
from sharding.runs import Run
from sharding.shards import write_shard
from sharding.tokens import id_dtype


@dataclass(frozen=True)
class RowRecipe:
    """How documents become rows and blocks."""

    seq_len: int
    block_rows: int
    cross_documents: bool
    vocab_size: int
    pad_id: int
    cls_id: int
    sep_id: int


@dataclass(frozen=True)
class ShardJob:
    """One shard to be made."""

    corpus: Path
    """Folder that holds the splits."""
    path: str
    """Of the shard, in it."""
    marker: Path
    """File that says that the shard is complete."""
    runs: tuple[Run, ...]
    """The runs that its documents come from."""
    run: NDArray[np.integer]
    """[n]: for each document, in packed order, its run's place in ``runs``."""
    position: NDArray[np.integer]
    """[n]: its place in that run; ascending within a run."""
    tokens: int
    """Of all its documents."""


def make_shard(recipe: RowRecipe, job: ShardJob) -> tuple[int, int]:
    """Do one job; returns the shard's documents and tokens. Holds the ids of one shard, and a block of rows.

    Raises: CorpusError for a run that is damaged; OSError when the disk does.
    """
    shard = write_shard(job.corpus, job.path, _blocks(recipe, job))
    mark_finished(job.marker, job.run.size, shard)
    return job.run.size, job.tokens


def _blocks(recipe: RowRecipe, job: ShardJob) -> Iterator[Rows]:
    dtype = id_dtype(recipe.vocab_size)
    packer = Packer(
        seq_len=recipe.seq_len,
        block_rows=recipe.block_rows,
        cross_documents=recipe.cross_documents,
        pad_id=recipe.pad_id,
        cls_id=recipe.cls_id,
        sep_id=recipe.sep_id,
        dtype=dtype,
    )
    of_run = [iter(run.read(job.position[job.run == at], dtype)) for at, run in enumerate(job.runs)]
    for at in job.run.tolist():
        yield from packer.add(next(of_run[at]))
    yield from packer.finish()


def mark_finished(marker: Path, documents: int, shard: Shard) -> None:
    """Note that a shard of so many documents is complete."""
    with new_file(marker) as file:
        file.write(json.dumps({"documents": documents, "shard": asdict(shard)}).encode())


def finished_shard(marker: Path, corpus: Path, path: str) -> tuple[int, Shard] | None:
    """Documents of a shard that is complete, and the shard; None for one that is not there, or not whole."""
    try:
        fields: dict[str, Any] = json.loads(marker.read_text())
        shard = shard_from(fields["shard"])
        whole = (corpus / path).stat().st_size == shard.bytes
    except (FileNotFoundError, ValueError, KeyError):
        return None
    return (fields["documents"], shard) if whole else None
