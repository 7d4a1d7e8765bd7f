"""The world: which rank this process is, of how many, on which device, as launchers describe it."""

import os
import re
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from trainer import exits

Result = TypeVar("Result")

_NAMES = {  # what torchrun and deepspeed call a thing, and what mpirun (Open MPI) and srun call it
    "RANK": ("RANK", "OMPI_COMM_WORLD_RANK", "SLURM_PROCID"),
    "WORLD_SIZE": ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "SLURM_NTASKS"),
    "LOCAL_RANK": ("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "SLURM_LOCALID"),
    "LOCAL_WORLD_SIZE": ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE"),
}
MARGIN_S = 30.0
"""What a collective may take beyond the watchdog's limit: the watchdog says more, so it speaks first."""


@dataclass(frozen=True)
class World:
    """One process's place. ``rank`` is global, ``local_rank`` counts on its host; both from 0."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """True on the one rank that prints, logs and writes."""
        return self.rank == 0


def is_main(environment: Mapping[str, str]) -> bool:
    """Say whether this process is rank 0, as far as its launcher says; for what comes before ``find``."""
    return next((environment[name] for name in _NAMES["RANK"] if name in environment), "0") == "0"


def find(environment: Mapping[str, str]) -> World:
    """Return the world that a launcher describes in ``environment``.

    ``torchrun`` sets RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE; ``deepspeed`` too, but calls the last
    one LOCAL_SIZE; Open MPI's ``mpirun`` sets OMPI_COMM_WORLD_*; ``srun`` sets SLURM_PROCID, SLURM_NTASKS,
    SLURM_LOCALID, SLURM_NODEID and SLURM_STEP_TASKS_PER_NODE (such as ``8(x4)``) inside a job step. With none
    of them the process is alone. The first in this order counts, since one may start another.

    Raises:
        ValueError: a rank is set without the rest, a value is no number, the numbers do not fit each other,
            or there are more local ranks than CUDA devices.
    """
    started = ("RANK", "OMPI_COMM_WORLD_RANK", "SLURM_STEP_ID")
    if not any(name in environment for name in started):
        return World(0, 1, 0, 1, _device(0, environment))
    values = {}
    for name, aliases in _NAMES.items():
        text = next((environment[alias] for alias in aliases if alias in environment), None)
        if text is None and name == "LOCAL_WORLD_SIZE":
            text = _tasks_here(environment)
        if text is None or not text.isdigit():
            raise ValueError(
                f"environment {name}={text!r} is not a number (nor is {' or '.join(aliases[1:])}); "
                "start with deepspeed, torchrun, srun, mpirun, or plain python for a single process"
            )
        values[name] = int(text)
    for small, large in (
        ("RANK", "WORLD_SIZE"),
        ("LOCAL_RANK", "LOCAL_WORLD_SIZE"),
        ("LOCAL_RANK", "WORLD_SIZE"),
    ):
        if values[small] >= values[large]:
            raise ValueError(
                f"environment {small}={values[small]} is not below {large}={values[large]}; ranks count from "
                "0, so a launcher's settings were changed or mixed with another's: unset them, and let one "
                "launcher set all"
            )
    local_rank, local_size = values["LOCAL_RANK"], values["LOCAL_WORLD_SIZE"]
    if local_size > values["WORLD_SIZE"]:
        raise ValueError(
            f"environment LOCAL_WORLD_SIZE={local_size} is more than WORLD_SIZE={values['WORLD_SIZE']}: a "
            "launcher's settings were changed or mixed with another's"
        )
    return World(
        values["RANK"], values["WORLD_SIZE"], local_rank, local_size, _device(local_rank, environment)
    )


def address(environment: Mapping[str, str]) -> tuple[str, int]:
    """Return host and port where the ranks meet: MASTER_ADDR and MASTER_PORT, else from Slurm's job step.

    A step's ranks meet on its first node, at a port that follows from the ids of job and step, so that jobs
    which share a node do not meet.

    Raises:
        ValueError: neither is there, or the port is none.
    """
    host, port = environment.get("MASTER_ADDR"), environment.get("MASTER_PORT")
    nodes = environment.get("SLURM_STEP_NODELIST", environment.get("SLURM_JOB_NODELIST"))
    if "SLURM_STEP_ID" in environment and nodes is not None:
        first = re.match(r"([^,\[]+)\[?(\d*)", nodes)  # node[07-12,20],other3
        host = host or (first and "".join(first.groups()))
        job, step = int(environment.get("SLURM_JOB_ID", "0")), environment["SLURM_STEP_ID"]
        port = port or str(20000 + (job + 1009 * (int(step) if step.isdigit() else 0)) % 10000)
    if not host or port is None:
        missing = "MASTER_PORT" if host else "MASTER_ADDR"
        raise ValueError(
            f"environment {missing} is not set: the ranks do not know where to meet. deepspeed and torchrun "
            "set it; with mpirun give -x MASTER_ADDR=HOST_OF_RANK_0 -x MASTER_PORT=29500"
        )
    if not port.isdigit() or not 0 < int(port) < 65536:
        raise ValueError(f"environment MASTER_PORT={port!r} is not a port, a number from 1 to 65535")
    return host, int(port)


def _tasks_here(environment: Mapping[str, str]) -> str | None:
    """Return this node's tasks as srun says it, ``2(x3),1`` by SLURM_NODEID; None without."""
    counts: list[str] = []
    for part in environment.get("SLURM_STEP_TASKS_PER_NODE", "").split(","):
        tasks, _, times = part.partition("(x")
        counts += [tasks] * int(times.rstrip(")") or 1)
    node = int(environment.get("SLURM_NODEID", "0"))
    return counts[node] if node < len(counts) and counts[node] else None


