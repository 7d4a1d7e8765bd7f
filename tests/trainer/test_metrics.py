"""Metrics against scikit-learn and scipy, and by hand where nothing is defined."""

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics as reference

from sharding.manifest import TaskInfo
from trainer.metrics import chance, doubt, score

TWO = TaskInfo("two", "classification", ("no", "yes"), ("f1", "accuracy", "matthews"))
FOUR = TaskInfo("four", "classification", ("a", "b", "c", "d"), ("matthews", "accuracy"))
VALUE = TaskInfo("value", "regression", (), ("pearson", "spearman"))
SPANS = TaskInfo("spans", "spans", (), ("exact",))


@pytest.mark.parametrize("task", [TWO, FOUR])
def test_classes_against_scikit_learn(task: TaskInfo) -> None:
    random = np.random.default_rng(0)
    labels = random.integers(0, len(task.labels), (300, 1)).astype(np.float32)
    logits = random.normal(size=(300, len(task.labels))).astype(np.float32)
    logits[np.arange(300), labels[:, 0].astype(int)] += 1
    predicted = logits.argmax(axis=1)
    expected = {
        "accuracy": reference.accuracy_score(labels[:, 0], predicted),
        "matthews": reference.matthews_corrcoef(labels[:, 0], predicted),
    }
    if task is TWO:
        expected["f1"] = reference.f1_score(labels[:, 0], predicted)
    found = score(task, logits, labels)
    assert list(found) == list(task.metrics)
    assert found == pytest.approx(expected, abs=1e-6)


def test_f1_is_of_the_published_class_in_whatever_order_they_are() -> None:
    random = np.random.default_rng(1)
    labels = random.integers(0, 2, (100, 1)).astype(np.float32)
    logits = random.normal(size=(100, 2)).astype(np.float32)
    as_published, turned = (
        TaskInfo("mrpc", "classification", names, ("f1",))
        for names in (("not_equivalent", "equivalent"), ("equivalent", "not_equivalent"))
    )
    expected = reference.f1_score(labels[:, 0], logits.argmax(axis=1))
    assert score(as_published, logits, labels)["f1"] == pytest.approx(expected)
    assert score(turned, logits[:, ::-1].copy(), 1 - labels)["f1"] == pytest.approx(expected)


def test_classes_in_another_order_are_seen_though_the_score_beats_a_constant() -> None:
    """Nine in ten right, two of three classes exchanged: a third is still right, and more."""
    random = np.random.default_rng(2)
    task = TaskInfo("mnli", "classification", ("entailment", "neutral", "contradiction"), ("accuracy",))
    labels = random.integers(0, 3, (2000, 1)).astype(np.float32)
    right = (random.random(2000) < 0.85) | (labels[:, 0] == 0)
    answers = np.where(right, labels[:, 0], random.integers(0, 3, 2000)).astype(int)
    logits = np.eye(3, dtype=np.float32)[answers]
    assert doubt(task, logits, labels) is None
    exchanged = doubt(task, logits[:, [0, 2, 1]], labels)
    assert exchanged is not None and "entailment, contradiction, neutral" in exchanged
    assert score(task, logits[:, [0, 2, 1]], labels)["accuracy"] > chance(task, labels)
    weak = np.eye(3, dtype=np.float32)[np.where(random.random(2000) < 0.1, labels[:, 0], 0).astype(int)]
    assert doubt(task, weak, labels) is None, "poor, but in order"
    assert "of a constant answer" in str(
        doubt(task, np.eye(3, dtype=np.float32)[np.zeros(2000, int)], labels)
    )


def test_correlations_against_scipy_with_ties() -> None:
    random = np.random.default_rng(0)
    labels = random.integers(0, 11, (200, 1)).astype(np.float32) / 2
    logits = (labels + random.normal(size=(200, 1))).round(1).astype(np.float32)
    found = score(VALUE, logits, labels)
    assert found["pearson"] == pytest.approx(stats.pearsonr(logits[:, 0], labels[:, 0])[0], abs=1e-6)
    assert found["spearman"] == pytest.approx(stats.spearmanr(logits[:, 0], labels[:, 0])[0], abs=1e-6)


def test_spans_by_hand() -> None:
    labels = np.array([[2, 3], [0, 0], [1, 1]], np.float32)
    logits = np.zeros((3, 5, 2), np.float32)
    for row, (first, last) in enumerate([(2, 3), (0, 0), (1, 2)]):
        logits[row, first, 0] = logits[row, last, 1] = 1
    assert score(SPANS, logits, labels) == {"exact": pytest.approx(2 / 3)}
    assert chance(SPANS, labels) == pytest.approx(1 / 3)


def test_constant_predictions_are_zero_where_nothing_is_defined() -> None:
    labels = np.array([[0], [1], [1], [1]], np.float32)
    always_no = np.tile(np.array([1, 0], np.float32), (4, 1))
    assert score(TWO, always_no, labels) == {"f1": 0.0, "accuracy": 0.25, "matthews": 0.0}
    assert score(TWO, always_no, np.zeros((4, 1), np.float32))["f1"] == 0.0
    for constant in (0.0, 0.1):
        logits = np.full((4, 1), constant, np.float32)
        assert score(VALUE, logits, labels) == {"pearson": 0.0, "spearman": 0.0}


def test_chance_is_the_best_constant() -> None:
    labels = np.array([[0], [1], [1], [1]], np.float32)
    assert chance(TWO, labels) == pytest.approx(2 * 0.75 / 1.75)  # F1 of "yes" throughout
    accuracy = TaskInfo("four", "classification", FOUR.labels, ("accuracy",))
    assert chance(accuracy, np.array([[3], [3], [2], [0]], np.float32)) == 0.5
    assert chance(FOUR, labels) == 0.0 and chance(VALUE, labels) == 0.0


@pytest.mark.parametrize(
    ("task", "logits", "labels"),
    [
        (TWO, (4, 3), (4, 1)),
        (TWO, (3, 2), (4, 1)),
        (VALUE, (4, 2), (4, 1)),
        (SPANS, (4, 8, 2), (4, 1)),
        (SPANS, (4, 2), (4, 2)),
    ],
)
def test_arrays_that_do_not_fit(task: TaskInfo, logits: tuple, labels: tuple) -> None:
    with pytest.raises(ValueError, match=f"do not fit task={task.name}"):
        score(task, np.zeros(logits, np.float32), np.zeros(labels, np.float32))


@pytest.mark.parametrize(("kind", "metric"), [("classification", "pearson"), ("regression", "accuracy")])
def test_metrics_of_another_kind(kind: str, metric: str) -> None:
    task = TaskInfo("t", kind, ("a", "b"), (metric,))
    with pytest.raises(ValueError, match=f"metrics=\\['{metric}'\\]: task=t .* is judged by"):
        score(task, np.zeros((2, 2), np.float32), np.zeros((2, 1), np.float32))
    three = TaskInfo("t", "classification", ("a", "b", "c"), ("f1",))
    with pytest.raises(ValueError, match="f1: of two classes"):
        score(three, np.zeros((2, 3), np.float32), np.zeros((2, 1), np.float32))
