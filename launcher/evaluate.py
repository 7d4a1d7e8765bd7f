"""Evaluation: ``python launcher/evaluate.py --config evaluate.yaml [key=value ...]``.

Scores task models against their teachers on dev data, measures size and speed in every form in which they can
be shipped, and writes a report that says which student to take. One process, on CPU and, where there is one,
on a CUDA device as well.
"""

import sys
from pathlib import Path

if __package__ in (None, ""):  # run as a script, which puts this folder on sys.path, not the repository
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    import configs  # noqa: F401  before transformers, which finds torchao and makes it talk

import argparse
import glob
import json
import logging
from collections import Counter
from functools import partial

from configs.evaluate_schema import EvaluateConfig, EvaluatedTaskConfig
from configs.load import ConfigError, load_config, to_dict, to_yaml
from configs.public import log_publicly, public
from launcher import provenance
from launcher.evaluation_figure import draw
from launcher.evaluation_report import markdown, to_html, verdict
from launcher.figure import drawn, render
from launcher.measuring import Task, results
from launcher.results import FORMS, TEACHER, Column, Results
from sharding.files import new_folder
from sharding.labels import read_labels, task_of
from sharding.manifest import open_corpus
from trainer import exits, metrics
from trainer.tracking import Run as TrackedRun
from trainer.tracking import flatten

log = logging.getLogger("evaluate")

RESULTS = "results.json"


def main() -> int:
    """Evaluate; return the exit code, see ``trainer.exits``."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", help="YAML file")
    parser.add_argument("--dry-run", action="store_true", help="check everything, and do nothing")
    parser.add_argument("overrides", nargs="*", help="key=value, such as latency.repeats=20")
    arguments = parser.parse_args()
    log_publicly(logging.INFO, "%(asctime)s %(message)s")
    for chatty in ("httpx", "mlflow", "alembic", "onnxscript", "onnx_ir", "torch.onnx"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    try:
        config = load_config(EvaluateConfig, arguments.config, arguments.overrides)
        tasks = opened(config)
        if arguments.dry_run:
            for task in tasks:
                arms = ", ".join(f"{name} ({len(found)})" for name, found in task.models.items())
                log.info("dry run: %s: models %s", task.columns[0].name, arms)
            return exits.DONE
        evaluate(config, tasks)
    except (ValueError, OSError) as error:
        print(public(f"\nerror: {error}"), file=sys.stderr, flush=True)
        return exits.of(error)
    return exits.DONE


def opened(config: EvaluateConfig) -> list[Task]:
    """Return the tasks, after everything that can be checked before models are loaded.

    Raises:
        ConfigError: all problems together.
    """
    problems, tasks = [], []
    output = Path(config.output)
    if output.exists() and not (output / RESULTS).is_file():
        problems.append(f"output={config.output} exists and is no report; name another folder, or remove it")
    for number, task in enumerate(config.tasks):
        try:
            tasks.append(_opened(task))
        except ValueError as error:
            problems.append(f"tasks.{number}: {error}")
    for name, count in Counter(task.columns[0].task for task in tasks).items():
        if count > 1:
            problems.append(f"tasks: {name} is there {count} times; give all its arms to one entry")
    if problems:
        raise ConfigError(problems)
    return tasks


def _opened(config: EvaluatedTaskConfig) -> Task:
    corpus, models = open_corpus(config.corpus), {TEACHER: [config.teacher]}
    task = task_of(corpus)
    for arm, patterns in config.arms.items():
        models[arm] = [folder for pattern in patterns for folder in sorted(glob.glob(pattern))]
        for pattern in patterns:
            if not glob.glob(pattern):
                raise ValueError(f"arms.{arm}: {pattern} does not exist; name folders of exported models")
    columns = []
    for split in corpus.manifest.splits:
        if split != "train":
            labels = read_labels(corpus, split)
            # Answers of a task of spans are judged as text, of which no constant is right.
            chance = 0.0 if task.kind == "spans" else metrics.chance(task, labels)
            columns.append(Column(task.name, split, task.metrics[0], len(labels), chance))
    if not columns:
        raise ValueError(f"corpus {config.corpus} has no split to score but train; build it with dev data")
    return Task(corpus, models, columns)


def evaluate(config: EvaluateConfig, tasks: list[Task]) -> Results:
    """Measure, write the report, and track it."""
    tracked = _start_tracking(config, tasks) if config.tracking.enabled else None
    status, outcome = "FAILED", ""
    try:
        found = results(config, tasks)
        folder = write_report(config, found)
        outcome = verdict(found).replace("**", "")
        log.info("%s", outcome)
        log.info("report: %s", (folder / "report.html").resolve())
        if tracked is not None:
            tracked.log_metrics(figures(found), step=0)
            tracked.log_artifacts(folder, "report")
        status = "FINISHED"
        return found
    finally:
        if tracked is not None:
            tracked.finish(status, outcome=outcome)


def write_report(config: EvaluateConfig, found: Results) -> Path:
    """Write report (HTML, Markdown), figure, numbers and settings as a new folder, and return it."""
    with new_folder(Path(config.output)) as folder:
        for name, text in {
            "report.html": to_html(found),
            "report.md": markdown(found),
            RESULTS: json.dumps(found.to_dict(), indent=1) + "\n",
            "config.yaml": to_yaml(config),
        }.items():
            (folder / name).write_text(public(text), encoding="utf-8")
        (folder / "figure.png").write_bytes(render(drawn(partial(draw, found), wide=True), "png"))
    return Path(config.output)


def figures(found: Results) -> dict[str, float]:
    """Return what MLflow compares evaluations by: shares kept, mean scores, latencies."""
    figures = {}
    for arm in found.everyone():
        for form in FORMS:
            if (kept := found.kept(arm, form)) is None:
                continue
            figures[f"kept/{arm.name}/{form}"] = kept.mean
            for column in found.columns:
                if values := arm.values(form, column):
                    figures[f"score/{column.name}/{arm.name}/{form}"] = sum(values) / len(values)
            if timing := found.latency(arm, form):
                figures[f"latency_ms/{arm.name}/{form}"] = timing.p50_ms
    return figures


def _start_tracking(config: EvaluateConfig, tasks: list[Task]) -> TrackedRun:
    settings = config.tracking
    tracked = TrackedRun.start(
        uri=settings.uri,
        default_folder=Path(settings.folder or Path(config.output).parent / "mlflow"),
        experiment=settings.experiment,
        under=settings.under,
        name=settings.run_name or config.name,
        params=flatten(to_dict(config)),
        tags={
            "mlflow.source.name": "launcher/evaluate.py",
            "mlflow.source.git.commit": provenance.revision(),
            "stage": "evaluation",
            **settings.tags,
        },
        description="Evaluation of " + ", ".join(task.columns[0].task for task in tasks),
    )
    for task in tasks:
        name, location = task.columns[0].task, task.corpus.store.location
        profile = {column.split: column.rows for column in task.columns}
        tracked.log_dataset(name, task.corpus.fingerprint, location, profile, f"corpus.fingerprint.{name}")
    return tracked


if __name__ == "__main__":
    exits.leave(main())
