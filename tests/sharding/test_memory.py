"""The memory of a build does not grow with its source: measured on processes of their own, at 1x and 4x."""

import gzip
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import WORDS

MEGABYTE = 1 << 20

# Parts, pieces and shards of a size that makes many of them of a source that is quickly made.
SCRIPT = """
import re, sys
from pathlib import Path
import sharding.build, sharding.prepare, sharding.sources
from configs.corpus_schema import CorpusConfig, SourceConfig, SourceKind
from sharding.merge import make_shard
from sharding.prepare import make_run

def tell(phase):
    # ru_maxrss of a new process begins with what its parent held when it forked.
    peak = re.search(r"VmHWM:\\s*(\\d+) kB", Path("/proc/self/status").read_text())
    with open(sys.argv[2] + ".peaks", "a") as file:
        print(phase, peak[1], file=file)

def measured_run(*arguments):
    made = make_run(*arguments)
    tell("prepare")
    return made

def measured_shard(*arguments):
    made = make_shard(*arguments)
    tell("pack")
    return made

if __name__ == "__main__":
    sharding.sources.PART_BYTES, sharding.prepare.PIECE_CHARS = 500_000, 500_000
    sharding.build.make_run, sharding.build.make_shard = measured_run, measured_shard
    source = SourceConfig(kind=SourceKind.text, path=sys.argv[1], one_per_line=True)
    config = CorpusConfig(
        output=sys.argv[2], source=source, tokenizer=sys.argv[3], max_shard_bytes=500_000, processes=1
    )
    sharding.build.build(config, progress=False)
    tell("parent")
"""


@pytest.mark.parametrize("sequential", [False, True])
def test_memory_is_flat(tiny_tokenizer: Path, tmp_path: Path, sequential: bool) -> None:
    script = tmp_path / "build.py"
    script.write_text(SCRIPT)
    random = np.random.default_rng(0)
    peaks = {}
    for size in (5 * MEGABYTE, 20 * MEGABYTE):
        words = random.choice(WORDS, size=size // 5).reshape(-1, 256)
        text = "\n".join(" ".join(line) for line in words)
        path = tmp_path / (f"{size}.txt.gz" if sequential else f"{size}.txt")
        path.write_bytes(gzip.compress(text.encode(), 1) if sequential else text.encode())
        command = [sys.executable, str(script), str(path), str(tmp_path / f"{size}"), str(tiny_tokenizer)]
        root = Path(__file__).resolve().parents[2]
        done = subprocess.run(
            command, cwd=root, env={"PYTHONPATH": str(root)}, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        told = [line.split() for line in (tmp_path / f"{size}.peaks").read_text().splitlines()]
        assert len(told) > 10 * size / (5 * MEGABYTE)
        peaks[size] = {phase: 1024 * int(kilobytes) for phase, kilobytes in told}  # the last is the highest
    small, large = peaks.values()
    assert small.keys() == large.keys() == {"prepare", "pack", "parent"}
    for phase in small:
        assert abs(large[phase] - small[phase]) < 5 * MEGABYTE, phase  # a third of the text that was added
