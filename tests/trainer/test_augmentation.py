"""The stage ``augment``: the same bytes from any number of ranks and after kills, and a sound corpus."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sharding.examples import read_examples
from sharding.labels import read_labels
from sharding.manifest import open_corpus
from sharding.stream import sequential
from sharding.task_corpus import build, encode
from sharding.tokens import load_tokenizer
from sharding.verify import verify
from tests.conftest import WORDS
from tests.trainer.augment_worker import config_of
from tests.trainer.masked_lm import write_masked_lm
from trainer.augmentation import Stage, augment
from trainer.world import World

ROOT = Path(__file__).resolve().parents[2]
ALONE = World(0, 1, 0, 1, torch.device("cpu"))
EXAMPLES, PART, COPIES = 230, 20, 6
Tree = dict[str, Any]


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Path) -> Tree:
    """A pair task of 230 examples whose value is that of the line; its corpus is built by ``task``."""
    folder = tmp_path_factory.mktemp("stage")
    model = write_masked_lm(folder / "masked", tiny_tokenizer)
    random = np.random.default_rng(0)
    matrix = random.standard_normal((len(WORDS), 5))
    vectors = [f"{word} {' '.join(map(str, row))}" for word, row in zip(WORDS, matrix, strict=True)]
    (folder / "vectors.txt").write_text("\n".join([*vectors, "zebra 1 1 1 1 1"]))
    (folder / "files").mkdir()
    for name, count in (("train", EXAMPLES), ("dev", 40)):
        lines = ["index\tsentence1\tsentence2\tscore"]
        for n in range(count):
            a, b = (
                " ".join(random.choice([*WORDS, "the", "zebra"], size)) for size in random.integers(1, 9, 2)
            )
            lines.append(f"{n}\t{a}\t{b}\t{n / 10}")
        (folder / "files" / f"{name}.tsv").write_text("\n".join(lines) + "\n")
    return {
        "task": "stsb",
        "source": {"path": str(folder / "files")},
        "seq_len": 24,
        "teacher": {"model": str(tiny_tokenizer)},
        "augmentation": {
            **{"masked_lm": str(model), "vectors": str(folder / "vectors.txt"), "per_example": COPIES},
            **{"part_examples": PART, "batch_tokens": 200, "candidates": 5},
        },
    }


def task(tree: Tree, output: Path, **changes: Any) -> Tree:
    """The task with an output of its own, its corpus built there."""
    own = {**tree, "output": str(output), "augmentation": {**tree["augmentation"], **changes}}
    build(config_of(own))
    return own


@pytest.fixture(scope="module")
def whole(tree: Tree, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of one process that nobody interrupted."""
    own = task(tree, tmp_path_factory.mktemp("whole"))
    augment(config_of(own), ALONE)
    return Path(own["output"])


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def start(own: Tree, ranks: int = 1) -> subprocess.Popen[str]:
    path = Path(own["output"], "config.json")
    path.write_text(json.dumps(own))
    launcher = [sys.executable]
    if ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    return subprocess.Popen(
        [*launcher, "tests/trainer/augment_worker.py", str(path)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_the_corpus_is_sound_and_holds_every_example_before_its_copies(tree: Tree, whole: Path):
    config = config_of({**tree, "output": str(whole)})
    corpus, source = open_corpus(whole / "augmented"), open_corpus(whole / "data")
    assert verify(corpus, workers=1) == []
    assert corpus.manifest.task == source.manifest.task and corpus.fingerprint != source.fingerprint
    train = corpus.split("train")
    assert len(train.shards) == -(-EXAMPLES // PART) and train.documents == train.rows
    assert corpus.manifest.splits["heldout"] == source.manifest.splits["heldout"]
    labels = read_labels(corpus, "train")[:, 0]
    runs = np.flatnonzero(np.diff(labels, prepend=-1))  # values differ by line, and stand in its order
    assert len(runs) == EXAMPLES and np.diff([*runs, len(labels)]).max() == COPIES + 1
    rows, expected = encode(
        read_examples(config, "train"), load_tokenizer(tree["teacher"]["model"], None), 24
    )
    batches = sequential(corpus, "train", rows=10_000, batch_rows=64, rank=0, world_size=1)
    found = np.concatenate([batch.ids_BS.numpy() for batch in batches])
    assert np.array_equal(found[runs], rows.ids) and np.array_equal(labels[runs], expected[:, 0])
    assert len(np.unique(found, axis=0)) > 0.8 * len(found)  # copies differ from it and from each other


def test_ranks_and_reruns_give_the_same_bytes(tree: Tree, whole: Path, tmp_path: Path):
    own = task(tree, tmp_path)
    process = start(own, ranks=2)
    said, _ = process.communicate(timeout=200)
    assert process.returncode == 0, said
    assert files(tmp_path / "augmented") == files(whole / "augmented")
    assert not (tmp_path / "augmented.partial").exists()
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "augmented").rglob("*")}
    augment(config_of(own), ALONE)  # is there already
    assert made == {path: path.stat().st_mtime_ns for path in (tmp_path / "augmented").rglob("*")}


def test_a_run_that_is_killed_goes_on_where_it_was(tree: Tree, whole: Path, tmp_path: Path):
    own = task(tree, tmp_path)
    process = start(own)
    markers = tmp_path / "augmented.partial" / "shards" / "train"
    deadline = time.monotonic() + 200
    while len(list(markers.glob("*.json"))) < 2 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    said, _ = process.communicate()
    assert process.returncode == -signal.SIGKILL, said
    finished = {path: path.stat().st_mtime_ns for path in markers.glob("*.json")}
    assert 2 <= len(finished) < -(-EXAMPLES // PART), "it was killed too late to prove anything"
    torn = tmp_path / "augmented.partial" / "corpus" / "train" / ".00009.tar.0.tmp"
    torn.write_bytes(b"half a shard")  # what a kill in the middle of one leaves
    stage = Stage(config_of(own), ALONE)
    with stage.opened(shared=True) as work:
        left = stage.unfinished(work)
        assert len(left) == -(-EXAMPLES // PART) - len(finished)
        for number in left:
            stage.make(work, number, lambda place: None)
        assert {path: path.stat().st_mtime_ns for path in finished} == finished  # not made again
    stage.join()
    assert files(tmp_path / "augmented") == files(whole / "augmented")


def test_a_part_that_was_cut_is_made_again(tree: Tree, whole: Path, tmp_path: Path):
    stage = Stage(config_of(task(tree, tmp_path)), ALONE)
    with stage.opened(shared=True) as work:
        stage.make(work, 3, lambda place: None)
        shard = work.corpus / "train" / "00003.tar"
        assert 3 not in stage.unfinished(work)
        shard.write_bytes(shard.read_bytes()[:-512])
        assert 3 in stage.unfinished(work)


def test_work_under_other_settings_is_not_mixed_in(tree: Tree, whole: Path, tmp_path: Path):
    own = task(tree, tmp_path)
    stage = Stage(config_of(own), ALONE)
    with stage.opened(shared=True) as work:
        stage.make(work, 0, lambda place: None)
    other = task(tree, tmp_path, seed=1)
    with pytest.raises(
        ValueError, match="unfinished work of another build .augmentation.seed: 0 then, 1 now"
    ):
        augment(config_of(other), ALONE)
    other = {**tree, "output": str(whole), "augmentation": {**tree["augmentation"], "candidates": 4}}
    with pytest.raises(ValueError, match="made with other settings .augmentation.candidates: 5 then, 4 now"):
        augment(config_of(other), ALONE)
    (tmp_path / "augmented").mkdir()
    with pytest.raises(ValueError, match="was not made by the stage augment"):
        augment(config_of(own), ALONE)


def test_another_task_corpus_than_the_examples_is_refused(tree: Tree, whole: Path):
    with pytest.raises(
        ValueError, match=r"another seq_len \(24\) than is asked for now \(20\); run stage=data"
    ):
        Stage(config_of({**tree, "output": str(whole), "seq_len": 20}), ALONE)


def test_spans_are_refused_with_the_reason(tree: Tree, tmp_path: Path):
    with pytest.raises(ValueError, match="answers are places in the text.*intermediate.augmented=false"):
        Stage(config_of({**tree, "task": "squad", "output": str(tmp_path)}), ALONE)


def test_a_corpus_that_is_named_is_not_made(tree: Tree, tmp_path: Path):
    with pytest.raises(ValueError, match="augmented=elsewhere names a corpus that is there"):
        Stage(config_of({**tree, "output": str(tmp_path), "augmented": "elsewhere"}), ALONE)
