"""What the teacher needs in memory, by placement: counted from its shape, before anything is loaded."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import torch
from torch import nn
from transformers import PreTrainedConfig

from configs.schema import Placement, Quantization, TeacherConfig
from trainer.capture import Head, Need
from trainer.encoders import DTYPES, new_encoder
from trainer.engine import live_elements
from trainer.teacher import freeze
from trainer.world import World


@dataclass(frozen=True)
class Memory:
    """Bytes that a teacher takes while it teaches, but for ``loading``."""

    parameters: int
    """On every device: whole, or this rank's share and what is gathered at a time."""
    activations: int
    """On every device: what a micro batch leaves behind for students, and an estimate of a layer's own."""
    host: int
    """On every host, beside the devices: partitions of all its ranks."""
    disk: int
    """On every host, in ``teacher.offload_folder``."""
    loading: int
    """On every host for a moment, while the weights are read and converted."""

    @property
    def device(self) -> int:
        """On every device."""
        return self.parameters + self.activations


def teacher_memory(
    config: TeacherConfig, shape: PreTrainedConfig, need: Need, world: World, rows: int, seq_len: int
) -> Memory:
    """Count what the teacher takes for micro batches of ``rows`` rows of ``seq_len`` tokens.

    Parameters and partitions are exact, but for the scales of quantized weights and what is gathered at a
    time, which is an upper bound. Activations are an upper estimate without fused kernels.
    """
    with torch.device("meta"):
        model = new_encoder(shape, head=need.head)
    width = DTYPES[config.precision].itemsize
    whole = width * sum(parameter.numel() for parameter in model.parameters())
    layers = freeze(model, need)
    sizes = [parameter.numel() for parameter in model.parameters()]
    share = width * sum(-(-size // world.size) for size in sizes)
    activations = _activations(shape, need, rows, seq_len, width)
    if config.placement is Placement.replicated:
        parameters = width * sum(sizes)
        if config.quantization is not Quantization.none:
            parameters -= (width - 1) * sum(linear.weight.numel() for linear in _linear(layers))
        return Memory(parameters, activations, host=0, disk=0, loading=whole * world.local_size)
    live = width * live_elements(model)
    if config.placement is Placement.zero3:
        return Memory(share + live, activations, host=0, disk=0, loading=0)
    partitions = share * world.local_size
    on_disk = config.offload_folder is not None
    return Memory(live, activations, host=0 if on_disk else partitions, disk=partitions * on_disk, loading=0)


def placements(
    config: TeacherConfig, shape: PreTrainedConfig, need: Need, world: World, rows: int, seq_len: int
) -> dict[Placement, Memory]:
    """Return what every placement would take."""
    kinds = {placement: replace(config, placement=placement) for placement in Placement}
    return {
        placement: teacher_memory(kind, shape, need, world, rows, seq_len)
        for placement, kind in kinds.items()
    }


def free_memory(device: torch.device) -> tuple[int | None, int]:
    """Return free bytes of a device, None for the CPU, which has its host's, and those of the host."""
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None
    return free, int(psutil.virtual_memory().available)


def host_bytes(memory: Memory, world: World) -> int:
    """Return the most that a host gives at a time; on CPU the devices' memory is its own."""
    if world.device.type == "cuda":
        return max(memory.host, memory.loading)
    # Whole weights give way to what is kept of them before the first activations.
    taught = memory.host + world.local_size * memory.device
    return max(taught, memory.loading)


def fits(memory: Memory, world: World, free: tuple[int | None, int]) -> bool:
    """Tell whether a device and a host have that much."""
    on_device, on_host = free
    return (on_device is None or memory.device <= on_device) and host_bytes(memory, world) <= on_host


def check_fits(
    config: TeacherConfig, found: Mapping[Placement, Memory], world: World, free: tuple[int | None, int]
) -> list[str]:
    """Return the problem, if any, of a placement that this machine's memory cannot hold."""
    memory = found[config.placement]
    if fits(memory, world, free):
        return []
    on_device, on_host = free
    needs = f"{gib(host_bytes(memory, world))} of host memory, where {gib(on_host)} are available"
    if on_device is not None:
        needs = f"{gib(memory.device)} of each device, where {gib(on_device)} are free, and {needs}"
    better = [kind.value for kind, other in found.items() if fits(other, world, free)]
    way_out = f"set teacher.placement={better[0]}" if better else "use more ranks, or set offload_folder"
    return [
        f"teacher.placement={config.placement.value} needs {needs}; {way_out}, or lower "
        "train.micro_batch_rows; launcher/preflight.py lists what each placement needs"
    ]


def gib(size: int) -> str:
    """Return a number of bytes readably."""
    return f"{size / 2**30:.2f} GiB"


def _activations(shape: PreTrainedConfig, need: Need, rows: int, seq_len: int, width: int) -> int:
    tokens = rows * seq_len
    kept = len(need.hidden) + 2 * len(need.scores) + len(need.values) + (need.head is Head.masked_lm)
    inner = shape.hidden_dim if shape.model_type == "distilbert" else shape.intermediate_size
    own = 6 * shape.hidden_size + 3 * inner  # of the layer that runs
    return tokens * width * (kept * shape.hidden_size + own) + tokens * seq_len  # the mask of pairs


def _linear(layers: nn.ModuleList) -> list[nn.Linear]:
    return [module for module in layers.modules() if isinstance(module, nn.Linear)]


def used_bytes(device: torch.device) -> int:
    """Return what this process has allocated on a device; on CPU its resident memory."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else _status_bytes("VmRSS")


def restart_peak(device: torch.device) -> None:
    """Let ``peak_bytes`` begin anew."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak_bytes(device: torch.device) -> int:
    """Return the most that was in use since ``restart_peak``."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _status_bytes("VmHWM")


def _status_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024
