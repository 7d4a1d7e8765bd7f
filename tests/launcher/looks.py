"""What tests look at in a page and in a figure."""

import base64
import itertools
from html.parser import HTMLParser

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


class Page(HTMLParser):
    """Tags, what they load, and the text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.loads: list[str] = []
        self.words = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loads += [value or "" for name, value in attrs if name in ("src", "srcset", "href", "data")]

    def handle_data(self, data: str) -> None:
        self.words += data + " "

    def figures(self) -> list[str]:
        """The SVGs that lie in it, wide and narrow."""
        return [base64.b64decode(load.partition(",")[2]).decode() for load in self.loads]


def assert_needs_nothing_else(text: str) -> Page:
    """Neither the page nor its figures load or run anything; returns the page."""
    page = Page(text)
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    assert "@import" not in text and "url(" not in text
    assert all(load.startswith("data:image/svg+xml;base64,") for load in page.loads)
    for svg in page.figures():
        figure = Page(svg)
        assert "script" not in figure.tags and "@import" not in svg
        assert not [load for load in figure.loads if not load.startswith("#")]
        assert "prefers-color-scheme:dark" in svg
    return page


def assert_readable(figure: Figure) -> None:
    """No text is cut off by the figure's edge, and none lies on another."""
    FigureCanvasAgg(figure).draw()
    texts = [text for legend in figure.legends for text in legend.get_texts()]
    for axes in figure.axes:
        texts += [axes.title, axes._left_title, axes.xaxis.label, axes.yaxis.label, *axes.texts]
        for axis in (axes.xaxis, axes.yaxis) if axes.axison else ():
            low, high = sorted(axis.get_view_interval())
            ticks = [*axis.get_major_ticks(), *axis.get_minor_ticks()]
            texts += [tick.label1 for tick in ticks if low <= tick.get_loc() <= high]
    shown = [text for text in texts if text.get_visible() and text.get_text().strip()]
    boxes = [(text.get_text(), text.get_window_extent()) for text in shown]
    whole = figure.bbox.padded(1)
    cut = [text for text, box in boxes if (box.min < whole.min).any() or (box.max > whole.max).any()]
    assert not cut, f"cut off: {cut}"
    pairs = itertools.combinations(boxes, 2)
    hidden = [(one, other) for (one, a), (other, b) in pairs if a.padded(-1).overlaps(b.padded(-1))]
    assert not hidden, f"one on the other: {hidden}"
