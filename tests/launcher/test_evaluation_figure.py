"""The figure shows every model and form at its place, and the same figure is the same bytes."""

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from launcher.evaluation_figure import draw, render
from tests.launcher.made_results import made_results


def test_every_model_is_drawn_at_its_latency_and_share() -> None:
    results = made_results()
    figure = draw(results, 9.0, 4.6, beside=True)
    (axes,) = figure.axes
    drawn = {
        (float(container.lines[0].get_xdata()[0]), round(float(container.lines[0].get_ydata()[0]), 1))
        for container in axes.containers
    }
    assert drawn == {(90.0, 100.0), (80.0, 100.0), (12.0, 98.0), (9.0, 98.0), (4.0, 95.3), (12.0, 82.2)}
    named = [text.get_text() for text in figure.legends[0].get_texts()]
    assert named == ["teacher", "student", "finetuned", "PyTorch", "ONNX", "ONNX int8", "aim 96%"]
    assert axes.get_xscale() == "log" and "1 row of 128 tokens" in axes.get_xlabel()


@pytest.mark.parametrize("beside", [True, False])
def test_nothing_is_cut_off(beside: bool) -> None:
    figure = draw(made_results(), *((9.0, 4.6) if beside else (4.2, 4.8)), beside=beside)
    FigureCanvasAgg(figure).draw()
    whole = figure.bbox
    for artist in (*figure.legends, figure.axes[0].xaxis.label, figure.axes[0].yaxis.label):
        box = artist.get_window_extent()
        assert whole.x0 <= box.x0 and box.x1 <= whole.x1 and whole.y0 <= box.y0 and box.y1 <= whole.y1


def test_formats() -> None:
    figure = draw(made_results(), 4.0, 4.0, beside=False)
    assert render(figure, "png").startswith(b"\x89PNG")
    assert b"<svg" in render(figure, "svg")
