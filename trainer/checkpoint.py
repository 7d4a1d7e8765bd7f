"""Checkpoints: everything a run is, written beside the old ones and complete last.

A checkpoint is a folder ``step-00000500``. It is written as ``.step-00000500.partial``, flushed to disk, and
renamed, so a folder under a final name is complete by construction; ``files.json`` lists the size and the
SHA-256 of every file, against which it is verified on load. Nothing is ever replaced: a step that is saved
again becomes ``step-00000500.1``, and counts as newer. Older ones go after that, as ``retained`` says.

Which one is the newest follows from the names alone. ``latest`` is a link for people, and never dangles: a
rename replaces it, after the new checkpoint has its name and before any other goes.

Weights and moments are whole float32 tensors by parameter name in safetensors (nothing is unpickled), the
same for every ZeRO stage, precision and number of ranks. Random numbers need no state: dropout is seeded
from (seed, step, rank, micro batch), see ``trainer.loop``, and the data order from (seed, rows consumed).
"""

import errno
import json
import math
import re
import shutil
from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from configs.schema import CheckpointConfig
from sharding.files import new_folder, sha256, sync

LATEST = "latest"
WEIGHTS = "weights.safetensors"
_MOMENTS = "moments.safetensors"
_NAME = re.compile(r"step-(\d{8,})(?:\.(\d+))?")
RUN, _FILES = "run.json", "files.json"  # the latter is written last


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
    lr_scale: dict[str, float] = field(default_factory=dict)  # by student, where rollbacks lowered it
    tokens: int = 0  # valid tokens of the rows consumed


@dataclass(frozen=True)
class EngineState:
    """Everything that a student's optimization is, free of ranks and stages. All tensors float32 on CPU."""

    weights: dict[str, Tensor]
    moments: dict[str, Tensor]  # "exp_avg.NAME" and "exp_avg_sq.NAME"
    updates: int  # optimizer updates applied; skipped steps are not counted
    loss_scale: dict[str, float]  # fp16 only: the dynamic loss scaler's numbers


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
    heldout: dict[str, float] = field(
        default_factory=dict
    )  # total loss by student, if evaluated at this step


def save(folder: Path, checkpoint: Checkpoint, keep: CheckpointConfig) -> Path:
    """Write a checkpoint under ``folder``, point ``latest`` at it, prune others; for one process at a time.

    Raises:
        OSError: the disk is full or fails. No checkpoint that was there before is touched then.
    """
    for left in folder.glob(".step-*"):  # by a process that was killed; its room may be needed
        shutil.rmtree(left, ignore_errors=True)
    final = _unused(folder, f"step-{checkpoint.progress.step:08d}")
    with new_folder(final) as partial:
        _write(partial, checkpoint)
        _seal(partial)
    _point_latest(folder, final)
    complete = list_complete(folder)
    for old in set(complete) - retained(complete, keep).keys():
        # Half removed, it must not bear the name of a complete one.
        shutil.rmtree(old.rename(old.with_name(f".{old.name}.removed")), ignore_errors=True)
    return final


def retained(complete: Sequence[Path], keep: CheckpointConfig) -> dict[Path, list[str]]:
    """Return which of these checkpoints, oldest first, are to stay, each with the reasons why."""
    of_step = {step_of(path): path for path in complete}  # of several of one step the newest
    reasons: dict[Path, list[str]] = defaultdict(list)
    for path in list(of_step.values())[-keep.keep_last :]:
        reasons[path].append("last")
    for step, path in of_step.items():
        if keep.keep_every_steps and step and step % keep.keep_every_steps == 0:
            reasons[path].append(f"every {keep.keep_every_steps}")
    for student, path in best(list(of_step.values())).items() if keep.keep_best else ():
        reasons[path].append(f"best of {student}")
    return dict(reasons)


