"""Shards and manifest: what other tar and WebDataset readers find in them, and what damage is told."""

import hashlib
import io
import json
import shutil
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import webdataset

from sharding.manifest import CorpusError, Member, open_corpus
from sharding.packing import Rows
from sharding.shards import most_rows, shard_bytes, write_shard
from sharding.stream import sequential


def some_rows(count: int, seed: int) -> Rows:
    random = np.random.default_rng(seed)
    lengths = random.integers(3, 17, count).astype(np.uint16)
    return Rows(random.integers(0, 200, (count, 16)).astype(np.uint16), lengths, lengths)


@pytest.fixture
def corpus_copy(tiny_corpus: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_corpus, tmp_path / "copy")


def test_webdataset_reads_the_same_rows(tiny_corpus: Path) -> None:
    corpus = open_corpus(tiny_corpus)
    shards = [str(tiny_corpus / shard.path) for shard in corpus.split("train").shards]
    assert len(shards) > 1
    samples = list(webdataset.WebDataset(shards, shardshuffle=False).decode())
    rows = corpus.split("train").rows
    (ours,) = sequential(corpus, "train", rows=rows, batch_rows=rows, rank=0, world_size=1)
    for key, tensor in {"ids.npy": ours.ids_BS, "len.npy": ours.length_B, "seg.npy": ours.segment_B}.items():
        assert np.array_equal(np.concatenate([sample[key] for sample in samples]), tensor.numpy())
    assert [sample["__key__"] for sample in samples] == [
        block.name for shard in corpus.split("train").shards for block in shard.blocks
    ]
    assert samples[0]["__key__"] == "00000-0000" and len({s["__key__"] for s in samples}) == len(samples)


def test_manifest_places_members_where_tarfile_finds_them(tiny_corpus: Path) -> None:
    corpus = open_corpus(tiny_corpus)
    for split in corpus.manifest.splits.values():
        for shard in split.shards:
            content = (tiny_corpus / shard.path).read_bytes()
            assert (len(content), hashlib.sha256(content).hexdigest()) == (shard.bytes, shard.sha256)
            with tarfile.open(tiny_corpus / shard.path) as tar:
                found = {
                    info.name: Member(info.offset_data, info.size, zlib.crc32(tar.extractfile(info).read()))  # type: ignore[union-attr]
                    for info in tar
                }
            expected = {
                f"{block.name}.{kind}.npy": getattr(block, kind)
                for block in shard.blocks
                for kind in ("ids", "len", "seg")
            }
            assert list(found.items()) == list(expected.items())  # in this order, and nothing else


def test_shards_are_deterministic_plain_tars(tmp_path: Path) -> None:
    shards = []
    for name in ("a", "b"):
        (tmp_path / name / "train").mkdir(parents=True)
        blocks = (some_rows(40, seed) for seed in range(5))
        shards.append(write_shard(tmp_path / name, "train/00007.tar", blocks))
    assert shards[0] == shards[1]
    content = (tmp_path / "a" / "train/00007.tar").read_bytes()
    assert content == (tmp_path / "b" / "train/00007.tar").read_bytes()
    assert len(content) == shards[0].bytes
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        for info in tar:
            owner = (info.mtime, info.uid, info.gid, info.uname, info.gname, info.mode)
            assert owner == (0, 0, 0, "", "", 0o444)
            assert info.pax_headers == {} and info.isreg()
    assert [path.name for path in (tmp_path / "a" / "train").iterdir()] == ["00007.tar"]


@pytest.mark.parametrize("rows", [1, 39, 40, 41, 200])
@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
def test_the_size_of_a_shard_is_known_before(tmp_path: Path, rows: int, dtype: type) -> None:
    every = some_rows(rows, 0)
    blocks = [
        Rows(every.ids[at : at + 40].astype(dtype), every.lengths[at : at + 40], every.segments[at : at + 40])
        for at in range(0, rows, 40)
    ]
    shard = write_shard(tmp_path, "00000.tar", blocks)
    size = np.dtype(dtype).itemsize
    assert shard.bytes == shard_bytes(rows, 40, 16, size) == (tmp_path / "00000.tar").stat().st_size
    most = most_rows(shard.bytes, 40, 16, size)
    assert shard_bytes(most, 40, 16, size) == shard.bytes < shard_bytes(most + 1, 40, 16, size)


def test_a_shard_that_fails_leaves_no_file(tmp_path: Path) -> None:
    def blocks() -> Iterator[Rows]:
        yield some_rows(40, 0)
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        write_shard(tmp_path, "00000.tar", blocks())
    assert list(tmp_path.iterdir()) == []


def test_manifest_survives_the_round_trip(tiny_corpus: Path) -> None:
    corpus = open_corpus(tiny_corpus)
    text = (tiny_corpus / "manifest.json").read_text()
    assert corpus.manifest.to_json() == text
    assert corpus.fingerprint == corpus.manifest.fingerprint
    # The fingerprint, worked out from the file alone.
    fields = json.loads(text)
    stored = fields.pop("fingerprint")
    assert (
        stored
        == hashlib.sha256(json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
    )


def test_all_missing_and_cut_shards_are_named_together(corpus_copy: Path) -> None:
    (corpus_copy / "train/00001.tar").unlink()
    with open(corpus_copy / "heldout/00000.tar", "r+b") as file:
        file.truncate(5_000)
    with pytest.raises(CorpusError, match="copied in part") as error:
        open_corpus(corpus_copy)
    assert "train/00001.tar is missing" in str(error.value)
    assert "heldout/00000.tar: 5000 bytes, the manifest says" in str(error.value)
    assert "corpus.py verify" in str(error.value)


def test_a_folder_that_is_no_corpus(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="manifest.json does not exist.*corpus.py build"):
        open_corpus(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text[:-200], "cannot be read"),
        (lambda text: text.replace('"rows":[64', '"rows":[65', 1), "does not match its own fingerprint"),
        (lambda text: json.dumps(json.loads(text), indent=1), "does not match its own fingerprint"),
        (
            lambda text: text.replace('"version":2', '"version":1'),
            "format version 1, this code reads version 2",
        ),
        (lambda text: "[]", "format version None"),
    ],
)
def test_a_damaged_manifest(corpus_copy: Path, change: object, message: str) -> None:
    path = corpus_copy / "manifest.json"
    path.write_text(change(path.read_text()))  # type: ignore[operator]
    with pytest.raises(CorpusError, match=message):
        open_corpus(corpus_copy)


def test_a_missing_split_names_the_way_out(tiny_corpus: Path) -> None:
    with pytest.raises(CorpusError, match="no split 'test', only heldout, train"):
        open_corpus(tiny_corpus).split("test")
