"""The report of an evaluation: the same tables as Markdown and as one HTML file that needs nothing else."""

import statistics
from functools import partial

from launcher.evaluation_figure import draw, draw_retention
from launcher.figure import show
from launcher.page import Table, page, section, tiles
from launcher.results import FORMS, Arm, Choice, Column, Kept, Results, Timing, deviation

MOST_NAMED = 3
"""Arms of one shape that a row of the table of sizes names."""


def markdown(results: Results) -> str:
    """Return the whole report as Markdown."""
    tables = "\n".join(table.markdown() for table in tables_of(results))
    return f"# {results.name}\n\n{verdict(results)}\n\n![quality against latency](figure.png)\n\n{tables}"


def to_html(results: Results) -> str:
    """Return the whole report as one HTML file; its figures lie in it."""
    parts = [
        _tiles(results),
        section(
            "Quality against latency",
            show(partial(draw, results), "share of the teacher's score against latency"),
        ),
        section(
            "What is kept of the teacher's score, by task",
            show(partial(draw_retention, results), "share of the teacher's score by task and model"),
            "In PyTorch, mean over seeds; dots are single seeds, whiskers their standard deviation.",
        ),
        *(table.html() for table in tables_of(results)),
    ]
    return page(results.name, "Which student to take", verdict(results), parts)


def verdict(results: Results) -> str:
    """Return in a sentence or two which student to take; names stand between ``**``."""
    choice, aim = results.choice(), f"{results.aim:.0%}"
    if choice is None:
        return f"No model of {', '.join(results.ship)} was scored on all tasks, so there is none to take."
    does = [f"keeps {percent(choice.kept)} of the teacher's score", *_gains(results, choice)]
    it = f"it {', '.join(does[:-1])} and {does[-1]}" if len(does) > 1 else f"it {does[0]}"
    named = f"**{choice.arm.name}** as **{FORMS[choice.form]}**"
    if choice.reaches_aim:
        return f"Take {named}: {it}. The aim was to keep {aim}."
    return f"No student keeps the {aim} that was aimed at. Nearest is {named}: {it}."


def _gains(results: Results, choice: Choice) -> list[str]:
    """What the choice costs less than the teacher in PyTorch."""
    found = []
    own, of_teacher = results.latency(choice.arm, choice.form), results.latency(results.teacher, "pytorch")
    if own and of_teacher:
        found.append(
            f"answers {_rows(own.batch_rows)} in {ms(own.p50_ms)} instead of {ms(of_teacher.p50_ms)} "
            f"({of_teacher.p50_ms / own.p50_ms:.1f}x faster, {own.device})"
        )
    size, before = choice.arm.file_bytes.get(choice.form), results.teacher.file_bytes.get("pytorch")
    if size and before:
        found.append(f"takes {megabytes(size)} on disk instead of {megabytes(before)}")
    return found


def _tiles(results: Results) -> str:
    """The choice in four figures."""
    choice = results.choice()
    if choice is None:
        return ""
    arm, teacher = choice.arm, results.teacher
    spread = f" ± {points(choice.kept.spread)}" if choice.kept.spread is not None else ""
    entries = [(f"{choice.kept.mean:.1%}", "of the teacher's score", f"mean over tasks{spread}")]
    own, before = results.latency(arm, choice.form), results.latency(teacher, "pytorch")
    if own and before:
        entries.append(
            (f"{before.p50_ms / own.p50_ms:.1f}x", "faster", f"{_rows(own.batch_rows)}, {own.device}")
        )
    fewer = f"{teacher.parameters / arm.parameters:.1f}x"
    entries.append(
        (fewer, "fewer parameters", f"{millions(arm.parameters)} of {millions(teacher.parameters)}")
    )
    size, before_size = arm.file_bytes.get(choice.form), teacher.file_bytes.get("pytorch")
    if size and before_size:
        entries.append((f"{before_size / size:.1f}x", "smaller on disk", f"{megabytes(size)}"))
    return tiles(entries)


def tables_of(results: Results) -> list[Table]:
    """Return the report's tables: quality, forms, size and speed, every score, and how it was measured."""
    tables = [_quality(results), _forms(results), _speed(results), _every_score(results), _machine(results)]
    return [table for table in tables if table.rows]


def _quality(results: Results) -> Table:
    choice, rows = results.choice(), []
    for arm in results.everyone():
        kept = results.kept(arm, "pytorch")
        cells = [_score(results, arm, "pytorch", column) for column in results.columns]
        mean = [f"{percent(kept)}\n{_counted(results, kept)}"] if kept else [""]
        rows.append([f"{arm.name}\n{arm.shape}", *mean, *cells])
    header = ["model", "mean kept", *(f"{column.name}" for column in results.columns)]
    chosen = None if choice is None else 1 + results.arms.index(choice.arm)
    measures = "; ".join(
        f"{column.name}: {column.metric} on {column.rows} rows, {points(column.chance)} by a constant answer"
        for column in results.columns
    )
    note = (
        "Scores in percent (mean ± standard deviation over seeds) in PyTorch; below, what that is of the "
        "teacher's. The mean kept is the mean of these shares; in brackets the share of the mean score, as "
        f"the paper counts. {measures}."
    )
    return Table("Quality", header, rows, note, chosen)


