"""What a run will take, by hand."""

import pytest

from configs.schema import Precision
from launcher.plan import (
    Length,
    Parts,
    Size,
    batch_advice,
    forecast,
    most_rows,
    next_rows,
    stage_advice,
    student_bytes,
)

GIB = 2**30


def size(rows: int, seconds: float = 1.0, peak: float = 1.0, optimizer_s: float = 0.5) -> Size:
    return Size(rows, seconds, optimizer_s, int(peak * GIB))


def test_a_forecast() -> None:
    """256 rows on 4 ranks are 8 micro batches of 8 each: 8 x 1 s and an update of 0.5 s."""
    length = Length(steps=100, global_rows=256, evaluations=3, evaluated_rows=100)
    found = forecast(length, size(8), ranks=4, forward_share=0.25)
    assert found.steps_s == 850.0 and found.rows_per_s == pytest.approx(256 / 8.5)
    assert found.evaluations_s == 3 * 4 * 0.25  # of 100 rows: 4 micro batches on each rank
    assert found.device_hours == pytest.approx(4 * 853 / 3600)
    odd = Length(steps=1, global_rows=100, evaluations=0, evaluated_rows=0)
    assert forecast(odd, size(8), ranks=4, forward_share=0.5).seconds == 4.5  # the fullest rank has 25 rows


def test_the_rows_that_fit() -> None:
    tried = [size(8, peak=2.0), size(16, peak=3.0)]  # 1 GiB and an eighth a row
    assert most_rows(tried, 10 * GIB) == 64
    assert next_rows(tried, 10 * GIB) == 32
    assert next_rows(tried, 5 * GIB) is None and most_rows(tried, 5 * GIB) == 28
    assert most_rows(tried, 2 * GIB) == 16, "it did fit"
    assert most_rows([size(8), size(16)], GIB) is None
    assert next_rows([size(8, peak=2.0)], 5 * GIB) == 16
    assert next_rows([size(8, peak=2.0)], 4 * GIB) is None


def test_what_a_student_takes_at_each_stage() -> None:
    def total(stage: int, precision: Precision, ranks: int = 4) -> int:
        return sum(student_bytes(1000, stage, precision, ranks).values())

    assert [total(stage, Precision.fp32) for stage in range(4)] == [16_000, 10_000, 7_000, 4_000]
    assert [total(stage, Precision.bf16) for stage in (1, 2, 3)] == [9_000, 6_000, 4_500]
    assert total(1, Precision.fp16) == 7_000
    assert total(3, Precision.fp32, ranks=1) == 16_000


def test_advice_on_the_stage() -> None:
    sizes = {1: 10, 2: 8, 3: 4}
    assert stage_advice(sizes, 1, 100) == "ZeRO stage 1 fits"
    assert "set deepspeed.zero_stage=2" in stage_advice(sizes, 1, 9)
    assert "deepspeed.zero_stage=2 fits as well" in stage_advice(sizes, 3, 9)
    assert stage_advice(sizes, 3, 5) == "ZeRO stage 3 fits"
    assert "no ZeRO stage fits" in stage_advice(sizes, 3, 4)


def test_advice_on_the_micro_batch() -> None:
    tried = [size(8, seconds=1.0), size(16, seconds=1.6), size(32, seconds=3.1)]
    assert batch_advice(tried, 40) == (
        "train.micro_batch_rows=32 is 1.29x as fast per row as 8; about 40 rows would fit"
    )
    assert "no larger micro batch" in batch_advice([size(8, seconds=1.0), size(16, seconds=1.99)], None)


def test_parts_add_up() -> None:
    assert Parts(1, 2, 3, 4).total == 10
