"""Faults in real runs: what survives, what is lost, and whether the end is bitwise that of a quiet run.

    python benchmarks/chaos.py [--only kills,disk,...] [--seed N] [--json PATH] [--markdown PATH] [--quick]

A tiny run (``benchmarks/tiny_run.py``, 2 ranks, gloo) is started again and again until it is done; every
start meets a fault at a random moment. At its end rows consumed, weights and moments must be those of the run
that nobody disturbed: a row trained twice or left out would change them.

kills     kill -9 of one rank: while starting, in steps, in a save (aimed at the partial folder)
stops     SIGTERM or SIGUSR1 to one rank, or two signals in quick succession: saved, exit code 75
corrupt   all ranks killed, then a file of the newest checkpoint flipped in one byte, cut or removed
slurm     the nodes taken away by a job of higher priority, on a real Slurm (``benchmarks/preemptions.py``)
disk      no space left for a save, on a small file system of its own; then space again; the run goes on
resize    2 -> 1 -> 3 -> 2 ranks in one run, then again with another ZeRO stage each time; without dropout,
          whose seeds depend on the rank; held-out losses compared within float tolerance

The ranks are started as torchrun does it. When one is gone the others must end by themselves; only while
starting the launcher does it for them after ``LAUNCHER_S``, as launchers do. *Rows lost* were trained but not
saved, and so were trained again. Exit code 1 when a fault was not survived or an end was not equal.
"""

import contextlib
import itertools
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks.faults import DAMAGES, Fault, Injector, campaign, corrupt, fill_disk, kill, leave, stop
from benchmarks.harness import Report, benchmark_parser, machine
from benchmarks.preemptions import preempted
from benchmarks.tiny_run import BATCH_ROWS, TinyRun, tiny_config, write_material
from tests.conftest import small_disk
from tests.launcher.slurm import cluster
from trainer import exits

STEPS = 60
DISK_BYTES = 6 * 2**20
TOLERANCE = 2e-4  # relative, of held-out losses on other ranks or ZeRO stages, without dropout


@dataclass(frozen=True)
class End:
    """How the end of a disturbed run compares with that of the quiet one."""

    good: bool
    said: str
    rows_off: int = 0  # rows consumed beyond those of the quiet run, or short of them


