"""ONNX files against the models that they were made of, called directly."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertModel,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    PreTrainedModel,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from trainer.onnx_export import TOLERANCE, difference, export_onnx, quantize_int8
from trainer.served import Ids, input_names, load_served, onnx_forward, open_session, torch_forward

SMALL: dict[str, Any] = {
    "vocab_size": 90,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
BERT = BertConfig(**SMALL, intermediate_size=40, max_position_embeddings=40)
ROBERTA = RobertaConfig(**SMALL, intermediate_size=40, max_position_embeddings=40, type_vocab_size=1)
DISTILBERT = DistilBertConfig(vocab_size=90, dim=24, n_layers=2, n_heads=2, hidden_dim=40)

MODELS: dict[str, tuple[Any, Any, list[str]]] = {
    "bert, classes": (BertForSequenceClassification, BERT, ["logits"]),
    "bert, spans": (BertForQuestionAnswering, BERT, ["start_logits", "end_logits"]),
    "bert, masked": (BertForMaskedLM, BERT, ["logits"]),
    "bert alone": (BertModel, BERT, ["last_hidden_state"]),
    "roberta": (RobertaForSequenceClassification, ROBERTA, ["logits"]),
    "distilbert": (DistilBertForSequenceClassification, DISTILBERT, ["logits"]),
}


def made(kind: str, seed: int = 0) -> PreTrainedModel:
    """A model whose outputs are of order one."""
    model_class, config, _ = MODELS[kind]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = model_class(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 2:
                    parameter.normal_(std=0.2)
    return model.eval()


def rows(count: int, length: int) -> tuple[Ids, Ids, Ids]:
    """Random rows of two segments, each shorter than the one before."""
    random = np.random.default_rng(length)
    ids = random.integers(5, 90, (count, length))
    lengths = np.maximum(1, length - 2 * np.arange(count))[:, None]
    mask = (np.arange(length) < lengths).astype(np.int64)
    return ids, mask, (np.arange(length) >= lengths // 3).astype(np.int64) * mask


@pytest.fixture(scope="module", params=MODELS)
def exported(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, PreTrainedModel, Path]:
    path = tmp_path_factory.mktemp("onnx") / "model.onnx"
    model = made(request.param)
    assert export_onnx(model, path) < TOLERANCE
    return request.param, model, path


def test_every_shape_gives_what_pytorch_gives(exported: tuple[str, PreTrainedModel, Path]) -> None:
    kind, model, path = exported
    forward = onnx_forward(open_session(path, threads=1))
    for shape in ((1, 1), (1, 38), (5, 9), (17, 20)):
        batch = rows(*shape)
        inputs = dict(zip(input_names(model), map(torch.from_numpy, batch), strict=False))
        with torch.no_grad():
            expected = model(**inputs)
        found = forward(*batch)
        assert list(found) == MODELS[kind][2]
        for name, value in found.items():
            valid = batch[1].astype(bool) if value.shape[:2] == shape else ...
            np.testing.assert_allclose(value[valid], expected[name].numpy()[valid], rtol=1e-4, atol=1e-4)


def test_both_axes_are_free_and_inputs_have_their_names(exported: tuple[str, PreTrainedModel, Path]) -> None:
    _, model, path = exported
    graph = onnx.load(path).graph
    onnx.checker.check_model(path)
    assert tuple(given.name for given in graph.input) == input_names(model)
    for given in graph.input:
        axes = [axis.dim_param for axis in given.type.tensor_type.shape.dim]
        assert axes == ["batch", "sequence"]
    assert {node.domain for node in graph.node} == {""}  # of standard ONNX: any runtime reads it


def test_int8_is_smaller_and_close(exported: tuple[str, PreTrainedModel, Path]) -> None:
    _, model, path = exported
    target = path.with_name("int8.onnx")
    quantize_int8(path, target)
    kinds = {initializer.data_type for initializer in onnx.load(target).graph.initializer}
    assert onnx.TensorProto.INT8 in kinds
    assert target.stat().st_size < path.stat().st_size
    assert TOLERANCE < difference(model, target) < 0.1


def test_another_models_file_is_found_to_differ(exported: tuple[str, PreTrainedModel, Path]) -> None:
    kind, _, path = exported
    assert difference(made(kind, seed=1), path) > 0.05


def test_a_file_that_computes_something_else_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer.onnx_export.TOLERANCE", 1e-12)  # nothing is as close as that
    with pytest.raises(ValueError, match="computes something else than BertForSequenceClassification"):
        export_onnx(made("bert, classes"), tmp_path / "model.onnx")


@pytest.mark.parametrize("kind", MODELS)
def test_a_folder_is_loaded_with_the_head_that_it_has(kind: str, tmp_path: Path) -> None:
    model = made(kind)
    model.save_pretrained(tmp_path)
    loaded = load_served(tmp_path)
    assert type(loaded) is type(model) and not loaded.training
    batch = rows(3, 7)
    ours, theirs = torch_forward(loaded)(*batch), torch_forward(model)(*batch)
    assert list(ours) == MODELS[kind][2]
    assert all(np.array_equal(ours[name], theirs[name]) for name in ours)


def test_a_head_that_the_weights_lack_is_refused(tmp_path: Path) -> None:
    made("bert alone").save_pretrained(tmp_path)
    config = BertConfig.from_pretrained(tmp_path)
    config.architectures = ["BertForSequenceClassification"]
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"lacks 2 weights .* such as classifier.bias; they would be random"):
        load_served(tmp_path)


def test_a_folder_that_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot be read"):
        load_served(tmp_path / "nothing")


def test_a_device_that_the_runtime_does_not_know_is_refused(
    exported: tuple[str, PreTrainedModel, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(ValueError, match="install onnxruntime-gpu"):
        open_session(exported[2], device="cuda")
