"""Sources: what is read, in which order, under which ids, and what bad input is told."""

import bz2
import codecs
import gzip
import itertools
import json
import lzma
import pickle
import random
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.corpus_schema import SourceConfig, SourceKind
from sharding.documents import Part
from sharding.manifest import CorpusError
from sharding.sources import documents, parts


def dump_xml(pages: list[tuple[int, int, str, str]], closed: bool = True) -> bytes:
    """A MediaWiki export of (id, namespace, markup, redirect target or "")."""
    body = "".join(
        f"<page><title>Page {page}</title><ns>{namespace}</ns><id>{page}</id>"
        + (f'<redirect title="{redirect}" />' if redirect else "")
        + f"<revision><id>{page + 1000}</id><timestamp>2016-03-01T00:00:00Z</timestamp>"
        f"<contributor><username>x</username><id>1</id></contributor><model>wikitext</model>"
        f'<format>text/x-wiki</format><text xml:space="preserve">{markup}</text><sha1>x</sha1></revision>'
        "</page>\n"
        for page, namespace, markup, redirect in pages
    )
    head = (
        '<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.10/" version="0.10" xml:lang="en">'
        "<siteinfo><sitename>W</sitename><dbname>w</dbname><base>b</base><generator>g</generator><case>c</case>"
        '<namespaces><namespace key="0" case="first-letter" /><namespace key="1" case="x">Talk</namespace>'
        "</namespaces></siteinfo>\n"
    )
    return (head + body + ("</mediawiki>" if closed else "")).encode()


def read(kind: SourceKind, path: Path | str, **keys: object) -> list[tuple[str, str]]:
    source = SourceConfig(kind=kind, path=str(path), **keys)  # type: ignore[arg-type]
    return [tuple(document) for part in parts(source) for document in documents(source, part)]


PAGES = [
    (12, 0, "First.", ""),
    (13, 1, "Talk.", ""),
    (14, 0, "#REDIRECT [[X]]", "X"),
    (15, 0, "", ""),
    (16, 0, "Last &amp; least.", ""),
]


@pytest.mark.parametrize(
    ("name", "pack"), [("d.xml", bytes), ("d.xml.bz2", bz2.compress), ("d.xml-p1p9.bz2", bz2.compress)]
)
def test_mediawiki_keeps_articles_only(tmp_path: Path, name: str, pack: type[bytes]) -> None:
    (tmp_path / name).write_bytes(pack(dump_xml(PAGES)))
    expected = [("12", "First."), ("16", "Last & least.")]
    assert read(SourceKind.mediawiki, tmp_path / name) == expected
    assert read(SourceKind.mediawiki, tmp_path) == expected
    assert read(SourceKind.mediawiki, tmp_path / "d.*") == expected


def test_multistream_bz2_is_read_to_its_end(tmp_path: Path) -> None:
    content = dump_xml(PAGES)
    cuts = [0, 300, 700, len(content)]
    streams = [bz2.compress(content[a:b]) for a, b in zip(cuts, cuts[1:], strict=False)]
    (tmp_path / "d.xml.bz2").write_bytes(b"".join(streams))
    assert [page for page, _ in read(SourceKind.mediawiki, tmp_path / "d.xml.bz2")] == ["12", "16"]


def test_parsed_pages_are_forgotten(tmp_path: Path) -> None:
    import tracemalloc

    peaks = []
    for count in (500, 2_000):
        path = tmp_path / f"{count}.xml"
        path.write_bytes(dump_xml([(page, 0, "Text.", "") for page in range(count)]))
        source = SourceConfig(kind=SourceKind.mediawiki, path=str(path))
        tracemalloc.start()
        assert sum(1 for _ in documents(source, parts(source)[0])) == count
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0]


def test_truncated_bz2_names_file_and_place(tmp_path: Path) -> None:
    path = tmp_path / "d.xml.bz2"
    whole = bz2.compress(dump_xml([(page, 0, f"Page {page} " * 40, "") for page in range(500)]))
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CorpusError, match="d.xml.bz2 is truncated or damaged: .*fetch it again") as error:
        read(SourceKind.mediawiki, path)
    assert f"of {len(whole) // 2:,})" in str(error.value)


