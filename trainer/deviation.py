"""How far a teacher of low precision is from the same teacher in float32, and its students' losses with it.

Letters: B rows, S sequence, H heads, D head dim, E hidden dim.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from trainer.capture import Captured
from trainer.evaluation import Encode
from trainer.layout import Counts
from trainer.models import Inputs
from trainer.transfer import Transfer, denominators, total, weights


@torch.no_grad()
def deviations(
    low: Encode,
    exact: Encode,
    students: Sequence[tuple[Encode, Transfer]],
    inputs: Inputs,
    teacher_hidden_size: int,
) -> dict[str, float]:
    """Return relative deviations on one micro batch: ``hidden``, ``scores``, and ``loss`` with students.

    ``hidden`` and ``scores`` are |X - X_exact| / |X_exact| in the Frobenius norm, over all captured layers
    and valid tokens (pairs of them); kinds that nobody learns from are left out. ``loss`` is that of the
    students' total losses, the largest of them. Collective where an encoder is.
    """
    found, expected = low(inputs), exact(inputs)
    mask_BS = inputs.layout.mask_BS
    result = {
        "hidden": _relative(
            (x[mask_BS], y[mask_BS])
            for x, y in zip(found.hidden, expected.hidden, strict=True)
            if x is not None and y is not None
        ),
        "scores": _relative(
            _scores(found, expected, layer, row, mask_S)
            for layer, query in enumerate(expected.queries)
            if query is not None
            for row, mask_S in enumerate(mask_BS)
        ),
    }
    losses = []
    tokens_B = mask_BS.sum(dim=1)
    counts = Counts(int(tokens_B.sum()), int(tokens_B.square().sum()), len(tokens_B))
    for encode, transfer in students:
        captured = encode(inputs)
        counted = denominators(transfer, counts, teacher_hidden_size)
        of_low, of_exact = (
            float(total(inputs.distil(captured, teacher, transfer), counted, weights(transfer)))
            for teacher in (found, expected)
        )
        losses.append(abs(of_low - of_exact) / of_exact)
    if losses:
        result["loss"] = max(losses)
    return {kind: value for kind, value in result.items() if value is not None}


def _relative(pairs: Iterable[tuple[Tensor, Tensor]]) -> float | None:
    """|X - Y| / |Y| of all pairs (X, Y) together, in float64; None without any."""
    error = size = 0.0
    for x, y in pairs:
        x, y = x.double(), y.double()
        error += float((x - y).square().sum())
        size += float(y.square().sum())
    return (error / size) ** 0.5 if size else None


def _scores(
    found: Captured, expected: Captured, layer: int, row: int, mask_S: Tensor
) -> tuple[Tensor, Tensor]:
    """One row's scores [H, S, S] in both, of valid tokens."""

    def scores(captured: Captured) -> Tensor:
        query, key = captured.queries[layer], captured.keys[layer]
        assert query is not None and key is not None
        query, key = query[row].float()[:, mask_S], key[row].float()[:, mask_S]
        return query @ key.mT * captured.scalings[layer]

    return scores(found), scores(expected)
