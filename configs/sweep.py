"""Sweeps: what is wrong with one, and the settings of its trials' runs."""

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import islice, product
from pathlib import Path
from typing import Any

from configs.load import ConfigError, load_config, to_dict, to_yaml
from configs.schema import RunConfig
from configs.sweep_schema import (
    AxisConfig,
    Direction,
    Launcher,
    ObjectiveConfig,
    Pruner,
    Sampler,
    SweepConfig,
)
from configs.task import TRAINING, corpus_of
from configs.task_schema import Start, TaskConfig

Settings = Mapping[str, Any]
"""Values by key of the run's config."""

OF_STUDENT = ("student/parameters", "student/row_flops", "student/latency_ms")
SPEED = "speed/rows_per_s"
_DURING_TRAINING = re.compile(r"(heldout|probe)/.+")
_HIGH = re.compile(rf"heldout/score/.+|probe/.+|{SPEED}")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_OWN = re.compile(r"output|name|stage|students(\.\d+(\.name)?)?|tracking(\..*)?")
"""Keys that the sweep sets itself, for every trial its own."""


def load_sweep(path: str | Path | None, overrides: list[str]) -> tuple[SweepConfig, RunConfig | TaskConfig]:
    """Return a sweep, resolved, and its base.

    Raises:
        ConfigError: everything that is wrong with the sweep, its base, and the runs of its trials.
    """
    sweep = load_config(SweepConfig, path, overrides)
    problems = _check_sweep(sweep) + _check_objectives(sweep)
    for key, axis in sweep.space.items():
        problems += _check_key(sweep, key) + _check_axis(sweep, f"space.{key}", axis)
    base = None
    try:
        base = run_of(sweep, {})
    except ConfigError as error:
        problems += [f"base={sweep.base}: {problem}" for problem in error.problems]
    if base is not None:
        problems += _check_base(sweep, base) + _check_values(sweep)
    if problems or base is None:
        raise ConfigError(list(dict.fromkeys(problems)))
    return sweep, base


def run_of(sweep: SweepConfig, settings: Settings) -> RunConfig | TaskConfig:
    """Return the config of the base with these values, in the base's own output folder.

    Raises:
        ConfigError: it cannot work.
    """
    return _load(sweep, [*sweep.overrides, *_assigned(settings)])


def arguments_of(
    sweep: SweepConfig,
    base: RunConfig | TaskConfig,
    trials: Mapping[int, Settings],
    output: Path,
    uri: str | None,
) -> list[str]:
    """Return what follows the script's name on the command line of the run of these trials.

    Args:
        trials: by number; with ``packed`` they are the students of one run, else there is one.
        output: where the run goes.
        uri: where it is tracked; None: where the base says.
    """
    first, last = min(trials), max(trials)
    if sweep.packed == 1:
        varied, named, tags = trials[first], f"trial-{first:04d}", {"trial": str(first)}
    else:
        varied = {"students": [_student(sweep, base, number, trials[number]) for number in trials]}
        named, tags = f"trials-{first:04d}-{last:04d}", {"trials": ",".join(map(str, trials))}
    own: dict[str, Any] = {"output": str(output)}
    if base.tracking.enabled:
        under = [*base.tracking.under, sweep.name]
        own |= {"tracking.run_name": named, "tracking.under": under}
        own |= {"tracking.uri": uri} if uri is not None else {}
        own |= {f"tracking.tags.{tag}": value for tag, value in {"sweep": sweep.name, **tags}.items()}
    stage = [f"stage={sweep.stage}"] if _of_task(sweep) else []
    return ["--config", sweep.base, *stage, *_settings(sweep, base, varied), *_assigned(own)]


def _student(
    sweep: SweepConfig, base: RunConfig | TaskConfig, number: int, settings: Settings
) -> dict[str, Any]:
    (student,) = _load(sweep, _settings(sweep, base, settings)).students
    return to_dict(replace(student, name=student_of(sweep, base, number)))


def student_of(sweep: SweepConfig, base: RunConfig | TaskConfig, number: int) -> str:
    """Return the name of a trial's student in its run."""
    if sweep.stage == "teacher":
        return "teacher"  # which learns itself
    return base.students[0].name if sweep.packed == 1 else f"trial-{number:04d}"


def folder_of(sweep: SweepConfig, output: Path) -> Path:
    """Return the run folder of a run with this ``output``."""
    return output / sweep.stage if sweep.stage is not None else output


def yaml_of(
    sweep: SweepConfig, base: RunConfig | TaskConfig, settings: Settings, told: str, path: Path
) -> str:
    """Return what the file ``path`` holds, to run these settings once more, apart from the sweep.

    ``told`` says in a line what they are. The run's output is the folder beside the file, of its name.
    """
    config = replace(_load(sweep, _settings(sweep, base, settings)), output=str(path.with_suffix("")))
    stage = f" stage={sweep.stage}" if _of_task(sweep) else ""
    command = f"python launcher/{sweep.launcher.value}.py --config {path}{stage}"
    return f"# {told}\n#\n#   {command}\n\n{to_yaml(config)}"


