"""Losses against hand-worked numbers, float64 loops and each other."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from trainer.attention_loss import attention_error_sum, common_heads, group_heads, grouped_scaling
from trainer.losses import cosine_distance_sum, squared_error_sum

both_methods = pytest.mark.parametrize("method", ["gram", "direct"])


def normal(*shape, seed, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def lengths_to_mask(lengths, seq_len):
    return torch.arange(seq_len) < torch.tensor(lengths)[:, None]


# Hand-worked numbers


def test_squared_error_by_hand():
    student = torch.tensor([[[1.0, 2.0], [3.0, 4.0]], [[0.0, -1.0], [9.0, 9.0]]])
    teacher = torch.tensor([[[0.0, 2.0], [5.0, 1.0]], [[2.0, 1.0], [0.0, 0.0]]])
    mask = torch.tensor([[1, 1], [1, 0]])
    # (1 + 0) + (4 + 9), then (4 + 4); the last token is padding.
    assert squared_error_sum(student, teacher, mask).tolist() == [14.0, 8.0]


def test_cosine_distance_by_hand():
    student = torch.tensor([[[3.0, 4.0], [1.0, 0.0]], [[2.0, 0.0], [9.0, 9.0]]])
    teacher = torch.tensor([[[4.0, 3.0], [0.0, 5.0]], [[-1.0, 0.0], [0.0, 0.0]]])
    mask = torch.tensor([[1, 1], [1, 0]])
    # cosines 24/25 and 0, then -1; the last token is padding.
    assert cosine_distance_sum(student, teacher, mask).tolist() == pytest.approx([0.04 + 1, 2], abs=1e-6)


@both_methods
def test_attention_error_by_hand(method):
    # One row, one head, two valid tokens and one of padding that must not count, with D_S = 1 and D_T = 2.
    q_S, k_S = torch.tensor([[[[1.0], [2.0], [7.0]]]]), torch.tensor([[[[3.0], [-1.0], [7.0]]]])
    q_T = torch.tensor([[[[1.0, 0.0], [0.0, 2.0], [7.0, 7.0]]]])
    k_T = torch.tensor([[[[2.0, 1.0], [4.0, 0.0], [7.0, 7.0]]]])
    # A_S = 1 * [[3, -1], [6, -2]];  A_T = 0.5 * [[2, 4], [2, 0]] = [[1, 2], [1, 0]]
    # A_S - A_T = [[2, -3], [5, -2]];  squares 4 + 9 + 25 + 4
    loss = attention_error_sum(q_S, k_S, q_T, k_T, 1.0, 0.5, torch.tensor([[1, 1, 0]]), method)
    assert loss.item() == 42.0


# Heads


@pytest.mark.parametrize(
    "student, teacher, requested, expected",
    [(12, 12, None, 12), (12, 12, 4, 4), (8, 12, None, 4), (6, 12, None, 6), (1, 12, None, 1), (5, 12, 1, 1)],
)
def test_relation_heads(student, teacher, requested, expected):
    assert common_heads(student, teacher, requested) == expected


@pytest.mark.parametrize(
    "student, teacher, requested, message",
    [
        (5, 12, None, r"no common divisor .*student heads 5, teacher heads 12.*attention_heads=1"),
        (8, 12, 3, r"attention_heads=3 must divide both .*: \[1, 2, 4\]"),
        (12, 12, 0, "attention_heads=0 must divide"),
    ],
)
def test_relation_heads_are_refused(student, teacher, requested, message):
    with pytest.raises(ValueError, match=message):
        common_heads(student, teacher, requested)


def test_a_relation_head_is_the_sum_of_consecutive_heads():
    q, k = normal(2, 6, 5, 4, seed=1), normal(2, 6, 5, 4, seed=2)
    scores = group_heads(q, 2) @ group_heads(k, 2).mT
    raw = q @ k.mT
    torch.testing.assert_close(scores, torch.stack((raw[:, :3].sum(1), raw[:, 3:].sum(1)), dim=1))
    assert group_heads(q, 2).shape == (2, 2, 5, 12)
    assert group_heads(q, 6) is q


def test_grouped_scaling_is_that_of_the_concatenated_dims():
    assert grouped_scaling(64**-0.5, heads=12, attention_heads=12) == 64**-0.5
    assert grouped_scaling(64**-0.5, heads=12, attention_heads=4) == pytest.approx(192**-0.5)


# The two methods and their gradients


def random_attention(dim_S=3, dim_T=5, seq_len=7, heads=2, dtype=torch.float64, distance=None, rows=3):
    """Student and teacher; with ``distance``, the student is the teacher plus so much noise."""
    teacher = [normal(rows, heads, seq_len, dim_T, seed=seed) for seed in (3, 4)]
    student = [normal(rows, heads, seq_len, dim_S, seed=seed) for seed in (1, 2)]
    if distance is not None:
        student = [t + distance * s for s, t in zip(student, teacher, strict=True)]
    return [x.to(dtype) for x in student + teacher]


def loss_and_gradients(tensors, mask, method, scalings=(0.6, 0.4)):
    q_S, k_S = (x.detach().requires_grad_() for x in tensors[:2])
    loss_B = attention_error_sum(q_S, k_S, *tensors[2:], *scalings, mask, method)
    loss_B.sum().backward()
    return loss_B.detach(), q_S.grad, k_S.grad


@both_methods
def test_gradients_equal_autograd_of_the_definition(method):
    tensors, mask = random_attention(), lengths_to_mask([7, 4, 0], 7)
    q_S, k_S = (x.clone().requires_grad_() for x in tensors[:2])
    error = 0.6 * q_S @ k_S.mT - 0.4 * tensors[2] @ tensors[3].mT
    pairs = (mask[:, :, None] & mask[:, None, :])[:, None]
    expected = (error * pairs).square().sum(dim=(1, 2, 3))
    expected.sum().backward()
    loss, gradient_q, gradient_k = loss_and_gradients(tensors, mask, method)
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient_q, q_S.grad, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient_k, k_S.grad, rtol=1e-12, atol=1e-12)


@both_methods
@pytest.mark.parametrize("elements", [2**19, 200, 49, 20, 1])  # all, some rows, a head, some queries, one
def test_tiles_change_nothing(method, elements, monkeypatch):
    tensors, mask = random_attention(), lengths_to_mask([7, 4, 0], 7)
    expected = loss_and_gradients(tensors, mask, method)
    monkeypatch.setattr("trainer.attention_loss.scratch_elements", lambda device: elements)
    for x, y in zip(loss_and_gradients(tensors, mask, method), expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-13)


@both_methods
def test_no_mask_is_a_mask_of_full_rows(method):
    tensors = random_attention()
    expected = loss_and_gradients(tensors, torch.ones(3, 7), method)
    for x, y in zip(loss_and_gradients(tensors, None, method), expected, strict=True):
        assert torch.equal(x, y)


@both_methods
def test_memory_layout_changes_nothing_and_gradients_keep_it(method):
    """Encoders hand over [B, S, H, D] transposed; their gradient is wanted laid out alike."""
    tensors = random_attention()
    expected = loss_and_gradients(tensors, None, method)
    transposed = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in tensors]
    found = loss_and_gradients(transposed, None, method)
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-13)
    assert found[1].stride() == transposed[0].stride()


@both_methods
@pytest.mark.parametrize("frozen", [None, 0, 1])
def test_gradcheck(method, frozen):
    tensors, mask = random_attention(seq_len=4), lengths_to_mask([4, 3, 1], 4)
    inputs = tuple(x.requires_grad_(i != frozen) for i, x in enumerate(tensors[:2]))
    assert torch.autograd.gradcheck(
        lambda q, k: attention_error_sum(q, k, *tensors[2:], 0.6, 0.4, mask, method), inputs
    )


@pytest.mark.parametrize("loss", [squared_error_sum, cosine_distance_sum])
@pytest.mark.parametrize("elements", [2**19, 12, 1])  # all rows at a time, or one
@pytest.mark.parametrize("padding", [0.0, math.nan])
def test_losses_of_tokens_equal_autograd_of_their_definition(loss, elements, padding, monkeypatch):
    monkeypatch.setattr("trainer.losses.scratch_elements", lambda device: elements)
    x, y, mask = (
        normal(3, 5, 4, seed=1).requires_grad_(),
        normal(3, 5, 4, seed=2),
        lengths_to_mask([5, 2, 0], 5),
    )
    per_token = {
        squared_error_sum: (x - y).square().sum(dim=-1),
        cosine_distance_sum: 1 - torch.cosine_similarity(x, y, dim=-1),
    }[loss]
    rows_B = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)  # rows need not count alike
    for valid, padded_mask in ((mask, mask), (torch.ones_like(mask), None)):
        expected = (per_token * valid).sum(dim=1)
        (gradient,) = torch.autograd.grad(expected @ rows_B, x, retain_graph=True)
        held_x, held_y = (t.detach().where(valid[..., None], padding) for t in (x, y))
        found = loss(held_x.requires_grad_(), held_y.requires_grad_(), padded_mask)
        (found @ rows_B).backward()
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
        torch.testing.assert_close(held_x.grad, gradient, rtol=1e-12, atol=1e-14)
        assert held_y.grad is None  # the teacher's


def test_gradcheck_of_the_other_losses():
    x, y, mask = normal(2, 3, 4, seed=1).requires_grad_(), normal(2, 3, 4, seed=2), lengths_to_mask([3, 1], 3)
    assert torch.autograd.gradcheck(lambda x: squared_error_sum(x, y, mask), (x,))
    assert torch.autograd.gradcheck(lambda x: cosine_distance_sum(x, y, mask), (x,))


def test_auto_takes_the_smaller_form():
    # Multiply-adds a head: S^2 (3 * 3 + 5) against S (4 * 9 + 4 * 15 + 2 * 25) = 146 S, with a tenth more.
    for seq_len, expected in ((11, "direct"), (12, "gram")):
        tensors, mask = random_attention(seq_len=seq_len, dtype=torch.float32), torch.ones(3, seq_len)
        losses = {m: loss_and_gradients(tensors, mask, m) for m in ("auto", "gram", "direct")}
        assert all(torch.equal(a, b) for a, b in zip(losses["auto"], losses[expected], strict=True))
    with pytest.raises(ValueError, match="method='flash' is none of"):
        attention_error_sum(*tensors, 1.0, 1.0, mask, "flash")


class LargestTensor(TorchDispatchMode):
    """The largest tensor that any operation returns."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.numel())
        return out


