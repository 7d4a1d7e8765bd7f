"""Whole runs of launcher/general.py as real processes under real launchers."""

import json
import math
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow import MlflowClient
from safetensors.torch import load_file
from transformers import AutoModel, AutoTokenizer

from tests.launcher.conftest import Launch, command, evaluations, student

pytestmark = pytest.mark.network_of_ranks


def final_weights(output: str, name: str = "small") -> dict[str, torch.Tensor]:
    folder = max((Path(output) / "checkpoints").glob("step-*"))
    return load_file(folder / name / "weights.safetensors")


def assert_equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    assert [name for name in left if not torch.equal(left[name], right[name])] == []


def test_a_run_on_two_ranks_from_start_to_export(run_config: dict[str, Any], general: Launch) -> None:
    done = general(run_config, ranks=2, by="deepspeed")
    assert done.returncode == 0, done.stderr
    output = Path(run_config["output"])
    losses = [entry["losses"]["total"] for entry in evaluations(run_config["output"])]
    assert len(losses) == 3 and losses[-1] < losses[1] < losses[0]
    assert "step 6/6" in done.stderr and "rows/s" in done.stderr and "ETA" in done.stderr

    exported = AutoModel.from_pretrained(output / "export/small").eval()
    tokenizer = AutoTokenizer.from_pretrained(output / "export/small")
    assert exported(**tokenizer("bade figo", return_tensors="pt")).last_hidden_state.shape[-1] == 24
    weights = final_weights(run_config["output"])
    for name, value in exported.state_dict().items():
        assert name.startswith("pooler.") or torch.equal(value, weights[f"encoder.{name}"])
    saved = [path.name for path in (output / "checkpoints").iterdir()]
    assert sorted(saved) == ["latest", "step-00000004", "step-00000006"]
    assert (output / "config.yaml").is_file() and (output / "origin.json").is_file()


