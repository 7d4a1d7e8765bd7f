"""Sweeps of real runs: failures, pruning, packs, MLflow, workers that are killed or asked to leave."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from mlflow import MlflowClient
from transformers import AutoModel

from launcher import sweep_record
from launcher.trial_run import Slot, TrialRun, slots
from tests.launcher.conftest import ROOT, student
from trainer import exits

RATE = "students.0.optimizer.lr"
LIMIT_S = 240


def events(folder: Path) -> list[dict[str, Any]]:
    """What has happened to a run."""
    path = folder / "events.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


class Sweep:
    """A sweep in a folder, started as often as it takes."""

    def __init__(self, folder: Path, base: dict[str, Any], **settings: Any) -> None:
        self.folder, self.output = folder, folder / "sweep"
        self.config = folder / "sweep.yaml"
        folder.mkdir(exist_ok=True)
        (folder / "base.yaml").write_text(yaml.safe_dump({**base, "output": str(folder / "base")}))
        goals = [{"metric": "heldout/total"}]
        own = {
            "name": "rates",
            "output": str(self.output),
            "base": str(folder / "base.yaml"),
            "objectives": goals,
        }
        self.config.write_text(yaml.safe_dump({**own, "sampler": "grid", **settings}))

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, str(ROOT / "launcher/sweep.py"), "--config", str(self.config), *arguments],
            cwd=self.folder,
            env={**os.environ, "DS_ACCELERATOR": "cpu"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, *arguments: str) -> tuple[int, str]:
        process = self.start(*arguments)
        said, _ = process.communicate(timeout=LIMIT_S)
        return process.returncode, said

    def trials(self) -> list[dict[str, Any]]:
        return json.loads((self.output / "trials.json").read_text())["trials"]

    def events(self, trial: int, kind: str) -> list[dict[str, Any]]:
        found = events(self.output / f"trials/{trial:04d}")
        return [event for event in found if event["event"] == kind]

    def wait_for(self, process: subprocess.Popen[str], trial: int, kind: str, count: int = 1) -> None:
        until_s = time.monotonic() + LIMIT_S
        while len(self.events(trial, kind)) < count:
            assert time.monotonic() < until_s and process.poll() is None, process.communicate()[0]
            time.sleep(0.05)


@pytest.fixture(scope="module")
def base(tiny_teacher: Path, tiny_corpus: Path) -> dict[str, Any]:
    """A run of 8 steps, dropout on."""
    return {
        "name": "tiny",
        "teacher": {"model": str(tiny_teacher), "precision": "fp32"},
        "students": [student("small", optimizer={"lr": 5e-3, "warmup": 0.0, "max_grad_norm": None})],
        "data": {"corpus": str(tiny_corpus), "group_blocks": 2, "workers": 0},
        "train": {"global_batch_rows": 8, "micro_batch_rows": 8, "steps": 8, "threads": 1},
        "evaluation": {"every_steps": 4, "rows": 40},
        "checkpoint": {"every_steps": 4},
        "log": {"every_steps": 4, "report": False},
        "tracking": {"enabled": False},
    }


@pytest.fixture(scope="module")
def space() -> dict[str, Any]:
    """Three rates, one of which no student survives."""
    return {RATE: {"values": [5e-3, 1e-3, 1e30]}}


@pytest.fixture(scope="module")
def apart(tmp_path_factory: pytest.TempPathFactory, base: dict[str, Any], space: dict[str, Any]) -> Sweep:
    """Trials in runs of their own, three at a time, tracked."""
    folder = tmp_path_factory.mktemp("apart")
    tracking = {"uri": f"sqlite:///{folder}/mlflow.db", "system_metrics": False, "under": ["wiki"]}
    sweep = Sweep(folder, {**base, "tracking": tracking}, space=space, jobs=3)
    code, said = sweep.run()
    assert code == 1, said
    (folder / "said").write_text(said)
    return sweep


def by_rate(sweep: Sweep) -> dict[float, dict[str, Any]]:
    return {trial["settings"][RATE]: trial for trial in sweep.trials()}


def test_one_fails_and_the_others_count(apart: Sweep) -> None:
    found, said = by_rate(apart), (apart.folder / "said").read_text()
    assert {rate: trial["state"] for rate, trial in found.items()} == {
        5e-3: "complete",
        1e-3: "complete",
        1e30: "failed",
    }
    assert "exit code 1" in found[1e30]["error"] and "not finite" in found[1e30]["error"]
    assert "1 of 3 trials failed" in said and re.search(r"\*\d .*0\.005", said)
    for trial in apart.trials():
        steps = [int(step) for step in trial["reported"]]
        assert steps == ([4, 8] if trial["state"] == "complete" else []), "step 0 is before training"
    best = found[min((5e-3, 1e-3), key=lambda rate: found[rate]["values"][0])]
    kept = yaml.safe_load((apart.output / "best.yaml").read_text())
    assert kept["students"][0]["optimizer"]["lr"] == best["settings"][RATE]
    assert kept["output"] == str(apart.output / "best")


def test_its_report_is_of_its_trials(apart: Sweep) -> None:
    read = sweep_record.Sweep.read(apart.output)
    assert [own.metric for own in read.objectives] == ["heldout/total"]
    states = {trial.settings[RATE]: (trial.state, list(trial.values.values())) for trial in read.trials}
    assert states == {rate: (own["state"], own["values"]) for rate, own in by_rate(apart).items()}
    page = (apart.output / "report.html").read_text()
    assert "rates" in page and "0.005" in page and "2 complete, 1 failed" in page


def test_started_again_it_shows_what_it_knows(apart: Sweep) -> None:
    code, said = apart.run("--status")
    assert code == 0 and "3 of 3 trials started, 2 complete, 0 pruned, 1 failed" in said
    assert [len(apart.events(trial, "started")) for trial in range(3)] == [1, 1, 1]


def test_figures_of_a_trial(apart: Sweep) -> None:
    trial = by_rate(apart)[5e-3]
    with (apart.folder / "log").open("wb") as log:
        run = TrialRun(apart.output / trial["folder"], "launcher/general.py", [], Slot((0,), ()), log)
        assert run.ended() == 0, "it has finished, so nothing is started"
        model = AutoModel.from_pretrained(run.folder / "export/small")
        assert run.value("student/parameters", "small", 32) == sum(own.numel() for own in model.parameters())
        assert run.value("heldout/total", "small", 32) == trial["values"][0]
        assert run.value("speed/rows_per_s", "small", 32) > 0
        assert run.value("student/latency_ms", "small", 32) > 0
        # Two layers: four projections, two feed-forward matrices, and scores and their product with V.
        macs = 2 * (4 * 24 * 24 + 2 * 24 * 48 + 2 * 32 * 24)
        assert run.value("student/row_flops", "small", 32) == 2 * 32 * macs
        with pytest.raises(
            ValueError, match="heldout/score/f1 is not in .*evaluations.jsonl; there are .*total"
        ):
            run.value("heldout/score/f1", "small", 32)


def test_a_trial_that_cannot_be_judged_fails_and_does_not_come_again(
    tmp_path: Path, base: dict[str, Any]
) -> None:
    """A row longer than the student's positions, at which the model itself raises."""
    rates, longest = {RATE: {"values": [5e-3]}}, [{"metric": "student/latency_ms"}]
    sweep = Sweep(tmp_path, base, space=rates, objectives=longest, row_tokens=4096)
    code, said = sweep.run()
    assert code == 1 and "trial 0 has FAILED" in said, said
    assert [trial["state"] for trial in sweep.trials()] == ["failed"]
    assert sweep.run()[0] == 1 and len(sweep.events(0, "started")) == 1