def direction(objective: ObjectiveConfig) -> Direction:
    """Return which values are good."""
    if objective.direction is not None:
        return objective.direction
    return Direction.maximize if _HIGH.fullmatch(objective.metric) else Direction.minimize


def choices(axis: AxisConfig) -> dict[Any, Any]:
    """Return the values of an axis by what stands for them in the storage: lists and mappings as JSON."""
    plain = (str, int, float, bool, type(None))
    return {value if isinstance(value, plain) else json.dumps(value): value for value in axis.values or []}


def is_integer(axis: AxisConfig) -> bool:
    """Return whether a range is one of integers."""
    numbers = (axis.low, axis.high, *([] if axis.step is None else [axis.step]))
    return all(isinstance(number, int) for number in numbers)


def total_trials(sweep: SweepConfig) -> int:
    """Return how many trials the sweep has."""
    if sweep.sampler is not Sampler.grid:
        assert sweep.trials is not None, "load_sweep comes first"
        return sweep.trials
    combinations = math.prod(len(choices(axis)) for axis in sweep.space.values())
    return min(combinations, sweep.trials or combinations)


def first_run(sweep: SweepConfig) -> dict[int, Settings]:
    """Return settings that trials of one run may have, by number: first values, ends of ranges."""
    combinations = product(*map(_ends, sweep.space.values()))
    members = islice(combinations, min(sweep.packed, total_trials(sweep)))
    return {number: dict(zip(sweep.space, values, strict=True)) for number, values in enumerate(members)}


def _of_task(sweep: SweepConfig) -> bool:
    return sweep.launcher is Launcher.task


def _load(sweep: SweepConfig, settings: list[str]) -> RunConfig | TaskConfig:
    if _of_task(sweep):
        return load_config(TaskConfig, sweep.base, settings)
    return load_config(RunConfig, sweep.base, settings)


def _settings(sweep: SweepConfig, base: RunConfig | TaskConfig, varied: Settings) -> list[str]:
    """Return as ``key=value`` how a trial differs from its YAML."""
    return [*sweep.overrides, *_assigned(_apart(sweep, base)), *_assigned(varied)]


def _apart(sweep: SweepConfig, base: RunConfig | TaskConfig) -> Settings:
    """Return what makes a task's run read what earlier stages left in the base's output, not in its own."""
    if not isinstance(base, TaskConfig):
        return {}
    output = base.output
    found = {
        "corpus": corpus_of(base),
        "augmented": base.augmented or f"{output}/augmented",
        "finetuned": base.finetuned or f"{output}/teacher/export/teacher",
    }
    if sweep.stage in ("intermediate", "prediction"):
        found["teacher.logits_folder"] = base.teacher.logits_folder or f"{output}/teacher_logits"
    if sweep.stage == "prediction" and base.start is Start.intermediate:
        student = base.students[0].name
        found |= {"start": "init", "students.0.init": f"{output}/intermediate/export/{student}"}
    return found


def _assigned(settings: Settings) -> list[str]:
    """As ``key=value``. JSON is YAML."""
    return [f"{key}={json.dumps(value)}" for key, value in settings.items()]


def _check_sweep(sweep: SweepConfig) -> list[str]:
    problems = []
    if not _NAME.fullmatch(sweep.name):
        problems.append(f"name={sweep.name!r} must be letters, digits, '-', '_' and '.'")
    for key, value, least in (
        ("trials", sweep.trials, 1),
        ("jobs", sweep.jobs, 1),
        ("packed", sweep.packed, 1),
        ("seed", sweep.seed, 0),
        ("row_tokens", sweep.row_tokens, 1),
        ("pruner.startup_trials", sweep.pruner.startup_trials, 0),
        ("pruner.min_steps", sweep.pruner.min_steps, 1),
        ("pruner.reduction_factor", sweep.pruner.reduction_factor, 2),
    ):
        if value is not None and value < least:
            problems.append(f"{key}={value} must be at least {least}")
    if _of_task(sweep) and sweep.stage not in TRAINING:
        problems.append(f"stage={sweep.stage}: with launcher=task give one of stage={'|'.join(TRAINING)}")
    if not _of_task(sweep) and sweep.stage is not None:
        problems.append(f"stage={sweep.stage} goes with launcher=task only")
    if not sweep.space:
        problems.append("space is empty: name the keys to vary, each with values or with low and high")
    if sweep.trials is None and sweep.sampler is not Sampler.grid:
        problems.append(f"trials is missing: sampler={sweep.sampler.value} has no end of its own")
    if sweep.pruner.kind is not Pruner.none:
        problems += _check_pruner(sweep)
    return problems


