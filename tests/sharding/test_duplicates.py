"""Duplicates: the MinHash estimate against Jaccard similarities counted by hand, LSH against its formula."""

import numpy as np
import pytest
from numpy.typing import NDArray

from sharding.duplicates import band_hashes, bands_and_rows, digest, first_of_equal, groups


def shingles(ids: NDArray[np.uint16]) -> set[tuple[int, ...]]:
    return {tuple(ids[at : at + 5].tolist()) for at in range(len(ids) - 4)}


def jaccard(left: NDArray[np.uint16], right: NDArray[np.uint16]) -> float:
    return len(shingles(left) & shingles(right)) / len(shingles(left) | shingles(right))


def pairs_at(similarity: float, count: int) -> list[tuple[NDArray[np.uint16], NDArray[np.uint16]]]:
    """Documents of 400 tokens with a common beginning: about ``similarity`` of their shingles agree."""
    random = np.random.default_rng(int(similarity * 100))
    shared = round(2 * similarity / (1 + similarity) * 400)
    found = []
    for _ in range(count):
        left, right = random.integers(5, 30_000, (2, 400)).astype(np.uint16)
        right[:shared] = left[:shared]
        found.append((left, right))
    return found


def test_bands_are_datasketchs_choice() -> None:
    assert bands_and_rows(0.8) == (9, 13) and bands_and_rows(0.5) == (25, 5)


@pytest.mark.parametrize("similarity", [0.3, 0.7, 0.8, 0.9, 0.97])
def test_a_band_agrees_as_often_as_the_formula_says(similarity: float) -> None:
    bands, rows = bands_and_rows(0.8)
    pairs = pairs_at(similarity, 150)
    found = np.mean([(band_hashes(a, 0.8) == band_hashes(b, 0.8)).mean() for a, b in pairs])
    expected = np.mean([jaccard(a, b) ** rows for a, b in pairs])
    # The mean over 150 x 9 bands; bands of one pair are nearly independent: four standard errors.
    error = np.sqrt(expected * (1 - expected) / (150 * bands))
    assert abs(found - expected) < 4 * error + 1e-3


def test_equal_ids_have_equal_hashes_and_others_do_not() -> None:
    ids = np.arange(5, 605, dtype=np.uint16)
    assert np.array_equal(band_hashes(ids, 0.8), band_hashes(ids.copy(), 0.8))
    assert np.array_equal(band_hashes(ids, 0.8), band_hashes(ids.astype(np.uint32), 0.8))
    assert not (band_hashes(ids, 0.8) == band_hashes(ids[::-1], 0.8)).any()  # order within shingles counts
    assert digest(ids) == digest(ids.copy()) != digest(ids[:-1]) and len(digest(ids)) == 16


def test_long_documents_are_hashed_in_chunks_of_no_effect(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = np.random.default_rng(0).integers(5, 30_000, 9_000).astype(np.uint16)
    whole = band_hashes(ids, 0.8)
    monkeypatch.setattr("sharding.duplicates.CHUNK_SHINGLES", 10**6)
    assert np.array_equal(band_hashes(ids, 0.8), whole)


@pytest.mark.parametrize("size", [1, 4, 5])
def test_short_documents_are_one_shingle(size: int) -> None:
    ids = np.arange(5, 5 + size, dtype=np.uint16)
    other = ids.copy()
    other[-1] += 1
    assert np.array_equal(band_hashes(ids, 0.8), band_hashes(ids, 0.8))
    assert not (band_hashes(ids, 0.8) == band_hashes(other, 0.8)).any()


def test_the_first_of_equal_documents() -> None:
    left = np.array([7, 3, 7, 7, 3, 9], dtype=np.uint64)
    right = np.array([1, 1, 2, 1, 1, 1], dtype=np.uint64)
    assert first_of_equal(left, right).tolist() == [True, True, True, False, False, True]
    assert first_of_equal(left).tolist() == [True, True, False, False, False, True]
    assert first_of_equal(left[:0]).tolist() == []


def test_groups_are_connected_through_any_band() -> None:
    one = np.array([1, 1, 2, 3, 4, 5, 6], dtype=np.uint64)
    two = np.array([1, 2, 2, 3, 9, 9, 4], dtype=np.uint64)
    three = np.array([1, 2, 3, 4, 5, 1, 6], dtype=np.uint64)
    found = groups(7, iter([one, two, three])).tolist()
    assert len({found[0], found[1], found[2], found[4], found[5]}) == 1  # 0-1, 1-2, 4-5, then 0-5
    assert len(set(found)) == 3
    assert len(set(groups(7, iter([])).tolist())) == 7


def test_groups_agree_with_a_search_by_hand() -> None:
    random = np.random.default_rng(3)
    bands = [random.integers(0, 60, 80).astype(np.uint64) for _ in range(3)]
    group = list(range(80))
    changed = True
    while changed:
        changed = False
        for band in bands:
            for i in range(80):
                for j in range(80):
                    if band[i] == band[j] and group[i] < group[j]:
                        group[j], changed = group[i], True
    found = groups(80, iter(bands))
    assert np.array_equal(first_of_equal(found), np.array(group) == np.arange(80))
