"""Wiki markup: what a reader of the page would see, case by case."""

import pytest

from sharding.wikitext import MarkupError, clean_text, tidy

CASES = {
    "emphasis": ("'''Bold''' and ''italic'' and '''''both'''''.", "Bold and italic and both."),
    "links": (
        "[[Paris]] is in [[France|a country]], on [[Seine (river)|]], in [[Europe#W|''western'' Europe]]s.",
        "Paris is in a country, on Seine, in western Europes.",
    ),
    "link with colon": ("See [[:Category:Rivers]].", "See Category:Rivers."),
    "image": ("[[File:A.jpg|thumb|200px|A [[river]] <ref>x</ref> caption]]It flows.", "It flows."),
    "categories": ("It flows.\n[[Category:Rivers]]\n[[fr:Fleuve]] [[simple:River]]", "It flows."),
    "external links": (
        "A [http://x.org page] and [http://y.org] and http://z.org here.",
        "A page and and here.",
    ),
    "references": (
        "Water<ref name=a>{{cite web|url=x}}</ref> is wet.<ref name=a /><ref>b</ref>",
        "Water is wet.",
    ),
    "comment": ("One<!-- not\nthis --> two.", "One two."),
    "table": ("Before.\n{| class=x\n! a\n|-\n| [[b]] || c\n|}\nAfter.", "Before.\nAfter."),
    "nested table": ("Before.\n{|\n| a\n{|\n| b\n|}\n|}\nAfter.", "Before.\nAfter."),
    "infobox": (
        "{{Infobox river\n| name = Aa\n| image = [[File:x.jpg]]\n}}\nThe '''Aa''' is short.",
        "The Aa is short.",
    ),
    "kept templates": (
        "It is {{convert|10|km|mi|abbr=on}} long, {{Convert|5|-|6|ft|m}} deep, {{nowrap|8 p.m.}}, "
        "{{lang|de|Fluss}}, ({{lang-fr|fleuve}}), {{circa|1900}}, H{{sub|2}}O, {{chem|C|O|2}}, "
        "[[USS]] or {{USS|Maine|1889}}.",
        "It is 10 km long, 5 – 6 ft deep, 8 p.m., Fluss, (fleuve), c. 1900, H2O, CO2, USS or USS Maine.",
    ),
    "quote": ("He said:\n{{quote|To be.|Hamlet}}\nAnd left.", "He said:\nTo be.\nAnd left."),
    "empty parentheses": ("Aa ({{IPA|aː}}) is short ({{unknown}}; {{other}}) indeed.", "Aa is short indeed."),
    "half-empty parentheses": (
        "Aa ({{IPA|x}}; born 1900) and Bb (born 1901, {{IPA|y}}) and Cc (Greek: {{x}}, old).",
        "Aa (born 1900) and Bb (born 1901) and Cc (old).",
    ),
    "commas": ("Red, {{x}}, blue {{y}}, green {{z}}.", "Red, blue, green."),
    "entities": ("5&nbsp;km &mdash; &lt;b&gt; &amp; &#955;", "5 km — & λ"),
    "line break": ("One<br/>two<br>three", "One\ntwo\nthree"),
    "inline tags": (
        "H<sub>2</sub>O, E<sup>3</sup>, <span style='x'>red</span> <small>tiny</small>",
        "H2O, E3, red tiny",
    ),
    "formula and code": (
        "Energy <math>E=mc^2</math> is <code>x</code> big.<source lang=c>int</source>",
        "Energy is big.",
    ),
    "gallery": ("Look.<gallery>\nFile:x.jpg|A caption\n</gallery>", "Look."),
    "magic words": ("__NOTOC__\nText.__NOEDITSECTION__", "Text."),
    "nowiki": ("A <nowiki>'''raw'''</nowiki> word", "A raw word"),
    "lists": ("* one\n** ''two''\n# three\n: four\n; term : meaning", "one\ntwo\nthree\nfour\nterm: meaning"),
    "headings": ("Lead.\n== A ==\nText.\n=== B ===\nMore.", "Lead.\nA\nText.\nB\nMore."),
    "empty sections": ("Lead.\n== A ==\n{{x}}\n== B ==\n=== C ===\nText.", "Lead.\nB\nC\nText."),
    "dropped sections": (
        "Lead.\n== See also ==\n* x\n=== Sub ===\ny\n== History ==\nText.\n==References==\n{{reflist}}\n"
        "==''External links''==\n* [http://x y]",
        "Lead.\nHistory\nText.",
    ),
    "file names in prose": ("Use .NET and , well, e.g. it ...", "Use .NET and, well, e.g. it..."),
    "nothing": ("{{stub}}\n[[Category:X]]", ""),
    "broken table": ("Before.\n{| class=x\n| cell [[x\n", "Before."),
    "broken image": ("Before.\n[[File:x.svg|thumb|an [unbalanced caption\nAfter.", "Before.\nAfter."),
    "broken template": ("Before {{cite web |url=x |title=y.\nAfter.", "Before\nAfter."),
    "misspelt template": ("Before{cite web |url=x |title=y}}, after.", "Before, after."),
    "unclosed comment": ("Before.<!-- what follows is", "Before."),
}


@pytest.mark.parametrize("name", CASES)
def test_a_reader_would_see(name: str) -> None:
    markup, text = CASES[name]
    assert clean_text(markup) == text


def test_deep_nesting_ends() -> None:
    assert "x" in clean_text("[[" * 300 + "x" + "]]" * 300 + "{{" * 300 + "''" * 300)
    assert clean_text("{|\n|" * 300 + "Text.\n" + "|}\n" * 300) is not None


@pytest.mark.parametrize("unclosed", ["[[a|{{lang|x|", "{{{a|", "[http://a "])
def test_markup_that_would_take_hours_is_refused(unclosed: str) -> None:
    with pytest.raises(MarkupError, match="more [{[] than"):
        clean_text(unclosed * 100_000)


def test_tidying_twice_changes_nothing() -> None:
    text = tidy("  A ( ; b , )  c ,, d [ ] . \n\n ---- \n e\u200b\u00a0f ( g ) ")
    assert text == "A (b) c, d.\ne f (g)" and tidy(text) == text
