"""Losses of a task's head: against the teacher's logits, and against labels. One sum for each row.

Letters: B rows, S sequence, C classes. Logits, not probabilities: [B, C] to classify, [B, 1] for a number,
[B, S, 2] for spans, where a distribution over the row's tokens says where an answer begins and another where
it ends; the two count half each. Sums are float32 (float64 for float64 inputs); their count is rows. There is
neither a division by the number of classes nor a factor temperature^2. Only the student gets a gradient.
Source: Jiao et al. 2019, arXiv:1909.10351, equation 10; Hinton et al. 2015, arXiv:1503.02531.
"""

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from trainer.numerics import widen

CLASSIFICATION, REGRESSION, SPANS = "classification", "regression", "spans"


def logits_error(
    student: Tensor, teacher: Tensor, kind: str, temperature: float, mask_BS: Tensor | None
) -> Tensor:
    """Cross entropy of softmax(student / t) against softmax(teacher / t), or numbers' squared error: [B].

    mask_BS: true for valid tokens, None where every token is; an answer lies within them, and a row without
    any counts 0.
    """
    if kind == REGRESSION:
        return _valid((widen(student) - widen(teacher)).square().sum(dim=-1), mask_BS)
    student_BCN, teacher_BCN = (_by_choice(x, kind, mask_BS) / temperature for x in (student, teacher))
    error_BN = cross_entropy(student_BCN, torch.softmax(teacher_BCN, dim=1), reduction="none")
    return _valid(error_BN.mean(dim=-1), mask_BS)


def labels_error(student: Tensor, labels_BK: Tensor, kind: str, mask_BS: Tensor | None) -> Tensor:
    """Cross entropy against classes, or the squared error of numbers: [B].

    labels_BK: [B, 1] the class's index or the number, [B, 2] an answer's first and last token.
    """
    if kind == REGRESSION:
        return _valid((widen(student) - labels_BK).square().sum(dim=-1), mask_BS)
    student_BCN = _by_choice(student, kind, mask_BS)
    error_BN = cross_entropy(student_BCN, labels_BK.long(), reduction="none")
    return _valid(error_BN.mean(dim=-1), mask_BS)


def _by_choice(logits: Tensor, kind: str, mask_BS: Tensor | None) -> Tensor:
    """[B, C, N] logits of N choices among C: one among classes, or two among tokens."""
    if kind == CLASSIFICATION:
        return widen(logits).unsqueeze(-1)
    wide = widen(logits)
    if mask_BS is None:
        return wide
    # Not -inf, whose gradient is not a number where a row has no valid token.
    return wide.masked_fill(~mask_BS.bool().unsqueeze(-1), torch.finfo(wide.dtype).min / 4)


def _valid(error_B: Tensor, mask_BS: Tensor | None) -> Tensor:
    """0 for rows without a valid token: those that are masked because they are damaged."""
    return error_B if mask_BS is None else error_B.masked_fill(~mask_BS.bool().any(dim=1), 0)
