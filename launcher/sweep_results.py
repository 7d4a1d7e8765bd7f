"""What a sweep leaves: all trials as a table and as JSON, and the best as configs that run."""

import json
from pathlib import Path
from typing import Any

from rich.table import Table

from configs.schema import RunConfig
from configs.sweep import direction, folder_of, student_of, yaml_of
from configs.sweep_schema import SweepConfig
from configs.task_schema import TaskConfig
from launcher.trials import Result, Trials
from sharding.files import write_text

TRIALS, BEST, PARETO = "trials.json", "best.yaml", "pareto"
ENDED = ("complete", "pruned", "failed")


def write_results(sweep: SweepConfig, base: RunConfig | TaskConfig, trials: Trials) -> list[Path]:
    """Write ``trials.json`` and ``best.yaml``, or with several objectives ``pareto/trial-*.yaml``.

    Returns the YAMLs. Workers write one after the other.
    """
    with trials.alone():
        results, best = trials.results(), trials.best()
        write_text(trials.folder / TRIALS, json.dumps(to_dict(sweep, base, results, best), indent=1) + "\n")
        several = len(sweep.objectives) > 1
        files = {
            number: trials.folder / (f"{PARETO}/trial-{number:04d}.yaml" if several else BEST)
            for number in best
        }
        for stale in set((trials.folder / PARETO).glob("*.yaml")) - set(files.values()):
            stale.unlink()
        for number, path in files.items():
            path.parent.mkdir(exist_ok=True)
            told = f"Trial {number} of sweep {sweep.name}: {judged(sweep, results[number])}"
            write_text(path, yaml_of(sweep, base, results[number].settings, told, path))
        return list(files.values())


def to_dict(
    sweep: SweepConfig, base: RunConfig | TaskConfig, results: list[Result], best: list[int]
) -> dict[str, Any]:
    """Return the sweep's outcome as plain values: what it is judged by, and every trial."""
    return {
        "name": sweep.name,
        "objectives": [{"metric": own.metric, "direction": direction(own).value} for own in sweep.objectives],
        "keys": list(sweep.space),
        "best": best,
        "trials": [
            {
                "number": result.number,
                "state": result.state,
                "settings": result.settings,
                "values": result.values,
                "seconds": result.seconds,
                "folder": str(folder_of(sweep, Path("trials", f"{result.run:04d}"))),
                "student": student_of(sweep, base, result.number),
                "error": result.error,
                "reported": result.reported,
            }
            for result in results
        ],
    }


def judged(sweep: SweepConfig, result: Result) -> str:
    """Return ``heldout/total 0.1234, student/parameters 14350248``."""
    pairs = zip(sweep.objectives, result.values, strict=False)
    return ", ".join(f"{objective.metric} {value:.6g}" for objective, value in pairs) or "no value"


def counts(results: list[Result], total: int) -> str:
    """Return ``3 of 8 trials started, 2 complete, 0 pruned, 1 failed``."""
    by_state = [f"{sum(r.state == state for r in results)} {state}" for state in ENDED]
    return f"{len(results)} of {total} trials started, {', '.join(by_state)}"


def table(sweep: SweepConfig, results: list[Result], best: list[int]) -> Table:
    """Return the trials for people, the best marked, in order of the first objective."""
    drawn = Table()
    keys = _short(list(sweep.space))
    for column in ("trial", *keys.values(), *(own.metric for own in sweep.objectives), "state", "time"):
        drawn.add_column(column, justify="left" if column == "state" else "right", overflow="fold")
    high = direction(sweep.objectives[0]).value == "maximize"

    def rank(result: Result) -> tuple[bool, float]:
        if not result.values:
            return True, result.number
        return False, -result.values[0] if high else result.values[0]

    for result in sorted(results, key=rank):
        values = [f"{value:.5g}" for value in result.values] or ["" for _ in sweep.objectives]
        drawn.add_row(
            f"{'*' if result.number in best else ''}{result.number}",
            *(_plain(result.settings.get(key, "")) for key in keys),
            *values,
            result.state,
            f"{result.seconds:.0f} s" if result.seconds is not None else "",
        )
    return drawn


def _short(keys: list[str]) -> dict[str, str]:
    """Shorten keys to their last parts, as many as tell them apart."""
    for parts in range(1, 10):
        short = {key: ".".join(key.split(".")[-parts:]) for key in keys}
        if len(set(short.values())) == len(keys):
            return short
    return {key: key for key in keys}


def _plain(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
