"""Export: what ``transformers`` loads from the folder is the student that was trained."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoTokenizer

from configs.student_schema import Projection
from tests.conftest import small_disk
from tests.trainer.tiny import ARCHITECTURES, rows, tiny_encoder, tiny_student
from trainer.capture import capture
from trainer.export import export
from trainer.models import Student, build_student


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer: Path):
    return AutoTokenizer.from_pretrained(tiny_tokenizer)


def trained(architecture: str, seed: int = 1) -> Student:
    """A student as after training: every parameter has moved, nothing is at its initial value."""
    teacher = tiny_encoder(architecture)
    student = build_student(
        tiny_student(layers=3, layer_map=[1, 2, 4], projection=Projection.per_layer),
        lambda head: teacher,
        teacher.config,
        seed,
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return student.eval()


def write(folder: Path, student: Student, tokenizer) -> Path:
    weights = {name: value.detach().clone() for name, value in student.named_parameters()}
    return export(folder, student.encoder, weights, tokenizer)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_outputs_are_those_of_the_trained_student(architecture, tokenizer, tmp_path, capfd, caplog):
    student = trained(architecture)
    folder = write(tmp_path / "export" / "student", student, tokenizer)
    capfd.readouterr(), caplog.clear()
    loaded, report = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    shown = capfd.readouterr()
    assert "warn" not in (shown.out + shown.err).lower() and not caplog.records
    assert not loaded.training and loaded.dtype == torch.float32
    assert loaded.config._attn_implementation == "sdpa" and loaded.config.num_hidden_layers == 3

    ids_BS, mask_BS = rows(3, 20)
    with torch.no_grad():
        expected = capture(student.encoder, ids_BS, mask_BS)
        outputs = loaded(input_ids=ids_BS, attention_mask=mask_BS, output_hidden_states=True)
    assert torch.equal(outputs.last_hidden_state, expected.hidden[-1])
    for ours, theirs in zip(outputs.hidden_states, expected.hidden, strict=True):
        assert torch.equal(ours, theirs)

    stored = load_file(folder / "model.safetensors")
    assert not [name for name in stored if "projections" in name]
    assert {tuple(value.shape) for value in student.projections.parameters()} == {(48, 24)}
    encoder = dict(student.encoder.named_parameters())
    assert {name for name in stored if "pooler" not in name} == encoder.keys()
    assert all(torch.equal(stored[name], value) for name, value in encoder.items())


def test_the_tokenizer_is_the_teachers(tokenizer, tmp_path):
    folder = write(tmp_path / "student", trained("bert"), tokenizer)
    loaded = AutoTokenizer.from_pretrained(folder)
    text = "Bade (gofi) kula, mino x7."
    assert loaded(text, text).data == tokenizer(text, text).data and loaded.vocab == tokenizer.vocab


def test_a_process_without_our_code_loads_it(tokenizer, tmp_path):
    student = trained("bert")
    folder = write(tmp_path / "student", student, tokenizer)
    script = (
        "import sys, json; from transformers import AutoModel, AutoTokenizer\n"
        "inputs = AutoTokenizer.from_pretrained(sys.argv[1])('bade gofi', return_tensors='pt')\n"
        "print(json.dumps(AutoModel.from_pretrained(sys.argv[1])(**inputs).last_hidden_state.tolist()))"
    )
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", script, str(folder)],
        capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    inputs = tokenizer("bade gofi", return_tensors="pt")
    expected = student.encoder(inputs.input_ids, attention_mask=inputs.attention_mask).last_hidden_state
    torch.testing.assert_close(torch.tensor(json.loads(done.stdout)), expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("architecture", ["bert", "electra"])
def test_the_same_bytes_twice_whatever_was_drawn_before(architecture, tokenizer, tmp_path):
    student = trained(architecture)
    torch.manual_seed(1)
    first = write(tmp_path / "first", student, tokenizer)
    torch.rand(5)
    before = torch.get_rng_state()
    second = write(tmp_path / "second", student, tokenizer)
    assert torch.equal(torch.get_rng_state(), before)
    assert sorted(path.name for path in first.iterdir()) == sorted(path.name for path in second.iterdir())
    for path in first.iterdir():
        assert path.read_bytes() == (second / path.name).read_bytes(), path.name
    has_pooler = any("pooler" in name for name in load_file(first / "model.safetensors"))
    assert has_pooler == (architecture == "bert")


def test_an_export_replaces_the_one_before_whole(tokenizer, tmp_path):
    folder = write(tmp_path / "student", trained("bert", seed=1), tokenizer)
    (folder / "stale.bin").write_text("of the old one")
    newer = trained("bert", seed=2)
    write(folder, newer, tokenizer)
    assert not (folder / "stale.bin").exists() and [path.name for path in tmp_path.iterdir()] == ["student"]
    stored = load_file(folder / "model.safetensors")
    name = "embeddings.word_embeddings.weight"
    assert torch.equal(stored[name], newer.encoder.state_dict()[name])


def test_an_export_that_fails_leaves_the_one_before(tokenizer, tmp_path):
    with small_disk(tmp_path / "disk", 400 * 1024) as disk:
        folder = write(disk / "student", trained("bert", seed=1), tokenizer)
        before = {path.name: path.read_bytes() for path in folder.iterdir()}
        (disk / "filler").write_bytes(bytes(os.statvfs(disk).f_bavail * 4096 - 30_000))
        with pytest.raises(Exception, match="No space left on device"):
            write(folder, trained("bert", seed=2), tokenizer)
        assert sorted(path.name for path in disk.iterdir()) == ["filler", "student"]
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_weights_of_another_student_are_our_mistake(tokenizer, tmp_path):
    student = trained("bert")
    weights = dict(student.named_parameters())
    del weights["encoder.encoder.layer.0.output.dense.bias"]
    with pytest.raises(AssertionError, match="layer.0.output.dense.bias"):
        export(tmp_path / "student", student.encoder, weights, tokenizer)
    assert list(tmp_path.iterdir()) == []
