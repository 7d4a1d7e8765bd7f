"""A page: its parts, for wide and narrow windows; what people write cannot become markup."""

from launcher.page import NARROW_PX, Table, page, picture, section, tiles
from tests.launcher.looks import Page, assert_needs_nothing_else

TABLE = Table("Scores", ["model", "score"], [["a<b\nsmall", "1"], ["c", "2"]], "In percent.", chosen=1)


def test_a_table_says_the_same_as_html_and_as_markdown() -> None:
    text, words = TABLE.markdown(), Page(TABLE.html()).words
    for cell in ("model", "score", "a<b", "small", "1", "c", "2", "In percent."):
        assert cell in text and cell in words
    assert TABLE.html().count('class="chosen"') == 1
    assert "details" not in Page(TABLE.html()).tags
    assert "details" in Page(section("Long", "text", folded=True)).tags


def test_a_page_holds_a_figure_for_wide_and_one_for_narrow_windows() -> None:
    wide, narrow = (f"<svg>{name} prefers-color-scheme:dark</svg>".encode() for name in ("wide", "narrow"))
    text = page("run", "What happened", "All **went** <well>", [picture(wide, narrow, "a 'figure'")])
    found = assert_needs_nothing_else(text)
    assert "All went <well>" in " ".join(found.words.split())
    assert ["narrow" in svg for svg in found.figures()] == [True, False]
    assert f'media="(max-width: {NARROW_PX}px)"' in text and "prefers-color-scheme: dark" in text


def test_names_cannot_become_markup() -> None:
    evil = "<script>alert(1)</script>"
    text = page(evil, evil, evil, [section(evil, "", evil), tiles([(evil, evil, evil)])])
    assert "script" not in Page(text).tags and Page(text).words.count(evil) == 9
