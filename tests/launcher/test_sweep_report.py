"""The report of a sweep against its trials: the best, the front, every line of the parallel coordinates."""

import json
import math
import random
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from launcher import report, sweep_figures
from launcher.figure import drawn
from launcher.sweep_figures import dimension
from launcher.sweep_record import TRIALS, Sweep, short_names
from launcher.sweep_report import verdict
from tests.launcher.looks import assert_needs_nothing_else, assert_readable

RATE, KIND, DEPTH = "students.0.optimizer.lr", "students.0.projection", "students.0.layers"
OBJECTIVES = [
    {"metric": "score/accuracy", "direction": "maximize"},
    {"metric": "latency_ms", "direction": "minimize"},
]


def trial(number: int, state: str = "complete", **changes: Any) -> dict[str, Any]:
    """As launcher/sweep.py writes it; the numbers are drawn, but always the same."""
    dice = random.Random(number)
    settings = {RATE: 10 ** dice.uniform(-5, -2), KIND: dice.choice(["shared", "separate"]), "train.seed": 0}
    settings[DEPTH] = dice.choice([2, 4, 6])
    score = 0.7 + 0.03 * settings[DEPTH] + 0.01 * dice.random()
    made = {
        "number": number,
        "state": state,
        "settings": settings,
        "values": [score, 2.0 * settings[DEPTH] + dice.random()] if state == "complete" else [],
        "seconds": 60.0 * (number + 1),
        "folder": f"trials/{number:04d}",
        "student": None,
        "error": "out of memory" if state == "failed" else "",
        "reported": {str(step): score - 0.1 / (1 + step) for step in range(0, 50, 10)},
    }
    return {**made, **changes}


def write_sweep(folder: Path, trials: list[dict[str, Any]], objectives: list[dict[str, str]]) -> Sweep:
    """The sweep's folder, read."""
    tree = {"name": "students", "objectives": objectives, "keys": [], "best": [], "trials": trials}
    (folder / TRIALS).write_text(json.dumps(tree))
    return Sweep.read(folder)


@pytest.fixture
def sweep(tmp_path: Path) -> Sweep:
    trials = [trial(number) for number in range(12)]
    trials += [trial(12, "failed"), trial(13, "pruned", values=[0.5]), trial(14, "running", seconds=None)]
    return write_sweep(tmp_path, trials, OBJECTIVES)


def test_the_verdict_names_the_best_trial_with_its_settings_and_the_front(
    sweep: Sweep, tmp_path: Path
) -> None:
    best = max(range(12), key=lambda number: trial(number)["values"][0])
    made, said = trial(best), verdict(sweep)
    assert f"**Trial {best}** has the best score/accuracy of 12, **{made['values'][0]:.4g}**" in said
    assert f"lr {made['settings'][RATE]:.4g}" in said and f"projection {made['settings'][KIND]}" in said
    assert "seed" not in said, "it is the same in all"
    page = assert_needs_nothing_else(report.made(tmp_path))
    assert said.replace("**", "") in " ".join(page.words.split()).replace(" ,", ",").replace(" .", ".")
    assert (
        "12 complete, 1 failed, 1 pruned, 1 running" in page.words and "failed: out of memory" in page.words
    )
    assert f"lr is {RATE}" in page.words and "train.seed is 0 in all" in page.words
    assert len(page.figures()) == 2 * 4, "all trials, the front, training, one after the other"


def test_the_front_is_what_no_other_trial_beats(sweep: Sweep) -> None:
    values = {number: trial(number)["values"] for number in range(12)}

    def beats(a: int, b: int) -> bool:
        (score, ms), (other_score, other_ms) = values[a], values[b]
        return score >= other_score and ms <= other_ms and (score, ms) != (other_score, other_ms)

    expected = [b for b in values if not any(beats(a, b) for a in values)]
    assert [own.number for own in sweep.front] == expected and 1 < len(expected) < 12
    (axes,) = drawn(partial(sweep_figures.draw_front, sweep), True).axes
    corners = {(x, y) for x, y in zip(*axes.lines[-1].get_data(), strict=True)}
    assert corners == {(values[number][1], values[number][0]) for number in expected}
    assert {text.get_text() for text in axes.texts} <= {str(number) for number in expected}
    line = axes.lines[-2]  # steps: nothing above it is reached by any trial
    assert line.get_drawstyle() == "steps-post"