def test_cut_at_the_end_of_a_bz2_stream_is_noticed(tmp_path: Path) -> None:
    content = dump_xml(PAGES)
    (tmp_path / "d.xml.bz2").write_bytes(bz2.compress(content[:-200]))
    with pytest.raises(CorpusError, match=r"d.xml.bz2 is truncated or damaged: .*after [12] documents"):
        read(SourceKind.mediawiki, tmp_path / "d.xml.bz2")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (dump_xml(PAGES, closed=False), "no element found"),
        (b"", "no element found"),
        (b"<html></html>", "first element is <html>"),
        (b"<mediawiki></mediawiki>", "siteinfo"),
        (b"BZh9 this is not XML", "syntax error"),
    ],
)
def test_damaged_xml(tmp_path: Path, content: bytes, reason: str) -> None:
    (tmp_path / "d.xml").write_bytes(content)
    with pytest.raises(CorpusError, match=f"d.xml is truncated or damaged: .*{reason}"):
        read(SourceKind.mediawiki, tmp_path / "d.xml")


def test_overwritten_bz2(tmp_path: Path) -> None:
    content = bytearray(bz2.compress(dump_xml(PAGES)))
    content[len(content) // 2] ^= 0xFF
    (tmp_path / "d.xml.bz2").write_bytes(content)
    with pytest.raises(CorpusError, match="truncated or damaged"):
        read(SourceKind.mediawiki, tmp_path / "d.xml.bz2")


@pytest.mark.parametrize(
    ("suffix", "pack"), [("", bytes), (".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress)]
)
def test_json_lines(tmp_path: Path, suffix: str, pack: type[bytes]) -> None:
    lines = [json.dumps({"text": "One"}), "", json.dumps({"text": "  "}), json.dumps({"text": "Zwölf"})]
    path = tmp_path / f"b.jsonl{suffix}"
    path.write_bytes(pack("\n".join(lines).encode()))
    assert read(SourceKind.jsonl, path) == [(f"{path.name}@0", "One"), (f"{path.name}@32", "Zwölf")]


@pytest.mark.parametrize(
    ("content", "texts"), [(b"", []), (b"\n", []), (b'{"text": "a"}', ["a"]), (b'{"text": "a"}\n\n', ["a"])]
)
def test_byte_order_marks(tmp_path: Path, content: bytes, texts: list[str]) -> None:
    (tmp_path / "b.jsonl").write_bytes(codecs.BOM_UTF8 + content)
    assert read(SourceKind.jsonl, tmp_path / "b.jsonl") == [("b.jsonl@0", text) for text in texts]
    (tmp_path / "t.txt").write_bytes(codecs.BOM_UTF8 + content)
    assert [text.strip() for _, text in read(SourceKind.text, tmp_path / "t.txt")] == content.decode().split(
        "\n"
    )[: len(texts)]


def test_json_lines_with_fields(tmp_path: Path) -> None:
    path = tmp_path / "b.jsonl"
    path.write_text('{"body": "One", "key": 7}\n')
    assert read(SourceKind.jsonl, path, text_field="body", id_field="key") == [("7", "One")]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "a"', r"b.jsonl:2 is not JSON"),
        ("[1]", r"b.jsonl:2 is a JSON list"),
        ('{"body": "a"}', r"b.jsonl:2 has no source.text_field='text'; its fields are: body"),
        ('{"text": null}', r"b.jsonl:2 has no source.text_field='text'"),
        ('{"text": 3}', r"b.jsonl:2: source.text_field='text' holds a int, not text"),
    ],
)
def test_bad_json_lines(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "b.jsonl").write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(CorpusError, match=message):
        read(SourceKind.jsonl, tmp_path / "b.jsonl")


def test_text_by_blank_lines_and_by_lines(tmp_path: Path) -> None:
    path = tmp_path / "t.txt"
    path.write_bytes(b"\xef\xbb\xbfone\ntwo\n\n \nthree\r\n\nfour")
    assert read(SourceKind.text, path) == [
        ("t.txt@0", "one\ntwo\n"),
        ("t.txt@14", "three\r\n"),
        ("t.txt@22", "four"),
    ]
    by_line = read(SourceKind.text, path, one_per_line=True)
    assert [(name, text.strip()) for name, text in by_line] == [
        ("t.txt@0", "one"),
        ("t.txt@7", "two"),
        ("t.txt@14", "three"),
        ("t.txt@22", "four"),
    ]


def test_files_are_read_in_sorted_order(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt", "c.txt.gz", "ignored.bin"):
        (tmp_path / name).write_bytes(gzip.compress(b"c") if name.endswith(".gz") else name.encode())
    assert [name for name, _ in read(SourceKind.text, tmp_path)] == ["a.txt@0", "b.txt@0", "c.txt.gz@0"]


def test_text_that_is_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_bytes("Zwölf".encode("latin-1"))
    with pytest.raises(CorpusError, match="t.txt:1 is not UTF-8: .* at its byte 2"):
        read(SourceKind.text, tmp_path / "t.txt")


def test_truncated_gzip_and_xz(tmp_path: Path) -> None:
    for name, pack in (("t.txt.gz", gzip.compress), ("t.txt.xz", lzma.compress)):
        (tmp_path / name).write_bytes(pack(bytes(range(32, 120)) * 500)[:-20])
        with pytest.raises(CorpusError, match=f"{name} is truncated or damaged"):
            read(SourceKind.text, tmp_path / name)


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="nope.xml does not exist"):
        read(SourceKind.mediawiki, tmp_path / "nope.xml")
    with pytest.raises(CorpusError, match="does not exist"):
        read(SourceKind.text, tmp_path / "*.txt")
    with pytest.raises(CorpusError, match="holds no jsonl files"):
        read(SourceKind.jsonl, tmp_path)


def whole(path: Path, one_per_line: bool) -> list[tuple[int, str]]:
    """Documents of a text and the bytes where they begin, from all of it at once."""
    lines = re.findall(rb"[^\n]*\n|[^\n]+$", path.read_bytes())
    found: list[tuple[int, str]] = []
    offset, fresh = 0, True
    for line in lines:
        text = line.decode().removeprefix("\ufeff" if offset == 0 else "")
        if not text.strip():
            fresh = True
        elif fresh or one_per_line:
            found.append((offset, text))
            fresh = False
        else:
            found[-1] = (found[-1][0], found[-1][1] + text)
        offset += len(line)
    return found


LINES = st.sampled_from(["", " ", "\t", "\u3000", "a", "Zwölf", "世界 世界", "x" * 40, "\ufeffy"])


@settings(max_examples=200, deadline=None)
@given(
    lines=st.lists(LINES, max_size=40),
    newline=st.sampled_from(["\n", "\r\n"]),
    ends=st.booleans(),
    part_bytes=st.integers(1, 100),
    one_per_line=st.booleans(),
)
def test_texts_are_the_same_for_any_parts(
    tmp_path_factory: pytest.TempPathFactory,
    lines: list[str],
    newline: str,
    ends: bool,
    part_bytes: int,
    one_per_line: bool,
) -> None:
    path = tmp_path_factory.mktemp("text") / "t.txt"
    path.write_bytes((newline.join(lines) + (newline if ends else "")).encode())
    source = SourceConfig(kind=SourceKind.text, path=str(path), one_per_line=one_per_line)
    found = parts(source, part_bytes)
    check_parts(found, path)
    expected = [(f"t.txt@{offset}", text) for offset, text in whole(path, one_per_line)]
    assert [tuple(document) for part in found for document in documents(source, part)] == expected
    if part_bytes == 1 and one_per_line:
        assert len(found) == path.read_bytes().removesuffix(b"\n").count(b"\n") + 1


def check_parts(found: list[Part], path: Path) -> None:
    """They cover the file without gaps, in order, and travel to other processes."""
    assert found[0].start == 0 and found[-1].stop is None
    assert all(one.stop == other.start for one, other in itertools.pairwise(found))
    assert sum(part.bytes for part in found) == path.stat().st_size
    assert [part.name for part in found] == sorted({part.name for part in found})
    assert pickle.loads(pickle.dumps(found)) == found


@settings(max_examples=100, deadline=None)
@given(
    texts=st.lists(st.sampled_from(["", " ", "a", "Zwölf\n", "世界", "x" * 50]), max_size=30),
    newline=st.sampled_from(["\n", "\r\n", "\n\n"]),
    ends=st.booleans(),
    part_bytes=st.integers(1, 200),
)
def test_json_lines_are_the_same_for_any_parts(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], newline: str, ends: bool, part_bytes: int
) -> None:
    path = tmp_path_factory.mktemp("json") / "b.jsonl"
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
    path.write_bytes((newline.join(lines) + (newline if ends else "")).encode())
    source = SourceConfig(kind=SourceKind.jsonl, path=str(path))
    found = parts(source, part_bytes)
    check_parts(found, path)
    read = [document for part in found for document in documents(source, part)]
    assert [document.text for document in read] == [text for text in texts if text.strip()]
    content = path.read_bytes()
    for name, text in read:
        assert json.loads(content[int(name.split("@")[1]) :].split(b"\n")[0]) == {"text": text}
    assert len({document.id for document in read}) == len(read)


