"""MiniLMv2's relations against their definition, left to autograd in float64."""

import math

import pytest
import torch

from tests.trainer.test_losses import LargestTensor, lengths_to_mask, normal
from trainer.relation_loss import relation_divergence_sum, relation_heads

LENGTHS = [7, 4, 0]


def case(heads=2, seq_len=7, dim_S=3, dim_T=5, dtype=torch.float64):
    x_S, x_T = (normal(3, heads, seq_len, dim, seed=dim).to(dtype) for dim in (dim_S, dim_T))
    return x_S.requires_grad_(), x_T


def reference(x_S, x_T, lengths):
    """Row by row, head by head, on the valid tokens alone."""
    rows = []
    for own, target, length in zip(x_S, x_T, lengths, strict=True):
        divergence = own.sum() * 0
        for a, b in zip(own[:, :length], target[:, :length], strict=True):
            log_S = torch.log_softmax(a @ a.mT / math.sqrt(a.shape[1]), dim=1)
            log_T = torch.log_softmax(b @ b.mT / math.sqrt(b.shape[1]), dim=1)
            divergence = divergence + torch.nn.functional.kl_div(
                log_S, log_T, reduction="sum", log_target=True
            )
        rows.append(divergence)
    return torch.stack(rows)


def sums_and_gradient(loss_B, x_S):
    weights_B = torch.tensor([1.0, -2.0, 3.0], dtype=loss_B.dtype)  # rows need not count alike
    return loss_B.detach(), torch.autograd.grad(loss_B @ weights_B, x_S)[0]


@pytest.mark.parametrize(
    "elements", [2**19, 49, 30, 1]
)  # everything, a head, some queries, one query at a time
@pytest.mark.parametrize("padding", [0.0, math.nan])
def test_divergence_equals_the_definition(elements, padding, monkeypatch):
    monkeypatch.setattr("trainer.relation_loss.scratch_elements", lambda device: elements)
    x_S, x_T = case()
    mask_BS = lengths_to_mask(LENGTHS, 7)
    expected = sums_and_gradient(reference(x_S, x_T, LENGTHS), x_S)
    held_S, held_T = (x.detach().where(mask_BS[:, None, :, None], padding) for x in (x_S, x_T))
    held_S.requires_grad_()
    found = sums_and_gradient(relation_divergence_sum(held_S, held_T, mask_BS), held_S)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-13)


def test_no_mask_is_a_mask_of_full_rows():
    x_S, x_T = case()
    full = sums_and_gradient(relation_divergence_sum(x_S, x_T, None), x_S)
    expected = sums_and_gradient(reference(x_S, x_T, [7, 7, 7]), x_S)
    for ours, theirs in zip(full, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-13)


def test_gradcheck():
    x_S, x_T = case(seq_len=4)
    mask_BS = lengths_to_mask([4, 3, 1], 4)
    assert torch.autograd.gradcheck(lambda x: relation_divergence_sum(x, x_T, mask_BS), (x_S,))


def test_equal_relations_have_no_divergence():
    x_S, _ = case()
    loss_B, gradient = sums_and_gradient(relation_divergence_sum(x_S, x_S.detach(), None), x_S)
    assert not loss_B.any() and not gradient.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_inputs_are_widened(dtype):
    """The result is that of the same numbers in float64; only the gradient is rounded again."""
    x_S, x_T = (x.detach().to(dtype) for x in case(dtype=torch.float32))
    exact_S = x_S.double().requires_grad_()
    expected = sums_and_gradient(reference(exact_S, x_T.double(), LENGTHS), exact_S)
    x_S.requires_grad_()
    loss_B, gradient = sums_and_gradient(relation_divergence_sum(x_S, x_T, lengths_to_mask(LENGTHS, 7)), x_S)
    assert loss_B.dtype == torch.float32 and gradient.dtype == dtype
    torch.testing.assert_close(loss_B.double(), expected[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient.double(), expected[1], rtol=torch.finfo(dtype).eps, atol=1e-4)


def test_relation_heads_split_all_heads_anew():
    x_BHSD = normal(2, 3, 5, 4, seed=1)
    side_by_side = torch.cat(x_BHSD.unbind(1), dim=-1)  # [B, S, 12]
    split = relation_heads(x_BHSD, 6)
    assert split.shape == (2, 6, 5, 2)
    for head in range(6):
        assert torch.equal(split[:, head], side_by_side[..., 2 * head : 2 * head + 2])
    assert torch.equal(relation_heads(x_BHSD, 3), x_BHSD)


def test_nothing_of_the_size_of_relations_exists_and_little_is_kept(monkeypatch):
    monkeypatch.setattr("trainer.relation_loss.scratch_elements", lambda device: 1000)
    x_S, x_T = (normal(2, 4, 100, dim, seed=dim).float() for dim in (6, 8))
    kept = []
    with LargestTensor() as largest, torch.autograd.graph.saved_tensors_hooks(kept.append, lambda x: x):
        loss_B = relation_divergence_sum(x_S.requires_grad_(), x_T, None)
    assert largest.elements == x_S.numel()  # its gradient, against 2 * 4 * 100 * 100 of all relations
    assert [x.numel() for x in kept] == [x_S.numel()]
    assert loss_B.requires_grad