def _forms(results: Results) -> Table:
    """Scores of what can be shipped, by form."""
    choice, chosen = results.choice(), None
    rows: list[list[str]] = []
    for arm in results.everyone():
        for form in FORMS if set(arm.scores) - {"pytorch"} else ():
            kept = results.kept(arm, form)
            if kept is None:
                continue
            if choice and (arm, form) == (choice.arm, choice.form):
                chosen = len(rows)
            cells = [_score(results, arm, form, column) for column in results.columns]
            rows.append([f"{arm.name}\n{FORMS[form]}", percent(kept), *cells])
    header = ["model", "mean kept", *(column.name for column in results.columns)]
    note = "Shares are of the teacher's score in PyTorch. ONNX int8: weights and, as they come, activations."
    return Table("Quality by form", header, rows, note, chosen)


def _speed(results: Results) -> Table:
    """Size and speed of every shape and form; arms of one shape share their rows."""
    by_shape: dict[str, list[Arm]] = {}
    for arm in results.arms:
        by_shape.setdefault(arm.shape, []).append(arm)
    few, many = results.batch_rows[0], results.batch_rows[-1]
    rows = []
    for arms in [[results.teacher], *by_shape.values()]:
        others = len(arms) - MOST_NAMED
        names = ", ".join(arm.name for arm in arms[:MOST_NAMED])
        names += f" and {others} more of this shape" if others > 0 else ""
        first = max(arms, key=lambda arm: len(arm.timings))
        for device in results.devices:
            for form in FORMS:
                one, last = first.timing(form, device, few), first.timing(form, device, many)
                if one is None or last is None:
                    continue
                flops = first.row_flops
                rows.append(
                    [
                        f"{names}\n{FORMS[form]}, {device}",
                        millions(first.parameters),
                        megabytes(first.file_bytes[form]),
                        f"{flops / 1e9:.2f}" if flops else "",
                        f"{ms(one.p50_ms)}\n{_faster(results, one)}",
                        f"{ms(one.p90_ms)}\n{ms(one.p99_ms)}",
                        f"{ms(last.p50_ms)}\n{_faster(results, last)}",
                        f"{last.rows_per_s:,.0f}",
                    ]
                )
    header = ["model", "parameters", "on disk", "GFLOP a row", f"{_rows(few)}: median", "p90, p99"]
    header += [f"{_rows(many)}: median", "rows/s"]
    note = (
        f"Rows of {results.seq_len} tokens without padding, one call after the other, warm, all models in "
        "turns. Below a median: how much faster than the teacher in the same form, then than the teacher in "
        "PyTorch. Arms of one shape are equally large and fast."
    )
    return Table("Size and speed", header, rows, note)


def _faster(results: Results, timing: Timing) -> str:
    """``9.4x, 21.0x``: against the teacher in the same form, and in PyTorch."""
    against = [
        results.teacher.timing(form, timing.device, timing.batch_rows) for form in (timing.form, "pytorch")
    ]
    return ", ".join(f"{other.p50_ms / timing.p50_ms:.1f}x" for other in against if other)


def _every_score(results: Results) -> Table:
    rows = []
    for arm in results.everyone():
        for form, of_column in arm.scores.items():
            for column, seeds in of_column.items():
                for metric in seeds[0]:
                    values = ", ".join(points(seed[metric], digits=2) for seed in seeds)
                    rows.append([f"{arm.name}\n{FORMS[form]}", column, metric, values])
    note = "Every metric of every model, in percent, in the order of the models that the configuration names."
    return Table("Every score", ["model", "task", "metric", "by seed"], rows, note, folded=True)


def _machine(results: Results) -> Table:
    rows = [[name, value] for name, value in results.machine.items()]
    return Table("How it was measured", ["what", "value"], rows, "")


def _score(results: Results, arm: Arm, form: str, column: Column) -> str:
    """``91.2 ± 0.3`` and below it ``97.1% (3 seeds)``; empty where it was not scored."""
    values = arm.values(form, column)
    if not values:
        return ""
    mean, spread = statistics.fmean(values), deviation(values)
    text = points(mean) + (f" ± {points(spread)}" if spread is not None else "")
    share = mean / results.teacher_score(column)
    return f"{text}\n{share:.1%}" + (f", {len(values)} seeds" if len(values) > 1 else "")


def _counted(results: Results, kept: Kept) -> str:
    """The share of the mean score, and on how much of the columns when not on all."""
    part = f", {kept.columns} of {len(results.columns)} tasks" if kept.columns < len(results.columns) else ""
    return f"({kept.of_mean_score:.1%}){part}"


def percent(kept: Kept) -> str:
    """``97.1% ± 0.4``."""
    return f"{kept.mean:.1%}" + (f" ± {points(kept.spread)}" if kept.spread is not None else "")


def points(value: float, digits: int = 1) -> str:
    """A score or share in percent points."""
    return f"{100 * value:.{digits}f}"


def ms(value: float) -> str:
    """Milliseconds, to three figures."""
    return f"{value:.3g} ms" if value < 100 else f"{value:,.0f} ms"


def megabytes(size: int) -> str:
    """Bytes in units of a million."""
    return f"{size / 1e6:.1f} MB" if size < 1e8 else f"{size / 1e6:,.0f} MB"


def millions(count: int) -> str:
    """``14.5M``."""
    return f"{count / 1e6:.1f}M"


def _rows(count: int) -> str:
    return "1 row" if count == 1 else f"{count} rows"
