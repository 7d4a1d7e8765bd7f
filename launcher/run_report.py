"""The report of a run: one HTML page, made of the run's folder alone."""

import html
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from statistics import median
from typing import Any

from configs.load import to_dict
from configs.schema import RunConfig
from configs.student_schema import StudentConfig
from launcher import run_figures as figures
from launcher.figure import count, show, swatch
from launcher.page import Table, page, section, tiles
from launcher.run_record import Life, Record, duration


def to_html(record: Record, comparisons: Sequence[str] = ()) -> str:
    """Return the page; ``comparisons`` are sections on what students and teacher compute."""
    parts = [tiles(_tiles(record)), *_losses(record), *_scores(record), *comparisons]
    parts += [*_training(record), *_timeline(record), _starts(record).html(), _settings(record).html()]
    parts += [_origin(record).html()]
    return page(record.config["name"], "What was distilled, and how it went", verdict(record), parts)


def verdict(record: Record) -> str:
    """Return in a paragraph what was distilled from what, how long, how the losses went, how it ended."""
    config, lives = record.config, record.lives()
    students = [
        f"**{own['name']}** ({own['layers']} layers x {own['hidden_size']})" for own in config["students"]
    ]
    last, rows = record.last_step, record.last_step * record.batch_rows
    teacher, learn = _short(config["teacher"]["model"]), "learn" if len(students) > 1 else "learns"
    said = f"{_and(students)} {learn} from {teacher}"
    said += f" on {_and(_corpora(config))}: {_counted(rows)} rows in {last:,} steps"
    if lives:
        said += f", {duration((lives[-1].end - lives[0].start).total_seconds())} by the wall clock"
    said += "."
    for student in record.students:
        found = [value for value in record.heldout("total", student)[1] if math.isfinite(value)]
        if len(found) > 1:
            change = f"{found[-1] / found[0] - 1:+.0%}".replace("-", "−")
            said += f" Held-out loss of {student}: {found[0]:.4g} to **{found[-1]:.4g}** ({change})."
    return f"{said} {_ending(record, lives)}"


def _ending(record: Record, lives: Sequence[Life]) -> str:
    if not lives:
        return "It has not started yet."
    last = lives[-1]
    asked = record.config["train"]["steps"]
    done = f" after {record.last_step:,}" + (f" of {asked:,}" if asked else "") + " steps"
    if last.how == "finished":
        said = f"The run **finished**{done}"
    elif last.how:
        said = f"The run **{last.how}**{done} ({last.reason})"
    else:
        said = f"The run has not said how it ended{done}: it goes on, or was cut off"
        said += f"; last heard of {last.end:%d %b %Y, %H:%M} UTC"
    if len(lives) > 1:
        still_s = figures.wall_clock(record)["standing still"]
        times = "once" if len(lives) == 2 else f"{len(lives) - 1} times"
        said += f"; it was interrupted {times} and stood still for {duration(still_s)} between"
        if repeated := repeated_steps(lives):
            said += f", and repeated {repeated:,} steps"
    for name, reason in record.summary.get("retired", {}).items():
        said += f". **{name} failed**: {reason}"
    return said + "."


def repeated_steps(lives: Sequence[Life]) -> int:
    """Return how many steps a run has done more than once, as far as it told of them."""
    reached, repeated = 0, 0
    for life in lives:
        repeated += max(0, min(reached, life.last_step) - life.first_step)
        reached = max(reached, life.last_step)
    return repeated


def _tiles(record: Record) -> Iterator[tuple[str, str, str]]:
    rows = record.last_step * record.batch_rows
    run = record.points[-1]["run"] if record.points else {}
    epochs = f"{run['progress/epoch']:.3g} epochs" if "progress/epoch" in run else ""
    yield _counted(rows), "rows seen", epochs
    if "progress/tokens" in run:
        yield _counted(run["progress/tokens"]), "tokens seen", ""
    speeds = record.series("speed/rows_per_s")[1]
    if speeds:
        tokens = record.series("speed/tokens_per_s")[1]
        yield f"{_counted(median(speeds))}/s", "rows, median", f"{_counted(median(tokens))} tokens/s"
    if lives := record.lives():
        ranks = sorted({life.ranks for life in lives})
        said = f"on {_and([str(own) for own in ranks])} rank{'s' if ranks != [1] else ''}"
        spent = figures.wall_clock(record)
        share = spent["training"] / sum(spent.values()) if sum(spent.values()) else 0.0
        yield duration(spent["training"]), "in training steps", f"{share:.0%} of all time, {said}"
        saved = sum(event["event"] == "saved" for event in record.events)
        yield str(saved), "checkpoints", f"{len(lives) - 1} interruptions"


def _losses(record: Record) -> Iterator[str]:
    told = "Lines: training, mean over the logged span. Dots: held-out rows. Students have one colour each."
    if not any(record.keys(student) for student in record.students):
        return
    yield section("Loss", show(partial(figures.draw_totals, record), "total loss over rows seen"), told)
    for student in record.students:
        kinds = {key.split("/")[0] for key in record.keys(student)}
        if kinds & set(figures.KINDS):
            drawn = show(partial(figures.draw_layers, record, student), f"losses of {student} by layer")
            lightest = "Darkest is the first layer, lightest the last; the last value of each is labelled."
            yield section(f"Loss by layer: {student}", drawn, lightest)


