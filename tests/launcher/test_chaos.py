"""The short form of ``make chaos``: faults of every kind in real runs, survived; ends as in quiet runs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launcher.conftest import ROOT

pytestmark = pytest.mark.network_of_ranks


def test_a_few_faults_of_every_kind_are_survived(tmp_path: Path) -> None:
    """``launcher/general.py`` killed, asked to leave, without disk, behind a damaged checkpoint, resized."""
    command = [
        sys.executable,
        str(ROOT / "benchmarks/chaos.py"),
        "--quick",
        "--json",
        str(tmp_path / "found"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=800)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "found").read_text(encoding="utf-8"))
    times = sum(row["times"] for row in found["rows"])
    assert times == sum(row["survived"] for row in found["rows"]) == 7
    assert {row["rows off at the end"] for row in found["rows"]} == {0}
