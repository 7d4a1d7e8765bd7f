"""The teacher: read whole, checked, and never trained."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, BertForMaskedLM, MPNetConfig, MPNetModel

from configs.schema import Precision, TeacherConfig
from tests.trainer.tiny import rows, tiny_config, tiny_encoder
from trainer.encoders import check_sha256, load_encoder, load_teacher, load_teacher_config, load_tokenizer

CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A saved BERT with its pooler."""
    tiny_encoder("bert").save_pretrained(tmp_path / "teacher")
    return tmp_path / "teacher"


@pytest.mark.parametrize("precision", Precision)
def test_a_teacher_is_ready_to_be_read_and_never_to_be_trained(folder, precision):
    teacher = load_teacher(TeacherConfig(model=str(folder), precision=precision), CPU)
    assert {value.dtype for value in teacher.parameters()} == {getattr(torch, {"fp32": "float32",
        "bf16": "bfloat16", "fp16": "float16"}[precision.value])}  # fmt: skip
    assert not any(module.training for module in teacher.modules())
    assert not any(value.requires_grad for value in teacher.parameters())
    assert not [name for name, _ in teacher.named_parameters() if "pooler" in name]
    stored = load_file(folder / "model.safetensors")
    for name, value in teacher.state_dict().items():
        assert torch.equal(value, stored[name].to(value.dtype)), name
    if precision is Precision.fp32:
        ids_BS, mask_BS = rows()
        expected = AutoModel.from_pretrained(folder).eval()(ids_BS, attention_mask=mask_BS).last_hidden_state
        assert torch.equal(teacher(ids_BS, attention_mask=mask_BS).last_hidden_state, expected)


def test_the_checksum_of_the_weights(folder):
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    check_sha256(TeacherConfig(model=str(folder), sha256=digest))
    with pytest.raises(ValueError, match=f"teacher.sha256={'0' * 64} does not match .*{digest}"):
        check_sha256(TeacherConfig(model=str(folder), sha256="0" * 64))
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "model.safetensors").write_bytes(data)
    with pytest.raises(ValueError, match="the file is damaged or another model"):
        check_sha256(TeacherConfig(model=str(folder), sha256=digest))
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="teacher.sha256 is set, but .*model.safetensors does not exist"):
        check_sha256(TeacherConfig(model=str(folder), sha256=digest))


def test_weights_that_the_file_lacks_are_no_teacher(folder):
    weights = load_file(folder / "model.safetensors")
    lacking = {name: value for name, value in weights.items() if "layer.3.output.dense" not in name}
    save_file(lacking, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ValueError, match="lacks 2 weights of a bert encoder, such as encoder.layer.3.output.dense.bias"
    ):
        load_teacher(TeacherConfig(model=str(folder)), CPU)


def test_an_encoder_is_found_inside_a_model_with_a_head(tmp_path, capfd, caplog):
    model = BertForMaskedLM(tiny_config("bert"))
    model.save_pretrained(tmp_path)
    capfd.readouterr()
    encoder = load_encoder(str(tmp_path), dtype=torch.float32)
    assert all(
        torch.equal(value, model.bert.state_dict()[name]) for name, value in encoder.state_dict().items()
    )
    assert capfd.readouterr() == ("", "") and not caplog.records


def test_folders_that_are_no_teacher(tmp_path, folder):
    missing = TeacherConfig(model=str(tmp_path / "none"))
    for load in (load_teacher_config, lambda config: load_teacher(config, CPU)):
        with pytest.raises(ValueError, match="none' cannot be read as the folder or hub name of an encoder"):
            load(missing)
    with pytest.raises(ValueError, match="teacher.model=.*none' has no tokenizer to read"):
        load_tokenizer(missing)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "brt"}))
    with pytest.raises(
        ValueError, match="teacher.model=.* cannot be read as the folder or hub name of an enc"
    ):
        load_teacher_config(TeacherConfig(model=str(folder)))
    (folder / "config.json").write_text(json.dumps(config))
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match="the weights of .*teacher cannot be read"):
        load_teacher(TeacherConfig(model=str(folder)), CPU)
    weights.unlink()
    with pytest.raises(ValueError, match="(?s)the weights of .*teacher cannot be read: .*model.safetensors"):
        load_teacher(TeacherConfig(model=str(folder)), CPU)


def test_a_teacher_whose_attention_cannot_be_captured(tmp_path):
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    MPNetModel(MPNetConfig(vocab_size=20, **shape)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="'mpnet' .* does not route its attention"):
        load_teacher(TeacherConfig(model=str(tmp_path)), CPU)


def test_the_tokenizer_is_the_teachers(tiny_tokenizer):
    tokenizer = load_tokenizer(TeacherConfig(model=str(tiny_tokenizer)))
    assert tokenizer.is_fast and tokenizer("bade").input_ids == [2, tokenizer.vocab["bade"], 3]