def best(complete: Sequence[Path]) -> dict[str, Path]:
    """Return, by student, the checkpoint with the lowest held-out loss of those that were evaluated."""
    found: dict[str, tuple[float, Path]] = {}
    for path in complete:
        try:
            losses = read_run(path)["heldout"]
        except (OSError, ValueError, KeyError):  # damaged: it is no candidate
            continue
        for student, loss in losses.items():
            if math.isfinite(loss) and loss < found.get(student, (math.inf,))[0]:
                found[student] = loss, path
    return {student: path for student, (_, path) in found.items()}


def list_named(folder: Path) -> list[Path]:
    """Return all folders under ``folder`` that bear the name of a checkpoint, oldest first."""
    found = folder.glob("step-*") if folder.is_dir() else []
    return sorted((path for path in found if _NAME.fullmatch(path.name) and path.is_dir()), key=_age)


def list_complete(folder: Path) -> list[Path]:
    """Return those of them whose list of files, which is written last, is there."""
    return [path for path in list_named(folder) if (path / _FILES).is_file()]


def newest_intact(folder: Path, warn: Callable[[str], object]) -> Path | None:
    """Return the newest checkpoint of which every byte is as it was written; None where there is none at all.

    Newer ones that are damaged are renamed to ``damaged-step-00000500`` and told to ``warn``, never removed.

    Raises:
        CheckpointError: there are checkpoints, and all of them are damaged.
    """
    damaged: dict[Path, str] = {}
    for path in reversed(list_named(folder)):
        if not (problems := verify(path)):
            break
        damaged[path] = "; ".join(problems)
    else:
        before = dict.fromkeys(sorted(folder.glob("damaged-step-*")), "found damaged before")
        if told := "".join(f"\n  - {path}: {why}" for path, why in (damaged | before).items()):
            raise CheckpointError(
                f"every checkpoint of this run is damaged:{told}\nput back a copy of one of them; to start "
                "anew, remove them or set another output folder"
            )
        return None
    if damaged:
        _point_latest(folder, path)
    for bad, why in damaged.items():
        aside = bad.rename(_unused(folder, f"damaged-{bad.name.partition('.')[0]}"))
        warn(f"checkpoint {bad} is DAMAGED: {why}. It is now {aside}; going back to {path.name}")
    return path


def load(path: Path, verified: bool = False) -> Checkpoint:
    """Read a checkpoint after verifying sizes and checksums, unless that has been done.

    Raises:
        CheckpointError: a file is missing or differs (names them all), or another version has written it.
    """
    problems = [] if verified else verify(path)
    if problems:
        raise CheckpointError(f"checkpoint {path} is damaged: {'; '.join(problems)}")
    run = read_run(path)
    try:
        students = {
            name: EngineState(load_file(path / name / WEIGHTS), load_file(path / name / _MOMENTS), **fields)
            for name, fields in run.pop("students").items()
        }
        progress = Progress(**run.pop("progress"))
        progress.quarantined = [(corpus, block) for corpus, block in progress.quarantined]
        return Checkpoint(progress=progress, students=students, **run)
    except (KeyError, TypeError, SafetensorError) as error:
        raise CheckpointError(f"checkpoint {path} is not of this version of the code: {error}") from error


def read_run(path: Path) -> dict[str, Any]:
    """Return what a checkpoint says of its run: the fields of ``Checkpoint``, of its students but few."""
    run: dict[str, Any] = json.loads((path / RUN).read_text(encoding="utf-8"))
    return run


def list_files(path: Path) -> dict[str, tuple[int, str]]:
    """Return the size in bytes and the SHA-256 that every file of a checkpoint must have.

    Raises:
        OSError, ValueError: the list cannot be read.
    """
    try:
        listed = json.loads((path / _FILES).read_text(encoding="utf-8"))
        files = {name: (entry["bytes"], entry["sha256"]) for name, entry in listed.items()}
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"it is no list of files: {error!r}") from error
    if RUN not in files:
        raise ValueError(f"it lacks {RUN}")
    return files


def step_of(path: Path) -> int:
    """Return the step of a checkpoint, from its name."""
    return _age(path)[0]


