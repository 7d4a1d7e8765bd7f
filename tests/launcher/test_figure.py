"""What figures share: colours that follow the page's, labels that do not meet, points as means."""

import random
import re

import pytest
from matplotlib.figure import Figure

from launcher import figure as figures
from launcher.figure import COLOURS, INK, apart, binned, count, drawn, label_ends, new, number, render
from tests.launcher.looks import assert_readable

ENDS = [(1.0, "one", COLOURS[0]), (1.01, "two", COLOURS[1]), (1.02, "three", COLOURS[2]), (5.0, "far", INK)]


def lines(wide: bool) -> Figure:
    figure = new(6.0 if wide else 3.5, 3.0)
    axes = figure.add_subplot()
    for y, _, colour in ENDS:
        axes.plot([0, 1], [y + 1, y], color=colour)
    label_ends(axes, ENDS, 0.08)
    return figure


def test_an_svg_has_the_pages_colours_by_day_and_by_night_and_is_the_same_every_time() -> None:
    svg = render(drawn(lines, True), "svg")
    assert svg == render(drawn(lines, True), "svg")
    assert b"prefers-color-scheme:dark" in svg and b"stroke: var(--c0072b2)" in svg
    assert b"--c0072b2:#0072b2" in svg and b"--c0072b2:#4aa8e0" in svg
    assert render(drawn(lines, True), "png").startswith(b"\x89PNG")


def test_a_heat_map_is_the_same_by_day_and_by_night() -> None:
    def heat(wide: bool) -> Figure:
        figure = new(4.0, 3.0)
        cells = [[row * 16 + column for column in range(16)] for row in range(16)]
        figure.add_subplot().pcolormesh(cells, cmap=figures.HEAT)  # all of its 256 colours
        return figure

    svg = render(drawn(heat, True), "svg").decode()
    assert len(re.findall("fill: #", svg)) == 256 and "fill: var(" in svg, "of cells, and of text"


@pytest.mark.parametrize("wide", [True, False])
def test_labels_of_lines_that_end_together_do_not_meet(wide: bool) -> None:
    figure = drawn(lines, wide)
    assert_readable(figure)
    assert {text.get_text() for text in figure.axes[0].texts} == {"one", "two", "three", "far"}


def test_of_labels_that_do_not_fit_the_first_and_the_last_stay() -> None:
    axes = new(3.0, 2.0).add_subplot()
    axes.plot([0, 1], [0, 20])
    label_ends(axes, [(float(y), str(y), INK) for y in range(20)], 0.1)
    assert [text.get_text() for text in axes.texts] == ["0", "19"]


def test_places_are_moved_apart_in_order_and_only_where_they_must() -> None:
    assert apart([0.1, 0.5, 0.9], 0.1) == [0.1, 0.5, 0.9]
    for seed in range(50):
        some = sorted(random.Random(seed).random() for _ in range(8))
        moved = apart(some, 0.1)
        assert all(b - a >= 0.1 - 1e-9 for a, b in zip(moved, moved[1:], strict=False)) and moved[-1] <= 1


def test_many_points_become_means_over_neighbours() -> None:
    x, y = binned(range(1000), [float(value % 10) for value in range(1000)], most=100)
    assert len(x) == 100 and x[:2] == [4.5, 14.5] and set(y) == {4.5}
    assert binned([1, 2], [3.0, 4.0]) == ([1, 2], [3.0, 4.0])


def test_numbers_on_axes() -> None:
    assert [count(value) for value in (45, 1200, 3.5e6, 2e9)] == ["45", "1.2k", "3.5M", "2B"]
    assert [number(value) for value in (0, 0.25, 2e-5, 3e6)] == ["0", "0.25", "2e-5", "3e+06"]
    assert len(figures.ramp(12)) == len(set(figures.ramp(12))) == 12
