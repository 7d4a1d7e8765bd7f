"""What follows from scores, against numbers worked out by hand."""

import json
from dataclasses import replace

import pytest

from launcher.results import deviation
from tests.launcher.made_results import MISMATCHED, MNLI, SST2, made_results


def test_columns_of_one_task_are_kept_apart() -> None:
    assert [column.name for column in (SST2, MNLI, MISMATCHED)] == ["sst2", "mnli", "mnli mismatched"]


def test_what_is_kept_is_the_mean_of_the_columns_shares() -> None:
    results = made_results()
    student, finetuned = results.arms
    kept = results.kept(student, "pytorch")
    assert kept is not None
    assert kept.mean == pytest.approx((0.91 / 0.92 + 0.81 / 0.84 + 0.79 / 0.80) / 3)
    assert kept.of_mean_score == pytest.approx((0.91 + 0.81 + 0.79) / (0.92 + 0.84 + 0.80))
    # Three seeds one point apart: a standard deviation of a point in each column.
    assert kept.spread == pytest.approx(0.01 * (0.92**-2 + 0.84**-2 + 0.80**-2) ** 0.5 / 3)
    assert kept.columns == 3
    other = results.kept(finetuned, "pytorch")
    assert other is not None and other.spread is None  # mnli has one seed
    assert results.kept(finetuned, "int8") is None


def test_deviation_is_that_of_a_sample() -> None:
    assert deviation([1.0]) is None
    assert deviation([1.0, 3.0]) == pytest.approx(2**0.5)


def test_the_fastest_that_reaches_the_aim_is_taken_and_otherwise_the_best() -> None:
    results = made_results()
    choice = results.choice()
    assert choice is not None and (choice.arm.name, choice.form, choice.reaches_aim) == (
        "student",
        "onnx",
        True,
    )
    lower = replace(results, aim=0.95).choice()
    assert lower is not None and (lower.form, lower.reaches_aim) == ("int8", True)
    higher = replace(results, aim=0.99).choice()
    assert higher is not None and not higher.reaches_aim and higher.form in ("pytorch", "onnx")


def test_only_what_is_to_be_shipped_and_was_scored_everywhere_is_taken() -> None:
    results = made_results()
    baseline = replace(results, ship=["finetuned"]).choice()
    assert baseline is not None and baseline.arm.name == "finetuned"
    student = results.arms[0]
    partly = {form: {"sst2": columns["sst2"]} for form, columns in student.scores.items()}
    assert replace(results, arms=[replace(student, scores=partly)]).choice() is None


def test_of_equally_fast_ones_the_better_is_taken() -> None:
    results = replace(made_results(), aim=0.5, ship=["finetuned", "student"])
    slower = replace(results.arms[0], timings=results.arms[1].timings)  # PyTorch alone
    choice = replace(results, arms=[results.arms[1], slower]).choice()
    assert choice is not None and choice.arm.name == "student"


def test_everything_goes_into_json() -> None:
    found = json.loads(json.dumps(made_results().to_dict()))
    assert found["choice"] == {"arm": "student", "form": "onnx", "aim": True}
    assert found["kept"]["student"]["int8"]["columns"] == 3
    assert found["arms"][0]["scores"]["pytorch"]["mnli mismatched"][2]["accuracy"] == 0.8
