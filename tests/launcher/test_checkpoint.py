"""Checkpoints of whole runs: shown, verified, converted, damaged, on a full disk, and to start from."""

import copy
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launcher.checkpoint import main
from tests.conftest import small_disk
from tests.launcher.conftest import ROOT, Launch, command, evaluations, student
from trainer.checkpoint import list_complete, load, step_of, verify
from trainer.exits import STOPPED

pytestmark = pytest.mark.network_of_ranks


@pytest.fixture(scope="module")
def finished(
    tmp_path_factory: pytest.TempPathFactory, tiny_teacher: Path, tiny_corpus: Path
) -> dict[str, Any]:
    """The config of a run of two students that has ended."""
    root = tmp_path_factory.mktemp("finished")
    teacher = shutil.copytree(tiny_teacher, root / "teacher")
    config = {
        "name": "tiny",
        "output": str(root / "run"),
        "teacher": {"model": str(teacher), "precision": "fp32"},
        "students": [
            student("small"),
            student("other", layers=1, projection="shared", overrides={"hidden_act": "relu"}),
        ],
        "data": {"corpus": str(tiny_corpus), "group_blocks": 2},
        "train": {"global_batch_rows": 24, "micro_batch_rows": 12, "steps": 6, "threads": 1},
        "evaluation": {"every_steps": 2, "rows": 40},
        "checkpoint": {"every_steps": 2, "keep_last": 2, "keep_every_steps": 2},
        "log": {"every_steps": 3, "report": False},
        "tracking": {"enabled": False},
    }
    done = subprocess.run(
        command(root, config, ranks=1, by="python"), capture_output=True, text=True, timeout=300, cwd=root
    )
    assert done.returncode == 0, done.stderr
    return config


