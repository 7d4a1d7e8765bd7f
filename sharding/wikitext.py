"""Wiki markup to the text that a reader of the page sees: paragraphs, headings and list items, one a line.

``mwparserfromhell`` parses; this module decides what is text. What stands beside the prose goes (tables,
images, references, navigation, formulas, code); what stands inside a sentence stays (link labels, emphasis,
the few templates that carry words). Names of sections and templates are those of English Wikipedia.
"""

import re
from collections.abc import Iterator

import mwparserfromhell
from mwparserfromhell.nodes import ExternalLink, Heading, HTMLEntity, Node, Tag, Template, Text, Wikilink
from mwparserfromhell.parser import ParserError
from mwparserfromhell.wikicode import Wikicode

DROPPED_SECTIONS = set(
    (
        "references, external links, external link, see also, further reading, bibliography, notes, notes "
        "and references, references and notes, footnotes, citations, sources, works cited, gallery, image "
        "gallery, literature, selected bibliography, cited sources, general references"
    ).split(", ")
)
DROPPED_TAGS = set(
    (
        "ref references table tr td th caption gallery imagemap mapframe maplink math chem ce code "
        "syntaxhighlight source pre score timeline graph hiero templatedata templatestyles indicator "
        "categorytree inputbox includeonly style"
    ).split()
)
DROPPED_LINKS = {"file", "image", "media", "category"}
LANGUAGE_CODE = re.compile(r"[a-z]{2,3}(-[a-z]+)*|simple")

WORD_TEMPLATES = {
    name: shown
    for shown, names in {
        "{1}": (
            "nowrap, nobr, small, big, smaller, larger, abbr, tooltip, dfn, em, strong, ill, interlanguage "
            "link, nihongo, sic, not a typo, linktext, visible anchor, vanchor, angbr, sc, vr, sup, sub, "
            "keypress, midsize, val, formatnum, gaps"
        ),
        "{2|1}": "lang, rtl-lang, script, color, wikt-lang",
        "{3|2|1}": "transl, transliteration",
        "\n{text|quote|1}\n": "quote, blockquote, cquote, quotation, bq, rquote",
        " – ": "snd, spnd, spaced ndash, ndash, –, dash, mdash, mdashb, em dash",
        "c. {1}": "circa, c.",
        "{name} {1}": "uss, hms, ss, rms",
        "as of {1}": "as of, asof",
        "{1}/{2}": "frac, fraction, sfrac",
        "US${1}": "us$, usd",
        "'": "', `, apostrophe",
        " ": "nbsp, space, spaces",
        "'s": "'s",
    }.items()
    for name in names.split(", ")
}
"""Templates that carry words of the sentence, much as Wikipedia shows them: ``{2|1}`` is argument 2, or else
1; a template that lacks an argument is left out."""

MAX_UNCLOSED = 1_000
"""The parser searches the rest of the page for the end of every bracket: 3,200 that are never closed take 2 s
(one core), and the time grows with their square."""


class MarkupError(Exception):
    """Markup that cannot be parsed, or not in sensible time."""


def clean_text(markup: str) -> str:
    """The readable text of a page's markup; empty when the page has none.

    Raises: MarkupError for markup that defeats the parser.
    """
    for opening, closing in ("[]", "{}"):
        if (unclosed := markup.count(opening) - markup.count(closing)) > MAX_UNCLOSED:
            raise MarkupError(f"{unclosed} more {opening} than {closing}")
    try:
        sections = list(_sections(mwparserfromhell.parse(markup)))
    except (ParserError, RecursionError) as error:
        raise MarkupError(str(error)) from error
    kept: list[tuple[int, str, str]] = []
    for level, title, body in reversed(sections):
        # A heading stays with its text or, where it has none of its own, with the sections below it.
        if body or (kept and kept[-1][0] > level):
            kept.append((level, title, body))
    return "\n".join(part for _, title, body in reversed(kept) for part in (title, body) if part)


def _sections(page: Wikicode) -> Iterator[tuple[int, str, str]]:
    """(level, title, body) of the lead (level 1, no title) and of each section that is not dropped."""
    level, title = 1, ""
    body: list[str] = []
    dropped_level: int | None = None
    for node in page.nodes:
        if not isinstance(node, Heading):
            body.append(_render_node(node, body))
            continue
        if dropped_level is None:
            yield level, title, tidy("".join(body))
        level, title, body = node.level, tidy(_render(node.title)), []
        if dropped_level is None or level <= dropped_level:
            dropped_level = level if title.lower().rstrip(":") in DROPPED_SECTIONS else None
    if dropped_level is None:
        yield level, title, tidy("".join(body))


def _render(code: Wikicode | None) -> str:
    parts: list[str] = []
    for node in code.nodes if code is not None else ():
        parts.append(_render_node(node, parts))
    return "".join(parts)


