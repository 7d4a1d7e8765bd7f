"""What the teacher needs in memory, by hand and against loaded ones. Partitions: test_teacher.py."""

from dataclasses import replace

import pytest
import torch

from configs.schema import Placement, Precision, Quantization, TeacherConfig
from tests.trainer.teacher_worker import tensors
from tests.trainer.test_teacher import NEEDS, PLACE, padded, saved
from tests.trainer.tiny import ARCHITECTURES, INNER, LAYERS, WIDTH, tiny_config
from trainer.memory import Memory, check_fits, fits, host_bytes, placements, teacher_memory
from trainer.teacher import load_teacher
from trainer.world import World

FOUR_OF_EIGHT = World(rank=0, size=8, local_rank=0, local_size=4, device=torch.device("cpu"))
GPU = replace(FOUR_OF_EIGHT, device=torch.device("cuda", 0))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("needed", NEEDS)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_a_replicated_teacher_holds_and_gives(architecture, needed, precision, tmp_path):
    config = TeacherConfig(model=str(saved(architecture, tmp_path)), precision=Precision(precision))
    teacher, inputs = load_teacher(config, NEEDS[needed], PLACE), padded()
    found = teacher_memory(config, tiny_config(architecture), NEEDS[needed], PLACE, *inputs.ids_BS.shape)
    assert found.parameters == sum(p.numel() * p.element_size() for p in teacher.model.parameters())
    rows, seq_len = inputs.ids_BS.shape
    width = {"fp32": 4, "bf16": 2}[precision]
    own = rows * seq_len * (width * (6 * WIDTH + 3 * INNER) + seq_len)
    assert found.activations - own == sum(x.numel() * x.element_size() for x in tensors(teacher(inputs)))


def test_int8_weights_take_a_byte_each(tmp_path):
    config = TeacherConfig(str(saved("bert", tmp_path)), precision=Precision.bf16)
    quantized = replace(config, quantization=Quantization.int8)
    plain, found = (
        teacher_memory(kind, tiny_config("bert"), NEEDS["all"], PLACE, 1, 8).parameters
        for kind in (config, quantized)
    )
    assert plain - found == LAYERS * (4 * WIDTH**2 + 2 * WIDTH * INNER)


def test_shares_of_ranks_and_hosts():
    config = TeacherConfig(precision=Precision.fp32)
    found = placements(config, tiny_config("bert"), NEEDS["all"], FOUR_OF_EIGHT, 2, 8)
    whole, zero3, offload = (found[kind] for kind in Placement)
    assert whole.loading == 4 * whole.parameters and zero3.loading == offload.loading == 0
    share = zero3.parameters - offload.parameters
    assert whole.parameters / 8 <= share < whole.parameters / 8 + 4 * 100
    assert offload.host == 4 * share and zero3.host == whole.host == 0
    to_disk = teacher_memory(
        TeacherConfig(precision=Precision.fp32, placement=Placement.offload, offload_folder="folder"),
        tiny_config("bert"), NEEDS["all"], FOUR_OF_EIGHT, 2, 8,
    )  # fmt: skip
    assert to_disk == replace(offload, host=0, disk=offload.host)


def test_on_cpu_the_host_holds_what_devices_hold_elsewhere():
    memory = Memory(parameters=10, activations=5, host=7, disk=0, loading=3)
    assert host_bytes(memory, GPU) == 7 and host_bytes(replace(memory, loading=9), GPU) == 9
    assert host_bytes(memory, FOUR_OF_EIGHT) == 4 * 15 + 7
    assert fits(memory, GPU, (15, 7)) and not fits(memory, GPU, (14, 7)) and not fits(memory, GPU, (15, 6))
    assert fits(memory, FOUR_OF_EIGHT, (None, 67)) and not fits(memory, FOUR_OF_EIGHT, (None, 66))


def test_what_does_not_fit_is_refused_with_a_way_out():
    gib = 2**30
    found = {
        Placement.replicated: Memory(80 * gib, gib, 0, 0, 160 * gib),
        Placement.zero3: Memory(12 * gib, gib, 0, 0, 0),
        Placement.offload: Memory(2 * gib, gib, 40 * gib, 0, 0),
    }
    config = TeacherConfig()
    assert check_fits(config, found, GPU, (90 * gib, 200 * gib)) == []
    (problem,) = check_fits(config, found, GPU, (16 * gib, 200 * gib))
    assert "teacher.placement=replicated needs 81.00 GiB of each device, where 16.00 GiB are free" in problem
    assert "set teacher.placement=zero3" in problem
    (problem,) = check_fits(config, found, GPU, (8 * gib, 200 * gib))
    assert "set teacher.placement=offload" in problem
    (problem,) = check_fits(config, found, GPU, (gib, gib))
    assert "use more ranks" in problem
