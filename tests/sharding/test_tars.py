"""Tars of text that others made: written here with ``tarfile``, read through the library."""

import io
import json
import lzma
import tarfile
from pathlib import Path

import pytest

from configs.corpus_schema import SourceConfig, SourceKind
from sharding.manifest import CorpusError
from sharding.sources import documents, parts
from sharding.tars import OPENERS

Member = tuple[str, bytes]


def write_tar(path: Path, members: list[Member], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as tar:  # type: ignore[call-overload]
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def read(path: Path, **keys: str) -> list[tuple[str, str]]:
    source = SourceConfig(kind=SourceKind.webdataset, path=str(path), **keys)  # type: ignore[arg-type]
    return [tuple(document) for part in parts(source) for document in documents(source, part)]


def as_json(**fields: object) -> bytes:
    return json.dumps(fields).encode()


MEMBERS = [
    ("b/0002.txt", "\ufeffZwölf".encode()),
    ("b/0002.jpg", b"\xff\xd8"),
    ("b/0001.JSON", as_json(text="Eins", key=7)),
    ("0003.json", as_json(text="from json", key="x")),
    ("0003.txt", b"from txt"),
    ("0004.txt", b" \n"),
]


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz"])
def test_samples_in_stored_order(tmp_path: Path, mode: str) -> None:
    name = "a.tar" + mode.replace("w:", ".").removeprefix("w")
    path = write_tar(tmp_path / name, MEMBERS, mode)
    assert {*OPENERS} == {".gz", ".bz2", ".xz"}
    expected = [("b/0002", "Zwölf"), ("b/0001", "Eins"), ("0003", "from txt")]
    assert read(path) == [(f"{name}/{key}", text) for key, text in expected]
    assert read(tmp_path) == read(path)
    with pytest.raises(
        CorpusError, match="sample 'b/0002' has no source.id_field='key'; its fields are: text"
    ):
        read(path, id_field="key")


def test_fields_of_json_members(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [*MEMBERS[3:5], ("0005.json", as_json(key=1, body="Body"))])
    with pytest.raises(
        CorpusError, match="'0005' has no source.text_field='text'; its fields are: body, key"
    ):
        read(path)
    assert read(path, text_field="body", id_field="key") == [("x", "from txt"), ("1", "Body")]


def test_every_tar_is_a_part(tmp_path: Path) -> None:
    for name in ("b.tar", "a.tar", "c.tar"):
        write_tar(tmp_path / name, [(f"{index:04d}.txt", f"{name} {index}".encode()) for index in range(20)])
    source = SourceConfig(kind=SourceKind.webdataset, path=str(tmp_path))
    assert [Path(part.source).name for part in parts(source)] == ["a.tar", "b.tar", "c.tar"]
    assert [part.bytes for part in parts(source)] == [(tmp_path / "a.tar").stat().st_size] * 3
    texts = [text for _, text in read(tmp_path)]
    assert texts == [f"{name} {index}" for name in ("a.tar", "b.tar", "c.tar") for index in range(20)]


def test_an_empty_tar_and_metadata(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [])
    write_tar(tmp_path / "b.tar", [("__index__", b"x"), ("__meta__/notes", b"x"), ("1.txt", b"one")])
    assert read(tmp_path) == [("b.tar/1", "one")]


@pytest.mark.parametrize(
    ("member", "message"),
    [
        (("5.jpg", b"x"), "sample '5' has no .txt and no .json member, but .jpg; a document is"),
        (("doc.1.txt", b"x"), "sample 'doc' has no .txt and no .json member, but .1.txt"),
        (("README", b"x"), "member 'README' has no suffix, so WebDataset readers leave it out"),
        (("._5.txt", b"x"), "member '._5.txt' has no suffix"),
        (("5.txt", b"\xff"), "sample '5', its .txt member, is not UTF-8"),
        (("5.json", b"\xff"), "sample '5', its .json member, is not UTF-8"),
        (("5.json", b"{"), "sample '5', its .json member, is not JSON"),
        (("5.json", b"[]"), "sample '5', its .json member, is a JSON list"),
        (("5.json", b'{"text": "\\ud800"}'), "sample '5': its id or text is not valid Unicode"),
        (("\udcff.txt", b"a name that is not UTF-8"), "its id or text is not valid Unicode"),
        (("0004.txt", b"twice"), "0004.txt: duplicate file name"),
    ],
)
def test_samples_that_are_no_documents(tmp_path: Path, member: Member, message: str) -> None:
    path = write_tar(tmp_path / "a.tar", [*MEMBERS, member, ("9.txt", b"nine")])
    with pytest.raises(CorpusError, match=f"a.tar.*{message}"):
        read(path)


def test_links_are_not_passed_over(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        link = tarfile.TarInfo("1.txt")
        link.type, link.linkname = tarfile.SYMTYPE, "2.txt"
        tar.addfile(link)
    with pytest.raises(CorpusError, match="member '1.txt' is no ordinary file"):
        read(tmp_path / "a.tar")


def test_tars_cut_short(tmp_path: Path) -> None:
    whole = write_tar(tmp_path / "a.tar", MEMBERS).read_bytes()
    expected = read(tmp_path / "a.tar")
    end = len(MEMBERS) * 1_024  # a header and less than 512 bytes each
    for size in (0, 5, 600, 1_024, 2_048, end - 512, end - 1, end, end + 511):
        (tmp_path / "a.tar").write_bytes(whole[:size])
        with pytest.raises(CorpusError, match="a.tar is truncated or damaged: .*fetch it again"):
            read(tmp_path / "a.tar")
    (tmp_path / "a.tar").write_bytes(whole[: end + 512])
    assert read(tmp_path / "a.tar") == expected


def test_damaged_tars(tmp_path: Path) -> None:
    whole = write_tar(tmp_path / "a.tar", MEMBERS).read_bytes()
    (tmp_path / "a.tar").write_bytes(whole[:2_048] + b"\xff" + whole[2_049:])  # a header
    with pytest.raises(
        CorpusError, match="a.tar is truncated or damaged: .*no end of the archive at its byte 2,048"
    ):
        read(tmp_path / "a.tar")
    (tmp_path / "a.tar").write_bytes(whole + whole)
    with pytest.raises(CorpusError, match="more than zeros behind the end of the archive"):
        read(tmp_path / "a.tar")
    (tmp_path / "a.tar").write_bytes(b"no tar" * 1_000)
    with pytest.raises(CorpusError, match="a.tar is truncated or damaged"):
        read(tmp_path / "a.tar")
    packed = write_tar(tmp_path / "b.tar.xz", MEMBERS, "w:xz").read_bytes()
    for damaged in (packed[:-20], lzma.compress(lzma.decompress(packed)[:2_048])):
        (tmp_path / "b.tar.xz").write_bytes(damaged)
        with pytest.raises(CorpusError, match="b.tar.xz is truncated or damaged"):
            read(tmp_path / "b.tar.xz")
