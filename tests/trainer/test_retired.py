"""A student that fails beside others, and a run in pieces, on 2 real ranks at every ZeRO stage."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.network_of_ranks


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory, tiny_corpus: Path) -> list[list[dict[str, Any]]]:
    """By rank and ZeRO stage."""
    written = tmp_path_factory.mktemp("retired") / "results.json"
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    script = [str(ROOT / "tests/trainer/retired_worker.py"), str(tiny_corpus), str(written)]
    done = subprocess.run(
        [sys.executable, *launch, *script],
        capture_output=True,
        text=True,
        timeout=400,
        env={**os.environ, "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu"},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found: list[list[dict[str, Any]]] = json.loads(written.read_text(encoding="utf-8"))
    return found


@pytest.mark.parametrize("stage", range(4))
def test_ranks_agree_though_only_one_met_it(results: list[list[dict[str, Any]]], stage: int) -> None:
    first, second = (of_rank[stage] for of_rank in results)
    assert first == second
    assert list(first["retired"]) == ["b"] and first["retired_in_checkpoint"] == first["retired"]
    assert first["retired"]["b"].startswith("the loss or gradient of step 3 (rows from 16) is not finite")


@pytest.mark.parametrize("stage", range(4))
def test_the_others_learn_bitwise_what_they_learn_alone(
    results: list[list[dict[str, Any]]], stage: int
) -> None:
    found = results[0][stage]
    assert found["as_alone"] == {"a": True, "c": True}
    assert found["evaluated_as_alone"] == {"a": True, "c": True}


@pytest.mark.parametrize("stage", range(4))
def test_it_stays_as_before_the_failing_step_and_is_not_evaluated(
    results: list[list[dict[str, Any]]], stage: int
) -> None:
    found = results[0][stage]
    assert found["frozen"] and found["finite"]
    assert found["updates"] == {"a": 7, "b": 2, "c": 7}
    assert found["evaluated"] == [["a", "b", "c"], ["a", "c"], ["a", "c"]]


@pytest.mark.parametrize("stage", range(4))
def test_a_resumed_run_keeps_it_retired(results: list[list[dict[str, Any]]], stage: int) -> None:
    found = results[0][stage]
    assert found["resumed"] == {"a": True, "b": True, "c": True}
    assert found["retirements"] == [["b"], []], "it is not told twice"


@pytest.mark.parametrize("stage", range(4))
def test_stopped_after_every_step_it_is_bitwise_the_run_that_was_not(
    results: list[list[dict[str, Any]]], stage: int
) -> None:
    """Weights, moments, updates; two students, dropout on."""
    assert results[0][stage]["pieces"] == [1, 2, 3, 4, 5, 6, 7]
    assert results[0][stage]["in_pieces"] == {"a": True, "c": True}
