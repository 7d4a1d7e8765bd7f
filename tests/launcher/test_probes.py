"""Whole runs with probes are bitwise the runs without them, and go on after a stop."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from tests.launcher.conftest import Launch, evaluations
from tests.launcher.test_general import assert_equal, final_weights
from tests.tiny_task import write_tiny_task

pytestmark = pytest.mark.network_of_ranks


def probed(output: str) -> list[dict[str, Any]]:
    lines = Path(output, "probes.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def mood(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Path) -> Path:
    return write_tiny_task(tmp_path_factory.mktemp("mood"), tiny_tokenizer)


@pytest.mark.parametrize("zero_stage", [1, 3])
def test_a_run_with_probes_is_bitwise_the_run_without(
    run_config: dict[str, Any], general: Launch, tmp_path: Path, mood: Path, zero_stage: int
) -> None:
    plain, with_probes = str(tmp_path / "plain"), str(tmp_path / "probed")
    settings = [f"deepspeed.zero_stage={zero_stage}", "checkpoint.keep_last=3"]
    done = general(run_config, f"output={plain}", *settings, ranks=2, by="deepspeed")
    assert done.returncode == 0, done.stderr
    run_config["tracking"] = {"enabled": True, "uri": f"sqlite:///{tmp_path}/mlflow.db"}
    run_config["probes"] = {"every_steps": 2, "tasks": [str(mood)], "rows": 64}
    run_config["output"] = with_probes
    done = general(run_config, *settings, ranks=2, by="deepspeed")
    assert done.returncode == 0, done.stderr
    assert_equal(final_weights(with_probes), final_weights(plain))
    assert evaluations(with_probes) == evaluations(plain)
    entries = probed(with_probes)
    assert [entry["step"] for entry in entries] == [0, 2, 4, 6]
    assert {tuple(entry["scores"]) for entry in entries} == {("mood/accuracy", "mood/matthews")}
    assert "teacher  probes mood/accuracy" in done.stderr

    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path}/mlflow.db")
    (run,) = client.search_runs([client.get_experiment_by_name("distillation").experiment_id])
    assert run.data.metrics["probe/mood/accuracy"] == entries[-1]["scores"]["mood/accuracy"]
    assert run.data.metrics["probe/teacher/mood/accuracy"] > 0.6
    if zero_stage == 3:  # as if killed after the first save
        for step in (4, 6):
            shutil.rmtree(Path(with_probes, f"checkpoints/step-0000000{step}"))
        done = general(run_config, *settings, ranks=2, by="deepspeed")
        assert done.returncode == 0 and "resumed at step 2" in done.stderr, done.stderr
        assert probed(with_probes) == entries + entries[2:]
        assert_equal(final_weights(with_probes), final_weights(plain))
