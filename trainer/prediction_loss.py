"""Divergence of masked-language-model predictions, without the logits of a whole batch.

Letters: B rows, S sequence, E hidden dim, V vocabulary, T valid tokens.
Source: Hinton et al. 2015, arXiv:1503.02531, section 2; DistilBERT, arXiv:1910.01108, uses it in pretraining.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from trainer.capture import Prediction
from trainer.numerics import exact_products, tiles, widen

TILE_ELEMENTS = 2**23
"""Logits at a time: 275 tokens of 30,522, enough to read the weights once for many tokens."""


def prediction_divergence_sum(
    student: Prediction, teacher: Prediction, temperature: float, mask_BS: Tensor | None
) -> Tensor:
    """Sum over a row's valid tokens of KL(p_T || p_S), with p = softmax(logits / temperature): [B].

    Logits are features_BSE @ weight_VE' + bias_V, formed for some tokens at a time, in float32 (float64 for
    float64 inputs). mask_BS: true (or 1) for valid tokens, None where every token is. The count is tokens;
    there is no factor temperature^2. The student's features, weight and bias get gradients, the teacher none.

    Gradients are formed in the forward pass, while the logits are there: 2 T V (E_S + E_T) operations for
    logits and 4 T V E_S for gradients. Formed in the backward pass they would cost the logits again. What
    waits for the backward pass is one float32 tensor of the features' size and one of the weight's. So every
    row's sum must have the same weight in the total, as ``trainer.transfer.total`` gives it: the backward
    pass refuses anything else (RuntimeError).
    """
    return _PredictionDivergence.apply(*student, *teacher, temperature, mask_BS)


class _PredictionDivergence(torch.autograd.Function):
    """With logits z, the gradient for z is (p_S - p_T) / temperature: G [T, V]; then G W, G'X and G'1."""

    @staticmethod
    def forward(
        ctx: Any,
        features_S: Tensor,
        weight_S: Tensor,
        bias_S: Tensor | None,
        features_T: Tensor,
        weight_T: Tensor,
        bias_T: Tensor | None,
        temperature: float,
        mask_BS: Tensor | None,
    ) -> Tensor:
        rows, seq_len, _ = features_S.shape
        place_T = torch.arange(rows * seq_len, device=features_S.device)
        if mask_BS is not None:
            place_T = place_T[mask_BS.bool().flatten()]
        x_TE, weight_VE = _factors(features_S.flatten(0, 1)[place_T], weight_S)
        y_TE, teacher_VE = _factors(features_T.flatten(0, 1)[place_T], weight_T)
        wide = widen(x_TE[:0]).dtype
        total_T = torch.empty(len(place_T), dtype=wide, device=x_TE.device)
        gradients = []
        if learns := any(ctx.needs_input_grad):
            gradients = [torch.zeros_like(x, dtype=wide) for x in (x_TE, weight_VE, weight_VE[:, 0])]
        with exact_products(x_TE.device.type):
            for tokens in tiles(len(place_T), len(weight_VE), TILE_ELEMENTS):
                log_S = _log_probability(x_TE[tokens], weight_VE, bias_S, temperature)
                log_T = _log_probability(y_TE[tokens], teacher_VE, bias_T, temperature)
                p_T = log_T.exp()
                total_T[tokens] = log_T.sub_(log_S).mul_(p_T).sum(dim=1)
                if learns:
                    error_TV = log_S.exp_().sub_(p_T).div_(temperature)
                    gradients[2] += error_TV.sum(dim=0)
                    error_TV = error_TV.to(x_TE.dtype)
                    gradients[0][tokens] = _product(error_TV, weight_VE)
                    gradients[1] += _product(error_TV.mT, x_TE[tokens])
        ctx.save_for_backward(place_T, *gradients)
        ctx.shape = features_S.shape
        return total_T.new_zeros(rows).index_add_(0, place_T // seq_len, total_T)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_B: Tensor) -> tuple[Tensor | None, ...]:
        place_T, features_TE, weight_VE, bias_V = ctx.saved_tensors
        rows, seq_len, width = ctx.shape
        torch._assert_async((grad_B == grad_B[0]).all(), "rows differ in the weight of their prediction loss")
        features = features_TE.new_zeros(rows * seq_len, width)
        features[place_T] = features_TE * grad_B[0]
        bias = bias_V * grad_B[0] if ctx.needs_input_grad[2] else None
        return features.view(ctx.shape), weight_VE * grad_B[0], bias, *(None,) * 5


def _factors(x_TE: Tensor, weight_VE: Tensor) -> tuple[Tensor, Tensor]:
    """Widened, but for bfloat16 on a GPU: tensor cores make float32 products of it."""
    if x_TE.is_cuda and x_TE.dtype == weight_VE.dtype == torch.bfloat16:
        return x_TE, weight_VE
    wide = torch.promote_types(torch.promote_types(x_TE.dtype, weight_VE.dtype), torch.float32)
    return x_TE.to(wide), weight_VE.to(wide)


def _log_probability(x_TE: Tensor, weight_VE: Tensor, bias_V: Tensor | None, temperature: float) -> Tensor:
    logits_TV = _product(x_TE, weight_VE.mT)
    if bias_V is not None:
        logits_TV += bias_V
    return torch.log_softmax(logits_TV.div_(temperature), dim=1)


def _product(x: Tensor, y: Tensor) -> Tensor:
    return torch.mm(x, y, out_dtype=torch.float32) if x.dtype == torch.bfloat16 else x @ y
