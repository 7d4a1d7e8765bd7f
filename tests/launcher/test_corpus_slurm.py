"""The job scripts of a build, run as Slurm runs them: a process for each task, in any order, one killed.

A real controller belongs to the tests of job scripts; here a stand-in for sbatch runs what it is given.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from sharding.manifest import open_corpus
from tests.conftest import WORDS
from tests.launcher.conftest import ROOT
from tests.sharding.test_build import files_of

SCRIPTS = ROOT / "launcher" / "slurm"

SBATCH = """#!/usr/bin/env bash
# Runs every task of the array, the last one first; fails if what it depends on has not run.
set -euo pipefail
job=$(($(ls "$JOBS" | wc -l) + 1))
echo "$@" > "$JOBS/$job"
while [[ $1 == --* ]]; do
    case "$1" in
        --array=0) last=0 ;;
        --array=0-*) last="${1#--array=0-}" ;;
        --dependency=afterok:*) [[ -e "$JOBS/${1#--dependency=afterok:}" ]] ;;
    esac
    shift
done
for ((task = last; task >= 0; task--)); do
    SLURM_ARRAY_TASK_ID=$task SLURM_CPUS_PER_TASK=1 SLURM_SUBMIT_DIR="$PWD" bash "$@" >&2
done
echo "$job;cluster"
"""


@pytest.fixture
def keys(tiny_tokenizer: Path, tmp_path: Path) -> list[str]:
    """A build of 7 parts."""
    random = np.random.default_rng(6)
    (tmp_path / "text").mkdir()
    for part in range(7):
        lines = (" ".join(random.choice(WORDS, size=60)) for _ in range(400))
        (tmp_path / "text" / f"{part}.txt").write_text("\n".join(lines))
    sizes = ["seq_len=32", "block_rows=64", "max_shard_bytes=40960"]
    source = ["source.kind=text", f"source.path={tmp_path / 'text'}", "source.one_per_line=true"]
    return [f"tokenizer={tiny_tokenizer}", *source, *sizes]


@pytest.fixture
def plain(keys: list[str], tmp_path: Path) -> dict[str, bytes]:
    """What one build of it makes."""
    command = [sys.executable, "launcher/corpus.py", "build", f"output={tmp_path / 'plain'}", *keys]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return files_of(tmp_path / "plain")


def start(stage: str, task: int, arguments: list[str]) -> subprocess.Popen[str]:
    environment = {
        **os.environ,
        "PYTHON": sys.executable,
        "SLURM_SUBMIT_DIR": str(ROOT),
        "SLURM_ARRAY_TASK_ID": str(task),
        "SLURM_CPUS_PER_TASK": "1",
    }
    script = str(SCRIPTS / "corpus.sbatch")
    return subprocess.Popen(
        ["bash", script, stage, "3", *arguments], env=environment, stderr=subprocess.PIPE, text=True
    )


def test_tasks_in_any_order_one_killed_and_repeated(
    keys: list[str], plain: dict[str, bytes], tmp_path: Path
) -> None:
    output = tmp_path / "corpus"
    arguments = [f"output={output}", *keys]
    made = {"prepare": "runs/*.npz", "pack": "shards/*/*.json"}
    for stage, pattern in made.items():
        both = [start(stage, task, arguments) for task in (2, 0)]
        while not list(Path(f"{output}.partial").glob(pattern)):
            assert any(task.poll() is None for task in both)
            time.sleep(0.01)
        both[1].kill()
        errors = [task.communicate()[1] for task in both]
        assert both[0].returncode == 0, errors
        for task in (1, 0):
            again = start(stage, task, arguments)
            assert (again.communicate()[1], again.returncode) == ("", 0)
        assert not output.exists()
    last = start("join", 0, arguments)
    assert (last.communicate()[1], last.returncode) == ("", 0)
    assert files_of(output) == plain and len(open_corpus(output).split("train").shards) > 5
    assert not Path(f"{output}.partial").exists()


def test_three_jobs_follow_each_other(keys: list[str], plain: dict[str, bytes], tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "jobs").mkdir()
    (tmp_path / "bin" / "sbatch").write_text(SBATCH)
    (tmp_path / "bin" / "sbatch").chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "JOBS": str(tmp_path / "jobs"),
        "PYTHON": sys.executable,
    }
    command = ["bash", str(SCRIPTS / "corpus.sh"), "2", f"output={tmp_path / 'corpus'}", *keys]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "prepare 1, pack 2, join 3\n"), done.stderr
    assert files_of(tmp_path / "corpus") == plain
    asked = [(tmp_path / "jobs" / str(job)).read_text().split() for job in (1, 2, 3)]
    assert all(option in asked[1] for option in ("--dependency=afterok:1", "--kill-on-invalid-dep=yes"))
    assert "--dependency=afterok:2" in asked[2]


@pytest.mark.parametrize("arguments", [[], ["3"], ["0", "output=x"], ["--config", "x.yaml"]])
def test_the_number_of_tasks_is_asked_for(arguments: list[str]) -> None:
    done = subprocess.run(["bash", str(SCRIPTS / "corpus.sh"), *arguments], capture_output=True, text=True)
    assert done.returncode == 2 and "usage: launcher/slurm/corpus.sh TASKS" in done.stderr
