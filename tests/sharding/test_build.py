"""The build: the same bytes however it is run, nothing half-written, nothing made twice."""

import filecmp
import gzip
import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import sharding.prepare
import sharding.sources
from configs.corpus_schema import CorpusConfig, Deduplicate, Packing, SourceConfig, SourceKind
from sharding.build import build, join, pack, prepare
from sharding.manifest import CorpusError, open_corpus
from sharding.prepare import is_heldout
from sharding.stream import sequential
from sharding.tokens import load_tokenizer
from sharding.verify import verify


@pytest.fixture
def config(text_config: CorpusConfig) -> CorpusConfig:
    return text_config


def source_documents(folder: Path) -> dict[str, str]:
    """Id and text of all documents, read without our code."""
    return {
        f"{path.name}@{content.index(line)}": line
        for path in sorted(folder.iterdir())
        for content in [path.read_text()]
        for line in content.split("\n")
    }


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_nothing_left(config: CorpusConfig) -> None:
    assert [path.name for path in Path(config.output).parent.iterdir()] == []


def stored_documents(config: CorpusConfig, split: str) -> list[tuple[int, ...]]:
    """The documents that the rows of a split hold, in their order; packing ``document``, none over a row."""
    corpus = open_corpus(config.output)
    (batch,) = sequential(corpus, split, rows=10**6, batch_rows=10**6, rank=0, world_size=1)
    lengths = batch.length_B.tolist()
    return [tuple(row[1 : length - 1]) for row, length in zip(batch.ids_BS.tolist(), lengths, strict=True)]


@pytest.mark.parametrize("packing", list(Packing))
def test_rows_are_the_documents(config: CorpusConfig, packing: Packing) -> None:
    config.packing, config.shuffle_seed = packing, None
    manifest = build(config, progress=False)
    corpus = open_corpus(config.output)
    assert corpus.manifest == manifest and verify(corpus) == []
    tokenizer = load_tokenizer(config.tokenizer, None)
    kept = {id_: line for id_, line in source_documents(Path(config.source.path)).items() if len(line) >= 20}
    assert sum(split.documents for split in manifest.splits.values()) == len(kept) < 300
    assert manifest.left_out.too_short == 300 - len(kept)
    assert len(manifest.splits["train"].shards) > 3
    assert all(shard.bytes <= 20_480 for split in manifest.splits.values() for shard in split.shards)
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


def test_shuffling_permutes_the_documents_of_all_parts(config: CorpusConfig) -> None:
    config.packing, config.seq_len = Packing.document, 200
    config.max_shard_bytes = 61_440
    orders = {}
    for seed in (None, 0, 1):
        config.shuffle_seed, config.output = seed, f"{config.output}{seed}"
        assert build(config, progress=False).shuffle_seed == seed
        orders[seed] = stored_documents(config, "train")
    source, *shuffled = orders.values()
    assert all(sorted(order) == sorted(source) and order != source for order in shuffled)
    assert shuffled[0] != shuffled[1]
    place = {ids: number for number, ids in enumerate(source)}
    for order in shuffled:  # from one end of the source to the other: not within parts alone
        places = np.array([place[ids] for ids in order])
        assert abs(np.corrcoef(places, np.arange(places.size))[0, 1]) < 0.2
        assert np.abs(np.diff(places)).mean() > len(source) / 5


def test_the_same_bytes_for_any_number_of_processes_and_tasks(config: CorpusConfig) -> None:
    built = []
    for processes in (1, 2, 3):
        built.append(replace(config, output=f"{config.output}{processes}", processes=processes))
        build(built[-1], progress=False)
    for tasks in (1, 2, 5):
        built.append(replace(config, output=f"{config.output}-{tasks}", processes=2))
        for task in reversed(range(tasks)):
            prepare(built[-1], task, tasks, progress=False)
        for task in range(tasks):
            pack(built[-1], task, tasks, progress=False)
        join(built[-1])
    first, *others = (files_of(Path(each.output)) for each in built)
    assert "manifest.json" in first and len(first) > 4
    assert all(other == first for other in others)
    assert not list(Path(config.output).parent.glob("*.partial"))
    text = first["manifest.json"].decode()
    assert str(Path(config.source.path).parent) not in text and str(Path(config.tokenizer).parent) not in text


