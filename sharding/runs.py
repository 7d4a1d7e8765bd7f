"""Runs: what a build's first phase leaves of each part of the source, ready to be merged.

A run is two files: ``<name>.ids``, the token ids of its documents one after the other, and ``<name>.npz``,
the index, which is written last: a run whose index is there is complete. Its documents stand in the order of
(split, key, place in the source), so that the documents that a shard takes from one run lie side by side.
"""

import zipfile
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
from numpy.typing import DTypeLike, NDArray

from sharding.documents import Part
from sharding.duplicates import digest
from sharding.files import new_file
from sharding.manifest import CorpusError


@dataclass(frozen=True)
class Index:
    """What a run holds; n documents in its own order."""

    key: NDArray[np.uint64]
    """[n]: where the document stands in the shuffled source; all 0 where that is the source's own order."""
    ordinal: NDArray[np.uint32]
    """[n]: place among the documents that were read for this run."""
    tokens: NDArray[np.uint32]
    """[n]"""
    heldout: NDArray[np.bool_]
    """[n]"""
    digest: NDArray[np.uint64]
    """[n, 2]: 128 bits that name the ids."""
    too_short: NDArray[np.uint32]
    """Ordinals of the documents that were too short, or hold no token."""
    unparsed: NDArray[np.uint32]
    """Ordinals of the pages whose markup defeated the parser."""
    unparsed_id: NDArray[np.str_]
    """Their ids."""
    read: NDArray[np.int64]
    """[]: documents read."""
    last: NDArray[np.bool_]
    """[]: whether this is the last run of its part."""


@dataclass(frozen=True)
class Run:
    """One run of a part of the source, by name."""

    folder: Path
    name: str

    @property
    def index_path(self) -> Path:
        return self.folder / f"{self.name}.npz"

    @property
    def ids_path(self) -> Path:
        return self.folder / f"{self.name}.ids"

    def is_complete(self) -> bool:
        return self.index_path.exists() and self.ids_path.exists()

    def write(self, index: Index, bands: NDArray[np.uint64], ids: NDArray[np.integer]) -> None:
        """Write ids [all tokens] and index, ``bands`` [b, n] with it. Raises OSError when the disk does."""
        with new_file(self.ids_path) as file:
            file.write(ids.data)
        columns = {field.name: getattr(index, field.name) for field in fields(Index)}
        columns.update({f"band_{number}": band for number, band in enumerate(bands)})
        with new_file(self.index_path) as file:
            np.savez(file, **columns)

    def index(self) -> Index:
        """Raises: CorpusError when the index is damaged."""
        return Index(*self._columns(*(field.name for field in fields(Index))))

    def band(self, number: int) -> NDArray[np.uint64]:
        """uint64 [n]: one band of the documents' MinHash. Raises: CorpusError when the index is damaged."""
        return self._columns(f"band_{number}")[0]

    def read(self, positions: NDArray[np.integer], dtype: DTypeLike) -> list[NDArray[np.integer]]:
        """The ids of the documents at ``positions`` (ascending, at least one), read at once.

        Raises: CorpusError when they are not what was written.
        """
        tokens, digests = self._columns("tokens", "digest")
        ends = np.cumsum(tokens, dtype=np.int64)
        starts = ends - tokens
        first = int(starts[positions[0]])
        with open(self.ids_path, "rb") as file:
            file.seek(first * np.dtype(dtype).itemsize)
            stored = np.fromfile(file, dtype, count=int(ends[positions[-1]]) - first)
        documents = [stored[starts[at] - first : ends[at] - first] for at in positions.tolist()]
        for at, ids in zip(positions.tolist(), documents, strict=True):
            if digest(ids) != digests[at].tobytes():
                raise self.damaged(f"document {at} of {self.ids_path.name} is not what was written")
        return documents

    def damaged(self, reason: object) -> CorpusError:
        return CorpusError(
            f"{self.index_path} or {self.ids_path.name} is damaged ({reason}); remove both and start the "
            "build again: it makes only these again"
        )

    def _columns(self, *names: str) -> list[NDArray]:
        try:
            with np.load(self.index_path, allow_pickle=False) as stored:
                return [stored[name] for name in names]
        except (ValueError, KeyError, EOFError, zipfile.BadZipFile, NotImplementedError) as error:
            raise self.damaged(error) from error


def runs_of(folder: Path, part: Part) -> list[Run] | None:
    """All runs of a part, in order; None while they are not complete."""
    found: list[Run] = []
    while True:
        run = run_of(folder, part, len(found))
        if not run.is_complete():
            return None
        found.append(run)
        if not part.sequential or run._columns("last")[0]:
            return found


def run_of(folder: Path, part: Part, piece: int) -> Run:
    """A part's run for one piece; parts that are not sequential have one."""
    return Run(folder, f"{part.name}-{piece:05d}")
