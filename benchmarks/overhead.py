"""What DeepSpeed adds to a bare training step, and what waiting for data does.

    python benchmarks/overhead.py [--json PATH] [--quick] [--rows N] [--repeats N]
    torchrun --nproc_per_node 2 benchmarks/overhead.py

BERT-base of random weights in bfloat16 to 4x312 in float32 without attention dropout; 256 rows of 128 tokens
a rank, in micro batches of 32, read from a corpus by one reader process. ``bare`` is the same loop, losses
and AdamW on the plain module; on several ranks it adds all gradients up with one all-reduce. DeepSpeed runs
at ZeRO 0 and 1 and reduces gradients in ``backward`` of the last micro batch or in ``optimizer``.
"""

import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor, nn

from benchmarks.harness import Report, benchmark_parser, interleaved_medians
from benchmarks.rows import write_manifest, write_random_shard
from benchmarks.step import (
    LAYERS,
    NO_DROPOUT,
    PARTS,
    STUDENT_LAYERS,
    Ours,
    connected,
    student_config,
    teacher_folder,
)
from configs.schema import Precision, RunConfig, TeacherConfig
from configs.student_schema import StudentConfig
from sharding.corpora import Corpora
from sharding.manifest import open_corpus
from sharding.stream import Batch, stream
from trainer import world
from trainer.capture import Captured
from trainer.models import Inputs
from trainer.world import World


class Bare(Ours):
    """The step without DeepSpeed."""

    def engine(self, config: RunConfig, student: StudentConfig, module: nn.Module, place: World) -> Any:
        return Plain(module, place)


class Plain:
    """What our loop asks of an engine, in plain torch."""

    def __init__(self, module: nn.Module, place: World) -> None:
        self.module, self.place = module.to(place.device).train(), place
        parameters = list(self.module.parameters())
        groups = [
            {"params": [p for p in parameters if p.dim() > 1], "weight_decay": 0.01},
            {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
        ]
        self.parameters, self.adamw = parameters, torch.optim.AdamW(groups, lr=1e-4, fused=True)

    def __call__(self, inputs: Inputs) -> Captured:
        return Captured(**self.module(inputs.ids_BS, inputs.attention_mask, inputs.token_type_BS))

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self, lr: float) -> None:
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        if self.place.size > 1:
            flat = torch.cat([gradient.flatten() for gradient in gradients])
            world.sum_over_ranks(flat)
            for gradient, whole in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
                gradient.copy_(whole.view_as(gradient))
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.adamw.step()
        self.adamw.zero_grad()


def batches(folder: Path, rows: int, place: World) -> Iterator[Batch]:
    """Steps from a corpus on disk, read ahead by a reader process, without end."""
    corpora = Corpora.of(open_corpus(folder))
    return iter(
        stream(
            corpora,
            "train",
            seed=0,
            group_blocks=16,
            start_row=0,
            stop_row=10**9 * place.size * rows,
            global_batch_rows=rows * place.size,
            rank=place.rank,
            world_size=place.size,
            workers=1,
            prefetch_steps=4,
        )
    )


def main() -> None:
    """Measure and print the table."""
    parser = benchmark_parser(__doc__)
    parser.add_argument("--rows", type=int, default=256, help="rows of a rank's step")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    rows = 8 if arguments.quick else arguments.rows
    place = connected()
    report = Report(f"one step of {rows} rows of 128 on {place.size} ranks; milliseconds")
    with tempfile.TemporaryDirectory() as name:
        teacher_folder(name, STUDENT_LAYERS if arguments.quick else LAYERS)
        write_manifest(Path(name), [write_random_shard(Path(name), 0, 8)])
        teacher = TeacherConfig(name, precision=Precision.bf16)
        students = [student_config(overrides=NO_DROPOUT)]
        kinds: dict[str, Callable[..., Ours]] = {"bare": Bare, "ZeRO 0": Ours, "ZeRO 1": Ours}
        steps = {}
        for kind, make in kinds.items():
            stage = int(kind[-1]) if kind != "bare" else 1
            source = batches(Path(name), rows, place)
            steps[kind] = make(teacher, students, place, source, rows, min(rows, 32), stage)
        medians = interleaved_medians(steps, 1 if arguments.quick else arguments.repeats)
    splits = {kind: step.split() for kind, step in steps.items()}
    for kind, seconds in medians.items():
        split_ms = {part: 1e3 * splits[kind][part] for part in PARTS}
        report.add(kind=kind, step=1e3 * seconds, overhead=seconds / medians["bare"] - 1, **split_ms)
    share = splits["ZeRO 1"]["data"] / medians["ZeRO 1"]
    headline = (
        f"ZeRO 1 costs {medians['ZeRO 1'] / medians['bare'] - 1:.1%} more than bare, data wait {share:.1%}"
    )
    if place.is_main:
        report.finish(headline, arguments.json)
    world.disconnect()


if __name__ == "__main__":
    main()
