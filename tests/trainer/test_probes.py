"""Probes against a loop of one's own over the stock model and scikit-learn."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.preprocessing import StandardScaler
from transformers import AutoModel, BertModel

from configs.schema import Precision, ProbeConfig, TeacherConfig
from sharding.labels import read_labels
from sharding.manifest import TaskInfo, open_corpus
from sharding.stream import sequential
from tests.launcher.conftest import write_teacher
from tests.tiny_task import write_tiny_task
from trainer.probes import ProbeTask, hidden_of_teacher, open_probes, probe_tasks
from trainer.world import World

ALONE = World(rank=0, size=1, local_rank=0, local_size=1, device=torch.device("cpu"))


@pytest.fixture
def group(tmp_path: Path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Path) -> tuple[TeacherConfig, Path]:
    teacher = write_teacher(tmp_path_factory.mktemp("teacher"), tiny_tokenizer, BertModel)
    corpus = write_tiny_task(tmp_path_factory.mktemp("mood"), tiny_tokenizer)
    return TeacherConfig(model=str(teacher), precision=Precision.fp32), corpus


def reference(teacher: TeacherConfig, location: Path, split: str, chosen: np.ndarray):
    """Mean hidden states row by row, and labels."""
    model = AutoModel.from_pretrained(teacher.model).eval()
    corpus = open_corpus(location)
    rows = list(sequential(corpus, split, rows=10**6, batch_rows=1, rank=0, world_size=1))
    with torch.no_grad():
        means = [
            model(input_ids=rows[n].ids_BS[:, : int(rows[n].length_B)]).last_hidden_state[0].mean(dim=0)
            for n in chosen
        ]
    return torch.stack(means).numpy().astype(np.float64), read_labels(corpus, split)[chosen, 0]


@pytest.mark.parametrize("micro_batch_rows", [16, 64])
def test_scores_are_those_of_a_linear_model_on_mean_hidden_states(group, made, micro_batch_rows) -> None:
    teacher, location = made
    (task,) = open_probes(ProbeConfig(1, [str(location)], rows=100), teacher)
    beats: list[int] = []
    found = probe_tasks(
        [task], hidden_of_teacher(teacher, ALONE), micro_batch_rows, ALONE, lambda: beats.append(1)
    )
    x, y = reference(teacher, location, "train", np.linspace(0, 299, 100).round().astype(int))
    x_dev, y_dev = reference(teacher, location, "heldout", np.arange(90))
    scale = StandardScaler().fit(x)
    linear = LogisticRegression(C=0.1, max_iter=1000).fit(scale.transform(x), y)
    accuracy = float((linear.predict(scale.transform(x_dev)) == y_dev).mean())
    assert (
        found.keys() == {"mood/accuracy", "mood/matthews"} and len(beats) == -(-190 // micro_batch_rows) + 1
    )
    # A row at the border may fall either way.
    assert found["mood/accuracy"] == pytest.approx(accuracy, abs=1.5 / 90)
    assert found["mood/accuracy"] > 0.65


def test_a_value_is_predicted_by_ridge_regression(group, made) -> None:
    teacher, location = made
    (task,) = open_probes(ProbeConfig(1, [str(location)]), teacher)
    info = TaskInfo("length", "regression", (), ("pearson",))
    task = replace(task, info=info, labels_nK=task.length_n.numpy().astype(np.float32)[:, None])
    found = probe_tasks([task], hidden_of_teacher(teacher, ALONE), 32, ALONE, lambda: None)
    x, _ = reference(teacher, location, "train", np.arange(300))
    x_dev, _ = reference(teacher, location, "heldout", np.arange(90))
    length = task.length_n.numpy().astype(np.float64)
    scale = StandardScaler().fit(x)
    predicted = Ridge().fit(scale.transform(x), length[:300]).predict(scale.transform(x_dev))
    assert found == {"length/pearson": pytest.approx(np.corrcoef(predicted, length[300:])[0, 1], abs=1e-4)}


def test_a_class_that_was_not_learned_is_never_answered(group, made) -> None:
    teacher, location = made
    (task,) = open_probes(ProbeConfig(1, [str(location)]), teacher)
    three = TaskInfo("mood", "classification", ("never", "low", "high"), ("accuracy",))
    moved: ProbeTask = replace(task, info=three, labels_nK=task.labels_nK + 1)
    hidden = hidden_of_teacher(teacher, ALONE)
    found, expected = (probe_tasks([each], hidden, 64, ALONE, lambda: None) for each in (moved, task))
    assert found["mood/accuracy"] == expected["mood/accuracy"]


def test_what_cannot_be_probed_is_refused(made, tiny_corpus: Path, tmp_path: Path) -> None:
    teacher, location = made
    with pytest.raises(ValueError, match="has no labels"):
        open_probes(ProbeConfig(1, [str(tiny_corpus)]), teacher)
    with pytest.raises(ValueError, match="name each task once"):
        open_probes(ProbeConfig(1, [str(location)] * 2), teacher)
    with pytest.raises(ValueError, match="all of one class"):
        open_probes(ProbeConfig(1, [str(location)], rows=1), teacher)
