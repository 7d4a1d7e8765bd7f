"""The build: the same bytes for any number of processes, and nothing half-written when it fails."""

import contextlib
import ctypes
import filecmp
import json
import logging
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from configs.corpus_schema import CorpusConfig, Packing, SourceConfig, SourceKind
from sharding.build import build, is_heldout
from sharding.manifest import CorpusError, open_corpus
from sharding.stream import sequential
from sharding.tokens import load_tokenizer
from sharding.verify import verify
from tests.conftest import WORDS


@pytest.fixture(scope="module")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """300 documents of 3 to 120 words, one a line."""
    random = np.random.default_rng(1)
    lines = [" ".join(random.choice(WORDS, size=int(random.integers(3, 120)))) for _ in range(300)]
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text("\n".join(lines))
    return path


@pytest.fixture
def config(text_file: Path, tiny_tokenizer: Path, tmp_path: Path) -> CorpusConfig:
    return CorpusConfig(
        output=str(tmp_path / "corpus"),
        source=SourceConfig(kind=SourceKind.text, path=str(text_file), one_per_line=True),
        tokenizer=str(tiny_tokenizer),
        seq_len=32,
        block_rows=64,
        max_shard_bytes=30_000,
        min_document_chars=20,
        heldout_share=0.1,
        processes=1,
    )


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_nothing_left(config: CorpusConfig) -> None:
    assert [path.name for path in Path(config.output).parent.iterdir()] == []


@pytest.mark.parametrize("packing", list(Packing))
def test_rows_are_the_documents(config: CorpusConfig, packing: Packing) -> None:
    config.packing = packing
    manifest = build(config, progress=False)
    corpus = open_corpus(config.output)
    assert corpus.manifest == manifest and verify(corpus) == []
    tokenizer = load_tokenizer(config.tokenizer, None)
    lines = Path(config.source.path).read_text().split("\n")
    kept = {f"words.txt:{number}": line for number, line in enumerate(lines, 1) if len(line) >= 20}
    assert sum(split.documents for split in manifest.splits.values()) == len(kept) < 300
    for name, split in manifest.splits.items():
        ids = [
            token
            for document, line in kept.items()
            if is_heldout(document, 0.1) == (name == "heldout")
            for token in tokenizer(line, add_special_tokens=False)["input_ids"]
        ]
        (batch,) = sequential(corpus, name, rows=10**6, batch_rows=10**6, rank=0, world_size=1)
        stored = batch.ids_BS[(batch.ids_BS > 3) | (batch.ids_BS == 1)]
        assert stored.tolist() == ids
        assert split.tokens == int(batch.length_B.sum())


