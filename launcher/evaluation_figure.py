"""The figures of an evaluation: what students keep of the teacher's score, against their latency, by task."""

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from launcher.figure import COLOURS, INK, PAPER, SOFT, TEACHER_COLOUR, new
from launcher.results import FORMS, Results, deviation

MARKERS = {"pytorch": "o", "onnx": "s", "int8": "D"}
AIM_COLOUR = COLOURS[2]


def colour_of(number: int) -> str:
    """Return the colour of an arm, counted from 1; 0 is the teacher."""
    return COLOURS[(number - 1) % len(COLOURS)] if number else TEACHER_COLOUR


def draw(results: Results, wide: bool) -> Figure:
    """Draw share of the teacher's score (percent, mean over tasks) against median latency (log scale).

    Only arms that were scored on all tasks. Bars are the standard deviation that the seeds give. The legend
    stands beside the axes, or below.
    """
    figure = new(9.0, 4.6) if wide else new(4.2, 4.8)
    axes = figure.add_subplot()
    drawn: dict[str, str] = {}
    forms = set()
    for number, arm in enumerate(results.everyone()):
        colour = colour_of(number)
        for form, marker in MARKERS.items():
            kept, timing = results.kept(arm, form), results.latency(arm, form)
            if kept is None or kept.columns < len(results.columns) or timing is None:
                continue  # means over other tasks cannot be compared
            spread = None if kept.spread is None else 100 * kept.spread
            axes.errorbar(
                timing.p50_ms, 100 * kept.mean, spread, fmt=marker, color=colour, capsize=3, markersize=9
            )
            drawn[arm.name] = colour
            forms.add(form)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.xaxis.set_minor_formatter(lambda value, _: f"{value:g}" if f"{value:.0e}"[0] in "25" else "")
    axes.margins(0.12)
    aim = axes.axhline(100 * results.aim, color=AIM_COLOUR, linewidth=1, linestyle="--")
    aim.set_label(f"aim {results.aim:.0%}")
    rows = results.batch_rows[0]
    call = "1 row" if rows == 1 else f"{rows} rows"
    between = " " if wide else "\n"
    axes.set_xlabel(f"median latency, ms{between}({call} of {results.seq_len} tokens, {results.devices[0]})")
    axes.set_ylabel("kept of the teacher's score, %")
    _legend(figure, aim, drawn, [form for form in FORMS if form in forms], wide)
    return figure


def draw_retention(results: Results, wide: bool) -> Figure:
    """Draw the share of the teacher's score (percent) that every arm keeps on every task, in PyTorch."""
    bars = [
        [
            (number, [100 * value / results.teacher_score(column) for value in arm.values("pytorch", column)])
            for number, arm in enumerate(results.arms, start=1)
            if arm.values("pytorch", column)
        ]
        for column in results.columns
    ]
    figure = new(9.0 if wide else 4.2, 1.2 + sum(0.2 + 0.22 * len(own) for own in bars))
    axes = figure.add_subplot()
    y, middles, named = 0.0, [], set()
    for own in bars:
        middles.append(y + (len(own) - 1) / 2)
        for number, shares in own:
            name = results.arms[number - 1].name
            _bar(axes, y, number, shares, None if name in named else name)
            named.add(name)
            y += 1
        y += 1
    axes.axvline(100, color=TEACHER_COLOUR, linewidth=1)
    axes.axvline(
        100 * results.aim, color=AIM_COLOUR, linewidth=1, linestyle="--", label=f"aim {results.aim:.0%}"
    )
    axes.set_yticks(middles, [column.name for column in results.columns])
    axes.set_ylim(y - 1, -1)
    axes.grid(False, axis="y")
    axes.margins(x=0.02)
    axes.set_xlabel("kept of the teacher's score, %")
    figure.legend(loc="outside upper left", ncols=4 if wide else 2, frameon=False)
    return figure


def _bar(axes: Axes, y: float, number: int, shares: Sequence[float], label: str | None) -> None:
    """Draw an arm's share of a task: the mean, and where there are several seeds these."""
    mean, spread = sum(shares) / len(shares), deviation(shares)
    hatch = "//" if number > len(COLOURS) else None  # colours begin again
    axes.barh(y, mean, 0.86, color=colour_of(number), alpha=0.85, label=label, hatch=hatch, edgecolor=PAPER)
    if spread is not None:
        axes.errorbar(mean, y, xerr=spread, color=INK, capsize=2, linewidth=1)
        axes.plot(shares, [y] * len(shares), "o", color=PAPER, markeredgecolor=INK, markersize=3)
    axes.annotate(
        f"{mean:.1f}%",
        (1, y),
        xycoords=("axes fraction", "data"),
        xytext=(5, 0),
        textcoords="offset points",
        va="center",
        fontsize=8,
        color=SOFT,
    )


def _legend(figure: Figure, aim: Line2D, colours: dict[str, str], forms: list[str], wide: bool) -> None:
    """Colours are models, markers are forms."""
    handles = [
        Line2D([], [], color=colour, marker="o", linestyle="none", markersize=9, label=name)
        for name, colour in colours.items()
    ]
    if len(forms) > 1:
        handles += [
            Line2D([], [], color=SOFT, marker=MARKERS[form], linestyle="none", label=FORMS[form])
            for form in forms
        ]
    handles.append(aim)
    if wide:
        figure.legend(handles=handles, loc="outside right upper", frameon=False)
    else:
        figure.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False)
