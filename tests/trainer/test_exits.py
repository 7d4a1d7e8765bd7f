"""Exit codes are a contract with job scripts."""

import subprocess
import sys

from trainer import exits


def test_they_are_told_apart_and_from_signals():
    codes = [exits.DONE, exits.FAILED, exits.WRONG, exits.STOPPED, exits.LOST]
    assert codes == [0, 1, 2, 75, 76], "job scripts and docs/reliability.md name these"
    assert len({*codes, exits.INTERRUPTED}) == 6 and max(codes) < 128


def test_what_may_heal_is_to_be_tried_again():
    refused, reset, full = ValueError("a key"), ConnectionResetError("a link"), OSError("a full disk")
    assert [exits.of(error) for error in (refused, reset, full)] == [exits.WRONG, exits.LOST, exits.FAILED]


def test_a_process_that_leaves_runs_what_is_registered_and_says_what_it_has_printed():
    script = "import atexit; from trainer import exits; atexit.register(print, 'end'); "
    script += "print('done'); exits.leave(75)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (exits.STOPPED, "done\nend\n")
