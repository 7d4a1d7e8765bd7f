"""Builders that are killed: ``kill -9`` at random points, 50 times in all, and the same bytes in the end."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import psutil
import pytest

from sharding.manifest import open_corpus
from sharding.verify import verify
from tests.conftest import WORDS
from tests.sharding.test_build import files_of

KILLS = 50
WARM_BUILDER = Path(__file__).with_name("warm_builder.py")


@pytest.fixture
def keys(tiny_tokenizer: Path, tmp_path: Path) -> list[str]:
    """A build of 24 parts and some 25 shards, near duplicates among the documents."""
    generator = np.random.default_rng(2)
    (tmp_path / "text").mkdir()
    for part in range(24):
        lines = [" ".join(generator.choice(WORDS, size=60)) for _ in range(150)]
        lines[20:30] = [line + " bade" for line in lines[:10]]
        (tmp_path / "text" / f"{part:02d}.txt").write_text("\n".join(lines))
    return [
        f"tokenizer={tiny_tokenizer}",
        "source.kind=text",
        f"source.path={tmp_path / 'text'}",
        "source.one_per_line=true",
        "deduplicate=near",
        "seq_len=32",
        "block_rows=64",
        "max_shard_bytes=30720",
        "heldout_share=0.05",
        "processes=2",
    ]


class Builder:
    """Starts builds, one at a time."""

    def __init__(self, keys: list[str]) -> None:
        self.keys = keys
        environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
        self.process = subprocess.Popen(
            [sys.executable, str(WARM_BUILDER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
        )

    def start(self, output: Path) -> int:
        """Returns the process id."""
        return self._ask(json.dumps(["build", f"output={output}", *self.keys]))

    def exit_code(self) -> int:
        """Waits for the build to end."""
        return self._ask("")

    def _ask(self, line: str) -> int:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        while not (answer := self.process.stdout.readline().strip()).lstrip("-").isdigit():
            assert answer, "the builder is gone"  # what a build prints is passed over
        return int(answer)


def pieces(partial: Path) -> int:
    """Runs and shards that are finished, and a file or two more."""
    names = [name for _, _, names in os.walk(partial) for name in names]  # folders may vanish meanwhile
    return sum(name.endswith((".npz", ".json")) for name in names)


def phase(partial: Path) -> str:
    if (partial / "plan.npz").exists():
        return "pack"
    return "prepare" if any(partial.glob("runs/*.npz")) else "start"


def ends(pid: int) -> bool:
    """Whether a process that its parent will wait for has ended."""
    return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_killed_at_fifty_random_points(keys: list[str], tmp_path: Path) -> None:
    builder = Builder(keys)
    builder.start(tmp_path / "plain")
    assert builder.exit_code() == 0
    plain = files_of(tmp_path / "plain")
    assert len(plain) > 20 and verify(open_corpus(tmp_path / "plain")) == []
    chance = random.Random(4)
    killed: Counter[str] = Counter()
    finished = 0
    while killed.total() < KILLS:
        output = tmp_path / f"killed{finished}"
        partial = Path(f"{output}.partial")
        before, wanted = pieces(partial), chance.choice([0, 1, 2, 3])
        pid = builder.start(output)
        while pieces(partial) < before + wanted and not ends(pid):
            time.sleep(0.002)
        time.sleep(chance.uniform(0, 0.4 if wanted == 0 else 0.1))
        os.kill(pid, signal.SIGKILL)
        code = builder.exit_code()
        if code == -signal.SIGKILL and not (output / "manifest.json").exists():
            killed[phase(partial)] += 1
        else:
            assert files_of(output) == plain
            finished += 1
    builder.start(output)
    assert builder.exit_code() == 0 and files_of(output) == plain
    assert killed["prepare"] >= 10 and killed["pack"] >= 10, killed
    builder.process.kill()
    builder.process.wait()
