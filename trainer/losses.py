"""The losses of the method, as sums over the valid elements of each row; the caller divides by global counts.

Sums, not means: rows, padding and micro batches differ between ranks, and only a sum over everything divided
by one global count leaves loss and gradient independent of how rows are spread. One sum per row, [B], tells
besides how well each corpus of a mixture is learned. Sums are float32 whatever the inputs are (float64 for
float64 inputs), also under autocast. Only the student's tensors get a gradient.

Here are those of hidden states; ``task_loss`` has those of a task's logits; ``attention_loss``,
``relation_loss`` and ``prediction_loss``
hold those whose matrices are too large to form.

Letters: B rows, S sequence, E hidden dim. ``mask_BS`` is true (or 1) for valid tokens, None where every token
is. docs/method.md has the maths. Source: Jiao et al. 2019, arXiv:1909.10351, section 3.1.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import normalize

from trainer.numerics import scratch_elements, tiles, widen


def squared_error_sum(student_BSE: Tensor, teacher_BSE: Tensor, mask_BS: Tensor | None) -> Tensor:
    """Sum over a row's valid tokens and features of (student - teacher)^2: [B]. Its count is tokens * E."""
    return _TokenError.apply(student_BSE, teacher_BSE, mask_BS, _squared, _squared_gradient)


def cosine_distance_sum(student_BSE: Tensor, teacher_BSE: Tensor, mask_BS: Tensor | None) -> Tensor:
    """Sum over a row's valid tokens of 1 - cos(student, teacher): [B]. Its count is tokens.

    Source: the cosine embedding loss of DistilBERT, Sanh et al. 2019, arXiv:1910.01108, section 3.
    """
    return _TokenError.apply(student_BSE, teacher_BSE, mask_BS, _cosine, _cosine_gradient)


class _TokenError(torch.autograd.Function):
    """Sum over a row's valid tokens of an error between two vectors: [B].

    Some rows at a time, so that what lies between input and sum stays in the cache; the backward pass forms
    the errors again, so that nothing but the two inputs is kept.
    """

    @staticmethod
    def forward(
        ctx: Any,
        student_BSE: Tensor,
        teacher_BSE: Tensor,
        mask_BS: Tensor | None,
        error: Callable[[Tensor, Tensor], Tensor],
        gradient: Callable[[Tensor, Tensor], Tensor],
    ) -> Tensor:
        ctx.save_for_backward(student_BSE, mask_BS)
        ctx.teacher_BSE = teacher_BSE  # may be a tensor of inference mode, which autograd refuses to save
        ctx.gradient = gradient
        wide = torch.promote_types(student_BSE.dtype, torch.float32)
        error_BS = torch.empty(student_BSE.shape[:2], dtype=wide, device=student_BSE.device)
        for rows in _tiles(student_BSE):
            error_BS[rows] = error(widen(student_BSE[rows]), widen(teacher_BSE[rows]))
        return _masked(error_BS, mask_BS).sum(dim=1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_B: Tensor) -> tuple[Tensor | None, ...]:
        student_BSE, mask_BS = ctx.saved_tensors
        gradient_BSE = torch.empty_like(student_BSE)
        for rows in _tiles(student_BSE):
            formed = ctx.gradient(widen(student_BSE[rows]), widen(ctx.teacher_BSE[rows]))
            if mask_BS is not None:
                formed.masked_fill_(~mask_BS[rows].bool().unsqueeze(-1), 0)
            gradient_BSE[rows] = formed.mul_(grad_B[rows, None, None])
        return gradient_BSE, None, None, None, None


def _squared(x: Tensor, y: Tensor) -> Tensor:
    return (x - y).square_().sum(dim=-1)


def _squared_gradient(x: Tensor, y: Tensor) -> Tensor:
    return (x - y).mul_(2)


def _cosine(x: Tensor, y: Tensor) -> Tensor:
    return 1 - torch.cosine_similarity(x, y, dim=-1)


def _cosine_gradient(x: Tensor, y: Tensor) -> Tensor:
    norm = x.norm(dim=-1, keepdim=True).clamp_min(1e-8)
    x, y = x / norm, normalize(y, dim=-1, eps=1e-8)
    return (x * (x * y).sum(dim=-1, keepdim=True) - y).div_(norm)


def _tiles(x_BSE: Tensor) -> Iterator[slice]:
    rows, seq_len, width = x_BSE.shape
    return tiles(rows, seq_len * width, scratch_elements(x_BSE.device))


def _masked(x: Tensor, mask: Tensor | None) -> Tensor:
    return x if mask is None else x.masked_fill(~mask.bool(), 0)