def test_places_in_later_parts_are_bytes(tmp_path: Path) -> None:
    path = tmp_path / "b.jsonl"
    path.write_bytes(b'{"text": "one"}\n' * 3 + b'{"text": 2}\n' + b'{"text": "\xff"}\n')
    source = SourceConfig(kind=SourceKind.jsonl, path=str(path))
    found = parts(source, part_bytes=20)
    assert [part.start for part in found] == [0, 32, 48, 60]
    with pytest.raises(CorpusError, match=r"b.jsonl byte 48: source.text_field='text' holds a int"):
        list(documents(source, found[2]))
    with pytest.raises(CorpusError, match=r"b.jsonl byte 60 is not UTF-8: .* at its byte 10"):
        list(documents(source, found[3]))


def test_files_that_cannot_be_cut(tmp_path: Path) -> None:
    """One that is large for its source is sequential; of many, each is a part like others."""
    for number in range(100):
        (tmp_path / f"{number:03d}.txt.gz").write_bytes(gzip.compress(bytes(f"text {number}", "ascii")))
    source = SourceConfig(kind=SourceKind.text, path=str(tmp_path))
    found = parts(source, part_bytes=1)
    assert len(found) == 100 and not any(part.sequential for part in found)
    (tmp_path / "large.txt.gz").write_bytes(gzip.compress(random.Random(0).randbytes(5_000).hex().encode()))
    assert [Path(p.source).name for p in parts(source, part_bytes=1) if p.sequential] == ["large.txt.gz"]
    assert not any(part.sequential for part in parts(source))


