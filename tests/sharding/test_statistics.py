"""The statistics are counts that can be recounted; the figure is one, in the format that was asked for."""

import json
from pathlib import Path

import pytest

from sharding.manifest import CorpusError, open_corpus
from sharding.statistics import count_lengths, draw_lengths, statistics
from sharding.stream import sequential


def test_statistics_are_recounted(tiny_corpus: Path) -> None:
    corpus = open_corpus(tiny_corpus)
    counts = statistics(corpus, count_lengths(corpus))
    assert counts["fingerprint"] == corpus.fingerprint and json.dumps(counts)
    assert counts["left_out"] == {
        key: 0 for key in ("too_short", "unparsed", "exact_duplicates", "near_duplicates")
    }
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


@pytest.mark.parametrize("suffix, start", [(".png", b"\x89PNG"), (".svg", b"<?xml"), (".pdf", b"%PDF")])
def test_the_suffix_decides_the_format(tiny_corpus: Path, tmp_path: Path, suffix: str, start: bytes) -> None:
    corpus = open_corpus(tiny_corpus)
    path = tmp_path / f"lengths{suffix}"
    draw_lengths(corpus, count_lengths(corpus), path)
    assert path.read_bytes().startswith(start) and path.stat().st_size > 5_000


def test_figures_that_cannot_be_drawn(tiny_corpus: Path, tmp_path: Path) -> None:
    corpus = open_corpus(tiny_corpus)
    lengths = count_lengths(corpus)
    with pytest.raises(CorpusError, match=r"end it in \.png or \.svg or \.pdf"):
        draw_lengths(corpus, lengths, tmp_path / "lengths.gif")
    with pytest.raises(CorpusError, match="cannot be written: No such file"):
        draw_lengths(corpus, lengths, tmp_path / "nowhere" / "lengths.png")
    assert list(tmp_path.iterdir()) == []
