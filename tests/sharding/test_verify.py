"""Verify finds every damage, and only damage, in the manifest's order."""

import hashlib
import re
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from sharding.manifest import Corpus, Shard, Split, open_corpus, read_manifest
from sharding.packing import Rows
from sharding.shards import write_shard
from sharding.store import Store
from sharding.verify import verify


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


def test_damage_in_every_shard_is_told_in_order_by_any_number_of_workers(folder: Path) -> None:
    shards = [shard for split in open_corpus(folder).manifest.splits.values() for shard in split.shards]
    for shard in shards:
        flip(folder / shard.path, shard.blocks[0].ids.offset + 200)
    problems = verify(open_corpus(folder), workers=1)
    told = [next(shard for shard in shards if shard.path in problem) for problem in problems]
    assert told == [shard for shard in shards for _ in ("SHA-256", "member")]
    assert verify(open_corpus(folder), workers=2) == problems


OUTSIDE = {
    "a header's mode": (
        lambda shard: 100,
        r"00000-0000.ids.npy at offset 512 has no tar header: bad checksum",
    ),
    "the second header": (
        lambda shard: shard.blocks[0].len.offset - 512,
        "len.npy at offset .* has no tar header",
    ),
    "the end": (lambda shard: shard.bytes - 1, "does not end with the 1024 zero bytes"),
    "the end's first byte": (lambda shard: end_of_members(shard), "does not end with the 1024 zero bytes"),
}


def end_of_members(shard: Shard) -> int:
    last = shard.blocks[-1].seg
    return -(-(last.offset + last.bytes) // 512) * 512


@pytest.mark.parametrize("place", OUTSIDE)
def test_a_flipped_byte_outside_the_members(folder: Path, place: str) -> None:
    where, told = OUTSIDE[place]
    shard = open_corpus(folder).split("heldout").shards[0]
    flip(folder / shard.path, where(shard))
    checksum, archive = verify(open_corpus(folder))
    assert f"{shard.path}: SHA-256" in checksum
    assert re.search(f"{shard.path}: .*{told}", archive)


def test_a_shard_of_which_the_manifest_tells_other_members(folder: Path, tmp_path: Path) -> None:
    """All checksums are right, so that only the tar headers can tell."""
    corpus = open_corpus(folder)
    shard = corpus.split("heldout").shards[0]
    content = (folder / shard.path).read_bytes()
    with tarfile.open(folder / shard.path) as tar:
        name = tar.getmembers()[1].name
    at = shard.blocks[0].len.offset - 512
    header = tarfile.TarInfo.frombuf(content[at : at + 512], "utf-8", "strict")
    header.name = "renamed.npy"
    content = content[:at] + header.tobuf(tarfile.USTAR_FORMAT) + content[at + 512 :]
    (folder / shard.path).chmod(0o644)
    (folder / shard.path).write_bytes(content)
    told = replace(shard, sha256=hashlib.sha256(content).hexdigest())
    splits = {"heldout": replace(corpus.split("heldout"), shards=(told,))}
    (problem,) = verify(replace(corpus, manifest=replace(corpus.manifest, splits=splits)))
    assert f"{shard.path}: member {name}" in problem and "its header says renamed.npy" in problem


def test_sums_that_do_not_add_up(tiny_corpus: Path) -> None:
    corpus = open_corpus(tiny_corpus)
    splits = {name: replace(split, tokens=split.tokens + 1) for name, split in corpus.manifest.splits.items()}
    problems = verify(replace(corpus, manifest=replace(corpus.manifest, splits=splits)))
    assert [problem.split(":")[0] for problem in problems] == ["split heldout", "split train"]


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
        (tmp_path / name / "train").mkdir(parents=True)
        shard = write_shard(tmp_path / name, "train/00000.tar", [Rows(ids, lengths, segments)])
        manifest = replace(
            open_corpus(tiny_corpus).manifest,
            splits={"train": Split(1, 2, int(lengths.sum()), (shard,))},
        )
        return Corpus(Store(str(tmp_path / name)), manifest, manifest.fingerprint)

    assert verify(corpus_of("right")) == []
    RULES[rule](ids, lengths, segments)
    if rule.startswith("row lengths"):
        lengths[1] = 40
    with pytest.raises(AssertionError, match=rule):
        assert verify(corpus_of("wrong")) == []


def test_the_manifest_holds_what_sha256sum_says(tiny_corpus: Path) -> None:
    for split in open_corpus(tiny_corpus).manifest.splits.values():
        for shard in split.shards:
            assert hashlib.sha256((tiny_corpus / shard.path).read_bytes()).hexdigest() == shard.sha256
