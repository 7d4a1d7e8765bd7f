"""What all figures share: colours for light and dark pages, drawing wide and narrow, labels beside lines.

Colours of students and parts are after Okabe and Ito (2008, "Color Universal Design"), whose palette people
with any common colour vision tell apart. Layers have a ramp that grows lighter (viridis), heat maps cividis
(Nunez et al. 2018, doi:10.1371/journal.pone.0199239).
"""

import io
import math
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from launcher.page import picture

INK, SOFT, PALE, GRID, PAPER = "#1b2430", "#5b6775", "#a3aeb9", "#e4e8ec", "#ffffff"
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#b8578d", "#c98a00", "#2f9fd8", "#7b4fa3", "#8a5a2b")
"""Of students, arms and parts, in their order."""
TEACHER_COLOUR = "#444c56"
HEAT = "cividis"
"""Colour map of heat maps: the same on light and dark pages, so it has none of the colours that change."""
_RAMP_STEPS = 12
_RAMP = [to_hex(colormaps["viridis"](0.75 * step / _RAMP_STEPS)) for step in range(_RAMP_STEPS + 1)]
_ON_DARK = {
    INK: "#e3e8ee",
    SOFT: "#9aa7b5",
    PALE: "#66727f",
    GRID: "#2c3540",
    PAPER: "#171c23",
    TEACHER_COLOUR: "#b9c3ce",
    **dict(
        zip(
            COLOURS,
            ("#4aa8e0", "#f28a45", "#2fc79b", "#de8fbb", "#ebb13c", "#7cc8f0", "#b48ddb", "#c79668"),
            strict=True,
        )
    ),
    **{
        light: to_hex(colormaps["viridis"](0.4 + 0.6 * step / _RAMP_STEPS))
        for step, light in enumerate(_RAMP)
    },
}
_SETTINGS: Any = {
    "font.size": 9.5,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelcolor": SOFT,
    "axes.edgecolor": SOFT,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "lines.linewidth": 1.6,
    "text.color": INK,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "svg.hashsalt": "figure",  # the same figure gives the same bytes
}
MOST_POINTS = 300
"""A line's; more would not be seen."""

Draw = Callable[[bool], Figure]
"""Draws a figure, wide or narrow."""


def drawn(draw: Draw, wide: bool) -> Figure:
    """Return a figure in the house's style."""
    with matplotlib.rc_context(_SETTINGS):
        return draw(wide)


def new(width_in: float, height_in: float) -> Figure:
    """Return an empty figure."""
    return Figure(figsize=(width_in, height_in), layout="constrained")


