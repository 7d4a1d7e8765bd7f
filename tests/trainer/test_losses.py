"""Losses against hand-worked numbers, float64 loops and each other."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from trainer.attention_loss import attention_error_sum, common_heads, group_heads, grouped_scaling
from trainer.capture import Captured, Need
from trainer.layout import Layout, row_counts
from trainer.losses import soft_cross_entropy_sum, squared_error_sum
from trainer.transfer import Transfer, denominators, distil, student_need, teacher_need, total, weights

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


def test_soft_cross_entropy_by_hand():
    # t = 2. Teacher [2 log 3, 0] / 2 -> softmax 3/4, 1/4. Student [0, 0] -> log(1/2) both: loss log 2.
    # Second row: teacher [0, 0] -> 1/2, 1/2; student [2 log 3, 0] / 2 -> log 3/4, log 1/4.
    up = 2 * math.log(3)
    student, teacher = torch.tensor([[0.0, 0.0], [up, 0.0]]), torch.tensor([[up, 0.0], [0.0, 0.0]])
    first, second = math.log(2), -(math.log(3 / 4) + math.log(1 / 4)) / 2
    assert soft_cross_entropy_sum(student, teacher, 2.0).item() == pytest.approx(first + second, rel=1e-6)
    masked = soft_cross_entropy_sum(student, teacher, 2.0, mask=torch.tensor([1, 0]))
    assert masked.item() == pytest.approx(first, rel=1e-6)


def test_counts_by_hand():
    counts_B2 = row_counts(torch.zeros(3, 5), torch.tensor([3, 1, 4]))
    assert counts_B2.tolist() == [[3, 9], [1, 1], [4, 16]] and counts_B2.dtype == torch.int64


def test_total_by_hand():
    transfer = Transfer(
        (2, 4), attention_heads=3, embedding=2.0, hidden=1.0, attention=0.5, layers=(1.0, 3.0)
    )
    # 10 tokens of width 5: 50 elements; 3 heads on 20 pairs: 60 elements.
    sums = {
        "embedding": 100.0,  # 2 * 100 / 50 = 4
        "hidden/1": 25.0,  # 1 * 1 * 25 / 50 = 0.5
        "attention/1": 120.0,  # 0.5 * 1 * 120 / 60 = 1
        "hidden/2": 50.0,  # 1 * 3 * 50 / 50 = 3
        "attention/2": 60.0,  # 0.5 * 3 * 60 / 60 = 1.5
    }
    counts = denominators(transfer, tokens=10, pairs=20, teacher_hidden_size=5)
    assert list(counts) == list(weights(transfer)) == list(sums)
    tensors = {key: torch.tensor(value) for key, value in sums.items()}
    assert total(tensors, counts, weights(transfer)).item() == pytest.approx(10.0)


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


# A float64 loop over rows, heads, tokens


def reference_error(q_S, k_S, q_T, k_T, scaling_S, scaling_T, lengths):
    """The definition, one score at a time. Relation heads are formed from their heads' raw scores."""
    heads = math.gcd(q_S.shape[1], q_T.shape[1])

    def score(q, k, scaling, row, head, i, j):
        group = q.shape[1] // heads
        raw = sum(
            float(q[row, h, i, d]) * float(k[row, h, j, d])
            for h in range(head * group, (head + 1) * group)
            for d in range(q.shape[3])
        )
        return raw * scaling / math.sqrt(group)

    return sum(
        (score(q_S, k_S, scaling_S, row, head, i, j) - score(q_T, k_T, scaling_T, row, head, i, j)) ** 2
        for row, length in enumerate(lengths)
        for head in range(heads)
        for i in range(length)
        for j in range(length)
    )


