"""Before a run: ``python launcher/preflight.py --config configs/general_4x312.yaml [key=value ...]``.

Checks the configuration as ``launcher/general.py`` does, then trains a few steps of the real run on full
rows of random tokens, and prints a plan: hosts and the network between them, memory by part, the micro
batches that fit, advice on placement, ZeRO stage and batch, time and device-hours of the whole run, disk, and
how far the teacher's precision takes the losses from float32. It writes nothing.

Start it as the run will be started, and what it measures is the run's own:

    deepspeed launcher/preflight.py --config FILE          srun python launcher/preflight.py --config FILE
    deepspeed launcher/preflight.py --config TASK stage=intermediate

As a plain process it measures one rank; ``--ranks`` then says for how many the plan is made.
"""

import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    import configs  # noqa: F401  before transformers, which finds torchao and makes it talk

import argparse
import logging
import os
import shutil
import socket
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from configs.load import ConfigError, load_config
from configs.public import log_publicly, public
from configs.schema import Offload, Placement, Precision, Quantization, RunConfig
from configs.task import TRAINING, stage_config
from configs.validate import check_batch
from launcher import plan, task
from launcher.checks import check, check_memory, needed, teacher_memory
from launcher.facts import facts
from launcher.plan import Forecast, Length
from launcher.tracked import store_in_words
from launcher.trial import Trial, network, try_out
from launcher.wording import duration
from sharding.corpora import Corpora
from sharding.stream import sequential
from trainer import encoders, engine, exits, meeting, memory, shapes, world
from trainer.capture import Captured, Need
from trainer.columns import Columns
from trainer.deviation import deviations
from trainer.evaluation import Encode
from trainer.loop import total_steps
from trainer.memory import Memory, gib
from trainer.models import Inputs, Student, build_student
from trainer.teacher import load_teacher
from trainer.transfer import Transfer, teacher_need
from trainer.world import World, gather_over_ranks

MOST_ROWS = 32  # on which deviations are measured


