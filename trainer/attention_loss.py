"""The attention loss: squared error of scores before the softmax, without score matrices.

Letters: B rows, S sequence, H heads, R attention heads, D head dim, N row-and-head pairs of a tile.
docs/method.md has the maths and the measurements. Source: Jiao et al. 2019, arXiv:1909.10351, section 3.1.
"""

import functools
import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from trainer.numerics import (
    blocks,
    exact_products,
    flat_tile,
    padding_of,
    scratch_elements,
    tiles,
    widen,
)

# Squares of low-precision numbers are so regular that their float32 sum is rounded down more often than up;
# scaled by this first, they are not (docs/method.md).
_IRREGULAR = 1 / math.pi


def common_heads(student_heads: int, teacher_heads: int, requested: int | None = None) -> int:
    """R, the number of heads on which the attention of student and teacher is compared.

    ``requested`` if given; else the common head count; else the greatest common divisor.
    Raises ValueError when ``requested`` does not divide both counts, or when the divisor is 1 although both
    models have several heads: that would compare the sum of all heads, which nobody should get unasked.
    """
    shown = f"student heads {student_heads}, teacher heads {teacher_heads}"
    common = math.gcd(student_heads, teacher_heads)
    if requested is not None:
        if requested < 1 or common % requested:
            fits = [r for r in range(1, common + 1) if common % r == 0]
            raise ValueError(
                f"attention_heads={requested} must divide both head counts ({shown}); these do: {fits}"
            )
        return requested
    if common == 1 < min(student_heads, teacher_heads):
        raise ValueError(
            f"the head counts have no common divisor but 1 ({shown}): change the student's heads, or set "
            "attention_heads=1 to compare the sum of all heads"
        )
    return common


def group_heads(x_BHSD: Tensor, attention_heads: int) -> Tensor:
    """[B, H, S, D] -> [B, R, S, g D]: every attention head concatenates g = H / R consecutive heads.

    So its raw score is the sum of theirs, q k' = sum_i q_i k_i'. See ``grouped_scaling``.
    """
    if x_BHSD.shape[1] == attention_heads:
        return x_BHSD
    return x_BHSD.unflatten(1, (attention_heads, -1)).transpose(2, 3).flatten(3)


def grouped_scaling(scaling: float, heads: int, attention_heads: int) -> float:
    """Scaling / sqrt(g) for g = H / R heads in an attention head: 1 / sqrt(D) becomes 1 / sqrt(g D).

    A sum of g independent scores has g times their variance: this keeps the scale the same for any g.
    """
    return scaling / math.sqrt(heads / attention_heads)


def attention_error_sum(
    q_S: Tensor,
    k_S: Tensor,
    q_T: Tensor,
    k_T: Tensor,
    scaling_S: float,
    scaling_T: float,
    mask_BS: Tensor | None,
    method: str = "auto",
) -> Tensor:
    """Sum over a row's heads and pairs of valid tokens of (A_S - A_T)^2, with A = Q K' * scaling: [B].

    Queries and keys: [B, R, S, D]; D and dtype may differ between student (_S) and teacher (_T).
    mask_BS: true (or 1) for valid tokens; None where every token is. The count is R times the squared row
    length. The teacher's tensors get no gradient. With padded rows zero and scalings s and t, the sum is one
    of two equal expressions, computed in float32 without TF32 (float64 for float64 inputs):

        ``direct``  || s Q_S K_S' - t Q_T K_T' ||_F^2
        ``gram``    s^2 <Q_S'Q_S, K_S'K_S> - 2 s t <Q_T'Q_S, K_T'K_S> + t^2 <Q_T'Q_T, K_T'K_T>

    ``direct`` forms the errors in tiles of bounded size, ``gram`` matrices of D x D and nothing of S x S.
    Multiply-adds a head, gradient included: S^2 (3 D_S + D_T) and S (4 D_S^2 + 4 D_S D_T + 2 D_T^2).
    ``auto`` takes ``gram`` where it has a tenth fewer.
    """
    if method == "auto":
        method = faster_method(q_S.shape[2], q_S.shape[3], q_T.shape[3])
    if method not in ("gram", "direct"):
        raise ValueError(f"method={method!r} is none of auto, gram, direct")
    return _ScoreError.apply(q_S, k_S, q_T, k_T, scaling_S, scaling_T, mask_BS, method)


def faster_method(seq_len: int, dim_S: int, dim_T: int) -> str:
    """What ``auto`` takes for rows of so many tokens."""
    direct = seq_len * (3 * dim_S + dim_T)
    gram = 4 * dim_S * dim_S + 4 * dim_S * dim_T + 2 * dim_T * dim_T
    return "gram" if direct > 1.1 * gram else "direct"  # its small products run a tenth slower


