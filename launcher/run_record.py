"""What the folder of a run tells of it: the record that its report is made of.

A run that was cut off and started again repeats steps, and may have torn a file's last line.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from launcher.runfolder import keep_line

FIGURES = "metrics.jsonl"
Line = dict[str, Any]


def keep_figures(
    folder: Path, step: int, run: Mapping[str, float], students: Mapping[str, Mapping[str, float]]
) -> None:
    """Append a line to ``metrics.jsonl``: when (UTC), a run's figures and its students', to six digits."""

    def short(figures: Mapping[str, float]) -> dict[str, float]:
        return {key: float(f"{value:.6g}") for key, value in figures.items()}

    at = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
    named = {name: short(figures) for name, figures in students.items()}
    line = json.dumps({"at": at, "step": step, "run": short(run), "students": named})
    keep_line(folder / FIGURES, line, f"the figures of step {step}")


def read_lines(path: Path) -> list[Line]:
    """Return the lines of a JSONL file, without torn ones; none where there is no file."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return []
    found = []
    for line in text.splitlines():
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:  # the process ended while it wrote
            continue
        if isinstance(entry, dict):
            found.append(entry)
    return found


def latest(lines: Iterable[Line], last_step: int) -> list[Line]:
    """Return what counts of a run that repeats steps: a line takes the place of its own step's and student's
    before it, and of all that lay ahead of it; none is ahead of ``last_step``. By step, ascending."""
    kept: dict[tuple[int, str], Line] = {}
    for line in lines:
        while kept and next(reversed(kept))[0] > line["step"]:
            kept.popitem()
        key = (line["step"], line.get("student", ""))
        kept.pop(key, None)
        kept[key] = line
    return [line for line in kept.values() if line["step"] <= last_step]


@dataclass(frozen=True)
class Life:
    """One start of a run, until it ended or was last heard of."""

    start: datetime
    """Of the process."""
    training: datetime | None
    """The first step was done."""
    end: datetime
    first_step: int
    last_step: int
    how: str
    """``finished``, ``stopped``, ``failed``; empty when it did not say: cut off, or running still."""
    reason: str
    ranks: int
    host: str

    @property
    def in_words(self) -> str:
        """Return how it ended."""
        return {"": "cut off"}.get(self.how, self.how) + (f": {self.reason}" if self.reason else "")


