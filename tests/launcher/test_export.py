"""``launcher/export.py`` on a classifier, a task corpus and a run folder; scores worked out from texts."""

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from mlflow import MlflowClient
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification, BertModel

from configs.schema import TeacherConfig
from configs.student_schema import LossConfig, RelationConfig
from configs.task_schema import TaskConfig, TaskSourceConfig
from launcher.card import losses
from launcher.export import main
from sharding.task_corpus import build
from tests.conftest import WORDS
from tests.launcher.conftest import student

NAMES = ["entailment", "not_entailment"]
SHAPE: dict[str, Any] = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}


@pytest.fixture(scope="module")
def pairs() -> list[tuple[str, str, str]]:
    """60 pairs of texts and their class."""
    random = np.random.default_rng(3)
    texts = [[" ".join(random.choice(WORDS, int(n))) for n in random.integers(3, 12, 2)] for _ in range(60)]
    return [(a, b, NAMES[int(random.integers(2))]) for a, b in texts]


@pytest.fixture(scope="module")
def corpus(
    tmp_path_factory: pytest.TempPathFactory, pairs: list[tuple[str, str, str]], tiny_tokenizer: Path
) -> Path:
    folder = tmp_path_factory.mktemp("rte")
    lines = ["index\tsentence1\tsentence2\tlabel"]
    lines += [f"{n}\t{a}\t{b}\t{label}" for n, (a, b, label) in enumerate(pairs)]
    for name in ("train", "dev"):
        (folder / f"{name}.tsv").write_text("\n".join(lines) + "\n")
    source, teacher = TaskSourceConfig(path=str(folder)), TeacherConfig(model=str(tiny_tokenizer))
    build(TaskConfig(task="rte", output=str(folder), source=source, seq_len=32, teacher=teacher))
    return folder / "data"


def write_run(root: Path, config: dict[str, Any], tokenizer: Path, head: bool = True) -> Path:
    """A run folder as a finished run leaves it; return the export of its student."""
    run, model = root / "run", root / "run/export/small"
    with torch.random.fork_rng():
        torch.manual_seed(5)
        labels: dict[str, Any] = {"id2label": dict(enumerate(NAMES)), "initializer_range": 0.3}
        own = BertConfig(vocab_size=232, max_position_embeddings=64, **SHAPE, **(labels if head else {}))
        (BertForSequenceClassification(own) if head else BertModel(own)).save_pretrained(model)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(model)
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    origin = {"command": "python launcher/task.py", "revision": "abc123", "versions": {"torch": "2.13.0"}}
    (run / "origin.json").write_text(json.dumps(origin))
    (run / "summary.json").write_text(json.dumps({"steps": 6, "rows": 144}))
    (run / "mlflow.json").write_text(json.dumps({"": "0" * 32}))
    return model


@pytest.fixture
def model(tmp_path: Path, run_config: dict[str, Any], tiny_tokenizer: Path) -> Path:
    run_config["students"] = [student("small", losses={"attention": 0.5, "cosine": 1.0})]
    return write_run(tmp_path, run_config, tiny_tokenizer)


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def right(pairs: list[tuple[str, str, str]], output: Path, file: str) -> float:
    """Accuracy of a file, one text after the other, without code of ours."""
    tokenizer = AutoTokenizer.from_pretrained(output)
    classifier = BertForSequenceClassification.from_pretrained(output).eval()
    session = onnxruntime.InferenceSession(output / file) if file.endswith("onnx") else None
    found = []
    for a, b, label in pairs:
        inputs = tokenizer(a, b, truncation=True, max_length=32, return_tensors="pt")
        if session is None:
            with torch.no_grad():
                logits = classifier(**inputs).logits.numpy()
        else:
            (logits,) = session.run(None, {name: value.numpy() for name, value in inputs.items()})
        found.append(NAMES[int(logits.argmax())] == label)
    return sum(found) / len(found)


def test_every_form_is_written_scored_registered_and_described(
    tmp_path: Path, model: Path, corpus: Path, pairs: list[tuple[str, str, str]]
) -> None:
    output = tmp_path / "dist/rte"
    arguments = ["--model", str(model), "--output", str(output), "--corpus", str(corpus)]
    assert main([*arguments, "--int8-tolerance", "0.1", "--name", "tiny-rte"]) == 0
    assert {path.name for path in output.iterdir()} == {
        *("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"),
        *("model.onnx", "model-int8.onnx", "README.md"),
    }
    card = ModelCard.load(output / "README.md")
    assert card.data.eval_results[0].metric_value == pytest.approx(right(pairs, output, "model.safetensors"))
    for file in ("model.safetensors", "model.onnx"):
        score = right(pairs, output, file)
        assert f"| `{file}` | heldout (60 rows) | accuracy {score:.4f} |" in card.text
    for fact in (
        "# tiny-rte",
        "(2 layers, hidden size 24), distilled from `",
        "Classes, in order: entailment, not_entailment",
        "AutoModelForSequenceClassification.from_pretrained",
        "| losses | embedding 1, hidden 1, attention 0.5, cosine 1 |",
        "| optimizer steps | 6 |",
        "| code | abc123 |",
        "| command | `python launcher/task.py` |",
    ):
        assert fact in card.text

    store = f"sqlite:///{tmp_path}/mlflow/mlflow.db"  # where the run itself would have been tracked
    client = MlflowClient(store, registry_uri=store)
    version = client.get_model_version("tiny-rte", "1")
    run = client.get_run(str(version.run_id))
    assert version.tags["task"] == "rte" and version.description == (output / "README.md").read_text()
    assert run.data.tags["mlflow.parentRunId"] == "0" * 32 and run.info.status == "FINISHED"
    assert run.data.tags["registered"] == "models:/tiny-rte/1"
    assert run.data.metrics["export/model.onnx/heldout/accuracy"] == pytest.approx(
        right(pairs, output, "model.onnx")
    )


