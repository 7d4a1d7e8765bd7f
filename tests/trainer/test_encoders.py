"""Encoders: read whole and checked."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForMaskedLM, DistilBertConfig, ModernBertConfig

from configs.schema import TeacherConfig
from tests.trainer.tiny import tiny_config, tiny_encoder
from trainer.encoders import (
    attention_dropout,
    check_sha256,
    load_encoder,
    load_teacher_config,
    load_tokenizer,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A saved BERT with its pooler."""
    tiny_encoder("bert").save_pretrained(tmp_path / "teacher")
    return tmp_path / "teacher"


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
        load_encoder(str(folder))


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
    for load in (load_teacher_config, lambda config: load_encoder(config.model)):
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
        load_encoder(str(folder))
    weights.unlink()
    with pytest.raises(ValueError, match="(?s)the weights of .*teacher cannot be read: .*model.safetensors"):
        load_encoder(str(folder))


def test_the_tokenizer_is_the_teachers(tiny_tokenizer):
    tokenizer = load_tokenizer(TeacherConfig(model=str(tiny_tokenizer)))
    assert tokenizer.is_fast and tokenizer("bade").input_ids == [2, tokenizer.vocab["bade"], 3]


def test_the_setting_that_drops_out_attention_is_named() -> None:
    assert attention_dropout(BertConfig()) == "attention_probs_dropout_prob"
    assert attention_dropout(BertConfig(attention_probs_dropout_prob=0.0)) is None
    assert attention_dropout(DistilBertConfig()) == "attention_dropout"
    assert attention_dropout(ModernBertConfig()) is None