def _scores(record: Record) -> Iterator[str]:
    if figures.score_keys(record):
        drawn = show(partial(figures.draw_scores, record), "scores over rows seen")
        yield section("Scores while training", drawn)


def _training(record: Record) -> Iterator[str]:
    if not record.points:
        return
    rate = show(partial(figures.draw_optimizer, record), "learning rate and gradient norm over rows seen")
    yield section("Learning rate and gradient norm", rate)
    speed = show(partial(figures.draw_speed, record), "rows and tokens per second over rows seen")
    marks = "Dotted: the run was started again." if len(record.lives()) > 1 else ""
    yield section("Throughput", speed, f"Over all ranks; evaluation and saving are left out. {marks}")
    split = show(partial(figures.draw_split, record), "share of a step's time by part")
    told = "On rank 0, over all students. Labels: the mean of the last points. data is waiting for rows."
    yield section("Where a step's time goes", split, told)


def _timeline(record: Record) -> Iterator[str]:
    if not record.lives():
        return
    spent = figures.wall_clock(record)
    whole = sum(spent.values()) or 1.0
    key = "".join(
        f"<li>{swatch(figures.WALL[name])}{html.escape(name)} "
        f"<b>{seconds / whole:.0%}</b> <small>{duration(seconds)}</small></li>"
        for name, seconds in spent.items()
        if seconds > 0
    )
    drawn = show(partial(figures.draw_timeline, record), "the run by wall clock")
    yield section("Time line", f"<ul class=key>{key}</ul>{drawn}")


def _starts(record: Record) -> Table:
    rows = []
    for number, life in enumerate(record.lives(), start=1):
        ready_s = (life.training - life.start).total_seconds() if life.training else None
        rows.append(
            [
                f"{number}\n{life.in_words if life.how or number < len(record.lives()) else 'not ended yet'}",
                f"{life.start:%d %b %Y, %H:%M:%S}",
                "" if ready_s is None else duration(ready_s),
                f"{life.first_step:,} to {life.last_step:,}",
                duration((life.end - life.start).total_seconds()),
                f"{life.ranks} on {life.host}" if life.ranks else "",
            ]
        )
    header = ["start", "at (UTC)", "to the first step", "steps", "lasted", "ranks"]
    return Table("Starts", header, rows, "", folded=len(rows) == 1)


def _settings(record: Record) -> Table:
    """What the run's config sets otherwise than the schema's defaults."""
    own, default = dict(_flat(record.config)), dict(_flat(to_dict(RunConfig)))
    of_student = dict(_flat(to_dict(StudentConfig)))
    rows = []
    for key, value in own.items():
        first, _, rest = key.partition(".")
        known = of_student.get(rest.partition(".")[2]) if first == "students" else default.get(key)
        if value != known:
            default_of = "" if known in (None, "???", []) else f"\ndefault {_shown(known)}"
            rows.append([key, _shown(value) + default_of])
    note = "config.yaml holds all settings."
    header = ["setting", "value"]
    return Table("Settings that differ from the defaults", header, rows, note, words=True)


def _origin(record: Record) -> Table:
    origin = record.origin
    rows = [[name, str(origin[name])] for name in ("command", "revision") if name in origin]
    rows += [[name, str(version)] for name, version in origin.get("versions", {}).items()]
    rows += [
        [f"DeepSpeed, {student}", "ZeRO {}".format(own.get("zero_optimization", {}).get("stage", 0))]
        for student, own in record.deepspeed.items()
    ]
    return Table("Where it comes from", ["what", "value"], rows, "", folded=True, words=True)


def _flat(tree: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves of a tree of settings by dotted key; lists of plain values are leaves."""
    if isinstance(tree, Mapping) and tree:
        for name, value in tree.items():
            yield from _flat(value, f"{key}.{name}" if key else str(name))
    elif isinstance(tree, list) and any(isinstance(item, Mapping) for item in tree):
        for index, value in enumerate(tree):
            yield from _flat(value, f"{key}.{index}")
    else:
        yield key, tree


def _shown(value: Any) -> str:
    if value is None:
        return "not set"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _corpora(config: Mapping[str, Any]) -> list[str]:
    data = config["data"]
    named = [entry["name"] or _short(entry["corpus"]) for entry in data["mixture"]]
    return named or [_short(data["corpus"] or "no corpus")]


def _short(name: str) -> str:
    """The last part of a folder's or corpus's name; a hub name whole."""
    return name.rstrip("/").rpartition("/")[2] if name.startswith(("/", ".")) or name.count("/") > 1 else name


def _and(names: Sequence[str]) -> str:
    return f"{', '.join(names[:-1])} and {names[-1]}" if len(names) > 1 else names[0]


def _counted(value: float) -> str:
    """Return a count for people: ``1,440``, ``12.3k``, ``4.5M``."""
    return f"{value:,.0f}" if value < 1e4 else count(float(f"{value:.3g}"))