@pytest.mark.parametrize("heads_S, heads_T", [(3, 3), (2, 4), (4, 6), (1, 3)])
@pytest.mark.parametrize("dim_S, dim_T", [(3, 3), (2, 5), (5, 2)])
def test_distilled_attention_equals_the_loop(heads_S, heads_T, dim_S, dim_T):
    lengths, seq_len = [4, 2, 0], 5
    q_S, k_S = normal(3, heads_S, seq_len, dim_S, seed=1), normal(3, heads_S, seq_len, dim_S, seed=2)
    q_T, k_T = normal(3, heads_T, seq_len, dim_T, seed=3), normal(3, heads_T, seq_len, dim_T, seed=4)
    transfer = Transfer((1,), common_heads(heads_S, heads_T), 0.0, 0.0, 1.0, (1.0,))
    student = Captured([None, None], [q_S], [k_S], [None], [dim_S**-0.5])
    teacher = Captured([None, None], [q_T], [k_T], [None], [dim_T**-0.5])
    sums = distil(student, teacher, Layout(lengths_to_mask(lengths, seq_len), full=False), transfer)
    expected = reference_error(q_S, k_S, q_T, k_T, dim_S**-0.5, dim_T**-0.5, lengths)
    assert list(sums) == ["attention/1"]
    assert sums["attention/1"].sum().item() == pytest.approx(expected, rel=1e-12)
    assert sums["attention/1"].shape == (3,) and sums["attention/1"][2] == 0


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
@pytest.mark.parametrize("frozen", [None, 0, 1])
def test_gradcheck(method, frozen):
    tensors, mask = random_attention(seq_len=4), lengths_to_mask([4, 3, 1], 4)
    inputs = tuple(x.requires_grad_(i != frozen) for i, x in enumerate(tensors[:2]))
    assert torch.autograd.gradcheck(
        lambda q, k: attention_error_sum(q, k, *tensors[2:], 0.6, 0.4, mask, method), inputs
    )


def test_gradcheck_of_the_other_losses():
    x, y, mask = normal(2, 3, 4, seed=1).requires_grad_(), normal(2, 3, 4, seed=2), lengths_to_mask([3, 1], 3)
    assert torch.autograd.gradcheck(lambda x: squared_error_sum(x, y, mask), (x,))
    assert torch.autograd.gradcheck(lambda x: soft_cross_entropy_sum(x, y, 1.5, mask), (x,))


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


def test_nothing_of_the_size_of_attention_exists_and_little_is_kept():
    rows, heads, seq_len, dim_S, dim_T = 2, 2, 100, 3, 5
    tensors = random_attention(dim_S, dim_T, seq_len, heads, rows=rows, dtype=torch.float32)
    kept = []
    with LargestTensor() as largest, torch.autograd.graph.saved_tensors_hooks(kept.append, lambda x: x):
        q_S, k_S = (x.requires_grad_() for x in tensors[:2])
        loss = attention_error_sum(q_S, k_S, *tensors[2:], 0.6, 0.4, torch.ones(rows, seq_len), "gram")
    assert largest.elements == rows * heads * seq_len * dim_T  # the teacher's own
    student_sized = rows * heads * seq_len * dim_S
    assert sum(x.numel() for x in kept if x.is_floating_point()) == 2 * student_sized
    assert loss.requires_grad


def test_the_teacher_gets_no_gradient():
    tensors = [x.requires_grad_() for x in random_attention()]
    attention_error_sum(*tensors, 0.6, 0.4, torch.ones(3, 7)).sum().backward()
    assert [x.grad is not None for x in tensors] == [True, True, False, False]


# Padding and micro batches: the same sums and gradients however rows are laid out

LENGTHS, WIDTH, HEADS = [6, 3, 5, 1], 8, 2
TRANSFER = Transfer((2, 2, 3), 2, embedding=0.5, hidden=1.0, attention=2.0, layers=(1.0, 0.0, 3.0))


def models(seq_len, padding=0.0):
    """A student of 3 layers and a teacher of 3; the padded positions hold ``padding``."""
    mask = lengths_to_mask(LENGTHS, seq_len)

    def tensor(shape, seed):
        x = torch.full((len(LENGTHS), *shape[:-1], seq_len, shape[-1]), padding, dtype=torch.float64)
        x[..., : max(LENGTHS), :] = normal(len(LENGTHS), *shape[:-1], max(LENGTHS), shape[-1], seed=seed)
        valid = mask.view(len(LENGTHS), *[1] * (len(shape) - 1), seq_len, 1)
        return x.where(valid, padding).requires_grad_()

    def model(seed, head_dim):
        return Captured(
            [tensor((WIDTH,), seed + m) for m in range(4)],
            [tensor((HEADS, head_dim), seed + 10 + m) for m in range(3)],
            [tensor((HEADS, head_dim), seed + 20 + m) for m in range(3)],
            [None] * 3,
            [head_dim**-0.5] * 3,
        )

    return model(100, 3), model(200, 4), mask


def part(captured, rows):
    return Captured(
        *([x[rows] for x in field] for field in (captured.hidden, captured.queries, captured.keys)),
        captured.values,
        captured.scalings,
    )


