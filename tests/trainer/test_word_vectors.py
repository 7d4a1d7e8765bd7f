"""Nearest words against a plain loop in float64; files of all kinds."""

import gzip
import lzma
import zipfile
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import WORDS
from trainer import word_vectors
from trainer.word_vectors import WordVectors

TEXT = "\n".join(["the 1 0 0", ", 0 1 0", "cat 0.9 0.1 0", "Cat 0.9 0.2 0", "dog 0.5 0.5 0", "far -1 0 0.5"])


def vectors(neighbours: int, words: int = 100) -> WordVectors:
    matrix_VD = np.random.default_rng(0).standard_normal((words, 8)).astype(np.float32)
    matrix_VD[7] = 2 * matrix_VD[3]  # the same direction: the more frequent is the nearer
    return WordVectors(WORDS[:words], matrix_VD, neighbours)


def slow(found: WordVectors, word: str, count: int) -> list[str]:
    exact = found.matrix_VD.astype(np.float64)
    own = exact[found.words.index(word)]
    near = sorted(range(len(found.words)), key=lambda index: -float(sum(exact[index] * own)))
    return [found.words[index] for index in near if found.words[index] != word][:count]


@pytest.mark.parametrize("elements", [2**24, 250])
@pytest.mark.parametrize("neighbours", [1, 5, 200])
def test_neighbours_are_those_of_a_plain_loop(neighbours, elements, monkeypatch):
    monkeypatch.setattr(word_vectors, "TILE_ELEMENTS", elements)
    found = vectors(neighbours)
    asked = [WORDS[n] for n in (5, 3, 99, 5, 7)]
    assert found.nearest(asked) == [slow(found, word, neighbours) for word in asked]


def test_what_else_is_asked_for_changes_nothing():
    together, alone = vectors(5).nearest(WORDS[:100]), vectors(5)
    assert [alone.nearest([word])[0] for word in reversed(WORDS[:100])] == together[::-1]


def test_equal_directions_stand_in_the_files_order():
    found = vectors(2)
    assert found.nearest([WORDS[3]])[0][0] == WORDS[7] and found.nearest([WORDS[7]])[0][0] == WORDS[3]


@pytest.mark.parametrize("kind", ["txt", "gz", "xz", "zip"])
def test_files_are_read_packed_or_not(kind: str, tmp_path: Path):
    path = tmp_path / f"vectors.{kind}"
    if kind == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("vectors.txt", TEXT)
    else:
        {"txt": open, "gz": gzip.open, "xz": lzma.open}[kind](path, "wb").write(TEXT.encode())
    found = WordVectors.read(str(path), 2)
    assert found.words == ["the", "cat", "Cat", "dog", "far"]  # letters alone
    np.testing.assert_allclose(found.matrix_VD[1], np.array([0.9, 0.1, 0]) / np.hypot(0.9, 0.1), rtol=1e-6)
    # A word is never its own neighbour, in no case; one that is not there is looked for in lower case.
    assert found.nearest(["cat", "DOG", "horse"]) == [["the", "dog"], ["Cat", "cat"], []]


def test_the_first_words_of_a_file_are_read(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(word_vectors, "MOST_WORDS", 3)
    (tmp_path / "vectors.txt").write_text(TEXT)
    assert WordVectors.read(str(tmp_path / "vectors.txt"), 2).words == ["the", "cat"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("the 1 2\ncat 1 2 3\n", "line 2 has 3 numbers, unlike the others"),
        ("the 1 2\ncat 1 two\n", "'two'"),
        ("the 1\n", "line 1 has 1 numbers"),
        (", 1 2\n", "holds no words"),
        (b"\xff\xfe", "utf-8"),
    ],
)
def test_a_file_of_another_format_is_refused(text, message: str, tmp_path: Path):
    path = tmp_path / "vectors.txt"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=f"augmentation.vectors=.*{message}"):
        WordVectors.read(str(path), 2)


def test_a_zip_of_several_files_is_refused_by_their_names(tmp_path: Path):
    with zipfile.ZipFile(tmp_path / "v.zip", "w") as archive:
        archive.writestr("50d.txt", TEXT)
        archive.writestr("100d.txt", TEXT)
    with pytest.raises(ValueError, match="it holds 50d.txt, 100d.txt: unpack the one"):
        WordVectors.read(str(tmp_path / "v.zip"), 2)
    with pytest.raises(ValueError, match="No such file"):
        WordVectors.read(str(tmp_path / "missing.gz"), 2)
