"""The figure of an evaluation: what students keep of the teacher's score, against their latency."""

import io

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from launcher.results import FORMS, Results

MARKERS = {"pytorch": "o", "onnx": "s", "int8": "D"}
COLOURS = ("#0b6e4f", "#d1495b", "#2e5eaa", "#e0a100", "#7b4fa3", "#00838f", "#8a5a2b", "#c2185b")
TEACHER_COLOUR = "#444c56"


def draw(results: Results, width_in: float, height_in: float, beside: bool) -> Figure:
    """Draw share of the teacher's score (percent, mean over tasks) against median latency (log scale).

    Bars are the standard deviation that the seeds give. The legend stands ``beside`` the axes, or below.
    """
    figure = Figure(figsize=(width_in, height_in), layout="constrained")
    axes = figure.add_subplot()
    drawn: dict[str, str] = {}
    forms = set()
    for number, arm in enumerate(results.everyone()):
        colour = COLOURS[(number - 1) % len(COLOURS)] if number else TEACHER_COLOUR
        for form, marker in MARKERS.items():
            kept, timing = results.kept(arm, form), results.latency(arm, form)
            if kept is None or timing is None:
                continue
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
    aim = axes.axhline(100 * results.aim, color="#0b6e4f", linewidth=1, linestyle="--")
    aim.set_label(f"aim {results.aim:.0%}")
    rows = results.batch_rows[0]
    call = "1 row" if rows == 1 else f"{rows} rows"
    between = " " if beside else "\n"
    axes.set_xlabel(f"median latency, ms{between}({call} of {results.seq_len} tokens, {results.devices[0]})")
    axes.set_ylabel("kept of the teacher's score, %")
    axes.grid(True, color="#e4e8ec")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    _legend(figure, aim, drawn, [form for form in FORMS if form in forms], beside)
    return figure


def _legend(figure: Figure, aim: Line2D, colour_of: dict[str, str], forms: list[str], beside: bool) -> None:
    """Colours are models, markers are forms."""
    handles = [
        Line2D([], [], color=colour, marker="o", linestyle="none", markersize=9, label=name)
        for name, colour in colour_of.items()
    ]
    if len(forms) > 1:
        handles += [
            Line2D([], [], color="#9aa4af", marker=MARKERS[form], linestyle="none", label=FORMS[form])
            for form in forms
        ]
    handles.append(aim)
    if beside:
        figure.legend(handles=handles, loc="outside right upper", frameon=False)
    else:
        figure.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False)


def render(figure: Figure, form: str) -> bytes:
    """Return the figure as ``svg`` or ``png``; the same figure gives the same bytes."""
    buffer = io.BytesIO()
    metadata = {"Date": None} if form == "svg" else None
    figure.savefig(buffer, format=form, dpi=150, metadata=metadata)
    return buffer.getvalue()
