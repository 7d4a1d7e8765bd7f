"""``trainer/watchdog.py``: a rank that does not move says where it stands, and ends; real hung processes."""

import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from trainer import exits

ROOT = Path(__file__).resolve().parents[2]

START = """
import ctypes, re, signal, threading, time
import torch
from trainer.watchdog import Watchdog
from trainer.world import World
watchdog = Watchdog(World(1, 3, 1, 2, torch.device("cpu")), 1.0)
"""


def run(program: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", START + program]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_a_rank_that_hangs_says_where_and_ends():
    """The main thread sleeps; what it was in, and what the other thread waits for, are printed."""
    done = run("""
def wait_for_work():
    threading.Event().wait()
def stuck():
    time.sleep(1000)
threading.Thread(target=wait_for_work, name="reader", daemon=True).start()
watchdog.beat("step 17, teacher")
stuck()
""")
    assert done.returncode == exits.LOST
    assert re.search(
        r"hung: rank 1 of 3 \(.+, process \d+\) has not moved for 1 s. It was in: step 17, teacher",
        done.stderr,
    )
    main, reader = done.stderr.index("thread MainThread"), done.stderr.index("thread reader")
    assert main < done.stderr.index("in stuck") and reader < done.stderr.index("in wait_for_work")
    assert "in _watch" not in done.stderr


@pytest.mark.parametrize(
    "hold",
    ["ctypes.PyDLL(None).sleep(1000)", "re.match('(a+)+$', 'a' * 60 + 'b')"],
    ids=["C code", "regular expression"],
)
def test_code_that_holds_the_interpreter_lock_is_ended_too(hold):
    """The watchdog's thread cannot run: timers of the C library print the stack and end the process."""
    done = run(f"""
def stuck():
    {hold}
stuck()
""")
    assert done.returncode == -signal.SIGALRM
    assert "in stuck" in done.stderr


def test_it_is_quiet_while_beats_come_and_once_closed():
    """Beats for longer than the limit, a higher limit, and none: nothing of it is left behind."""
    done = run("""
for _ in range(15):
    watchdog.beat("step")
    time.sleep(0.1)
watchdog.limit(1000)
time.sleep(2)
watchdog.limit(0.5)
watchdog.close()
time.sleep(2)
print(signal.getitimer(signal.ITIMER_REAL), threading.active_count())
""")
    assert (done.returncode, done.stdout, done.stderr) == (0, "(0.0, 0.0) 1\n", "")
