"""Checkpoints for the tests of this room, and damage to them."""

import os
from dataclasses import replace
from pathlib import Path

import torch

from configs.schema import CheckpointConfig
from trainer.checkpoint import Checkpoint, EngineState, Progress, list_complete


def keep(last: int = 2, every: int | None = None, best: bool = False) -> CheckpointConfig:
    return CheckpointConfig(keep_last=last, keep_every_steps=every, keep_best=best)


def checkpoint(step: int, numbers: int = 100, names: tuple[str, ...] = ("a", "b.2")) -> Checkpoint:
    """Tensors that tell step and student apart."""
    generator = torch.Generator().manual_seed(step)

    def state(number: int) -> EngineState:
        weights = {
            "encoder.w": torch.randn(numbers, generator=generator) + number,
            "bias": torch.full((3,), 1e-40 * step),  # denormal
        }
        moments = {f"{key}.{name}": w * w for key in ("exp_avg", "exp_avg_sq") for name, w in weights.items()}
        return EngineState(
            weights, moments, updates=step - 1, loss_scale={"cur_scale": 2.0**16, "cur_iter": 3}
        )

    return Checkpoint(
        progress=Progress(step, 24 * step),
        students={name: state(number) for number, name in enumerate(names)},
        skipped_steps={name: 1 for name in names},
        fingerprint="f" * 64,
        config={"name": "run", "nested": {"list": [1, 2.5, None, "ü"]}},
        tracking_run_ids={"": "run-id", "a": "child-id"},
        revision="0123abcd-dirty",
        world_size=2,
    )


def assert_equal(read: Checkpoint, written: Checkpoint) -> None:
    assert replace(read, students={}) == replace(written, students={})
    assert list(read.students) == list(written.students)
    for name, state in written.students.items():
        other = read.students[name]
        assert (other.updates, other.loss_scale) == (state.updates, state.loss_scale)
        for ours, theirs in ((state.weights, other.weights), (state.moments, other.moments)):
            assert ours.keys() == theirs.keys()
            assert all(torch.equal(ours[key], theirs[key]) for key in ours)
            assert all(value.dtype == torch.float32 for value in theirs.values())


def names(folder: Path) -> list[str]:
    """All that is there but ``latest``, which must lead to the newest."""
    found = sorted(path.name for path in folder.iterdir() if path.name != "latest")
    assert os.readlink(folder / "latest") == list_complete(folder)[-1].name
    return found


def damage(path: Path, how: str) -> None:
    """Damage a checkpoint in one of the ways that ``DAMAGE`` names."""
    weights = path / "a/weights.safetensors"
    if how == "flipped":
        data = bytearray(weights.read_bytes())
        data[-1] ^= 1
        weights.write_bytes(data)
    elif how == "cut":
        os.truncate(weights, 16)
    elif how == "gone":
        weights.unlink()
    elif how == "a folder":
        weights.unlink()
        weights.mkdir()
    elif how == "unreadable":
        (path / "run.json").write_text("{broken")
    else:
        (path / "files.json").unlink()


DAMAGE = ("flipped", "cut", "gone", "a folder", "unreadable", "unlisted")
