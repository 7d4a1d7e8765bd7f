"""Dumps: cut anywhere, read by part, and the same pages come as from the plain XML by another parser."""

import bz2
import re
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.corpus_schema import SourceConfig, SourceKind
from sharding.documents import Part
from sharding.dumps import page_starts
from sharding.manifest import CorpusError
from sharding.sources import documents, parts
from tests.sharding.test_sources import dump_xml

PAGES = [
    (
        10 + number,
        number % 5 // 4,
        f"Pagé {number} of 世界 &lt;page&gt; {{{{x}}}}\n" * (number % 7),
        "X" * (number % 3 // 2),
    )
    for number in range(60)
]
NAME = "enwiki-20240101-pages-articles-multistream.xml.bz2"
INDEX = "enwiki-20240101-pages-articles-multistream-index.txt.bz2"


def expected(xml: bytes) -> list[tuple[str, str]]:
    """The articles of an export, by a parser of the standard library that sees the whole of it."""
    found = []
    for page in ET.fromstring(xml).iterfind("{*}page"):
        text = page.findtext("{*}revision/{*}text") or ""
        if page.findtext("{*}ns") == "0" and page.find("{*}redirect") is None and text.strip():
            found.append((page.findtext("{*}id") or "", text))
    return found


def multistream(pages_per_stream: int = 3) -> tuple[bytes, str]:
    """A dump as Wikimedia makes it, and its index: the head, some pages a stream, the closing tag."""
    xml = dump_xml(PAGES)
    starts = [match.start() for match in re.finditer(b"<page>", xml)]
    end = xml.index(b"</mediawiki>")
    dump, lines = bz2.compress(xml[: starts[0]]), []
    for first in range(0, len(starts), pages_per_stream):
        for page in PAGES[first : first + pages_per_stream]:
            lines.append(f"{len(dump)}:{page[0]}:Page: {page[0]}\n")
        dump += bz2.compress(xml[starts[first] : [*starts, end][min(first + pages_per_stream, len(starts))]])
    return dump + bz2.compress(xml[end:]), "".join(lines)


DUMP, LINES = multistream()


def source_of(path: Path) -> SourceConfig:
    return SourceConfig(kind=SourceKind.mediawiki, path=str(path))


def read(path: Path, part_bytes: int) -> tuple[list[Part], list[tuple[str, str]]]:
    found = parts(source_of(path), part_bytes)
    assert [part.name for part in found] == sorted({part.name for part in found})
    assert sum(part.bytes for part in found) == path.stat().st_size
    return found, [tuple(document) for part in found for document in documents(source_of(path), part)]


@pytest.mark.parametrize("indexed", [True, False])
def test_multistream_dumps_are_cut_at_streams(tmp_path: Path, indexed: bool) -> None:
    path = tmp_path / NAME
    path.write_bytes(DUMP)
    if indexed:
        (tmp_path / INDEX).write_bytes(bz2.compress(LINES.encode()))
    streams = {int(line.split(":")[0]) for line in LINES.splitlines()}
    cut = {}
    for part_bytes in (1, 100, 777, 2_000, 4_000, len(DUMP), 10**9):
        found, texts = read(path, part_bytes)
        assert texts == expected(dump_xml(PAGES))
        assert {part.start for part in found} <= {0} | streams
        assert not any(part.sequential for part in found)
        cut[part_bytes] = len(found)
    assert cut[1] == len(streams) + 1 and 1 < cut[2_000] < cut[777] and cut[len(DUMP)] == cut[10**9] == 1


@pytest.mark.parametrize("part_bytes", [100, 10**9])
def test_a_folder_of_dumps_with_their_indices(tmp_path: Path, part_bytes: int) -> None:
    for piece in ("1", "2"):
        (tmp_path / f"w-multistream{piece}.xml-p{piece}p9.bz2").write_bytes(DUMP)
        (tmp_path / f"w-multistream-index{piece}.txt-p{piece}p9.bz2").write_bytes(
            bz2.compress(LINES.encode())
        )
    for path in (tmp_path, tmp_path / "w-*"):
        found = parts(source_of(path), part_bytes)
        assert [part.name for part in found] == sorted({part.name for part in found})
        assert len({part.source for part in found}) == 2
        texts = [tuple(document) for part in found for document in documents(source_of(path), part)]
        assert texts == 2 * expected(dump_xml(PAGES))
    # Of one of them the index is another's: it is used, and found wrong.
    (tmp_path / "w-multistream-index2.txt-p2p9.bz2").write_bytes(bz2.compress(b"7:1:x\n"))
    if part_bytes == 100:
        with pytest.raises(CorpusError, match="index2.txt-p2p9.bz2 says that pages begin at byte"):
            parts(source_of(tmp_path), 1)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("5000:1:x\n", r"says that pages begin at byte 5,000 of .*none do: .*remove the index"),
        (f"{LINES}{len(DUMP)}:9:x\n", rf"begin at byte {len(DUMP):,} of .*\({len(DUMP):,} bytes\)"),
        ("no index\n", "is truncated, damaged or no index: .*'no index'"),
        ("", None),
    ],
)
def test_wrong_indices(tmp_path: Path, lines: str, message: str | None) -> None:
    (tmp_path / NAME).write_bytes(DUMP)
    (tmp_path / INDEX).write_bytes(bz2.compress(lines.encode()))
    if message is None:
        assert read(tmp_path / NAME, 1_000)[1] == expected(dump_xml(PAGES))
        return
    with pytest.raises(CorpusError, match=message):
        parts(source_of(tmp_path / NAME), 1_000)


