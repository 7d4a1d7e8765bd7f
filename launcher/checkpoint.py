"""List, verify and convert the checkpoints of a run.

    python launcher/checkpoint.py list OUTPUT
    python launcher/checkpoint.py verify OUTPUT or CHECKPOINT
    python launcher/checkpoint.py consolidate CHECKPOINT --output FOLDER [--student NAME]

OUTPUT is the folder of a run, CHECKPOINT one of its checkpoints, ``OUTPUT/checkpoints/step-00000500`` or
``OUTPUT/checkpoints/latest``. ``list`` goes by names, ``verify`` reads every byte. ``consolidate`` makes of
each student what the run would have exported then, a ``transformers`` folder; it needs the teacher's config
and tokenizer, not its weights, and no GPU.

Exit codes: 0 done, 1 ``verify`` found damage, 2 a mistake in what was asked, told in short.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

if __package__ in (None, ""):  # run as a script, Python puts launcher/ on the path instead of the repository
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    import configs  # noqa: F401  before transformers, which finds torchao and makes it talk

from rich.console import Console
from rich.table import Table

from configs.load import from_dict
from configs.schema import CheckpointConfig, RunConfig
from trainer.checkpoint import (
    LATEST,
    RUN,
    WEIGHTS,
    CheckpointError,
    list_complete,
    list_files,
    list_named,
    read_run,
    retained,
    verify,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    options = _parser().parse_args(arguments)
    try:
        return options.run(options)
    except (ValueError, OSError) as error:
        print(f"checkpoint.py: error: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="checkpoint.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    shown = commands.add_parser("list", help="show what there is, and why it is kept")
    shown.set_defaults(run=_list)
    shown.add_argument("output", type=Path, metavar="OUTPUT")
    checked = commands.add_parser("verify", help="read every byte and report all damage")
    checked.set_defaults(run=_verify)
    checked.add_argument("path", type=Path, metavar="OUTPUT|CHECKPOINT")
    made = commands.add_parser("consolidate", help="make transformers folders of a checkpoint's students")
    made.set_defaults(run=_consolidate)
    made.add_argument("checkpoint", type=Path, metavar="CHECKPOINT")
    made.add_argument("--output", type=Path, required=True, help="gets a folder for every student")
    made.add_argument("--student", metavar="NAME", help="this one only")
    return parser


def _list(options: argparse.Namespace) -> int:
    folder = _folder(options.output)
    complete, link = list_complete(folder), folder / LATEST
    reasons = retained(complete, _keep(complete))
    table = Table("checkpoint", "rows", "students", "MB", "held-out loss", "ranks", "revision", "age", "")
    for path in list_named(folder):
        marks = [LATEST] * (link.is_symlink() and link.readlink() == Path(path.name)) + reasons.get(path, [])
        try:
            table.add_row(path.name, *_described(path), ", ".join(marks))
        except (OSError, ValueError, KeyError) as error:
            table.add_row(path.name, *[""] * 7, f"DAMAGED: {error}")
    for pattern, why in (("damaged-step-*", "damaged, put aside"), (".step-*", "left by a kill, will go")):
        for path in sorted(folder.glob(pattern)):
            size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
            table.add_row(path.name, "", "", _megabytes(size), "", "", "", "", why)
    Console(width=None if sys.stdout.isatty() else 200).print(table)
    return 0


def _verify(options: argparse.Namespace) -> int:
    single = not (options.path / "checkpoints").is_dir()
    paths = [options.path] if single else list_named(_folder(options.path))
    if single and not (options.path / RUN).is_file():
        raise CheckpointError(f"{options.path} is neither the folder of a run nor a checkpoint")
    problems = [f"{path}: {problem}" for path in paths for problem in verify(path)]
    for problem in problems:
        print(problem)
    if problems:
        print(f"{len(problems)} problems; a run goes back to the newest checkpoint without any")
        return 1
    print(f"{len(paths)} checkpoints are whole: {', '.join(path.name for path in paths)}")
    return 0


def _consolidate(options: argparse.Namespace) -> int:
    from safetensors.torch import load_file

    from sharding.corpora import open_corpora
    from trainer.encoders import load_teacher_config, load_tokenizer
    from trainer.export import export
    from trainer.models import outline

    path = options.checkpoint
    if problems := verify(path, [RUN]):
        raise CheckpointError(f"{path} is not a checkpoint, or damaged: {'; '.join(problems)}")
    run = read_run(path)
    config = from_dict(RunConfig, run["config"])
    wanted = [student for student in config.students if options.student in (None, student.name)]
    if not wanted:
        names = ", ".join(student.name for student in config.students)
        raise CheckpointError(f"--student {options.student} is not one of {path}, which are: {names}")
    if problems := verify(path, [f"{student.name}/{WEIGHTS}" for student in wanted]):
        raise CheckpointError(f"{path} is damaged: {'; '.join(problems)}")
    teacher, tokenizer = load_teacher_config(config.teacher), load_tokenizer(config.teacher)
    has_task = any(student.losses.logits or student.losses.labels for student in wanted)
    task = open_corpora(config.data).task if has_task else None
    for student in wanted:
        if reason := run["progress"]["retired"].get(student.name):
            print(f"student {student.name} is retired: {reason}")
        weights = load_file(path / student.name / WEIGHTS)
        encoder = outline(student, teacher, task).encoder
        print(export(options.output / student.name, encoder, weights, tokenizer))
    return 0


def _folder(output: Path) -> Path:
    folder = output / "checkpoints"
    if not folder.is_dir():
        raise CheckpointError(f"{output} is not the folder of a run that has been saved: {folder} is missing")
    return folder


def _keep(complete: Sequence[Path]) -> CheckpointConfig:
    """The run's newest settings, and the best to be marked in any case."""
    for path in reversed(complete):
        try:
            return replace(CheckpointConfig(**read_run(path)["config"]["checkpoint"]), keep_best=True)
        except (OSError, ValueError, KeyError):
            continue
    return CheckpointConfig(keep_best=True)


def _described(path: Path) -> tuple[str, ...]:
    run = read_run(path)
    students = [
        f"{name} (retired)" if name in run["progress"]["retired"] else name for name in run["students"]
    ]
    return (
        f"{run['progress']['rows']:,}",
        ", ".join(students),
        _megabytes(sum(size for size, _ in list_files(path).values())),
        ", ".join(f"{name} {loss:.4f}" for name, loss in run["heldout"].items()),
        str(run["world_size"]),
        run["revision"][:12],
        str(timedelta(seconds=round(time.time() - (path / RUN).stat().st_mtime))),
    )


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f}"


if __name__ == "__main__":
    sys.exit(main())
