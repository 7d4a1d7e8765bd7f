"""The MLflow runs of a job: what they are called, what they say of it, what became of it."""

import os
import socket
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from configs.load import to_dict
from configs.public import public
from configs.schema import RunConfig, TrackingConfig
from launcher import provenance
from launcher.run_record import read_lines
from launcher.runfolder import RunFolder
from launcher.wording import duration, in_words
from sharding.corpora import Corpora
from sharding.manifest import open_corpus
from trainer.system_metrics import NodeSamples
from trainer.tracking import Run, credentials_apart, flatten
from trainer.tracking_store import check

SLURM = {  # tags, and where Slurm says it
    "slurm.job_id": "SLURM_JOB_ID",
    "slurm.array_job_id": "SLURM_ARRAY_JOB_ID",
    "slurm.array_task_id": "SLURM_ARRAY_TASK_ID",
    "slurm.nodes": "SLURM_JOB_NODELIST",
    "slurm.restarts": "SLURM_RESTART_COUNT",
}
VERSIONS = ("torch", "deepspeed", "transformers")  # as tags; all of them are in origin.json
MAX_OUTCOME_CHARS = 300


class Tracked:
    """The MLflow runs of one job: the run itself, and a child per student when there are several."""

    def __init__(self, folder: Path, run: Run, students: dict[str, Run]) -> None:
        self.folder = folder
        self.run = run
        self.students = students  # by name; of a job with one student the run itself
        self.failed: set[str] = set()  # students, and "" the run itself
        self.ended = ""  # how the job ended, where its status does not say enough

    @classmethod
    def start(
        cls,
        config: RunConfig,
        corpora: Corpora,
        folder: RunFolder,
        run_ids: Mapping[str, str],
        hosts: list[str],
    ) -> "Tracked":
        """Open or continue the runs, with their journal in the run folder.

        Args:
            config: the job's.
            corpora: that it reads.
            folder: of the run; learns the MLflow ids once they are known.
            run_ids: of a job before, by student, ``""`` the job itself; empty for a new one.
            hosts: on which the ranks are.

        Raises:
            TrackingError: the store refuses.
        """
        settings, journal = config.tracking, folder.path / "tracking"
        tags = {
            "mlflow.source.name": f"launcher/{Path(sys.argv[0]).name}",
            "mlflow.source.git.commit": provenance.revision(),
            "stage": "general",
            **settings.tags,
            **surroundings(hosts),
        }
        run = Run.start(
            uri=settings.uri,
            default_folder=Path(settings.folder or Path(config.output).parent / "mlflow"),
            experiment=settings.experiment,
            name=settings.run_name or config.name,
            run_id=run_ids.get(""),
            under=settings.under,
            params=flatten(to_dict(config)),
            tags=tags,
            description=description(config, corpora, tags["stage"]),
            journal=journal,
            opened=folder.keep_tracking_run_ids,
            sample=NodeSamples(journal / "system", alone=len(set(hosts)) == 1)
            if settings.system_metrics
            else list,
        )
        for part in corpora.parts:
            corpus, split = part.corpus, part.corpus.split("train")
            profile = {"documents": split.documents, "rows": split.rows, "tokens": split.tokens}
            location = corpus.store.location
            source = str(Path(location).resolve()) if corpus.store.is_local else location
            tag = "corpus.fingerprint" + (f".{part.name}" if len(corpora.parts) > 1 else "")
            run.log_dataset(part.name, corpus.fingerprint, source, profile, tag)
        if len(config.students) == 1:
            return cls(folder.path, run, {config.students[0].name: run})
        children = {
            student.name: run.child(
                student.name, run_id=run_ids.get(student.name), params=flatten(to_dict(student)), tags=tags
            )
            for student in config.students
        }
        return cls(folder.path, run, children)

    def log_file(self, path: Path) -> None:
        """Log a text file of the run folder as an artifact; one that is not there or empty is left out."""
        if path.is_file() and path.stat().st_size:
            self.run.log_text(path.read_text(encoding="utf-8"), path.name)

    def run_ids(self) -> dict[str, str]:
        """Return what a checkpoint keeps to continue these runs, as far as it is known by now."""
        runs = {"": self.run, **self.students}
        return {name: run.id for name, run in runs.items() if run.id is not None}

    def fail(self, student: str, reason: str) -> None:
        """Mark one student's run as failed, and with it the job's."""
        self.failed |= {student, ""}
        self.students[student].fail(reason)

    def finish(self, status: str) -> None:
        """Say what became of the runs and close them, children first; a student that failed stays so."""
        ended = self.ended or {"FINISHED": "finished", "KILLED": "interrupted"}.get(status, "failed")
        losses, children = heldout(self.folder / "evaluations.jsonl"), dict(self.students)
        if self.run in children.values():
            children = {}
        for name, run in [*children.items(), ("", self.run)]:
            own = {name: losses[name]} if name in losses else losses
            told = [f"{each} {loss}" if len(own) > 1 else loss for each, loss in own.items()]
            failed = name in self.failed
            how = "with failed students" if failed and status == "FINISHED" else ended
            outcome = "; ".join(part[:MAX_OUTCOME_CHARS] for part in [*told, age(self.folder), how] if part)
            run.finish("FAILED" if failed else status, outcome=public(outcome))


