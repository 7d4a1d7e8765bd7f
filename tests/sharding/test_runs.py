"""Runs: what is written is read back, and damage anywhere is told, never read."""

from pathlib import Path

import numpy as np
import pytest

from sharding.documents import Part
from sharding.duplicates import digest
from sharding.manifest import CorpusError
from sharding.runs import Index, Run, run_of, runs_of

DOCUMENTS = [np.arange(start, start + 20 + start, dtype=np.uint16) for start in range(1, 30)]


def write(run: Run, last: bool = True) -> Index:
    count = len(DOCUMENTS)
    index = Index(
        key=np.arange(count, dtype=np.uint64) * 2**40,
        ordinal=np.arange(count, dtype=np.uint32)[::-1].copy(),
        tokens=np.array([ids.size for ids in DOCUMENTS], dtype=np.uint32),
        heldout=np.arange(count) > 20,
        digest=np.frombuffer(b"".join(map(digest, DOCUMENTS)), dtype="<u8").reshape(-1, 2),
        too_short=np.array([count], dtype=np.uint32),
        unparsed=np.array([count + 1], dtype=np.uint32),
        unparsed_id=np.array(["Ünï"]),
        read=np.array(count + 2),
        last=np.array(last),
    )
    run.write(index, np.arange(2 * count, dtype=np.uint64).reshape(2, count), np.concatenate(DOCUMENTS))
    return index


def test_what_is_written_is_read(tmp_path: Path) -> None:
    run = Run(tmp_path, "a-00000")
    assert not run.is_complete()
    written = write(run)
    assert run.is_complete() and sorted(path.name for path in tmp_path.iterdir()) == [
        "a-00000.ids",
        "a-00000.npz",
    ]
    for name, values in vars(run.index()).items():
        assert np.array_equal(values, getattr(written, name)) and values.dtype == getattr(written, name).dtype
    assert run.band(1).tolist() == list(range(len(DOCUMENTS), 2 * len(DOCUMENTS)))
    for positions in ([0], [28], [0, 1, 2], [5, 9, 28], list(range(29))):
        found = run.read(np.array(positions), np.uint16)
        assert [ids.tolist() for ids in found] == [DOCUMENTS[at].tolist() for at in positions]


def test_a_run_without_its_ids_is_not_complete(tmp_path: Path) -> None:
    run = Run(tmp_path, "a")
    write(run)
    run.ids_path.unlink()
    assert not run.is_complete()


def test_any_flipped_byte_of_the_ids_that_are_read_is_told(tmp_path: Path) -> None:
    run = Run(tmp_path, "a")
    write(run)
    content = run.ids_path.read_bytes()
    ends = np.cumsum([2 * ids.size for ids in DOCUMENTS])
    for at in np.random.default_rng(0).integers(0, len(content), 60):
        run.ids_path.write_bytes(content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :])
        document = int(np.searchsorted(ends, at, side="right"))
        with pytest.raises(CorpusError, match=f"document {document} of a.ids is not what was written"):
            run.read(np.arange(len(DOCUMENTS)), np.uint16)


@pytest.mark.parametrize("kept", [0.0, 0.3, 0.99])
def test_cut_files_are_told(tmp_path: Path, kept: float) -> None:
    run = Run(tmp_path, "a")
    write(run)
    ids, index = run.ids_path.read_bytes(), run.index_path.read_bytes()
    run.ids_path.write_bytes(ids[: int(kept * len(ids))])
    with pytest.raises(
        CorpusError, match="a.npz or a.ids is damaged .*remove both and start the build again"
    ):
        run.read(np.array([2, 28]), np.uint16)
    run.ids_path.write_bytes(ids)
    run.index_path.write_bytes(index[: int(kept * len(index))])
    for reading in (run.index, lambda: run.band(0), lambda: run.read(np.array([0]), np.uint16)):
        with pytest.raises(CorpusError, match="a.npz or a.ids is damaged"):
            reading()


def test_a_flipped_byte_of_the_index_is_told_or_changes_nothing(tmp_path: Path) -> None:
    run = Run(tmp_path, "a")
    written = write(run)
    content = run.index_path.read_bytes()
    told = 0
    for at in np.random.default_rng(1).integers(0, len(content), 150):
        run.index_path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        try:
            for name, values in vars(run.index()).items():
                assert np.array_equal(values, getattr(written, name))
            assert np.array_equal(run.band(0), np.arange(len(DOCUMENTS)))
        except CorpusError:
            told += 1
    assert told > 75  # the rest are bytes of the archive that say nothing, such as times


def test_the_runs_of_a_part(tmp_path: Path) -> None:
    part = Part("00000-7", "x", 7, None, 100, sequential=False)
    assert runs_of(tmp_path, part) is None
    write(run_of(tmp_path, part, 0))
    assert runs_of(tmp_path, part) == [Run(tmp_path, "00000-7-00000")]
    part = Part("00001-0", "y", 0, None, 100, sequential=True)
    for piece, last in ((0, False), (2, True), (1, False)):
        assert runs_of(tmp_path, part) is None
        write(run_of(tmp_path, part, piece), last)
    assert [run.name for run in runs_of(tmp_path, part) or []] == [
        f"00001-0-0000{piece}" for piece in range(3)
    ]
