"""What an evaluation found, and what follows from it: means, spread, retention, the student to take.

Plain numbers, no models: everything here comes from, and goes into, the report's JSON.
"""

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

FORMS = {"pytorch": "PyTorch", "onnx": "ONNX", "int8": "ONNX int8"}
"""In which a model is scored and timed, and how people call them."""
TEACHER = "teacher"


@dataclass(frozen=True)
class Column:
    """One split of one task's data."""

    task: str
    split: str
    metric: str
    """The task's score, the first of its metrics."""
    rows: int
    chance: float
    """Score of the best constant answer."""

    @property
    def name(self) -> str:
        """``mnli``, or ``mnli mismatched`` of a further split."""
        further = self.split.removeprefix("heldout").lstrip("-")
        return f"{self.task} {further}" if further else self.task


@dataclass(frozen=True)
class Timing:
    """How fast a model is in one form, on one device, with rows of one length, all full."""

    form: str
    device: str
    batch_rows: int
    p50_ms: float
    p90_ms: float
    p99_ms: float
    rows_per_s: float


@dataclass(frozen=True)
class Arm:
    """One way to make a model: its size, speed and scores."""

    name: str
    shape: str
    parameters: int
    row_flops: int | None
    """Operations of a forward pass over one row; None for an architecture whose are not known."""
    file_bytes: dict[str, int]
    """Of the weights, by form."""
    scores: dict[str, dict[str, list[dict[str, float]]]]
    """By form and column: of every seed's model, every metric, the score first."""
    timings: list[Timing]

    def values(self, form: str, column: Column) -> list[float]:
        """Return the score of every seed; empty where this arm was not scored."""
        return [seed[column.metric] for seed in self.scores.get(form, {}).get(column.name, [])]

    def timing(self, form: str, device: str, batch_rows: int) -> Timing | None:
        """Return how fast it is, None where that was not measured."""
        asked = (form, device, batch_rows)
        return next((t for t in self.timings if (t.form, t.device, t.batch_rows) == asked), None)


@dataclass(frozen=True)
class Kept:
    """What an arm keeps of the teacher's score: 1 is all of it."""

    mean: float
    """Over columns, of the ratio of the mean over seeds to the teacher's score."""
    spread: float | None
    """Standard deviation that the seeds give this mean; None where a column has one seed."""
    of_mean_score: float
    """The mean score over columns against the teacher's, as the paper counts (77.0 / 79.5 = 96.8%)."""
    columns: int
    """On which it was scored."""


@dataclass(frozen=True)
class Choice:
    """The student to take, in a form."""

    arm: Arm
    form: str
    kept: Kept
    reaches_aim: bool


@dataclass(frozen=True)
class Results:
    """One evaluation."""

    name: str
    aim: float
    ship: list[str]
    columns: list[Column]
    teacher: Arm
    """Its scores are those of every task's own teacher."""
    arms: list[Arm]
    seq_len: int
    batch_rows: list[int]
    """Rows in a timed call."""
    machine: dict[str, str]
    """Devices, threads, versions, the code's revision."""

    @property
    def devices(self) -> list[str]:
        """On which the teacher was timed; choice and figure go by the first."""
        return list(dict.fromkeys(timing.device for timing in self.teacher.timings))

    def everyone(self) -> list[Arm]:
        """Return the teacher and the arms."""
        return [self.teacher, *self.arms]

    def teacher_score(self, column: Column) -> float:
        """Return the 100% of a column."""
        return self.teacher.values("pytorch", column)[0]

    def kept(self, arm: Arm, form: str) -> Kept | None:
        """Return what an arm keeps, over the columns on which it was scored; None where there is none.

        The spread takes columns as independent: s_mean = sqrt(sum_c s_c^2) / C, with s_c the sample standard
        deviation of a column's retention over seeds.
        """
        scored = [(c, values) for c in self.columns if (values := arm.values(form, c))]
        if not scored:
            return None
        shares = [statistics.fmean(values) / self.teacher_score(c) for c, values in scored]
        spreads = [
            spread / self.teacher_score(c)
            for c, values in scored
            if (spread := deviation(values)) is not None
        ]
        return Kept(
            mean=statistics.fmean(shares),
            spread=math.hypot(*spreads) / len(spreads) if len(spreads) == len(scored) else None,
            of_mean_score=sum(statistics.fmean(values) for _, values in scored)
            / sum(self.teacher_score(c) for c, _ in scored),
            columns=len(scored),
        )

    def latency(self, arm: Arm, form: str) -> Timing | None:
        """Return the timing that choice and figure go by: first device, fewest rows in a call."""
        return arm.timing(form, self.devices[0], self.batch_rows[0]) if self.devices else None

    def candidates(self) -> Iterator[tuple[Arm, str, Kept]]:
        """Yield what can be taken: arms in ``ship``, scored on every column, by form."""
        for arm in self.arms:
            for form in FORMS if arm.name in self.ship else ():
                kept = self.kept(arm, form)
                if kept is not None and kept.columns == len(self.columns):
                    yield arm, form, kept

    def choice(self) -> Choice | None:
        """Return the fastest candidate that keeps ``aim`` of the teacher's score; where none does, the one
        that keeps most. None without candidates.

        Of equally fast ones, as of one shape, the one that keeps more.
        """
        found = list(self.candidates())
        reaching = [entry for entry in found if entry[2].mean >= self.aim]

        def by_speed(entry: tuple[Arm, str, Kept]) -> tuple[float, float]:
            timing = self.latency(entry[0], entry[1])
            return (timing.p50_ms if timing else math.inf, -entry[2].mean)

        if reaching:
            return Choice(*min(reaching, key=by_speed), reaches_aim=True)
        if found:
            return Choice(*max(found, key=lambda entry: entry[2].mean), reaches_aim=False)
        return None

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain values, with what follows from it."""
        choice = self.choice()
        return {
            "choice": choice and {"arm": choice.arm.name, "form": choice.form, "aim": choice.reaches_aim},
            "kept": {
                arm.name: {form: asdict(kept) for form in FORMS if (kept := self.kept(arm, form))}
                for arm in self.arms
            },
            **asdict(self),
        }


def deviation(values: Sequence[float]) -> float | None:
    """Return the sample standard deviation; None of a single value."""
    return statistics.stdev(values) if len(values) > 1 else None
