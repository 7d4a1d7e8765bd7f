"""The figures of a run: losses, learning rate and gradient norm, speed, scores, and its time line."""

from collections.abc import Callable, Sequence
from datetime import datetime
from functools import partial
from itertools import pairwise
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from launcher.figure import (
    COLOURS,
    INK,
    PALE,
    PAPER,
    SOFT,
    TEACHER_COLOUR,
    binned,
    count,
    label_ends,
    log_if_wide,
    new,
    number,
    panels,
    ramp,
    rows_axis,
)
from launcher.run_record import Record, when

MOST_DOTS = 25
"""Held-out values shown of a line."""
KINDS = {
    "attention": "attention scores",
    "hidden": "hidden states",
    "cosine": "hidden states, cosine",
    "relation": "relations",
    "embedding": "embeddings",
    "prediction": "masked words",
    "logits": "task logits",
    "labels": "task labels",
}
"""What a kind of loss compares."""
PARTS = {
    "data": COLOURS[4],
    "teacher": TEACHER_COLOUR,
    "forward": COLOURS[5],
    "losses": COLOURS[3],
    "backward": COLOURS[0],
    "optimizer": COLOURS[2],
    "other": PALE,
}
"""Of a step, in its order."""
WALL = {
    "starting": COLOURS[4],
    "training": COLOURS[0],
    "waiting for saves": COLOURS[2],
    "evaluation, exports, rest": COLOURS[3],
    "standing still": PALE,
}
"""What a run's wall clock time went into."""


def student_colour(record: Record, student: str) -> str:
    """Return a student's colour: the same in all figures."""
    return COLOURS[record.students.index(student) % len(COLOURS)]


def draw_totals(record: Record, wide: bool) -> Figure:
    """Draw every student's total loss over rows: in training, and on held-out rows."""
    figure, (axes,) = panels(wide, 1, 1, 3.4)
    ends, values = [], []
    for student in record.students:
        colour = student_colour(record, student)
        drawn = _line(axes, record, student, "total", colour)
        values += drawn
        if drawn:
            ends.append((drawn[-1], student, colour))
    log_if_wide(axes, values)
    rows_axis(axes)
    axes.set_ylabel("total loss")
    if len(record.students) > 1:
        label_ends(axes, ends, 0.06)
    return figure


def draw_layers(record: Record, student: str, wide: bool) -> Figure:
    """Draw one student's losses over rows, a panel for each kind of loss, a line for each layer."""
    of_kind: dict[str, list[str]] = {}
    for key in record.keys(student):
        of_kind.setdefault(key.split("/")[0], []).append(key)
    kinds = [kind for kind in KINDS if kind in of_kind]
    figure, axes_of = panels(wide, len(kinds), 3, 3.0)
    for kind, axes in zip(kinds, axes_of, strict=True):
        ends, values = [], []
        layered = len(of_kind[kind]) > 1
        colours = ramp(len(of_kind[kind])) if layered else [student_colour(record, student)]
        for key, colour in zip(of_kind[kind], colours, strict=True):
            drawn = _line(axes, record, student, key, colour)
            values += drawn
            if drawn and layered:
                ends.append((drawn[-1], key.split("/")[1], colour))
        log_if_wide(axes, values)
        rows_axis(axes)
        by = "" if not layered else ", by pair" if kind == "relation" else ", by student layer"
        axes.set_title(KINDS[kind] + by)
        label_ends(axes, ends, 0.075)
    axes_of[0].set_ylabel("loss")
    return figure


