"""Whole runs of launcher/general.py on several corpora of two row lengths, and beside damaged blocks."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from sharding.manifest import open_corpus
from tests.launcher.conftest import Launch, evaluations
from tests.launcher.test_general import assert_equal, final_weights
from tests.sharding.test_corpora import build_corpus

pytestmark = pytest.mark.network_of_ranks

WITHOUT_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


@pytest.fixture
def mixed(
    run_config: dict[str, Any], tiny_corpus: Path, tiny_tokenizer: Path, tmp_path: Path
) -> dict[str, Any]:
    """``run_config`` on rows of 32 and of 16 tokens, three to one."""
    short = build_corpus(tmp_path / "short", tiny_tokenizer, 16, 200)
    corpora = [{"corpus": str(tiny_corpus), "weight": 3, "name": "wiki"}, {"corpus": str(short), "weight": 1}]
    run_config["data"] = {"mixture": corpora, "group_blocks": 2}
    return run_config


def test_losses_by_corpus_and_the_same_on_any_number_of_ranks(
    mixed: dict[str, Any], general: Launch, tmp_path: Path
) -> None:
    mixed["students"][0]["overrides"] = WITHOUT_DROPOUT
    mixed["tracking"] = {"enabled": True, "uri": f"sqlite:///{tmp_path}/mlflow.db", "system_metrics": False}
    found = []
    for ranks, by in ((1, "python"), (2, "deepspeed"), (3, "torchrun")):
        output = str(tmp_path / f"run-{ranks}")
        done = general(mixed, f"output={output}", f"name=run-{ranks}", "train.steps=8", ranks=ranks, by=by)
        assert done.returncode == 0, done.stderr
        found.append([entry["losses"] for entry in evaluations(output)])
    for losses in found:
        for entry, expected in zip(losses, found[0], strict=True):
            assert entry == pytest.approx(expected, rel=2e-4)
        assert {"total", "corpus/wiki/total", "corpus/short/total", "corpus/short/hidden/2"} <= losses[
            0
        ].keys()
        assert losses[-1]["corpus/wiki/total"] < losses[0]["corpus/wiki/total"]
        assert losses[-1]["corpus/short/total"] < losses[0]["corpus/short/total"]
        low, high = sorted(losses[-1][f"corpus/{name}/total"] for name in ("wiki", "short"))
        assert low < losses[-1]["total"] < high

    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path}/mlflow.db")
    experiment = client.get_experiment_by_name("distillation")
    assert experiment is not None
    run = client.search_runs([experiment.experiment_id], filter_string="attributes.run_name = 'run-2'")[0]
    assert {entry.dataset.name for entry in run.inputs.dataset_inputs} == {"wiki", "short"}
    short = open_corpus(mixed["data"]["mixture"][1]["corpus"])
    assert run.data.tags["corpus.fingerprint.short"] == short.fingerprint

    def steps(key: str) -> list[int]:
        return [metric.step for metric in client.get_metric_history(run.info.run_id, key)]

    # One step in four draws from the short rows, and a step never draws from both.
    assert sorted(steps("loss/corpus/wiki/total") + steps("loss/corpus/short/total")) == list(range(1, 9))
    assert len(steps("loss/corpus/short/total")) == 2
    last = run.data.metrics
    assert last["progress/epoch/short"] == pytest.approx(2 * 24 / short.split("train").rows)


def test_a_mixture_resumes_bitwise_and_refuses_another(
    mixed: dict[str, Any], general: Launch, tmp_path: Path
) -> None:
    whole, broken = str(tmp_path / "whole"), str(tmp_path / "broken")
    schedule = ["students.0.optimizer.decay=constant", "checkpoint.every_steps=3"]  # whatever the length
    assert general(mixed, f"output={whole}", "train.steps=8", *schedule).returncode == 0
    assert general(mixed, f"output={broken}", "train.steps=3", *schedule).returncode == 0
    done = general(mixed, f"output={broken}", "train.steps=8", *schedule)
    assert done.returncode == 0 and "resumed at step 3" in done.stderr, done.stderr
    assert_equal(final_weights(broken), final_weights(whole))

    done = general(mixed, f"output={broken}", "train.steps=8", *schedule, "data.mixture.1.weight=2")
    assert done.returncode == 2 and "the corpus or mixture has fingerprint" in done.stderr


def test_mistakes_are_told_together(mixed: dict[str, Any], general: Launch) -> None:
    mixed["data"]["mixture"][1]["weight"] = -1
    mixed["data"]["corpus"] = mixed["data"]["mixture"][0]["corpus"]
    done = general(mixed)
    assert done.returncode == 2
    assert "data.mixture.1.weight=-1.0 must be above 0" in done.stderr
    assert "data.mixture with 2 corpora: set one of the two" in done.stderr


def damaged_copy(corpus: Path, folder: Path, split: str, block: int) -> Path:
    """A copy with one bit of one block's ids flipped."""
    copy = shutil.copytree(corpus, folder)
    places = [(shard, each) for shard in open_corpus(copy).split(split).shards for each in shard.blocks]
    shard, damaged = places[block]
    with open(copy / shard.path, "r+b") as file:
        file.seek(damaged.ids.offset + 300)
        byte = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte[0] ^ 1]))
    return copy


