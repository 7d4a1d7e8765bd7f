"""The engine on 1, 2 and 3 real ranks, at every ZeRO stage, against a plain torch training loop."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.trainer import engine_worker as worker
from trainer.engine import MOMENTS

ROOT = Path(__file__).resolve().parents[2]
CPU = {"device": "cpu", "pin_memory": False}
BF16 = {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
FP16 = {"fp16": {"enabled": True, "initial_scale_power": 10}}

pytestmark = pytest.mark.network_of_ranks


def case(name: str, stage: int, dropout: float = 0.0, **zero: Any) -> dict[str, Any]:
    return {
        "name": name,
        "dropout": dropout,
        "deepspeed": {"zero_optimization": {"stage": stage, **zero}},
    }


EXACT = [
    case("zero1", 1),  # first: it hands its state on to the other numbers of ranks
    case("zero0", 0),
    case("zero2", 2),
    case("zero3", 3),
    case("zero1-offload", 1, offload_optimizer=CPU),
    case("zero2-offload", 2, offload_optimizer=CPU),
    case("zero3-offload", 3, offload_optimizer=CPU, offload_param=CPU),
]
DROPOUT = [case(f"zero{stage}-dropout", stage, dropout=0.1) for stage in range(4)]
LOW = [
    case(f"zero{stage}-{name}", stage) | {"precision": precision}
    for stage in (1, 2, 3)
    for name, precision in {"bf16": BF16, "fp16": FP16}.items()
]
for low in LOW:
    low["deepspeed"] |= low.pop("precision")
ALL = {2: EXACT + DROPOUT + LOW, 1: EXACT[:4], 3: EXACT[:4]}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, Any]]:
    """Results of every case by number of ranks; one start of real processes per number."""
    folder = tmp_path_factory.mktemp("engine")
    found = {}
    for ranks, cases in ALL.items():
        listed, written = folder / f"cases-{ranks}.json", folder / f"results-{ranks}.json"
        listed.write_text(json.dumps(cases), encoding="utf-8")
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
        script = [str(ROOT / "tests/trainer/engine_worker.py"), str(listed), str(written)]
        done = subprocess.run(
            [sys.executable, *launch, *script, str(folder / "state.pt")],
            capture_output=True,
            text=True,
            timeout=400,
            env={**os.environ, "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu"},
        )
        assert done.returncode == 0, done.stderr[-4000:]
        found[ranks] = json.loads(written.read_text(encoding="utf-8"))
    return found


@pytest.fixture(scope="module")
def reference() -> list[dict[str, float]]:
    """The same five steps in plain torch: whole batches, AdamW, norm clipping, no DeepSpeed."""
    student = worker.make_student(dropout=0.0)
    decayed = [p for p in student.parameters() if p.dim() > 1]
    others = [p for p in student.parameters() if p.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=worker.LR, betas=(0.9, 0.999), eps=1e-8)
    found = []
    for step in range(5):
        ids_BS, targets_BSE = worker.make_rows(step)
        inputs = worker.make_inputs(ids_BS)
        hidden = student(inputs.ids_BS, inputs.attention_mask, inputs.token_type_BS)["hidden"]
        loss = worker.loss_of(hidden[-1], targets_BSE)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(student.parameters(), 0.1)
        adamw.step()
        adamw.zero_grad()
        found.append({"loss": float(loss.detach()), "norm": float(norm)})
    assert found[0]["norm"] > 0.1, "clipping must be at work here"
    return found


def every(kinds: list[dict[str, Any]]) -> list[tuple[int, str]]:
    names = {kind["name"] for kind in kinds}
    return [
        (ranks, found["name"]) for ranks, cases in ALL.items() for found in cases if found["name"] in names
    ]


@pytest.mark.parametrize(("ranks", "name"), every(EXACT))
def test_it_trains_as_plain_torch_does(
    results: dict[int, dict[str, Any]], reference: list[dict[str, float]], ranks: int, name: str
) -> None:
    steps = results[ranks][name]["start"] + results[ranks][name]["end"]
    for step, expected in zip(steps, reference, strict=True):
        assert step["applied"]
        assert step["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert step["norm"] == pytest.approx(expected["norm"], rel=1e-4)


@pytest.mark.parametrize(("ranks", "name"), every(LOW))
def test_half_precision_stays_near(
    results: dict[int, dict[str, Any]], reference: list[dict[str, float]], ranks: int, name: str
) -> None:
    """Within 8 bits; a micro batch counted twice would be off by far more."""
    steps = results[ranks][name]["start"] + results[ranks][name]["end"]
    for step, expected in zip(steps, reference, strict=True):
        assert step["loss"] == pytest.approx(expected["loss"], rel=1e-2)
        assert step["norm"] == pytest.approx(expected["norm"], rel=3e-2)


@pytest.mark.parametrize(("ranks", "name"), every(EXACT + DROPOUT + LOW))
def test_a_restored_state_continues_bitwise(
    results: dict[int, dict[str, Any]], ranks: int, name: str
) -> None:
    found = results[ranks][name]
    assert found["updates"] == 3
    assert found["loss_scale"][0] == found["loss_scale"][1]
    assert bool(found["loss_scale"][0]) == name.endswith("fp16")
    assert found["snapshot"], "later steps have changed a state that was taken before"
    assert found["restored"], "the state read back differs from the one that was set"
    assert found["again"] == found["end"]
    assert found["bitwise"], "the weights after the same steps differ"


@pytest.mark.parametrize(("ranks", "name"), every(EXACT + DROPOUT + LOW))
def test_an_engine_goes_back_to_a_state_bitwise(
    results: dict[int, dict[str, Any]], ranks: int, name: str
) -> None:
    assert results[ranks][name]["rewound"]


@pytest.mark.parametrize(("ranks", "name"), every(EXACT + DROPOUT + LOW))
def test_a_step_that_is_not_finite_leaves_the_weights_alone(
    results: dict[int, dict[str, Any]], ranks: int, name: str
) -> None:
    (step,) = results[ranks][name]["skipped"]
    assert not step["applied"] and not math.isfinite(step["norm"])
    assert results[ranks][name]["kept"]


@pytest.mark.parametrize(("ranks", "name"), every(EXACT))
def test_a_state_moves_to_other_ranks_and_stages(
    results: dict[int, dict[str, Any]], reference: list[dict[str, float]], ranks: int, name: str
) -> None:
    """Saved at ZeRO 1 on two ranks, continued here."""
    for step, expected in zip(results[ranks][name]["elastic"], reference[3:], strict=True):
        assert step["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert step["norm"] == pytest.approx(expected["norm"], rel=1e-4)


def test_moments_have_the_names_that_torch_gives_them() -> None:
    parameter = torch.nn.Parameter(torch.ones(2))
    adamw = torch.optim.AdamW([parameter])
    parameter.sum().backward()
    adamw.step()
    assert set(adamw.state[parameter]) == {"step", *MOMENTS}
