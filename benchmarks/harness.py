"""What all benchmarks share: interleaved repeats, medians, the machine, a table, JSON."""

import argparse
import ctypes
import gc
import json
import multiprocessing
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table


def benchmark_parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser of ``json`` (a path or None) and ``quick``, to which a benchmark may add its own."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write all figures there")
    parser.add_argument("--quick", action="store_true", help="fewer sizes and repeats: does it run at all?")
    return parser


def parse_arguments(description: str | None) -> argparse.Namespace:
    """Return ``json`` and ``quick``."""
    return benchmark_parser(description).parse_args()


def interleaved_medians(candidates: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Return the median seconds of every candidate; they take turns, so that noise meets all alike.

    One turn before the first counted one warms up. On CUDA every call is waited for.
    """
    taken_s: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(repeats + 1):
        for name, call in candidates.items():
            started_s = time.perf_counter()
            call()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if turn > 0:
                taken_s[name].append(time.perf_counter() - started_s)
    return {name: statistics.median(own_s) for name, own_s in taken_s.items()}


def peak_apart(make: Callable[..., Callable[[], object]], *arguments: Any, limit_gib: float) -> float | None:
    """Return the peak memory in MiB of one call of ``make(*arguments)``, beyond what was there before it.

    Measured in a process of its own, on the second call: on CPU as resident memory, on CUDA as what torch has
    allocated. None where the call needs more than ``limit_gib``. ``make`` must be importable.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        try:
            return pool.submit(_peak, make, arguments, limit_gib).result()
        except BrokenProcessPool:  # killed for its memory
            return None


def _peak(
    make: Callable[..., Callable[[], object]], arguments: tuple[Any, ...], limit_gib: float
) -> float | None:
    call = make(*arguments)
    resource.setrlimit(resource.RLIMIT_AS, (_status_kib("VmSize") * 1024 + int(limit_gib * 2**30),) * 2)
    try:
        call()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            call()
            return (torch.cuda.max_memory_allocated() - before) / 2**20
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak starts from here
        before = _status_kib("VmRSS")
        call()
        return (_status_kib("VmHWM") - before) / 1024
    except (MemoryError, RuntimeError) as error:
        if "memory" not in str(error):
            raise
        return None


def _status_kib(field: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


def machine() -> str:
    """Return what ran this: processor, cores, threads, accelerator, torch."""
    processor = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            processor = line.split(":", 1)[1].strip()
            break
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    cores = len(os.sched_getaffinity(0))
    return (
        f"{processor}, {cores} cores, {torch.get_num_threads()} threads, {device}, torch {torch.__version__}"
    )


@dataclass
class Report:
    """Rows of figures on their way to a table, a JSON file and a last line."""

    title: str
    rows: list[dict[str, Any]] = field(default_factory=list)

    def add(self, **figures: Any) -> None:
        """Add one row; the first row's keys are the columns."""
        self.rows.append(figures)

    def finish(self, headline: str, json_path: Path | None) -> None:
        """Print the table, the machine and the headline (last), and write the JSON."""
        table = Table(*self.rows[0], title=self.title)
        for row in self.rows:
            table.add_row(*(_shown(value) for value in row.values()))
        console = Console(width=None if sys.stdout.isatty() else 140)
        console.print(table)
        console.print(f"machine: {machine()}", highlight=False)
        if json_path is not None:
            found = {"title": self.title, "machine": machine(), "rows": self.rows, "headline": headline}
            json_path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        console.print(headline, highlight=False)


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