def test_what_mlflow_shows(apart: Sweep) -> None:
    client = MlflowClient(tracking_uri=f"sqlite:///{apart.folder}/mlflow.db")
    experiment = client.get_experiment_by_name("distillation")
    assert experiment is not None
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    assert set(runs) == {"wiki", "rates", "trial-0000", "trial-0001", "trial-0002"}
    sweep, pipeline = runs["rates"], runs["wiki"]
    assert sweep.data.tags["mlflow.parentRunId"] == pipeline.info.run_id and sweep.info.status == "FINISHED"
    for number, trial in enumerate(apart.trials()):
        run = runs[f"trial-{number:04d}"]
        assert run.data.tags["mlflow.parentRunId"] == sweep.info.run_id
        assert (run.data.tags["trial"], run.data.tags["sweep"]) == (str(number), "rates")
        assert run.info.status == ("FAILED" if trial["state"] == "failed" else "FINISHED")
        assert float(run.data.params[RATE]) == trial["settings"][RATE]
    best = min(trial["values"][0] for trial in apart.trials() if trial["values"])
    assert sweep.data.metrics["best/heldout/total"] == best
    assert [sweep.data.metrics[f"trials/{state}"] for state in ("complete", "failed")] == [2, 1]
    assert {file.path for file in client.list_artifacts(sweep.info.run_id)} == {
        "best.yaml",
        "report.html",
        "trials.json",
    }
    assert f"{best:.6g}" in sweep.data.tags["mlflow.note.content"]


