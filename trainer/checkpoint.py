"""Checkpoints: everything a run is, written beside the old ones and complete last.

A checkpoint is a folder ``step-00000500``. It is written as ``.step-00000500.partial``, flushed to disk, and
renamed, so a folder under a final name is complete by construction; ``files.json`` lists the size and the
SHA-256 of every file, against which it is verified on load. Which one is the latest follows from the names
alone; there is no pointer that could be wrong. Older ones are removed after the rename.

Weights and moments are whole float32 tensors by parameter name in safetensors (nothing is unpickled), the
same for every ZeRO stage, precision and number of ranks. Random numbers need no state: dropout is seeded
from (seed, step, rank, micro batch), see ``trainer.loop``, and the data order from (seed, rows consumed).
"""

import json
import re
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from sharding.files import new_folder, sha256, sync
from trainer.engine import EngineState

_NAME = re.compile(r"step-(\d{8})")
_FILES = "files.json"  # written last


class CheckpointError(ValueError):
    """A checkpoint that is damaged, or belongs to another run."""


@dataclass
class Progress:
    """Where a run stands."""

    step: int = 0  # optimizer steps completed
    rows: int = 0  # rows of the corpora consumed by completed steps, over all ranks and epochs
    quarantined: list[tuple[int, int]] = field(default_factory=list)  # (corpus, block) found damaged, masked
    retired: dict[str, str] = field(default_factory=dict)  # students that failed, by name: when and why
    rollbacks: dict[str, int] = field(default_factory=dict)  # by student: how often the run went back for it
    lr_scale: dict[str, float] = field(default_factory=dict)  # by student, where rollbacks have lowered the rate


@dataclass(frozen=True)
class Checkpoint:
    """Everything a run is."""

    progress: Progress
    students: dict[str, EngineState]  # by student name
    skipped_steps: dict[str, int]  # by student name: steps whose update was left out
    fingerprint: str  # of the corpus, or of the mixture
    config: dict[str, Any]  # resolved
    tracking_run_ids: dict[str, str]  # MLflow run ids; "" is the run itself, the others are students
    revision: str  # of the code
    world_size: int


def save(folder: Path, checkpoint: Checkpoint, keep_last: int) -> Path:
    """Write a checkpoint under ``folder`` and prune older ones; call on rank 0 only.

    Raises:
        OSError: the disk is full or fails. Nothing that was there before is touched then.
    """
    final = folder / f"step-{checkpoint.progress.step:08d}"
    with new_folder(final) as partial:
        _write(partial, checkpoint)
        _seal(partial)
    for left in folder.glob(".step-*"):  # by a process that was killed
        shutil.rmtree(left)
    for old in list_complete(folder)[:-keep_last]:
        # Half removed, it must not bear the name of a complete one.
        shutil.rmtree(old.rename(old.with_name(f".{old.name}.removed")))
    return final


def list_complete(folder: Path) -> list[Path]:
    """Return the checkpoints under ``folder``, oldest first."""
    found = folder.glob("step-*") if folder.is_dir() else []
    return sorted(path for path in found if _NAME.fullmatch(path.name) and (path / _FILES).is_file())


def load(path: Path) -> Checkpoint:
    """Read a checkpoint after verifying sizes and checksums.

    Raises:
        CheckpointError: a file is missing or differs; names them all.
    """
    problems = verify(path)
    if problems:
        raise CheckpointError(
            f"checkpoint {path} is damaged: {'; '.join(problems)}. "
            "Remove the folder to resume from the one before"
        )
    run = json.loads((path / "run.json").read_text(encoding="utf-8"))
    students = {
        name: EngineState(
            weights=load_file(path / name / "weights.safetensors"),
            moments=load_file(path / name / "moments.safetensors"),
            **fields,
        )
        for name, fields in run.pop("students").items()
    }
    progress = Progress(**run.pop("progress"))
    progress.quarantined = [(corpus, block) for corpus, block in progress.quarantined]
    return Checkpoint(progress=progress, students=students, **run)