def _line(axes: Axes, record: Record, student: str, key: str, colour: str) -> list[float]:
    """Draw training as a line and held-out rows as dots; return all values, the last one drawn at the end."""
    rows, values = binned(*record.series(f"loss/{key}", student))
    axes.plot(rows, values, color=colour)
    at, heldout = record.heldout(key, student)
    dots: dict[str, Any] = {
        "color": colour,
        "markersize": 4.5,
        "markeredgecolor": PAPER,
        "markeredgewidth": 0.7,
    }
    some = slice(None, None, -max(1, -(-len(at) // MOST_DOTS)))  # from the last on
    axes.plot(at[some], heldout[some], "o:", linewidth=0.9, zorder=3, **dots)
    if rows and (not at or rows[-1] >= at[-1]):
        return heldout + values
    return values + heldout


def draw_optimizer(record: Record, wide: bool) -> Figure:
    """Draw learning rate and gradient norm over rows, for every student."""
    figure, (rate, norm) = panels(wide, 2, 2, 2.7)
    _by_student(rate, record, partial(record.series, "optimizer/lr"), "learning rate", from_zero=True)
    title = "gradient norm, before clipping"
    _by_student(norm, record, partial(record.series, "optimizer/grad_norm"), title, logarithmic=True)
    return figure


def _by_student(
    axes: Axes,
    record: Record,
    series: Callable[[str], tuple[list[float], list[float]]],
    title: str,
    mark: str = "-",
    from_zero: bool = False,
    logarithmic: bool = False,
) -> None:
    """Draw a line for every student, labelled where there are several."""
    values, ends = [], []
    for student in record.students:
        rows, own = binned(*series(student))
        axes.plot(rows, own, mark, color=student_colour(record, student), markersize=4)
        if own:
            values += own
            ends.append((own[-1], student, student_colour(record, student)))
    rows_axis(axes)
    axes.set_title(title)
    axes.yaxis.set_major_formatter(number)
    if logarithmic:
        log_if_wide(axes, values)
    if from_zero:
        axes.set_ylim(bottom=0)
    if len(ends) > 1:
        label_ends(axes, ends, 0.08)


def draw_speed(record: Record, wide: bool) -> Figure:
    """Draw rows and tokens per second over rows seen; starts of the run are marked."""
    figure, axes_of = panels(wide, 2, 2, 2.5)
    for axes, key, unit in zip(
        axes_of, ("speed/rows_per_s", "speed/tokens_per_s"), ("rows", "tokens"), strict=True
    ):
        axes.plot(*binned(*record.series(key)), color=INK, linewidth=1.3)
        for life in record.lives()[1:]:
            axes.axvline(life.first_step * record.batch_rows, color=SOFT, linewidth=0.8, linestyle=":")
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(count)
        axes.set_title(f"{unit} per second")
        rows_axis(axes)
    return figure


def draw_split(record: Record, wide: bool) -> Figure:
    """Draw where a step's time goes over rows, in percent, as the run measured it on rank 0."""
    figure, (axes,) = panels(wide, 1, 1, 3.0)
    shares = {part: binned(*record.series(f"share/{part}")) for part in PARTS}
    rows = shares["other"][0]
    stack = [[100 * max(0.0, value) for value in shares[part][1]] for part in PARTS]
    axes.stackplot(rows, stack, colors=list(PARTS.values()), linewidth=0, alpha=0.85)
    axes.set_ylim(0, 100)
    axes.margins(x=0)
    axes.grid(False)
    axes.set_ylabel("share of a step's time, %")
    rows_axis(axes)
    ends, below = [], 0.0
    for part, values in zip(PARTS, stack, strict=True):
        mean = sum(values[-20:]) / len(values[-20:])
        ends.append((below + mean / 2, f"{part} {mean:.0f}%", PARTS[part]))
        below += mean
    label_ends(axes, ends, 0.07)
    return figure


def draw_scores(record: Record, wide: bool) -> Figure:
    """Draw the task's metrics on held-out rows, or the probes', over rows: a panel for each metric."""
    keys = score_keys(record)
    figure, axes_of = panels(wide, len(keys), 3, 2.7)
    for (name, (key, of_evaluation)), axes in zip(keys.items(), axes_of, strict=True):
        teacher = record.teacher_scores.get(key)
        if teacher is not None:
            axes.axhline(teacher, color=TEACHER_COLOUR, linewidth=1, linestyle="--")
            axes.annotate(
                "teacher",
                (0, teacher),
                xycoords=("axes fraction", "data"),
                xytext=(4, 3),
                textcoords="offset points",
                color=TEACHER_COLOUR,
                fontsize=8.5,
            )
        axes.margins(y=0.12)
        series = partial(record.heldout if of_evaluation else record.probed, key)
        _by_student(axes, record, series, name, mark="o-")
    return figure


def score_keys(record: Record) -> dict[str, tuple[str, bool]]:
    """Return what scores a run has: by name, their key, and whether evaluations hold them or probes."""
    evaluated = {key for line in record.evaluations for key in line["losses"] if key.startswith("score/")}
    probed = {key for line in record.probes for key in line["scores"]}
    return {
        **{key.removeprefix("score/") + ", held-out rows": (key, True) for key in sorted(evaluated)},
        **{"probe " + key.replace("/", ", "): (key, False) for key in sorted(probed)},
    }


def draw_timeline(record: Record, wide: bool) -> Figure:
    """Draw the run by wall clock: what it did when, its saves, evaluations, and how each start ended."""
    figure = new(9.6 if wide else 4.3, 2.5)
    axes = figure.add_subplot()
    lives = record.lives()
    begin, end = lives[0].start, lives[-1].end
    unit_s, unit = time_unit((end - begin).total_seconds())

    def at(moment: datetime) -> float:
        return (moment - begin).total_seconds() / unit_s

    for life in lives:
        ready = life.training or life.end
        for colour, since, until in (
            (WALL["starting"], life.start, ready),
            (WALL["training"], ready, life.end),
        ):
            axes.barh(0, at(until) - at(since), 0.7, at(since), color=colour)
    for before, after in pairwise(lives):
        gap = at(after.start) - at(before.end)
        axes.barh(0, gap, 0.12, at(before.end), color=PALE)
    marks = _marks(record)
    for row, moments in enumerate(marks.values(), start=1):
        places = sorted({round(at(moment) / at(end) * 400) * at(end) / 400 for moment in moments})
        axes.plot(places, [row] * len(places), "|", color=INK, markersize=9, markeredgewidth=1.1)
    names = [f"{name} ({len(moments)})" for name, moments in marks.items()]
    axes.set_yticks(range(len(marks) + 1), ["run", *names])
    axes.set_ylim(len(marks) + 0.6, -0.6)
    axes.grid(False, axis="y")
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.xaxis.set_major_locator(MaxNLocator(8 if wide else 4))
    axes.set_xlabel(f"{unit} since {begin:%d %b %Y, %H:%M} UTC")
    figure.set_figheight(1.1 + 0.32 * (len(marks) + 1))
    return figure


def _marks(record: Record) -> dict[str, Sequence[datetime]]:
    """Moments to mark, by what happened; evaluations have that of the figures logged just before them."""
    found: dict[str, list[datetime]] = {}
    evaluated = {line["step"] for line in record.evaluations}
    at_evaluation = [when(line) for line in record.logged if line["step"] in evaluated]
    if at_evaluation:
        found["evaluations"] = at_evaluation
    lives = record.lives()
    names = {"saved": "checkpoints", "save_failed": "failed saves", "rolled_back": "rollbacks"}
    names |= {"retired": "students failed"}
    for event in record.events:
        if event["event"] in names:
            found.setdefault(names[event["event"]], []).append(when(event))
    broken = [life.end for life in lives[:-1]]
    if broken:
        found["interruptions"] = broken
    return dict(found)


def wall_clock(record: Record) -> dict[str, float]:
    """Return the seconds that went into what ``WALL`` names, from the first start to the last sign of life.

    What neither starting, steps nor waiting for saves explain was evaluation, probes, exports, and steps that
    were cut off before they were logged.
    """
    lives, spent = record.lives(), dict.fromkeys(WALL, 0.0)
    for before, after in pairwise(lives):
        spent["standing still"] += max(0.0, (after.start - before.end).total_seconds())
    for life in lives:
        ready = life.training or life.end
        spent["starting"] += (ready - life.start).total_seconds()
        own = [line for line in record.logged if ready <= when(line) <= life.end]
        if not own:  # nothing was logged: nobody knows better
            spent["training"] += (life.end - ready).total_seconds()
        back = [event for event in record.events if event["event"] == "rolled_back"]
        step = life.first_step + 1  # that one is part of starting
        for line in sorted([*own, *(e for e in back if ready <= when(e) <= life.end)], key=when):
            if "run" in line:
                spent["training"] += (line["step"] - step) * line["run"]["speed/step_s"]
                spent["waiting for saves"] += line["run"].get("time/checkpoint_s", 0.0)
            step = line["step"]
    whole = (lives[-1].end - lives[0].start).total_seconds()
    spent["evaluation, exports, rest"] = max(0.0, whole - sum(spent.values()))
    return spent


def time_unit(seconds: float) -> tuple[float, str]:
    """Return the unit of an axis of so many seconds, in seconds, and its name."""
    for unit_s, name in ((86400.0, "days"), (3600.0, "hours"), (60.0, "minutes")):
        if seconds > 3 * unit_s:
            return unit_s, name
    return 1.0, "seconds"