def test_a_sequential_source_gives_the_same_bytes(
    config: CorpusConfig, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One compressed stream, read by the parent and dealt out in pieces, some of which are there already."""
    folder = tmp_path_factory.mktemp("gz")
    with gzip.open(folder / "words.txt.gz", "wt") as file:
        file.write("\n".join(source_documents(Path(config.source.path)).values()))
    config.source.path = str(folder)
    monkeypatch.setattr(sharding.sources, "PART_BYTES", 1_000)
    monkeypatch.setattr(sharding.prepare, "PIECE_CHARS", 9_000)
    built = []
    for processes in (1, 3):
        built.append(replace(config, output=f"{config.output}{processes}", processes=processes))
        prepare(built[-1], 0, 1, progress=False)
        runs = sorted(Path(f"{built[-1].output}.partial/runs").iterdir())
        assert len(runs) > 10
        if processes == 3:
            for path in (runs[0], runs[4], runs[5], runs[-1]):
                path.unlink()
        build(built[-1], progress=False)
    assert files_of(Path(built[0].output)) == files_of(Path(built[1].output))
    assert sum(split.documents for split in open_corpus(built[0].output).manifest.splits.values()) > 280


def test_wiki_markup_becomes_text(config: CorpusConfig, tmp_path: Path) -> None:
    from tests.sharding.test_sources import dump_xml

    markup = "'''Bade''' [[gofi|kula]] {{x|mino}}" + " pesa" * 20
    (tmp_path / "d.xml").write_bytes(dump_xml([(page, 0, markup, "") for page in range(40)]))
    config.source = SourceConfig(kind=SourceKind.mediawiki, path=str(tmp_path / "d.xml"), revision="20160305")
    config.deduplicate = Deduplicate.none
    manifest = build(config, progress=False)
    assert manifest.source.revision == "20160305" and manifest.source.names == ("d.xml",)
    corpus = open_corpus(config.output)
    (batch,) = sequential(corpus, "train", rows=1, batch_rows=1, rank=0, world_size=1)
    words = load_tokenizer(config.tokenizer, None).convert_ids_to_tokens(batch.ids_BS[0].tolist())
    assert words[:6] == ["[CLS]", "bade", "kula", "pesa", "pesa", "pesa"]


@pytest.mark.parametrize("most", [1, 50, 120, 1000])
def test_max_documents(config: CorpusConfig, most: int) -> None:
    config.max_documents, config.heldout_share, config.seq_len = most, 0, 200
    config.packing, config.shuffle_seed, config.deduplicate = Packing.document, None, Deduplicate.none
    manifest = build(config, progress=False)
    wanted = list(source_documents(Path(config.source.path)).values())[:most]
    long_enough = [line for line in wanted if len(line) >= 20]
    assert manifest.left_out.too_short == len(wanted) - len(long_enough)
    tokenizer = load_tokenizer(config.tokenizer, None)
    expected = [tuple(tokenizer(line, add_special_tokens=False)["input_ids"]) for line in long_enough]
    assert stored_documents(config, "train") == expected


def test_max_documents_does_not_read_the_rest(config: CorpusConfig) -> None:
    config.max_documents, config.processes = 60, 1
    prepare(config, 0, 1, progress=False)
    indices = list(Path(f"{config.output}.partial/runs").glob("*.npz"))
    assert 2 <= len(indices) <= 5  # two are needed; a few more may be under way by then
    pack(config, 0, 1, progress=False)
    assert sum(split.documents for split in join(config).splits.values()) > 50


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
    config: CorpusConfig, tmp_path_factory: pytest.TempPathFactory, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path_factory.mktemp("bad")
    good = "".join(json.dumps({"text": f"bade {number} " * 50}) + "\n" for number in range(2_000))
    (folder / "a.jsonl").write_text(good)
    (folder / "b.jsonl").write_text(good + "{broken\n")
    config.source = SourceConfig(kind=SourceKind.jsonl, path=str(folder))
    with pytest.raises(CorpusError, match="b.jsonl.* is not JSON"):
        build(config, progress=False)
    assert not Path(config.output).exists()
    if caplog.records:  # the first file was finished before
        assert "the same command goes on with it" in caplog.text


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
