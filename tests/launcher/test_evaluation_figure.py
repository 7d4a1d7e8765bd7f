"""The figures show every model and form at its place, and what each keeps of every task."""

from dataclasses import replace
from functools import partial

import pytest

from launcher.evaluation_figure import draw, draw_retention
from launcher.figure import drawn
from tests.launcher.looks import assert_readable
from tests.launcher.made_results import made_results


def test_every_model_is_drawn_at_its_latency_and_share() -> None:
    figure = drawn(partial(draw, made_results()), wide=True)
    (axes,) = figure.axes
    points = {
        (float(container.lines[0].get_xdata()[0]), round(float(container.lines[0].get_ydata()[0]), 1))
        for container in axes.containers
    }
    assert points == {(90.0, 100.0), (80.0, 100.0), (12.0, 98.0), (9.0, 98.0), (4.0, 95.3), (12.0, 82.2)}
    named = [text.get_text() for text in figure.legends[0].get_texts()]
    assert named == ["teacher", "student", "finetuned", "PyTorch", "ONNX", "ONNX int8", "aim 96%"]
    assert axes.get_xscale() == "log" and "1 row of 128 tokens" in axes.get_xlabel()


def test_a_bar_is_the_mean_share_of_a_task_and_has_the_seeds_spread() -> None:
    figure = drawn(partial(draw_retention, made_results()), wide=True)
    (axes,) = figure.axes
    bars = sorted(round(bar.get_width(), 1) for bar in axes.patches)
    assert bars == sorted([98.9, 96.4, 98.8, 88.0, 78.6, 80.0])  # 91 of 92, 81 of 84, 79 of 80; 81, 66, 64
    assert [label.get_text() for label in axes.get_yticklabels()] == ["sst2", "mnli", "mnli mismatched"]
    whiskers = [line.get_segments()[0] for line in axes.collections]
    assert len(whiskers) == 4, "where there are several seeds"
    assert {round(float(ends[1][0] - ends[0][0]), 2) for ends in whiskers} == {2.17, 2.38, 2.5, 3.07}
    assert {"98.9%", "78.6%"} <= {text.get_text() for text in axes.texts}


def test_an_arm_of_one_task_stands_with_that_task_alone() -> None:
    """Its mean is of other things than the means of the others."""
    results = made_results()
    column = results.columns[1].name
    scores = {"pytorch": {column: results.arms[0].scores["pytorch"][column]}}
    partly = replace(results.arms[0], name="without_hidden", scores=scores)
    results = replace(results, arms=[*results.arms, partly])
    figure = drawn(partial(draw, results), wide=True)
    assert "without_hidden" not in [text.get_text() for text in figure.legends[0].get_texts()]
    (axes,) = drawn(partial(draw_retention, results), wide=True).axes
    places = sorted(round(bar.get_y() + bar.get_height() / 2, 6) for bar in axes.patches)
    assert places == [0, 1, 3, 4, 5, 7, 8] and list(axes.get_yticks()) == [0.5, 4, 7.5]


@pytest.mark.parametrize("wide", [True, False])
@pytest.mark.parametrize("figure", [draw, draw_retention])
def test_the_figures_can_be_read(figure: object, wide: bool) -> None:
    assert callable(figure)
    assert_readable(drawn(partial(figure, made_results()), wide))