class Bench:
    """Runs under faults in one folder, and the quiet runs that they are compared with."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.chance = folder, random.Random(seed)
        self.faults: list[Fault] = []
        self.ends: list[End] = []  # a run each
        self.met: dict[str, list[End]] = {}  # by kind of fault, those of the runs that it struck
        self.starts = 0
        self._quiet: dict[tuple[int, bool], TinyRun] = {}
        write_material(folder)

    def quiet(self, stage: int, dropout: bool = True) -> TinyRun:
        """Return the run that nobody disturbs, on 2 ranks at this ZeRO stage."""
        if (stage, dropout) not in self._quiet:
            run = self.new_run(f"quiet-{stage}{'' if dropout else '-without-dropout'}", dropout)
            life = run.start(2, stage)
            if set(life.wait(300.0)) != {exits.DONE}:
                raise RuntimeError(f"a run fails that nobody disturbs:\n{life.tail()}")
            (first,) = (event for event in life.events() if event["event"] == "training")
            run.startup_s = first["at_s"] - life.since_s
            self._quiet[stage, dropout] = run
        return self._quiet[stage, dropout]

    def new_run(self, name: str, dropout: bool = True) -> TinyRun:
        """Return a run that has not been started yet."""
        return TinyRun(self.folder / name, tiny_config(self.folder, STEPS, dropout))

    def disturb(self, injectors: Sequence[Injector], stages: Sequence[int], disk: bool = False) -> None:
        """Spread faults over runs at these ZeRO stages, on a small disk or not, and compare every end."""
        left, share = list(injectors), -(-len(injectors) // len(stages))
        for stage in itertools.cycle(stages):
            quiet = self.quiet(stage)
            run = self.new_run(f"run-{len(self.ends) + 1}")
            run.startup_s = quiet.startup_s
            run.output.mkdir()
            mine, left = left[:share], left[share:]
            with small_disk(run.checkpoints, DISK_BYTES) if disk else contextlib.nullcontext():
                faults = campaign(run, mine, self.chance, itertools.repeat((2, stage)))
                end = compared(run, quiet)
            self.note(faults, run, end)
            left += mine  # the run was done before they could strike
            if not left or not end.good:
                return
            assert faults, "the run was too short for any fault"

    def preempt(self, times: int, stages: Sequence[int]) -> None:
        """Let Slurm take a run's nodes away, over as many runs as it takes, and compare every end."""
        left = times
        with cluster(self.folder / "slurm") as slurm:
            for stage in itertools.cycle(stages):
                quiet, run = self.quiet(stage), self.new_run(f"run-{len(self.ends) + 1}")
                run.startup_s = quiet.startup_s
                faults = preempted(slurm, run, stage, left, self.chance)
                self.note(faults, run, end := compared(run, quiet))
                left -= len(faults)
                if not left or not end.good:
                    return
                assert faults, "the run was too short for any fault"

    def resize(self, sizes: Sequence[int], stages: Sequence[int]) -> None:
        """Go on with another number of ranks, and maybe another ZeRO stage, at every start."""
        quiet = self.quiet(stages[0], dropout=False)
        run = self.new_run(f"run-{len(self.ends) + 1}", dropout=False)
        kind = " -> ".join(map(str, sizes)) + " ranks"
        if len(set(stages)) > 1:
            kind += f", ZeRO {' -> '.join(map(str, stages))}"
        injectors: list[Injector] = [partial(leave, kind=kind) for _ in sizes[1:]]
        faults = campaign(run, injectors, self.chance, zip(sizes, stages, strict=True))
        self.note(faults, run, compared(run, quiet, TOLERANCE))

    def note(self, faults: Sequence[Fault], run: TinyRun, end: End) -> None:
        """Keep what a run met and how it ended."""
        print(f"{run.output.name}: {run.starts} starts, end {end.said}", flush=True)
        self.starts += run.starts
        self.faults += faults
        self.ends.append(end)
        for kind in dict.fromkeys(fault.kind for fault in faults):
            self.met.setdefault(kind, []).append(end)

    def rows(self) -> list[dict[str, Any]]:
        """Return the table: a row per kind of fault."""
        rows = []
        for kind, ends in sorted(self.met.items()):
            faults = [fault for fault in self.faults if fault.kind == kind]
            row = {
                "fault": kind,
                "times": len(faults),
                "survived": sum(fault.problem is None for fault in faults),
                "rows lost": spread([fault.rows_lost for fault in faults]),
                "rows off at the end": max(abs(end.rows_off) for end in ends),
                "ends of runs": ", ".join(f"{n} {said}" for said, n in Counter(e.said for e in ends).items()),
                "s to the end of all ranks": spread([fault.gone_s for fault in faults], digits=1),
                "s to the next step": spread([fault.trained_s for fault in faults], digits=1),
            }
            rows.append(row)
        return rows


def compared(run: TinyRun, quiet: TinyRun, tolerance: float | None = None) -> End:
    """Compare two ends: all bits of weights and moments, or held-out losses within a relative tolerance."""
    if (step := run.newest_step()) != STEPS:
        return End(False, f"ended at step {step} of {STEPS}", BATCH_ROWS * (step - STEPS))
    (found, tensors), (expected, right) = run.state(), quiet.state()
    rows_off = found.rows - expected.rows
    if tolerance is None:
        wrong = [key for key in right if key not in tensors or not torch.equal(tensors[key], right[key])]
        equal = not wrong and tensors.keys() == right.keys()
        said = "bitwise equal" if equal else f"{len(wrong)} of {len(right)} tensors differ"
        return End(equal and found == expected, said, rows_off)
    losses, expected_losses = run.losses(), quiet.losses()
    off = max(abs(losses[key] / loss - 1) for key, loss in expected_losses.items())
    return End(off <= tolerance and not rows_off, f"losses within {off:.0e}", rows_off)