def test_every_trial_is_a_line_through_its_settings_and_outcomes(sweep: Sweep) -> None:
    (axes,) = drawn(partial(sweep_figures.draw_parallel, sweep), True).axes
    lines = [line for line in axes.lines if line.get_color() not in ("#5b6775", "#1b2430")]
    assert len(lines) == 15
    rates = [math.log10(trial(number)["settings"][RATE]) for number in range(15)]
    place = list(sweep.varied).index(RATE)
    heights = [float(line.get_ydata()[place]) for line in lines]
    expected = [(rate - min(rates)) / (max(rates) - min(rates)) for rate in rates]
    assert heights == pytest.approx(expected, abs=1e-9), "a logarithmic axis"
    assert [len(line.get_xdata()) for line in lines] == [5] * 12 + [3] * 3, "without an outcome, it ends"
    assert [text.get_text() for text in axes.texts if text.get_text() in ("shared", "separate")]


@pytest.mark.parametrize("wide", [True, False])
def test_the_figures_can_be_read(sweep: Sweep, wide: bool) -> None:
    for name in ("parallel", "front", "reported", "history"):
        assert_readable(drawn(partial(getattr(sweep_figures, f"draw_{name}"), sweep), wide))


def test_the_best_so_far_never_gets_worse(sweep: Sweep) -> None:
    more, less = drawn(partial(sweep_figures.draw_history, sweep), True).axes
    for axes, objective, sign in ((more, 0, 1), (less, 1, -1)):
        dots, best, crosses = axes.lines
        values = [trial(number)["values"][objective] for number in range(12)]
        assert dots.get_ydata().tolist() == values
        expected = [sign * max(sign * value for value in values[: end + 1]) for end in range(12)]
        assert best.get_ydata().tolist() == expected
        assert crosses.get_xdata().tolist() == [12, 13]


def test_axes_fit_their_values() -> None:
    wide = dimension("lr", [1e-5, 1e-2, 3e-4, 2e-4, 1e-4, 5e-5, 7e-5])
    assert [text for _, text in wide.ticks] == ["1e-05", "0.01", "0.0001", "0.001"]
    assert wide.place(1e-3) == pytest.approx(2 / 3)
    few = dimension("layers", [6, 2, 4, 6])
    assert few.ticks == [(0.0, "2"), (0.5, "4"), (1.0, "6")]
    lists = dimension("layer_map", [[3, 6, 9, 12], [1, 4, 8, 12], [3, 6, 9, 12]])
    assert lists.place([1, 4, 8, 12]) == 0 and lists.place([3, 6, 9, 12]) == 1 and len(lists.ticks) == 2
    named = dimension("projection", ["shared", None, "separate"])
    assert [text for _, text in named.ticks] == ["None", "separate", "shared"] and named.place("shared") == 1
    assert dimension("flag", [True, False]).place(True) == 1


def test_names_are_as_short_as_tells_them_apart() -> None:
    keys = ["students.0.optimizer.lr", "students.1.optimizer.lr", "train.seed"]
    assert list(short_names(keys).values()) == ["0.optimizer.lr", "1.optimizer.lr", "seed"]


def test_a_sweep_without_outcomes_yet_and_one_of_a_single_objective(tmp_path: Path) -> None:
    write_sweep(tmp_path, [trial(0, "running"), trial(1, "failed")], OBJECTIVES)
    page = assert_needs_nothing_else(report.made(tmp_path))
    assert "No trial has an outcome yet: 1 failed, 1 running" in page.words and not page.figures()
    alone = [trial(0, values=[0.5], reported={}), trial(1, values=[0.25], reported={})]
    sweep = write_sweep(tmp_path, alone, [{"metric": "heldout/total", "direction": "minimize"}])
    assert sweep.best is not None and sweep.best.number == 1
    assert len(assert_needs_nothing_else(report.made(tmp_path)).figures()) == 2 * 2


def test_a_file_that_lists_no_trials_is_refused_with_a_way_out(tmp_path: Path) -> None:
    (tmp_path / TRIALS).write_text('{"name": "x"}')
    with pytest.raises(ValueError, match="does not list a sweep's trials.*start launcher/sweep.py again"):
        report.made(tmp_path)
