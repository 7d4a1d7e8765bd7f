"""Mixtures of real corpora: each read exactly once per its own epoch, steps of one length, any ranks."""

from pathlib import Path

import numpy as np
import pytest
import torch

from configs.corpus_schema import CorpusConfig, SourceConfig, SourceKind
from configs.schema import DataConfig, MixtureConfig
from sharding.build import build
from sharding.corpora import Corpora, open_corpora
from sharding.manifest import CorpusError
from sharding.stream import Batch, sequential, stream
from tests.conftest import WORDS, write_tiny_tokenizer

SETTINGS = {"seed": 3, "group_blocks": 2, "prefetch_steps": 2}


def build_corpus(folder: Path, tokenizer: Path, seq_len: int, documents: int) -> Path:
    """A corpus of random words, 16 rows a block."""
    random = np.random.default_rng(documents)
    lines = [" ".join(random.choice(WORDS, size=int(random.integers(5, 60)))) for _ in range(documents)]
    text = folder.with_suffix(".txt")
    text.write_text("\n".join(lines))
    source = SourceConfig(kind=SourceKind.text, path=str(text), one_per_line=True)
    build(
        CorpusConfig(
            output=str(folder),
            source=source,
            tokenizer=str(tokenizer),
            seq_len=seq_len,
            block_rows=16,
            min_document_chars=0,
            heldout_share=0.1,
            processes=1,
        ),
        progress=False,
    )
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Path) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("corpora")
    sizes = {"wiki": (16, 300), "books": (16, 110), "long": (48, 150)}
    return {name: build_corpus(root / name, tiny_tokenizer, *size) for name, size in sizes.items()}


def mixture(folders: dict[str, Path], **weights: float | None) -> Corpora:
    entries = [MixtureConfig(corpus=str(folders[name]), weight=weight) for name, weight in weights.items()]
    return open_corpora(DataConfig(mixture=entries))


def read(corpora: Corpora, steps: range, batch: int, world_size: int = 1, workers: int = 0) -> list[Batch]:
    """The global batches of some steps, put together from what every rank reads."""
    ranks = [
        list(
            stream(
                corpora,
                "train",
                start_row=steps.start * batch,
                stop_row=steps.stop * batch,
                global_batch_rows=batch,
                rank=rank,
                world_size=world_size,
                workers=workers,
                **SETTINGS,
            )
        )
        for rank in range(world_size)
    ]
    return [
        Batch(
            parts[0].position,
            *(
                torch.cat([getattr(part, name) for part in parts])
                for name in ("ids_BS", "length_B", "segment_B", "corpus_B", "block_B", "row_B")
            ),
        )
        for parts in zip(*ranks, strict=True)
    ]


def rows_of(batches: list[Batch], corpus: int) -> list[tuple[int, ...]]:
    return [tuple(row) for b in batches for row in b.ids_BS[b.corpus_B == corpus].tolist()]


def test_each_corpus_is_read_exactly_once_per_its_own_epoch(folders: dict[str, Path]) -> None:
    corpora = mixture(folders, wiki=2.0, books=1.0, long=0.5)
    batches = read(corpora, range(60), 24)
    for index, part in enumerate(corpora.parts):
        (stored,) = sequential(part.corpus, "train", rows=10**6, batch_rows=10**6, rank=0, world_size=1)
        expected = sorted(map(tuple, stored.ids_BS.tolist()))
        found = rows_of(batches, index)
        assert len(found) > len(expected), "the run is longer than an epoch of each"
        for start in range(0, len(found) - len(expected) + 1, len(expected)):
            assert sorted(found[start : start + len(expected)]) == expected
    shares = np.bincount(torch.cat([batch.corpus_B for batch in batches]))
    assert shares / shares.sum() == pytest.approx(np.array([2, 1, 0.5]) / 3.5, abs=0.03)


def test_a_step_has_one_row_length_and_the_same_on_every_rank(folders: dict[str, Path]) -> None:
    corpora = mixture(folders, wiki=1.0, long=1.0)
    whole = read(corpora, range(20), 24)
    assert {batch.ids_BS.shape[1] for batch in whole} == {16, 48}
    for world_size, workers in ((2, 0), (3, 2), (8, 0)):
        for batch, expected in zip(read(corpora, range(20), 24, world_size, workers), whole, strict=True):
            assert torch.equal(batch.ids_BS, expected.ids_BS)
            assert torch.equal(batch.corpus_B, expected.corpus_B)


def test_it_resumes_at_any_step(folders: dict[str, Path]) -> None:
    corpora = mixture(folders, books=1.0, wiki=3.0, long=2.0)
    whole = read(corpora, range(50), 12)
    for step in (1, 17, 49):
        again = read(corpora, range(step, 50), 12, world_size=2)
        assert [batch.position for batch in again] == [batch.position for batch in whole[step:]]
        assert all(torch.equal(a.ids_BS, b.ids_BS) for a, b in zip(again, whole[step:], strict=True))


def test_without_weights_rows_count(folders: dict[str, Path]) -> None:
    corpora = mixture(folders, wiki=None, long=None)
    rows = [part.corpus.split("train").rows for part in corpora.parts]
    assert corpora.shares == pytest.approx(np.array(rows) / sum(rows))
    assert corpora.rows("train") == sum(rows)


def test_the_fingerprint_names_corpora_and_weights(folders: dict[str, Path]) -> None:
    single = open_corpora(DataConfig(corpus=str(folders["wiki"])))
    assert single.fingerprint == single.parts[0].corpus.fingerprint and single.shares == [1.0]
    found = {
        mixture(folders, wiki=1.0, books=1.0).fingerprint,
        mixture(folders, wiki=1.0, books=2.0).fingerprint,
        mixture(folders, wiki=1.0, long=1.0).fingerprint,
        single.fingerprint,
    }
    assert len(found) == 4
    assert mixture(folders, wiki=1.0, long=1.0).fingerprint in found


def test_all_problems_of_a_mixture_together(folders: dict[str, Path], tmp_path: Path) -> None:
    write_tiny_tokenizer(tmp_path / "tokenizer")
    vocabulary = tmp_path / "tokenizer" / "tokenizer.json"
    vocabulary.write_text(vocabulary.read_text().replace('"bade"', '"bado"'))
    other = build_corpus(tmp_path / "other", tmp_path / "tokenizer", 16, 30)
    corpora = [str(folders["wiki"]), str(folders["wiki"]), str(tmp_path / "none"), str(other)]
    with pytest.raises(CorpusError) as error:
        open_corpora(DataConfig(mixture=[MixtureConfig(corpus=corpus) for corpus in corpora]))
    said = str(error.value)
    assert "data.mixture.2: " in said and "none/manifest.json does not exist" in said
    assert "the name 'wiki' is used 2 times" in said
    assert "other was built with tokenizer" in said
