"""One rank of test_retired.py: ``retired_worker.py CORPUS RESULTS.json``.

Trains three students of different kinds beside each other at every ZeRO stage; the second one computes NaN on
one rank only, from its third step on. Then each healthy one alone, and all three again from a state saved
after the retirement. And the healthy ones in pieces: stopped after every step, each piece new students, new
engines and a new loop.
"""

import copy
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.trainer.test_loop import Heard, configured, make_run
from trainer import engine, exits, meeting, world
from trainer.checkpoint import Progress
from trainer.engine import EngineState
from trainer.interruption import Interruption
from trainer.loop import Run, train

POISONED_FROM, SAVED_AT, STEPS = 2, 4, 7  # steps completed
STUDENTS = {
    "a": "{name: a, layers: 2, hidden_size: 24, heads: 4, intermediate_size: 48, optimizer: {lr: 0.01}}",
    "b": "{name: b, layers: 2, hidden_size: 24, heads: 4, intermediate_size: 48, optimizer: {lr: 0.02}}",
    "c": "{name: c, layers: 4, hidden_size: 36, heads: 2, intermediate_size: 50, layer_map: [1, 2, 3, 4],"
    " projection: per_layer, losses: {attention: 0.5}, optimizer: {lr: 0.003, betas: [0.8, 0.99],"
    " weight_decay: 0.1, max_grad_norm: null, decay: cosine}}",
}
State = tuple[Progress, dict[str, EngineState]]


class Saved(Heard):
    """Keeps whole states, as a checkpoint does."""

    def __init__(self, run: Run) -> None:
        super().__init__()
        self.run = run
        self.states: dict[int, State] = {}

    def save(self, progress: Progress) -> None:
        own = {trainee.config.name: trainee.engine.state() for trainee in self.run.trainees}
        handed = [own]
        dist.broadcast_object_list(handed, src=0)
        self.states[progress.step] = copy.deepcopy(progress), handed[0]


def trained(
    corpus: Path,
    place: world.World,
    stage: int,
    names: str,
    start: State | None = None,
    interruption: Interruption | None = None,
) -> Saved:
    """Train the named students from ``start``, by default from the beginning."""
    config = configured(
        corpus,
        f"students=[{', '.join(STUDENTS[name] for name in names)}]",
        f"deepspeed.zero_stage={stage}",
        "train.micro_batch_rows=2",
        f"checkpoint.every_steps={SAVED_AT}",
        "evaluation.every_steps=4",
        f"train.steps={STEPS}",
    )
    progress, states = start or (Progress(), {})
    run = make_run(config, copy.deepcopy(progress), place, states)
    for trainee in run.trainees:
        if trainee.config.name == "b" and place.rank == place.size - 1:

            def poison(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
                return output * float("nan") if run.progress.step >= POISONED_FROM else output

            trainee.engine.module.encoder.embeddings.register_forward_hook(poison)
    run.interruption = interruption or Interruption()
    heard = Saved(run)
    train(run, heard)
    return heard


def in_pieces(corpus: Path, place: world.World, stage: int, names: str) -> list[State]:
    """Train the named students from the beginning, asked to leave in every step; the saved states."""
    states: list[State] = []
    while not states or states[-1][0].step < STEPS:
        leave = Interruption(max_hours=0.0) if place.rank == place.size - 1 else None
        piece = trained(corpus, place, stage, names, states[-1] if states else None, leave)
        states.append(piece.states[max(piece.states)])
    return states


def equal(left: EngineState, right: EngineState) -> bool:
    """Whether two states are bitwise equal."""
    return (left.updates, left.loss_scale) == (right.updates, right.loss_scale) and all(
        ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
        for ours, theirs in ((left.weights, right.weights), (left.moments, right.moments))
    )


def run_case(corpus: Path, place: world.World, stage: int) -> dict[str, Any]:
    """Run one stage; what it returns is this rank's view."""
    together = trained(corpus, place, stage, "abc")
    alone = {name: trained(corpus, place, stage, name) for name in "ac"}
    resumed = trained(corpus, place, stage, "abc", together.states[SAVED_AT])
    healthy = trained(corpus, place, stage, "ac").states[STEPS]
    pieces = in_pieces(corpus, place, stage, "ac")
    (progress, middle), (_, last) = together.states[SAVED_AT], together.states[STEPS]
    return {
        "retired": together.run.progress.retired,
        "retired_in_checkpoint": progress.retired,
        "retirements": [[name for name, _ in heard.retirements] for heard in (together, resumed)],
        "as_alone": {name: equal(last[name], alone[name].states[STEPS][1][name]) for name in "ac"},
        "evaluated_as_alone": {
            name: together.evaluations[-1][1][name] == alone[name].evaluations[-1][1][name] for name in "ac"
        },
        "frozen": equal(middle["b"], last["b"]),
        "finite": all(bool(torch.isfinite(value).all()) for value in last["b"].weights.values()),
        "updates": {name: state.updates for name, state in last.items()},
        "resumed": {name: equal(last[name], resumed.states[STEPS][1][name]) for name in "abc"},
        "pieces": [progress.step for progress, _ in pieces],
        "in_pieces": {name: equal(pieces[-1][1][name], healthy[1][name]) for name in "ac"},
        "evaluated": [sorted(students) for _, students in together.evaluations],
    }


def main() -> None:
    """Run all stages and write every rank's results."""
    corpus, results = (Path(argument) for argument in sys.argv[-2:])
    place = world.find(os.environ)
    world.share_cores(place, 1)
    meeting.connect(place, os.environ)
    engine.attach()
    found = [run_case(corpus, place, stage) for stage in range(4)]
    of_ranks = world.gather_over_ranks(found)
    if place.is_main:
        results.write_text(json.dumps(of_ranks), encoding="utf-8")
    world.disconnect()


if __name__ == "__main__":
    main()
    exits.leave(exits.DONE)
