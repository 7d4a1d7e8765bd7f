"""One rank of the placement tests: ``teacher_worker.py CASES.json RESULTS.pt``, started by test_teacher.py.

Every case loads a teacher replicated and then as it says, and runs both on rows that differ by rank.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

from configs.schema import Placement, Precision, TeacherConfig
from tests.trainer.tiny import rows
from trainer import engine, exits, meeting, world
from trainer.capture import Captured, Head, Need
from trainer.layout import Layout
from trainer.models import Inputs, attention_mask
from trainer.teacher import load_teacher


def batches(rank: int) -> list[Inputs]:
    """Padded rows, full rows, a single row, padded rows: other lengths on every rank."""
    found = []
    for count, length, padded in ((3, 12, True), (2, 16 + rank, False), (1, 5, False), (4, 9 + rank, True)):
        ids_BS, mask_BS = rows(count, length)
        layout = Layout(mask_BS if padded else torch.ones_like(mask_BS), full=not padded)
        found.append(Inputs(ids_BS, layout, attention_mask(layout), torch.zeros_like(ids_BS)))
    return found


def tensors(captured: Captured) -> list[torch.Tensor]:
    """All that was kept."""
    lists = (captured.hidden, captured.queries, captured.keys, captured.values, captured.prediction or ())
    return [x for kept in lists for x in kept if x is not None]


def run_case(case: dict[str, Any], place: world.World) -> dict[str, Any]:
    """Run one case on this rank."""
    need = Need(
        **{key: frozenset(value) for key, value in case["need"].items()},
        head=Head.masked_lm if case["head"] else Head.none,
    )
    settings = {"model": case["model"], "precision": Precision(case["precision"])}
    whole = load_teacher(TeacherConfig(**settings), need, place)
    linear = torch.nn.functional.linear
    own = load_teacher(
        TeacherConfig(**settings, placement=Placement(case["placement"]), offload_folder=case["folder"]),
        need,
        place,
    )
    live: list[int] = []  # elements that are gathered when a module begins
    parameters = list(own.model.parameters())
    for module in own.model.modules():
        module.register_forward_pre_hook(lambda *_: live.append(sum(p.numel() for p in parameters)))
    differing, grads = 0, 0
    for inputs in batches(place.rank):
        expected, found = tensors(whole(inputs)), tensors(own(inputs))
        assert len(found) == len(expected) > 0
        differing += sum(not torch.equal(*pair) for pair in zip(found, expected, strict=True))
        grads += sum(x.requires_grad for x in found)
    held = {name: value.ds_tensor for name, value in own.model.named_parameters()}
    return {
        "differing": differing,
        "grads": grads,
        "elements": {name: value.ds_numel for name, value in own.model.named_parameters()},
        "partition_bytes": sum(x.numel() * x.element_size() for x in held.values()),
        "whole_between_passes": [n for n, p in own.model.named_parameters() if p.numel()],
        "live_bytes": max(live) * parameters[0].element_size(),
        "linear_is_torchs": torch.nn.functional.linear is linear,
        "whole_bytes": sum(x.numel() * x.element_size() for x in whole.model.parameters()),
        "left_in_folder": os.listdir(case["folder"]) if case["folder"] else [],
    }


def main() -> None:
    """Run all cases and write every rank's results."""
    cases, results = (Path(argument) for argument in sys.argv[-2:])
    place = world.find(os.environ)
    world.share_cores(place, 1)
    meeting.connect(place, os.environ)
    engine.attach()
    found = {
        case["name"]: world.gather_over_ranks(run_case(case, place))
        for case in json.loads(cases.read_text(encoding="utf-8"))
    }
    if place.is_main:
        results.write_text(json.dumps(found), encoding="utf-8")
    world.disconnect()


if __name__ == "__main__":
    main()
    exits.leave(exits.DONE)