def test_packed_trials_are_bitwise_those_apart(
    tmp_path: Path, apart: Sweep, base: dict[str, Any], space: dict[str, Any]
) -> None:
    """All three as students of one run; the one that fails is retired and fails alone."""
    packed = Sweep(tmp_path, base, space=space, packed=3)
    code, said = packed.run("--worker")
    assert code == 1, said
    here, there = by_rate(packed), by_rate(apart)
    assert len(list((packed.output / "trials").glob("*/events.jsonl"))) == 1
    for rate in space[RATE]["values"]:
        assert here[rate]["state"] == there[rate]["state"]
        assert here[rate]["values"] == there[rate]["values"]
        assert here[rate]["reported"] == there[rate]["reported"]
    assert "the loss or gradient of step 2" in here[1e30]["error"]
    best = yaml.safe_load((packed.output / "best.yaml").read_text())
    assert [own["name"] for own in best["students"]] == ["small"]


def test_killed_asked_to_leave_and_pruned(tmp_path: Path, base: dict[str, Any]) -> None:
    """A good trial, then one that does not learn. The sweep is killed in the first, then asked to leave."""
    changes = {
        "train": {**base["train"], "steps": 300},
        "evaluation": {"every_steps": 20, "rows": 8},
        "checkpoint": {"every_steps": 25},
    }
    pruner = {"kind": "median", "startup_trials": 1, "min_steps": 20}
    axis = {RATE: {"values": [5e-3, 1e-9]}}
    good_first = 1
    sweep = Sweep(tmp_path, {**base, **changes}, space=axis, pruner=pruner, seed=good_first)
    first = sweep.start()
    sweep.wait_for(first, 0, "saved")
    first.send_signal(signal.SIGKILL)
    first.communicate()

    second = sweep.start()
    sweep.wait_for(second, 0, "training", 2)
    second.send_signal(signal.SIGTERM)
    said, _ = second.communicate(timeout=LIMIT_S)
    assert second.returncode == 75 and "trial 0 has stopped" in said, said
    assert [trial["state"] for trial in sweep.trials()] == ["running"]

    code, said = sweep.run()
    assert code == 0, said
    good, bad = sweep.trials()
    assert (good["settings"][RATE], good["state"], bad["state"]) == (5e-3, "complete", "pruned")
    started, stopped = sweep.events(0, "started"), sweep.events(0, "stopped")
    assert [event["resumed"] for event in started] == [False, True, True]
    # Killed, the sweep has left behind a run that was asked to leave; it went on where that one was.
    assert [event["step"] for event in stopped] == [event["step"] for event in started[1:]]
    assert [len(sweep.events(trial, "finished")) for trial in (0, 1)] == [1, 0]
    assert list(map(int, good["reported"])) == list(range(20, 301, 20))
    measured = max(map(int, bad["reported"]))
    assert measured < 300 and bad["values"] == [bad["reported"][str(measured)]]
    assert bad["values"][0] > good["reported"][str(measured)]
    assert len(sweep.events(1, "started")) == 1 and "trial 1 is pruned" in said


