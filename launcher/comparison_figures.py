"""Figures of what students and teacher compute alike: CKA between all layers, attention maps side by side."""

import html
import statistics
from collections.abc import Iterator
from functools import partial

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from launcher.comparison import Comparison, Sample
from launcher.figure import HEAT, new, show
from launcher.page import section

MAX_MAPS = 4
"""Layers shown side by side."""


def sections(comparisons: list[Comparison]) -> Iterator[str]:
    """Yield the parts of a page, two for each student."""
    for found in comparisons:
        pairs = [found.cka[m][g] for m, g in enumerate((0, *found.layer_map))]
        drawn = show(partial(draw_cka, found), f"linear CKA of {found.student}'s layers with the teacher's")
        note = (
            "Linear CKA of hidden states (Kornblith et al. 2019, arXiv:1905.00414): 1 is the same up to "
            f"rotation and scale. On {found.tokens:,} held-out tokens. Outlined: the teacher layer that a "
            f"student layer learns from, with a mean of {statistics.fmean(pairs):.2f}. 0 are the embeddings."
        )
        yield section(f"What the layers of {found.student} have in common with the teacher's", drawn, note)
        maps = "".join(
            f"<p class=note>{html.escape(' '.join(sample.tokens))}</p>"
            + show(
                partial(draw_attention, found, sample), f"attention maps of {found.student} and the teacher"
            )
            for sample in found.samples
        )
        note = "Mean over heads, on the first tokens of held-out rows. Each row is where one token looks."
        yield section(f"Attention of {found.student} and the teacher", maps, note)


def draw_cka(found: Comparison, wide: bool) -> Figure:
    """Draw CKA of every student layer with every teacher layer; the layer map is outlined."""
    cka_MN = np.array(found.cka)
    students, teachers = cka_MN.shape
    figure = new(9.6 if wide else 4.3, 1.0 + (0.42 if wide else 0.3) * students)
    axes = figure.add_subplot()
    mesh = axes.pcolormesh(cka_MN, cmap=HEAT, vmin=0, vmax=1)
    axes.grid(False)
    for spine in axes.spines.values():
        spine.set_visible(False)
    size = 8.5 if wide else min(7.0, 90 / teachers)
    for (m, n), value in np.ndenumerate(cka_MN):
        colour = "#fefefe" if value < 0.5 else "#101010"  # on the cell, whatever the page
        text = f"{value:.2f}".removeprefix("0")
        axes.text(n + 0.5, m + 0.5, text, ha="center", va="center", color=colour, fontsize=size)
    for m, g in enumerate((0, *found.layer_map)):
        axes.add_patch(
            Rectangle((g, m), 1, 1, fill=False, edgecolor="#ee3124", linewidth=2, clip_on=False, zorder=3)
        )
    axes.set_xticks(np.arange(teachers) + 0.5, [str(n) for n in range(teachers)])
    axes.set_yticks(np.arange(students) + 0.5, [str(m) for m in range(students)])
    axes.tick_params(length=0)
    axes.set_xlabel("teacher layer")
    axes.set_ylabel("student layer")
    figure.colorbar(mesh, ax=axes, pad=0.01, label="linear CKA" if wide else None).outline.set_visible(False)
    return figure


def draw_attention(found: Comparison, sample: Sample, wide: bool) -> Figure:
    """Draw a student's attention maps and beside them those that they learn from."""
    layers = sorted({round(x) for x in np.linspace(0, len(found.layer_map) - 1, MAX_MAPS)})
    size, tokens = 9.6 if wide else 4.3, len(sample.tokens)
    rows, columns = (2, len(layers)) if wide else (len(layers), 2)
    side = min(2.6, (size - 1.2) / columns)
    figure = new(size, side * rows + (0.7 if wide else 1.2))
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    every = np.concatenate([map_SS.flatten().numpy() for map_SS in (*sample.student, *sample.teacher)])
    brightest = float(np.quantile(every, 0.97))  # [CLS] and [SEP] take most, and would hide the rest
    norm = PowerNorm(0.6, 0, brightest)
    for place, layer in enumerate(layers):
        for side_, (name, maps) in enumerate((("student", sample.student), ("teacher", sample.teacher))):
            axes: Axes = grid[side_, place] if wide else grid[place, side_]
            image = axes.imshow(maps[layer].numpy(), cmap=HEAT, norm=norm, interpolation="none")
            number = layer + 1 if name == "student" else found.layer_map[layer]
            axes.set_title(f"{name} {number}", fontsize=8.5)
            axes.grid(False)
            axes.tick_params(length=0, labelsize=min(7.0, 58 * side / tokens))
            for spine in axes.spines.values():
                spine.set_visible(False)
            axes.set_xticks(range(tokens), sample.tokens, rotation=90)
            axes.set_yticks(range(tokens), sample.tokens)
    bar = figure.colorbar(
        image, ax=grid, shrink=0.6, pad=0.01, extend="max", label="attention probability" if wide else None
    )
    bar.outline.set_visible(False)
    return figure
