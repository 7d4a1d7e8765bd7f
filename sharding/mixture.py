"""How several corpora share a run: which of them, and which row of it, stands at a position. Pure functions.

Weights become whole quotas of a period of 10,000 turns, and every corpus's turns are spread evenly over the
period. So the number of a corpus's rows among the first p rows of the run has a closed form: each corpus is
read in its own order (``sharding.order``) without gaps, exactly once per its own epoch, and a seek costs
nothing.

Corpora of one row length form a bin. All rows of a global step come from one bin, so that every rank sees
the same shape; the steps are dealt to the bins in the same way, by the bins' summed weights.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

PERIOD = 10_000


class Turns:
    """An endless, periodic sequence of turns dealt to kinds 0, 1, ... by weight.

    In every period each kind has its quota exactly: its share of 10,000, rounded so that the quotas add up
    (largest remainders first). Within a period the i-th of a kind's q turns has its ideal place at
    (i + 1/2) / q, and the turns stand in the order of these places.

    Raises: ValueError for a weight that is not positive, or too small to get one turn in a period.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        shares = np.asarray(weights, dtype=np.float64)
        if shares.size == 0 or not (np.isfinite(shares) & (shares > 0)).all():
            raise ValueError(f"weights={list(weights)} must all be above 0 and finite")
        exact = shares / shares.sum() * PERIOD
        quotas = np.floor(exact).astype(np.int64)
        most_cut = np.argsort(quotas - exact, kind="stable")
        quotas[most_cut[: PERIOD - quotas.sum()]] += 1
        if quotas.min() < 1:
            raise ValueError(f"weights={list(weights)}: one is below 1/{PERIOD} of their sum; raise it")
        kinds = np.repeat(np.arange(quotas.size), quotas)
        ideal = np.concatenate([(np.arange(quota) + 0.5) / quota for quota in quotas])
        self.period = kinds[np.argsort(ideal, kind="stable")]
        """Kind of each turn of a period: int64 [10,000]."""
        one_hot = self.period[:, None] == np.arange(quotas.size)
        self._before = np.concatenate((np.zeros_like(quotas)[None], np.cumsum(one_hot, axis=0)))
        self._quotas = quotas

    def before(self, turn: int) -> NDArray[np.int64]:
        """How many of the first ``turn`` turns each kind has: int64 [kinds]."""
        periods, place = divmod(turn, PERIOD)
        return periods * self._quotas + self._before[place]

    def kinds(self, start: int, count: int) -> NDArray[np.int64]:
        """The kinds of turns ``start .. start + count - 1``: int64 [count]."""
        return self.period[np.arange(start, start + count) % PERIOD]


@dataclass(frozen=True)
class Draw:
    """What a stretch of a global step takes from one corpus."""

    corpus: int
    """Index of the corpus."""
    start: int
    """Position in the corpus's own order of its first row here; the others follow it."""
    slots: NDArray[np.int64]
    """Where its rows stand in the stretch, ascending: int64 [rows of this corpus]."""


class Mixture:
    """Which rows of which corpora a run reads.

    Args:
        seq_lens: row length of each corpus.
        weights: share of the run's rows of each corpus, up to a common factor.
        global_batch_rows: rows of a global step.

    Raises: ValueError for weights that cannot be dealt.
    """

    def __init__(self, seq_lens: Sequence[int], weights: Sequence[float], global_batch_rows: int) -> None:
        self.global_batch_rows = global_batch_rows
        bins = sorted(set(seq_lens))
        self._members = [[c for c, length in enumerate(seq_lens) if length == own] for own in bins]
        self._steps = Turns([sum(weights[c] for c in members) for members in self._members])
        self._rows = [Turns([weights[c] for c in members]) for members in self._members]
        self._corpora = len(seq_lens)

    def draws(self, position: int, offset: int, count: int) -> list[Draw]:
        """Rows ``offset .. offset + count - 1`` of the global step that begins at ``position``.

        Corpora that have no row there are left out. Raises: ValueError with several bins, when no step
        begins there.
        """
        number, start = 0, position
        if len(self._members) > 1:
            step = self._step(position)
            number = int(self._steps.kinds(step, 1)[0])
            start = int(self._steps.before(step)[number]) * self.global_batch_rows
        rows, members = self._rows[number], self._members[number]
        first, kinds = rows.before(start + offset), rows.kinds(start + offset, count)
        found = ((c, int(first[kind]), np.flatnonzero(kinds == kind)) for kind, c in enumerate(members))
        return [Draw(c, own_start, slots) for c, own_start, slots in found if slots.size]

    def consumed(self, position: int) -> NDArray[np.int64]:
        """Rows of each corpus in the run's first ``position`` rows: int64 [corpora]. Raises as ``draws``."""
        drawn = [position]
        if len(self._members) > 1:
            drawn = [int(n) * self.global_batch_rows for n in self._steps.before(self._step(position))]
        counts = np.zeros(self._corpora, dtype=np.int64)
        for rows, members, own in zip(self._rows, self._members, drawn, strict=True):
            counts[members] = rows.before(own)
        return counts

    def _step(self, position: int) -> int:
        step, inside = divmod(position, self.global_batch_rows)
        if inside:
            raise ValueError(
                f"position={position} does not begin a step of global_batch_rows={self.global_batch_rows}, "
                "and steps of several row lengths cannot be cut"
            )
        return step
