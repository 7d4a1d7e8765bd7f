"""Before a run: ``python launcher/preflight.py --config configs/general_4x312.yaml [key=value ...]``.

Checks the configuration as ``launcher/general.py`` does; says what every placement of the teacher needs in
memory, and what a machine like this one has; and measures on one micro batch of the corpus how far the
teacher's precision takes the students' losses from float32. Run it where the job will run.
"""

import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    import configs  # noqa: F401  before transformers, which finds torchao and makes it talk

import argparse
import logging
import os
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from rich.console import Console
from rich.table import Table

from configs.load import ConfigError, load_config
from configs.public import log_publicly, public
from configs.schema import Placement, Precision, Quantization, RunConfig
from launcher.checks import check, teacher_memory
from sharding.corpora import Corpora
from sharding.stream import sequential
from trainer import encoders, memory, shapes, world
from trainer.capture import Captured
from trainer.deviation import deviations
from trainer.evaluation import Encode
from trainer.memory import Memory
from trainer.models import Inputs, Student, build_student
from trainer.teacher import load_teacher
from trainer.transfer import Transfer, teacher_need
from trainer.world import World

MOST_ROWS = 32  # on which deviations are measured


def main() -> int:
    """Print what was found; return the exit code: 0 ready, 2 for the user to correct."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", help="YAML file, see configs/")
    parser.add_argument("--ranks", type=int, default=1, help="ranks that the job will have")
    parser.add_argument("--ranks-per-host", type=int, help="of them on one host; not given: all")
    parser.add_argument("--no-run", action="store_true", help="load no weights: no deviations")
    parser.add_argument("overrides", nargs="*", help="key=value, such as teacher.placement=zero3")
    arguments = parser.parse_args()
    log_publicly(logging.WARNING)
    console = Console(width=None if sys.stdout.isatty() else 120)
    try:
        config = load_config(RunConfig, arguments.config, arguments.overrides)
        here = world.find(os.environ)
        local = arguments.ranks_per_host or arguments.ranks
        place = replace(here, size=arguments.ranks, local_size=local)
        world.share_cores(here, config.train.threads)
        corpora = check(config, place)
        console.print("The configuration is sound.")
        free, found = memory.free_memory(place.device), teacher_memory(config, place, corpora)
        console.print(placement_table(config, found, place, free))
        if problems := memory.check_fits(config.teacher, found, place, free):
            raise ConfigError(problems)
        if not arguments.no_run:
            whole_fits = memory.fits(found[Placement.replicated], here, free)
            device = here.device if whole_fits else torch.device("cpu")
            console.print(deviation_table(config, corpora, replace(here, device=device)))
    except (ValueError, OSError) as error:
        print(public(f"error: {error}"), file=sys.stderr)
        return 2
    return 0


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
    inputs = Inputs.of(batch, slice(None), place.device, separator)
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
    sys.exit(main())
