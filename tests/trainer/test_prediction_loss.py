"""The divergence of predictions against its definition, left to autograd in float64."""

import math

import pytest
import torch

from tests.trainer.test_losses import LargestTensor, lengths_to_mask, normal
from trainer.capture import Prediction
from trainer.prediction_loss import prediction_divergence_sum

LENGTHS, SEQ_LEN, VOCABULARY, TEMPERATURE = [5, 2, 0], 5, 11, 1.7
few_tokens = pytest.mark.parametrize("elements", [2**23, 3 * VOCABULARY, 1])


def predictions(dtype=torch.float64, bias=True, widths=(3, 4)):
    return [
        Prediction(
            normal(3, SEQ_LEN, width, seed=width).to(dtype),
            normal(VOCABULARY, width, seed=10 + width).to(dtype),
            normal(VOCABULARY, seed=20 + width).to(dtype) if bias else None,
        )
        for width in widths
    ]


def learning(prediction):
    return Prediction(*(None if x is None else x.detach().clone().requires_grad_() for x in prediction))


def sums_and_gradients(loss_B, student):
    leaves = [x for x in student if x is not None]
    return [loss_B.detach(), *torch.autograd.grad(2.5 * loss_B.sum(), leaves)]


def reference(student, teacher, lengths=LENGTHS, temperature=TEMPERATURE):
    rows = []
    for row, length in enumerate(lengths):
        log_S, log_T = (
            torch.log_softmax((x[row, :length] @ w.mT + (0 if b is None else b)) / temperature, dim=-1)
            for x, w, b in (student, teacher)
        )
        rows.append((log_T.exp() * (log_T - log_S)).sum())
    return torch.stack(rows)


@few_tokens
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("padding", [0.0, math.nan])
def test_divergence_equals_the_definition(elements, bias, padding, monkeypatch):
    monkeypatch.setattr("trainer.prediction_loss.TILE_ELEMENTS", elements)
    mask_BS = lengths_to_mask(LENGTHS, SEQ_LEN)
    student, teacher = predictions(bias=bias)
    student = learning(student)
    expected = sums_and_gradients(reference(student, teacher), student)
    student, teacher = (
        x._replace(features_BSE=x.features_BSE.detach().where(mask_BS[..., None], padding))
        for x in (student, teacher)
    )
    student = learning(student)
    loss_B = prediction_divergence_sum(student, teacher, TEMPERATURE, mask_BS)
    found = sums_and_gradients(loss_B, student)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-13)


def test_no_mask_is_a_mask_of_full_rows():
    student, teacher = predictions()
    student = learning(student)
    expected = sums_and_gradients(reference(student, teacher, [SEQ_LEN] * 3), student)
    found = sums_and_gradients(prediction_divergence_sum(student, teacher, TEMPERATURE, None), student)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-13)


def test_gradcheck():
    student, teacher = predictions()
    mask_BS = lengths_to_mask(LENGTHS, SEQ_LEN)
    assert torch.autograd.gradcheck(
        lambda *x: prediction_divergence_sum(Prediction(*x), teacher, TEMPERATURE, mask_BS).sum(),
        tuple(learning(student)),
    )


def test_rows_that_count_differently_are_refused():
    student, teacher = predictions()
    loss_B = prediction_divergence_sum(learning(student), teacher, TEMPERATURE, None)
    with pytest.raises(RuntimeError, match="rows differ in the weight"):
        (loss_B * torch.tensor([1.0, 2.0, 1.0])).sum().backward()


def test_a_frozen_weight_and_a_teacher_get_no_gradient():
    student, teacher = predictions()
    student = learning(student)
    teacher = learning(teacher)
    frozen = student._replace(weight_VE=student.weight_VE.detach())
    prediction_divergence_sum(frozen, teacher, TEMPERATURE, None).sum().backward()
    assert frozen.features_BSE.grad is not None and frozen.weight_VE.grad is None
    assert [x.grad for x in teacher] == [None, None, None]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_errs_less_than_logits_in_that_precision(dtype):
    student, teacher = predictions(dtype)
    exact_S, exact_T = (Prediction(*(x.double() for x in p)) for p in (student, teacher))
    exact_S = learning(exact_S)
    expected = sums_and_gradients(reference(exact_S, exact_T), exact_S)
    student = learning(student)
    found = sums_and_gradients(
        prediction_divergence_sum(student, teacher, TEMPERATURE, lengths_to_mask(LENGTHS, SEQ_LEN)), student
    )
    stock = sums_and_gradients(reference(student, teacher), student)
    assert found[0].dtype == torch.float32 and {x.dtype for x in found[1:]} == {dtype}
    for ours, theirs, exact in zip(found, stock, expected, strict=True):
        assert (ours.double() - exact).norm() < (theirs.double() - exact).norm()


def test_logits_of_a_batch_never_exist(monkeypatch):
    monkeypatch.setattr("trainer.prediction_loss.TILE_ELEMENTS", 3 * VOCABULARY)
    student, teacher = predictions(torch.float32)
    student = learning(student)
    kept = []
    with LargestTensor() as largest, torch.autograd.graph.saved_tensors_hooks(kept.append, lambda x: x):
        loss_B = prediction_divergence_sum(student, teacher, TEMPERATURE, None)
    assert largest.elements == teacher.features_BSE.numel() < 3 * SEQ_LEN * VOCABULARY
    sizes = [x.numel() for x in kept if x.is_floating_point()]
    assert sizes == [x.numel() for x in student]  # one gradient each, no logits
    assert loss_B.requires_grad


def test_a_batch_without_a_valid_token():
    student, teacher = predictions()
    student = learning(student)
    loss_B = prediction_divergence_sum(student, teacher, TEMPERATURE, lengths_to_mask([0, 0, 0], SEQ_LEN))
    assert not any(x.any() for x in sums_and_gradients(loss_B, student))


def test_teacher_tensors_of_inference_mode():
    student, _ = predictions()
    with torch.inference_mode():
        teacher = Prediction(*(x.clone() for x in predictions()[1]))
    prediction_divergence_sum(learning(student), teacher, TEMPERATURE, None).sum().backward()
