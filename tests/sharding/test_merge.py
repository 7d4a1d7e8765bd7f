"""The second phase: one shard from the documents of several runs; the build's tests compare whole corpora."""

import json
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from sharding.blocks import read_block
from sharding.documents import Document
from sharding.manifest import CorpusError
from sharding.merge import RowRecipe, ShardJob, finished_shard, make_shard
from sharding.prepare import Recipe, RunMaker
from sharding.runs import Run
from sharding.store import Store
from tests.conftest import WORDS

ROWS = RowRecipe(
    seq_len=16, block_rows=4, cross_documents=False, vocab_size=232, pad_id=0, cls_id=2, sep_id=3
)


@pytest.fixture
def job(tiny_tokenizer: Path, tmp_path: Path) -> ShardJob:
    recipe = Recipe((tiny_tokenizer / "tokenizer.json").read_text(), 232, (0, 2, 3), False, 1, 0, None, None)
    runs = []
    for number in range(3):
        maker = RunMaker(recipe)
        maker.add([Document(str(at), f"{WORDS[10 * number + at]} " * (at + 1)) for at in range(10)])
        runs.append(Run(tmp_path, str(number)))
        runs[-1].write(*maker.finish(True))
    (tmp_path / "train").mkdir()
    return ShardJob(
        corpus=tmp_path,
        path="train/00003.tar",
        marker=tmp_path / "3.json",
        runs=tuple(runs),
        run=np.array([2, 0, 0, 1, 2, 1, 0]),
        position=np.array([1, 4, 5, 0, 8, 9, 7]),
        tokens=42,
    )


def rows_of(job: ShardJob) -> NDArray[np.integer]:
    found = finished_shard(job.marker, job.corpus, job.path)
    assert found is not None and found[0] == 7
    store = Store(str(job.corpus))
    return np.concatenate([read_block(store, found[1], block)[0] for block in found[1].blocks])


def test_documents_come_in_the_order_of_the_plan(job: ShardJob) -> None:
    assert finished_shard(job.marker, job.corpus, job.path) is None
    assert make_shard(ROWS, job) == (7, 42)
    rows = rows_of(job)
    words = [10 * run + at for run, at in zip(job.run, job.position, strict=True)]
    assert (rows[:, 1] - rows[:, 1].min()).tolist() == (np.array(words) - min(words)).tolist()
    assert (rows >= 5).sum(axis=1).tolist() == (job.position + 1).tolist()


def test_a_damaged_run_leaves_no_shard(job: ShardJob) -> None:
    path = job.runs[1].ids_path
    content = bytearray(path.read_bytes())
    content[0] ^= 1
    path.write_bytes(content)
    with pytest.raises(CorpusError, match="document .* of 1.ids is not what was written"):
        make_shard(ROWS, job)
    assert list((job.corpus / "train").iterdir()) == [] and not job.marker.exists()


@pytest.mark.parametrize("damage", ["tar gone", "tar cut", "marker cut"])
def test_a_shard_that_is_not_whole_is_not_finished(job: ShardJob, damage: str) -> None:
    make_shard(ROWS, job)
    rows = rows_of(job)
    if damage == "tar gone":
        (job.corpus / job.path).unlink()
    elif damage == "tar cut":
        with open(job.corpus / job.path, "r+b") as file:
            file.truncate(600)
    else:
        job.marker.write_text(json.dumps(json.loads(job.marker.read_text()))[:-5])
    assert finished_shard(job.marker, job.corpus, job.path) is None
    make_shard(ROWS, job)
    assert np.array_equal(rows_of(job), rows)