def _render_node(node: Node, before: list[str]) -> str:
    """The text of one node (a comment has none); ``before`` is what was rendered of its siblings."""
    if isinstance(node, Text):
        return str(node.value)
    if isinstance(node, HTMLEntity):
        return str(node.normalize())
    if isinstance(node, Tag):
        return _render_tag(node, before)
    if isinstance(node, Wikilink):
        return _render_link(node)
    if isinstance(node, ExternalLink):
        return _render(node.title)
    if isinstance(node, Heading):
        return f"\n{_render(node.title)}\n"
    if isinstance(node, Template):
        return _render_template(node)
    return ""


def _render_tag(tag: Tag, before: list[str]) -> str:
    name = str(tag.tag).strip().lower()
    if name in DROPPED_TAGS:
        return ""
    if name == "dd" and before and before[-1].strip(" ") and not before[-1].endswith("\n"):
        return ": "  # "; term : definition" on one line
    content = _render(tag.contents)
    if name in ("br", "hr", "p", "div", "blockquote", "poem", "li", "ul", "ol", "dl", "center"):
        return f"\n{content}\n" if content else ("\n" if name in ("br", "hr") else "")
    return content


def _render_link(link: Wikilink) -> str:
    target = str(link.title).strip()
    prefix, colon, _ = target.partition(":")
    prefix = prefix.strip().lower()
    if colon and (prefix in DROPPED_LINKS or (link.text is None and LANGUAGE_CODE.fullmatch(prefix))):
        return ""
    if link.text is not None and (label := _render(link.text)):
        return label
    # "[[Mercury (planet)|]]" is shown as "Mercury", "[[:Category:X]]" without its first colon.
    title = _render(link.title).strip().removeprefix(":")
    return title if link.text is None else re.sub(r" \([^)]*\)$", "", title)


def _argument(template: Template, *names: str) -> str:
    """The text of the first of these arguments that the template has."""
    for name in names:
        if template.has(name):
            return _render(template.get(name).value).strip()
    return ""


def _render_quantity(template: Template) -> str:
    """``{{convert|10|to|20|km|mi}}`` as "10 to 20 km": everything up to the first unit."""
    words: list[str] = []
    for parameter in template.params:
        if parameter.showkey:
            continue
        words.append({"-": "–", "x": "×"}.get(word := _render(parameter.value).strip(), word))
        if not re.fullmatch(r"[\d.,/+−-]+|to|and|or|by|x|–|±|\+/-|to\(-\)", word):
            break
    return " ".join(words)


def _render_template(template: Template) -> str:
    name = str(template.name).strip().replace("_", " ").lower()
    if name in ("convert", "cvt"):
        return _render_quantity(template)
    if name in ("chem", "chem2"):  # "{{chem|H|2|O}}"
        return "".join(_render(parameter.value).strip() for parameter in template.params)
    if name.startswith("lang-"):
        return _argument(template, "1")
    shown = WORD_TEMPLATES.get(name, "").replace("{name}", name.upper())
    words = {field: _argument(template, *field.split("|")) for field in re.findall(r"\{([^}]+)\}", shown)}
    return re.sub(r"\{([^}]+)\}", lambda match: words[match[1]], shown) if all(words.values()) else ""


_TIDYING: list[tuple[str, str]] = [
    (r"<!--.*|__[A-Z]+__", ""),  # an unclosed comment, magic words
    (r"[\u00ad\u200b-\u200f\u2060\ufeff]", ""),  # invisible characters
    (r"[^\S\n]+", " "),
    # What the parser leaves of broken tables, images and templates.
    (r"(?m)^ ?(?:\{\||\||!).*$|\[\[(?:File|Image):.*$", ""),
    (r"(?m)\{\{?\w[^{}|\n]*\|[^{}\n]*(?:\}\}?|$)", ""),
    (
        r"(?i)</?(?:ref|div|span|small|br|center|font|su[bp]|[ibu]|p|blockquote|references|noinclude)\b[^<>]*>",
        "",
    ),
    (r"\[\[|\]\]|\{\{|\}\}|'{3,}|''", ""),
    # Punctuation that removed templates leave behind: "( ; Greek: )", "(, or )", "a ,  b".
    (r"(?:(?<=\()|(?<=; )|(?<=, ))(?:[A-Z]\w+:|pronounced|IPA:?|or|also|and) ?(?=[;,)])", ""),
    (r"([;,])(?: ?[;,])+", r"\1"),
    (r",(\.(?!\.))", r"\1"),
    (r"\([ ,;:/–-]+", "("),
    (r"[ ,;:/–-]+\)", ")"),
    (r" ?(?:\(\)|\[ ?\]|\"\"|“”)", ""),
    (r" +([,.;:!?)\]])(?=[\s,.;:)\]]|$)", r"\1"),
    (r"(?m)([(\[]) +", r"\1"),
    (r" *\n\s*", "\n"),
    (r"(?m)^[^\w\n]*$\n?", ""),  # lines without a letter or digit
    (r"  +", " "),
]
_TIDYING_COMPILED = [(re.compile(pattern), replacement) for pattern, replacement in _TIDYING]


def tidy(text: str) -> str:
    """Collapse white space and remove what dropped markup leaves behind; one paragraph a line."""
    for pattern, replacement in _TIDYING_COMPILED:
        text = pattern.sub(replacement, text)
    return text.strip()
