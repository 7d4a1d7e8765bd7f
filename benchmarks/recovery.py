"""From the death of a rank to the first step after it, by phase, for several ways to start a run again.

    python benchmarks/recovery.py [--repeats N] [--json PATH] [--quick]

A tiny run (``benchmarks/tiny_run.py``) of 2 ranks loses rank 1 by kill -9 in its steps.

by hand     the ranks started as torchrun does it, and again as soon as all are gone: the least there can be
torchrun    ``torchrun --max-restarts 3``
supervise   ``launcher/supervise.py`` around ``deepspeed``, and around ``torchrun``

``detect`` lasts until all ranks are gone, ``relaunch`` until the new rank 0 is a process, ``imports`` until
its packages are imported, ``meeting`` until the ranks have met; the rest is its own way to the first step's
end. Teacher and students are tiny: what they take says nothing of real ones.
"""

import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import psutil

from benchmarks.harness import Report, benchmark_parser
from benchmarks.tiny_run import ROOT, TinyRun, free_port, tiny_config, write_material

STEPS = 100_000  # never reached
LIMIT_S = 180.0
WAYS = ["by hand", "torchrun", "supervise, deepspeed", "supervise, torchrun"]


def command(way: str, run: TinyRun) -> list[str]:
    """Return the command line of a way to start a run."""
    script = [str(ROOT / "launcher/general.py"), "--config", str(run.config), f"output={run.output}"]
    meeting = ["--master_addr", "127.0.0.1", "--master_port", free_port()]
    deepspeed = ["-m", "deepspeed.launcher.runner", "--num_accelerators", "2", *meeting]
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node", "2", *meeting]
    supervise = [str(ROOT / "launcher/supervise.py"), "--", sys.executable]
    ways = {
        "torchrun": [*torchrun, "--max-restarts", "3"],
        "supervise, deepspeed": [*supervise, *deepspeed],
        "supervise, torchrun": [*supervise, *torchrun],
    }
    return [sys.executable, *ways[way], *script]


def ranks(run: TinyRun) -> list[psutil.Process]:
    """Return the processes of a run's ranks, in order; their readers and launchers left out."""
    found: dict[int, psutil.Process] = {}
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        try:
            if str(run.config) in words:
                place, parent = process.environ().get("RANK"), process.parent()
                if place is not None and parent is not None and parent.environ().get("RANK") is None:
                    found[int(place)] = process
        except psutil.Error:
            continue
    return [found[rank] for rank in sorted(found)]


def wait_for_training(run: TinyRun, times: int) -> dict[str, Any]:
    """Wait until so many starts of a run have done their first step; return the last one's event."""
    until_s = time.monotonic() + LIMIT_S
    while len(found := [event for event in run.events() if event["event"] == "training"]) < times:
        if time.monotonic() > until_s:
            raise TimeoutError(f"start {times} of {run.config} has not come to its first step")
        time.sleep(0.05)
    return found[-1]


def recovery(run: TinyRun, way: str) -> dict[str, float]:
    """Start a run, kill rank 1 in its steps, and return the seconds of every phase to the next first step."""
    lives = [run.start(2, 1)] if way == "by hand" else []
    launcher = None
    if not lives:
        with run.output.with_suffix(".log").open("wb") as log:
            environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
            launcher = psutil.Popen(
                command(way, run),
                cwd=run.output.parent,
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
    try:
        wait_for_training(run, 1)
        while run.newest_step() == 0:  # so that there is a checkpoint to load
            time.sleep(0.1)
        time.sleep(0.5)
        old = ranks(run)
        struck_s = time.time()
        old[1].kill()
        while any(running(process) for process in old):
            time.sleep(0.01)
        gone_s = time.time()
        if lives:
            lives.append(run.start(2, 1))
        trained = wait_for_training(run, 2)
    finally:
        for life in lives:
            life.end()
        if launcher is not None:
            for process in [launcher, *launcher.children(recursive=True)]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            launcher.wait()
    phases: dict[str, float] = trained["seconds"]
    born_s = trained["at_s"] - sum(phases.values())
    return {"detect": gone_s - struck_s, "relaunch": max(0.0, born_s - gone_s), **phases}


def running(process: psutil.Process) -> bool:
    """Return whether a process has not ended; one that nobody has waited for has."""
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def main() -> None:
    """Measure every way, taking turns, and print the table."""
    parser = benchmark_parser(__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    repeats, ways = (1, WAYS[:2]) if arguments.quick else (arguments.repeats, WAYS)
    taken: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
    with tempfile.TemporaryDirectory(prefix="recovery-") as name:
        write_material(Path(name))
        for turn in range(repeats):
            for number, way in enumerate(ways):
                run = TinyRun(Path(name) / f"run-{turn}-{number}", tiny_config(Path(name), STEPS))
                taken[way].append(recovery(run, way))
    report = Report("seconds from kill -9 of a rank to the end of the next first step, by phase; medians")
    totals = {}
    for way, found in taken.items():
        medians = {phase: statistics.median(each[phase] for each in found) for phase in found[0]}
        totals[way] = statistics.median(sum(each.values()) for each in found)
        report.add(way=way, **medians, total=totals[way])
    told = ", ".join(f"{way} {total:.1f} s" for way, total in totals.items())
    report.finish(f"from the kill to the next first step done: {told}", arguments.json)


if __name__ == "__main__":
    main()