def test_index_that_names_the_head_or_the_end(tmp_path: Path) -> None:
    end = DUMP.rindex(b"BZh9")
    for wrong in (f"{end}:1:x\n", f"4:1:x\n{LINES}"):
        (tmp_path / NAME).write_bytes(DUMP)
        (tmp_path / INDEX).write_bytes(bz2.compress(wrong.encode()))
        with pytest.raises(CorpusError, match="says that pages begin at byte"):
            parts(source_of(tmp_path / NAME), 1)


def test_truncated_index(tmp_path: Path) -> None:
    (tmp_path / NAME).write_bytes(DUMP)
    (tmp_path / INDEX).write_bytes(bz2.compress(LINES.encode())[:-9])
    with pytest.raises(CorpusError, match="index.txt.bz2 is truncated"):
        parts(source_of(tmp_path / NAME), 1_000)


@settings(max_examples=600, deadline=None)
@given(cuts=st.lists(st.integers(0, len(dump_xml(PAGES)))), part_bytes=st.integers(1, 4_000))
def test_streams_that_begin_anywhere(
    tmp_path_factory: pytest.TempPathFactory, cuts: list[int], part_bytes: int
) -> None:
    """As pbzip2 makes them: only those that happen to begin at a page begin parts."""
    xml = dump_xml(PAGES)
    bounds = sorted({0, *cuts, len(xml)})
    path = tmp_path_factory.mktemp("dump") / "d.xml.bz2"
    path.write_bytes(b"".join(bz2.compress(xml[a:b]) for a, b in zip(bounds, bounds[1:], strict=False)))
    assert read(path, part_bytes)[1] == expected(xml)


def test_streams_that_cut_pages_are_one_sequential_part(tmp_path: Path) -> None:
    xml = dump_xml(PAGES)
    path = tmp_path / "d.xml.bz2"
    path.write_bytes(b"".join(bz2.compress(xml[at : at + 1_001]) for at in range(0, len(xml), 1_001)))
    starts = [match.start() for match in re.finditer(rb"BZh91AY&SY", path.read_bytes())]
    assert len(starts) > 5 and page_starts(path, 500) == [0]
    (part,), texts = read(path, 500)
    assert part.sequential and (part.start, part.stop) == (0, None) and texts == expected(xml)


