"""A run put together, on a world of one: new, and as a checkpoint has it."""

import os
import subprocess
import sys
from typing import Any

from tests.launcher.conftest import ROOT, student, written


def test_a_run_is_what_its_config_and_checkpoint_say(run_config: dict[str, Any]) -> None:
    """What is asserted stands in ``assembly_worker.py``, which uses ``launcher/assembly.py``."""
    run_config["students"].append(student("other", layers=1))
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests/launcher/assembly_worker.py"), written(run_config)],
        capture_output=True,
        text=True,
        timeout=200,
        env={**os.environ, "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu"},
    )
    assert done.returncode == 0, done.stderr
