"""The teacher: what it leaves out changes nothing of what it gives, wherever its parameters are."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForMaskedLM, MPNetConfig, MPNetModel

from configs.schema import Placement, Precision, Quantization, RunConfig, TeacherConfig
from tests.trainer.teacher_worker import tensors
from tests.trainer.tiny import (
    ARCHITECTURES,
    LAYERS,
    WIDTH,
    rows,
    tiny_config,
    tiny_encoder,
    tiny_student,
)
from trainer.capture import Head, Need, capture, enable_capture
from trainer.encoders import load_whole_teacher
from trainer.layout import Layout
from trainer.memory import placements
from trainer.models import Inputs, attention_mask
from trainer.teacher import check_machine, load_teacher
from trainer.world import World

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
PLACE = World(rank=0, size=1, local_rank=0, local_size=1, device=CPU)
NEEDS = {
    "some": Need(hidden=frozenset({0, 2}), scores=frozenset({1, 3})),
    "attention only": Need(scores=frozenset({3}), values=frozenset({3})),
    "hidden only": Need(hidden=frozenset({3})),
    "embeddings only": Need(hidden=frozenset({0})),
    "all": Need.everything(LAYERS),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A saved BERT with its pooler."""
    return saved("bert", tmp_path / "teacher")


def saved(architecture: str, folder: Path) -> Path:
    tiny_encoder(architecture).save_pretrained(folder)
    return folder


def padded() -> Inputs:
    ids_BS, mask_BS = rows()
    found = Layout(mask_BS, full=False)
    return Inputs(ids_BS, found, attention_mask(found), torch.zeros_like(ids_BS))


def flops(call: Any) -> int:
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


@pytest.mark.parametrize("precision", Precision)
def test_a_teacher_is_ready_to_be_read_and_never_to_be_trained(folder, precision):
    everything = Need.everything(LAYERS)
    teacher = load_teacher(TeacherConfig(model=str(folder), precision=precision), everything, PLACE)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision.value]
    assert {value.dtype for value in teacher.model.parameters()} == {dtype}
    assert not any(module.training for module in teacher.model.modules())
    assert not any(value.requires_grad for value in teacher.model.parameters())
    assert not [name for name, _ in teacher.model.named_parameters() if "pooler" in name]
    stored = load_file(folder / "model.safetensors")
    for name, value in teacher.model.state_dict().items():
        assert torch.equal(value, stored[name].to(dtype)), name
    assert teacher.hidden_size == WIDTH and teacher.config.num_hidden_layers == teacher.depth == LAYERS


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("needed", NEEDS)
def test_a_shortened_teacher_gives_bitwise_what_the_whole_one_does(architecture, needed, tmp_path):
    config = TeacherConfig(model=str(saved(architecture, tmp_path)), precision=Precision.fp32)
    need, inputs = NEEDS[needed], padded()
    teacher = load_teacher(config, need, PLACE)
    whole = load_whole_teacher(config, head=Head.none).eval()
    found = teacher(inputs)
    expected = capture(whole, inputs.ids_BS, inputs.attention_mask, need=need)
    assert len(tensors(found)) == len(need.hidden) + 2 * len(need.scores) + len(need.values)
    for ours, theirs in zip(tensors(found), tensors(expected), strict=True):
        assert torch.equal(ours, theirs)
    for ours, theirs in zip(found.scalings, expected.scalings, strict=True):
        assert ours in (theirs, 0.0)
    assert teacher.depth == need.depth(LAYERS)
    assert teacher.config.num_hidden_layers == LAYERS


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_layers_that_nobody_learns_from_take_neither_memory_nor_time(architecture, tmp_path):
    config = TeacherConfig(model=str(saved(architecture, tmp_path)), precision=Precision.fp32)
    inputs = padded()
    teachers = {name: load_teacher(config, need, PLACE) for name, need in NEEDS.items()}
    elements = {name: sum(p.numel() for p in own.model.parameters()) for name, own in teachers.items()}
    count = {name: flops(lambda own=own: own(inputs)) for name, own in teachers.items()}
    layer = (elements["all"] - elements["embeddings only"]) // LAYERS
    assert layer > 4 * WIDTH**2
    # ModernBERT's first layer has no norm, and its last one comes with another after it.
    assert elements["hidden only"] == pytest.approx(elements["all"] - layer, abs=2 * WIDTH)
    assert elements["some"] == elements["hidden only"] == elements["attention only"]
    # The third layer's attention product, output and feed-forward part are left out as well.
    assert count["some"] == count["attention only"] < count["hidden only"] < count["all"]
    assert count["hidden only"] - count["some"] > (count["all"] - count["hidden only"]) / 2
    assert count["embeddings only"] < count["all"] / 10


