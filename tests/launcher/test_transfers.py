"""Whole runs with every kind of transfer: cosine, relations and predictions beside the paper's terms."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel, AutoModelForMaskedLM, AutoTokenizer, BertForMaskedLM

from tests.launcher.conftest import Launch, evaluations, student, write_teacher

pytestmark = pytest.mark.network_of_ranks

EVERY = {
    "cosine": 0.5,
    "relation": {"weight": 0.3, "heads": 6, "teacher_layer": 3},
    "prediction": 2.0,
    "temperature": 2.0,
}
WITHOUT_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


@pytest.fixture(scope="session")
def teacher_with_head(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Path) -> Path:
    """Folder of a random BERT of 4 layers x 48 with a masked-language-model head."""
    return write_teacher(tmp_path_factory.mktemp("teacher-with-head"), tiny_tokenizer, BertForMaskedLM)


def test_every_transfer_on_any_ranks_and_stage_and_resumed(
    run_config: dict[str, Any], general: Launch, tmp_path: Path, teacher_with_head: Path
) -> None:
    run_config["teacher"]["model"] = str(teacher_with_head)
    run_config["students"] = [
        student("small", overrides=WITHOUT_DROPOUT, losses=EVERY),
        student("plain", overrides=WITHOUT_DROPOUT),
    ]
    found = {}
    for by, ranks, stage, parts in (("python", 1, 0, (6,)), ("torchrun", 2, 3, (2, 6))):
        output = str(tmp_path / f"run-{stage}")
        for steps in parts:  # the second start resumes
            done = general(
                run_config,
                f"output={output}",
                f"deepspeed.zero_stage={stage}",
                "students.0.optimizer.decay=constant",
                "students.1.optimizer.decay=constant",
                f"train.steps={steps}",
                ranks=ranks,
                by=by,
            )
            assert done.returncode == 0, done.stderr
        assert ("resumed at step 2" in done.stderr) == (len(parts) > 1)
        found[stage] = evaluations(output)
    terms = {"cosine/1", "cosine/2", "relation/qq", "relation/kk", "relation/vv", "prediction", "hidden/1"}
    first, last = (
        [entry["losses"] for entry in found[0] if entry["student"] == "small"][position]
        for position in (0, -1)
    )
    assert terms < set(first)
    for term in (*terms, "total"):
        assert 0 < last[term] < first[term], term
    of_both = [entry for entry in found[3] if entry["step"] != 2]
    for ours, theirs in zip(found[0], of_both, strict=True):
        assert ours["losses"] == pytest.approx(theirs["losses"], rel=1e-4)

    exported = tmp_path / "run-3/export/small"
    predicting = AutoModelForMaskedLM.from_pretrained(exported).eval()
    tokens = AutoTokenizer.from_pretrained(exported)("bade figo", return_tensors="pt")
    states = AutoModel.from_pretrained(exported).eval()(**tokens).last_hidden_state
    torch.testing.assert_close(predicting.bert(**tokens).last_hidden_state, states)
    assert predicting.cls.predictions.decoder.weight is predicting.bert.embeddings.word_embeddings.weight
    trained, fresh = predicting.cls.predictions.bias, BertForMaskedLM(predicting.config).cls.predictions.bias
    assert not torch.equal(trained, fresh)


def test_predictions_of_a_teacher_without_that_head_are_refused(
    run_config: dict[str, Any], general: Launch
) -> None:
    run_config["students"][0]["losses"] = {"prediction": 1.0}
    done = general(run_config)
    assert done.returncode == 2
    assert "with a masked-language-model head" in done.stderr and "losses.prediction=0" in done.stderr