def step(seq_len, padding=0.0, micro_batches=(slice(None),)):
    """Sums of the global batch, and gradients of the total with global denominators, accumulated."""
    student, teacher, mask = models(seq_len, padding)
    tokens, pairs = row_counts(torch.zeros(4, seq_len), torch.tensor(LENGTHS)).sum(dim=0).tolist()
    counts = denominators(TRANSFER, tokens, pairs, WIDTH)
    sums = dict.fromkeys(weights(TRANSFER), 0.0)
    for rows in micro_batches:
        part_sums = distil(part(student, rows), part(teacher, rows), Layout(mask[rows], full=False), TRANSFER)
        total(part_sums, counts, weights(TRANSFER)).backward()
        sums = {key: sums[key] + part_sums[key].sum().item() for key in sums}
    inputs = student.hidden + student.queries + student.keys
    return sums, [x.grad[..., : max(LENGTHS), :] for x in inputs if x.grad is not None], inputs


@pytest.mark.parametrize(
    "layout",
    [
        {"seq_len": 20},
        {"seq_len": 9, "padding": 1e3},
        {"seq_len": 9, "padding": math.nan},  # what padded positions hold never matters
        {"seq_len": 6, "micro_batches": [slice(0, 1), slice(1, 2), slice(2, 4)]},
        {"seq_len": 11, "micro_batches": [slice(0, 3), slice(3, 4)]},
    ],
)
def test_layout_changes_neither_sums_nor_gradients(layout):
    sums, gradients, _ = step(max(LENGTHS))
    other_sums, other_gradients, inputs = step(**layout)
    assert sums.keys() == other_sums.keys()
    for key in sums:
        assert other_sums[key] == pytest.approx(sums[key], rel=1e-12), key
    for gradient, other in zip(gradients, other_gradients, strict=True):
        torch.testing.assert_close(other, gradient, rtol=1e-12, atol=1e-14)
    for x in inputs:
        if x.grad is not None:
            assert not x.grad[..., max(LENGTHS) :, :].any()


def test_the_total_is_the_mean_over_valid_elements():
    student, teacher, mask = models(9)
    tokens, pairs = sum(LENGTHS), sum(length**2 for length in LENGTHS)
    expected = 0.5 * (student.hidden[0] - teacher.hidden[0])[mask].square().mean()
    for m, g, layer_weight in ((1, 2, 1.0), (3, 3, 3.0)):  # layer 2 has weight 0
        expected = expected + layer_weight * (student.hidden[m] - teacher.hidden[g])[mask].square().mean()
        score_S = student.queries[m - 1] @ student.keys[m - 1].mT / math.sqrt(3)
        score_T = teacher.queries[g - 1] @ teacher.keys[g - 1].mT / math.sqrt(4)
        valid = (mask[:, :, None] & mask[:, None, :])[:, None].expand_as(score_S)
        expected = expected + 2.0 * layer_weight * (score_S - score_T)[valid].square().mean()
    counts = denominators(TRANSFER, tokens, pairs, WIDTH)
    result = total(distil(student, teacher, Layout(mask, full=False), TRANSFER), counts, weights(TRANSFER))
    torch.testing.assert_close(result, expected, rtol=1e-12, atol=0)


# What is computed and what is needed


def test_terms_of_weight_zero_are_not_computed():
    student, teacher, mask = models(6)
    hidden_only = Transfer((1, 2, 3), 2, embedding=0.0, hidden=1.0, attention=0.0, layers=(0.0, 1.0, 1.0))
    student.hidden[:2], student.queries, student.keys = [None, None], [None] * 3, [None] * 3
    assert list(distil(student, teacher, Layout(mask, full=False), hidden_only)) == ["hidden/2", "hidden/3"]
    assert list(denominators(hidden_only, 4, 4, 4)) == ["hidden/2", "hidden/3"]
    with pytest.raises(AssertionError, match="left out a layer"):
        distil(student, teacher, Layout(mask, full=False), TRANSFER)


def test_needed_layers_are_those_of_all_students():
    only_attention = Transfer((3, 6, 9), 2, embedding=0.0, hidden=0.0, attention=1.0, layers=(1.0, 0.0, 1.0))
    assert teacher_need([only_attention]) == Need(scores=frozenset({3, 9}))
    assert teacher_need([TRANSFER]) == Need(frozenset({0, 2, 3}), frozenset({2, 3}))
    assert teacher_need([only_attention, TRANSFER]) == Need(frozenset({0, 2, 3}), frozenset({2, 3, 9}))
    assert teacher_need([]) == Need()
    assert student_need(TRANSFER) == Need(frozenset({0, 1, 3}), frozenset({1, 3}))
