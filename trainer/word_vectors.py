"""Word vectors (GloVe: Pennington et al. 2014, EMNLP): the nearest words of a word, by cosine.

Letters: V words, D dimensions, Q words asked for at once.
"""

import contextlib
import gzip
import itertools
import lzma
import os
import zipfile
from collections.abc import Iterable, Iterator
from typing import IO

import numpy as np
from numpy.typing import NDArray

MOST_WORDS = 400_000
"""Read from a file's start, where the frequent words are; all of GloVe 6B."""
TILE_ELEMENTS = 2**24
"""Cosines at a time: 64 MiB."""
SPARE = 16
"""Words beyond those asked for whose cosines are formed once more in float64, in which order they stay."""


class WordVectors:
    """Words that are written in letters alone, and their unit vectors."""

    def __init__(self, words: list[str], matrix_VD: NDArray[np.float32], neighbours: int) -> None:
        """Args: ``matrix_VD`` has a row for every word and is normalised in place; ``neighbours`` of a word
        are what ``nearest`` returns."""
        lengths = np.linalg.norm(matrix_VD, axis=1, keepdims=True)
        self.words, self.neighbours = words, neighbours
        self.matrix_VD = np.divide(matrix_VD, lengths, out=matrix_VD, where=lengths > 0)
        self._index = {word: index for index, word in enumerate(words)}
        self._nearest: dict[str, list[str]] = {}  # of words asked for before: a task's words come again

    @classmethod
    def read(cls, path: str, neighbours: int) -> "WordVectors":
        """Read a file of GloVe's text format, ``word v1 ... vD`` per line; .gz, .xz and .zip are unpacked.

        Lines whose word is not all letters are passed over.

        Raises:
            ValueError: the file is not there or not in that format.
        """
        words: dict[str, int] = {}
        vectors: list[NDArray[np.float32]] = []
        try:
            for number, line in enumerate(_lines(path), start=1):
                word, _, numbers = line.partition(" ")
                if not word.isalpha() or word in words:
                    continue
                vector = np.array(numbers.split(), dtype=np.float32)
                if vector.size < 2 or (vectors and vector.size != vectors[0].size):
                    raise ValueError(f"line {number} has {vector.size} numbers, unlike the others")
                words[word] = len(vectors)
                vectors.append(vector)
        except (OSError, ValueError, lzma.LZMAError, zipfile.BadZipFile, EOFError) as error:
            raise ValueError(
                f"augmentation.vectors={path!r} cannot be read: {error}; give a file of GloVe's text format, "
                "a word and its numbers per line (.gz, .xz and .zip are unpacked)"
            ) from error
        if not words:
            raise ValueError(
                f"augmentation.vectors={path!r} holds no words; give a file of GloVe's text format"
            )
        return cls(list(words), np.stack(vectors), neighbours)

    def nearest(self, words: Iterable[str]) -> list[list[str]]:
        """Return for each word its nearest others, the nearest first; none for one that is not there, neither
        as it is written nor in lower case.

        The order is that of float64 cosines, each formed by itself: neither the number of threads nor what
        else is asked for changes it.
        """
        asked = [word if word in self._index else word.lower() for word in words]
        new = sorted({word for word in asked if word in self._index and word not in self._nearest})
        tile = max(1, TILE_ELEMENTS // len(self.words))
        for first in range(0, len(new), tile):
            self._nearest.update(self._search(new[first : first + tile]))
        return [self._nearest.get(word, []) for word in asked]

    def _search(self, words: list[str]) -> Iterator[tuple[str, list[str]]]:
        query_QD = self.matrix_VD[[self._index[word] for word in words]]
        cosine_QV = query_QD @ self.matrix_VD.T
        count = min(self.neighbours + SPARE, len(self.words))
        near_QN = np.argpartition(cosine_QV, len(self.words) - count, axis=1)[:, -count:]
        near_QN.sort(axis=1)  # where cosines are equal, the more frequent word is the nearer
        for word, query_D, near_N in zip(words, query_QD, near_QN, strict=True):
            exact_N = (self.matrix_VD[near_N].astype(np.float64) * query_D).sum(axis=1)
            nearest = (self.words[index] for index in near_N[np.argsort(-exact_N, kind="stable")])
            others = [other for other in nearest if other.casefold() != word.casefold()]
            yield word, others[: self.neighbours]


def _lines(path: str) -> Iterator[str]:
    """The first lines of a text file that may be packed. Raises ValueError for a zip of several files."""
    with contextlib.closing(_opened(path)) as file:
        for line in itertools.islice(file, MOST_WORDS):
            yield line.decode("utf-8")


def _opened(path: str) -> IO[bytes] | gzip.GzipFile:
    kind = os.path.splitext(path)[1]
    if kind == ".gz":
        return gzip.open(path)
    if kind == ".xz":
        return lzma.open(path)
    if kind == ".zip":
        archive = zipfile.ZipFile(path)
        if len(archive.namelist()) != 1:
            raise ValueError(f"it holds {', '.join(archive.namelist())}: unpack the one that you want")
        return archive.open(archive.namelist()[0])
    return open(path, "rb")
