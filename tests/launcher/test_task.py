"""Task distillation as real processes under real launchers: every stage of a tiny task."""

import json
import os
import random
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mlflow import MlflowClient
from transformers import AutoModelForSequenceClassification

from configs.load import from_dict
from configs.task_schema import TaskConfig
from launcher.task import learners
from sharding.labels import read_labels
from sharding.manifest import open_corpus
from sharding.stream import sequential
from tests.conftest import WORDS
from tests.launcher.conftest import ROOT, command, evaluations


def write_task(folder: Path, rows: int) -> None:
    """Texts of four words; the class is whether the first word is of the first half of all words."""
    draw, half = random.Random(rows), set(WORDS[: len(WORDS) // 2])
    lines = [[draw.choice(WORDS) for _ in range(4)] for _ in range(rows)]
    table = [f"{' '.join(words)}\t{int(words[0] in half)}" for words in lines]
    name = "train.tsv" if rows > 100 else "dev.tsv"
    (folder / name).write_text("sentence\tlabel\n" + "\n".join(table) + "\n", encoding="utf-8")


def task_config(folder: Path, teacher: Path) -> dict[str, Any]:
    """Two students of the tiny teacher's shape: one starts from its layers, one from nothing."""
    shape = {"layers": 2, "hidden_size": 48, "heads": 4, "intermediate_size": 96}
    stage = {"global_batch_rows": 16, "micro_batch_rows": 8, "augmented": False}
    return {
        "task": "sst2",
        "output": str(folder / "run"),
        "source": {"path": str(folder)},
        "seq_len": 32,
        "teacher": {"model": str(teacher), "precision": "fp32"},
        "students": [
            {"name": "copied", "init": "teacher", **shape},
            {"name": "blank", **shape, "losses": {"attention": 0.1}},
        ],
        "fine_tuning": {**stage, "epochs": 8, "optimizer": {"lr": 2e-3}},
        "intermediate": {**stage, "epochs": 4, "optimizer": {"lr": 2e-3}},
        "prediction": {**stage, "epochs": 2, "optimizer": {"lr": 2e-3}},
        "evaluation": {"every_steps": 20, "rows": 1000},
        "checkpoint": {"every_steps": 20},
        "log": {"every_steps": 10, "report": False},
        "tracking": {"enabled": False},
    }


def run(config: dict[str, Any], folder: Path, *overrides: str, ranks: int = 1, by: str = "python"):
    """One stage to its end."""
    line = command(folder, config, *overrides, ranks=ranks, by=by)
    line = [str(ROOT / "launcher/task.py") if part.endswith("general.py") else part for part in line]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
    return subprocess.run(line, capture_output=True, text=True, timeout=300, cwd=folder, env=environment)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_teacher: Path) -> Path:
    """All stages of the task, under different launchers; the teacher pretrained by nobody."""
    folder = tmp_path_factory.mktemp("task")
    for rows in (400, 60):
        write_task(folder, rows)
    config = task_config(folder, tiny_teacher)
    (folder / "task.json").write_text(json.dumps(config))
    for stage, ranks, by in (
        ("data", 1, "python"),
        ("teacher", 2, "deepspeed"),
        ("intermediate", 2, "torchrun"),
        ("prediction", 2, "torchrun"),
        ("baseline", 1, "python"),
    ):
        tracked = f"tracking.enabled={str(stage in ('data', 'prediction')).lower()}"
        done = run(config, folder, f"stage={stage}", tracked, ranks=ranks, by=by)
        assert done.returncode == 0, f"{stage}: {done.stdout}{done.stderr}"
        (folder / f"{stage}.log").write_text(done.stdout + done.stderr)
    return folder


def accuracy(folder: Path, stage: str, student: str) -> float:
    """At the end of a stage, as it said."""
    last = [entry for entry in evaluations(str(folder / "run" / stage)) if entry["student"] == student][-1]
    return float(last["losses"]["score/accuracy"])


def test_every_stage_learns_the_task(folder: Path) -> None:
    assert accuracy(folder, "teacher", "teacher") > 0.9
    assert accuracy(folder, "prediction", "copied") > 0.9
    assert accuracy(folder, "baseline", "copied") > 0.6
    losses = [entry["losses"]["total"] for entry in evaluations(str(folder / "run/intermediate"))]
    assert losses[-1] < losses[0]


def test_stages_are_found_in_mlflow_under_their_task_beside_all_runs_of_the_folder(folder: Path) -> None:
    client = MlflowClient(tracking_uri=f"sqlite:///{folder}/mlflow/mlflow.db")
    experiment = client.get_experiment_by_name("distillation")
    assert experiment is not None
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    assert sorted(runs) == ["blank", "copied", "sst2", "sst2-data", "sst2-prediction"]
    parents = {name: run.data.tags.get("mlflow.parentRunId") for name, run in runs.items()}
    group, stage = runs["sst2"].info.run_id, runs["sst2-prediction"]
    assert parents == {
        "sst2": None,
        "sst2-data": group,
        "sst2-prediction": group,
        "copied": stage.info.run_id,
        "blank": stage.info.run_id,
    }
    assert (stage.data.tags["stage"], stage.data.tags["task"]) == ("prediction", "sst2")
    assert runs["sst2-data"].data.metrics["train/rows"] == 400
    assert runs["sst2"].data.tags["outcome.sst2-data"].startswith("400 rows to train on")
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    score = client.get_metric_history(runs["copied"].info.run_id, "heldout/score/accuracy")[-1].value
    assert score == pytest.approx(accuracy(folder, "prediction", "copied"))


def test_what_is_exported_says_the_same_of_the_same_rows(folder: Path) -> None:
    """The exported model, loaded as anybody does, has its stage's accuracy and the task's names."""
    corpus = open_corpus(folder / "run/data")
    labels = read_labels(corpus, "heldout")[:, 0]
    for stage, name in (("teacher", "teacher"), ("prediction", "copied"), ("prediction", "blank")):
        path = folder / f"run/{stage}/export/{name}"
        model = AutoModelForSequenceClassification.from_pretrained(path).eval()
        assert model.config.id2label == {0: "negative", 1: "positive"}
        hits = sum(
            int(model(ids, attention_mask=mask).logits.argmax()) == int(label)
            for (ids, mask), label in zip(rows_of(corpus), labels, strict=True)
        )
        assert hits / len(labels) == pytest.approx(accuracy(folder, stage, name), abs=1e-6)


def rows_of(corpus):
    for batch in sequential(corpus, "heldout", rows=10**6, batch_rows=1, rank=0, world_size=1):
        length = int(batch.length_B[0])
        yield batch.ids_BS[:, :length], torch.ones(1, length, dtype=torch.int64)


def test_the_teachers_logits_are_computed_once_and_are_the_models(folder: Path) -> None:
    kept = sorted((folder / "run/teacher_logits").iterdir())
    assert [path.suffix for path in kept] == [".npy", ".npy"]  # train and heldout, no parts left
    assert "are computed once" in (folder / "intermediate.log").read_text()  # held out, to be scored
    corpus = open_corpus(folder / "run/data")
    model = AutoModelForSequenceClassification.from_pretrained(folder / "run/teacher/export/teacher").eval()
    heldout = np.load(next(path for path in kept if "heldout" in path.name))
    with torch.no_grad():
        expected = torch.cat([model(ids, attention_mask=mask).logits for ids, mask in rows_of(corpus)])
    np.testing.assert_allclose(heldout, expected, atol=1e-5)
    again = run(
        json.loads((folder / "task.json").read_text()),
        folder,
        "stage=prediction",
        "output=" + str(folder / "again"),
        f"corpus={folder}/run/data",
        f"finetuned={folder}/run/teacher/export/teacher",
        "start=init",
        f"teacher.logits_folder={folder}/run/teacher_logits",
        "prediction.epochs=null",
        "prediction.steps=2",
    )
    assert again.returncode == 0, again.stderr
    assert "are computed once" not in again.stdout + again.stderr


def test_a_teacher_with_its_classes_in_another_order_is_refused(folder: Path, tmp_path: Path) -> None:
    """By their names where these tell, else by a score at or below chance."""
    config = json.loads((folder / "task.json").read_text())
    source = folder / "run/teacher/export/teacher"
    model = AutoModelForSequenceClassification.from_pretrained(source)
    with torch.no_grad():
        for value in (model.classifier.weight, model.classifier.bias):
            value.copy_(value.flip(0))
    said = {}
    for names in (("positive", "negative"), ("LABEL_0", "LABEL_1")):
        model.config.id2label = dict(enumerate(names))
        model.config.label2id = {name: index for index, name in enumerate(names)}
        wrong = tmp_path / names[0]
        model.save_pretrained(wrong)
        for extra in source.glob("*token*"):
            (wrong / extra.name).write_bytes(extra.read_bytes())
        done = run(
            config,
            tmp_path,
            "stage=prediction",
            f"output={tmp_path / 'out'}",
            f"finetuned={wrong}",
            f"corpus={folder}/run/data",
            "start=init",
        )
        assert done.returncode == 2
        said[names[0]] = done.stderr
    assert "the same names in another order" in said["positive"]
    assert "labels=[positive, negative]" in said["positive"]
    assert "accuracy 0." in said["LABEL_0"] and "if its classes were positive, negative" in said["LABEL_0"]
    assert not (tmp_path / "out/prediction/checkpoints").exists()


def test_what_is_wrong_is_said_at_once(folder: Path, tmp_path: Path) -> None:
    config = json.loads((folder / "task.json").read_text())
    done = run(config, tmp_path, "stage=distil")
    assert done.returncode == 2 and "stage=distil: give one of stage=data|augment|teacher" in done.stderr
    done = run(
        config,
        tmp_path,
        "stage=teacher",
        "task=mine",
        "prediction.losses.logits=-1",
        "seq_len=4096",
        "intermediate.epochs=0",
    )
    assert done.returncode == 2
    for problem in (
        "task=mine is none of cola, mnli",
        "prediction.losses.logits=-1",
        "intermediate.epochs=0",
    ):
        assert problem in done.stderr, done.stderr


def test_the_teacher_is_its_own_student(tiny_teacher: Path) -> None:
    tree = task_config(Path("x"), tiny_teacher) | {"teacher_overrides": {"hidden_dropout_prob": 0.3}}
    config = from_dict(TaskConfig, tree)
    (own,) = learners(config, "teacher")
    assert (own.layers, own.hidden_size, own.heads, own.intermediate_size) == (4, 48, 4, 96)
    assert own.init == str(tiny_teacher) and own.overrides == {"hidden_dropout_prob": 0.3}
