"""Verify finds every damage, and only damage; the statistics are counts that can be recounted."""

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from sharding.manifest import Corpus, Split, open_corpus, read_manifest
from sharding.packing import Rows
from sharding.shards import ShardWriter
from sharding.stream import sequential
from sharding.verify import statistics, verify


@pytest.fixture
def folder(tiny_corpus: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_corpus, tmp_path / "copy")


def flip(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.chmod(0o644)
    path.write_bytes(content)


def test_a_whole_corpus(tiny_corpus: Path) -> None:
    assert verify(open_corpus(tiny_corpus)) == []


def test_every_damage_is_found_at_once(folder: Path) -> None:
    corpus = open_corpus(folder)
    first, second, third, *_ = corpus.split("train").shards
    flip(folder / first.path, first.blocks[1].len.offset + 140)
    (folder / second.path).unlink()
    (folder / third.path).write_bytes((folder / third.path).read_bytes()[: third.blocks[-1].seg.offset + 10])
    problems = verify(read_manifest(folder))
    text = "\n".join(problems)
    member = first.blocks[1]
    assert f"{first.path}: SHA-256" in text
    assert f"member {member.name}.len.npy ({member.len.bytes} bytes at offset {member.len.offset})" in text
    assert f"{second.path} is missing" in text
    assert f"{third.path}: {third.blocks[-1].seg.offset + 10} bytes, the manifest says {third.bytes}" in text
    assert f"{third.path}: does not end with" in text
    assert f"member {third.blocks[-1].name}.seg.npy" in text
    assert all(shard.path not in text for shard in corpus.split("heldout").shards)


@pytest.mark.parametrize("place", ["header", "end"])
def test_a_flipped_byte_outside_the_members(folder: Path, place: str) -> None:
    shard = open_corpus(folder).split("heldout").shards[0]
    flip(folder / shard.path, 100 if place == "header" else shard.bytes - 1)
    problems = verify(open_corpus(folder))
    assert f"{shard.path}: SHA-256" in problems[0]
    assert (len(problems) > 1) == (place == "end")


RULES = {
    "ids at or above the vocabulary's size 232": lambda ids, lengths, segments: ids.__setitem__((0, 1), 232),
    r"no \[CLS\] at the start": lambda ids, lengths, segments: ids.__setitem__((0, 0), 9),
    r"no \[SEP\] at the end": lambda ids, lengths, segments: ids.__setitem__((0, 7), 9),
    "padding that is not the pad id": lambda ids, lengths, segments: ids.__setitem__((0, 9), 9),
    "segment B that begins outside": lambda ids, lengths, segments: segments.__setitem__(0, 9),
    r"segment B that no \[SEP\] precedes": lambda ids, lengths, segments: segments.__setitem__(0, 5),
    "row lengths from 40": lambda ids, lengths, segments: lengths.__setitem__(0, 40),
}


@pytest.mark.parametrize("rule", RULES)
def test_rows_that_were_built_wrong(tiny_corpus: Path, tmp_path: Path, rule: str) -> None:
    ids = np.zeros((2, 32), dtype=np.uint16)
    ids[:, :8] = [2, 10, 11, 12, 13, 14, 15, 3]
    lengths = np.full(2, 8, dtype=np.uint16)
    segments = lengths.copy()

    def corpus_of(name: str) -> Corpus:
        writer = ShardWriter(tmp_path / name, "train", 10**6)
        writer.write(Rows(ids, lengths, segments))
        manifest = replace(
            open_corpus(tiny_corpus).manifest,
            splits={"train": Split(1, 2, int(lengths.sum()), writer.close())},
        )
        return Corpus(tmp_path / name, manifest, manifest.fingerprint)

    assert verify(corpus_of("right")) == []
    RULES[rule](ids, lengths, segments)
    if rule.startswith("row lengths"):
        lengths[1] = 40
    with pytest.raises(AssertionError, match=rule):
        assert verify(corpus_of("wrong")) == []


def test_statistics_are_recounted(tiny_corpus: Path) -> None:
    corpus = open_corpus(tiny_corpus)
    counts = statistics(corpus)
    assert counts["fingerprint"] == corpus.fingerprint and json.dumps(counts)
    for name, split in counts["splits"].items():
        (batch,) = sequential(corpus, name, rows=10**6, batch_rows=10**6, rank=0, world_size=1)
        files = list((tiny_corpus / name).iterdir())
        assert split["rows"] == len(batch.ids_BS)
        assert split["tokens"] == int((batch.ids_BS != 0).sum())
        assert split["padding_share"] == pytest.approx(float((batch.ids_BS == 0).float().mean()))
        assert split["bytes"] == sum(file.stat().st_size for file in files) and split["shards"] == len(files)
        for bucket, rows in split["rows_by_length"].items():
            low, high = map(int, bucket.split("-"))
            assert rows == int(((batch.length_B >= low) & (batch.length_B <= high)).sum())
        assert sum(split["rows_by_length"].values()) == split["rows"]


def test_the_manifest_holds_what_sha256sum_says(tiny_corpus: Path) -> None:
    for split in open_corpus(tiny_corpus).manifest.splits.values():
        for shard in split.shards:
            assert hashlib.sha256((tiny_corpus / shard.path).read_bytes()).hexdigest() == shard.sha256
