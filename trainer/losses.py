"""The losses of the method, as sums over the valid elements of each row; the caller divides by global counts.

Sums, not means: rows, padding and micro batches differ between ranks, and only a sum over everything divided
by one global count leaves loss and gradient independent of how rows are spread. One sum per row, [B], tells
besides how well each corpus of a mixture is learned. Sums are float32 whatever the inputs are (float64 for
float64 inputs), also under autocast.

Letters: B rows, S sequence, H heads, R attention heads, D head dim, E hidden dim. ``mask_BS`` is true (or 1)
for valid tokens. docs/method.md has the maths. Source: Jiao et al. 2019, arXiv:1909.10351, section 3.1.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def squared_error_sum(student_BSE: Tensor, teacher_BSE: Tensor, mask_BS: Tensor) -> Tensor:
    """Sum over a row's valid tokens and features of (student - teacher)^2: [B]. Its count is tokens * E."""
    error_BSE = _widen(student_BSE) - _widen(teacher_BSE)
    return error_BSE.masked_fill(~mask_BS.bool().unsqueeze(-1), 0).square().sum(dim=(1, 2))


def soft_cross_entropy_sum(
    student_logits: Tensor, teacher_logits: Tensor, temperature: float, mask: Tensor | None = None
) -> Tensor:
    """Sum over valid rows and classes of -softmax(teacher / t) log_softmax(student / t): a scalar.

    Logits, not probabilities: [..., classes]; mask: [...], all rows valid when None. Its count is valid rows:
    no division by the number of classes, and no factor t^2.
    """
    target = torch.softmax(_widen(teacher_logits) / temperature, dim=-1)
    log_student = torch.log_softmax(_widen(student_logits) / temperature, dim=-1)
    entropy = -(target * log_student).sum(dim=-1)
    return (entropy if mask is None else entropy.masked_fill(~mask.bool(), 0)).sum()


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
    mask_BS: Tensor,
    method: str = "auto",
) -> Tensor:
    """Sum over a row's heads and pairs of valid tokens of (A_S - A_T)^2, with A = Q K' * scaling: [B].

    Queries and keys: [B, R, S, D]; D may differ between student (_S) and teacher (_T). The count is R times
    the squared row length. The teacher's tensors get no gradient. With padded rows zero, side by side

        U = [a Q_S, b Q_T],   V = [a K_S, -b K_T],   so that   A_S - A_T = U V'   with a^2, b^2 the scalings,

    the sum is one of two equal expressions, computed in float32 without TF32 (float64 for float64 inputs):

        ``direct``  || U V' ||_F^2    forms the S x S errors of every head
        ``gram``    < U'U, V'V >      forms two matrices of (D_S + D_T)^2 and nothing of S x S

    ``auto`` is ``gram`` where S > D_S + D_T, that is where the errors would be larger than U and V.
    """
    if method == "auto":
        method = "gram" if q_S.shape[2] > q_S.shape[3] + q_T.shape[3] else "direct"
    if method not in ("gram", "direct"):
        raise ValueError(f"method={method!r} is none of auto, gram, direct")
    padding_B1S1 = ~mask_BS.bool()[:, None, :, None]
    a, b = math.sqrt(scaling_S), math.sqrt(scaling_T)
    scaled = [_widen(x) * root for x, root in ((q_S, a), (k_S, a), (q_T, b), (k_T, b))]
    return _ScoreError.apply(*(x.masked_fill(padding_B1S1, 0) for x in scaled), method)


class _ScoreError(torch.autograd.Function):
    """|| Q_S K_S' - Q_T K_T' ||_F^2 summed over heads, [B], with its gradient

        dQ_S = 2 (U V') K_S = 2 U (V'V)[:, :D_S]        dK_S = 2 (U V')' Q_S = 2 V (U'U)[:, :D_S].

    A row's gradient is known up to a factor, so it is formed in the forward pass: what waits for the
    backward pass is two tensors of the student's size, nothing of the teacher's and nothing of S x S.
    """

    @staticmethod
    def forward(ctx: Any, q_S: Tensor, k_S: Tensor, q_T: Tensor, k_T: Tensor, method: str) -> Tensor:
        dim_S, wants_gradient = q_S.shape[-1], ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        with _exact_products(q_S.device.type):
            u, v = torch.cat((q_S, q_T), dim=-1), torch.cat((k_S, -k_T), dim=-1)
            if method == "gram":
                gram_u, gram_v = u.mT @ u, v.mT @ v
                total = (gram_u * gram_v).sum(dim=(1, 2, 3))
                if wants_gradient:
                    ctx.save_for_backward(2 * (u @ gram_v[..., :dim_S]), 2 * (v @ gram_u[..., :dim_S]))
            else:
                error = u @ v.mT
                total = error.square().sum(dim=(1, 2, 3))
                if wants_gradient:
                    ctx.save_for_backward(2 * (error @ k_S), 2 * (error.mT @ q_S))
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gradient_q, gradient_k = ctx.saved_tensors
        factor_B111 = grad[:, None, None, None]
        return factor_B111 * gradient_q, factor_B111 * gradient_k, None, None, None


@contextmanager
def _exact_products(device_type: str) -> Iterator[None]:
    """Products at the precision of their operands: no autocast, no TF32 or bfloat16 inside float32."""
    mkldnn: Any = torch.backends.mkldnn
    backends = (torch.backends.cuda.matmul, mkldnn.matmul)
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        with torch.autocast(device_type, enabled=False):
            yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision


def _widen(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
