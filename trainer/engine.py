"""One student in its DeepSpeed engine: the only home of deepspeed.

What the rest of the code needs of an engine is small: call it, go backward, step at a given rate, and
give or take its whole state as plain float32 tensors by parameter name, whatever the ZeRO stage, the
precision or the number of ranks. That state is what checkpoints hold.
"""

import contextlib
import io
import logging
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from configs.student_schema import OptimizerConfig
from trainer.capture import Captured
from trainer.checkpoint import EngineState
from trainer.models import Inputs, Student
from trainer.world import World

os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")  # read on import

import deepspeed  # noqa: E402
import deepspeed.ops  # noqa: E402
from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload  # noqa: E402
from deepspeed.utils import (  # noqa: E402
    logger,
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)

MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's first and second moment, under torch's names


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did, equal on all ranks."""

    grad_norm: float  # global, before clipping
    applied: bool  # False: the norm was not finite, the weights are as they were


def attach() -> None:
    """Let DeepSpeed use the process group that exists (collective)."""
    # DeepSpeed 0.19.8 calls collectives by names that torch 2.13 has begun to retire.
    for name in ("all_gather_into_tensor", "reduce_scatter_tensor"):
        warnings.filterwarnings("ignore", message=f".*{name}.*", category=FutureWarning)
    # On CPU deepspeed would compile a shared-memory collective for a minute, only for ranks on one host.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False, dist_init_required=False)


def partition(
    model: nn.Module, dtype: torch.dtype, world: World, offload: bool, folder: Path | None = None
) -> None:
    """Partition a frozen model over all ranks by ZeRO stage 3, in place (collective).

    Whenever a part of it is called, that part's parameters are gathered on the device and then let go;
    biases and norms, and what the next layer needs, may stay a little longer. Every rank must call equally.

    Args:
        model: on CPU, its weights those of rank 0; on the other ranks they are overwritten.
        dtype: every parameter's; they are converted one after another.
        world: the ranks.
        offload: keep the partitions in host memory instead of on the devices.
        folder: keep them in nameless files there, one per rank, that are mapped to memory (with ``offload``).
    """
    logger.setLevel(logging.WARNING)
    largest = _largest_module(model)
    longest_vector = max(parameter.numel() for parameter in model.parameters() if parameter.dim() == 1)
    # DeepSpeed would replace torch's linear function, for everybody in this process.
    zero: dict[str, Any] = {"stage": 3, "memory_efficient_linear": False}
    if offload:
        pinned = world.device.type == "cuda" and folder is None
        zero["offload_param"] = {"device": "cpu", "pin_memory": pinned}
    settings = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero}
    for buffer in model.buffers():
        buffer.data = buffer.data.to(world.device)
    for module in reversed(list(model.modules())):  # parts before what they are parts of
        for parameter in module.parameters(recurse=False):
            if not hasattr(parameter, "ds_id"):
                parameter.data = parameter.data.to(dtype)
        deepspeed.zero.Init(module=module, config_dict_or_path=settings)
    if folder is not None:
        _move_to_files(model, folder / f"teacher-rank{world.rank}.bin")
    DeepSpeedZeRoOffload(
        model,
        timers=None,
        ds_config=settings,
        prefetch_bucket_size=largest // 2,
        max_live_parameters=2 * largest,
        max_reuse_distance=0,
        param_persistence_threshold=longest_vector,  # biases and norms stay
    )


def live_elements(model: nn.Module) -> int:
    """Return an upper bound of the elements that a partitioned model has gathered at a time on a device.

    Biases and norms stay. To the parameters of the module that runs come the next ones, up to half of the
    largest module's, and the one that goes beyond it.
    """
    sizes = sorted(parameter.numel() for parameter in model.parameters())
    staying = sum(parameter.numel() for parameter in model.parameters() if parameter.dim() == 1)
    largest = _largest_module(model)
    return min(sum(sizes), staying + largest + largest // 2 + sizes[-1])


def _largest_module(model: nn.Module) -> int:
    """Elements of the module that has most of its own, not counting those within it."""
    return max(sum(p.numel() for p in module.parameters(recurse=False)) for module in model.modules())


def _move_to_files(model: nn.Module, path: Path) -> None:
    """Put a partitioned model's own share into a file that is mapped to memory.

    The kernel reads pages when they are needed and drops them when memory is short: no more than that is
    what DeepSpeed's own NVMe path does, with libaio and buffers of a size to be chosen.
    """
    partitions = [parameter.ds_tensor for parameter in model.parameters()]  # type: ignore[attr-defined]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    dtype, elements = partitions[0].dtype, sum(partition.numel() for partition in partitions)
    mapped = torch.from_file(str(path), shared=True, size=elements, dtype=dtype)
    path.unlink()  # it goes when the process does
    for partition, place in zip(partitions, mapped.split([p.numel() for p in partitions]), strict=True):
        place.copy_(partition)
        partition.data = place


class Engine:
    """A student module, its AdamW and its DeepSpeed engine."""

    def __init__(
        self, module: Student, optimizer: OptimizerConfig, deepspeed_config: dict[str, Any], world: World
    ) -> None:
        """Hand the module over to DeepSpeed (collective).

        Args:
            module: the student in float32; its parameters must be equal on all ranks.
            optimizer: AdamW's settings; the rate itself is given with every step.
            deepspeed_config: from ``configs.deepspeed.derive``.
            world: the ranks.
        """
        logger.setLevel(logging.WARNING)
        self._world = world
        self._stage = deepspeed_config["zero_optimization"]["stage"]
        self._max_grad_norm = deepspeed_config["gradient_clipping"]
        if self._stage == 0:
            # There DeepSpeed clips without looking at the norm; ``_replicated_step`` does both.
            deepspeed_config = {**deepspeed_config, "gradient_clipping": 0.0}
        adamw = torch.optim.AdamW(
            _decayed_and_not(module, optimizer.weight_decay),
            lr=0.0,
            betas=(optimizer.betas[0], optimizer.betas[1]),
            eps=optimizer.eps,
            fused=True,
        )
        with contextlib.redirect_stdout(io.StringIO()):  # its bf16 optimizer prints memory use unasked
            self._engine, self._optimizer, *_ = deepspeed.initialize(
                model=module, optimizer=adamw, config=deepspeed_config, dist_init_required=False
            )
        self._adamw = adamw if self._stage == 0 else self._optimizer.optimizer
        self._make_moments()

    @property
    def module(self) -> Student:
        """The student module; at ZeRO stage 3 its parameters are partitioned between calls."""
        return self._engine.module

    def __call__(self, inputs: Inputs) -> Captured:
        """Return the student's capture of one micro batch (collective at ZeRO stage 3)."""
        return Captured(**self._engine(inputs.ids_BS, inputs.attention_mask, inputs.token_type_BS))

    def train(self, mode: bool = True) -> None:
        """Switch dropout on or off."""
        self._engine.train(mode)

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of this rank's share of the global loss (collective).

        ``loss`` is already divided by global counts, so gradients must be summed over ranks and micro
        batches. DeepSpeed averages over ranks, which the factor undoes; over micro batches it is told not to.
        """
        self._engine.backward(loss * self._world.size, scale_wrt_gas=False)
        if not self._engine.is_gradient_accumulation_boundary():
            self._engine.step()  # moves DeepSpeed's micro-batch counter; nothing is updated

    def step(self, lr: float) -> StepResult:
        """Clip and update at rate ``lr``; a norm that is not finite leaves the weights alone (collective)."""
        for group in self._adamw.param_groups:
            group["lr"] = lr
        if self._stage == 0:
            return self._replicated_step()
        self._engine.step()
        norm = float(self._engine.get_global_grad_norm())
        return StepResult(norm, applied=not self._optimizer.overflow)

    def state(self) -> EngineState:
        """Return the whole state (collective); complete on rank 0, empty elsewhere."""
        weights, moments = {}, {}
        for name, parameter in self.module.named_parameters():
            full = self._full(parameter)
            if self._world.is_main:
                weights[name] = full[0].to("cpu", torch.float32)
                for key, value in zip(MOMENTS, full[1:], strict=True):
                    moments[f"{key}.{name}"] = value.to("cpu", torch.float32)
        return EngineState(weights, moments, self._updates(), self._loss_scale())

    def weights(self) -> Mapping[str, Tensor]:
        """Return the float32 weights by name (collective); complete on rank 0, empty elsewhere."""
        weights = {}
        for name, parameter in self.module.named_parameters():
            full = parameter.clone() if self._stage == 0 else safe_get_full_fp32_param(parameter)
            if self._world.is_main:
                weights[name] = full.detach().to("cpu", torch.float32)
        return weights

    def load(self, state: EngineState) -> None:
        """Take over a state that is complete on every rank, whatever the engine did before (collective)."""
        for name, parameter in self.module.named_parameters():
            self._set(parameter, state.weights[name])
            for key in MOMENTS:
                self._set(parameter, state.moments[f"{key}.{name}"], key)
        for entry in self._adamw.state.values():
            entry["step"].fill_(state.updates)
        if state.loss_scale:
            vars(self._optimizer.loss_scaler).update(state.loss_scale)

    def _replicated_step(self) -> StepResult:
        """At stage 0 the optimizer is torch's own, without DeepSpeed's check of the norm: check here."""
        parameters = [p for p in self.module.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        applied = bool(torch.isfinite(norm))
        if not applied:
            self._engine.zero_grad()  # AdamW passes over parameters without a gradient
        elif self._max_grad_norm:
            torch.nn.utils.clip_grads_with_norm_(parameters, self._max_grad_norm, norm)
        self._engine.step()
        return StepResult(float(norm), applied)

    def _make_moments(self) -> None:
        """Allocate AdamW's state now, as zeros, which is what it starts from.

        Left to itself DeepSpeed links parameters to their moments during the first update, after the first
        of our two parameter groups, when the second group's moments do not exist yet (0.19.8, ZeRO 1 and 2).
        """
        if self._stage == 3:
            tensors = self._optimizer.fp32_partitioned_groups_flat
        else:
            tensors = [tensor for group in self._adamw.param_groups for tensor in group["params"]]
        for tensor in tensors:
            step = torch.zeros((), dtype=torch.float32, device=tensor.device)
            self._adamw.state[tensor] = {"step": step, **{key: torch.zeros_like(tensor) for key in MOMENTS}}
        if self._stage in (1, 2):
            self._optimizer._lazy_init_hp_params_optimizer_state()

    def _full(self, parameter: nn.Parameter) -> list[Tensor]:
        """Return one parameter's float32 weights and moments, whole, in memory of their own (collective)."""
        if self._stage == 0:
            moments = self._adamw.state[parameter]
            return [parameter.detach().clone(), *(moments[key].clone() for key in MOMENTS)]
        moments = (safe_get_full_optimizer_state(parameter, key) for key in MOMENTS)
        return [safe_get_full_fp32_param(parameter), *moments]

    def _set(self, parameter: nn.Parameter, value: Tensor, moment: str | None = None) -> None:
        """Set one parameter's weights (float32, and in its own precision) or moment from the whole tensor."""
        value = value.to(self._world.device)
        if moment is None and self._stage == 3:
            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
                parameter.data.copy_(value)
        elif moment is None:
            parameter.data.copy_(value)
        if self._stage == 0:
            if moment:
                self._adamw.state[parameter][moment].copy_(value)
        elif self._stage < 3 and moment:
            safe_set_full_optimizer_state(parameter, value, moment)
        elif self._stage < 3:
            safe_set_full_fp32_param(parameter, value)
        else:
            # DeepSpeed's setter of whole tensors cannot cut one that does not divide by the ranks.
            length = parameter.ds_tensor.numel()  # type: ignore[attr-defined]
            padded = nn.functional.pad(value.flatten(), (0, length * self._world.size - value.numel()))
            own = padded.narrow(0, length * self._world.rank, length)
            if moment:
                safe_set_local_optimizer_state(parameter, own, moment)
            else:
                safe_set_local_fp32_param(parameter, own)

    def _updates(self) -> int:
        return max(int(entry["step"]) for entry in self._adamw.state.values())

    def _loss_scale(self) -> dict[str, float]:
        scaler = getattr(self._optimizer, "loss_scaler", None)
        names = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
        return {name: getattr(scaler, name) for name in names if getattr(scaler, "dynamic", False)}


def _decayed_and_not(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return AdamW's two parameter groups: matrices decay; biases and normalisation weights (1-D) do not."""
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
