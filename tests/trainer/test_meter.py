"""Meters: means by hand, also over ranks, and figures by hand."""

import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import tensor

from sharding.stream import Batch
from trainer.clock import Clock
from trainer.meter import CorpusMeter, LossMeter, SpeedMeter
from trainer.transfer import Transfer
from trainer.world import World

CPU = torch.device("cpu")
ALONE = World(0, 1, 0, 1, CPU)


@pytest.fixture
def group(tmp_path: Path):
    """A process group of one rank."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_the_mean_over_steps_by_hand(group):
    """Step 1: (6 + 2) / 8 and (10 + 5) / 5; step 2: (1 + 1) / 4 and 4 / 8."""
    meter = LossMeter()
    meter.add({"embedding": tensor(6.0), "hidden/1": tensor(10.0)}, {"embedding": 8.0, "hidden/1": 5.0})
    meter.add({"embedding": tensor(2.0), "hidden/1": tensor(5.0)}, {"embedding": 8.0, "hidden/1": 5.0})
    meter.add({"embedding": tensor(1.0), "hidden/1": tensor(4.0)}, {"embedding": 4.0, "hidden/1": 8.0})
    meter.add({"embedding": tensor(1.0), "hidden/1": tensor(0.0)}, {"embedding": 4.0, "hidden/1": 8.0})
    means = meter.means({"embedding": 2.0, "hidden/1": 0.5}, steps=2)
    assert list(means) == ["total", "embedding", "hidden/1"]
    assert means == {"total": 2 * 0.75 + 0.5 * 1.75, "embedding": 0.75, "hidden/1": 1.75}


def test_losses_by_corpus_by_hand(group):
    """Rows of corpus 0: 2 and 3 tokens; of corpus 1: 1 token; hidden size 2, one attention head."""
    meter = CorpusMeter(["wiki", "books", "unread"], Transfer((1,), 1, 2.0, 0.0, 1.0, (1.0,)), 2)
    meter.add(
        {"embedding": tensor([4.0, 5.0]), "attention/1": tensor([8.0, 3.0])},
        tensor([0, 1]),
        tensor([[2, 4, 1], [1, 1, 1]]),
    )
    meter.add({"embedding": tensor([6.0]), "attention/1": tensor([5.0])}, tensor([0]), tensor([[3, 9, 1]]))
    means = meter.means(CPU)
    assert means["embedding"] == 15 / (6 * 2) and means["attention/1"] == pytest.approx(16 / (4 + 1 + 9))
    assert means["total"] == pytest.approx(2 * 15 / 12 + 16 / 14)
    assert means["corpus/wiki/embedding"] == 10 / (5 * 2)
    assert means["corpus/wiki/attention/1"] == pytest.approx(13 / 13)
    assert means["corpus/wiki/total"] == pytest.approx(3.0)
    assert means["corpus/books/total"] == pytest.approx(2 * 2.5 + 3.0)
    assert not [key for key in means if "unread" in key]
    meter.add({"embedding": tensor([2.0]), "attention/1": tensor([1.0])}, tensor([2]), tensor([[1, 1, 1]]))
    assert {key for key in meter.means(CPU) if "/total" in key} == {"corpus/unread/total"}


def test_the_next_span_starts_from_nothing(group):
    meter = LossMeter()
    meter.add({"x": tensor(8.0)}, {"x": 2.0})
    assert meter.means({"x": 1.0}, steps=1) == {"total": 4.0, "x": 4.0}
    meter.add({"x": tensor(2.0)}, {"x": 2.0})
    assert meter.means({"x": 1.0}, steps=1) == {"total": 1.0, "x": 1.0}


def test_small_shares_are_not_lost_beside_large_ones(group):
    """In float32 each of 1,000 shares of 1e-8 would vanish beside 1."""
    meter = LossMeter()
    meter.add({"x": tensor(1.0)}, {"x": 1.0})
    for _ in range(1000):
        meter.add({"x": tensor(1e-5)}, {"x": 1000.0})
    assert meter.means({"x": 1.0}, steps=1)["x"] == pytest.approx(1 + 1e-5, abs=1e-9)


def test_a_loss_that_is_not_finite_is_seen(group):
    meter = LossMeter()
    meter.add({"x": tensor(float("nan"))}, {"x": 1.0})
    meter.add({"x": tensor(1.0)}, {"x": 1.0})
    assert str(meter.means({"x": 1.0}, steps=2)["x"]) == "nan"


def test_no_graph_is_kept_alive(group):
    meter = LossMeter()
    loss = torch.ones((), requires_grad=True) * 2
    meter.add({"x": loss}, {"x": 1.0})
    assert not meter.shares["x"].requires_grad


@pytest.fixture
def meter() -> SpeedMeter:
    """10 GFLOP and 0.2 s of matrix time a row."""
    return SpeedMeter(flops_per_row=10e9, floor_s_per_row=0.2, clock=Clock(CPU))


@pytest.mark.parametrize("size", [1, 4])
def test_figures_by_hand(meter, size):
    """Two steps of 8 rows in 4 s."""
    meter.rows, meter.tokens, meter.steps, meter.span_s = 16, 1000, 2, 4.0
    world = World(0, size, 0, size, CPU)
    figures = meter.report(rows_left=40, world=world)
    memory_gib = figures.pop("memory/peak_gib")
    split = {key: figures.pop(key) for key in list(figures) if key.startswith(("share/", "time/"))}
    assert figures == pytest.approx(
        {
            "speed/rows_per_s": 4.0,
            "speed/tokens_per_s": 250.0,
            "speed/step_s": 2.0,
            "speed/tflops_per_rank": 0.04 / size,
            "speed/mfu": 0.8 / size,
        }
    )
    assert split["time/eta_s"] == 10.0
    assert 0.05 < memory_gib < 100
    # The next span has its own speed; the time left goes by both: 32 rows in 6 s.
    meter.rows, meter.tokens, meter.steps, meter.span_s = 16, 600, 1, 2.0
    figures = meter.report(rows_left=32, world=world)
    assert figures["speed/rows_per_s"] == 8.0 and figures["time/data_s"] == 0.0
    assert figures["time/eta_by_rows_s"] == 4.0
    assert figures["time/eta_s"] == 6.0 and (meter.total_rows, meter.total_s) == (32, 6.0)
    assert (meter.rows, meter.tokens, meter.steps, meter.span_s) == (0, 0, 0, 0.0)


def test_a_step_is_split_into_its_parts(meter, monkeypatch):
    """A clock by hand. Of a step's 20 s two are waiting; 100 between the steps count nowhere."""
    now = 0.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    lasts_s = {"teacher": 7.0, "a/forward": 1.0, "b/forward": 2.0, "a/losses": 0.5, "b/backward": 4.0}

    def read():
        nonlocal now
        for position in (1, 2, 3):
            now += 2.0
            yield Batch(position, *(tensor([1]),) * 6)

    def steps(batches, slower=1.0):
        nonlocal now
        for batch in meter.timed(batches):
            seen.append(batch.position)
            for part, part_s in lasts_s.items():
                with meter.clock.part(part):
                    now += slower * part_s
            now += slower * 3.5  # between the parts
            meter.add(rows=8, tokens=50)
            now += 100.0  # evaluation, saving

    seen = []
    steps(read())
    assert seen == [1, 2, 3] and meter.seconds()["step"] == 60.0
    figures = meter.report(rows_left=24, world=ALONE)
    assert figures["time/eta_by_rows_s"] == 60.0 and figures["time/eta_s"] == 360.0
    expected = {
        "data": 2,
        "teacher": 7,
        "forward": 3,
        "losses": 0.5,
        "backward": 4,
        "optimizer": 0,
        "other": 3.5,
    }
    assert {part: figures[f"time/{part}_s"] for part in expected} == expected
    assert {part: 20 * figures[f"share/{part}"] for part in expected} == pytest.approx(expected)
    own = {"time/forward_s": 2.0, "time/losses_s": 0.0, "time/backward_s": 4.0, "time/optimizer_s": 0.0}
    assert meter.of_student("b") == own
    steps(read(), slower=2.0)
    assert meter.report(rows_left=0, world=ALONE)["time/teacher_s"] == 14.0, "of the new span alone"


