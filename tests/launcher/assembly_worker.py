"""``assembly_worker.py CONFIG.yaml``: puts a run together on a world of one, new and as a checkpoint has it.

In a process of its own: DeepSpeed keeps to the first process group that it meets.
"""

import copy
import os
import sys

import pytest
import torch

from configs.load import load_config
from configs.schema import RunConfig
from launcher.assembly import build
from launcher.checks import check, check_memory
from trainer import encoders, engine, meeting
from trainer.checkpoint import Checkpoint, Progress
from trainer.clock import Stations
from trainer.flops import student_row_flops, teacher_row_flops
from trainer.transfer import student_need, teacher_need
from trainer.world import World, disconnect

ALONE = World(0, 1, 0, 1, torch.device("cpu"))


def main() -> None:
    """Raise AssertionError where the run is not what its config and checkpoint say."""
    meeting.connect(ALONE, os.environ)
    engine.attach()
    config = load_config(RunConfig, sys.argv[-1], [])
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
    disconnect()


if __name__ == "__main__":
    main()
