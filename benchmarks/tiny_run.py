"""A tiny run of ``launcher/general.py`` to be broken: what it needs, its ranks as processes, what it left.

Two students learn from a random teacher of 4 layers x 48, with dropout. It saves in the background.
"""

import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor
from transformers import BertModel
from transformers.utils import logging as transformers_logging

from tests.conftest import write_tiny_corpus, write_tiny_tokenizer
from tests.launcher.conftest import student, write_teacher
from trainer import checkpoint as checkpoints

ROOT = Path(__file__).resolve().parents[1]
BATCH_ROWS = 24
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
POLL_S = 0.02


def write_material(folder: Path) -> None:
    """Write the tokenizer, teacher and corpus that all runs under ``folder`` use."""
    transformers_logging.disable_progress_bar()
    tokenizer = write_tiny_tokenizer(folder / "tokenizer")
    write_teacher(folder / "teacher", tokenizer, BertModel)
    write_tiny_corpus(folder / "corpus", tokenizer)


def tiny_config(folder: Path, steps: int, dropout: bool = True) -> dict[str, Any]:
    """A run's config as a tree, without ``output``; its batch divides by 1, 2 and 3 ranks."""
    shape: dict[str, Any] = {} if dropout else {"overrides": NO_DROPOUT}
    students = [student("small", **shape), student("other", layers=4, layer_map=[1, 2, 3, 4], **shape)]
    return {
        "name": "tiny",
        "teacher": {"model": str(folder / "teacher"), "precision": "fp32"},
        "students": students,
        "data": {"corpus": str(folder / "corpus"), "group_blocks": 2},
        "train": {"global_batch_rows": BATCH_ROWS, "micro_batch_rows": 4, "steps": steps, "threads": 1},
        "evaluation": {"every_steps": 10, "rows": 24},
        "checkpoint": {"every_steps": 2},
        "timeouts": {"start_s": 60.0, "step_s": 30.0},
        "log": {"every_steps": 1, "report": False},
        "tracking": {"enabled": False},
    }


def free_port() -> str:
    """Return a port of the loopback interface that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def last_step(log: str) -> int:
    """Return the last step that a run's log tells the losses of, 0 if none."""
    steps = re.findall(r"step (\d+)/\d+ .* loss ", log)
    return int(steps[-1]) if steps else 0


class TinyRun:
    """One run folder, started as often as it takes."""

    def __init__(self, output: Path, config: dict[str, Any]) -> None:
        self.output, self.checkpoints = output, output / "checkpoints"
        self.config = output.with_suffix(".yaml")
        self.config.write_text(yaml.safe_dump({**config, "output": str(output)}), encoding="utf-8")
        self.steps: int = config["train"]["steps"]
        self.starts = 0
        self.startup_s = 10.0  # a guess of the time to the end of the first step

    def start(self, ranks: int, zero_stage: int) -> "Life":
        """Start all ranks, as torchrun does."""
        self.starts += 1
        script = [str(ROOT / "launcher/general.py"), "--config", str(self.config)]
        log = self.output.with_name(f"{self.output.name}-{self.starts:03d}.log")
        return Life(self, [sys.executable, *script, f"deepspeed.zero_stage={zero_stage}"], ranks, log)

    def events(self, since_bytes: int = 0) -> list[dict[str, Any]]:
        """Return what ``events.jsonl`` says from there on, with its times in seconds, ``at_s``."""
        try:
            with (self.output / "events.jsonl").open("rb") as file:
                file.seek(since_bytes)
                lines = file.read().splitlines(keepends=True)
        except FileNotFoundError:
            return []
        found = [json.loads(line) for line in lines if line.endswith(b"\n")]  # the last may be on its way
        return [{**event, "at_s": datetime.fromisoformat(event["at"]).timestamp()} for event in found]

    def event_bytes(self) -> int:
        """Return the size of ``events.jsonl``."""
        path = self.output / "events.jsonl"
        return path.stat().st_size if path.exists() else 0

    def newest_step(self) -> int:
        """Return the step of the newest checkpoint whose files are as they were written; 0 without one."""
        for path in reversed(checkpoints.list_complete(self.checkpoints)):
            if not checkpoints.verify(path):
                return checkpoints.step_of(path)
        return 0

    def saving(self) -> bool:
        """Return whether a checkpoint is being written at this moment."""
        return any(self.checkpoints.glob(".step-*.partial"))

    def state(self) -> tuple[checkpoints.Progress, dict[str, Tensor]]:
        """Return the newest checkpoint's progress, and all students' weights and moments by name."""
        newest = checkpoints.load(checkpoints.list_complete(self.checkpoints)[-1])
        tensors = {
            f"{name}/{kind}/{key}": value
            for name, student in newest.students.items()
            for kind, part in (("weights", student.weights), ("moments", student.moments))
            for key, value in part.items()
        }
        return newest.progress, tensors

    def losses(self) -> dict[tuple[int, str], float]:
        """Return the total held-out losses by step and student; of repeated ones the last."""
        lines = (self.output / "evaluations.jsonl").read_text(encoding="utf-8").splitlines()
        entries = [json.loads(line) for line in lines]
        return {(entry["step"], entry["student"]): entry["losses"]["total"] for entry in entries}


