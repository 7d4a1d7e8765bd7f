"""A task's losses: hand-worked numbers, float64 loops, finite differences; damaged rows."""

import math

import pytest
import torch

from tests.trainer.test_losses import lengths_to_mask, normal
from trainer.task_loss import CLASSIFICATION, REGRESSION, SPANS, labels_error, logits_error


def test_soft_cross_entropy_by_hand():
    # t = 2. Teacher [2 log 3, 0] / 2 -> softmax 3/4, 1/4. Student [0, 0] -> log(1/2) both: loss log 2.
    # Second row: teacher [0, 0] -> 1/2, 1/2; student [2 log 3, 0] / 2 -> log 3/4, log 1/4.
    up = 2 * math.log(3)
    student, teacher = torch.tensor([[0.0, 0.0], [up, 0.0]]), torch.tensor([[up, 0.0], [0.0, 0.0]])
    expected = [math.log(2), -(math.log(3 / 4) + math.log(1 / 4)) / 2]
    assert logits_error(student, teacher, CLASSIFICATION, 2.0, None).tolist() == pytest.approx(expected)
    damaged = torch.tensor([[True, False], [False, False]])
    found = logits_error(student, teacher, CLASSIFICATION, 2.0, damaged)
    assert found.tolist() == pytest.approx([expected[0], 0.0])


def test_labels_by_hand():
    # softmax of [log 3, 0] is 3/4, 1/4.
    student = torch.tensor([[math.log(3), 0.0], [math.log(3), 0.0]])
    found = labels_error(student, torch.tensor([[0.0], [1.0]]), CLASSIFICATION, None)
    assert found.tolist() == pytest.approx([-math.log(3 / 4), -math.log(1 / 4)])
    numbers = labels_error(torch.tensor([[2.5], [1.0]]), torch.tensor([[4.0], [1.0]]), REGRESSION, None)
    assert numbers.tolist() == [2.25, 0.0]
    assert logits_error(torch.tensor([[2.0]]), torch.tensor([[5.0]]), REGRESSION, 9.0, None).tolist() == [9.0]


@pytest.mark.parametrize("soft", [True, False])
def test_spans_are_those_of_a_loop_over_valid_tokens(soft):
    student, teacher, lengths = normal(3, 5, 2, seed=1), normal(3, 5, 2, seed=2), [5, 3, 1]
    mask, labels = lengths_to_mask(lengths, 5), torch.tensor([[1.0, 4.0], [0.0, 2.0], [0.0, 0.0]])
    expected = []
    for row, length in enumerate(lengths):
        terms = []
        for place in (0, 1):
            log_S = torch.log_softmax(student[row, :length, place], dim=0)
            target = torch.softmax(teacher[row, :length, place] / 1.0, dim=0)
            terms.append(-(target * log_S).sum() if soft else -log_S[int(labels[row, place])])
        expected.append(sum(terms) / 2)
    found = (
        logits_error(student, teacher, SPANS, 1.0, mask)
        if soft
        else labels_error(student, labels, SPANS, mask)
    )
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-12, atol=1e-14)


def test_a_damaged_row_has_neither_loss_nor_gradient():
    student, mask = normal(2, 4, 2, seed=3).requires_grad_(), lengths_to_mask([3, 0], 4)
    (logits_error(student, normal(2, 4, 2, seed=4), SPANS, 1.0, mask).sum()).backward()
    assert student.grad is not None and student.grad[0].abs().sum() > 0
    assert student.grad[1].eq(0).all()


@pytest.mark.parametrize("kind", [CLASSIFICATION, REGRESSION, SPANS])
def test_gradcheck_and_precision(kind):
    shape = {CLASSIFICATION: (3, 4), REGRESSION: (3, 1), SPANS: (3, 4, 2)}[kind]
    x, y, mask = (
        normal(*shape, seed=5).requires_grad_(),
        normal(*shape, seed=6),
        lengths_to_mask([4, 2, 1], 4),
    )
    labels = torch.zeros(3, 2 if kind == SPANS else 1, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: logits_error(x, y, kind, 1.5, mask), (x,))
    assert torch.autograd.gradcheck(lambda x: labels_error(x, labels, kind, mask), (x,))
    for dtype in (torch.bfloat16, torch.float16):
        assert logits_error(x.to(dtype), y.to(dtype), kind, 1.0, mask).dtype == torch.float32
        assert labels_error(x.to(dtype), labels.float(), kind, mask).dtype == torch.float32
