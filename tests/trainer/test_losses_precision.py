"""How far float32 and bfloat16 take the losses from float64; ``-s`` shows the table of errors."""

import pytest
import torch

from tests.trainer.test_losses import (
    both_methods,
    lengths_to_mask,
    loss_and_gradients,
    normal,
    random_attention,
)
from trainer.losses import soft_cross_entropy_sum, squared_error_sum


def relative(x, reference):
    return ((x.double() - reference).norm() / reference.norm()).item()


def precision_case(distance, dtype=torch.float32):
    """12 heads of 64 and S = 128 as in BERT-base, in ``dtype``, and the float64 result for these inputs."""
    tensors = random_attention(64, 64, 128, heads=12, dtype=dtype, distance=distance, rows=1)
    mask, scalings = torch.ones(1, 128), (0.125, 0.125)
    return (
        tensors,
        mask,
        scalings,
        loss_and_gradients([x.double() for x in tensors], mask, "direct", scalings),
    )


# Relative error of loss and of gradient that float32 may make, by distance of student and teacher; about
# three times what is measured (docs/method.md). The Gram form sets the bound: it subtracts large numbers.
TOLERANCE = {1.0: (1e-6, 1e-6), 0.1: (3e-5, 1e-5), 0.01: (2e-3, 1e-4)}


@pytest.mark.parametrize("distance", TOLERANCE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_measured_error(distance, dtype):
    tensors, mask, scalings, reference = precision_case(distance, dtype)
    tensors[:2] = [x.float() for x in tensors[:2]]  # so that gradients are not rounded to bfloat16 again
    print(f"\n{dtype}, student = teacher + {distance} noise: relative error of loss, dQ, dK")
    for method in ("gram", "direct"):
        results = loss_and_gradients(tensors, mask, method, scalings)
        errors = [relative(x, r) for x, r in zip(results, reference, strict=True)]
        print(f"  {method:7}", "  ".join(f"{error:.1e}" for error in errors))
        assert errors[0] < TOLERANCE[distance][0]
        assert max(errors[1:]) < TOLERANCE[distance][1]


@both_methods
@pytest.mark.parametrize("distance", [1.0, 0.01])
def test_bfloat16_inputs_err_less_than_bfloat16_arithmetic(method, distance):
    """On the same bfloat16 tensors, our loss errs less than a tenth of what scores formed in bfloat16 err."""
    tensors, mask, scalings, reference = precision_case(distance, torch.bfloat16)
    q_S, k_S = (x.detach().clone().requires_grad_() for x in tensors[:2])
    stock = (q_S @ k_S.mT * scalings[0] - tensors[2] @ tensors[3].mT * scalings[1]).square().float().sum()
    stock.backward()
    ours = loss_and_gradients(tensors, mask, method, scalings)
    assert ours[0].dtype == torch.float32 and ours[1].dtype == torch.bfloat16
    assert relative(ours[0], reference[0]) < relative(stock.detach(), reference[0]) / 10
    for gradient, theirs, exact in zip(ours[1:], (q_S.grad, k_S.grad), reference[1:], strict=True):
        assert relative(gradient, exact) < relative(theirs, exact)  # both are rounded to bfloat16 at the end


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
        assert soft_cross_entropy_sum(x.to(dtype), y.to(dtype), 1.0).dtype == expected
    assert squared_error_sum(x, y, mask).dtype == torch.float64
    large = torch.full((1, 1, 2), 300.0, dtype=torch.float16)  # 300^2 overflows float16
    assert squared_error_sum(large, 0 * large, torch.ones(1, 1)).item() == 180_000