class Life:
    """One start of a run, from its processes' start to their end. Every rank leads a process group."""

    def __init__(self, run: TinyRun, command: list[str], ranks: int, log: Path) -> None:
        self.run, self.log = run, log
        self.since_s, self.since_bytes = time.time(), run.event_bytes()
        world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "DS_ACCELERATOR": "cpu"}
        world |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
        self.ranks: list[subprocess.Popen[bytes]] = []
        with log.open("wb") as file:
            for rank in range(ranks):
                place = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                process = subprocess.Popen(
                    command,
                    cwd=log.parent,
                    env={**os.environ, **world, **place},
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
                self.ranks.append(process)

    def events(self) -> list[dict[str, Any]]:
        """Return what has happened in this life."""
        return self.run.events(self.since_bytes)

    def training(self) -> bool:
        """Return whether this life has done its first step."""
        return self.count("training") > 0

    def count(self, name: str) -> int:
        """Return how many events of this name there were in this life."""
        return sum(event["event"] == name for event in self.events())

    def running(self) -> bool:
        """Return whether no rank has ended."""
        return all(process.poll() is None for process in self.ranks)

    def until(self, reached: Callable[[], bool], limit_s: float = 60.0, poll_s: float = POLL_S) -> bool:
        """Wait for it; False when a rank ends, or the limit is over, before."""
        until_s = time.monotonic() + limit_s
        while not reached():
            if time.monotonic() > until_s or not self.running():
                return False
            time.sleep(poll_s)
        return True

    def pause(self, seconds: float) -> bool:
        """Let the time go by; False when a rank ends before."""
        self.until(lambda: False, seconds)
        return self.running()

    def wait(self, limit_s: float) -> list[int | None]:
        """Wait for all ranks to end by themselves; return their exit codes, None where one still runs."""
        until_s = time.monotonic() + limit_s
        while any(process.poll() is None for process in self.ranks) and time.monotonic() < until_s:
            time.sleep(POLL_S)
        return [process.returncode for process in self.ranks]

    def end(self) -> None:
        """Kill what is left of every rank, its reader processes too."""
        for process in self.ranks:
            try:
                os.killpg(process.pid, 9)
            except ProcessLookupError:
                pass
            process.wait()

    def said(self) -> str:
        """Return all that its ranks have printed."""
        return self.log.read_text(encoding="utf-8", errors="replace")

    def last_step(self) -> int:
        """Return the last step that this life has logged, 0 if none."""
        return last_step(self.said())

    def tail(self, lines: int = 25) -> str:
        """Return the end of what its ranks said."""
        return "\n".join(self.said().splitlines()[-lines:])
