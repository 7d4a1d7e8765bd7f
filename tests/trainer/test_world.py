"""The world, as each launcher describes it."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from trainer import meeting, world
from trainer.world import World, find, on_main

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="describes a host without CUDA")
CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[2]

TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
DEEPSPEED = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_SIZE": "4"}
SRUN = {
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "5",
    "SLURM_NTASKS": "8",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
}


MPIRUN = {
    "OMPI_COMM_WORLD_RANK": "5",
    "OMPI_COMM_WORLD_SIZE": "8",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
}


@pytest.mark.parametrize(
    "environment", [TORCHRUN, DEEPSPEED, SRUN, MPIRUN, {**SRUN, **TORCHRUN}, {**SRUN, **MPIRUN}]
)
def test_every_launcher_describes_the_same_world(environment):
    assert find(environment) == World(rank=5, size=8, local_rank=1, local_size=4, device=CPU)
    assert not find(environment).is_main and not world.is_main(environment)


@pytest.mark.parametrize("environment", [{}, {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8"}])
def test_a_process_that_no_launcher_started_is_alone(environment):
    """A Slurm job's own shell is no step: plain python in it is one process."""
    assert find(environment) == World(0, 1, 0, 1, CPU)
    assert find(environment).is_main and world.is_main(environment)


def test_what_torchrun_says_goes_before_what_slurm_says():
    """torchrun under srun: one Slurm task starts many ranks."""
    assert find({**SRUN, **TORCHRUN, "SLURM_PROCID": "0", "SLURM_NTASKS": "2"}) == find(TORCHRUN)


@pytest.mark.parametrize("name", ["WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"])
def test_half_a_description_is_refused(name):
    environment = {key: value for key, value in TORCHRUN.items() if key != name}
    with pytest.raises(ValueError, match=f"environment {name}=None is not a number .* start with deepspeed"):
        find(environment)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"RANK": "8"}, "RANK=8 is not below WORLD_SIZE=8"),
        ({"LOCAL_RANK": "4"}, "LOCAL_RANK=4 is not below LOCAL_WORLD_SIZE=4"),
        ({"LOCAL_WORLD_SIZE": "9"}, "LOCAL_WORLD_SIZE=9 is more than WORLD_SIZE=8"),
    ],
)
def test_numbers_that_do_not_fit_each_other_are_refused(changes, message):
    """Such as an export that was left from another launcher."""
    with pytest.raises(ValueError, match=message):
        find({**TORCHRUN, **changes})


@pytest.mark.parametrize(
    ("tasks", "node", "expected"), [("4(x2)", 1, 4), ("2,1", 0, 2), ("2,1", 1, 1), ("3(x2),1,2(x5)", 3, 2)]
)
def test_srun_may_place_more_tasks_on_one_node_than_on_another(tasks, node, expected):
    environment = {
        **SRUN,
        "SLURM_STEP_TASKS_PER_NODE": tasks,
        "SLURM_NODEID": str(node),
        "SLURM_LOCALID": "0",
    }
    assert find(environment).local_size == expected


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node1", "node1"),
        ("node[1-4,7],gpu01", "node1"),
        ("gpu[007-012]", "gpu007"),
        ("rack2-n03,other[1-2]", "rack2-n03"),
        ("a,b,c", "a"),
    ],
)
def test_ranks_of_a_job_step_meet_on_its_first_node(nodes, first):
    """Slurm's short form of host lists, as ``scontrol show hostnames`` would expand it."""
    step = {**SRUN, "SLURM_JOB_ID": "123456", "SLURM_STEP_NODELIST": nodes, "SLURM_JOB_NODELIST": "other9"}
    assert world.address(step) == (first, 23456)
    assert world.address({**step, "SLURM_STEP_ID": "1"}) == (first, 24465)  # steps side by side do not meet
    assert world.address({**step, "MASTER_ADDR": "here", "MASTER_PORT": "29500"}) == ("here", 29500)


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (MPIRUN, "MASTER_ADDR is not set: .* with mpirun give -x MASTER_ADDR"),
        ({**TORCHRUN, "MASTER_ADDR": "node1"}, "MASTER_PORT is not set"),
        ({"MASTER_ADDR": "node1", "MASTER_PORT": "http"}, "MASTER_PORT='http' is not a port"),
        ({"MASTER_ADDR": "node1", "MASTER_PORT": "65536"}, "MASTER_PORT='65536' is not a port"),
    ],
)
def test_ranks_that_do_not_know_where_to_meet_say_so(environment, message):
    with pytest.raises(ValueError, match=message):
        world.address(environment)


