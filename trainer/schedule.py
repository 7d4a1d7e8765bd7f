"""The learning rate as a function of the step, relative to its peak."""

import math


def lr_multiplier(step: int, total_steps: int, warmup: float, decay: str, min_lr_ratio: float) -> float:
    """Factor on the peak learning rate for the optimizer step about to be taken.

    step: 0-based; from ``total_steps`` on, the factor is the one at the end.
    warmup: share of ``total_steps`` over which the factor rises linearly: W = round(warmup * total_steps).
    decay: ``linear``, ``cosine`` or ``constant``.
    min_lr_ratio: factor at the end, which the step after the last would have (``constant`` ignores it).

    With T = total_steps and r = min_lr_ratio:

        warm-up, step < W:  (step + 1) / W            the first step already learns; step W - 1 has factor 1
        decay, step >= W:   x = (step - W) / (T - W)  from 0 to 1 - 1 / (T - W): the last step still learns
            linear          r + (1 - r) (1 - x)
            cosine          r + (1 - r) (1 + cos(pi x)) / 2
            constant        1

    Raises ValueError for an unknown decay or numbers out of range.
    """
    if decay not in ("linear", "cosine", "constant"):
        raise ValueError(f"decay={decay!r} is none of linear, cosine, constant")
    if step < 0 or total_steps < 1:
        raise ValueError(f"step={step} must be at least 0 and total_steps={total_steps} at least 1")
    if not (0 <= warmup <= 1 and 0 <= min_lr_ratio <= 1):
        raise ValueError(f"warmup={warmup} and min_lr_ratio={min_lr_ratio} are shares and must lie in 0..1")
    warmup_steps = round(warmup * total_steps)
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if decay == "constant":
        return 1.0
    x = 1.0 if step >= total_steps else (step - warmup_steps) / (total_steps - warmup_steps)
    falling = 1 - x if decay == "linear" else (1 + math.cos(math.pi * x)) / 2
    return min_lr_ratio + (1 - min_lr_ratio) * falling
