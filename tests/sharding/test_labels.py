"""What the labels of a corpus mean; their values: ``test_task_corpus``."""

from dataclasses import replace
from pathlib import Path

import pytest

from sharding.labels import task_of
from sharding.manifest import CorpusError, Manifest, TaskInfo, open_corpus


def test_a_corpus_without_labels_has_no_task(tiny_corpus: Path) -> None:
    with pytest.raises(CorpusError, match="tiny has no labels: it is not a task's; .*stage=data"):
        task_of(open_corpus(tiny_corpus))


def test_a_task_is_part_of_the_fingerprint_and_its_absence_is_not(tiny_corpus: Path, tmp_path: Path) -> None:
    plain = open_corpus(tiny_corpus).manifest
    assert '"task"' not in plain.to_json() and '"lab"' not in plain.to_json()
    fingerprints = {plain.fingerprint}
    for labels in (("no", "yes"), ("yes", "no")):
        task = TaskInfo("own", "classification", labels, ("f1", "accuracy"))
        manifest: Manifest = replace(plain, task=task)
        fingerprints.add(manifest.fingerprint)
        (tmp_path / "manifest.json").write_text(manifest.to_json())
        for name in ("train", "heldout"):
            if not (tmp_path / name).exists():
                (tmp_path / name).symlink_to(tiny_corpus / name)
        corpus = open_corpus(tmp_path)
        assert task_of(corpus) == task and corpus.manifest == manifest
    assert len(fingerprints) == 3
