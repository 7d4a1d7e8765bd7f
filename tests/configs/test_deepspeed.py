"""The derived DeepSpeed config: its arithmetic, its switches, and DeepSpeed's own reading of it."""

import copy
import itertools
import math
import os

import pytest

from configs.deepspeed import DERIVED, conflicts, derive
from configs.schema import DeepSpeedConfig, Offload, Precision, RunConfig, TrainConfig
from configs.student_schema import StudentConfig


def run(rows: int = 64, micro: int = 4, **deepspeed) -> RunConfig:
    train = TrainConfig(global_batch_rows=rows, micro_batch_rows=micro, steps=1)
    return RunConfig(train=train, deepspeed=DeepSpeedConfig(**deepspeed))


def derived(config: RunConfig, ranks: int = 1, **kwargs):
    return derive(config, StudentConfig(name="s"), ranks, pin_memory=kwargs.get("pin_memory", False))


@pytest.mark.parametrize("rows, micro, ranks", [(64, 4, 1), (64, 4, 2), (64, 4, 16), (384, 48, 8), (6, 1, 3)])
def test_batch_arithmetic_is_deepspeeds_identity(rows, micro, ranks):
    config = derived(run(rows, micro), ranks)
    size, steps = config["train_micro_batch_size_per_gpu"], config["gradient_accumulation_steps"]
    assert (config["train_batch_size"], size) == (rows, micro)
    assert size * steps * ranks == rows and isinstance(steps, int) and steps >= 1


def test_a_batch_that_does_not_divide_is_our_mistake():
    with pytest.raises(AssertionError, match="check_batch comes first"):
        derived(run(64, 4), ranks=3)


@pytest.mark.parametrize("rows, micro, ranks", [(64, 4, 3), (4096, 32, 24), (7, 3, 2), (10, 4, 1)])
def test_ranks_that_do_not_divide_are_given_the_first_one_s_share(rows, micro, ranks):
    config = run(rows, micro)
    config.train.elastic = True
    found = derived(config, ranks)
    size, steps = found["train_micro_batch_size_per_gpu"], found["gradient_accumulation_steps"]
    most_rows = math.ceil(rows / ranks)
    assert size <= micro and (steps - 1) * micro < most_rows <= steps * size
    assert found["train_batch_size"] == size * steps * ranks


@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize("precision", Precision)
def test_stage_and_precision(stage, precision):
    config = derived(run(zero_stage=stage, precision=precision))
    assert config["zero_optimization"] == {"stage": stage}
    assert {name for name in ("bf16", "fp16") if config.get(name, {}).get("enabled")} == (
        {precision.value} - {"fp32"}
    )
    # Gradients add up in float32 when the weights are bf16; fp16 has its loss scaler.
    assert config.get("data_types") == ({"grad_accum_dtype": "fp32"} if precision is Precision.bf16 else None)
    assert "optimizer" not in config and "scheduler" not in config  # ours
    assert config["zero_force_ds_cpu_optimizer"] is False


@pytest.mark.parametrize("pin_memory", [False, True])
@pytest.mark.parametrize("optimizer, parameters", list(itertools.product(Offload, Offload)))
def test_offload(optimizer, parameters, pin_memory):
    settings = run(zero_stage=3, offload_optimizer=optimizer, offload_parameters=parameters)
    zero = derived(settings, pin_memory=pin_memory)["zero_optimization"]
    entry = {"device": "cpu", "pin_memory": pin_memory}
    assert zero.get("offload_optimizer") == (entry if optimizer is Offload.cpu else None)
    assert zero.get("offload_param") == (entry if parameters is Offload.cpu else None)


@pytest.mark.parametrize("norm, clipping", [(1.0, 1.0), (0.25, 0.25), (None, 0.0)])
def test_clipping_is_the_students_and_0_where_there_is_none(norm, clipping):
    student = StudentConfig(name="s")
    student.optimizer.max_grad_norm = norm
    assert derive(run(), student, 1, pin_memory=False)["gradient_clipping"] == clipping


def test_extra_is_merged_into_every_depth_and_changes_nothing_given():
    extra = {
        "wall_clock_breakdown": True,
        "zero_optimization": {"overlap_comm": False, "offload_optimizer": {"ratio": 0.5}},
        "fp16": {"initial_scale_power": 8},
    }
    config = run(
        zero_stage=2, offload_optimizer=Offload.cpu, precision=Precision.fp16, extra=copy.deepcopy(extra)
    )
    merged = derived(config)
    assert merged["wall_clock_breakdown"] is True
    assert merged["zero_optimization"] == {
        "stage": 2,
        "offload_optimizer": {"device": "cpu", "pin_memory": False, "ratio": 0.5},
        "overlap_comm": False,
    }
    assert merged["fp16"] == {"enabled": True, "initial_scale_power": 8}
    assert config.deepspeed.extra == extra and conflicts(extra) == []
    plain = derived(run(zero_stage=2, offload_optimizer=Offload.cpu, precision=Precision.fp16))
    assert {key: value for key, value in merged.items() if key in plain and key not in extra} == {
        key: value for key, value in plain.items() if key not in extra
    }


@pytest.mark.parametrize("key", DERIVED)
def test_a_derived_key_is_refused_however_it_is_set(key):
    path = key.split(".")
    for value in (1, None, {}, {"deeper": 1}):
        tree = value
        for part in reversed(path):
            tree = {part: tree}
        assert conflicts(tree) == [key]
    # In place of a branch a value would remove all that is derived below it.
    for depth in range(1, len(path)):
        tree = True
        for part in reversed(path[:depth]):
            tree = {part: tree}
        branch = ".".join(path[:depth])
        assert conflicts(tree) == sorted(name for name in DERIVED if name.startswith(f"{branch}."))
        assert key in conflicts(tree)


def test_several_refused_keys_are_named_in_order():
    extra = {"train_batch_size": 8, "fp16": {"enabled": True, "loss_scale": 1}, "steps_per_print": 1}
    assert conflicts(extra) == ["fp16.enabled", "train_batch_size"]


@pytest.mark.parametrize("precision", Precision)
@pytest.mark.parametrize("stage", range(4))
def test_deepspeed_reads_what_was_meant(stage, precision, monkeypatch):
    monkeypatch.setitem(os.environ, "DS_ACCELERATOR", "cpu")
    from deepspeed.runtime.config import DeepSpeedConfig as Theirs

    offload = {"offload_optimizer": Offload.cpu} if stage else {}
    theirs = Theirs(derived(run(zero_stage=stage, precision=precision, **offload)))
    assert (theirs.train_batch_size, theirs.train_micro_batch_size_per_gpu) == (64, 4)
    assert theirs.gradient_accumulation_steps == 16
    assert theirs.zero_optimization_stage == stage and theirs.zero_enabled == (stage > 0)
    assert (theirs.bfloat16_config.enabled, theirs.float16_config.enabled) == (
        precision is Precision.bf16,
        precision is Precision.fp16,
    )
    assert theirs.gradient_clipping == 1.0
    assert (theirs.zero_config.offload_optimizer is not None) == (stage > 0)
    assert theirs.zero_force_ds_cpu_optimizer is False
