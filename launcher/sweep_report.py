"""The report of a sweep: one HTML page, made of the ``trials.json`` in the sweep's folder."""

from collections.abc import Iterator
from functools import partial

from launcher import sweep_figures as figures
from launcher.figure import number, show
from launcher.page import Table, page, section, tiles
from launcher.run_record import duration
from launcher.sweep_record import Sweep, Trial, short_names

LONG = 30
"""Trials from which on their table is folded."""


def to_html(sweep: Sweep) -> str:
    """Return the page."""
    parts = [tiles(_tiles(sweep)), *_figures(sweep), _table(sweep).html()]
    return page(sweep.name, "What the sweep found", verdict(sweep), parts)


def verdict(sweep: Sweep) -> str:
    """Return which trials are best, in a sentence or two."""
    best, first = sweep.best, sweep.objectives[0]
    if best is None:
        return f"No trial has an outcome yet: {sweep.states or 'none was started'}."
    names = short_names(sweep.varied)
    settings = ", ".join(
        f"{names[key]} {_shown(best.settings[key])}" for key in names if key in best.settings
    )
    said = (
        f"**Trial {best.number}** has the best {first.metric} of {len(sweep.done)}, "
        f"**{number(best.values[first.metric])}**" + (f", with {settings}" if settings else "") + "."
    )
    if len(sweep.objectives) > 1:
        front = ", ".join(str(trial.number) for trial in sweep.front)
        said += f" {len(sweep.front)} trials are beaten by none in all objectives: {front}."
    return said


def _tiles(sweep: Sweep) -> Iterator[tuple[str, str, str]]:
    best = sweep.best
    yield str(len(sweep.trials)), "trials", sweep.states
    if best is not None:
        for objective in sweep.objectives:
            winner = max(sweep.done, key=lambda trial: objective.gain(trial.values[objective.metric]))  # noqa: B023
            value = winner.values[objective.metric]
            yield number(value), f"best {objective.metric}", f"trial {winner.number}"
    seconds = [trial.seconds for trial in sweep.trials if trial.seconds is not None]
    if seconds:
        yield duration(sum(seconds)), "of runs", f"{duration(sum(seconds) / len(seconds))} a trial"


def _figures(sweep: Sweep) -> Iterator[str]:
    if not sweep.done:
        return
    if sweep.varied:
        drawn = show(partial(figures.draw_parallel, sweep), "settings and outcomes of all trials")
        first = sweep.objectives[0].metric
        note = (
            f"A line is a trial, lighter with more {first}. Outlined: the best. Dashed: without an outcome."
        )
        yield section("Settings and outcomes", drawn, note)
    if len(sweep.objectives) > 1:
        drawn = show(partial(figures.draw_front, sweep), "trials by two objectives, and their Pareto front")
        note = "Blue, with their numbers: no other is better in one objective without being worse in another."
        yield section("Pareto front", drawn, note)
    if any(len(trial.reported) > 1 for trial in sweep.trials):
        drawn = show(partial(figures.draw_reported, sweep), "the first objective while trials train")
        note = "A line is a trial; the best is drawn thick. Dashed: pruned, failed, or running still."
        yield section(f"{sweep.objectives[0].metric} while trials train", drawn, note)
    note = (
        "Dots are trials, the line is the best so far; crosses below are trials that failed or were pruned."
    )
    yield section("Trial by trial", show(partial(figures.draw_history, sweep), "outcomes by trial"), note)


def _table(sweep: Sweep) -> Table:
    ranked = sweep.ranked
    names = short_names(sweep.varied)
    trials = [*ranked, *(trial for trial in sweep.trials if trial not in ranked)]
    metrics = [own.metric for own in sweep.objectives]
    rows = [
        [
            f"{trial.number}\n{_outcome(sweep, trial)}",
            *(number(trial.values[metric]) if metric in trial.values else "" for metric in metrics),
            *(_shown(trial.settings[key]) if key in trial.settings else "" for key in sweep.varied),
            "" if trial.seconds is None else duration(trial.seconds),
        ]
        for trial in trials
    ]
    chosen = 0 if ranked else None
    fixed = {
        key: value for trial in trials for key, value in trial.settings.items() if key not in sweep.varied
    }
    told = "".join(f"{name} is {key}. " for key, name in names.items() if key != name)
    note = (
        "Best first. " + told + "".join(f"{key} is {_shown(value)} in all. " for key, value in fixed.items())
    )
    return Table("Trials", ["trial", *metrics, *names.values(), "took"], rows, note, chosen, len(rows) > LONG)


def _outcome(sweep: Sweep, trial: Trial) -> str:
    if trial.error:
        return f"{trial.state}: {trial.error.splitlines()[0][:80]}"
    on_front = len(sweep.objectives) > 1 and trial in sweep.front
    return trial.state + (", on the front" if on_front else "")


def _shown(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