@both_methods
def test_teacher_tensors_of_inference_mode(method):
    tensors = random_attention()
    with torch.inference_mode():
        tensors[2:] = [x.clone() for x in tensors[2:]]
        hidden = normal(2, 3, 4, seed=2)
    loss_and_gradients(tensors, None, method)
    for loss in (squared_error_sum, cosine_distance_sum):
        loss(normal(2, 3, 4, seed=1).requires_grad_(), hidden, None).sum().backward()


@both_methods
def test_nothing_of_the_size_of_attention_exists_and_little_is_kept(method, monkeypatch):
    monkeypatch.setattr("trainer.attention_loss.scratch_elements", lambda device: 1000)
    rows, heads, seq_len, dim_S, dim_T = 2, 2, 100, 3, 5
    tensors = random_attention(dim_S, dim_T, seq_len, heads, rows=rows, dtype=torch.float32)
    kept = []
    with LargestTensor() as largest, torch.autograd.graph.saved_tensors_hooks(kept.append, lambda x: x):
        q_S, k_S = (x.requires_grad_() for x in tensors[:2])
        loss = attention_error_sum(q_S, k_S, *tensors[2:], 0.6, 0.4, torch.ones(rows, seq_len), method)
    assert largest.elements <= tensors[2].numel()  # against rows * heads * seq_len * seq_len
    student_sized = rows * heads * seq_len * dim_S
    assert sum(x.numel() for x in kept if x.is_floating_point()) == 2 * student_sized
    assert loss.requires_grad


def test_the_teacher_gets_no_gradient():
    tensors = [x.requires_grad_() for x in random_attention()]
    attention_error_sum(*tensors, 0.6, 0.4, torch.ones(3, 7)).sum().backward()
    assert [x.grad is not None for x in tensors] == [True, True, False, False]