@pytest.mark.network_of_ranks
def test_a_run_over_several_devices_saves_when_asked(tmp_path: Path, base: dict[str, Any]) -> None:
    """Two ranks under torchrun, on CPU, which hides the exit code of its ranks."""
    config = {**base, "train": {**base["train"], "steps": 100_000, "micro_batch_rows": 4}}
    config |= {"output": str(tmp_path / "run"), "checkpoint": {"every_steps": None}}
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(config))
    arguments = ["--config", str(tmp_path / "base.yaml")]
    slot = Slot(tuple(os.sched_getaffinity(0)), ("0", "1"))
    until_s = time.monotonic() + LIMIT_S
    with pytest.MonkeyPatch.context() as patch, (tmp_path / "log").open("wb") as log:
        patch.setenv("DS_ACCELERATOR", "cpu")
        run = TrialRun(tmp_path / "run", "launcher/general.py", arguments, slot, log)
        while (code := run.ended()) is None and time.monotonic() < until_s:
            if any(event["event"] == "training" for event in events(run.folder)):
                run.ask(signal.SIGTERM)
            time.sleep(0.1)
    assert code == exits.STOPPED, run.tail()
    (started,) = [event for event in events(run.folder) if event["event"] == "started"]
    (stopped,) = [event for event in events(run.folder) if event["event"] == "stopped"]
    assert started["ranks"] == 2 and stopped["step"] > 0
    assert (run.folder / f"checkpoints/step-{stopped['step']:08d}").is_dir() and not run.finished()


@pytest.mark.parametrize(
    "jobs, cores, devices, expected",
    [
        (1, 4, 0, [((0, 1, 2, 3), ())]),
        (2, 4, 4, [((0, 1), ("0", "1")), ((2, 3), ("2", "3"))]),
        (3, 4, 2, [((0,), ("0",)), ((1,), ("1",)), ((2, 3), ("0",))]),
        (3, 2, 0, [((0,), ()), ((1,), ()), ((0,), ())]),
    ],
)
def test_a_machine_in_parts(jobs: int, cores: int, devices: int, expected: list[Any]) -> None:
    found = slots(jobs, range(cores), [str(number) for number in range(devices)])
    assert [(slot.cores, slot.devices) for slot in found] == expected


def test_a_dry_run_checks_a_run_and_writes_nothing(
    tmp_path: Path, base: dict[str, Any], space: dict[str, Any]
) -> None:
    sweep = Sweep(tmp_path, base, space=space, packed=2)
    code, said = sweep.run("--dry-run")
    assert code == 0 and f"3 trials over {RATE}, packed=2, jobs=1, into" in said, said
    assert "dry run: students trial-0000, trial-0001 from teacher" in said
    missing = Sweep(tmp_path, {**base, "data": {"corpus": str(tmp_path / "none")}}, space=space)
    code, said = missing.run("--dry-run")
    assert code == 2 and f"{tmp_path}/none" in said, "which only the run can know"
    assert not sweep.output.exists()


def test_what_is_wrong_is_said_before_anything_starts(tmp_path: Path, base: dict[str, Any]) -> None:
    sweep = Sweep(tmp_path, base, space={"students.0.optimizer.lrr": {"values": [1]}}, packed=0)
    code, said = sweep.run()
    assert code == 2 and "2 problems" in said and "did you mean students.0.optimizer.lr?" in said
    assert not sweep.output.exists()
