"""``make demo``'s command on its real inputs, interrupted as a person would, and started again."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from transformers import AutoModel

from sharding.manifest import open_corpus
from tests.conftest import heed_interrupts
from tests.launcher.conftest import ROOT, evaluations

pytestmark = pytest.mark.network_of_ranks

SHORT = ["train.epochs=null", "train.steps=8", "evaluation.rows=32", "checkpoint.every_steps=2"]


def test_interrupted_and_started_again_the_demo_goes_on(tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    command = [sys.executable, str(ROOT / "launcher/demo.py"), "--folder", str(folder), *SHORT]
    process = subprocess.Popen(
        command,
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        preexec_fn=heed_interrupts,
    )
    saved = folder / "run/checkpoints/step-00000002/files.json"
    while not saved.exists():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)  # Ctrl-C reaches everything in the terminal's foreground
    printed = process.communicate(timeout=60)[0]
    assert process.returncode == 130, printed
    assert "the same command goes on from the last checkpoint" in printed
    fingerprint = open_corpus(folder / "corpus").fingerprint

    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "resumed at step" in done.stderr
    assert open_corpus(folder / "corpus").fingerprint == fingerprint
    losses = [entry["losses"]["total"] for entry in evaluations(str(folder / "run"))]
    assert losses[-1] < losses[0]
    assert "fell by" in done.stdout and "speed-up" in done.stdout and "make ui" in done.stdout
    assert AutoModel.from_pretrained(folder / "run/export/tiny-3x192").config.num_hidden_layers == 3
