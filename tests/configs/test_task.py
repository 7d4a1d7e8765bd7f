"""The stages of a task: their runs, and what is wrong with them, said by the task's own keys."""

import pytest

from configs.load import ConfigError, from_dict
from configs.task import STAGES, TRAINING, corpus_of, stage_config
from configs.task_schema import TaskConfig

SHAPE = {"layers": 2, "hidden_size": 8, "heads": 2, "intermediate_size": 16}
TREE = {
    "task": "sst2",
    "output": "runs/sst2",
    "source": {"path": "glue"},
    "teacher": {"model": "bert"},
    "students": [{"name": "s", "init": "general", "losses": {"attention": 0.5}, **SHAPE}],
    "seed": 3,
}


def task(**changes) -> TaskConfig:
    return from_dict(TaskConfig, TREE | changes)


def test_the_stages_follow_from_each_other():
    config = task()
    runs = {stage: stage_config(config, stage, config.students) for stage in TRAINING}
    assert set(TRAINING) < set(STAGES) and {run.output for run in runs.values()} == {
        f"runs/sst2/{stage}" for stage in TRAINING
    }
    assert runs["teacher"].teacher.model == runs["baseline"].teacher.model == "bert"
    assert runs["intermediate"].teacher.model == "runs/sst2/teacher/export/teacher"
    assert runs["prediction"].teacher.logits_folder == "runs/sst2/teacher_logits"
    assert runs["teacher"].data.corpus == corpus_of(config) == "runs/sst2/data"
    assert runs["prediction"].data.corpus == "runs/sst2/augmented"  # as published
    starts = {stage: run.students[0].init for stage, run in runs.items()}
    assert starts["intermediate"] == starts["baseline"] == "general"
    assert starts["prediction"] == "runs/sst2/intermediate/export/s"
    learned = {stage: run.students[0].losses for stage, run in runs.items()}
    assert (learned["intermediate"].attention, learned["intermediate"].logits) == (0.5, 0.0)
    assert (learned["prediction"].attention, learned["prediction"].logits) == (0.0, 1.0)
    assert (learned["baseline"].labels, learned["teacher"].hidden) == (1.0, 0.0)
    assert {run.train.seed for run in runs.values()} == {3}
    assert runs["prediction"].tracking.tags == {"stage": "prediction", "task": "sst2"}


def test_what_is_shared_between_seeds_can_lie_elsewhere():
    config = task(corpus="c", augmented="a", finetuned="t", start="init")
    own = stage_config(config, "prediction", config.students)
    assert (own.data.corpus, own.teacher.model, own.students[0].init) == ("a", "t", "general")


def test_all_problems_come_at_once_by_the_tasks_own_keys():
    changes = {
        "task": "mine",
        "kind": "classification",
        "prediction": {"epochs": 0, "losses": {"logits": -1}},
        "intermediate": {"epochs": 2, "optimizer": {"lr": 0}},
        "fine_tuning": {"epochs": None, "steps": None},
        "augmentation": {"probability": 1.5, "candidates": 0},
        "data": {"corpus": "x"},
    }
    with pytest.raises(ConfigError) as found:
        task(**changes)
    for problem in (
        "source.columns must be set",
        "labels must be set",
        "prediction.epochs=0",
        "prediction.losses.logits=-1",
        "intermediate.optimizer.lr=0",
        "fine_tuning.epochs=None and fine_tuning.steps=None",
        "augmentation.probability=1.5",
        "augmentation.candidates=0",
        "data.corpus and data.mixture follow from the stage",
    ):
        assert problem in str(found.value)
    assert len(set(found.value.problems)) == len(found.value.problems)