def test_without_a_count_of_operations_there_is_no_mfu():
    meter = SpeedMeter(None, 0.0, Clock(CPU), rows=8, tokens=16, steps=1, span_s=2.0)
    figures = meter.report(rows_left=4, world=ALONE)
    assert figures["speed/rows_per_s"] == 4.0 and figures["time/eta_s"] == 1.0
    assert not {"speed/mfu", "speed/tflops_per_rank"} & set(figures)


def test_the_time_that_saving_takes_is_no_part_of_a_step(meter, monkeypatch):
    """A clock by hand: a step of 5 s, a save of 15 s, 30 s of something else."""
    now = 0.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)

    def step() -> dict[str, float]:
        nonlocal now
        for _ in meter.timed([Batch(1, *(tensor([1]),) * 6)]):
            now += 5.0
            meter.add(rows=10, tokens=50)
        return meter.report(rows_left=0, world=ALONE)

    assert step()["time/checkpoint_s"] == 0.0
    with meter.clock.part("checkpoint"):
        now += 15.0
    now += 30.0
    figures = step()
    assert (figures["time/checkpoint_s"], figures["share/checkpoint"]) == (15.0, 0.3)
    assert (figures["speed/rows_per_s"], figures["share/other"], figures["speed/step_s"]) == (2.0, 1.0, 5.0)
    assert meter.seconds() == {"step": 10.0, "data": 0.0}
    assert step()["share/checkpoint"] == 0.0