def verify(path: Path) -> list[str]:
    """Return what is wrong with a checkpoint's files; empty when all is well."""
    try:
        listed = json.loads((path / _FILES).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return [f"{_FILES} cannot be read ({error})"]
    problems = []
    for name, expected in listed.items():
        file = path / name
        if not file.is_file():
            problems.append(f"{name} is missing")
        elif file.stat().st_size != expected["bytes"]:
            problems.append(f"{name} has {file.stat().st_size} bytes instead of {expected['bytes']}")
        elif sha256(file) != expected["sha256"]:
            problems.append(f"{name} does not match its checksum")
    return problems


def check_same_run(path: Path, config: dict[str, Any], fingerprint: str, resumed: Checkpoint) -> None:
    """Refuse to resume where that would not be the same run: other rows, another teacher, other students.

    Raises:
        CheckpointError: names every difference.
    """
    problems = []
    if fingerprint != resumed.fingerprint:
        problems.append(
            f"the corpus or mixture has fingerprint {fingerprint}, the run was on {resumed.fingerprint}"
        )
    for key in (
        "train.seed",
        "train.global_batch_rows",
        "data.group_blocks",
        "data.separate_documents",
        "teacher.model",
        "teacher.revision",
    ):
        now, then = _at(config, key), _at(resumed.config, key)
        if now != then:
            problems.append(f"{key}={now!r}, the run has {then!r}")
    free = {"optimizer", "init", "compile"}
    for number, (now, then) in enumerate(_pairs(config["students"], resumed.config["students"])):
        for key in sorted(({*now} | {*then}) - free):
            if now.get(key) != then.get(key):
                problems.append(f"students.{number}.{key}={now.get(key)!r}, the run has {then.get(key)!r}")
    if problems:
        raise CheckpointError(
            f"this is not the run that {path} belongs to:\n"
            + "\n".join(f"  - {problem}" for problem in problems)
            + "\nset them back to go on with that run, or set another output folder to start a new one"
        )


def _write(folder: Path, checkpoint: Checkpoint) -> None:
    students = {}
    for name, state in checkpoint.students.items():
        (folder / name).mkdir()
        _write_tensors(folder / name / "weights.safetensors", state.weights)
        _write_tensors(folder / name / "moments.safetensors", state.moments)
        students[name] = {"updates": state.updates, "loss_scale": state.loss_scale}
    run = {
        "progress": asdict(checkpoint.progress),
        "students": students,
        "skipped_steps": checkpoint.skipped_steps,
        "fingerprint": checkpoint.fingerprint,
        "config": checkpoint.config,
        "tracking_run_ids": checkpoint.tracking_run_ids,
        "revision": checkpoint.revision,
        "world_size": checkpoint.world_size,
    }
    (folder / "run.json").write_text(json.dumps(run, indent=1) + "\n", encoding="utf-8")


def _write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    try:
        save_file(tensors, path)
    except SafetensorError as error:  # so comes a full disk
        raise OSError(f"{path} cannot be written: {error}") from error


def _seal(folder: Path) -> None:
    """Flush everything to disk, then list the files: ``files.json`` is there only when all the rest is."""
    paths = sorted(folder.rglob("*"))
    for path in paths:
        sync(path)
    files = [path for path in paths if path.is_file()]
    listed = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256(path)}
        for path in files
    }
    (folder / _FILES).write_text(json.dumps(listed, indent=1) + "\n", encoding="utf-8")
    sync(folder / _FILES)
    sync(folder)


def _at(config: dict[str, Any], dotted: str) -> Any:
    value: Any = config
    for key in dotted.split("."):
        value = value.get(key)  # None: a setting that came later
    return value


def _pairs(
    now: list[dict[str, Any]], then: list[dict[str, Any]]
) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    length = max(len(now), len(then))
    return list(zip(now + [{}] * (length - len(now)), then + [{}] * (length - len(then)), strict=True))