def test_other_compressions_are_one_part(tmp_path: Path) -> None:
    import gzip
    import lzma

    for name, pack in {
        "d.xml.gz": gzip.compress,
        "d.xml.xz": lzma.compress,
        "e.xml.bz2": bz2.compress,
    }.items():
        (tmp_path / name).write_bytes(pack(dump_xml(PAGES)))
        (part,), texts = read(tmp_path / name, 100)
        assert part.sequential and texts == expected(dump_xml(PAGES))
        (part,), _ = read(tmp_path / name, 10**6)
        assert not part.sequential


@settings(max_examples=60, deadline=None)
@given(part_bytes=st.integers(1, 30_000))
def test_plain_xml_is_cut_at_pages(tmp_path_factory: pytest.TempPathFactory, part_bytes: int) -> None:
    path = tmp_path_factory.mktemp("dump") / "d.xml"
    path.write_bytes(dump_xml(PAGES))
    found, texts = read(path, part_bytes)
    assert texts == expected(dump_xml(PAGES))
    if part_bytes < 200:  # every page is longer
        assert len(found) == len(PAGES) + 1
    assert all(dump_xml(PAGES)[part.start :].startswith(b"<page>") for part in found[1:])


def test_a_tag_across_the_reads_of_a_search(tmp_path: Path) -> None:
    head, rest = dump_xml([(1, 0, "a", ""), (2, 0, "b", "")]).split(b"<page>", 1)
    second = rest.index(b"<page>")
    for shift in range(8):  # the second tag straddles byte 65,536 behind the place where the search begins
        padding = b" " * (65_536 - second + 4 - shift)
        path = tmp_path / "d.xml"
        path.write_bytes(head + b"<page>" + rest[:second] + padding + rest[second:])
        assert read(path, len(head) + 1)[1] == [("1", "a"), ("2", "b")]
        assert page_starts(path, len(head) + 1)[1:] == [path.read_bytes().rindex(b"<page>")]


@pytest.mark.parametrize("part_bytes", [1, 1_000, 10**9])
def test_dumps_cut_short(tmp_path: Path, part_bytes: int) -> None:
    path = tmp_path / NAME
    last_page = int(LINES.splitlines()[-1].split(":")[0])
    for size in (0, 10, 500, last_page, last_page + 30, DUMP.rindex(b"BZh9"), len(DUMP) - 1):
        path.write_bytes(DUMP[:size])
        with pytest.raises(CorpusError, match=rf"{NAME} is truncated or damaged: .*of {size:,}\); fetch it"):
            read(path, part_bytes)


@pytest.mark.parametrize("indexed", [True, False])
@pytest.mark.parametrize("part_bytes", [1, 1_000, 10**9])
def test_a_damaged_stream_is_never_passed_over(tmp_path: Path, part_bytes: int, indexed: bool) -> None:
    path = tmp_path / NAME
    streams = sorted({int(line.split(":")[0]) for line in LINES.splitlines()})
    if indexed:
        (tmp_path / INDEX).write_bytes(bz2.compress(LINES.encode()))
    for place in (streams[5], streams[5] + 1, streams[5] + 6, streams[5] + 40, streams[-1]):
        content = bytearray(DUMP)
        content[place] ^= 0xFF
        path.write_bytes(content)
        with pytest.raises(CorpusError, match=f"{NAME}"):
            read(path, part_bytes)


def test_pages_without_their_parts(tmp_path: Path) -> None:
    (tmp_path / "d.xml").write_bytes(dump_xml(PAGES).replace(b"<id>14</id>", b"<id></id>", 1))
    with pytest.raises(CorpusError, match="d.xml is truncated or damaged: a page lacks its title, number"):
        read(tmp_path / "d.xml", 1_000)


def test_memory_does_not_grow_with_the_part(tmp_path: Path) -> None:
    import tracemalloc

    peaks = []
    for count in (20, 80):
        pages = [(page, 0, f"{page} words " * 6_000, "") for page in range(count)]
        path = tmp_path / f"{count}.xml.bz2"
        path.write_bytes(bz2.compress(dump_xml(pages)))
        (part,) = parts(source_of(path))
        tracemalloc.start()
        assert sum(1 for _ in documents(source_of(path), part)) == count
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0]