@contextmanager
def corpus_run(
    name: str, settings: TrackingConfig, output: Path, stage: str, params: Mapping[str, Any]
) -> Iterator[None]:
    """Track what is done within as the building of the corpus that is at ``output`` in the end.

    Raises:
        TrackingError: the store refuses.
    """
    if not settings.enabled:
        yield
        return
    tags = {
        "mlflow.source.name": f"launcher/{Path(sys.argv[0]).name}",
        "mlflow.source.git.commit": provenance.revision(),
        "stage": stage,
        **settings.tags,
        **surroundings([socket.gethostname()]),
    }
    run = Run.start(
        uri=settings.uri,
        default_folder=Path(settings.folder or output.parent / "mlflow"),
        experiment=settings.experiment,
        name=settings.run_name or name,
        under=settings.under,
        params=flatten(params),
        tags=tags,
        description=f"Stage {stage}: the corpus `{output}`",
    )
    status, outcome, started_s = "FAILED", "", time.monotonic()
    try:
        yield
        corpus = open_corpus(output)
        figures = {
            f"{name}/{key}": float(getattr(split, key))
            for name, split in corpus.manifest.splits.items()
            for key in ("documents", "rows", "tokens")
        }
        run.log_metrics({**figures, "time/build_s": time.monotonic() - started_s}, step=0)
        profile = {key: int(value) for key, value in figures.items()}
        run.log_dataset(name, corpus.fingerprint, str(output.resolve()), profile)
        rows = corpus.split("train").rows
        outcome = f"{rows:,} rows to train on; {duration(time.monotonic() - started_s)}"
        status = "FINISHED"
    finally:
        run.finish(status, outcome=outcome)


def store_in_words(settings: TrackingConfig) -> str:
    """Ask a tracking server whether it can be used, and say so; a local store is not touched.

    Raises:
        TrackingError: it refuses.
    """
    uri = settings.uri or os.environ.get("MLFLOW_TRACKING_URI")
    if not settings.enabled or uri is None or uri.startswith("sqlite:"):
        return "tracking: a local file" if settings.enabled else "tracking: off"
    silent = check(credentials_apart(uri), settings.experiment, None)
    if silent is None:
        return f"tracking: {public(uri)} answers"
    return f"tracking: {public(uri)} does not answer ({silent}); what is logged would wait on disk"


def surroundings(hosts: list[str]) -> dict[str, str]:
    """Return tags that say where a run is: hosts, Slurm's names of the job, versions."""
    versions = provenance.versions()
    return {
        "hosts": ", ".join(sorted(set(hosts))),
        **{tag: os.environ[name] for tag, name in SLURM.items() if name in os.environ},
        **{f"version.{name}": versions[name] for name in VERSIONS if name in versions},
    }


def description(config: RunConfig, corpora: Corpora, stage: str) -> str:
    """Return what a run is, in a line of Markdown."""
    students = ", ".join(f"`{each.name}` ({each.layers} x {each.hidden_size})" for each in config.students)
    places = ", ".join(f"`{corpus.store.location}`" for corpus in corpora.corpora)
    return f"Stage {stage}: {students} from `{config.teacher.model}`, on {places}"


def heldout(file: Path) -> dict[str, str]:
    """Return by student how its held-out loss went, and its last scores: ``held-out loss 2.31 to 0.84``."""
    entries: dict[str, list[dict[str, float]]] = {}
    for entry in read_lines(file):
        entries.setdefault(entry["student"], []).append(entry["losses"])
    told = {}
    for student, losses in entries.items():
        told[student] = f"held-out loss {losses[0]['total']:.4g} to {losses[-1]['total']:.4g}"
        if scores := {key.removeprefix("score/"): own for key, own in losses[-1].items() if "score/" in key}:
            told[student] += f", {in_words(scores)}"
    return told


def age(folder: Path) -> str:
    """Return the time since the run's first start, over all its parts, ``3h07m``; empty before any."""
    events = read_lines(folder / "events.jsonl")
    if not events:
        return ""
    return duration(time.time() - datetime.fromisoformat(events[0]["at"]).timestamp())