def panels(wide: bool, count: int, columns: int, height_in: float) -> tuple[Figure, list[Axes]]:
    """Return a figure of ``count`` panels, each so high; a narrow one has one beneath the other."""
    columns = min(columns, count) if wide else 1
    rows = -(-count // columns)
    figure = new(9.6 if wide else 4.3, height_in * rows)
    found = figure.subplots(rows, columns, squeeze=False).flatten().tolist()
    for empty in found[count:]:
        empty.remove()
    return figure, found[:count]


def show(draw: Draw, alt: str) -> str:
    """Return a figure as a part of a page, drawn wide and narrow."""
    return picture(render(drawn(draw, True), "svg"), render(drawn(draw, False), "svg"), alt)


def render(figure: Figure, form: str) -> bytes:
    """Return the figure as ``svg``, whose colours follow the page's, or as ``png``."""
    buffer = io.BytesIO()
    with matplotlib.rc_context(_SETTINGS):
        if form == "png":
            figure.savefig(buffer, format=form, dpi=150)
            return buffer.getvalue()
        figure.savefig(buffer, format=form, transparent=True, metadata={"Date": None})
    return _themed(buffer.getvalue().decode()).encode()


def _themed(svg: str) -> str:
    """Colours become variables that a dark page's own style sets otherwise."""
    used = {light: dark for light, dark in _ON_DARK.items() if light in svg}
    for light in used:
        svg = svg.replace(light, f"var(--c{light[1:]})")
    of_light, of_dark = (
        "".join(f"--c{light[1:]}:{colour};" for light, colour in theme)
        for theme in ([(light, light) for light in used], used.items())
    )
    style = f"<style>:root{{{of_light}}}@media (prefers-color-scheme:dark){{:root{{{of_dark}}}}}</style>"
    return svg.replace("<defs>", f"{style}<defs>", 1)


def swatch(colour: str) -> str:
    """Return a small square of a colour, of HTML: what a figure's key beside it begins with."""
    dark = _ON_DARK.get(colour, colour)
    return f'<i style="background:{colour};background:light-dark({colour},{dark})"></i>'


def ramp(count: int) -> list[str]:
    """Return colours for layers 1..count."""
    return [_RAMP[round(index * _RAMP_STEPS / max(1, count - 1))] for index in range(count)]


def shade(share: float) -> str:
    """Return the ramp's colour at 0 (dark) to 1 (light)."""
    return _RAMP[round(share * _RAMP_STEPS)]


def binned(
    x: Sequence[float], y: Sequence[float], most: int = MOST_POINTS
) -> tuple[list[float], list[float]]:
    """Return at most ``most`` points: means over neighbours."""
    width = -(-len(x) // most)
    if width <= 1:
        return list(x), list(y)
    parts = [slice(first, first + width) for first in range(0, len(x), width)]
    return [sum(x[part]) / len(x[part]) for part in parts], [sum(y[part]) / len(y[part]) for part in parts]


def count(value: float, _: object = None) -> str:
    """Return ``1.2M``, ``300k``, ``45``: a count on an axis."""
    for limit, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:.4g}{unit}"
    return f"{value:.4g}"


def number(value: float, _: object = None) -> str:
    """Return a number on an axis, without needless zeros."""
    return f"{value:.4g}" if 1e-3 <= abs(value) < 1e5 or value == 0 else f"{value:.0e}".replace("e-0", "e-")


def rows_axis(axes: Axes) -> None:
    """Let the x axis count rows."""
    axes.xaxis.set_major_formatter(count)
    axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(5))
    axes.set_xlabel("rows seen")


def log_if_wide(axes: Axes, values: Sequence[float]) -> None:
    """Make the y axis logarithmic where values span more than a factor of 5."""
    finite = [value for value in values if math.isfinite(value)]
    if finite and min(finite) > 0 and max(finite) > 5 * min(finite):
        axes.set_yscale("log")
        subs = (1.0,) if max(finite) > 1e3 * min(finite) else (1.0, 2.0, 5.0)
        axes.yaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=subs))
        axes.yaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
    axes.yaxis.set_major_formatter(number)


def label_ends(axes: Axes, ends: Sequence[tuple[float, str, str]], gap: float) -> None:
    """Write labels beside the right end of lines, each a (y, text, colour), at least ``gap`` of the height
    apart. Where they do not all fit, the first and the last of them are written."""
    if len(ends) * gap > 1.15:
        ends = [ends[0], ends[-1]]
    axes.autoscale_view()
    axes.set_ylim(axes.get_ylim())  # the labels' places count on it
    placed = []
    for y, text, colour in ends:
        if math.isfinite(y):
            _, height = axes.transAxes.inverted().transform(axes.transData.transform((0.0, y)))
            placed.append((height, text, colour))
    placed.sort()
    heights = apart([height for height, _, _ in placed], gap)
    for height, (_, text, colour) in zip(heights, placed, strict=True):
        axes.annotate(
            text,
            (1, height),
            xycoords="axes fraction",
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            color=colour,
            fontsize=8.5,
        )


def apart(places: Sequence[float], gap: float) -> list[float]:
    """Return ascending places moved to at least ``gap`` apart, as little as a pass each way allows; they
    end at 1 where there is room."""
    found = list(places)
    for index in range(1, len(found)):
        found[index] = max(found[index], found[index - 1] + gap)
    top = 1.0
    for index in range(len(found) - 1, -1, -1):
        found[index] = min(found[index], top)
        top = found[index] - gap
    return found
