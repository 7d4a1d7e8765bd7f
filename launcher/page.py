"""A page: one HTML file that needs nothing else and runs nothing; light and dark, wide and narrow."""

import base64
import html
from collections.abc import Iterable
from dataclasses import dataclass


def page(name: str, heading: str, verdict: str, parts: Iterable[str]) -> str:
    """Return the whole page; what stands between ``**`` in the verdict is bold."""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{html.escape(name)}</title><style>{_STYLE}</style></head><body><main>"
        f"<p class=kicker>{html.escape(name)}</p><h1>{html.escape(heading)}</h1>"
        f"<p class=verdict>{bold(verdict)}</p>{''.join(parts)}</main></body></html>\n"
    )


def section(title: str, body: str, note: str = "", folded: bool = False) -> str:
    """Return a part of a page, of HTML; with ``folded`` it is shown when asked for."""
    head = f"<h2>{html.escape(title)}</h2>"
    if note:
        body += f"<p class=note>{html.escape(note)}</p>"
    if folded:
        return f"<section><details><summary>{head}</summary>{body}</details></section>"
    return f"<section>{head}{body}</section>"


def tiles(entries: Iterable[tuple[str, str, str]]) -> str:
    """Return figures at a glance: each a number, what it is, and of what."""
    cells = "".join(
        f"<li><b>{html.escape(figure)}</b>{html.escape(what)}<small>{html.escape(of)}</small></li>"
        for figure, what, of in entries
    )
    return f"<ul class=tiles>{cells}</ul>"


def picture(wide_svg: bytes, narrow_svg: bytes, alt: str) -> str:
    """Return a figure that lies in the page, drawn for wide windows and for narrow ones."""
    wide, narrow = (
        f"data:image/svg+xml;base64,{base64.b64encode(svg).decode()}" for svg in (wide_svg, narrow_svg)
    )
    return (
        f'<picture><source media="(max-width: {NARROW_PX}px)" srcset="{narrow}">'
        f'<img src="{wide}" alt="{html.escape(alt)}"></picture>'
    )


NARROW_PX = 700
"""Windows up to this width get narrow figures."""


@dataclass(frozen=True)
class Table:
    """A table; a cell's second line is what its first one means."""

    title: str
    header: list[str]
    rows: list[list[str]]
    note: str
    chosen: int | None = None
    """Row that belongs to the choice."""
    folded: bool = False
    """In HTML, shown when asked for."""
    words: bool = False
    """Its cells are words rather than figures: they break into lines."""

    def markdown(self) -> str:
        """Return it as Markdown."""
        lines = [self.header, ["---", *["---:"] * (len(self.header) - 1)]]
        lines += [[cell.replace("\n", "<br>") for cell in row] for row in self.rows]
        body = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        return f"## {self.title}\n\n{body}\n\n{self.note}\n"

    def html(self) -> str:
        """Return it as HTML; on narrow screens it scrolls under its first column."""
        head = "".join(f"<th scope=col>{html.escape(name)}</th>" for name in self.header)
        rows = []
        for number, row in enumerate(self.rows):
            name, *cells = (two_lines(cell) for cell in row)
            shade = ' class="chosen"' if number == self.chosen else ""
            rows.append(
                f"<tr{shade}><th scope=row>{name}</th>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"
            )
        kind = " class=words" if self.words else ""
        body = (
            f"<div class=scroll tabindex=0><table{kind}><thead><tr>{head}</tr></thead>"
            f"<tbody>{''.join(rows)}</tbody></table></div>"
        )
        return section(self.title, body, self.note, self.folded)


def two_lines(cell: str) -> str:
    """Return a cell's text, its second line as what the first one means."""
    first, _, second = html.escape(cell).partition("\n")
    return first + (f"<small>{second}</small>" if second else "")


def bold(text: str) -> str:
    """Return a text with what stands between ``**`` in bold."""
    parts = html.escape(text).split("**")
    return "".join(f"<b>{part}</b>" if number % 2 else part for number, part in enumerate(parts))


_STYLE = """
:root { color-scheme: light dark; --ink: #1b2430; --soft: #5b6775; --line: #dfe4ea; --mark: #e9f5ee;
  --accent: #0b6e4f; --paper: #ffffff; --desk: #f6f7f9 }
@media (prefers-color-scheme: dark) { :root { --ink: #e3e8ee; --soft: #9aa7b5; --line: #2c3540;
  --mark: #17332a; --accent: #4cc79b; --paper: #171c23; --desk: #0f1318 } }
* { box-sizing: border-box }
body { margin: 0; background: var(--desk); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif }
main { max-width: 68rem; margin: 0 auto; padding: 1.5rem 1rem 4rem }
.kicker { margin: 0; color: var(--soft) }
h1 { margin: 0 0 .5rem; font-size: 1.9rem; line-height: 1.2 }
h2 { margin: 0 0 .75rem; font-size: 1.2rem }
.verdict { font-size: 1.2rem; max-width: 52rem }
.verdict b { color: var(--accent) }
.tiles { list-style: none; padding: 0; display: grid; gap: .75rem;
  grid-template-columns: repeat(auto-fit, minmax(10.5rem, 1fr)) }
.tiles li, section { background: var(--paper); border: 1px solid var(--line); border-radius: .5rem;
  padding: 1rem }
.tiles small { white-space: normal }
.tiles b { display: block; font-size: 1.5rem; line-height: 1.2; color: var(--accent); white-space: nowrap }
section { margin-top: 1rem }
small { display: block; color: var(--soft); font-size: .8rem; font-weight: 400; white-space: nowrap }
.key { list-style: none; margin: 0 0 .75rem; padding: 0; display: flex; flex-wrap: wrap; gap: .25rem 1.25rem;
  font-size: .9rem }
.key i { display: inline-block; width: .8em; height: .8em; border-radius: .2em; margin-right: .4em }
.key small { display: inline }
picture img { display: block; width: 100%; height: auto; max-width: 60rem; margin: 0 auto }
.scroll { overflow-x: auto }
summary { cursor: pointer }
summary h2 { display: inline }
details .scroll { margin-top: .75rem }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums }
th, td { padding: .45rem .7rem; border-bottom: 1px solid var(--line); vertical-align: top; text-align: right;
  white-space: nowrap }
thead th { font-size: .85rem; color: var(--soft); font-weight: 600 }
th:first-child { text-align: left; position: sticky; left: 0; background: var(--paper); white-space: normal;
  min-width: 9rem }
th + td:last-child:nth-child(2) { white-space: normal; overflow-wrap: anywhere }
tr.chosen td, tr.chosen th { background: var(--mark) }
.words td, .words th { text-align: left; white-space: normal; overflow-wrap: anywhere }
th small { white-space: normal }
.note { margin: .75rem 0 0; color: var(--soft); font-size: .85rem }
"""
