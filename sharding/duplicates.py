"""Documents that hold the same: exactly, by a digest of their ids; nearly, by MinHash and LSH.

MinHash (Broder 1997): with h_p random permutations of the 5-token sequences (shingles) of a document,
P(min h_p(A) = min h_p(B)) is the Jaccard similarity J of the two sets. LSH cuts the 128 minima into b bands
of r: two documents share a band with probability 1 - (1 - J^r)^b. ``datasketch`` chooses b and r for a
threshold (9 and 13 for 0.8: 1% at J = 0.6, 40% at 0.8, 93% at 0.9) and computes the minima.
Documents that share a band, directly or through others, are one group.

Cost at 7 million documents, near_threshold=0.8: 72 bytes a document in the runs (0.5 GB), of which the plan
holds one band at a time: about 60 bytes a document, 0.4 GB, while it groups them.
"""

import functools
import hashlib
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

SHINGLE_TOKENS = 5
PERMUTATIONS = 128
CHUNK_SHINGLES = 2048  # a chunk's hashes, 1 MB, stay in the processor's cache
_MULTIPLIERS = np.array([0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D, 0x27D4EB2F, 0x165667B1], dtype=np.uint32)


def digest(ids: NDArray[np.integer]) -> bytes:
    """16 bytes that name the ids of a document (BLAKE2b)."""
    return hashlib.blake2b(np.ascontiguousarray(ids).data, digest_size=16).digest()


@functools.lru_cache(maxsize=1)
def bands_and_rows(near_threshold: float) -> tuple[int, int]:
    """b and r of the LSH for a Jaccard threshold."""
    from datasketch import MinHashLSH

    index = MinHashLSH(threshold=near_threshold, num_perm=PERMUTATIONS)
    return index.b, index.r


@functools.lru_cache(maxsize=1)
def _permutations() -> NDArray[np.uint32]:
    from datasketch import MinHash

    return MinHash(num_perm=PERMUTATIONS, seed=1, scheme="affine32").permutations


def band_hashes(ids: NDArray[np.integer], near_threshold: float) -> NDArray[np.uint64]:
    """uint64 [b]: a hash of each band of the document's MinHash. ``ids`` [tokens] is not empty.

    A document of fewer than 5 tokens is one shingle.
    """
    from datasketch import MinHash

    bands, rows = bands_and_rows(near_threshold)
    sketch = MinHash(num_perm=PERMUTATIONS, scheme="affine32", permutations=_permutations(), hashfunc=_itself)
    shingles = np.unique(_shingles(ids)).tolist()
    for start in range(0, len(shingles), CHUNK_SHINGLES):
        sketch.update_batch(shingles[start : start + CHUNK_SHINGLES])
    minima = sketch.hashvalues[: bands * rows].reshape(bands, rows)
    hashes = [hashlib.blake2b(band.tobytes(), digest_size=8).digest() for band in minima]
    return np.frombuffer(b"".join(hashes), dtype="<u8")


def _itself(value: int) -> int:
    return value


def _shingles(ids: NDArray[np.integer]) -> NDArray[np.uint32]:
    """A hash of every 5 consecutive tokens: uint32 arithmetic that wraps around; MinHash mixes further."""
    length = min(SHINGLE_TOKENS, ids.size)
    hashes = np.zeros(ids.size - length + 1, dtype=np.uint32)
    for place in range(length):
        hashes ^= hashes >> np.uint32(15)
        hashes = (hashes + ids[place : place + hashes.size].astype(np.uint32)) * _MULTIPLIERS[place]
    return hashes


def first_of_equal(*columns: NDArray[np.generic]) -> NDArray[np.bool_]:
    """bool [n]: whether no earlier document has the same values in all columns [n]."""
    order = np.lexsort(columns)  # stable: equal documents stay in their order
    first = np.zeros(order.size, dtype=np.bool_)
    first[:1] = True
    for column in columns:
        first[1:] |= column[order[1:]] != column[order[:-1]]
    found = np.empty_like(first)
    found[order] = first
    return found


def groups(count: int, bands: Iterable[NDArray[np.uint64]]) -> NDArray[np.integer]:
    """int [count]: a number for each document, the same for documents that are connected by equal values in
    a band, uint64 [count]. One band is held at a time."""
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    group = np.arange(count)
    for band in bands:
        order = np.argsort(band, kind="stable")
        equal = band[order[1:]] == band[order[:-1]]
        edges = group[order[:-1][equal]], group[order[1:][equal]]
        graph = coo_matrix((np.ones(edges[0].size, dtype=np.bool_), edges), shape=(count, count))
        _, component = connected_components(graph, directed=False)
        group = component[group]
    return group
