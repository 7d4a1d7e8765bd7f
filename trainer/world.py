"""The world: which rank this process is, of how many, on which device, and how the ranks meet."""

import os
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

Result = TypeVar("Result")

_NAMES = {  # what torchrun and deepspeed call a thing, and what srun calls it
    "RANK": ("RANK", "SLURM_PROCID"),
    "WORLD_SIZE": ("WORLD_SIZE", "SLURM_NTASKS"),
    "LOCAL_RANK": ("LOCAL_RANK", "SLURM_LOCALID"),
    "LOCAL_WORLD_SIZE": ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "SLURM_STEP_TASKS_PER_NODE"),
}


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


def find(environment: Mapping[str, str]) -> World:
    """Return the world that a launcher describes in ``environment``.

    ``torchrun`` sets RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE; ``deepspeed`` too, but calls the last
    one LOCAL_SIZE; ``srun`` sets SLURM_PROCID, SLURM_NTASKS, SLURM_LOCALID and SLURM_STEP_TASKS_PER_NODE
    (such as ``8(x4)``) inside a job step. With none of them the process is alone.

    Raises:
        ValueError: a rank is set without the rest, a value is no number, or there are more local ranks than
            CUDA devices.
    """
    if "RANK" not in environment and "SLURM_STEP_ID" not in environment:
        return World(0, 1, 0, 1, _device(0, environment))
    values = {}
    for name, aliases in _NAMES.items():
        text = next((environment[alias] for alias in aliases if alias in environment), None)
        text = text and text.partition("(")[0]
        if text is None or not text.isdigit():
            raise ValueError(
                f"environment {name}={text!r} is not a number (nor is {' or '.join(aliases[1:])}); "
                "start with deepspeed, torchrun, srun, or plain python for a single process"
            )
        values[name] = int(text)
    if values["RANK"] >= values["WORLD_SIZE"]:
        raise ValueError(
            f"environment RANK={values['RANK']} is not below WORLD_SIZE={values['WORLD_SIZE']}; ranks count "
            "from 0, so a launcher's settings were changed or mixed with another's"
        )
    local_rank, local_size = values["LOCAL_RANK"], values["LOCAL_WORLD_SIZE"]
    return World(
        values["RANK"], values["WORLD_SIZE"], local_rank, local_size, _device(local_rank, environment)
    )


def connect(world: World, environment: Mapping[str, str], timeout: timedelta) -> None:
    """Form the process group (collective): NCCL on CUDA, gloo on CPU.

    The meeting point is MASTER_ADDR and MASTER_PORT; a single process needs none.
    """
    if world.device.type == "cuda":
        torch.cuda.set_device(world.device)
    os.environ.setdefault("LOCAL_RANK", str(world.local_rank))  # DeepSpeed reads it
    method = "env://"
    if world.size == 1 and "MASTER_ADDR" not in environment:
        method = f"tcp://127.0.0.1:{_free_port()}"
    dist.init_process_group(
        "nccl" if world.device.type == "cuda" else "gloo",
        init_method=method,
        rank=world.rank,
        world_size=world.size,
        timeout=timeout,
    )


def disconnect() -> None:
    """Leave the process group once all ranks are done (collective).

    The barrier gives gloo's threads time to let go of the last collective's tensors: what they drop while
    Python shuts down ends the process with SIGABRT (torch 2.13).
    """
    dist.barrier()
    dist.destroy_process_group()


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


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


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
        raise outcome[1] if world.is_main else SystemExit(2)
    return outcome[0]
