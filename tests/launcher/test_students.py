"""Whole runs of several students, one of which fails; and a profile of one."""

import gzip
import json
import re
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from tests.launcher.conftest import Launch, evaluations, student
from tests.launcher.test_general import assert_equal, final_weights
from trainer.checkpoint import list_complete, load

pytestmark = pytest.mark.network_of_ranks


def test_one_fails_and_the_other_is_trained_and_exported(
    run_config: dict[str, Any], general: Launch, tmp_path: Path
) -> None:
    """A rate of 1e30: after the first update the second step has no finite loss."""
    assert general(run_config, f"output={tmp_path}/alone", ranks=2, by="torchrun").returncode == 0
    wild = student("wild", layers=1, optimizer={"lr": 1e30, "warmup": 0.0, "max_grad_norm": None})
    run_config["students"] = [wild, *run_config["students"]]
    run_config["tracking"] = {"enabled": True, "uri": f"sqlite:///{tmp_path}/mlflow.db"}
    done = general(run_config, ranks=2, by="deepspeed")
    output = Path(run_config["output"])
    assert done.returncode == 1
    assert done.stderr.count("student wild has FAILED and is retired: the loss or gradient of step 2") == 1
    assert done.stderr.count("error: 1 of 2 students failed; the others are trained and exported") == 1
    assert "a lower optimizer.lr" in done.stderr and "Traceback" not in done.stderr
    assert_equal(final_weights(str(output)), final_weights(f"{tmp_path}/alone"))
    assert [path.name for path in (output / "export").iterdir()] == ["small"]
    summary = json.loads((output / "summary.json").read_text(encoding="utf-8"))
    assert list(summary["students"]) == ["small"]
    assert "step 2 (rows from 24) is not finite" in summary["retired"]["wild"]
    own = [entry["step"] for entry in evaluations(str(output)) if entry["student"] == "wild"]
    assert own == [0], "it is not evaluated any more"

    def stored() -> dict[str, Any]:
        client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path}/mlflow.db")
        experiment = client.get_experiment_by_name("distillation")
        assert experiment is not None
        return {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}

    statuses = {"tiny": "FAILED", "small": "FINISHED", "wild": "FAILED"}
    assert {name: run.info.status for name, run in stored().items()} == statuses
    assert stored()["wild"].data.tags["failed"] == summary["retired"]["wild"]
    assert "failed" not in stored()["small"].data.tags

    resumed = list_complete(output / "checkpoints")[-1]
    before = load(resumed)
    assert before.progress.retired == summary["retired"] and set(before.students) == {"small", "wild"}
    done = general(run_config, "train.steps=8", ranks=2, by="deepspeed")
    assert done.returncode == 1 and "error: 1 of 2 students failed" in done.stderr
    after = load(list_complete(output / "checkpoints")[-1])
    assert after.progress.step == 8 and after.progress.retired == before.progress.retired
    assert_equal(after.students["wild"].weights, before.students["wild"].weights)
    assert {name: run.info.status for name, run in stored().items()} == statuses


def test_a_profile_changes_nothing(run_config: dict[str, Any], general: Launch, tmp_path: Path) -> None:
    assert general(run_config, f"output={tmp_path}/plain", ranks=2, by="torchrun").returncode == 0
    done = general(run_config, "--profile-steps", "2", ranks=2, by="torchrun")
    assert done.returncode == 0, done.stderr
    assert_equal(final_weights(run_config["output"]), final_weights(f"{tmp_path}/plain"))
    folder = Path(run_config["output"], "profile")
    assert sorted(path.name for path in folder.iterdir()) == ["rank0.trace.json.gz", "rank1.trace.json.gz"]
    for path in folder.iterdir():
        events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
        names = [event.get("name") for event in events if event.get("cat") == "user_annotation"]
        micro_batches = 2 * 3  # 2 steps of 24 rows over 2 ranks, 4 rows at a time
        for part in ("teacher", "small/forward", "small/losses", "small/backward"):
            assert names.count(part) == micro_batches
        assert names.count("small/optimizer") == names.count("data") == 2
        assert [event for event in events if str(event.get("name")).startswith("gloo:all_reduce")]
    assert "profile of 2 steps, trace in" in done.stderr
    table = done.stderr[done.stderr.index("part of the step") :]
    shares = dict(re.findall(r"^(\S[^\n]*?)  +\d*  +[\d.]+ +([\d.]+)%$", table, re.MULTILINE))
    parts = ["data", "teacher", "small/forward", "small/losses", "small/backward", "small/optimizer", "other"]
    assert sum(float(shares[part]) for part in parts) == pytest.approx(100, abs=1)
    assert float(shares["communication, inside these"]) > 0


def test_a_run_that_ends_before_its_profile_writes_what_there_is(
    run_config: dict[str, Any], general: Launch
) -> None:
    done = general(run_config, "--profile", "train.steps=4")
    assert done.returncode == 0, done.stderr
    assert "profile of 2 steps" in done.stderr
    done = general(run_config, "--profile-steps", "0")
    assert done.returncode == 2 and "--profile-steps: 0 is less than 1" in done.stderr
