"""Runs in which a rank hangs, stops, breaks or loses its way: all end in bounded time and say why."""

import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.launcher.conftest import ROOT, written
from trainer import exits

# The third step of some ranks is not what it should be. Everything else is the run itself.
FAULTS = """
import ctypes, os, signal, sys, time
sys.path.insert(0, sys.argv.pop(1))
import configs
import torch
from trainer import loop
step = loop.accumulate_gradients

def other_step(run, batch):
    rank = run.world.rank
    if run.progress.step == 2:
        FAULT
    return step(run, batch)

loop.accumulate_gradients = other_step
from launcher.general import main
sys.exit(main())
"""
HANGS = """
        if rank == 1:
            time.sleep(1000)
        if rank == 2:
            ctypes.PyDLL(None).sleep(1000)  # C code that does not let other threads run
        if rank == 3:
            os.kill(os.getpid(), signal.SIGSTOP)
"""
BUG = """
        if rank == 1:
            raise RuntimeError("a bug on one rank")
"""
LOST_WAY = """
        if rank == 1:
            torch.distributed.all_reduce(torch.ones(1000))
"""


def start(config: dict[str, Any], ranks: int, fault: str, *overrides: str) -> list[subprocess.Popen[str]]:
    """The ranks of a run on this host, in processes of their own without a launcher that would end them."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
    place |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "DS_ACCELERATOR": "cpu"}
    program = FAULTS.replace("FAULT", fault.strip(), 1)
    command = [sys.executable, "-c", program, str(ROOT), "--config", written(config), *overrides]
    return [
        subprocess.Popen(
            command,
            env={**os.environ, **place, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]


def test_every_rank_that_can_speak_says_where_it_hangs(run_config: dict[str, Any]) -> None:
    """Asleep, in C code with the interpreter's lock, stopped; rank 0 waits for them in a collective."""
    overrides = ["train.micro_batch_rows=2", "timeouts.step_s=3", "evaluation.every_steps=null"]
    ranks = start(run_config, 4, HANGS, *overrides)
    try:
        waiting, asleep, locked = (rank.communicate(timeout=120)[1] for rank in ranks[:3])
        assert [rank.returncode for rank in ranks] == [exits.LOST, exits.LOST, -signal.SIGALRM, None]
    finally:
        ranks[3].kill()  # as launchers do; a stopped process does nothing more
        ranks[3].communicate()
    for number, text, within in ((0, waiting, "sum_over_ranks"), (1, asleep, "other_step")):
        said = rf"hung: rank {number} of 4 \(.*\) has not moved for 3 s. It was in: step 3\n"
        assert re.search(said, text), text
        assert f"in {within}\n" in text.partition("thread MainThread:")[2].partition("thread ")[0]
    assert "in other_step" in locked


def test_a_bug_on_one_rank_ends_the_others(run_config: dict[str, Any]) -> None:
    """It has its traceback and its code; the other rank says that it lost a peer."""
    first, second = start(run_config, 2, BUG, "timeouts.step_s=5")
    outputs = [rank.communicate(timeout=120)[1] for rank in (first, second)]
    assert [rank.returncode for rank in (first, second)] == [exits.LOST, exits.FAILED]
    assert re.search(r"error: rank 0 \(.*\) lost contact with another rank: ", outputs[0])
    assert "RuntimeError: a bug on one rank" in outputs[1] and "lost contact" not in outputs[1]
    assert (Path(run_config["output"]) / "checkpoints/step-00000002").is_dir()


def test_a_collective_too_many_ends_all(run_config: dict[str, Any]) -> None:
    """Gloo notices other sizes, and aborts the process (torch 2.13); what would go on hangs."""
    ranks = start(run_config, 2, LOST_WAY, "timeouts.step_s=5")
    outputs = [rank.communicate(timeout=120)[1] for rank in ranks]
    ended = {rank.returncode for rank in ranks}
    assert ended <= {exits.LOST, -signal.SIGABRT}, (ended, outputs)
