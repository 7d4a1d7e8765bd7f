"""The figures of a sweep: all trials' settings and outcomes at once, the Pareto front, the best so far."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from launcher.figure import (
    COLOURS,
    INK,
    PALE,
    PAPER,
    SOFT,
    binned,
    log_if_wide,
    new,
    number,
    panels,
    shade,
)
from launcher.sweep_record import Objective, Sweep, Trial, short_names

MAX_TICKS = 6
"""On an axis of parallel coordinates; fewer values are all named."""


@dataclass(frozen=True)
class Dimension:
    """An axis of parallel coordinates."""

    name: str
    place: Callable[[Any], float]
    """Where on it, from 0 to 1, a value lies."""
    ticks: list[tuple[float, str]]


def dimension(name: str, values: Sequence[Any]) -> Dimension:
    """Return the axis for these values: numbers, logarithmic where they span a decade or more, or names."""
    if any(isinstance(value, bool) or not isinstance(value, int | float) for value in values):
        names = sorted({str(value) for value in values})
        places = {
            own: 0.5 if len(names) == 1 else index / (len(names) - 1) for index, own in enumerate(names)
        }
        return Dimension(name, lambda value: places[str(value)], [(places[own], own) for own in names])
    low, high = float(min(values)), float(max(values))
    logarithmic = low > 0 and high >= 10 * low
    scale: Callable[[float], float] = math.log10 if logarithmic else float
    span = scale(high) - scale(low) or 1.0

    def place(value: float) -> float:
        return (scale(value) - scale(low)) / span

    ticks = sorted({float(value) for value in values})
    if len(ticks) > MAX_TICKS and logarithmic:
        decades = range(math.ceil(math.log10(low)), math.floor(math.log10(high)) + 1)
        ends = (low, high)
        ticks = [
            *ends,
            *(10.0**e for e in decades if all(abs(place(10.0**e) - place(x)) > 0.1 for x in ends)),
        ]
    elif len(ticks) > MAX_TICKS:
        ticks = [value for value in MaxNLocator(4).tick_values(low, high) if low <= value <= high]
    return Dimension(name, place, [(place(value), f"{value:.3g}") for value in ticks])


def draw_parallel(sweep: Sweep, wide: bool) -> Figure:
    """Draw every trial as a line through its settings to its outcomes, coloured by the first objective.

    The best is drawn thick; trials without an outcome are pale and end at their settings.
    """
    first, done, best = sweep.objectives[0].metric, sweep.done, sweep.best
    outcomes = {own.metric: f"{own.metric} {own.arrow}" for own in sweep.objectives}
    names = {**short_names(sweep.varied), **outcomes}
    lines = {trial.number: dict(trial.settings) for trial in sweep.trials}
    for trial in done:
        lines[trial.number] |= {metric: trial.values[metric] for metric in outcomes}
    axis_of = {
        key: dimension(name, [line[key] for line in lines.values() if key in line])
        for key, name in names.items()
    }
    figure = new(9.6, 4.0) if wide else new(4.3, 0.4 + 0.95 * len(names))
    axes = figure.add_subplot()
    axes.set_axis_off()
    for trial in sweep.trials:
        line = lines[trial.number]
        points = [
            (place, own.place(line[key])) for place, (key, own) in enumerate(axis_of.items()) if key in line
        ]
        style: dict[str, Any] = {"color": PALE, "linewidth": 0.8, "linestyle": "--", "zorder": 1}
        if trial in done:
            colour = shade(axis_of[first].place(trial.values[first]))
            style = {"color": colour, "linewidth": 1.4, "alpha": 0.85}
        if trial is best:
            axes.plot(*_turned(points, wide), color=INK, linewidth=5, zorder=3)
            style |= {"linewidth": 2.5, "alpha": 1.0, "zorder": 4}
        axes.plot(*_turned(points, wide), **style)
    for place, own in enumerate(axis_of.values()):
        _axis(axes, own, place, wide)
    axes.set_xlim(*((-0.3, len(names) - 0.8) if wide else (-0.08, 1.08)))
    axes.set_ylim(*((-0.08, 1.12) if wide else (len(names) - 0.6, -0.5)))
    return figure


def _turned(points: Sequence[tuple[float, float]], wide: bool) -> tuple[list[float], list[float]]:
    """Axes stand side by side on a wide page, and lie one beneath the other on a narrow one."""
    along, across = [place for place, _ in points], [value for _, value in points]
    return (along, across) if wide else (across, along)


def _axis(axes: Axes, own: Dimension, index: int, wide: bool) -> None:
    axes.plot(*_turned([(index, 0.0), (index, 1.0)], wide), color=SOFT, linewidth=1.2, zorder=2)
    box = {"facecolor": PAPER, "edgecolor": "none", "alpha": 0.75, "pad": 0.8}
    for place, text in own.ticks:
        if wide:
            axes.text(
                index - 0.03, place, text, ha="right", va="center", fontsize=8, color=INK, bbox=box, zorder=5
            )
        else:
            axes.text(
                place, index + 0.09, text, ha="center", va="top", fontsize=7.5, color=INK, bbox=box, zorder=5
            )
    if wide:
        axes.text(index, 1.06, own.name, ha="center", va="bottom", fontsize=9, weight="bold")
    else:
        axes.text(
            0, index - 0.12, own.name, ha="left", va="bottom", fontsize=8.5, weight="bold", bbox=box, zorder=5
        )


def draw_front(sweep: Sweep, wide: bool) -> Figure:
    """Draw the trials by their first two objectives; those that no other beats in both are joined."""
    figure, (axes,) = panels(wide, 1, 1, 4.0)
    first, second = sweep.objectives[:2]

    def place(trial: Trial) -> tuple[float, float]:
        return trial.values[second.metric], trial.values[first.metric]

    front = sorted(sweep.front, key=place)
    others = [place(trial) for trial in sweep.done if trial not in front]
    if others:
        axes.plot(*zip(*others, strict=True), "o", color=PALE, markersize=6)
    points = [place(trial) for trial in front]
    where: Literal["pre", "post"]
    where = "post" if (first.direction == "maximize") == (second.direction == "minimize") else "pre"
    axes.step(*zip(*points, strict=True), where=where, color=COLOURS[0], linewidth=1.2, alpha=0.6)
    axes.plot(*zip(*points, strict=True), "o", color=COLOURS[0], markersize=8, markeredgecolor=PAPER)
    axes.margins(0.08)
    axes.autoscale_view()
    labelled = np.array([[-1.0, -1.0]])
    for trial in reversed(front):
        at = axes.transAxes.inverted().transform(axes.transData.transform(place(trial)))
        if np.abs(labelled - at).max(axis=1).min() < 0.06:
            continue  # its label would lie on another's; the table names all
        labelled = np.vstack([labelled, at])
        axes.annotate(
            f"{trial.number}",
            place(trial),
            xytext=(6, 5),
            textcoords="offset points",
            fontsize=8.5,
            color=COLOURS[0],
        )
    for axis, objective in ((axes.xaxis, second), (axes.yaxis, first)):
        axis.set_label_text(objective.in_words)
        axis.set_major_formatter(number)
    return figure


def draw_history(sweep: Sweep, wide: bool) -> Figure:
    """Draw every objective by the trials' numbers, and its best so far; crosses are trials that failed or
    were pruned."""
    figure, axes_of = panels(wide, len(sweep.objectives), 2, 2.9)
    lost = [trial.number for trial in sweep.trials if trial.state in ("failed", "pruned")]
    for objective, axes in zip(sweep.objectives, axes_of, strict=True):
        numbers = [trial.number for trial in sweep.done]
        values = [trial.values[objective.metric] for trial in sweep.done]
        axes.plot(numbers, values, "o", color=PALE, markersize=5)
        axes.step(numbers, best_so_far(values, objective), where="post", color=COLOURS[0])
        axes.plot(lost, [0.02] * len(lost), "x", transform=axes.get_xaxis_transform(), color=COLOURS[1])
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        axes.yaxis.set_major_formatter(number)
        axes.set_xlabel("trial")
        axes.set_title(objective.in_words)
    return figure


def draw_reported(sweep: Sweep, wide: bool) -> Figure:
    """Draw the first objective by optimizer step for every trial that reported it while it trained."""
    figure, (axes,) = panels(wide, 1, 1, 3.2)
    first, best = sweep.objectives[0], sweep.best
    values: list[float] = []
    outcomes = [trial.values[first.metric] for trial in sweep.done]
    low, span = min(outcomes, default=0.0), (max(outcomes, default=1.0) - min(outcomes, default=0.0)) or 1.0
    for trial in sweep.trials:
        style: dict[str, Any] = {"color": PALE, "linewidth": 1.0, "linestyle": "--"}
        if trial in sweep.done:
            colour = shade((trial.values[first.metric] - low) / span)
            style = {"color": colour, "linewidth": 3.0 if trial is best else 1.2, "zorder": 3}
        axes.plot(*binned(list(trial.reported), list(trial.reported.values())), **style)
        values += trial.reported.values()
    log_if_wide(axes, values)
    axes.set_xlabel("optimizer steps")
    axes.set_ylabel(first.metric)
    return figure


def best_so_far(values: Sequence[float], objective: Objective) -> list[float]:
    """Return the best of the first 1, 2, ... values."""
    best = np.maximum if objective.direction == "maximize" else np.minimum
    found: list[float] = best.accumulate(np.array(values)).tolist()
    return found
