"""Sources: what is read, in which order, under which ids, and what bad input is told."""

import bz2
import gzip
import json
import lzma
from pathlib import Path

import pytest

from configs.corpus_schema import SourceConfig, SourceKind
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


def test_datasets_from_parquet_json_and_disk(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    records = datasets.Dataset.from_dict({"id": ["a", "b"], "text": ["One", "Two"]})
    (tmp_path / "parquet").mkdir()
    (tmp_path / "json").mkdir()
    records.to_parquet(str(tmp_path / "parquet" / "train.parquet"))
    records.to_json(str(tmp_path / "json" / "train.jsonl"))
    records.save_to_disk(str(tmp_path / "disk"))
    datasets.DatasetDict({"train": records}).save_to_disk(str(tmp_path / "dict"))
    for name in ("parquet", "json", "disk", "dict"):
        assert read(SourceKind.datasets, tmp_path / name, id_field="id") == [("a", "One"), ("b", "Two")], name
    assert read(SourceKind.datasets, tmp_path / "disk") == [("train:0", "One"), ("train:1", "Two")]
    with pytest.raises(CorpusError, match="row 0 has no source.text_field='body'; its fields are: id, text"):
        read(SourceKind.datasets, tmp_path / "parquet", text_field="body")
    with pytest.raises(CorpusError, match="cannot be read by `datasets`"):
        read(SourceKind.datasets, tmp_path / "parquet", split="nope")
    with pytest.raises(CorpusError, match="cannot be read by `datasets`"):
        read(SourceKind.datasets, tmp_path / "nothing")
