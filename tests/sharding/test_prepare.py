"""The first phase: sorted runs, jobs without what is there, no more of the source than is needed."""

from pathlib import Path

import numpy as np
import pytest

from configs.corpus_schema import SourceConfig, SourceKind
from sharding.documents import Document, Part
from sharding.prepare import Job, Recipe, RunMaker, is_heldout, jobs, make_run, share, shuffle_key
from sharding.runs import Run, run_of
from sharding.sources import parts
from tests.conftest import WORDS


@pytest.fixture(scope="module")
def recipe(tiny_tokenizer: Path) -> Recipe:
    return Recipe((tiny_tokenizer / "tokenizer.json").read_text(), 232, (0, 2, 3), True, 1, 0.3, 7, None)


@pytest.fixture
def source(tmp_path: Path) -> SourceConfig:
    """Five files of ten documents each."""
    folder = tmp_path / "text"
    folder.mkdir()
    for file in range(5):
        (folder / f"{file}.txt").write_text("\n".join(f"{WORDS[file]} {WORDS[line]}" for line in range(10)))
    return SourceConfig(kind=SourceKind.text, path=str(folder), one_per_line=True)


def test_a_run_is_sorted_and_keeps_what_it_was_made_of(recipe: Recipe, tmp_path: Path) -> None:
    documents = [Document(str(number), f"{WORDS[number]} " * (number + 1)) for number in range(100)]
    maker = RunMaker(recipe)
    maker.add(documents[:30])
    maker.add(documents[30:])
    run = Run(tmp_path, "a")
    run.write(*maker.finish(True))
    index = run.index()
    order = sorted(range(100), key=lambda n: (is_heldout(str(n), 0.3), shuffle_key(str(n), 7)))
    assert index.ordinal.tolist() == order and 15 < index.heldout.sum() < 45
    assert index.key.tolist() == [shuffle_key(str(number), 7) for number in order]
    assert index.tokens.tolist() == [number + 1 for number in order]
    ids = run.read(np.arange(100), np.uint16)
    word_id = {word: 5 + 6 + 2 * 26 + place for place, word in enumerate(WORDS)}
    assert all(
        set(found.tolist()) == {word_id[WORDS[number]]} for found, number in zip(ids, order, strict=True)
    )


def test_pages_that_defeat_the_parser_are_named(recipe: Recipe) -> None:
    maker = RunMaker(recipe)
    maker.add(
        [Document("1", "bade"), Document("2", "[[a|{{b|" * 20_000), Document("3", ""), Document("4", "mino")]
    )
    index, bands, ids = maker.finish(False)
    assert index.unparsed_id.tolist() == ["2"] and index.unparsed.tolist() == [1]
    assert index.too_short.tolist() == [2] and sorted(index.ordinal.tolist()) == [0, 3]
    assert (int(index.read), bool(index.last), bands.shape, ids.size) == (4, False, (0, 2), 2)


def test_a_run_of_nothing(recipe: Recipe, tmp_path: Path) -> None:
    for near in (None, 0.8):
        maker = RunMaker(Recipe(**{**vars(recipe), "near_threshold": near}))
        run = Run(tmp_path, str(near))
        run.write(*maker.finish(True))
        assert run.index().key.size == 0 and run.ids_path.stat().st_size == 0
        if near:
            assert run.band(8).size == 0


def test_heldout_membership_hangs_on_the_id_alone() -> None:
    ids = [str(i) for i in range(20_000)]
    small, large = ({i for i in ids if is_heldout(i, share)} for share in (0.01, 0.05))
    assert small < large
    assert len(small) == pytest.approx(200, abs=60) and len(large) == pytest.approx(1000, abs=130)


def test_shuffle_keys_hang_on_seed_and_id() -> None:
    keys = [shuffle_key(str(number), 0) for number in range(10_000)]
    assert len(set(keys)) == 10_000 and min(keys) < 2**54 and max(keys) > 2**64 - 2**54
    ranks = np.argsort(np.argsort(keys))
    assert abs(np.corrcoef(ranks, np.arange(10_000))[0, 1]) < 0.05
    assert (
        shuffle_key("1", 0) != shuffle_key("1", 1) and shuffle_key("1", None) == shuffle_key("2", None) == 0
    )


def test_jobs_leave_out_what_is_there(recipe: Recipe, source: SourceConfig, tmp_path: Path) -> None:
    found = parts(source)
    for job in list(jobs(source, found[1:3], tmp_path, None)):
        assert make_run(recipe, job).documents == 10
    left = [job.part.name for job in jobs(source, found, tmp_path, None)]
    assert left == [part.name for place, part in enumerate(found) if place not in (1, 2)]


def test_shares_cover_the_parts(source: SourceConfig, tmp_path: Path) -> None:
    found = parts(source)
    dealt = [part for task in range(3) for part in share(found, task, 3, tmp_path, None)]
    assert sorted(part.name for part in dealt) == [part.name for part in found]


def test_a_share_ends_where_enough_was_read(recipe: Recipe, source: SourceConfig, tmp_path: Path) -> None:
    found = parts(source)

    def make(number: int) -> None:
        make_run(recipe, Job(run_of(tmp_path, found[number], 0), source, found[number], 25, None, True))

    def wanted(task: int, tasks: int) -> list[Part]:
        return list(share(found, task, tasks, tmp_path, 25))

    make(0)
    make(3)  # does not count: the parts before it are not there
    assert wanted(0, 1) == found
    make(1)
    assert wanted(0, 1) == found and wanted(1, 2) == found[1::2]
    make(2)
    assert wanted(0, 1) == wanted(1, 2) == []
    assert int(run_of(tmp_path, found[2], 0).index().read) == 10


def test_no_part_is_read_past_what_all_need(recipe: Recipe, source: SourceConfig, tmp_path: Path) -> None:
    part = parts(source)[0]
    assert make_run(recipe, Job(Run(tmp_path, "a"), source, part, 4, None, True)).documents == 4