def test_quarantine_is_part_of_the_state_and_the_same_on_any_ranks(
    run_config: dict[str, Any], general: Launch, tiny_corpus: Path, tmp_path: Path
) -> None:
    """The damaged block is met in the middle of the run; by then one rank or all of them may need it."""
    run_config["data"]["corpus"] = str(damaged_copy(tiny_corpus, tmp_path / "damaged", "train", 4))
    run_config["students"][0]["overrides"] = WITHOUT_DROPOUT
    run_config["students"][0]["optimizer"]["decay"] = "constant"
    done = general(run_config, "train.steps=27")
    assert done.returncode == 2 and "corrupt shard" in done.stderr and "Traceback" not in done.stderr

    settings = ["data.damaged=quarantine", "train.steps=27", "checkpoint.every_steps=9"]
    found = {}
    for ranks, by in ((1, "python"), (3, "torchrun")):
        output = str(tmp_path / f"ranks-{ranks}")
        done = general(run_config, f"output={output}", *settings, ranks=ranks, by=by)
        assert done.returncode == 0, done.stderr
        assert done.stderr.count("block quarantined, its rows are masked: corrupt shard") == 1
        (state,) = {json.loads((path / "run.json").read_text())["progress"]["quarantined"][0][1]
                    for path in (Path(output) / "checkpoints").glob("step-00000027")}  # fmt: skip
        assert state == 4
        found[ranks] = evaluations(output)
    for entry, expected in zip(found[3], found[1], strict=True):
        assert entry["losses"] == pytest.approx(expected["losses"], rel=2e-4)

    # Stopped after the block was found, and gone on with: it is known from the start, the end is the same.
    output = str(tmp_path / "resumed")
    assert general(run_config, f"output={output}", *settings, "train.steps=18").returncode == 0
    done = general(run_config, f"output={output}", *settings)
    assert done.returncode == 0 and "resumed at step 18" in done.stderr
    assert "block quarantined" not in done.stderr
    assert_equal(final_weights(output), final_weights(str(tmp_path / "ranks-1")))


def test_a_damaged_held_out_block_does_not_end_a_run_under_quarantine(
    run_config: dict[str, Any], general: Launch, tiny_corpus: Path, tmp_path: Path
) -> None:
    run_config["data"]["corpus"] = str(damaged_copy(tiny_corpus, tmp_path / "damaged", "heldout", 0))
    done = general(run_config, "data.damaged=quarantine", "evaluation.rows=87", "train.steps=3")
    assert done.returncode == 0, done.stderr
    assert "rows masked in the heldout split" in done.stderr
    assert len(evaluations(run_config["output"])) == 2