def _check_pruner(sweep: SweepConfig) -> list[str]:
    kind, problems = sweep.pruner.kind.value, []
    if len(sweep.objectives) > 1:
        problems.append(
            f"pruner.kind={kind} needs one objective, not {len(sweep.objectives)}: with several no trial is "
            "simply worse; set pruner.kind=none"
        )
    problems += [
        f"pruner.kind={kind} needs an objective that is measured during training (heldout/..., probe/...), "
        f"not {objective.metric}"
        for objective in sweep.objectives
        if not _DURING_TRAINING.fullmatch(objective.metric)
    ]
    if sweep.packed > 1:
        problems.append(
            f"pruner.kind={kind} and packed={sweep.packed}: a student does not leave a run before the "
            "others; set packed=1 or pruner.kind=none"
        )
    return problems


def _check_objectives(sweep: SweepConfig) -> list[str]:
    problems = []
    metrics = [objective.metric for objective in sweep.objectives]
    for number, metric in enumerate(metrics):
        name = f"objectives.{number}.metric={metric}"
        if metric in metrics[:number]:
            problems.append(f"{name} is there twice")
        if not _DURING_TRAINING.fullmatch(metric) and metric not in (*OF_STUDENT, SPEED):
            known = "heldout/<loss>, heldout/score/<metric>, probe/<task>/<metric>"
            problems.append(f"{name} is not known; known: {known}, {SPEED}, {', '.join(OF_STUDENT)}")
        if metric == SPEED and sweep.packed > 1:
            problems.append(
                f"{name} is that of the run, which packed={sweep.packed} trials share; set packed=1"
            )
        if metric in (SPEED, "student/latency_ms") and sweep.jobs > 1:
            problems.append(f"{name} is a time, which jobs={sweep.jobs} at a time would change; set jobs=1")
    return problems


def _check_key(sweep: SweepConfig, key: str) -> list[str]:
    if _OWN.fullmatch(key):
        return [f"space.{key}: every trial has its own; vary other keys"]
    problems = []
    if sweep.packed > 1 and not key.startswith("students.0."):
        problems.append(
            f"space.{key} cannot differ between the packed={sweep.packed} trials of one run; vary keys under "
            "students.0., or set packed=1"
        )
    if key in [text.partition("=")[0] for text in sweep.overrides]:
        problems.append(f"space.{key} is also in overrides; leave it in one of the two")
    return problems


def _check_axis(sweep: SweepConfig, name: str, axis: AxisConfig) -> list[str]:
    numbers = {"low": axis.low, "high": axis.high, "step": axis.step}
    given = [key for key, value in numbers.items() if value is not None] + ["log"] * axis.log
    if axis.values is not None:
        problems = [f"{name}: values and {', '.join(given)} exclude each other"] if given else []
        if not axis.values:
            problems.append(f"{name}.values=[] must hold at least one value")
        if len(choices(axis)) < len(axis.values):
            problems.append(f"{name}.values={axis.values} holds a value twice")
        return problems
    if sweep.sampler is Sampler.grid:
        return [f"{name} must list its values: sampler=grid tries all combinations"]
    if axis.low is None or axis.high is None:
        return [f"{name} needs values, or low and high"]
    wrong = [
        f"{name}.{key}={value!r} is not a number"
        for key, value in numbers.items()
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float))
    ]
    if wrong:
        return wrong
    problems = []
    if not axis.low < axis.high:
        problems.append(f"{name}: low={axis.low} must be below high={axis.high}")
    if axis.log and not axis.low > 0:
        problems.append(f"{name}: low={axis.low} must be above 0 where log=true")
    if axis.log and axis.step is not None:
        problems.append(f"{name}: step={axis.step} and log=true exclude each other")
    if axis.step is not None and not axis.step > 0:
        problems.append(f"{name}.step={axis.step} must be above 0")
    return problems


def _check_base(sweep: SweepConfig, base: RunConfig | TaskConfig) -> list[str]:
    problems = []
    if sweep.stage == "teacher" and sweep.packed > 1:
        problems.append(f"packed={sweep.packed} and stage=teacher: a run trains one teacher; set packed=1")
    if sweep.stage != "teacher" and len(base.students) != 1:
        problems.append(
            f"base={sweep.base} has {len(base.students)} students; a sweep judges one: leave one, and vary it"
        )
    metrics = [objective.metric for objective in sweep.objectives]
    if base.evaluation.every_steps is None and any(metric.startswith("heldout/") for metric in metrics):
        problems.append(
            f"base={sweep.base}: evaluation.every_steps is not set, so heldout/... is never measured"
        )
    probed = isinstance(base, RunConfig) and base.probes.every_steps is not None
    if not probed and any(metric.startswith("probe/") for metric in metrics):
        problems.append(f"base={sweep.base}: probes.every_steps is not set, so probe/... is never measured")
    return problems


def _check_values(sweep: SweepConfig) -> list[str]:
    """Try every value of every key, one at a time, and both ends of every range."""
    problems = []
    for key, axis in sweep.space.items():
        for value in _ends(axis):
            try:
                run_of(sweep, {key: value})
            except ConfigError as error:
                problems += [f"space.{key}={value!r}: {problem}" for problem in error.problems]
    return problems


def _ends(axis: AxisConfig) -> Iterator[Any]:
    yield from axis.values or [end for end in (axis.low, axis.high) if end is not None]