def main() -> int:
    """Print what was found; return the exit code: 0 ready, 2 for the user to correct."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", help="YAML file, see configs/")
    parser.add_argument("--ranks", type=int, help="ranks that the job will have; not given: those that run")
    parser.add_argument("--ranks-per-host", type=int, help="of them on one host; not given: all")
    parser.add_argument("--no-run", action="store_true", help="load no weights: nothing is measured")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # the deepspeed launcher appends it
    parser.add_argument("overrides", nargs="*", help="key=value, such as teacher.placement=zero3")
    arguments = parser.parse_args()
    log_publicly(logging.WARNING)
    is_main = world.is_main(os.environ)
    try:
        config = load(arguments.config, arguments.overrides)
        preflight(config, arguments, Console(quiet=not is_main, width=None if sys.stdout.isatty() else 120))
    except (ValueError, OSError) as error:
        if is_main:
            print(public(f"error: {error}"), file=sys.stderr)
        return exits.of(error)
    if dist.is_initialized():
        world.disconnect()
    return exits.DONE


def load(path: str | None, overrides: list[str]) -> RunConfig:
    """Return the run to prepare; with ``stage=...`` among the overrides, that of a task's stage.

    Raises:
        ConfigError: something is wrong with it, or the stage trains nothing.
    """
    if not any(text.startswith("stage=") for text in overrides):
        return load_config(RunConfig, path, overrides)
    stage, config = task.load(path, overrides)
    if stage not in TRAINING:
        raise ConfigError([f"stage={stage} trains nothing; give one of stage={'|'.join(TRAINING)}"])
    run = stage_config(config, stage, task.learners(config, stage))
    return replace(run, teacher=replace(run.teacher, logits_folder=None))  # it would be written to


def preflight(config: RunConfig, arguments: argparse.Namespace, console: Console) -> None:
    """Check, measure and print.

    Raises:
        ConfigError: what would end the run, all of it that is found at one time.
    """
    here = world.find(os.environ)
    planned = here
    if here.size == 1 and arguments.ranks is not None:
        planned = replace(here, size=arguments.ranks, local_size=arguments.ranks_per_host or arguments.ranks)
    world.share_cores(here, config.train.threads)
    corpora = meeting.or_tell(here, os.environ, config.timeouts, lambda: check(config, planned))
    console.print("The configuration is sound.")
    if here.is_main:  # the store that it logs to
        console.print(f"{store_in_words(config.tracking)}", highlight=False)
    free, found = memory.free_memory(here.device), teacher_memory(config, planned, corpora)
    taught = needed(config, corpora) != Need()
    if taught:
        console.print(placement_table(config, found, planned, free))
        check_memory(config, planned, corpora)
    else:
        console.print("No teacher is loaded: labels are all that is learned from.")
    if arguments.no_run:
        return
    meeting.connect(here, os.environ, config.timeouts, facts(config, corpora))
    engine.attach()
    console.print(host_table(config, here))
    if (links := network(here)) is not None:
        speed = f"{links.bytes_per_s / 1e9:.2f} GB/s for gradients, {links.latency_s * 1e3:.2f} ms a message"
        console.print(f"All {here.size} ranks reach each other: {speed}.")
    tried = try_out(config, here, corpora)
    console.print(memory_table(config, tried))
    console.print(size_table(config, tried, planned))
    for line in advice(config, tried, planned, corpora):
        console.print(f"- {line}", highlight=False)
    if problems := disk_problems(config, tried):
        raise ConfigError(problems)
    if here.is_main and taught:  # it needs no other rank
        whole_fits = memory.fits(found[Placement.replicated], replace(here, local_size=1), free)
        device = here.device if whole_fits else torch.device("cpu")
        alone = World(0, 1, 0, 1, device)
        console.print(deviation_table(config, corpora, alone))


def host_table(config: RunConfig, place: World) -> Table:
    """Return hosts, their ranks, devices, free memory and disk, and clocks (collective)."""
    on_device, on_host = memory.free_memory(place.device)
    device = torch.cuda.get_device_name(place.device) if place.device.type == "cuda" else "CPU"
    free_disk = shutil.disk_usage(_existing(Path(config.output))).free
    own = (socket.gethostname(), device, on_device, on_host, free_disk, time.time())
    hosts = defaultdict(list)
    for record in gather_over_ranks(own):
        hosts[record[0]].append(record)
    table = Table(
        "host", "ranks", "device", "free on a device", "free host memory", "free disk at output", "clock",
        title="Hosts; code, versions, settings, corpus and teacher are equal on all",
    )  # fmt: skip
    for host, records in hosts.items():
        _, device, on_device, on_host, free_disk, now = records[0]
        free = gib(min(r[2] for r in records if r[2] is not None)) if on_device is not None else "the host's"
        ahead_s = now - own[-1]
        clock = "as rank 0's" if abs(ahead_s) < 2 else f"{ahead_s:+.0f} s from rank 0's"
        table.add_row(host, str(len(records)), device, free, gib(on_host), gib(free_disk), clock)
    return table


def memory_table(config: RunConfig, tried: Trial) -> Table:
    """Return what each part takes of a device, at the configured micro batch."""
    parts, rows = tried.parts, config.train.micro_batch_rows
    table = Table(
        "part", "memory", "share",
        title=f"Memory of one rank, measured at {rows} full rows a micro batch",
        caption=f"available to it: {gib(tried.limit_bytes)}",
    )  # fmt: skip
    for name, size in (
        ("Python and libraries", parts.process),
        (f"teacher, {config.teacher.precision.value}, {config.teacher.placement.value}", parts.teacher),
        (f"students: weights, gradients, optimizer, ZeRO {config.deepspeed.zero_stage}", parts.students),
        ("activations, at the peak", parts.activations),
        ("together", parts.total),
    ):
        table.add_row(name, gib(size), f"{size / tried.limit_bytes:.1%}")
    return table


def size_table(config: RunConfig, tried: Trial, planned: World) -> Table:
    """Return the micro batches that were tried."""
    table = Table(
        "rows a micro batch", "micro batch", "optimizer", "rows/s of all ranks", "peak memory", "of a device",
        title="Micro batches, measured",
    )  # fmt: skip
    for size in tried.sizes:
        mark = " (configured)" if size.rows == config.train.micro_batch_rows else ""
        table.add_row(
            f"{size.rows}{mark}",
            f"{size.seconds:.3f} s",
            f"{size.optimizer_s:.3f} s",
            f"{planned.size * size.rows / size.seconds:,.1f}",
            gib(size.peak_bytes),
            f"{size.peak_bytes / tried.limit_bytes:.1%}",
        )
    return table


def advice(config: RunConfig, tried: Trial, planned: World, corpora: Corpora) -> list[str]:
    """Return the plan in sentences: how long, what it costs, and what to set otherwise."""
    own, settings = tried.sizes[0], config.deepspeed
    expected = plan.forecast(length(config, corpora), own, planned.size, tried.forward_share)
    others = tried.parts.process + tried.parts.teacher + tried.parts.activations
    offloaded = _offloaded(config, world.find(os.environ))
    stages = range(4) if settings.precision is Precision.fp32 else range(1, 4)
    totals = {
        stage: others
        + sum(
            size
            for count in tried.parameters.values()
            for part, size in plan.student_bytes(count, stage, settings.precision, planned.size).items()
            if part not in offloaded
        )
        for stage in stages
    }
    dealt = [  # that the global batch can be dealt in
        size
        for size in tried.sizes
        if not check_batch(replace(config.train, micro_batch_rows=size.rows), planned.size)
    ]
    return [
        forecast_line(expected, total_steps(config, corpora), planned),
        plan.stage_advice(totals, settings.zero_stage, tried.limit_bytes),
        plan.batch_advice(dealt, plan.most_rows(tried.sizes, tried.limit_bytes)),
        f"checkpoints take {gib(checkpoint_bytes(config, tried))} of disk at {config.output}",
    ]


def _offloaded(config: RunConfig, place: World) -> set[str]:
    """Return the parts of a student that take nothing of the device: on CPU host and device are one."""
    if place.device.type != "cuda":
        return set()
    where = {"optimizer": config.deepspeed.offload_optimizer, "weights": config.deepspeed.offload_parameters}
    return {part for part, own in where.items() if own is not Offload.none}


def length(config: RunConfig, corpora: Corpora) -> Length:
    """Return how much a run has to do."""
    steps, every = total_steps(config, corpora), config.evaluation.every_steps
    heldout = sum(corpus.split("heldout").rows for corpus in corpora.corpora) if every is not None else 0
    return Length(
        steps,
        config.train.global_batch_rows,
        1 + -(-steps // every) if every is not None else 0,
        min(config.evaluation.rows or heldout, heldout),
    )


def forecast_line(expected: Forecast, steps: int, planned: World) -> str:
    """Return the plan's first sentence."""
    ranks = f"{planned.size} rank{'s' * (planned.size > 1)}"
    measured = "" if world.find(os.environ).size == planned.size else ", if they are as fast as one alone"
    return (
        f"{steps} steps on {ranks} ({planned.device.type}) take {duration(expected.seconds)}{measured}: "
        f"{expected.device_hours:,.1f} device-hours, {expected.rows_per_s:,.1f} rows/s; of it evaluations "
        f"{duration(expected.evaluations_s)}. Rows shorter than these full ones do not go faster, but for "
        "a task's, which are trimmed"
    )


