"""Exit codes of a run, for those who start it: ``launcher/supervise.py``, job scripts, people."""

import atexit
import os
import sys
from typing import NoReturn

DONE = 0
FAILED = 1  # started again it would fail again: by ``train.non_finite``, or a disk
WRONG = 2  # something for the user to correct
STOPPED = 75  # asked to leave (a signal, ``train.max_hours``): saved; start again. sysexits.h's EX_TEMPFAIL
LOST = 76  # another rank was lost, or nothing moved for too long; start it again from the newest checkpoint
INTERRUPTED = 130  # Ctrl-C


def of(error: Exception) -> int:
    """Return the code for an error that ends a run: what may heal by itself is to be tried again."""
    if isinstance(error, ConnectionError):
        return LOST
    return WRONG if isinstance(error, ValueError) else FAILED


def leave(code: int) -> NoReturn:
    """End this process with ``code``: what is registered for the end runs, what is printed goes out, no more.

    Python would then take itself down while gloo's threads may still hold tensors of the last collectives;
    what they let go of after that ends the process with SIGABRT (torch 2.13; on busy machines one in six
    ends of a rank with many engines).
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