def test_the_same_bytes_for_any_number_of_processes(
    config: CorpusConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sharding.prepare

    monkeypatch.setattr(
        sharding.prepare, "BATCH_DOCUMENTS", 7
    )  # many batches, so that workers overtake each other
    built = []
    for processes in (1, 2, 3):
        built.append(replace(config, output=f"{config.output}{processes}", processes=processes))
        build(built[-1], progress=False)
    first, *others = (files_of(Path(each.output)) for each in built)
    assert "manifest.json" in first and len(first) > 4
    assert all(other == first for other in others)
    text = first["manifest.json"].decode()
    assert str(Path(config.source.path).parent) not in text and str(Path(config.tokenizer).parent) not in text


def test_heldout_membership_hangs_on_the_id_alone() -> None:
    ids = [str(i) for i in range(20_000)]
    small, large = ({i for i in ids if is_heldout(i, share)} for share in (0.01, 0.05))
    assert small < large
    assert len(small) == pytest.approx(200, abs=60) and len(large) == pytest.approx(1000, abs=130)


def test_wiki_markup_becomes_text(config: CorpusConfig, tmp_path: Path) -> None:
    from tests.sharding.test_sources import dump_xml

    markup = "'''Bade''' [[gofi|kula]] {{x|mino}}" + " pesa" * 20
    (tmp_path / "d.xml").write_bytes(dump_xml([(page, 0, markup, "") for page in range(40)]))
    config.source = SourceConfig(kind=SourceKind.mediawiki, path=str(tmp_path / "d.xml"), revision="20160305")
    manifest = build(config, progress=False)
    assert manifest.source.revision == "20160305" and manifest.source.names == ("d.xml",)
    corpus = open_corpus(config.output)
    (batch,) = sequential(corpus, "train", rows=1, batch_rows=1, rank=0, world_size=1)
    words = load_tokenizer(config.tokenizer, None).convert_ids_to_tokens(batch.ids_BS[0].tolist())
    assert words[:6] == ["[CLS]", "bade", "kula", "pesa", "pesa", "pesa"]


def test_pages_that_defeat_the_parser_are_counted_and_named(
    config: CorpusConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from sharding.prepare import Recipe, Worker
    from sharding.sources import Document

    tokenizer = load_tokenizer(config.tokenizer, None)
    worker = Worker(Recipe(tokenizer.backend_tokenizer.to_str(), len(tokenizer), (0, 2, 3), True, 1))
    pages = [Document("1", "bade"), Document("2", "[[a|{{b|" * 20_000), Document("3", "mino")]
    prepared = worker.prepare(pages)
    assert [name for name, _ in prepared.documents] == ["1", "3"] and prepared.unparsed == ["2"]
    assert (prepared.read, prepared.too_short) == (3, 0)


def test_max_documents(config: CorpusConfig) -> None:
    config.max_documents, config.min_document_chars = 50, 0
    assert sum(split.documents for split in build(config, progress=False).splits.values()) == 50


def test_no_heldout_split(config: CorpusConfig) -> None:
    config.heldout_share = 0
    assert list(build(config, progress=False).splits) == ["train"]
    with pytest.raises(CorpusError, match="has no split 'heldout'"):
        open_corpus(config.output).split("heldout")


def test_a_heldout_split_without_documents(config: CorpusConfig) -> None:
    config.heldout_share = 1e-9
    with pytest.raises(
        CorpusError, match="leaves the heldout split without any of the .* heldout_share=0 for"
    ):
        build(config, progress=False)
    assert_nothing_left(config)


def test_an_empty_corpus(config: CorpusConfig) -> None:
    config.min_document_chars = 10_000
    with pytest.raises(
        CorpusError, match="empty corpus: of 300 documents 300 are shorter than min_document_chars"
    ):
        build(config, progress=False)
    assert_nothing_left(config)


def test_a_source_that_breaks_in_the_middle(
    config: CorpusConfig, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("bad") / "b.jsonl"
    path.write_text("".join(json.dumps({"text": "bade " * 50}) + "\n" for _ in range(2_000)) + "{broken\n")
    config.source = SourceConfig(kind=SourceKind.jsonl, path=str(path))
    with pytest.raises(CorpusError, match="b.jsonl:2001 is not JSON"):
        build(config, progress=False)
    assert_nothing_left(config)


def test_an_existing_corpus_is_kept_unless_told(config: CorpusConfig) -> None:
    build(config, progress=False)
    before = files_of(Path(config.output))
    with pytest.raises(CorpusError, match="already holds a corpus; set overwrite=true"):
        build(config, progress=False)
    # A build that fails leaves the corpus that it was to replace.
    config.overwrite, config.min_document_chars = True, 10_000
    with pytest.raises(CorpusError, match="empty corpus"):
        build(config, progress=False)
    assert files_of(Path(config.output)) == before
    config.min_document_chars, config.seq_len = 20, 16
    assert build(config, progress=False).seq_len == 16
    assert open_corpus(config.output).manifest.seq_len == 16
    assert [path.name for path in Path(config.output).parent.iterdir()] == ["corpus"]


def test_a_folder_that_is_no_corpus_is_never_replaced(config: CorpusConfig) -> None:
    config.overwrite = True
    Path(config.output).mkdir()
    (Path(config.output) / "thesis.tex").write_text("years of work")
    with pytest.raises(CorpusError, match="is no corpus; it is never replaced"):
        build(config, progress=False)
    assert (Path(config.output) / "thesis.tex").read_text() == "years of work"


def test_what_a_killed_build_left_is_replaced(config: CorpusConfig) -> None:
    stale = Path(f"{config.output}.partial")
    (stale / "train").mkdir(parents=True)
    (stale / "train" / "00000.tar.tmp").write_bytes(b"half")
    build(config, progress=False)
    assert verify(open_corpus(config.output)) == [] and not stale.exists()


def test_two_builds_of_one_output(config: CorpusConfig) -> None:
    import fcntl

    partial = Path(f"{config.output}.partial")
    partial.mkdir()
    descriptor = os.open(partial, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    with pytest.raises(CorpusError, match="another build is writing"):
        build(config, progress=False)
    os.close(descriptor)
    assert partial.exists()


@contextlib.contextmanager
def small_disk(folder: Path, size: int) -> Iterator[Path]:
    """A file system of ``size`` bytes, mounted at ``folder``; skips the test where that is not allowed."""
    folder.mkdir()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"tmpfs", str(folder).encode(), b"tmpfs", 0, f"size={size}".encode()):
        pytest.skip(f"a small tmpfs cannot be mounted here: {os.strerror(ctypes.get_errno())}")
    try:
        yield folder
    finally:
        libc.umount2(str(folder).encode(), 2)


@pytest.mark.parametrize("size", [8_192, 40_960])
def test_no_space_left(config: CorpusConfig, tmp_path: Path, size: int) -> None:
    with small_disk(tmp_path / "disk", size) as disk:
        config.output = str(disk / "corpus")
        with pytest.raises(
            CorpusError, match=f"no space left for {config.output}: .*bytes are needed"
        ) as error:
            build(config, progress=False)
        assert f"{config.output}.partial" in str(error.value)
        assert list(disk.iterdir()) == []


def test_output_that_cannot_be_written(config: CorpusConfig, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    config.output = str(tmp_path / "file" / "corpus")
    with pytest.raises(CorpusError, match="cannot be written: .*Not a directory"):
        build(config, progress=False)


def test_progress_off_a_terminal_is_quiet(
    config: CorpusConfig, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="sharding"):
        build(config, progress=True)
    assert capfd.readouterr() == ("", "") and not caplog.records


def test_a_copy_is_the_same_corpus(config: CorpusConfig, tmp_path: Path) -> None:
    build(config, progress=False)
    copy = shutil.copytree(config.output, tmp_path / "elsewhere")
    assert open_corpus(copy).fingerprint == open_corpus(config.output).fingerprint
    assert filecmp.cmp(Path(config.output) / "manifest.json", copy / "manifest.json", shallow=False)