def checkpoint_bytes(config: RunConfig, tried: Trial) -> int:
    """Return the disk that checkpoints take: float32 weights and two moments of each student, one being
    written beside those that are kept."""
    kept = config.checkpoint.keep_last or 1
    return 12 * sum(tried.parameters.values()) * (kept + 1)


def disk_problems(config: RunConfig, tried: Trial) -> list[str]:
    """Return the problem, if any, of an output folder that cannot take the run's checkpoints."""
    parent = _existing(Path(config.output))
    if not os.access(parent, os.W_OK):
        return [f"output={config.output}: {parent} cannot be written; name another folder, or its owner's"]
    needed, free = checkpoint_bytes(config, tried), shutil.disk_usage(parent).free
    if needed <= free:
        return []
    return [
        f"output={config.output}: checkpoints take {gib(needed)}, and {gib(free)} are free at {parent}; free "
        "space, lower checkpoint.keep_last, or name another folder"
    ]


def _existing(path: Path) -> Path:
    """The nearest folder that is there."""
    path = path.absolute()
    return next(parent for parent in (path, *path.parents) if parent.exists())


def placement_table(
    config: RunConfig, found: dict[Placement, Memory], place: World, free: tuple[int | None, int]
) -> Table:
    """Return memory needed against memory available, a row for each placement."""
    on_device, on_host = (memory.gib(size) if size is not None else "the host's" for size in free)
    table = Table(
        "placement",
        "parameters",
        "activations",
        "device",
        "host, all its ranks",
        "disk",
        "fits",
        title=f"Memory of the teacher on {place.size} ranks, {place.local_size} a host",
        caption=f"available: device {on_device}, host {on_host}",
    )
    for placement, own in found.items():
        mark = " (configured)" if placement is config.teacher.placement else ""
        sizes = (own.parameters, own.activations, own.device, memory.host_bytes(own, place), own.disk)
        fits = "yes" if memory.fits(own, place, free) else "no"
        table.add_row(placement.value + mark, *map(memory.gib, sizes), fits)
    return table


