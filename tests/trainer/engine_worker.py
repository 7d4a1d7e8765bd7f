"""One rank of the engine tests: ``engine_worker.py CASES.json RESULTS.json``, started by test_engine.py.

Every case trains a small student on fixed rows for three steps, saves its state, trains two more, restores
the saved state into a new engine and trains the two again; then a step whose loss is NaN, and the two once
more from the saved state, restored into the same engine.
"""

import copy
import json
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch import Tensor
from transformers import BertConfig, BertModel

from configs.student_schema import OptimizerConfig, Projection
from trainer import engine, exits, meeting, world
from trainer.capture import enable_capture
from trainer.engine import Engine
from trainer.layout import Layout
from trainer.models import Inputs, Student

ROWS, SEQ_LEN, MICRO_ROWS, TEACHER_SIZE, LR = 12, 16, 2, 30, 1e-2
OPTIMIZER = OptimizerConfig(weight_decay=0.1, max_grad_norm=0.1)


def make_student(dropout: float) -> Student:
    """A student whose odd sizes do not divide by two or three ranks."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=101,
        hidden_size=20,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=35,
        max_position_embeddings=SEQ_LEN,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    encoder = BertModel(config, add_pooling_layer=False)
    enable_capture(encoder)
    return Student(encoder, TEACHER_SIZE, Projection.separate)


def make_rows(step: int) -> tuple[Tensor, Tensor]:
    """Ids [rows, S] and targets [rows, S, E_T] of one global step."""
    generator = torch.Generator().manual_seed(step)
    ids_BS = torch.randint(0, 101, (ROWS, SEQ_LEN), generator=generator)
    return ids_BS, torch.randn(ROWS, SEQ_LEN, TEACHER_SIZE, generator=generator)


def make_inputs(ids_BS: Tensor) -> Inputs:
    """A micro batch without padding."""
    full = Layout(torch.ones_like(ids_BS, dtype=torch.bool), full=True)
    return Inputs(ids_BS, full, None, torch.zeros_like(ids_BS))


def loss_of(hidden_BSE: Tensor, targets_BSE: Tensor) -> Tensor:
    """This rank's share of the mean over the global step."""
    return (hidden_BSE.float() - targets_BSE).square().sum() / (ROWS * SEQ_LEN * TEACHER_SIZE)


def train(own: Engine, place: world.World, steps: range, nan: bool = False) -> list[dict[str, Any]]:
    """Train and return each step's global loss, gradient norm and whether it was applied."""
    results = []
    own_rows = ROWS // place.size
    for step in steps:
        ids_BS, targets_BSE = make_rows(step)
        loss_sum = torch.zeros((), dtype=torch.float64)
        for start in range(place.rank * own_rows, (place.rank + 1) * own_rows, MICRO_ROWS):
            rows = slice(start, start + MICRO_ROWS)
            torch.manual_seed(1000 * step + start)
            loss = loss_of(own(make_inputs(ids_BS[rows])).hidden[-1], targets_BSE[rows])
            own.backward(loss * float("nan") if nan else loss)
            loss_sum += loss.detach()
        result = own.step(LR)
        loss_sum = world.sum_over_ranks(loss_sum)
        results.append({"loss": float(loss_sum), "norm": result.grad_norm, "applied": result.applied})
    return results


def equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    """Whether two states are bitwise equal, on rank 0 (elsewhere both are empty)."""
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def make_engine(case: dict[str, Any], place: world.World) -> Engine:
    """A new engine of a new student."""
    settings = {
        "train_batch_size": ROWS,
        "train_micro_batch_size_per_gpu": MICRO_ROWS,
        "gradient_accumulation_steps": ROWS // MICRO_ROWS // place.size,
        "gradient_clipping": OPTIMIZER.max_grad_norm,
        "zero_force_ds_cpu_optimizer": False,
        **case["deepspeed"],
    }
    own = Engine(make_student(case["dropout"]), OPTIMIZER, copy.deepcopy(settings), place)
    own.train()
    return own


def run_case(case: dict[str, Any], place: world.World, shared: Path) -> dict[str, Any]:
    """Run one case; ``shared`` hands a state on to a later start with another number of ranks."""
    fresh = partial(make_engine, case, place)
    first = fresh()
    start = train(first, place, range(3))
    handed = [first.state()]
    dist.broadcast_object_list(handed, src=0)
    saved = handed[0]
    as_saved = copy.deepcopy(saved)
    end = train(first, place, range(3, 5))
    final = first.weights()
    snapshot = equal(saved.weights, as_saved.weights) and equal(saved.moments, as_saved.moments)

    second = fresh()
    second.load(saved)
    restored = second.state()
    same_state = equal(restored.weights, first_on_main(saved.weights, place))
    same_moments = equal(restored.moments, first_on_main(saved.moments, place))
    again = train(second, place, range(3, 5))
    bitwise = equal(second.weights(), final)
    skipped = train(second, place, range(5, 6), nan=True)
    kept = equal(second.weights(), final)
    second.load(saved)
    rewound = train(second, place, range(3, 5)) == again and equal(second.weights(), final)

    if place.is_main and case["name"] == "zero1" and not shared.exists():
        torch.save(saved, shared)
    dist.barrier()
    elastic = None
    if shared.exists():
        other = torch.load(shared, weights_only=False)
        third = fresh()
        third.load(other)
        elastic = train(third, place, range(3, 5))
    return {
        "start": start,
        "end": end,
        "again": again,
        "updates": saved.updates,
        "loss_scale": [saved.loss_scale, restored.loss_scale],
        "snapshot": snapshot,
        "restored": same_state and same_moments,
        "bitwise": bitwise,
        "rewound": rewound,
        "skipped": skipped,
        "kept": kept,
        "elastic": elastic,
    }


def first_on_main(tensors: dict[str, Tensor], place: world.World) -> dict[str, Tensor]:
    """States are whole on rank 0 only."""
    return tensors if place.is_main else {}


def main() -> None:
    """Run all cases and write their results."""
    cases, results, shared = (Path(argument) for argument in sys.argv[-3:])
    place = world.find(os.environ)
    world.share_cores(place, 1)
    meeting.connect(place, os.environ)
    engine.attach()
    # DeepSpeed refuses fp16 engines on CPU, though torch computes in it: slowly, which is no matter here.
    type(get_accelerator()).is_fp16_supported = lambda self: True
    found = {
        case["name"]: run_case(case, place, shared) for case in json.loads(cases.read_text(encoding="utf-8"))
    }
    if place.is_main:
        results.write_text(json.dumps(found), encoding="utf-8")
    world.disconnect()


if __name__ == "__main__":
    main()
    exits.leave(exits.DONE)
