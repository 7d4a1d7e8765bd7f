"""One run of a sweep: its process, and what its folder tells of the trials in it."""

import ctypes
import json
import math
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from safetensors import safe_open

from configs.public import public
from configs.sweep import SPEED
from launcher.policy import outcome
from launcher.run_record import read_lines
from trainer import exits

PR_SET_PDEATHSIG = 1  # linux/prctl.h
_PRCTL = ctypes.CDLL(None).prctl
TAIL_LINES, TAIL_CHARS = 12, 2000
_KEPT = {"heldout": ("evaluations.jsonl", "losses"), "probe": ("probes.jsonl", "scores")}
_PLACE = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "OMPI_COMM_WORLD_RANK", "SLURM_STEP_ID")


@dataclass(frozen=True)
class Slot:
    """The part of this machine that one run has."""

    cores: tuple[int, ...]
    devices: tuple[str, ...]
    """As ``CUDA_VISIBLE_DEVICES`` names them; empty on CPU."""


def slots(jobs: int, cores: Sequence[int], devices: Sequence[str]) -> list[Slot]:
    """Return the parts of a machine for so many runs at a time, of nearly equal size.

    Where there are more runs than cores or devices, they share them.
    """

    def shares(whole: Sequence[Any]) -> list[tuple[Any, ...]]:
        if len(whole) < jobs:
            return [
                tuple(whole[job % len(whole) : job % len(whole) + 1]) if whole else () for job in range(jobs)
            ]
        return [
            tuple(whole[len(whole) * job // jobs : len(whole) * (job + 1) // jobs]) for job in range(jobs)
        ]

    return [Slot(own, devs) for own, devs in zip(shares(cores), shares(devices), strict=True)]


class TrialRun:
    """A run, as a process that ends when this one does: it is asked to save and leave."""

    def __init__(
        self, folder: Path, script: str, arguments: Sequence[str], slot: Slot, log: BinaryIO
    ) -> None:
        """Start it, or go on with it; one that has finished already is not started.

        Args:
            folder: the run folder.
            script: such as ``launcher/general.py``.
            log: open and locked; the run inherits it, and with it the lock.
        """
        self.folder, self.slot, self.log = folder, slot, log
        self._seen, self._asked = len(self._events()), False
        self._process = None if self.finished() else self._start(script, arguments)

    def _start(self, script: str, arguments: Sequence[str]) -> subprocess.Popen[bytes]:
        path, ranks = Path(__file__).resolve().parents[1] / script, len(self.slot.devices)
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        self._torchrun = ranks > 1
        command = [sys.executable, *(launcher if self._torchrun else []), str(path), *arguments]
        environment = {name: value for name, value in os.environ.items() if name not in _PLACE}
        environment["OMP_NUM_THREADS"] = str(max(1, len(self.slot.cores) // max(1, ranks)))
        if self.slot.devices:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(self.slot.devices)

        def before_exec() -> None:
            os.sched_setaffinity(0, self.slot.cores)
            _PRCTL(PR_SET_PDEATHSIG, signal.SIGTERM)

        self.log.write(public(f"$ {shlex.join(command)}\n").encode())
        self.log.flush()
        return subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=self.log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # a Ctrl-C on the terminal is the sweep's
            preexec_fn=before_exec,
        )

    def ended(self) -> int | None:
        """Return the run's exit code, see ``trainer.exits``; None while it runs."""
        if self._process is None:
            return exits.DONE
        code = self._process.poll()
        return None if code is None else outcome(code, self._events()[self._seen :], self._torchrun)

    def ask(self, number: int) -> None:
        """Send it a signal, once: on SIGTERM it saves and leaves, on SIGINT it just leaves."""
        if self._process is not None and not self._asked:
            self._process.send_signal(number)
            self._asked = True

    def finished(self) -> bool:
        """Return whether the run has trained and exported all its students but those that failed."""
        return "finished" in self._events()

    def retired(self, student: str) -> str | None:
        """Return why a student failed, if it did."""
        entries = [entry for entry in read_lines(self.folder / "events.jsonl") if entry["event"] == "retired"]
        return next((entry["reason"] for entry in entries if entry["student"] == student), None)

    def tail(self) -> str:
        """Return the end of what the run printed."""
        lines = Path(self.log.name).read_text(encoding="utf-8", errors="replace").splitlines()
        return "\n".join([line for line in lines if line.strip()][-TAIL_LINES:])[-TAIL_CHARS:]

    def series(self, metric: str, student: str) -> dict[int, float]:
        """Return a ``heldout/...`` or ``probe/...`` metric by optimizer step."""
        source, _, key = metric.partition("/")
        file, what = _KEPT[source]
        return {
            entry["step"]: entry[what][key]
            for entry in read_lines(self.folder / file)
            if entry["student"] == student and key in entry[what]
        }

    def value(self, metric: str, student: str, row_tokens: int) -> float:
        """Return what a trial is judged by.

        Raises:
            ValueError: the run does not have it, or it is not a number.
        """
        if metric.startswith("student/"):
            return _of_export(self.folder / "export" / student, metric, row_tokens)
        if metric == SPEED:
            summary = json.loads((self.folder / "summary.json").read_text(encoding="utf-8"))
            return float(summary["rows_per_s"])
        series = self.series(metric, student)
        if not series:
            file, what = _KEPT[metric.partition("/")[0]]
            own = {key: None for entry in read_lines(self.folder / file) for key in entry[what]}
            raise ValueError(f"{metric} is not in {self.folder / file}; there are {', '.join(own) or 'none'}")
        value = series[max(series)]
        if math.isnan(value):
            raise ValueError(f"{metric} is not a number after step {max(series)}")
        return value

    def _events(self) -> list[str]:
        return [entry["event"] for entry in read_lines(self.folder / "events.jsonl")]


def _of_export(folder: Path, metric: str, row_tokens: int) -> float:
    if metric == "student/parameters":
        with safe_open(folder / "model.safetensors", "np") as weights:
            shapes = [weights.get_slice(name).get_shape() for name in weights.keys()]
        return float(sum(math.prod(shape) for shape in shapes))
    # Seconds to import, and most sweeps do without.
    import torch

    from trainer.capture import Need
    from trainer.encoders import read_config
    from trainer.flops import teacher_row_flops
    from trainer.latency import measure
    from trainer.served import load_served, torch_forward

    if metric == "student/row_flops":
        config = read_config("model", str(folder))
        last = frozenset({config.num_hidden_layers})
        return float(teacher_row_flops(config, row_tokens, Need(hidden=last)))
    model = load_served(folder).to("cuda" if torch.cuda.is_available() else "cpu")  # type: ignore[arg-type]
    forward, vocabulary = {"student": torch_forward(model)}, model.config.vocab_size
    (latency,) = measure(forward, rows=(1,), seq_len=row_tokens, vocab_size=vocabulary)
    return latency.p50_ms
