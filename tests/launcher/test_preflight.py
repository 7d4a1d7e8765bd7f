"""launcher/preflight.py on a real configuration, as a process."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from tests.launcher.conftest import ROOT


def preflight(folder: Path, config: dict[str, Any], *arguments: str) -> subprocess.CompletedProcess[str]:
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    command = [sys.executable, str(ROOT / "launcher/preflight.py"), "--config", str(path), *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)


def deviations(printed: str) -> dict[str, float]:
    cells = [line.split("│") for line in printed.splitlines() if line.startswith("│") and "e-" in line]
    return {line[1].strip(): float(line[2]) for line in cells}


def test_it_says_what_fits_and_how_far_the_precision_is_off(
    run_config: dict[str, Any], tmp_path: Path
) -> None:
    done = preflight(tmp_path, run_config, "--ranks", "2", "teacher.precision=bf16")
    assert done.returncode == 0, done.stderr
    assert "The configuration is sound." in done.stdout
    assert "2 ranks, 2 a host" in done.stdout
    assert "replicated (configured)" in done.stdout and "zero3" in done.stdout and "offload" in done.stdout
    found = deviations(done.stdout)
    assert set(found) == {"hidden", "scores", "loss"}
    assert all(1e-6 < value < 0.05 for value in found.values())
    assert not Path(run_config["output"]).exists()


def test_it_refuses_what_a_run_would_refuse(run_config: dict[str, Any], tmp_path: Path) -> None:
    done = preflight(tmp_path, run_config, "--ranks", "5", "--no-run", "teacher.quantization=fp8",
                     "teacher.precision=bf16")  # fmt: skip
    assert done.returncode == 2
    assert "train.global_batch_rows=24 is not a multiple of 20" in done.stderr
    assert "teacher.quantization=fp8 needs a CUDA device" in done.stderr


def test_it_shows_what_does_not_fit_and_then_refuses_it(run_config: dict[str, Any], tmp_path: Path) -> None:
    rows = 10**9
    batch = [f"train.micro_batch_rows={rows}", f"train.global_batch_rows={rows}"]
    done = preflight(tmp_path, run_config, *batch)
    assert done.returncode == 2
    assert "│ no" in done.stdout
    assert "teacher.placement=replicated needs" in done.stderr
    assert "lower train.micro_batch_rows" in done.stderr