@pytest.mark.parametrize("text", ["", "two", "-1", "1.5"])
def test_a_rank_that_is_no_number_is_refused(text):
    with pytest.raises(ValueError, match=f"environment RANK='{text}' is not a number"):
        find({**TORCHRUN, "RANK": text})
    with pytest.raises(ValueError, match="nor is OMPI_COMM_WORLD_RANK or SLURM_PROCID"):
        find({**SRUN, "SLURM_PROCID": text})


@pytest.mark.skipif(torch.cuda.is_available(), reason="the machine has a working GPU")
def test_a_node_whose_gpus_are_gone_is_refused():
    with pytest.raises(ValueError, match="DS_ACCELERATOR=cuda, but torch .* sees no CUDA device on"):
        find({"DS_ACCELERATOR": "cuda"})


def test_the_cpu_can_be_asked_for():
    assert find({"DS_ACCELERATOR": "cpu"}).device == CPU


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_local_ranks_share_the_cores(threads):
    cores = len(os.sched_getaffinity(0))
    world.share_cores(World(0, 1, 0, 1, CPU), None)
    assert torch.get_num_threads() == cores
    world.share_cores(World(0, 2 * cores, 0, 2 * cores, CPU), None)
    assert torch.get_num_threads() == 1
    world.share_cores(World(0, 1, 0, 1, CPU), 3)
    assert torch.get_num_threads() == 3


def test_one_process_meets_itself(monkeypatch):
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    monkeypatch.setenv("LOCAL_RANK", "0")
    alone = World(0, 1, 0, 1, CPU)
    meeting.connect(alone, {})
    try:
        assert (dist.get_rank(), dist.get_world_size(), dist.get_backend()) == (0, 1, "gloo")
        assert world.sum_over_ranks(torch.tensor([1.0, 2.0])).tolist() == [1.0, 2.0]
        assert on_main(alone, lambda: "done") == "done"
    finally:
        dist.destroy_process_group()


def test_alone_an_action_and_its_error_are_the_callers():
    alone = World(0, 1, 0, 1, CPU)
    assert on_main(alone, lambda: [1, 2]) == [1, 2]
    with pytest.raises(OSError, match="disk is full"):
        on_main(alone, lambda: (_ for _ in ()).throw(OSError("disk is full")))


RANKS = """
import os
import torch
from trainer import meeting, world
place = world.find(os.environ)
meeting.connect(place, os.environ)
def fail():
    raise ValueError("said once")
try:
    print(place.rank, world.on_main(place, lambda: f"from {place.rank}"),
          world.sum_over_ranks(torch.tensor([place.rank + 1.0])).item(), flush=True)
    world.on_main(place, fail)
finally:
    torch.distributed.destroy_process_group()
"""


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def test_two_ranks_share_the_result_and_end_together(tmp_path):
    """Rank 0 raises, rank 1 leaves quietly; both got rank 0's result before, and 1 + 2."""
    port = free_port()
    started = [
        subprocess.Popen(
            [sys.executable, "-c", RANKS],
            cwd=ROOT,
            env={**os.environ, "RANK": rank, "WORLD_SIZE": "2", "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": "2",
                 "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in ("0", "1")
    ]  # fmt: skip
    outputs = [process.communicate(timeout=120) for process in started]
    assert [out.strip() for out, _ in outputs] == ["0 from 0 3.0", "1 from 0 3.0"]
    assert [process.returncode for process in started] == [1, 2]
    assert "ValueError: said once" in outputs[0][1] and "said once" not in outputs[1][1]