def test_ranks_micro_batches_and_launchers_change_nothing(
    run_config: dict[str, Any], general: Launch, tmp_path: Path
) -> None:
    """Two ranks = one rank with accumulation = other micro batches, without dropout, to float tolerance."""
    run_config["students"][0]["overrides"] = {
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
    kinds = [("python", 1, 24), ("python", 1, 6), ("torchrun", 2, 4), ("deepspeed", 3, 8)]
    found = []
    for number, (by, ranks, micro) in enumerate(kinds):
        output = str(tmp_path / f"run-{number}")
        overrides = [f"output={output}", f"train.micro_batch_rows={micro}", f"deepspeed.zero_stage={number}"]
        done = general(run_config, *overrides, ranks=ranks, by=by)
        assert done.returncode == 0, done.stderr
        found.append(evaluations(output))
    for entries in found[1:]:
        for entry, expected in zip(entries, found[0], strict=True):
            assert entry["losses"] == pytest.approx(expected["losses"], rel=2e-4)


@pytest.mark.parametrize("zero_stage", [1, 3])
def test_killed_and_started_again_it_is_bitwise_the_uninterrupted_run(
    run_config: dict[str, Any], general: Launch, tmp_path: Path, zero_stage: int
) -> None:
    whole, broken = str(tmp_path / "whole"), str(tmp_path / "broken")
    settings = [f"deepspeed.zero_stage={zero_stage}", "train.steps=8"]
    done = general(run_config, f"output={whole}", *settings, ranks=2, by="deepspeed")
    assert done.returncode == 0, done.stderr

    overrides = [f"output={broken}", *settings]
    process = subprocess.Popen(
        command(tmp_path, run_config, *overrides, ranks=2, by="deepspeed"),
        cwd=tmp_path,
        env={**os.environ, "DS_ACCELERATOR": "cpu"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    saved = Path(broken, "checkpoints/step-00000002/files.json")
    while not saved.exists():
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert len(evaluations(broken)) < 4, "it was killed too late to prove anything"

    done = general(run_config, *overrides, ranks=2, by="deepspeed")
    assert done.returncode == 0, done.stderr
    assert "resumed at step" in done.stderr
    assert_equal(final_weights(broken), final_weights(whole))
    assert evaluations(broken)[-1] == evaluations(whole)[-1]


def test_a_student_learns_beside_others_what_it_learns_alone(
    run_config: dict[str, Any], general: Launch, tmp_path: Path
) -> None:
    alone, together = str(tmp_path / "alone"), str(tmp_path / "together")
    assert general(run_config, f"output={alone}").returncode == 0
    other = student("other", layers=4, heads=2, layer_map=[1, 2, 3, 4], projection="per_layer")
    run_config["students"] = [other, *run_config["students"]]
    run_config["tracking"] = {"enabled": True, "uri": f"sqlite:///{tmp_path}/mlflow.db"}
    done = general(run_config, f"output={together}")
    assert done.returncode == 0, done.stderr
    assert_equal(final_weights(together), final_weights(alone))

    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path}/mlflow.db")
    experiment = client.get_experiment_by_name("distillation")
    assert experiment is not None
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    assert set(runs) == {"tiny", "small", "other"}
    assert runs["small"].data.tags["mlflow.parentRunId"] == runs["tiny"].info.run_id
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    history = client.get_metric_history(runs["small"].info.run_id, "loss/attention/2")
    assert [metric.step for metric in history] == [1, 2, 3, 4, 5, 6]
    assert runs["tiny"].inputs.dataset_inputs[0].dataset.name == "tiny"
    assert "students.1.layers" in runs["tiny"].data.params
    assert client.list_artifacts(runs["small"].info.run_id, "model")


def test_everything_wrong_with_teacher_corpus_and_ranks_is_reported_at_once(
    run_config: dict[str, Any], general: Launch
) -> None:
    run_config["students"] = [
        student("range", layer_map=[1, 9]),
        student("heads", hidden_size=25, heads=5),
    ]
    done = general(run_config, "train.global_batch_rows=28", ranks=2, by="deepspeed")
    assert done.returncode != 0
    for part in ("global_batch_rows=28 is not a multiple of 8", "range", "9", "heads", "common divisor"):
        assert part in done.stderr
    assert done.stderr.count("in the configuration:") == 1, "one rank speaks for all"
    assert "Traceback" not in done.stderr
    assert not Path(run_config["output"]).exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["trian.steps=3"], "unknown key trian; did you mean train"),
        (["data.corpus=nowhere"], "nowhere/manifest.json does not exist"),
        (["tracking.enabled=true", "tracking.uri=ftp://127.0.0.1:9"], "tracking.uri=ftp://127.0.0.1:9"),
        (["teacher.sha256=00"], "does not match"),
    ],
)
def test_what_a_user_did_wrong_ends_in_a_message(
    run_config: dict[str, Any], general: Launch, overrides: list[str], message: str
) -> None:
    done = general(run_config, *overrides)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not Path(run_config["output"]).exists()


