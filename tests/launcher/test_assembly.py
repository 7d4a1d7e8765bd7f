"""A run put together in this process, on a world of one: new, and as a checkpoint has it."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist

from configs.load import load_config
from configs.schema import RunConfig
from launcher.assembly import build
from launcher.checks import check, check_memory
from tests.launcher.conftest import student, written
from trainer import encoders, engine
from trainer.checkpoint import Checkpoint, Progress
from trainer.clock import Stations
from trainer.flops import student_row_flops, teacher_row_flops
from trainer.transfer import student_need, teacher_need
from trainer.world import World

ALONE = World(0, 1, 0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOCAL_RANK", "0")
        meet = tmp_path_factory.mktemp("group") / "meet"
        dist.init_process_group("gloo", init_method=f"file://{meet}", rank=0, world_size=1)
        engine.attach()
        yield
        dist.destroy_process_group()


def test_a_run_is_what_its_config_and_checkpoint_say(group: None, run_config: dict[str, Any]) -> None:
    run_config["students"].append(student("other", layers=1))
    config = load_config(RunConfig, written(run_config), [])
    corpora = check(config, ALONE)
    check_memory(config, ALONE, corpora)
    stations = Stations()
    new = build(config, ALONE, corpora, None, stations)
    assert list(stations.seconds) == ["teacher", "students", "meters"]
    assert [trainee.config.name for trainee in new.trainees] == ["small", "other"]
    assert (new.progress, new.total_steps) == (Progress(), 6)

    shape = encoders.load_teacher_config(config.teacher)
    row_flops = teacher_row_flops(shape, 32, teacher_need([trainee.transfer for trainee in new.trainees]))
    for trainee in new.trainees:
        own_shape, own_need = trainee.engine.module.encoder.config, student_need(trainee.transfer)
        row_flops += student_row_flops(own_shape, 32, own_need, 48)
    assert new.speed.flops_per_row == pytest.approx(row_flops) and new.teacher_hidden_size == 48

    states = {}
    for trainee in new.trainees:
        own = trainee.engine.state()
        for tensors in (own.weights, own.moments):
            for value in tensors.values():
                value.add_(1.5)
        states[trainee.config.name] = copy.deepcopy(own)
    held = Checkpoint(
        Progress(4, 96, lr_scale={"other": 0.5}), states, {"small": 2, "other": 0}, "", {}, {}, "", 1
    )
    again = build(config, ALONE, corpora, held, Stations())
    assert again.progress == held.progress
    assert [trainee.skipped_steps for trainee in again.trainees] == [2, 0]
    for trainee in again.trainees:
        state, expected = trainee.engine.state(), states[trainee.config.name]
        assert all(torch.equal(state.weights[key], expected.weights[key]) for key in expected.weights)
        assert all(torch.equal(state.moments[key], expected.moments[key]) for key in expected.moments)