def set_timeouts(seconds: float) -> None:
    """Let every collective of every process group take ``seconds`` and a margin, those to come included.

    DeepSpeed makes groups of its own without saying for how long, and would wait 30 minutes in them.
    """
    c10d, timeout = dist.distributed_c10d, timedelta(seconds=seconds + MARGIN_S)
    c10d.default_pg_timeout = c10d.default_pg_nccl_timeout = timeout
    for group in c10d._world.pg_map:
        c10d._set_pg_timeout(timeout, group)


def disconnect() -> None:
    """Leave the process group once all ranks are done (collective).

    The barrier gives gloo's threads time to let go of the last collective's tensors: what they drop while
    Python shuts down ends the process with SIGABRT (torch 2.13).
    """
    dist.barrier()
    dist.destroy_process_group()


def barrier(world: World) -> None:
    """Wait until all ranks have come here (collective)."""
    if world.size > 1:
        dist.barrier()


def sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """Return the element-wise sum of ``values`` over all ranks (collective); ``values`` is overwritten."""
    dist.all_reduce(values)
    return values


def gather_over_ranks(value: Result) -> list[Result]:
    """Return what every rank gave, in the ranks' order (collective); any picklable value."""
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def share_cores(world: World, threads: int | None) -> None:
    """Set this process's CPU threads: ``threads``, else on CPU the host's cores over its local ranks."""
    if threads is None and world.device.type == "cpu":
        threads = max(1, len(os.sched_getaffinity(0)) // world.local_size)
    if threads is not None:
        torch.set_num_threads(threads)


def _device(local_rank: int, environment: Mapping[str, str]) -> torch.device:
    """CUDA where there is one, unless DS_ACCELERATOR says otherwise; DeepSpeed reads the same variable."""
    asked = environment.get("DS_ACCELERATOR")
    if asked == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        if asked == "cuda":
            raise ValueError(
                f"DS_ACCELERATOR=cuda, but torch {torch.__version__} sees no CUDA device on "
                f"{socket.gethostname()}; check the driver (nvidia-smi), or unset DS_ACCELERATOR for CPU"
            )
        return torch.device("cpu")
    devices = torch.cuda.device_count()
    if local_rank >= devices:
        raise ValueError(
            f"local rank {local_rank} has no device: {socket.gethostname()} has {devices} CUDA devices; "
            "start at most one rank per device"
        )
    return torch.device("cuda", local_rank)


def on_main(world: World, action: Callable[[], Result]) -> Result:
    """Run ``action`` on rank 0 and return its result on every rank (collective).

    Its error is raised on rank 0, and the others exit quietly: what one rank meets, such as a full disk or a
    dead server, ends all of them, with one message.
    """
    outcome: list[Any] = [None, None]
    if world.is_main:
        try:
            outcome[0] = action()
        except (ValueError, OSError) as error:
            outcome[1] = error
    if world.size > 1:
        dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise outcome[1] if world.is_main else SystemExit(exits.of(outcome[1]))
    return outcome[0]
