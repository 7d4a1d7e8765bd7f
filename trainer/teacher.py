"""The teacher: shortened to what students learn from, in its precision and placement, never trained."""

import importlib.util
import os
import shutil
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from configs.schema import Placement, Quantization, RunConfig, TeacherConfig
from trainer import engine
from trainer.capture import (
    Captured,
    Need,
    capture,
    check_supported,
    compile_layers,
    enable_capture,
    layers_of,
    shorten,
)
from trainer.encoders import DTYPES, empty_encoder, load_encoder, load_teacher_config
from trainer.models import Inputs
from trainer.world import World, on_main

FP8_CAPABILITY = (8, 9)  # CUDA compute capability: Ada, Hopper


class Teacher:
    """A frozen encoder that is called with a micro batch. It computes what is needed and nothing after it."""

    def __init__(self, model: PreTrainedModel, need: Need, may_stop: bool) -> None:
        """Args: ``model`` is prepared by ``load_teacher``; ``need`` is what of a pass is kept."""
        self.model = model
        self.config: PreTrainedConfig = model.config
        """That of the full model."""
        self.hidden_size: int = model.config.hidden_size
        self.depth = need.depth(model.config.num_hidden_layers)
        """Layers that run."""
        self._need, self._may_stop = need, may_stop

    @torch.no_grad()  # not inference_mode: losses keep queries and keys for the students' backward pass
    def __call__(self, inputs: Inputs) -> Captured:
        """Return what students learn from, without gradients (collective unless replicated)."""
        return capture(
            self.model,
            inputs.ids_BS,
            inputs.attention_mask,
            inputs.token_type_BS,
            need=self._need,
            may_stop=self._may_stop,
        )


def load_teacher(config: TeacherConfig, need: Need, world: World) -> Teacher:
    """Load the teacher as ``config`` says, without the layers that ``need`` does not reach (collective).

    Replicated, every rank reads the weights. Partitioned, only rank 0 does, and hands out a parameter at a
    time: no device ever holds the model, nor does a host's memory where the file's format is safetensors.

    Raises:
        ValueError: the weights cannot be read, some are missing, or the attention cannot be captured.
    """
    if config.placement is Placement.replicated:
        model, layers = _read(config, need, DTYPES[config.precision])
        model.to(world.device)  # type: ignore[arg-type]  # its decorator hides nn.Module's signature
        _quantize(layers, config.quantization)
        if config.compile:
            compile_layers(layers)
        return Teacher(model, need, may_stop=True)
    found: list[PreTrainedModel] = []  # kept out of what ``on_main`` hands to the other ranks
    # In the file's own dtype weights stay in the mapped file until they are used, one after another.
    on_main(world, lambda: found.append(_read(config, need, "auto")[0]))
    model = found[0] if found else _empty(config, need)
    offload = config.placement is Placement.offload
    folder = None if config.offload_folder is None else Path(config.offload_folder)
    engine.partition(model, DTYPES[config.precision], world, offload, folder)
    # An exception that ends a pass would leave the gathered layer in place.
    return Teacher(model, need, may_stop=False)


def check_machine(config: RunConfig, device: torch.device) -> list[str]:
    """Return every setting of the models that this machine cannot do, each with a way out."""
    problems = []
    compiler = os.environ.get("CXX", "g++")
    asked = {"teacher": config.teacher.compile} | {
        f"students.{number}": student.compile for number, student in enumerate(config.students)
    }
    for key in [key for key in asked if asked[key] and shutil.which(compiler) is None]:
        problems.append(
            f"{key}.compile=true needs a C++ compiler, but {compiler} is not on this machine; install g++ "
            "(or name another in CXX), or set {key}.compile=false"
        )
    quantization = config.teacher.quantization
    if quantization is not Quantization.none and importlib.util.find_spec("torchao") is None:
        problems.append(
            f"teacher.quantization={quantization.value} needs torchao, which is not installed; "
            "pip install torchao, or set teacher.quantization=none"
        )
    if quantization is Quantization.fp8:
        has = "no CUDA device"
        if device.type == "cuda":
            has = "compute capability {}.{}".format(*torch.cuda.get_device_capability(device))
        if device.type != "cuda" or torch.cuda.get_device_capability(device) < FP8_CAPABILITY:
            problems.append(
                "teacher.quantization=fp8 needs a CUDA device of compute capability 8.9 or newer (Ada, "
                f"Hopper); here is {has}; set teacher.quantization to int8 or none"
            )
    return problems


def _read(
    config: TeacherConfig, need: Need, dtype: torch.dtype | str
) -> tuple[PreTrainedModel, nn.ModuleList]:
    """Return the model on CPU, proved to be captured and then shortened, and its layers."""
    model = load_encoder(config.model, head=need.head, revision=config.revision, dtype=dtype)
    enable_capture(model)
    check_supported(model)
    return model, freeze(model, need)


def _empty(config: TeacherConfig, need: Need) -> PreTrainedModel:
    """The same model without its weights."""
    model = empty_encoder(load_teacher_config(config), head=need.head)
    freeze(model, need)
    return model


def freeze(model: PreTrainedModel, need: Need) -> nn.ModuleList:
    """Make an encoder a teacher that goes as far as is needed, in place; return the layers that are left."""
    layers = layers_of(model)
    depth = need.depth(len(layers))
    if depth < len(layers):
        shorten(model, depth)
    model.eval().requires_grad_(False)
    return layers


def _quantize(layers: nn.ModuleList, quantization: Quantization) -> None:
    """Let torchao quantize every linear map of the layers in place; embeddings and heads stay as they are."""
    if quantization is Quantization.none:
        return
    from torchao import quantization as ao  # takes a second, and is not needed without

    if quantization is Quantization.int8:
        ao.quantize_(layers, ao.Int8DynamicActivationInt8WeightConfig())
    else:
        ao.quantize_(layers, ao.Float8DynamicActivationFloat8WeightConfig(granularity=ao.PerRow()))
