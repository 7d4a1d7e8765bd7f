"""The plan: who stays, in which order, and that what it calls a fit does fit."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from configs.corpus_schema import CorpusConfig, Deduplicate, Packing
from sharding.manifest import CorpusError, LeftOut
from sharding.packing import Packer
from sharding.plan import NoDocuments, Plan, _bounds, make_plan, read_plan, write_plan
from sharding.prepare import Recipe, RunMaker
from sharding.runs import Run
from sharding.shards import shard_bytes
from sharding.sources import Document
from tests.conftest import WORDS

CONFIG = CorpusConfig(
    seq_len=32, block_rows=16, max_shard_bytes=20_480, heldout_share=0.3, min_document_chars=20
)


@pytest.fixture(scope="module")
def recipe(tiny_tokenizer: Path) -> Recipe:
    tokenizer_json = (tiny_tokenizer / "tokenizer.json").read_text()
    return Recipe(tokenizer_json, 232, (0, 2, 3), False, 20, 0.3, 7, 0.8)


def runs(folder: Path, recipe: Recipe, texts: dict[str, str], sizes: list[int]) -> list[Run]:
    """Runs of so many documents each."""
    documents = [Document(*each) for each in texts.items()]
    made = []
    for number, size in enumerate(sizes):
        maker = RunMaker(recipe)
        maker.add(documents[:size])
        documents = documents[size:]
        made.append(Run(folder, f"{number}"))
        made[-1].write(*maker.finish(True))
    assert not documents
    return made


def some_texts(count: int) -> dict[str, str]:
    random = np.random.default_rng(5)
    return {f"d{number}": " ".join(random.choice(WORDS, size=90)) for number in range(count)}


def planned(plan: Plan, made: list[Run], texts: dict[str, str]) -> dict[str, list[str]]:
    """Ids of the documents of each split, in packed order."""
    ordinals = [run.index().ordinal for run in made]
    before = np.cumsum([0] + [int(run.index().read) for run in made])
    names = list(texts)
    return {
        name: [
            names[before[run] + ordinals[run][at]] for run, at in zip(split.run, split.position, strict=True)
        ]
        for name, split in plan.splits.items()
    }


def test_the_order_is_that_of_all_keys_however_the_source_is_cut(tmp_path: Path, recipe: Recipe) -> None:
    texts = some_texts(60)
    found = []
    for number, sizes in enumerate(([60], [1, 58, 0, 1], [20, 20, 20])):
        (tmp_path / str(number)).mkdir()
        made = runs(tmp_path / str(number), recipe, texts, sizes)
        found.append(planned(make_plan(CONFIG, made, 2), made, texts))
    assert found[0] == found[1] == found[2]
    assert sorted(found[0]["train"] + found[0]["heldout"]) == sorted(texts)
    assert len(found[0]["heldout"]) > 5 and found[0]["train"] != sorted(found[0]["train"])


def test_exact_duplicates_leave_the_first_of_the_source(tmp_path: Path, recipe: Recipe) -> None:
    texts = some_texts(60)
    names = list(texts)
    for copy, original in ((50, 3), (51, 3), (20, 19), (59, 0)):  # some of them in another split
        texts[names[copy]] = f"  {texts[names[original]]} "
    made = runs(tmp_path, recipe, texts, [25, 25, 10])
    plan = make_plan(CONFIG, made, 2)
    kept = planned(plan, made, texts)
    gone = {"d50", "d51", "d20", "d59"}
    assert set(kept["train"]) | set(kept["heldout"]) == set(texts) - gone
    assert plan.left_out == LeftOut(0, 0, 4, 0)
    every = make_plan(replace(CONFIG, deduplicate=Deduplicate.none), made, 2)
    assert (
        every.left_out.exact_duplicates == 0 and sum(split.run.size for split in every.splits.values()) == 60
    )


def test_near_duplicates_leave_the_first_of_the_source(tmp_path: Path, recipe: Recipe) -> None:
    texts = some_texts(60)
    names = list(texts)
    texts[names[40]] = texts[names[2]] + " bade"  # 86 shingles and one more
    texts[names[41]] = "bade " + texts[names[2]]
    texts[names[1]] = texts[names[58]].rsplit(" ", 1)[0]
    texts[names[30]] = texts[names[2]]  # an exact one
    half = texts[names[5]].split()[:45]
    texts[names[45]] = " ".join(half + texts[names[45]].split()[45:])  # a third alike: it stays
    made = runs(tmp_path, recipe, texts, [25, 25, 10])
    plan = make_plan(replace(CONFIG, deduplicate=Deduplicate.near), made, 2)
    kept = planned(plan, made, texts)
    assert set(texts) - set(kept["train"]) - set(kept["heldout"]) == {"d40", "d41", "d58", "d30"}
    assert plan.left_out == LeftOut(0, 0, 1, 3)


@pytest.mark.parametrize("most", [1, 24, 25, 26, 59, 60, 1000])
def test_max_documents_counts_what_was_read(tmp_path: Path, recipe: Recipe, most: int) -> None:
    texts = some_texts(60)
    names = list(texts)
    for short in (0, 10, 24, 30):
        texts[names[short]] = "bade"
    made = runs(tmp_path, recipe, texts, [25, 25, 10])
    config = replace(CONFIG, max_documents=most, heldout_share=0)
    if most == 1:
        with pytest.raises(NoDocuments, match="of 1 documents 1 are shorter"):
            make_plan(config, made, 2)
        return
    plan = make_plan(config, made, 2)
    assert set(planned(plan, made, texts)["train"]) <= set(names[:most]) - {"d0", "d10", "d24", "d30"}
    assert plan.left_out.too_short == sum(short < most for short in (0, 10, 24, 30))


def rows_of(tokens: NDArray[np.int64], config: CorpusConfig) -> int:
    packer = Packer(
        seq_len=config.seq_len,
        block_rows=7,
        cross_documents=config.packing is Packing.full,
        pad_id=0,
        cls_id=2,
        sep_id=3,
        dtype=np.uint16,
    )
    blocks = [block for size in tokens for block in packer.add(np.full(size, 9))]
    return sum(len(block.ids) for block in [*blocks, *packer.finish()])


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.integers(1, 90), min_size=1, max_size=60),
    st.integers(4, 20),
    st.integers(1, 9),
    st.sampled_from(Packing),
    st.integers(5_000, 40_000),
)
def test_shards_fit_and_could_not_hold_much_more(
    sizes: list[int], seq_len: int, block_rows: int, packing: Packing, most_bytes: int
) -> None:
    tokens = np.array(sizes, dtype=np.int64)
    config = replace(
        CONFIG, seq_len=seq_len, block_rows=block_rows, packing=packing, max_shard_bytes=most_bytes
    )
    bounds = _bounds(config, tokens, 2)
    assert bounds[0] == 0 and bounds[-1] == tokens.size and (np.diff(bounds) > 0).all()
    for start, stop in zip(bounds, bounds[1:], strict=False):
        fits = shard_bytes(rows_of(tokens[start:stop], config), block_rows, seq_len, 2) <= most_bytes
        assert fits or stop == start + 1
        if stop < tokens.size:  # with one document more it could be too large
            more = int(rows_of(tokens[start : stop + 1], config))
            spare = stop - start  # places that documents might have lost
            upper = more + -(-spare // (seq_len - 2)) if packing is Packing.full else more
            assert shard_bytes(upper, block_rows, seq_len, 2) > most_bytes


def test_the_plan_survives_its_file(tmp_path: Path, recipe: Recipe) -> None:
    made = runs(tmp_path, recipe, some_texts(60), [60])
    plan = make_plan(CONFIG, made, 2)
    path = tmp_path / "plan.npz"
    write_plan(path, plan)
    found = read_plan(path)
    assert (found.left_out, found.unparsed, list(found.splits)) == (plan.left_out, (), ["train", "heldout"])
    for name, split in plan.splits.items():
        for field, values in vars(split).items():
            assert np.array_equal(getattr(found.splits[name], field), values)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(CorpusError, match="plan.npz is damaged .* remove it"):
        read_plan(path)
