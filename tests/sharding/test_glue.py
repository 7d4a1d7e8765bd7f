"""The known tasks, and what a config may change of them."""

import pytest

import configs.task
from configs.task_schema import TaskConfig, TaskKind, TaskSourceConfig
from sharding.glue import METRICS, TASKS, task_of
from sharding.manifest import CorpusError, TaskInfo

GLUE = ["cola", "mnli", "mrpc", "qnli", "qqp", "rte", "sst2", "stsb", "wnli"]


def config(task: str, columns: list[str] | None = None, **keys: object) -> TaskConfig:
    return TaskConfig(task=task, source=TaskSourceConfig(columns=columns), **keys)  # type: ignore[arg-type]


def test_the_nine_tasks_and_squad() -> None:
    assert sorted(TASKS) == sorted([*GLUE, "squad"])
    for task in TASKS.values():
        assert set(task.metrics) <= set(METRICS[task.kind.value])
        assert bool(task.labels) == (task.kind is TaskKind.classification)
        assert all(len(columns) == len(task.columns[0]) for columns in task.columns)
    assert TASKS["mnli"].labels == ("entailment", "neutral", "contradiction")
    assert task_of(config("mrpc")).info == TaskInfo(
        "mrpc", "classification", ("not_equivalent", "equivalent"), ("f1", "accuracy")
    )


def test_the_same_names_in_another_order_leave_numbers_as_they_are() -> None:
    task = task_of(config("mnli", labels=["contradiction", "entailment", "neutral"]))
    assert task.labels[0] == "contradiction" and task.numbers[0] == "entailment"
    renamed = task_of(config("rte", labels=["LABEL_0", "LABEL_1"]))
    assert renamed.numbers == renamed.labels == ("LABEL_0", "LABEL_1")


def test_a_task_of_ones_own() -> None:
    keys = {"kind": TaskKind.classification, "labels": ["x", "y", "z"], "metrics": ["matthews"]}
    task = task_of(config("topics", ["title", "body"], **keys))
    assert task.info == TaskInfo("topics", "classification", ("x", "y", "z"), ("matthews",))
    assert task.columns == (("title", "body"),) and task.label == ("label",)
    assert task_of(config("grades", ["text"], kind=TaskKind.regression)).metrics == ("pearson",)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"task": "topics"}, "task=topics is none of .*needs kind, source.columns"),
        (
            {"task": "topics", "columns": ["text"], "kind": TaskKind.classification},
            "of your own needs labels",
        ),
        ({"task": "sst2", "kind": TaskKind.regression}, "kind=regression: task=sst2 is classification"),
        ({"task": "sst2", "labels": ["a", "b", "c"]}, "are not 2 different names"),
        ({"task": "sst2", "labels": ["a", "a"]}, "are not 2 different names"),
        ({"task": "stsb", "labels": ["a", "b"]}, "has no classes"),
        ({"task": "stsb", "metrics": ["accuracy"]}, "regression is judged by pearson, spearman"),
        ({"task": "sst2", "columns": ["a", "b", "c"]}, "a row holds one text or two"),
        (
            {"task": "t", "columns": ["a"], "kind": TaskKind.regression, "labels": ["x"]},
            "kind=regression has no classes",
        ),
    ],
)
def test_what_does_not_fit_is_named(keys: dict, message: str) -> None:
    with pytest.raises(CorpusError, match=message):
        task_of(config(**keys))


def test_the_config_knows_the_same_tasks_by_name():
    assert set(configs.task.TASKS) == set(TASKS)
