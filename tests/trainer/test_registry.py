"""The registry in real stores: an SQLite file and a real ``mlflow server``; read by MLflow's own loaders."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow.pyfunc
import mlflow.transformers
import pytest
import torch
from huggingface_hub import ModelCard
from mlflow import MlflowClient
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

from tests.trainer.test_tracking import start
from trainer.registry import load_registered, register
from trainer.tracking import Run
from trainer.tracking_store import TrackingError

TEXTS = ["ba de fi", "go kula lala mimi, no pe"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Path) -> Path:
    """A classifier of two classes, an ONNX file (of any content) and a card."""
    folder = tmp_path_factory.mktemp("exported")
    tokenizer = AutoTokenizer.from_pretrained(tiny_tokenizer)
    shape: dict[str, Any] = {
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 8,
    }
    names: dict[str, Any] = {"id2label": {0: "bad", 1: "good"}, "label2id": {"bad": 0, "good": 1}}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=len(tokenizer), max_position_embeddings=32, initializer_range=1.0, **shape, **names
        )
        BertForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "model.onnx").write_bytes(b"onnx")
    ModelCard("---\nlibrary_name: transformers\n---\n\n# A card\n").save(folder / "README.md")
    return folder


@pytest.fixture(scope="module", params=["sqlite", "server"])
def uri(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    if request.param == "server":
        return str(request.getfixturevalue("server").uri)
    return f"sqlite:///{tmp_path_factory.mktemp('store')}/mlflow.db"


@pytest.fixture
def run(uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    run = start(uri, tmp_path)
    yield run
    run.finish()


def expected(folder: Path) -> list[tuple[str, float]]:
    """The class and its probability for each text, worked out by hand."""
    model = BertForSequenceClassification.from_pretrained(folder).eval()
    inputs = AutoTokenizer.from_pretrained(folder)(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        best = model(**inputs).logits.softmax(dim=-1).max(dim=-1)
    return [
        (("bad", "good")[index], value) for value, index in zip(*map(torch.Tensor.tolist, best), strict=True)
    ]


def test_a_registered_model_is_what_any_loader_of_mlflow_reads(
    run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = register(run, "tiny", folder, "text-classification", {"task": "sst2"}, "# A card")
    assert version == "models:/tiny/1"
    assert register(run, "tiny", folder, "text-classification", {}) == "models:/tiny/2"

    stored = MlflowClient(run.uri, registry_uri=run.uri).get_model_version("tiny", "1")
    assert (stored.run_id, stored.tags, stored.description) == (run.id, {"task": "sst2"}, "# A card")
    weights = load_registered(run.uri, version).state_dict()
    for name, value in BertForSequenceClassification.from_pretrained(folder).state_dict().items():
        assert torch.equal(weights[name], value)

    monkeypatch.setenv("MLFLOW_TRACKING_URI", run.uri)  # as a user does
    pipeline = mlflow.transformers.load_model(version)
    found = [(own["label"], own["score"]) for own in pipeline(TEXTS)]
    assert [label for label, _ in found] == [label for label, _ in expected(folder)]
    assert [score for _, score in found] == pytest.approx([score for _, score in expected(folder)], rel=1e-5)
    assert list(mlflow.pyfunc.load_model(version).predict(TEXTS)["label"]) == [label for label, _ in found]


def test_nothing_that_is_stored_could_be_executed(run: Run, folder: Path, tmp_path: Path) -> None:
    register(run, "listed", folder, "text-classification", {})
    root = Path(MlflowClient(run.uri).download_artifacts(run.id, "model", str(tmp_path)))
    files = {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}
    assert {"MLmodel", "model/model.safetensors", "model/model.onnx", "model_card.md"} <= files
    assert {Path(file).suffix for file in files - {"MLmodel"}} <= {
        *(".safetensors", ".onnx", ".json", ".md", ".txt", ".yaml"),
    }
    assert "torch==" in (root / "requirements.txt").read_text()
    assert "+" not in (root / "requirements.txt").read_text()  # a local build is on no package index


def test_a_store_that_refuses_is_an_error(run: Run, folder: Path) -> None:
    with pytest.raises(TrackingError, match=r"model a/b could not be registered .*--no-registry"):
        register(run, "a/b", folder, "text-classification", {})
