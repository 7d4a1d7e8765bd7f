"""Peeked rows against what the tars hold, read with ``tarfile`` and spelled with the vocabulary alone."""

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from sharding.manifest import CorpusError, open_corpus
from sharding.order import Order
from sharding.peek import PeekedRow, corpus_tokenizer, peek_order, peek_stored


def stored_rows(folder: Path, split: str, tokenizer: Path) -> list[tuple[str, str, int, str, str]]:
    """(shard, block, row, segment A, segment B) of all rows, in stored order, without spaces."""
    vocabulary = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))

    def spell(ids: np.ndarray) -> str:
        return "".join(vocabulary.id_to_token(i).removeprefix("##") for i in ids)

    rows = []
    for shard in sorted((folder / split).iterdir()):
        with tarfile.open(shard) as tar:
            arrays = {member.name: np.load(io.BytesIO(tar.extractfile(member).read())) for member in tar}
        for block in sorted({name.split(".")[0] for name in arrays}):
            columns = [arrays[f"{block}.{kind}.npy"] for kind in ("ids", "len", "seg")]
            for row, (ids, length, segment) in enumerate(zip(*columns, strict=True)):
                texts = spell(ids[:segment]), spell(ids[segment:length])
                rows.append((f"{split}/{shard.name}", block, row, *texts))
    return rows


def seen(row: PeekedRow) -> tuple[str, str, int, str, str]:
    texts = (text.replace(" ", "").replace("##", "") for text in (row.text_a, row.text_b))
    return row.shard, row.block, row.row, *texts


def test_stored_rows(tiny_corpus: Path, tiny_tokenizer: Path) -> None:
    corpus = open_corpus(tiny_corpus)
    tokenizer = corpus_tokenizer(corpus, str(tiny_tokenizer))
    expected = stored_rows(tiny_corpus, "heldout", tiny_tokenizer)
    found = peek_stored(corpus, "heldout", tokenizer, first=3, rows=10**6)
    assert [seen(row) for row in found] == expected[3:] and len({row.block for row in found}) > 1
    assert {row.position for row in found} == {None}
    both = [row for row in found if row.text_b]
    assert 0 < len(both) < len(found)
    assert all(row.text_a.endswith("[SEP]") and row.text_b.endswith("[SEP]") for row in both)
    assert all(row.segment == row.length for row in found if not row.text_b)
    with pytest.raises(
        CorpusError, match=f"stored row {len(expected)} is not one of 0 .. {len(expected) - 1}"
    ):
        peek_stored(corpus, "heldout", tokenizer, first=len(expected), rows=1)


def test_rows_at_positions_of_a_run(tiny_corpus: Path, tiny_tokenizer: Path) -> None:
    corpus = open_corpus(tiny_corpus)
    tokenizer = corpus_tokenizer(corpus, str(tiny_tokenizer))
    expected = stored_rows(tiny_corpus, "train", tiny_tokenizer)
    blocks = [shard_and_block for shard_and_block in dict.fromkeys(row[:2] for row in expected)]
    sizes = [sum(row[:2] == block for row in expected) for block in blocks]
    start = len(expected) - 5  # over the end of the first epoch
    found = peek_order(corpus, "train", tokenizer, position=start, rows=12, seed=3, group_blocks=2)
    assert [row.position for row in found] == list(range(start, start + 12))
    place = {row[:3]: row for row in expected}
    at = zip(*Order(sizes, seed=3, group_blocks=2).locate(start, 12), strict=True)
    assert [seen(row) for row in found] == [place[(*blocks[block], int(row))] for block, row in at]
    with pytest.raises(CorpusError, match="start=-1"):
        peek_order(corpus, "train", tokenizer, position=-1, rows=1, seed=0, group_blocks=2)
    with pytest.raises(CorpusError, match="no split 'dev', only heldout, train"):
        peek_order(corpus, "dev", tokenizer, position=0, rows=1, seed=0, group_blocks=2)


def test_a_wrong_tokenizer_is_refused(tiny_corpus: Path, tiny_tokenizer: Path, tmp_path: Path) -> None:
    text = (tiny_tokenizer / "tokenizer.json").read_text()
    for file in tiny_tokenizer.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "tokenizer.json").write_text(text.replace('"bade"', '"edab"'))
    corpus = open_corpus(tiny_corpus)
    with pytest.raises(CorpusError, match="is not the one that the corpus was built with.*--tokenizer"):
        corpus_tokenizer(corpus, str(tmp_path))
    with pytest.raises(CorpusError, match="cannot be loaded.*name its folder with --tokenizer"):
        corpus_tokenizer(corpus, str(tmp_path / "nowhere"))