class _ScoreError(torch.autograd.Function):
    """|| s Q_S K_S' - t Q_T K_T' ||_F^2 summed over heads, [B], with its gradient.

    A row's gradient is known up to a factor, so it is formed in the forward pass: what waits for the
    backward pass is two tensors of the student's size, nothing of the teacher's and nothing of S x S.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q_S: Tensor,
        k_S: Tensor,
        q_T: Tensor,
        k_T: Tensor,
        scaling_S: float,
        scaling_T: float,
        mask_BS: Tensor | None,
        method: str,
    ) -> Tensor:
        inputs, (rows, heads, seq_len, _) = (q_S, k_S, q_T, k_T), q_S.shape
        wide = functools.reduce(torch.promote_types, (x.dtype for x in inputs), torch.float32)
        narrow = min(x.dtype.itemsize for x in inputs) == 2
        on_tensor_cores = method == "gram" and q_S.is_cuda and narrow and len({x.dtype for x in inputs}) == 1
        unit = _IRREGULAR if narrow and not on_tensor_cores else 1.0
        limit = scratch_elements(q_S.device)
        if method == "direct":
            form, all_tiles = _direct, blocks(rows, heads, seq_len * seq_len, limit)
        else:  # a row's heads together: products of one head are too small to be worth several threads
            some_rows = tiles(rows, heads * seq_len * q_T.shape[3], limit)
            form, all_tiles = _gram, ((tile, slice(0, heads)) for tile in some_rows)
        padding_B1S1 = padding_of(mask_BS)

        def load(x: Tensor, tile: tuple[slice, slice]) -> Tensor:
            x = flat_tile(x, tile, padding_B1S1)
            x = x if on_tensor_cores else x.to(wide)
            return x if unit == 1 else x * unit

        learns = any(ctx.needs_input_grad[:2])
        gradients = [torch.empty_like(x, dtype=wide) for x in inputs[:2]] if learns else []
        total_BR = torch.empty(rows, heads, dtype=wide, device=q_S.device)
        with exact_products(q_S.device.type):
            for tile in all_tiles:
                loaded = [load(x, tile) for x in inputs]
                total_N, *parts = form(loaded, scaling_S / unit**2, scaling_T / unit**2, unit, learns)
                total_BR[tile] = total_N.view_as(total_BR[tile])
                for gradient, part in zip(gradients, parts, strict=True):
                    gradient[tile] = part.view_as(gradient[tile])
        ctx.save_for_backward(*gradients)
        return total_BR.sum(dim=1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return *(grad[:, None, None, None] * gradient for gradient in ctx.saved_tensors), *(None,) * 6


def _gram(inputs: list[Tensor], s: float, t: float, unit: float, learns: bool) -> tuple[Tensor, ...]:
    """|| s Q_S K_S' - t Q_T K_T' ||^2 [N], and its gradient for Q_S and K_S times ``unit``.

    Inputs: Q_S, K_S, Q_T, K_T, each [N, S, D].
    """
    q_S, k_S, q_T, k_T = inputs
    qq, kk, qq_TS, kk_TS = _product(q_S, q_S), _product(k_S, k_S), _product(q_T, q_S), _product(k_T, k_S)
    own, shared = _inner(qq, kk), _inner(qq_TS, kk_TS)
    total = s * s * own - 2 * s * t * shared + t * t * _inner(_product(q_T, q_T), _product(k_T, k_T))
    if not learns:
        return (total,)
    constants = {"beta": 2 * unit * s * s, "alpha": -2 * unit * s * t}
    gradient_q = torch.bmm(widen(q_S), kk).baddbmm_(widen(q_T), kk_TS, **constants)
    gradient_k = torch.bmm(widen(k_S), qq).baddbmm_(widen(k_T), qq_TS, **constants)
    return total, gradient_q, gradient_k


def _direct(inputs: list[Tensor], s: float, t: float, unit: float, learns: bool) -> tuple[Tensor, ...]:
    """The same as ``_gram``, from errors that are formed for some queries at a time."""
    q_S, k_S, q_T, k_T = inputs
    (heads, seq_len, _), scale = q_S.shape, 2 * unit * s
    total, gradient_q, gradient_k = q_S.new_zeros(heads), torch.empty_like(q_S), torch.zeros_like(k_S)
    for queries in tiles(seq_len, heads * seq_len, scratch_elements(q_S.device)):
        error = torch.bmm(q_T[:, queries], k_T.mT)
        error.baddbmm_(q_S[:, queries], k_S.mT, beta=-scale * t, alpha=scale * s)
        if learns:
            gradient_q[:, queries] = torch.bmm(error, k_S)
            gradient_k.baddbmm_(error.mT, q_S[:, queries])
        total += error.square_().sum(dim=(1, 2))
    return total / scale**2, *((gradient_q, gradient_k) if learns else ())


def _product(x: Tensor, y: Tensor) -> Tensor:
    """X'Y [N, D, D'] in float32; exact products of low precision are what tensor cores make."""
    if x.dtype.itemsize == 2:
        return torch.bmm(x.mT, y, out_dtype=torch.float32)
    return torch.bmm(x.mT, y)


def _inner(x: Tensor, y: Tensor) -> Tensor:
    """Sum of element products [N], float64: such sums are subtracted from one another."""
    return (x * y).sum(dim=1).sum(dim=1, dtype=torch.float64)