def test_an_int8_score_that_falls_too_far_leaves_nothing(
    tmp_path: Path, model: Path, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "dist"
    output.mkdir()
    (output / "old").touch()
    arguments = ["--model", str(model), "--output", str(output), "--corpus", str(corpus), "--no-registry"]
    assert main([*arguments, "--int8-tolerance", "-1"]) == 2  # less than no difference
    assert "allowed is -1.0. Allow more with --int8-tolerance" in capsys.readouterr().err
    assert [path.name for path in output.iterdir()] == ["old"]
    assert [path.name for path in tmp_path.glob(".*partial")] == []


def test_a_dry_run_checks_and_writes_nothing(
    tmp_path: Path, model: Path, corpus: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    arguments = ["--model", str(model), "--output", str(tmp_path / "out"), "--dry-run"]
    assert main([*arguments, "--corpus", str(corpus)]) == 0
    said = caplog.text
    assert "BertForSequenceClassification" in said and f"scored on {corpus}" in said and "model.onnx" in said
    assert main([*arguments, "--corpus", str(tmp_path / "none")]) == 2
    assert main([*arguments, "--tracking-uri", "http://127.0.0.1:9/"]) == 0
    assert "does not answer" in caplog.text
    assert not (tmp_path / "out").exists() and not (tmp_path / "mlflow").exists()


def test_a_general_student_is_exported_as_the_encoder_that_it_is(
    tmp_path: Path, run_config: dict[str, Any], tiny_tokenizer: Path
) -> None:
    model, output = write_run(tmp_path, run_config, tiny_tokenizer, head=False), tmp_path / "dist"
    assert main(["--model", str(model), "--output", str(output)]) == 0
    (hidden,) = onnxruntime.InferenceSession(output / "model.onnx").get_outputs()
    assert (hidden.name, hidden.shape) == ("last_hidden_state", ["batch", "sequence", 24])
    text = (output / "README.md").read_text()
    assert "pipeline_tag: feature-extraction" in text and "AutoModel.from_pretrained" in text
    assert "## Scores" not in text


@pytest.mark.parametrize(
    ("output", "told"), [("run", "holds --model"), ("run/export/small", "holds --model")]
)
def test_the_source_is_not_written_over(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str], output: str, told: str
) -> None:
    assert main(["--model", str(model), "--output", str(tmp_path / output)]) == 2
    assert told in capsys.readouterr().err
    assert (model / "model.safetensors").is_file()


def test_a_model_that_is_not_the_tasks_is_refused(
    tmp_path: Path,
    run_config: dict[str, Any],
    tiny_tokenizer: Path,
    corpus: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = write_run(tmp_path, run_config, tiny_tokenizer, head=False)
    arguments = ["--model", str(model), "--output", str(tmp_path / "dist"), "--corpus", str(corpus)]
    assert main(arguments) == 2
    assert "is a BertModel, task rte needs one ForSequenceClassification" in capsys.readouterr().err
    assert not (tmp_path / "dist").exists()


def test_losses_are_told_by_what_is_on() -> None:
    relation = LossConfig(embedding=0, hidden=0, attention=0, relation=RelationConfig(weight=2.0))
    assert losses(relation) == "relation 2"
    task = LossConfig(embedding=0, hidden=0, attention=0, logits=1.0, labels=0.25, temperature=2.0)
    assert losses(task) == "logits 1, labels 0.25, temperature 2"


def test_a_model_that_learned_from_labels_alone_is_not_called_distilled(
    tmp_path: Path, run_config: dict[str, Any], tiny_tokenizer: Path
) -> None:
    alone = {"embedding": 0.0, "hidden": 0.0, "attention": 0.0, "labels": 1.0}
    run_config["students"] = [student("small", losses=alone)]
    model, output = write_run(tmp_path, run_config, tiny_tokenizer), tmp_path / "dist"
    assert main(["--model", str(model), "--output", str(output), "--no-registry"]) == 0
    text = (output / "README.md").read_text()
    assert "fine-tuned on labels, without a teacher" in text and "distilled" not in text
    assert "| losses | labels 1 |" in text and "| teacher |" not in text and "| layer map |" not in text