@pytest.mark.parametrize("name", ["t.txt.bz2", "t.txt.xz"])
def test_nothing_behind_a_damaged_stream_is_lost_in_silence(tmp_path: Path, name: str) -> None:
    """The readers of the standard library end there without a word."""
    pack, opener = (bz2.compress, bz2.open) if name.endswith("bz2") else (lzma.compress, lzma.open)
    one, two = pack(b"one\n\n"), pack(b"two\n")
    path = tmp_path / name
    path.write_bytes(one + two)
    assert [text for _, text in read(SourceKind.text, path)] == ["one\n", "two\n"]
    path.write_bytes(one + bytes(8) + two + bytes(4))  # padding is none
    assert [text for _, text in read(SourceKind.text, path)] == ["one\n", "two\n"]
    path.write_bytes(one + b"\xff" + two[1:])
    assert opener(path).read() == b"one\n\n"
    with pytest.raises(CorpusError, match=f"{name} is truncated or damaged"):
        read(SourceKind.text, path)


def test_half_a_surrogate_pair(tmp_path: Path) -> None:
    (tmp_path / "b.jsonl").write_text('{"text": "\\ud83d\\ude00"}\n{"text": "a\\ud83d"}\n')
    with pytest.raises(CorpusError, match=r"b.jsonl:2: .* is not valid Unicode: .* at character 1;"):
        read(SourceKind.jsonl, tmp_path / "b.jsonl")