def verify(path: Path, files: Collection[str] | None = None) -> list[str]:
    """Return what is wrong with a checkpoint's files, or with these of them; empty when all is well."""
    try:
        listed = list_files(path)
    except (OSError, ValueError) as error:
        return [f"{_FILES} cannot be read ({error})"]
    problems = []
    for name in listed if files is None else files:
        file, (size, digest) = path / name, listed.get(name, (None, None))
        try:
            if size is None:
                problems.append(f"{name} is not listed in {_FILES}")
            elif file.stat().st_size != size:
                problems.append(f"{name} has {file.stat().st_size} bytes instead of {size}")
            elif sha256(file) != digest:
                problems.append(f"{name} does not match its checksum")
        except FileNotFoundError:
            problems.append(f"{name} is missing")
        except OSError as error:
            problems.append(f"{name} cannot be read ({error})")
    return problems


def is_student(folder: str) -> bool:
    """True for a student's folder in a checkpoint, such as ``OUTPUT/checkpoints/step-00000500/small``."""
    return Path(folder, WEIGHTS).is_file() and Path(folder).parent.joinpath(_FILES).is_file()


def weight_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Return the shape of every weight of a student in a checkpoint, by name, without reading them.

    Raises:
        CheckpointError: they are no safetensors.
    """
    try:
        with safe_open(folder / WEIGHTS, "pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise CheckpointError(f"{folder / WEIGHTS} cannot be read: {error}") from error


def check_same_run(path: Path, config: dict[str, Any], fingerprint: str) -> None:
    """Refuse to resume where that would not be the same run: other rows, another teacher, other students.

    Raises:
        CheckpointError: names every difference.
    """
    resumed = read_run(path)
    problems = []
    if fingerprint != resumed["fingerprint"]:
        problems.append(
            f"the corpus or mixture has fingerprint {fingerprint}, the run was on {resumed['fingerprint']}"
        )
    for key in (
        "train.seed",
        "train.global_batch_rows",
        "data.group_blocks",
        "data.separate_documents",
        "teacher.model",
        "teacher.revision",
    ):
        now, then = _at(config, key), _at(resumed["config"], key)
        if now != then:
            problems.append(f"{key}={now!r}, the run has {then!r}")
    free = {"optimizer", "init", "compile"}
    for number, (now, then) in enumerate(_pairs(config["students"], resumed["config"]["students"])):
        for key in sorted(({*now} | {*then}) - free):
            if now.get(key) != then.get(key):
                problems.append(f"students.{number}.{key}={now.get(key)!r}, the run has {then.get(key)!r}")
    if problems:
        raise CheckpointError(
            f"this is not the run that {path} belongs to:\n"
            + "\n".join(f"  - {problem}" for problem in problems)
            + "\nset them back to go on with that run, or set another output folder to start a new one"
        )


def _age(path: Path) -> tuple[int, int]:
    found = _NAME.fullmatch(path.name)
    assert found is not None, path
    return int(found[1]), int(found[2] or 0)


def _unused(folder: Path, name: str) -> Path:
    """Return ``name`` under a folder, or after others of that name ``name.1``, ``name.2``."""
    pattern = re.compile(rf"{name}(?:\.(\d+))?")
    taken = [
        int(found[1] or 0) for path in folder.glob(f"{name}*") if (found := pattern.fullmatch(path.name))
    ]
    return folder / (f"{name}.{max(taken) + 1}" if taken else name)


def _point_latest(folder: Path, path: Path) -> None:
    new = folder / f".{LATEST}.new"
    new.unlink(missing_ok=True)
    try:
        new.symlink_to(path.name)
    except OSError as error:
        if error.errno in (errno.EPERM, errno.EOPNOTSUPP):
            return  # a file system without links; nothing but people needs it
        raise
    new.replace(folder / LATEST)
    sync(folder)


def _write(folder: Path, checkpoint: Checkpoint) -> None:
    students = {}
    for name, state in checkpoint.students.items():
        (folder / name).mkdir()
        _write_tensors(folder / name / WEIGHTS, state.weights)
        _write_tensors(folder / name / _MOMENTS, state.moments)
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
        "heldout": checkpoint.heldout,
    }
    (folder / RUN).write_text(json.dumps(run, indent=1) + "\n", encoding="utf-8")


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
