"""The report: what it says first, that every figure is there, and that it needs nothing from outside."""

import re
from dataclasses import replace

from launcher.evaluation_report import markdown, to_html, verdict
from tests.launcher.looks import Page, assert_needs_nothing_else
from tests.launcher.made_results import made_results


def page(name: str = "evaluation") -> Page:
    return assert_needs_nothing_else(to_html(replace(made_results(), name=name)))


def test_the_first_sentence_says_which_student_to_take_and_why() -> None:
    results = made_results()
    said = verdict(results)
    assert said.startswith("Take **student** as **ONNX**: it keeps 98.0% ± 0.7 of the teacher's score")
    assert (
        "1 row in 9 ms instead of 90 ms (10.0x faster" in said and "58.2 MB on disk instead of 435 MB" in said
    )
    assert verdict(replace(results, aim=0.99)).startswith("No student keeps the 99%")
    assert "none to take" in verdict(replace(results, ship=["other"]))


def test_the_page_holds_both_figures_wide_and_narrow() -> None:
    assert len(page().loads) == 4


def test_page_and_markdown_hold_the_same_figures() -> None:
    text, words = markdown(made_results()), page().words
    for figure in (
        "91.0 ± 1.0",
        "98.9%, 3 seeds",
        "82.2%",
        "(82.4%)",
        "14.5M",
        "22.35",
        "22.5x",
        "135 ms",
        "400",
    ):
        assert figure in text and figure in words, figure
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert len({len(re.findall(r"\|", line)) for line in rows if "layers" in line}) == 1
    assert "90.00, 91.00, 92.00" in text  # every seed


def test_names_cannot_become_markup() -> None:
    assert "<script>" in page("<script>alert(1)</script>").words  # as text
    assert "script" not in page("<script>alert(1)</script>").tags
