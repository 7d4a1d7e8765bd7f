"""Whole runs with the teacher's parameters elsewhere: what is learned is bitwise the same."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel

from tests.launcher.conftest import Launch, evaluations, student

pytestmark = pytest.mark.network_of_ranks


def weights(output: str, name: str) -> dict[str, torch.Tensor]:
    folder = max((Path(output) / "checkpoints").glob("step-*"))
    return load_file(folder / name / "weights.safetensors")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_placements_teach_bitwise_the_same(
    run_config: dict[str, Any], general: Launch, tmp_path: Path, precision: str
) -> None:
    """Two ranks; the first three of four layers are needed, and evaluation ends unevenly on 42 rows."""
    run_config["students"] = [
        student("small", layer_map=[1, 3]),
        student("wide", layers=3, hidden_size=48, heads=4, intermediate_size=96, init="teacher",
                layer_map=[1, 2, 3]),
    ]  # fmt: skip
    run_config["evaluation"]["rows"] = 42
    kinds = {"replicated": [], "offload": ["teacher.placement=offload"]}
    if precision == "fp32":
        files = ["teacher.placement=offload", f"teacher.offload_folder={tmp_path / 'teacher'}"]
        kinds = {"replicated": [], "zero3": ["teacher.placement=zero3"], "files": files}
    for kind, settings in kinds.items():
        overrides = [f"output={tmp_path / kind}", f"teacher.precision={precision}", *settings]
        done = general(run_config, *overrides, ranks=2, by="torchrun")
        assert done.returncode == 0, done.stderr
    expected = evaluations(str(tmp_path / "replicated"))
    for kind in kinds:
        assert evaluations(str(tmp_path / kind)) == expected
        for name in ("small", "wide"):
            own, reference = (weights(str(tmp_path / other), name) for other in (kind, "replicated"))
            assert [key for key in reference if not torch.equal(own[key], reference[key])] == []


def test_a_student_starts_from_the_teachers_float32_weights(
    run_config: dict[str, Any], general: Launch
) -> None:
    """A rate of almost 0 leaves them as they were; the bf16, shortened, partitioned teacher has others."""
    run_config["students"] = [
        student("wide", layers=2, hidden_size=48, heads=4, intermediate_size=96, init="teacher",
                layer_map=[1, 3], optimizer={"lr": 1e-30}),
    ]  # fmt: skip
    settings = ["train.steps=1", "teacher.precision=bf16", "teacher.placement=zero3"]
    done = general(run_config, *settings, ranks=2, by="torchrun")
    assert done.returncode == 0, done.stderr
    teacher = AutoModel.from_pretrained(run_config["teacher"]["model"]).state_dict()
    own = weights(run_config["output"], "wide")
    query = "encoder.layer.{}.attention.self.query.weight"
    assert torch.equal(own["encoder." + query.format(1)], teacher[query.format(2)])
    assert not torch.equal(teacher[query.format(2)], teacher[query.format(2)].bfloat16().float())


def test_a_teacher_too_large_for_the_machine_is_refused_before_it_is_loaded(
    run_config: dict[str, Any], general: Launch
) -> None:
    batch = ["train.micro_batch_rows=1000000000", "train.global_batch_rows=1000000000"]
    done = general(run_config, *batch)
    assert done.returncode == 2
    assert "teacher.placement=replicated needs" in done.stderr and "GiB are available" in done.stderr
    assert "Traceback" not in done.stderr
    assert not Path(run_config["output"]).exists()