def deviation_table(config: RunConfig, corpora: Corpora, place: World) -> Table:
    """Return how far the configured teacher is from float32, on the first micro batch of training rows."""
    shape = encoders.load_teacher_config(config.teacher)
    learned = [shapes.transfer(student, shape, corpora.task) for student in config.students]
    students = [
        build_student(
            student, lambda head: encoders.load_whole_teacher(config.teacher, head), shape, 0, corpora.task
        )
        for student in config.students
    ]
    rows = min(config.train.micro_batch_rows, MOST_ROWS)
    batch = next(sequential(corpora.corpora[0], "train", rows=rows, batch_rows=rows, rank=0, world_size=1))
    separator = corpora.separator if config.data.separate_documents else None
    columns = Columns.read(corpora, "train")
    inputs = Inputs.of(batch, slice(None), place.device, separator, columns)
    # All placements compute the same.
    own = replace(config.teacher, placement=Placement.replicated, offload_folder=None)
    exact = replace(own, precision=Precision.fp32, quantization=Quantization.none, compile=False)
    need = teacher_need(learned)
    low, reference = (load_teacher(kind, need, place) for kind in (own, exact))
    found = deviations(low, reference, encoding(students, learned, place), inputs, shape.hidden_size)
    kind = own.precision.value
    if own.quantization is not Quantization.none:
        kind += f" with {own.quantization.value} products"
    table = Table("of", "relative deviation", title=f"A {kind} teacher against float32, on {rows} rows")
    for name, value in found.items():
        table.add_row(name, f"{value:.2e}")
    return table


def encoding(
    students: Sequence[Student], learned: Sequence[Transfer], place: World
) -> list[tuple[Encode, Transfer]]:
    """Return students that are called with inputs, and what each learns."""

    def encode(student: Student, inputs: Inputs) -> Captured:
        return Captured(**student(inputs.ids_BS, inputs.attention_mask, inputs.token_type_BS))

    prepared = [student.to(place.device).eval() for student in students]
    return [(partial(encode, student), own) for student, own in zip(prepared, learned, strict=True)]


if __name__ == "__main__":
    exits.leave(main())
