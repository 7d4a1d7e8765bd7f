"""A trial of a run: real teacher, students and engines on full rows of random tokens; time and memory.

Collective: all ranks do the same, and every figure is that of the worst. Nothing is written.
"""

import time
from collections import Counter
from dataclasses import dataclass, replace
from statistics import median
from typing import TypeVar

import torch
import torch.distributed as dist

from configs.schema import RunConfig
from launcher.assembly import build
from launcher.plan import Parts, Size, next_rows
from sharding.corpora import Corpora
from sharding.stream import Batch
from trainer import memory
from trainer.clock import Stations
from trainer.loop import Run, accumulate_gradients
from trainer.world import World, gather_over_ranks

Number = TypeVar("Number", int, float)

STEPS = 3  # timed, after one that warms up
MOST_SIZES = 5
MOST_S = 60.0
"""No larger micro batch is tried than one whose steps should take that long in all."""
REDUCED_BYTES = 2**26
FORWARD = ("teacher", "forward", "losses")


@dataclass(frozen=True)
class Trial:
    """What was measured."""

    parts: Parts
    sizes: list[Size]
    """The configured micro batch first, each further one twice as large."""
    forward_share: float
    """Of a micro batch's time: teacher, students' forward passes, losses."""
    parameters: dict[str, int]
    """By student, with its projections."""
    limit_bytes: int
    """Of one device; on CPU a rank's share of what its host has available; the least of all ranks."""


def try_out(config: RunConfig, place: World, corpora: Corpora) -> Trial:
    """Build the run and train it for a few steps at several micro batches (collective)."""
    rows = config.train.micro_batch_rows
    train = replace(config.train, global_batch_rows=rows * place.size)
    # One micro batch a step: what accumulates is there once, however many follow.
    single = replace(config, train=train, probes=replace(config.probes, every_steps=None, tasks=[]))
    limit = _limit(place)
    stations = _Weighed(place)
    run = build(single, place, corpora, None, stations)
    sizes, forward_share = [], 0.0
    while True:
        size, share = _tried(run, rows)
        forward_share = forward_share or share
        sizes.append(size)
        following = next_rows(sizes, limit)
        if following is None or len(sizes) == MOST_SIZES:
            break
        if (STEPS + 1) * 2 * (size.seconds + size.optimizer_s) > MOST_S:
            break
        rows = following
    start, teacher, students = (stations.used[name] for name in ("start", "teacher", "students"))
    parts = (start, teacher - start, students - teacher, max(0, sizes[0].peak_bytes - students))
    return Trial(
        Parts(*(_most(part) for part in parts)),
        sizes,
        forward_share,
        {trainee.config.name: _elements(trainee.engine.module) for trainee in run.trainees},
        limit,
    )


class _Weighed(Stations):
    """Stations that note the memory in use."""

    def __init__(self, place: World) -> None:
        super().__init__()
        self.place = place
        self.used = {"start": memory.used_bytes(place.device)}

    def passed(self, name: str) -> None:
        super().passed(name)
        self.used[name] = memory.used_bytes(self.place.device)


def _tried(run: Run, rows: int) -> tuple[Size, float]:
    """Train some steps of one micro batch a rank; return their figures, and the forward passes' share."""
    device, before = run.world.device, Counter[str]()
    taken: list[Counter[str]] = []
    memory.restart_peak(device)
    for _ in range(STEPS + 1):
        accumulate_gradients(run, full_batch(run, rows))
        for trainee in run.active:
            with run.speed.clock.part(f"{trainee.config.name}/optimizer"):
                trainee.engine.step(0.0)  # it leaves the weights as they are
        now = Counter(run.speed.clock.totals())
        taken.append(Counter({part: now[part] - before[part] for part in now}))
        before = now
    peak = memory.peak_bytes(device)
    steps = taken[1:]
    optimizer_s = median(_sum(step, ("optimizer",)) for step in steps)
    micro_s = median(_sum(step, (*FORWARD, "backward")) for step in steps)
    forward_s = median(_sum(step, FORWARD) for step in steps)
    return Size(rows, _most(micro_s), _most(optimizer_s), _most(peak)), forward_s / micro_s


def _sum(step: Counter[str], parts: tuple[str, ...]) -> float:
    return sum(seconds for name, seconds in step.items() if name.rpartition("/")[2] in parts)


def full_batch(run: Run, rows: int) -> Batch:
    """Return ``rows`` rows of this rank with no padding, of random tokens of the longest corpus."""
    corpus = max(run.corpora.corpora, key=lambda corpus: corpus.manifest.seq_len)
    seq_len, vocabulary = corpus.manifest.seq_len, corpus.manifest.tokenizer.vocab_size
    generator = torch.Generator().manual_seed(run.world.rank)
    ids_BS = torch.randint(vocabulary, (rows, seq_len), generator=generator)
    length_B = torch.full((rows,), seq_len)
    number = run.corpora.corpora.index(corpus)
    zero_B = torch.zeros(rows, dtype=torch.int64)
    row_B = torch.arange(rows) % corpus.split("train").rows
    return Batch(0, ids_BS, length_B, length_B, zero_B + number, zero_B, row_B)


def _elements(module: torch.nn.Module) -> int:
    """Of all parameters; at ZeRO stage 3 DeepSpeed keeps their sizes beside them."""
    return sum(int(getattr(p, "ds_numel", p.numel())) for p in module.parameters())


def _limit(place: World) -> int:
    on_device, on_host = memory.free_memory(place.device)
    own = memory.used_bytes(place.device)
    free = on_device if on_device is not None else on_host // place.local_size
    return min(gather_over_ranks(free + own))


def _most(value: Number) -> Number:
    return max(gather_over_ranks(value))


@dataclass(frozen=True)
class Network:
    """What ranks can say to each other."""

    latency_s: float
    """Of a sum of one number over all ranks."""
    bytes_per_s: float
    """Of a ring's traffic, 2 (n - 1) / n bytes for every byte that is summed."""


def network(place: World) -> Network | None:
    """Measure sums over all ranks, as gradients need them (collective); None for a single rank."""
    if place.size == 1:
        return None
    one, many = (torch.ones(size // 4, device=place.device) for size in (4, REDUCED_BYTES))
    small_s = [_reduced_s(one, place.device) for _ in range(20)]
    large_s = [_reduced_s(many, place.device) for _ in range(4)][1:]
    traffic = 2 * (place.size - 1) / place.size * REDUCED_BYTES
    return Network(_most(median(small_s)), traffic / _most(median(large_s)))


def _reduced_s(values: torch.Tensor, device: torch.device) -> float:
    dist.barrier()
    started_s = time.perf_counter()
    dist.all_reduce(values)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started_s
