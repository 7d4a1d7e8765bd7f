import pytest

from configs.student_schema import Decay
from trainer.schedule import lr_multiplier


def multipliers(total_steps, warmup, decay, min_lr_ratio=0.0):
    return [lr_multiplier(step, total_steps, warmup, decay, min_lr_ratio) for step in range(total_steps)]


def test_linear_by_hand():
    # T = 10, W = 2; then 8 steps down from 1 in eighths: the last step still has 1/8.
    assert multipliers(10, 0.2, "linear") == [0.5, 1, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8]


def test_linear_by_hand_with_a_floor():
    # T = 4, no warm-up, r = 0.2: 0.2 + 0.8 (1 - x) for x = 0, 1/4, 2/4, 3/4.
    assert multipliers(4, 0.0, "linear", 0.2) == pytest.approx([1.0, 0.8, 0.6, 0.4])


def test_cosine_by_hand():
    # T = 6, W = 2, r = 0.1: x = 0, 1/4, 1/2, 3/4 with cos(pi x) = 1, sqrt(1/2), 0, -sqrt(1/2).
    root = 0.5**0.5
    falling = [0.1 + 0.9 * (1 + cosine) / 2 for cosine in (1, root, 0, -root)]
    assert multipliers(6, 1 / 3, "cosine", 0.1) == pytest.approx([0.5, 1.0, *falling])


def test_constant_by_hand():
    assert multipliers(5, 0.6, "constant", 0.3) == pytest.approx([1 / 3, 2 / 3, 1, 1, 1])


def test_warm_up_may_take_the_whole_run():
    assert multipliers(4, 1.0, "linear") == [0.25, 0.5, 0.75, 1.0]


@pytest.mark.parametrize("decay", [decay.value for decay in Decay])
@pytest.mark.parametrize("warmup", [0.0, 0.001, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("min_lr_ratio", [0.0, 0.1, 1.0])
def test_rises_then_falls_and_every_step_learns(decay, warmup, min_lr_ratio):
    factors = multipliers(1000, warmup, decay, min_lr_ratio)
    peak = round(warmup * 1000)
    assert factors[:peak] == sorted(factors[:peak])
    assert factors[peak:] == sorted(factors[peak:], reverse=True)
    assert max(factors) == 1.0 and min(factors) > 0.0
    if decay != "constant" and warmup < 1:
        assert factors[-1] == pytest.approx(min_lr_ratio, abs=1.001 / (1000 - peak))


def test_keeps_the_floor_past_the_end():
    assert lr_multiplier(10, 10, 0.1, "linear", 0.25) == 0.25
    assert lr_multiplier(99, 10, 0.1, "cosine", 0.25) == pytest.approx(0.25)
    assert lr_multiplier(10, 10, 1.0, "linear", 0.25) == 0.25  # no division by an empty decay


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((0, 10, 0.1, "step", 0.0), "decay='step' is none of"),
        ((-1, 10, 0.1, "linear", 0.0), "step=-1"),
        ((0, 0, 0.1, "linear", 0.0), "total_steps=0"),
        ((0, 10, 10, "linear", 0.0), "warmup=10"),
        ((0, 10, 0.1, "linear", 2.0), "min_lr_ratio=2.0"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        lr_multiplier(*arguments)