def test_the_wrong_tokenizer_for_a_corpus(
    run_config: dict[str, Any], general: Launch, tmp_path: Path
) -> None:
    """The same vocabulary, but cased: every id is known, and every other word would be wrong."""
    other = tmp_path / "cased"
    subprocess.run(["cp", "-r", run_config["teacher"]["model"], other], check=True)
    settings = json.loads((other / "tokenizer_config.json").read_text(encoding="utf-8"))
    settings["do_lower_case"] = False
    (other / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    done = general(run_config, f"teacher.model={other}")
    assert done.returncode == 2
    assert "ids would change meaning; build a corpus with the teacher's" in done.stderr
    assert not Path(run_config["output"]).exists()


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_teacher_in_half_precision_teaches_nearly_the_same(
    run_config: dict[str, Any], general: Launch, precision: str
) -> None:
    output = run_config["output"]
    settings = ["train.steps=2", "evaluation.every_steps=2"]
    assert general(run_config, f"output={output}-fp32", *settings).returncode == 0
    done = general(run_config, *settings, f"teacher.precision={precision}")
    assert done.returncode == 0, done.stderr
    for found, exact in zip(evaluations(output), evaluations(f"{output}-fp32"), strict=True):
        assert found["losses"] == pytest.approx(exact["losses"], rel=1e-2)
        assert found["losses"] != exact["losses"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; torch sees none here")
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_one_cuda_device_trains_as_the_cpu_does(
    run_config: dict[str, Any], general: Launch, precision: str
) -> None:
    without_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    run_config["students"][0]["overrides"] = without_dropout
    output = run_config["output"]
    assert general(run_config, f"output={output}-cpu").returncode == 0
    done = general(run_config, f"deepspeed.precision={precision}", by="deepspeed", on="cuda")
    assert done.returncode == 0, done.stderr
    for found, exact in zip(evaluations(output), evaluations(f"{output}-cpu"), strict=True):
        assert found["losses"] == pytest.approx(exact["losses"], rel=1e-3 if precision == "fp32" else 5e-2)


@pytest.mark.parametrize("zero_stage", [2, 3])
def test_parameters_that_no_loss_reaches_do_no_harm(
    run_config: dict[str, Any], general: Launch, zero_stage: int
) -> None:
    """Attention of the last layer alone: the projections and that layer's own output get no gradient."""
    run_config["students"][0]["losses"] = {"embedding": 0.0, "hidden": 0.0, "layers": [0.0, 1.0]}
    done = general(run_config, f"deepspeed.zero_stage={zero_stage}", ranks=2, by="torchrun")
    assert done.returncode == 0, done.stderr
    first, *_, last = (entry["losses"] for entry in evaluations(run_config["output"]))
    assert set(last) == {"total", "attention/2"}
    assert last["total"] < first["total"]


def test_another_corpus_or_student_is_not_the_same_run(run_config: dict[str, Any], general: Launch) -> None:
    assert general(run_config, "train.steps=2").returncode == 0
    before = final_weights(run_config["output"])
    done = general(run_config, "students.0.hidden_size=32", "train.seed=5")
    assert done.returncode == 2
    assert "students.0.hidden_size=32, the run has 24" in done.stderr
    assert "train.seed=5, the run has 0" in done.stderr
    assert_equal(final_weights(run_config["output"]), before)


def test_a_damaged_shard_stops_the_run_with_its_name(
    run_config: dict[str, Any], general: Launch, tmp_path: Path
) -> None:
    copy = tmp_path / "damaged"
    subprocess.run(["cp", "-r", run_config["data"]["corpus"], copy], check=True)
    shard = copy / "train/00000.tar"
    data = bytearray(shard.read_bytes())
    data[3000] ^= 0xFF
    shard.write_bytes(data)
    done = general(run_config, f"data.corpus={copy}", "train.steps=40", ranks=2, by="deepspeed")
    assert done.returncode != 0
    assert "corrupt shard" in done.stderr and "train/00000.tar" in done.stderr and "offset" in done.stderr


@pytest.mark.parametrize("policy", ["stop", "skip"])
def test_a_loss_that_is_not_finite(run_config: dict[str, Any], general: Launch, policy: str) -> None:
    """A rate of 1e38 makes the weights overflow with the first update; the second step has no finite loss."""
    run_config["students"][0]["optimizer"] |= {"lr": 1e38, "max_grad_norm": None}
    settings = ["train.max_skipped_steps=3", f"train.non_finite={policy}", "evaluation.every_steps=null"]
    done = general(run_config, *settings)
    assert done.returncode == 1
    in_a_row = {"stop": 1, "skip": 3}[policy]
    assert f"is not finite, {in_a_row} steps in a row" in done.stderr
    assert "Traceback" not in done.stderr


def test_losses_in_the_log_are_means_over_all_ranks(run_config: dict[str, Any], general: Launch) -> None:
    run_config["students"][0]["optimizer"] |= {"lr": 1e-30}
    logged = []
    for ranks, by in ((1, "python"), (2, "torchrun")):
        done = general(
            run_config, f"output={run_config['output']}-{ranks}", "train.steps=2", ranks=ranks, by=by
        )
        assert done.returncode == 0, done.stderr
        lines = [line for line in done.stderr.splitlines() if "step 2/2  loss" in line]
        logged.append(float(lines[0].split("loss ")[1].split()[0]))
    assert math.isclose(logged[0], logged[1], rel_tol=0.05), "dropout differs by rank, the mean hardly"
