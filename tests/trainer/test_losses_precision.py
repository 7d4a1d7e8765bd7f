"""How far float32, bfloat16 and float16 take the losses from float64; ``-s`` shows the tables of errors."""

import pytest
import torch

from tests.trainer.test_losses import (
    both_methods,
    lengths_to_mask,
    loss_and_gradients,
    normal,
    random_attention,
)
from trainer.losses import cosine_distance_sum, squared_error_sum

SCALINGS = (0.125, 0.125)
SEEDS = range(3)
HALVES = [torch.bfloat16, torch.float16]


def attention_case(distance, dtype, seed):
    """12 heads of 64 and S = 128 as in BERT-base, the student at a distance from the teacher."""
    teacher = [normal(1, 12, 128, 64, seed=10 * seed + i) for i in (3, 4)]
    noise = [normal(1, 12, 128, 64, seed=10 * seed + i) for i in (1, 2)]
    student = [t + distance * n for t, n in zip(teacher, noise, strict=True)]
    return [x.to(dtype) for x in student + teacher]


def errors(distance, dtype, compute):
    """Relative errors of loss and gradient against float64 on the same inputs, root mean square of seeds."""
    found = []
    for seed in SEEDS:
        tensors = attention_case(distance, dtype, seed)
        exact = loss_and_gradients([x.double() for x in tensors], None, "direct", SCALINGS)
        found.append([relative(x, y) for x, y in zip(compute(tensors), exact, strict=True)])
    loss, *gradients = torch.tensor(found).square().mean(dim=0).sqrt().tolist()
    return loss, max(gradients)


def relative(x, exact):
    return ((x.double() - exact).norm() / exact.norm()).item()


def ours(method):
    def compute(tensors):
        tensors[:2] = [x.float() for x in tensors[:2]]  # so that gradients are not rounded at the end
        return loss_and_gradients(tensors, None, method, SCALINGS)

    return compute


def plain(tensors):
    """Scores and their gradients formed in the inputs' own precision."""
    q_S, k_S = (x.detach().clone().requires_grad_() for x in tensors[:2])
    error = q_S @ k_S.mT * SCALINGS[0] - tensors[2] @ tensors[3].mT * SCALINGS[1]
    loss_B = error.float().square().sum(dim=(1, 2, 3))
    loss_B.sum().backward()
    return loss_B.detach(), q_S.grad, k_S.grad


# Relative error of loss and of gradient that float32 may make, by distance of student and teacher; about
# three times what is measured (docs/method.md). The Gram form sets the bound: it subtracts large numbers.
TOLERANCE = {1.0: (1e-6, 1e-6), 0.1: (5e-6, 1e-5), 0.01: (5e-4, 1e-4), 0.001: (1e-1, 1e-3)}


@pytest.mark.parametrize("distance", TOLERANCE)
def test_measured_error_of_float32(distance):
    print(f"\nfloat32, student = teacher + {distance} noise: relative error of loss, gradient")
    for method in ("gram", "direct"):
        found = errors(distance, torch.float32, ours(method))
        print(f"  {method:7}", "  ".join(f"{error:.1e}" for error in found))
        assert found[0] < TOLERANCE[distance][0] and found[1] < TOLERANCE[distance][1]


# Low precision is judged by what computing in that precision errs. Its loss is a sum in which random errors
# cancel, its gradient is not.
@pytest.mark.parametrize("distance", TOLERANCE)
@pytest.mark.parametrize("dtype", HALVES)
def test_measured_error_of_low_precision(distance, dtype):
    stock = errors(distance, dtype, plain)
    print(f"\n{dtype}, student = teacher + {distance} noise: relative error of loss, gradient")
    print("  plain  ", "  ".join(f"{error:.1e}" for error in stock))
    for method in ("gram", "direct"):
        found = errors(distance, dtype, ours(method))
        print(f"  {method:7}", "  ".join(f"{error:.1e}" for error in found))
        assert found[0] < stock[0] and found[1] < stock[1] / 10


@both_methods
@pytest.mark.parametrize("dtype", HALVES)
def test_gradients_of_low_precision_are_rounded_once(method, dtype):
    """At the dtype's own rounding error, which is less than plain scores lead to."""
    tensors = attention_case(0.01, dtype, seed=0)
    exact = loss_and_gradients([x.double() for x in tensors], None, "direct", SCALINGS)
    found = loss_and_gradients(tensors, None, method, SCALINGS)
    assert found[0].dtype == torch.float32
    for gradient, stock, reference in zip(found[1:], plain(tensors)[1:], exact[1:], strict=True):
        assert gradient.dtype == dtype
        assert relative(gradient, reference) < torch.finfo(dtype).eps < relative(stock, reference)


@both_methods
def test_autocast_and_fast_float32_settings_change_nothing(method):
    tensors = random_attention(256, 256, 512, heads=1, rows=1, dtype=torch.float32)
    mask = torch.ones(1, 512)
    expected = loss_and_gradients(tensors, mask, method)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            fast = loss_and_gradients(tensors, mask, method)
        # The caller's settings are put back.
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
        assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"
    finally:
        torch.set_float32_matmul_precision(before)
    assert all(torch.equal(a, b) for a, b in zip(fast, expected, strict=True))


def test_sums_are_float32_for_half_precision_inputs():
    x, y, mask = normal(2, 3, 4, seed=1), normal(2, 3, 4, seed=2), lengths_to_mask([3, 1], 3)
    for dtype, expected in ((torch.float16, torch.float32), (torch.bfloat16, torch.float32)):
        assert squared_error_sum(x.to(dtype), y.float(), mask).dtype == expected
        assert cosine_distance_sum(x.to(dtype), y.float(), mask).dtype == expected
    assert squared_error_sum(x, y, mask).dtype == torch.float64
    large = torch.full((1, 1, 2), 300.0, dtype=torch.float16)  # 300^2 overflows float16
    assert squared_error_sum(large, 0 * large, torch.ones(1, 1)).item() == 180_000
