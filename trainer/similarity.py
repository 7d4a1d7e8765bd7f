"""How alike two encoders compute: linear CKA between all their layers, and attention maps.

Linear centred kernel alignment (Kornblith et al. 2019, arXiv:1905.00414, section 3, equation 5): with the
outputs of two layers on the same n examples, X [n, P] and Y [n, Q], columns centred,

    CKA(X, Y) = ||Y'X||_F^2 / (||X'X||_F ||Y'Y||_F)

It is 1 for equal X and Y, 0 where nothing is linearly shared, and does not change with rotations of the
features or a common scale. An example is a valid token; padding is left out. This is the plain (biased)
estimate, which is above 0 by about sqrt(P Q) / n for unrelated features: take many more tokens than features.

Letters: B rows, S sequence, H heads, D head dim, P, Q features, n tokens, M, N layers.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Moments:
    """Sums over tokens, float64: all that CKA needs of any number of them.

    For M layers of P features and N of Q they hold 8 (M P N Q + M P^2 + N Q^2) bytes; nothing is [n, n].
    """

    tokens: int = 0
    x_MP: Tensor | None = None
    y_NQ: Tensor | None = None
    xx_MPP: Tensor | None = None
    yy_NQQ: Tensor | None = None
    xy_MNPQ: Tensor | None = None

    def add(self, x: Sequence[Tensor], y: Sequence[Tensor], mask_BS: Tensor) -> None:
        """Add a batch's tokens: M layers' outputs [B, S, P] of one encoder, N layers' [B, S, Q] of another.

        Any float format; what is not in the mask counts for nothing.
        """
        x_MnP, y_NnQ = (torch.stack([layer[mask_BS] for layer in own]).double() for own in (x, y))
        own = (
            x_MnP.sum(dim=1),
            y_NnQ.sum(dim=1),
            x_MnP.mT @ x_MnP,
            y_NnQ.mT @ y_NnQ,
            torch.einsum("mnp,knq->mkpq", x_MnP, y_NnQ),
        )
        self.tokens += x_MnP.shape[1]
        if self.xy_MNPQ is None:
            self.x_MP, self.y_NQ, self.xx_MPP, self.yy_NQQ, self.xy_MNPQ = own
            return
        for total, part in zip(
            (self.x_MP, self.y_NQ, self.xx_MPP, self.yy_NQQ, self.xy_MNPQ), own, strict=True
        ):
            total += part  # type: ignore[operator]

    def cka(self) -> Tensor:
        """Return linear CKA, float64 [M, N], within 0 and 1; NaN where a layer's outputs are all the same.

        Centring comes last: Xc'Yc = X'Y - n mean(X) mean(Y)'.
        """
        assert self.x_MP is not None and self.y_NQ is not None and self.xy_MNPQ is not None
        assert self.xx_MPP is not None and self.yy_NQQ is not None
        x_MP, y_NQ, n = self.x_MP, self.y_NQ, self.tokens
        xy_MNPQ = self.xy_MNPQ - torch.einsum("mp,kq->mkpq", x_MP, y_NQ) / n
        xx_MPP = self.xx_MPP - x_MP[:, :, None] * x_MP[:, None] / n
        yy_NQQ = self.yy_NQQ - y_NQ[:, :, None] * y_NQ[:, None] / n
        shared_MN = xy_MNPQ.square().sum(dim=(2, 3))
        own_M, own_N = (square.flatten(1).norm(dim=1) for square in (xx_MPP, yy_NQQ))
        return shared_MN / (own_M[:, None] * own_N)


def attention_map(query_BHSD: Tensor, key_BHSD: Tensor, scaling: float, mask_BS: Tensor) -> Tensor:
    """Return attention probabilities, mean over heads: float32 [B, S, S], rows of valid queries add up to 1.

    ``softmax(Q K' scaling)`` over valid keys; queries and keys as ``trainer.capture`` records them. A window
    that a layer may see through (ModernBERT) is not applied: give rows that fit into it.
    """
    scores_BHSS = query_BHSD.float() @ key_BHSD.float().mT * scaling
    return scores_BHSS.masked_fill(~mask_BS[:, None, None], -torch.inf).softmax(dim=-1).mean(dim=1)
