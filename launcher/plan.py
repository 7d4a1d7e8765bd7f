"""What a run will take, from what a trial of it has measured: plain arithmetic.

Letters: n ranks; P parameters of a student with its projections, all of which are trained.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from configs.schema import Precision

SAFE_SHARE = 0.9
"""Of a device's memory; the rest is for what a trial does not show: fragments, longer evaluations."""
FASTER = 1.05
"""A larger micro batch is advised from this gain on."""


@dataclass(frozen=True)
class Size:
    """A micro batch as it was tried: the worst of all ranks."""

    rows: int
    seconds: float
    """Teacher, and forward, losses and backward of all students."""
    optimizer_s: float
    """All students' updates, once per step."""
    peak_bytes: int
    """Of a device, at the moment of the most."""


@dataclass(frozen=True)
class Parts:
    """Bytes on one device (on CPU: of one process), the most of all ranks."""

    process: int
    """Before anything was loaded."""
    teacher: int
    students: int
    """Weights, gradients, master weights, moments."""
    activations: int
    """What the peak of the configured micro batch has beyond the rest."""

    @property
    def total(self) -> int:
        """At the peak."""
        return self.process + self.teacher + self.students + self.activations


@dataclass(frozen=True)
class Length:
    """How much there is to do."""

    steps: int
    global_rows: int
    evaluations: int
    evaluated_rows: int
    """In each evaluation, over all ranks."""


@dataclass(frozen=True)
class Forecast:
    """What a run takes."""

    rows_per_s: float
    """Over all ranks, in steps."""
    steps_s: float
    evaluations_s: float
    devices: int

    @property
    def seconds(self) -> float:
        """From the first step to the last."""
        return self.steps_s + self.evaluations_s

    @property
    def device_hours(self) -> float:
        """Of all devices together."""
        return self.seconds * self.devices / 3600


def forecast(length: Length, tried: Size, ranks: int, forward_share: float) -> Forecast:
    """Return what a run takes if every step goes as the trial's micro batch did.

    A step is ceil(global rows / (n rows)) micro batches and one update. An evaluation runs forward only:
    ``forward_share`` of a micro batch's time, for ceil(evaluated rows / (n rows)) of them.
    """
    micros = -(-length.global_rows // (ranks * tried.rows))
    step_s = micros * tried.seconds + tried.optimizer_s
    evaluated = -(-length.evaluated_rows // (ranks * tried.rows))
    return Forecast(
        rows_per_s=length.global_rows / step_s,
        steps_s=length.steps * step_s,
        evaluations_s=length.evaluations * evaluated * tried.seconds * forward_share,
        devices=ranks,
    )


def next_rows(tried: Sequence[Size], limit_bytes: int) -> int | None:
    """Return twice the rows of the largest size tried, where that should fit, else None."""
    rows = 2 * tried[-1].rows
    if len(tried) == 1:  # no slope is known yet, but twice the rows take at most twice the memory
        return rows if 2 * tried[0].peak_bytes <= SAFE_SHARE * limit_bytes else None
    most = most_rows(tried, limit_bytes)
    return rows if most is None or rows <= most else None


def most_rows(tried: Sequence[Size], limit_bytes: int) -> int | None:
    """Return the rows that fit, by the line through the peaks of the smallest and the largest size tried.

    None where memory did not grow from one to the other. At least the largest, which did fit.
    """
    small, large = tried[0], tried[-1]
    if large.peak_bytes <= small.peak_bytes:
        return None
    slope = (large.peak_bytes - small.peak_bytes) / (large.rows - small.rows)
    return max(large.rows, int(large.rows + (SAFE_SHARE * limit_bytes - large.peak_bytes) / slope))


def student_bytes(parameters: int, stage: int, precision: Precision, ranks: int) -> dict[str, int]:
    """Return what a student takes on every device at a ZeRO stage (Rajbhandari et al., arXiv:1910.02054).

    In float32: weights 4 P, gradients 4 P, AdamW's two moments 8 P. In bf16 and fp16 weights are 2 P, the
    optimizer holds float32 masters too (12 P), and gradients are 4 P in bf16, where they are accumulated in
    float32, 2 P in fp16. Stage 1 divides the optimizer by n, stage 2 gradients too, stage 3 weights too.
    """
    low = precision is not Precision.fp32
    weights = (2 if low else 4) * parameters
    gradients = (2 if precision is Precision.fp16 else 4) * parameters
    optimizer = (12 if low else 8) * parameters
    return {
        "weights": weights // (ranks if stage == 3 else 1),
        "gradients": gradients // (ranks if stage >= 2 else 1),
        "optimizer": optimizer // (ranks if stage >= 1 else 1),
    }


def stage_advice(totals: Mapping[int, int], configured: int, limit_bytes: int) -> str:
    """Return a sentence on the ZeRO stage; ``totals`` are a device's bytes at each stage that is possible.

    Stages 0 to 2 communicate 2 P per step, stage 3 communicates 3 P.
    """
    fitting = [stage for stage, size in totals.items() if size <= SAFE_SHARE * limit_bytes]
    if not fitting:
        return "no ZeRO stage fits: lower train.micro_batch_rows, use more ranks, or offload the optimizer"
    if configured not in fitting:
        return f"ZeRO stage {configured} does not fit; set deepspeed.zero_stage={fitting[0]}"
    if configured == 3 and fitting[0] < 3:
        lower = max(stage for stage in fitting if stage < 3)
        return f"deepspeed.zero_stage={lower} fits as well, and communicates a third less than stage 3"
    return f"ZeRO stage {configured} fits"


def batch_advice(tried: Sequence[Size], most: int | None) -> str:
    """Return a sentence on the micro batch, ``tried[0]``: whether a larger one is faster per row.

    ``tried`` are those that the global batch can be dealt in.
    """
    own, best = tried[0], min(tried, key=lambda size: size.seconds / size.rows)
    gain = (own.seconds / own.rows) / (best.seconds / best.rows)
    limit = "memory does not limit it here" if most is None else f"about {most} rows would fit"
    if gain >= FASTER:
        return f"train.micro_batch_rows={best.rows} is {gain:.2f}x as fast per row as {own.rows}; {limit}"
    return f"no larger micro batch that was tried and can be dealt is faster per row than {own.rows}; {limit}"
