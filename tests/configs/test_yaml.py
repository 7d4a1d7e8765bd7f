"""Every YAML that ships loads, and says what its name promises."""

from pathlib import Path

import pytest

from configs.corpus_schema import CorpusConfig, SourceKind
from configs.deepspeed import derive
from configs.evaluate_schema import EvaluateConfig
from configs.load import load_config, to_yaml
from configs.schema import RunConfig
from configs.sweep import load_sweep, total_trials
from configs.task import corpus_of, stage_config
from configs.task_schema import TaskConfig

FOLDER = Path(__file__).resolve().parents[2] / "configs"
CORPORA = sorted(FOLDER.glob("corpus_*.yaml"))
TASKS = sorted(FOLDER.glob("task*.yaml"))
EVALUATIONS = sorted(FOLDER.glob("evaluate*.yaml"))
RUNS = sorted(set(FOLDER.glob("*.yaml")) - {*CORPORA, *TASKS, *EVALUATIONS})
named = {"ids": lambda path: path.stem}


def test_there_are_both_kinds():
    assert {"demo"} <= {path.stem for path in RUNS} and {"corpus_demo"} <= {path.stem for path in CORPORA}


@pytest.mark.parametrize("path", CORPORA, **named)
def test_a_corpus(path, tmp_path):
    config = load_config(CorpusConfig, path)
    (tmp_path / "resolved.yaml").write_text(to_yaml(config), encoding="utf-8")
    assert load_config(CorpusConfig, tmp_path / "resolved.yaml") == config
    if config.source.kind is not SourceKind.datasets:
        assert Path(config.source.path).is_file()


@pytest.mark.parametrize("path", TASKS, **named)
def test_a_task(path, tmp_path):
    config = load_config(TaskConfig, path)
    (tmp_path / "resolved.yaml").write_text(to_yaml(config), encoding="utf-8")
    assert load_config(TaskConfig, tmp_path / "resolved.yaml") == config


@pytest.mark.parametrize("path", EVALUATIONS, **named)
def test_an_evaluation_is_of_what_the_task_leaves(path):
    (task,) = load_config(EvaluateConfig, path).tasks
    of_task = load_config(TaskConfig, FOLDER / "task.yaml")
    stages = {
        stage: stage_config(of_task, stage, of_task.students).output for stage in ("prediction", "baseline")
    }
    (name,) = (student.name for student in of_task.students)
    assert task.corpus == corpus_of(of_task)
    assert task.arms == {
        "student": [f"{stages['prediction']}/export/{name}"],
        "finetuned": [f"{stages['baseline']}/export/{name}"],
    }


def test_the_papers_grid_is_a_sweep_of_task_runs(monkeypatch):
    monkeypatch.chdir(FOLDER.parent)  # from where its base is named
    sweep, base = load_sweep(FOLDER / "sweeps/prediction.yaml", [])
    assert base == load_config(TaskConfig, FOLDER / "task.yaml", sweep.overrides)
    values = {key: axis.values for key, axis in sweep.space.items()}
    assert values["prediction.optimizer.lr"] == [1e-5, 2e-5, 3e-5] and total_trials(sweep) == 6
    assert values["prediction.global_batch_rows"] == [16, 32]


@pytest.mark.parametrize("path", RUNS, **named)
def test_a_run(path, tmp_path):
    config = load_config(RunConfig, path)
    (tmp_path / "resolved.yaml").write_text(to_yaml(config), encoding="utf-8")
    assert load_config(RunConfig, tmp_path / "resolved.yaml") == config
    for student in config.students:
        for ranks in (1, 2):
            assert derive(config, student, ranks, pin_memory=False)["train_batch_size"] % ranks == 0


def test_runs_read_a_corpus_that_a_yaml_builds():
    built = {load_config(CorpusConfig, path).output for path in CORPORA}
    read = [load_config(RunConfig, path).data for path in RUNS]
    assert {data.corpus for data in read if not data.mixture} <= built
    assert any(entry.corpus in built for data in read for entry in data.mixture)


@pytest.mark.parametrize(
    "name, shape", [("general_4x312", (4, 312, 12, 1200)), ("general_6x768", (6, 768, 12, 3072))]
)
def test_the_papers_students(name, shape):
    """Jiao et al. 2019, section 4.1: bert-base into 4 x 312 (g(m) = 3m) and 6 x 768 (g(m) = 2m)."""
    config = load_config(RunConfig, FOLDER / f"{name}.yaml")
    (student,) = config.students
    assert (student.layers, student.hidden_size, student.heads, student.intermediate_size) == shape
    assert config.teacher.model == "bert-base-uncased" and config.train.epochs == 3
    assert student.layer_map in ("uniform", [12 // student.layers * m for m in range(1, student.layers + 1)])