@dataclass(frozen=True)
class Record:
    """A run as its folder has it."""

    folder: Path
    config: dict[str, Any]
    origin: dict[str, Any]
    summary: dict[str, Any]
    deepspeed: dict[str, Any]
    events: list[Line]
    logged: list[Line]
    """Of ``metrics.jsonl``, in the order of writing, repeated steps and all."""
    last_step: int
    """The last step that the run has told of, 0 before the first; nothing ahead of it counts."""
    evaluations: list[Line]
    probes: list[Line]

    @classmethod
    def read(cls, folder: Path) -> "Record":
        """Read a run's folder; what it lacks yet is empty.

        Raises:
            ValueError: it is no run's folder.
        """
        try:
            config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
        except FileNotFoundError:
            config = None
        if not isinstance(config, dict) or "students" not in config:
            raise ValueError(
                f"{folder} is not the folder of a run: it has no config.yaml that names students; give the "
                "output of launcher/general.py or of a stage of launcher/task.py, or the folder of a sweep"
            )
        events, logged = read_lines(folder / "events.jsonl"), read_lines(folder / FIGURES)
        last_step = _furthest(events, logged)
        return cls(
            folder=folder,
            config=config,
            **{name: _read_json(folder / f"{name}.json") for name in ("origin", "summary", "deepspeed")},
            events=events,
            logged=logged,
            last_step=last_step,
            evaluations=latest(read_lines(folder / "evaluations.jsonl"), last_step),
            probes=latest(read_lines(folder / "probes.jsonl"), last_step),
        )

    @property
    def students(self) -> list[str]:
        """Names of the students, in the config's order."""
        return [student["name"] for student in self.config["students"]]

    @property
    def batch_rows(self) -> int:
        """Rows of a step."""
        return int(self.config["train"]["global_batch_rows"])

    @cached_property
    def points(self) -> list[Line]:
        """What counts of ``logged``, by step."""
        return latest(self.logged, self.last_step)

    @property
    def teacher_scores(self) -> dict[str, float]:
        """The teacher's own scores, by the keys of the students'."""
        return {
            key: value
            for event in self.events
            if event["event"] == "teacher"
            for key, value in event["scores"].items()
        }

    def series(self, key: str, student: str | None = None) -> tuple[list[float], list[float]]:
        """Return rows seen, and the logged values of a run's, or student's, figure."""
        found = [
            (point["step"] * self.batch_rows, figures[key])
            for point in self.points
            if key in (figures := point["run"] if student is None else point["students"].get(student, {}))
        ]
        return [rows for rows, _ in found], [value for _, value in found]

    def heldout(self, key: str, student: str) -> tuple[list[float], list[float]]:
        """Return rows seen, and a student's held-out losses or scores by key."""
        return self._of_step(self.evaluations, "losses", key, student)

    def probed(self, key: str, student: str) -> tuple[list[float], list[float]]:
        """Return rows seen, and a student's scores in a probe."""
        return self._of_step(self.probes, "scores", key, student)

    def keys(self, student: str) -> list[str]:
        """Return the keys of a student's losses (``total``, ``hidden/1`` ...), without those by corpus."""
        found: dict[str, None] = {}
        for line in self.evaluations:
            found |= dict.fromkeys(line["losses"] if line["student"] == student else ())
        for point in self.points:
            own = point["students"].get(student, {})
            found |= dict.fromkeys(key[5:] for key in own if key.startswith("loss/"))
        return [key for key in found if not key.startswith(("corpus/", "score/"))]

    def lives(self) -> list[Life]:
        """Return every start of the run, by time."""
        parts: list[list[Line]] = []
        for event in self.events:
            if event["event"] == "started" or not parts:
                parts.append([])
            parts[-1].append(event)
        following = [*parts[1:], None]
        return [_life(part, after, self.logged) for part, after in zip(parts, following, strict=False)]

    def _of_step(
        self, lines: list[Line], what: str, key: str, student: str
    ) -> tuple[list[float], list[float]]:
        found = [line for line in lines if line["student"] == student and key in line[what]]
        return [line["step"] * self.batch_rows for line in found], [line[what][key] for line in found]


def when(line: Line) -> datetime:
    """Return when a line was written."""
    return datetime.fromisoformat(line["at"])


def duration(seconds: float) -> str:
    """Return ``2 d 3 h``, ``3 h 7 min``, ``4 min 5 s`` or ``6.2 s``."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    for unit_s, unit, part_s, part in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        whole, rest = divmod(round(seconds / part_s), unit_s // part_s)
        if whole:
            return f"{whole} {unit} {rest} {part}"
    return f"{round(seconds)} s"


def _life(events: list[Line], following: list[Line] | None, logged: list[Line]) -> Life:
    start, until = when(events[0]), None if following is None else when(following[0])
    own = [line for line in logged if start <= when(line) and (until is None or when(line) < until)]
    training = next((event for event in events if event["event"] == "training"), None)
    if training is not None:  # from the process's start; ``started`` comes once everything is loaded
        start = min(start, when(training) - timedelta(seconds=sum(training["seconds"].values())))
    ending = next((e for e in reversed(events) if e["event"] in ("finished", "stopped", "failed")), {})
    lines = [*events, *own]
    return Life(
        start=start,
        training=None if training is None else when(training),
        end=max(when(line) for line in lines),
        first_step=events[0]["step"],
        last_step=max(line["step"] for line in lines),
        how=ending.get("event", ""),
        reason=ending.get("reason", ""),
        ranks=events[0].get("ranks", 0),
        host=events[0].get("host", ""),
    )


def _furthest(events: list[Line], logged: list[Line]) -> int:
    """Return the last step done since the run was last started or rolled back."""
    back = [index for index, event in enumerate(events) if event["event"] in ("started", "rolled_back")]
    if not back:
        return max((line["step"] for line in [*events, *logged]), default=0)
    own = events[back[-1] :]
    return max(line["step"] for line in [*own, *(line for line in logged if when(line) >= when(own[0]))])


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return {}
    return found if isinstance(found, dict) else {}
