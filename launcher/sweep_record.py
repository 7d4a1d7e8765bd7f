"""What the folder of a sweep tells of it: its trials, which is best, which no other beats."""

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

TRIALS = "trials.json"


@dataclass(frozen=True)
class Objective:
    """What a sweep searches for."""

    metric: str
    direction: str
    """``minimize`` or ``maximize``."""

    def gain(self, value: float) -> float:
        """Return a value such that more is better."""
        return value if self.direction == "maximize" else -value

    @property
    def arrow(self) -> str:
        """Return where better is."""
        return "↑" if self.direction == "maximize" else "↓"

    @property
    def in_words(self) -> str:
        """Return metric and direction."""
        return f"{self.metric} ({'more' if self.direction == 'maximize' else 'less'} is better)"


@dataclass(frozen=True)
class Trial:
    """One run of a sweep."""

    number: int
    state: str
    """``complete``, ``pruned``, ``failed`` or ``running``."""
    settings: dict[str, Any]
    values: dict[str, float]
    """By objective's metric; empty unless it is complete."""
    seconds: float | None
    reported: dict[int, float]
    """The first objective while it trained, by step."""
    error: str


@dataclass(frozen=True)
class Sweep:
    """A sweep's trials, by number."""

    name: str
    objectives: list[Objective]
    trials: list[Trial]

    @classmethod
    def read(cls, folder: Path) -> "Sweep":
        """Read a sweep's folder.

        Raises:
            ValueError: its ``trials.json`` is none.
        """
        path = folder / TRIALS
        try:
            tree = json.loads(path.read_text(encoding="utf-8"))
            metrics = [own["metric"] for own in tree["objectives"]]
            return cls(
                name=tree["name"],
                objectives=[Objective(own["metric"], own["direction"]) for own in tree["objectives"]],
                trials=[_trial(own, metrics) for own in tree["trials"]],
            )
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(
                f"{path} does not list a sweep's trials ({error!r}); start launcher/sweep.py again, which "
                "writes it anew"
            ) from error

    @cached_property
    def done(self) -> list[Trial]:
        """Trials with a value of every objective."""
        return [
            trial for trial in self.trials if trial.values and all(map(math.isfinite, trial.values.values()))
        ]

    @property
    def states(self) -> str:
        """How many trials are in which state."""
        found = Counter(trial.state for trial in self.trials)
        return ", ".join(f"{count} {state}" for state, count in sorted(found.items()))

    @property
    def ranked(self) -> list[Trial]:
        """The trials that are done, the best by the first objective first."""
        first = self.objectives[0]
        return sorted(self.done, key=lambda trial: -first.gain(trial.values[first.metric]))

    @property
    def best(self) -> Trial | None:
        """The best by the first objective."""
        return next(iter(self.ranked), None)

    @cached_property
    def front(self) -> list[Trial]:
        """Trials that no other beats: equal or better in every objective, and better in one."""
        gains = {
            trial.number: [own.gain(trial.values[own.metric]) for own in self.objectives]
            for trial in self.done
        }

        def beaten(mine: list[float]) -> bool:
            return any(
                theirs != mine and all(b >= a for a, b in zip(mine, theirs, strict=True))
                for theirs in gains.values()
            )

        return [trial for trial in self.done if not beaten(gains[trial.number])]

    @property
    def varied(self) -> list[str]:
        """Settings that differ between trials."""
        found: dict[str, set[str]] = {}
        for trial in self.trials:
            for key, value in trial.settings.items():
                found.setdefault(key, set()).add(str(value))
        return [key for key, values in found.items() if len(values) > 1]


def short_names(keys: Sequence[str]) -> dict[str, str]:
    """Return the shortest ends of dotted keys that tell them apart: ``lr`` of ``students.0.optimizer.lr``."""
    ends = {
        key: [".".join(key.split(".")[-count:]) for count in range(1, 1 + len(key.split(".")))]
        for key in keys
    }
    return {
        key: next((end for end in own if sum(end in others for others in ends.values()) == 1), key)
        for key, own in ends.items()
    }


def _trial(tree: dict[str, Any], metrics: Sequence[str]) -> Trial:
    complete = tree["state"] == "complete"
    return Trial(
        number=tree["number"],
        state=tree["state"],
        settings=tree["settings"],
        values=dict(zip(metrics, tree["values"], strict=True)) if complete else {},
        seconds=tree["seconds"],
        reported={int(step): value for step, value in tree["reported"].items()},
        error=tree["error"],
    )