def spread(values: Sequence[float | None], digits: int = 0) -> str:
    """Return ``median (max)`` of what there is."""
    there = [value for value in values if value is not None]
    return f"{statistics.median(there):.{digits}f} ({max(there):.{digits}f})" if there else "-"


def plans(quick: bool) -> dict[str, Callable[[Bench], None]]:
    """Return what is done to runs, by name."""

    def kills(bench: Bench) -> None:
        aims = bench.chance.choices(["start", "step", "save"], [30, 30, 40], k=100)
        bench.disturb([partial(kill, aim=aim) for aim in aims], [0, 1, 2, 3])

    def corrupted(bench: Bench) -> None:
        bench.disturb([partial(corrupt, how=how) for how in DAMAGES * 3 + DAMAGES[:1]], [1, 3])

    def resized(bench: Bench) -> None:
        bench.resize([2, 1, 3, 2], [1, 1, 1, 1])
        bench.resize([2, 1, 3, 2], [1, 0, 3, 2])

    def few(bench: Bench) -> None:
        kinds: list[Injector] = [partial(kill, aim=aim) for aim in ("start", "step", "save")]
        bench.disturb(
            [fill_disk, *kinds, partial(corrupt, how=bench.chance.choice(DAMAGES)), stop], [1], disk=True
        )

    if quick:
        return {"few": few, "resize": lambda bench: bench.resize([2, 1], [1, 3])}
    return {
        "kills": kills,
        "stops": lambda bench: bench.disturb([stop] * 20, [2, 3]),
        "corrupt": corrupted,
        "slurm": lambda bench: bench.preempt(20, [1, 3]),
        "disk": lambda bench: bench.disturb([fill_disk] * 10, [1, 0], disk=True),
        "resize": resized,
    }


def markdown(rows: Sequence[dict[str, Any]], headline: str) -> str:
    """Return rows of equal keys as a Markdown table, and what was run where."""
    lines = [list(rows[0]), ["---"] * len(rows[0]), *([str(value) for value in row.values()] for row in rows)]
    table = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    return f"{table}\n{headline}. `{' '.join(sys.argv)}`; {machine()}.\n"


def main() -> int:
    """Break runs and print the table; 1 when something was not survived or not equal."""
    parser = benchmark_parser(__doc__)
    parser.add_argument("--only", help="some kinds of fault, separated by commas")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--markdown", type=Path, help="write the table there")
    arguments = parser.parse_args()
    planned, begun_s = plans(arguments.quick), time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix="chaos-"))
    bench = Bench(folder, arguments.seed)
    for name in arguments.only.split(",") if arguments.only else planned:
        planned[name](bench)
    minutes = (time.monotonic() - begun_s) / 60
    survived = sum(fault.problem is None for fault in bench.faults)
    good = sum(end.good for end in bench.ends)
    all_well = survived == len(bench.faults) and good == len(bench.ends)
    headline = (
        f"{survived} of {len(bench.faults)} faults survived, {good} of {len(bench.ends)} runs ended as quiet "
        f"ones do; {bench.starts} starts, {minutes:.0f} minutes"
    )
    report = Report("faults in real runs; seconds and rows: median (max)", bench.rows())
    if arguments.markdown is not None:
        arguments.markdown.write_text(markdown(report.rows, headline), encoding="utf-8")
    report.finish(headline, arguments.json)
    if all_well:
        shutil.rmtree(folder)
    else:
        print(f"what they left: {folder}")
    return 0 if all_well else 1


if __name__ == "__main__":
    sys.exit(main())