def test_what_a_teacher_gives_can_be_kept_for_a_students_backward_pass(folder):
    teacher = load_teacher(TeacherConfig(model=str(folder)), NEEDS["some"], PLACE)
    query = teacher(padded()).queries[2].float()
    own = torch.ones_like(query, requires_grad=True)
    (own * query).sum().backward()
    assert torch.equal(own.grad, query)


def test_a_teacher_with_its_head(tmp_path):
    torch.manual_seed(0)
    stock = AutoModelForMaskedLM.from_config(tiny_config("bert")).eval()
    stock.save_pretrained(tmp_path)
    inputs = padded()
    config = TeacherConfig(model=str(tmp_path), precision=Precision.fp32)
    found = load_teacher(config, Need(head=Head.masked_lm), PLACE)(inputs).prediction
    logits = stock(inputs.ids_BS, attention_mask=inputs.attention_mask).logits
    torch.testing.assert_close(found.features_BSE @ found.weight_VE.mT + found.bias_V, logits)


@pytest.mark.parametrize("architecture", ["bert", "modernbert"])
def test_compiled_layers_give_the_same_and_are_compiled(architecture, tmp_path):
    settings = {"model": str(saved(architecture, tmp_path)), "precision": Precision.fp32}
    need, inputs = NEEDS["some"], padded()
    expected = load_teacher(TeacherConfig(**settings), need, PLACE)(inputs)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    teacher = load_teacher(TeacherConfig(**settings, compile=True), need, PLACE)
    for _ in range(2):
        for ours, theirs in zip(tensors(teacher(inputs)), tensors(expected), strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0


def test_int8_products_are_near_and_nothing_else_is_quantized(folder):
    settings = {"model": str(folder), "precision": Precision.fp32}
    need, inputs = NEEDS["all"], padded()
    exact = load_teacher(TeacherConfig(**settings), need, PLACE)(inputs)
    teacher = load_teacher(TeacherConfig(**settings, quantization=Quantization.int8), need, PLACE)
    kinds = {name: type(value.data).__name__ for name, value in teacher.model.named_parameters()}
    assert {name for name, kind in kinds.items() if kind != "Tensor"} == {
        name for name, value in teacher.model.named_parameters() if "layer." in name and value.dim() == 2
    }
    for ours, theirs in zip(tensors(teacher(inputs)), tensors(exact), strict=True):
        error = float((ours - theirs).norm() / theirs.norm())
        assert error < 0.05
    assert error > 1e-4


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; torch sees none here")
def test_fp8_products_are_near(folder):
    device = torch.device("cuda", 0)
    if refused := check_machine(
        RunConfig("r", "o", TeacherConfig(quantization=Quantization.fp8), []), device
    ):
        pytest.skip(refused[0])
    place = World(0, 1, 0, 1, device)
    inputs = padded()
    on_device = Inputs(
        inputs.ids_BS.to(device),
        inputs.layout.to(device),
        inputs.attention_mask.to(device),
        inputs.token_type_BS.to(device),
    )
    exact = load_teacher(TeacherConfig(str(folder), precision=Precision.fp32), NEEDS["all"], place)(on_device)
    config = TeacherConfig(str(folder), precision=Precision.bf16, quantization=Quantization.fp8)
    for ours, theirs in zip(
        tensors(load_teacher(config, NEEDS["all"], place)(on_device)), tensors(exact), strict=True
    ):
        assert float((ours.float() - theirs).norm() / theirs.norm()) < 0.1


def test_what_a_machine_lacks_is_said_before_anything_is_loaded(monkeypatch):
    def problems(student=None, **teacher):
        students = [student or tiny_student()]
        return check_machine(RunConfig("r", "o", TeacherConfig(**teacher), students), CPU)

    assert problems() == problems(compile=True, quantization=Quantization.int8) == []
    monkeypatch.setenv("CXX", "no-such-compiler")
    both = problems(tiny_student(compile=True), compile=True)
    for key, problem in zip(("teacher", "students.0"), both, strict=True):
        assert f"{key}.compile=true needs a C++ compiler, but no-such-compiler is not on this mach" in problem
    (problem,) = problems(quantization=Quantization.fp8)
    assert "teacher.quantization=fp8 needs a CUDA device of compute capability 8.9 or newer" in problem
    assert "here is no CUDA device; set teacher.quantization to int8 or none" in problem
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.setattr(sys, "meta_path", [])
    monkeypatch.delitem(sys.modules, "torchao", raising=False)
    (problem,) = problems(quantization=Quantization.int8)
    assert "teacher.quantization=int8 needs torchao, which is not installed; pip install torchao" in problem


def test_a_teacher_whose_attention_cannot_be_captured(tmp_path):
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    MPNetModel(MPNetConfig(vocab_size=20, **shape)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="'mpnet' .* does not route its attention"):
        load_teacher(TeacherConfig(model=str(tmp_path)), Need.everything(1), PLACE)


def test_the_whole_teacher_is_float32_and_ready_to_be_copied(folder):
    whole = load_whole_teacher(TeacherConfig(model=str(folder), precision=Precision.bf16), head=Head.none)
    stored = load_file(folder / "model.safetensors")
    for name, value in whole.state_dict().items():
        assert torch.equal(value, stored[name])
    enable_capture(whole)
    assert len(tensors(capture(whole, *rows()))) == 1 + 4 * LAYERS


def placed(name: str, model: Path, **changes: Any) -> dict[str, Any]:
    """A case for the worker."""
    need = {"hidden": [0, 2], "scores": [1, 3], "values": [1]}
    standard = {"model": str(model), "precision": "fp32", "folder": None, "head": False, "need": need}
    return {"name": name, **standard, **changes}


PLACEMENTS = [
    f"{architecture} {placement} {precision}"
    for architecture in ARCHITECTURES
    for placement, precision in (("zero3", "fp32"), ("offload", "bf16"))
] + ["files", "files fp16", "all zero3 bf16", "head zero3", "head offload"]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """Every case's results by rank; one start of two processes."""
    root = tmp_path_factory.mktemp("placements")
    models = {architecture: saved(architecture, root / architecture) for architecture in ARCHITECTURES}
    with_head = root / "head"
    AutoModelForMaskedLM.from_config(tiny_config("bert")).save_pretrained(with_head)
    every = {"hidden": [*range(LAYERS + 1)], "scores": [*range(1, LAYERS + 1)]}
    files = {"placement": "offload", "folder": str(root / "files")}
    cases = [
        placed(name, models[name.split()[0]], placement=name.split()[1], precision=name.split()[2])
        for name in PLACEMENTS
        if name.split()[0] in ARCHITECTURES
    ]
    cases += [
        placed("files", models["bert"], **files),
        placed("files fp16", models["modernbert"], **files, precision="fp16"),
        placed("all zero3 bf16", models["bert"], placement="zero3", precision="bf16", need=every),
        placed("head zero3", with_head, placement="zero3", head=True, need={"hidden": [1]}),
        placed("head offload", with_head, placement="offload", head=True, need={}),
    ]
    assert [case["name"] for case in cases] == PLACEMENTS
    listed, written = root / "cases.json", root / "results.json"
    listed.write_text(json.dumps(cases), encoding="utf-8")
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [sys.executable, *launch, str(ROOT / "tests/trainer/teacher_worker.py"), str(listed), str(written)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu"},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(written.read_text(encoding="utf-8"))


@pytest.mark.network_of_ranks
@pytest.mark.parametrize("name", PLACEMENTS)
def test_a_partitioned_teacher_gives_bitwise_what_a_replicated_one_does(results, name):
    for rank in results[name]:
        assert rank["differing"] == 0
        assert rank["grads"] == 0
        assert rank["linear_is_torchs"], "DeepSpeed replaced a function of torch for everybody"


@pytest.mark.network_of_ranks
@pytest.mark.parametrize("name", PLACEMENTS)
def test_a_partitioned_teacher_is_held_in_parts(results, name):
    for rank in results[name]:
        assert set(rank["whole_between_passes"]) <= {name for name, n in rank["elements"].items() if n <= 232}
        assert rank["partition_bytes"] == pytest.approx(rank["whole_bytes"] / 2, rel=1e-3)
        assert rank["left_in_folder"] == []


@pytest.mark.network_of_ranks
def test_what_placements_take_is_what_was_said_before(results):
    """Partitions to the byte; what is gathered at a time is below its bound, and not far."""
    need = Need(frozenset({0, 2}), frozenset({1, 3}), frozenset({1}))
    place = World(rank=0, size=2, local_rank=0, local_size=2, device=CPU)
    for name in PLACEMENTS[: 2 * len(ARCHITECTURES)]:
        architecture, placement, precision = name.split()
        config = TeacherConfig(precision=Precision(precision), placement=Placement(placement))
        shape = tiny_config(architecture)
        found = placements(config, shape, need, place, rows=4, seq_len=16)
        own, whole = found[config.placement], found[Placement.replicated]
        for rank in results[name]:
            assert whole.parameters == rank["whole_bytes"]
            partitions = own.host // 2 or own.parameters - found[Placement.offload].parameters
            assert partitions == rank["partition_bytes"]
            live = found[Placement.offload].parameters
            assert live / 2 < rank["live_bytes"] <= live < whole.parameters
