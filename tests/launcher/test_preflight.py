"""launcher/preflight.py on a real configuration, as a process."""

import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import yaml
from transformers import AutoModelForSequenceClassification

from configs.load import from_dict
from configs.schema import DataConfig
from configs.task_schema import TaskConfig
from launcher.trial import full_batch
from sharding import task_corpus
from sharding.corpora import open_corpora
from tests.launcher.conftest import ROOT, command
from tests.launcher.test_task import task_config, write_task
from trainer.world import World


def preflight(folder: Path, config: dict[str, Any], *arguments: str) -> subprocess.CompletedProcess[str]:
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    line = [sys.executable, str(ROOT / "launcher/preflight.py"), "--config", str(path), *arguments]
    return subprocess.run(line, cwd=folder, capture_output=True, text=True, timeout=300)


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


def test_ranks_try_the_run_out_and_print_a_plan(run_config: dict[str, Any], tmp_path: Path) -> None:
    """Two real ranks at ZeRO 3; every figure of the plan follows from those in the tables."""
    line = command(tmp_path, run_config, "deepspeed.zero_stage=3", "train.steps=100", ranks=2, by="torchrun")
    line = [str(ROOT / "launcher/preflight.py") if part.endswith("general.py") else part for part in line]
    done = subprocess.run(line, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert re.search(r"All 2 ranks reach each other: \d+\.\d\d GB/s", done.stdout)
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in done.stdout.splitlines()]
    sizes = [row for row in cells if len(row) == 6 and row[4].endswith("GiB") and row[1].endswith(" s")]
    assert sizes[0][0] == "4 (configured)" and [row[0] for row in sizes[1:]] == [
        str(4 * 2 ** (n + 1)) for n in range(len(sizes) - 1)
    ]
    # Of twice the rows, and of four times, 24 are no multiple on two ranks.
    assert "no larger micro batch that was tried and can be dealt" in " ".join(done.stdout.split())
    micro_s, optimizer_s = (float(sizes[0][n].removesuffix(" s")) for n in (1, 2))
    told = " ".join(done.stdout.split())
    plan = re.search(r"100 steps on 2 ranks \(cpu\) take .*?, ([\d.]+) rows/s", told)
    assert plan is not None
    expected = 24 / (3 * micro_s + optimizer_s)  # three micro batches of four on each rank
    assert abs(float(plan[1]) / expected - 1) < 0.2  # the table rounds to milliseconds
    parts = {row[0]: row[1] for row in cells if len(row) == 3 and row[1].endswith("GiB")}
    assert any(name.startswith("students") and name.endswith("ZeRO 3") for name in parts)
    assert "deepspeed.zero_stage=2 fits as well" in told
    assert not Path(run_config["output"]).exists()


def test_a_stage_of_a_task_is_tried_out_as_what_it_learns_from(tmp_path: Path, tiny_teacher: Path) -> None:
    """Labels mixed with the teacher's logits, then labels alone; a stage that trains nothing is refused."""
    for rows in (400, 60):
        write_task(tmp_path, rows)
    config = task_config(tmp_path, tiny_teacher)
    finetuned = tmp_path / "finetuned"
    config["finetuned"] = str(shutil.copytree(tiny_teacher, finetuned))
    names = {"negative": 0, "positive": 1}
    AutoModelForSequenceClassification.from_pretrained(finetuned, label2id=names).save_pretrained(finetuned)
    config["prediction"]["losses"] = {"logits": 1.0, "labels": 0.5}
    config["start"] = "init"
    task_corpus.build(from_dict(TaskConfig, config))
    before = sorted(tmp_path.rglob("*"))
    mixed = preflight(tmp_path, config, "stage=prediction", "teacher.precision=bf16")
    assert mixed.returncode == 0, mixed.stderr
    assert set(deviations(mixed.stdout)) == {"loss"} and "50 steps on 1 rank" in mixed.stdout
    alone = preflight(tmp_path, config, "stage=baseline")
    assert alone.returncode == 0, alone.stderr
    assert "labels are all that is learned from" in alone.stdout and "200 steps on 1 rank" in alone.stdout
    assert not deviations(alone.stdout) and "replicated (configured)" not in alone.stdout
    data = preflight(tmp_path, config, "stage=data")
    assert data.returncode == 2 and "stage=data trains nothing" in data.stderr
    assert set(tmp_path.rglob("*")) - set(before) == {tmp_path / "run.yaml"}


def test_the_trials_rows_are_full(tiny_corpus: Path) -> None:
    run: Any = SimpleNamespace(
        corpora=open_corpora(DataConfig(corpus=str(tiny_corpus))),
        world=World(1, 2, 1, 2, torch.device("cpu")),
    )
    batch = full_batch(run, 6)
    assert batch.ids_BS.shape == (6, 32) and batch.length_B.tolist() == [32] * 6
    assert 0 <= int(batch.ids_BS.min()) and int(batch.ids_BS.max()) < 232


def test_an_output_that_cannot_take_the_checkpoints_is_refused(
    run_config: dict[str, Any], tmp_path: Path
) -> None:
    done = preflight(tmp_path, run_config, "checkpoint.keep_last=100000000", "teacher.precision=fp32")
    assert done.returncode == 2
    assert "checkpoints take" in done.stderr and "lower checkpoint.keep_last" in done.stderr