@pytest.fixture
def broken(finished: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """The same run in a folder of its own, the newest checkpoint damaged."""
    config = copy.deepcopy(finished)
    config["output"] = str(shutil.copytree(finished["output"], tmp_path / "run", symlinks=True))
    os.truncate(tmp_path / "run/checkpoints/step-00000006/small/moments.safetensors", 1000)
    return config


def checkpoints(config: dict[str, Any]) -> Path:
    return Path(config["output"], "checkpoints")


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_list(finished: dict[str, Any]) -> None:
    """As a process."""
    script = [sys.executable, str(ROOT / "launcher/checkpoint.py"), "list", finished["output"]]
    done = subprocess.run(script, capture_output=True, text=True, timeout=300, check=True)
    lines = done.stdout.splitlines()
    rows = {
        line.split("│")[1].strip(): [cell.strip() for cell in line.split("│")[2:-1]] for line in lines[3:-1]
    }
    assert list(rows) == ["step-00000002", "step-00000004", "step-00000006"]
    newest = rows["step-00000006"]
    assert newest[:2] == ["144", "small, other"] and newest[4] == "1"
    size = sum(len(content) for content in files(checkpoints(finished) / "step-00000006").values())
    assert float(newest[2]) == pytest.approx(size / 1e6, abs=0.06)
    last = {entry["student"]: entry["losses"]["total"] for entry in evaluations(finished["output"])[-2:]}
    assert newest[3] == f"small {last['small']:.4f}, other {last['other']:.4f}"
    assert newest[-1] == "latest, last, every 2, best of small, best of other"
    assert rows["step-00000002"][-1] == "every 2" and rows["step-00000004"][-1] == "last, every 2"


def test_list_of_what_a_kill_and_damage_have_left(
    broken: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = checkpoints(broken)
    shutil.copytree(folder / "step-00000002", folder / "damaged-step-00000002")
    (folder / ".step-00000008.partial").mkdir()
    (folder / "step-00000004/run.json").unlink()
    assert main(["list", broken["output"]]) == 0
    said = capsys.readouterr().out
    for name, why in (
        ("damaged-step-00000002", "damaged, put aside"),
        (".step-00000008.partial", "left by a kill, will go"),
        ("step-00000004", "DAMAGED: "),
    ):
        assert [why in line for line in said.splitlines() if f" {name} " in line] == [True]


def test_verify(finished: dict[str, Any], broken: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", finished["output"]]) == 0
    assert "3 checkpoints are whole: step-00000002, step-00000004, step-00000006" in capsys.readouterr().out
    assert main(["verify", str(checkpoints(broken) / "step-00000004")]) == 0
    (checkpoints(broken) / "step-00000002/files.json").unlink()
    capsys.readouterr()
    assert main(["verify", broken["output"]]) == main(["verify", str(checkpoints(broken) / "latest")]) == 1
    first, second, summary, *_ = capsys.readouterr().out.splitlines()
    assert "step-00000002: files.json cannot be read" in first and summary.startswith("2 problems")
    assert "step-00000006: small/moments.safetensors has 1000 bytes instead of" in second


def test_consolidate_is_bitwise_the_export(finished: dict[str, Any], tmp_path: Path) -> None:
    """While the teacher's weights are not there."""
    weights = Path(finished["teacher"]["model"], "model.safetensors")
    elsewhere = weights.rename(tmp_path / "elsewhere")
    options = [str(checkpoints(finished) / "latest"), "--output", str(tmp_path / "made")]
    try:
        assert main(["consolidate", *options]) == 0
    finally:
        elsewhere.rename(weights)
    exported = files(Path(finished["output"], "export"))
    assert files(tmp_path / "made") == exported and len(exported) == 2 * 4
    assert main(["consolidate", *options[:2], str(tmp_path / "one"), "--student", "other"]) == 0
    assert [path.name for path in (tmp_path / "one").iterdir()] == ["other"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["list", "RUN/export"], "is not the folder of a run that has been saved"),
        (["verify", "RUN/export"], "is neither the folder of a run nor a checkpoint"),
        (
            ["consolidate", "RUN", "--output", "x"],
            "is not a checkpoint, or damaged: files.json cannot be read",
        ),
        (
            ["consolidate", "RUN/checkpoints/latest", "--output", "x", "--student", "smal"],
            "--student smal is not one of",
        ),
    ],
)
def test_mistakes_are_told_in_short(
    finished: dict[str, Any], capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    assert main([argument.replace("RUN", finished["output"]) for argument in arguments]) == 2
    assert said in capsys.readouterr().err


def test_a_damaged_checkpoint_is_not_consolidated(
    broken: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = checkpoints(broken) / "step-00000006/other/weights.safetensors"
    os.truncate(weights, weights.stat().st_size - 1)
    options = [str(weights.parents[1]), "--output", str(tmp_path / "made")]
    assert main(["consolidate", *options]) == 2
    assert "is damaged: other/weights.safetensors has" in capsys.readouterr().err
    assert not (tmp_path / "made").exists()
    assert main(["consolidate", *options, "--student", "small"]) == 0, "its weights are whole"


def test_a_run_goes_back_to_the_checkpoint_before_and_ends_the_same(
    finished: dict[str, Any], broken: dict[str, Any], general: Launch
) -> None:
    done = general(broken)
    assert done.returncode == 0, done.stderr
    assert "step-00000006 is DAMAGED: small/moments.safetensors has 1000 bytes instead of" in done.stderr
    assert "going back to step-00000004" in done.stderr and "resumed at step 4" in done.stderr
    found, expected = (files(checkpoints(config) / "step-00000006") for config in (broken, finished))
    tensors = [name for name in expected if name.endswith(".safetensors")]
    assert len(tensors) == 4 and all(found[name] == expected[name] for name in tensors)
    assert evaluations(broken["output"])[-2:] == evaluations(finished["output"])[-2:]
    aside = checkpoints(broken) / "damaged-step-00000006"
    assert (aside / "small/moments.safetensors").stat().st_size == 1000, "nothing is removed"


def test_a_student_starts_from_one_in_a_checkpoint(
    finished: dict[str, Any], general: Launch, tmp_path: Path
) -> None:
    config = copy.deepcopy(finished)
    del config["students"][1]
    config["output"] = str(tmp_path / "next")
    folder = checkpoints(finished) / "step-00000004"
    done = general(config, f"students.0.init={folder}/small", "train.steps=2")
    assert done.returncode == 0, done.stderr
    before = [entry for entry in evaluations(finished["output"]) if entry["student"] == "small"]
    assert evaluations(config["output"])[0]["losses"] == before[2]["losses"] and before[2]["step"] == 4
    assert load(checkpoints(config) / "step-00000002").students["small"].updates == 2, "a fresh optimizer"


def test_a_full_disk_costs_saves_and_not_the_run(finished: dict[str, Any], tmp_path: Path) -> None:
    config = copy.deepcopy(finished)
    config["output"] = str(tmp_path / "run")
    config["checkpoint"] = {"every_steps": 20, "keep_last": 2}
    config["evaluation"]["every_steps"] = None
    (tmp_path / "run").mkdir()

    def steps(event: str) -> list[int]:
        path = tmp_path / "run/events.jsonl"
        entries = map(json.loads, path.read_text().splitlines() if path.exists() else [])
        return [entry["step"] for entry in entries if entry["event"] == event]

    with small_disk(checkpoints(config), 4 << 20) as disk, (tmp_path / "log").open("w") as log:
        before = disk / "step-00000006"
        shutil.copytree(checkpoints(finished) / before.name, before)
        with (disk / "filler").open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, (os.statvfs(disk).f_bavail - 8) * 4096)
        started = command(tmp_path, config, "train.steps=100000", ranks=1, by="python")
        process = subprocess.Popen(started, cwd=tmp_path, stdout=log, stderr=log)
        try:
            wait_until(lambda: steps("save_failed"), process)
            assert verify(before) == []
            (disk / "filler").unlink()
            wait_until(lambda: steps("saved"), process)
            process.terminate()
            assert process.wait(60) == STOPPED
        finally:
            process.kill()
            process.wait()
        found = list_complete(disk)
        assert step_of(found[-1]) > steps("saved")[0] > steps("save_failed")[0] >= 20
        assert not any(map(verify, found))
    said = (tmp_path / "log").read_text()
    assert "step 20 could not be saved" in said and "No space left on device" in said


def wait_until(done: Callable[[], object], process: subprocess.Popen[bytes]) -> None:
    """Wait for something that a running process does."""
    until_s = time.monotonic() + 120
    while not done():
        assert process.poll() is None and time.monotonic() < until_s
        time.sleep(0.02)
