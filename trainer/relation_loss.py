"""MiniLMv2's relations between a layer's queries, keys or values, without relation matrices.

Letters: B rows, S sequence, H heads, D head dim, R relation heads, N row-and-head pairs of a tile.
Source: Wang et al. 2020, arXiv:2012.15828, section 3.1.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from trainer.numerics import blocks, exact_products, flat_tile, padding_of, scratch_elements, tiles

_MASKED = -1e30  # a score that no probability is left of; finite, so that the difference of two of them is 0


def relation_heads(x_BHSD: Tensor, heads: int) -> Tensor:
    """[B, H, S, D] -> [B, R, S, H D / R]: all heads side by side, split anew into R."""
    return x_BHSD.transpose(1, 2).flatten(2).unflatten(2, (heads, -1)).transpose(1, 2)


def relation_divergence_sum(x_S: Tensor, x_T: Tensor, mask_BS: Tensor | None) -> Tensor:
    """Sum over a row's relation heads and valid queries of KL(R_T || R_S), R = softmax(X X' / sqrt(D)): [B].

    x_S, x_T: queries, keys or values of student and teacher, [B, R, S, D]; D may differ. mask_BS: true (or 1)
    for valid tokens, None where every token is; the softmax runs over valid keys. The count is R * tokens.
    Computed in float32 without TF32 (float64 for float64 inputs), in tiles of bounded size. The teacher's
    tensor gets no gradient.
    """
    return _RelationDivergence.apply(x_S, x_T, mask_BS)


class _RelationDivergence(torch.autograd.Function):
    """A row's gradient is known up to a factor, so it is formed in the forward pass."""

    @staticmethod
    def forward(ctx: Any, x_S: Tensor, x_T: Tensor, mask_BS: Tensor | None) -> Tensor:
        rows, heads, seq_len, _ = x_S.shape
        wide = torch.promote_types(torch.promote_types(x_S.dtype, x_T.dtype), torch.float32)
        padding_B1S1 = padding_of(mask_BS)
        bias_B11S = torch.zeros(rows, 1, 1, seq_len, dtype=wide, device=x_S.device)
        if padding_B1S1 is not None:
            bias_B11S.masked_fill_(padding_B1S1.mT, _MASKED)
        total_BR = torch.empty(rows, heads, dtype=wide, device=x_S.device)
        learns = ctx.needs_input_grad[0]
        gradients = [torch.empty_like(x_S, dtype=wide)] if learns else []
        with exact_products(x_S.device.type):
            for tile in blocks(rows, heads, seq_len * seq_len, scratch_elements(x_S.device)):
                own, target = (flat_tile(x, tile, padding_B1S1).to(wide) for x in (x_S, x_T))
                bias_N1S = bias_B11S[tile[0]].expand(-1, x_S[tile].shape[1], -1, -1).flatten(0, 1)
                total_N, *parts = _divergence(own, target, bias_N1S, learns)
                total_BR[tile] = total_N.view_as(total_BR[tile])
                for gradient, part in zip(gradients, parts, strict=True):
                    gradient[tile] = part.view_as(gradient[tile])
        ctx.save_for_backward(*gradients)
        return total_BR.sum(dim=1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_B: Tensor) -> tuple[Tensor | None, ...]:
        return grad_B[:, None, None, None] * ctx.saved_tensors[0], None, None


def _divergence(x_S: Tensor, x_T: Tensor, bias_N1S: Tensor, learns: bool) -> tuple[Tensor, ...]:
    """[N], and on request its gradient [N, S, D]; some queries at a time.

    With scores z = X X' / sqrt(D), the gradient for z is G = R_S - R_T, and for X it is (G + G') X / sqrt(D).
    Padded tokens are zeros, whose relation to every valid token is the same in both models: as queries they
    add exactly nothing.
    """
    (heads, seq_len, _), scale = x_S.shape, x_S.shape[2] ** -0.5
    total, gradient = x_S.new_zeros(heads), torch.zeros_like(x_S)
    for queries in tiles(seq_len, heads * seq_len, scratch_elements(x_S.device)):
        log_S, log_T = (_log_relation(x, queries, bias_N1S) for x in (x_S, x_T))
        relation_T = log_T.exp()
        total += log_T.sub_(log_S).mul_(relation_T).sum(dim=(1, 2))
        if learns:
            error = log_S.exp_().sub_(relation_T)
            gradient[:, queries].baddbmm_(error, x_S, alpha=scale)
            gradient.baddbmm_(error.mT, x_S[:, queries], alpha=scale)
    return (total, gradient) if learns else (total,)


def _log_relation(x: Tensor, queries: slice, bias_N1S: Tensor) -> Tensor:
    return torch.log_softmax(torch.baddbmm(bias_N1S, x[:, queries], x.mT, alpha=x.shape[2] ** -0.5), dim=2)
