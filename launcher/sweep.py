"""Sweeps: ``python launcher/sweep.py --config sweep.yaml [key=value ...]``.

Tries settings of a run (``configs/sweep_schema.py``): every trial is a run of ``launcher/general.py`` or
``launcher/task.py`` in a folder of its own. Started again, the sweep goes on: finished trials stay, the
others resume from their checkpoints. Started on several nodes, all share the trials; with ``--worker`` they
leave when there is nothing left to start. docs/sweeps.md says more.
"""

import sys
from pathlib import Path

if __package__ in (None, ""):  # run as a script, which puts this folder on sys.path, not the repository
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import logging
import os
import signal
import subprocess
import time
from types import FrameType
from typing import TYPE_CHECKING

from rich.console import Console

from configs.load import ConfigError, to_dict
from configs.public import log_publicly, public
from configs.schema import RunConfig
from configs.sweep import (
    arguments_of,
    direction,
    first_run,
    folder_of,
    load_sweep,
    run_of,
    student_of,
    total_trials,
)
from configs.sweep_schema import SweepConfig
from configs.task_schema import TaskConfig
from launcher import provenance, slurm_job
from launcher.report import REPORT, at_end
from launcher.runfolder import RunFolder
from launcher.sweep_results import ENDED, TRIALS, counts, judged, table, write_results
from launcher.trial_run import TrialRun, slots
from launcher.trials import FOLDER, KEPT, Open, Taken, Trials
from trainer import exits

if TYPE_CHECKING:
    from trainer.tracking import Run as TrackedRun

log = logging.getLogger("sweep")

POLL_S = 1.0
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
MAX_TOLD = 5  # trials of a Pareto front in the outcome


def main() -> int:
    """Work on a sweep, or show it; return the exit code, see ``trainer.exits``."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", help="YAML file")
    parser.add_argument("--status", action="store_true", help="show the trials, start nothing")
    parser.add_argument("--dry-run", action="store_true", help="check everything, and do nothing")
    parser.add_argument("--worker", action="store_true", help="leave when nothing is left to start")
    parser.add_argument("overrides", nargs="*", help="key=value, such as jobs=2")
    arguments = parser.parse_args()
    log_publicly(logging.INFO, "%(asctime)s %(message)s")
    for chatty in ("httpx", "mlflow", "alembic"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    try:
        sweep, base = load_sweep(arguments.config, arguments.overrides)
        if arguments.status and not Path(sweep.output, KEPT).is_file():
            raise ValueError(f"output={sweep.output} holds no sweep; start it without --status")
        if arguments.dry_run:
            return rehearse(sweep, base)
        trials = Trials(sweep, base)
        if arguments.status:
            show(trials)
            return exits.DONE
        return Worker(sweep, base, trials).work(leave_early=arguments.worker)
    except (ValueError, OSError) as error:
        print(public(f"\nerror: {error}"), file=sys.stderr, flush=True)
        return exits.of(error)


def rehearse(sweep: SweepConfig, base: RunConfig | TaskConfig) -> int:
    """Say what the sweep would do, and let a run of it check all that it needs; return its exit code."""
    log.info(
        "dry run: %d trials over %s, packed=%d, jobs=%d, into %s; one run of them:",
        total_trials(sweep),
        ", ".join(sweep.space),
        sweep.packed,
        sweep.jobs,
        sweep.output,
    )
    output = Path(sweep.output, FOLDER, "0000")
    script = Path(__file__).resolve().parent / f"{sweep.launcher.value}.py"
    arguments = arguments_of(sweep, base, first_run(sweep), output, None)
    return subprocess.run([sys.executable, str(script), "--dry-run", *arguments], check=False).returncode


def show(trials: Trials) -> None:
    """Print all trials, and why some failed."""
    results, console = trials.results(), Console(width=None if sys.stdout.isatty() else 160)
    console.print(table(trials.sweep, results, trials.best()))
    lines = [
        f"trial {result.number} failed: {result.error}" for result in results if result.state == "failed"
    ]
    for line in [*lines, f"{trials.sweep.name}: {counts(results, trials.total)}"]:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


class Worker:
    """One process that runs trials, ``jobs`` at a time."""

    def __init__(self, sweep: SweepConfig, base: RunConfig | TaskConfig, trials: Trials) -> None:
        self.sweep, self.base, self.trials = sweep, base, trials
        self.free = slots(sweep.jobs, sorted(os.sched_getaffinity(0)), devices())
        self.running: dict[TrialRun, Taken] = {}
        self.asked: list[int] = []  # signals, in order
        self.uri: str | None = None  # where trials track; None: they find it themselves
        self.tracked: TrackedRun | None = None
        if base.tracking.enabled:
            self.uri, self.tracked = start_tracking(sweep, base, trials)

    def work(self, leave_early: bool) -> int:
        """Run trials until all are done, or until asked to leave; return the exit code."""
        for number in SIGNALS:
            signal.signal(number, self._note)
        waits = False
        while True:
            for run in list(self.running):
                self._look(run)
                if self.asked:
                    run.ask(signal.SIGTERM)
            while not self.asked and self.free and (taken := self.trials.take()) is not None:
                self._start(taken)
            if not self.running:
                if self.asked or self._left() == 0 or leave_early:
                    break
                if not waits:
                    log.info("waiting for the trials of other workers")
                waits = True
            time.sleep(POLL_S)
        return self._finish()

    def _start(self, taken: Taken) -> None:
        output = self.trials.logs / f"{taken.number:04d}"
        folder = folder_of(self.sweep, output)
        for number, settings in list(taken.trials.items()):
            own = ", ".join(f"{key}={value}" for key, value in settings.items())
            log.info("trial %d of %d in %s: %s", number, self.trials.total, folder, own)
            try:
                run_of(self.sweep, settings)
            except ConfigError as error:  # values that fit the base, but not each other
                del taken.trials[number]
                if (trial := taken.open.pop(number, None)) is not None:
                    self._failed(trial, str(error))
        if not taken.open:
            taken.log.close()
            self._told()
            return
        arguments = arguments_of(self.sweep, self.base, taken.trials, output, self.uri)
        script = f"launcher/{self.sweep.launcher.value}.py"
        self.running[TrialRun(folder, script, arguments, self.free.pop(0), taken.log)] = taken

    def _look(self, run: TrialRun) -> None:
        """Tell what a run has measured, end it where that is not good enough, and note its end."""
        taken, code = self.running[run], run.ended()
        metric = self.sweep.objectives[0].metric
        if len(self.sweep.objectives) == 1 and metric.startswith(("heldout/", "probe/")):
            for number, trial in list(taken.open.items()):
                series = run.series(metric, student_of(self.sweep, self.base, number))
                if self.trials.report(trial, series) and code is None:
                    del taken.open[number]
                    self.trials.prune(number)
                    log.info(
                        "trial %d is pruned: %s %s after step %d", number, metric, *list(series.items())[-1]
                    )
                    run.ask(signal.SIGINT)
        if code is not None:
            self._ended(run, taken, code)
            del self.running[run]
            self.free.append(run.slot)
            taken.log.close()
            self._told()

    def _ended(self, run: TrialRun, taken: Taken, code: int) -> None:
        finished = run.finished()
        waiting = code in (exits.STOPPED, 128 + signal.SIGTERM) or (self.asked and code == exits.LOST)
        for number, trial in taken.open.items():
            student = student_of(self.sweep, self.base, number)
            try:
                if not finished:
                    raise ValueError(f"exit code {code}\n{run.tail()}")
                if (reason := run.retired(student)) is not None:
                    raise ValueError(reason)
                metrics = [objective.metric for objective in self.sweep.objectives]
                values = [run.value(metric, student, self.sweep.row_tokens) for metric in metrics]
            except Exception as error:  # judging runs the student, and models raise anything
                if waiting and not finished:
                    log.info("trial %d has stopped, and goes on when it is its turn", number)
                else:
                    self._failed(trial, str(error))
                continue
            self.trials.complete(number, values)
            log.info("trial %d is done: %s", number, judged(self.sweep, self.trials.results()[number]))

    def _failed(self, trial: Open, reason: str) -> None:
        log.warning("trial %d has FAILED: %s", trial.number, reason)
        self.trials.fail(trial, reason)

    def _told(self) -> None:
        """Keep and log how the sweep stands."""
        write_results(self.sweep, self.base, self.trials)
        if self.tracked is None:
            return
        results = self.trials.results()
        ended = [result for result in results if result.state != "running"]
        figures = {
            f"trials/{state}": float(sum(result.state == state for result in results)) for state in ENDED
        }
        best = self.trials.best()
        if len(self.sweep.objectives) == 1 and best:
            figures[f"best/{self.sweep.objectives[0].metric}"] = results[best[0]].values[0]
        self.tracked.log_metrics(figures, step=len(ended))

    def _left(self) -> int:
        """Return how many trials have not ended, those that have not begun included."""
        results = self.trials.results()
        return max(0, self.trials.total - len(results)) + sum(own.state == "running" for own in results)

    def _finish(self) -> int:
        """Show and log the outcome; return the exit code."""
        best, results = write_results(self.sweep, self.base, self.trials), self.trials.results()
        left, failed = self._left(), sum(result.state == "failed" for result in results)
        show(self.trials)
        for path in best:
            log.info("to run it once more: %s", path)
        reports = [self.trials.folder / REPORT] if at_end(self.trials.folder) else []
        for path in reports:
            log.info("report: %s", path.resolve())
        if self.tracked is not None:
            for path in [self.trials.folder / TRIALS, *best, *reports]:
                name = str(path.relative_to(self.trials.folder))
                self.tracked.log_text(path.read_text(encoding="utf-8"), name)
            told = [f"trial {number}: {judged(self.sweep, results[number])}" for number in self.trials.best()]
            outcome = "; ".join([*told[:MAX_TOLD], counts(results, self.trials.total)])
            self.tracked.finish("FINISHED" if left == 0 else "SCHEDULED", outcome=outcome)
        if self.asked:
            log.info("stopped; started again, the sweep goes on with %d trials", left)
            job = slurm_job.of_this_process()
            if job is not None and self.asked[0] == signal.SIGUSR1:  # the end of its time
                job.requeue(without=[])
            return exits.STOPPED
        if failed:
            log.warning("%d of %d trials failed", failed, self.trials.total)
        return exits.FAILED if failed else exits.DONE

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.asked.append(number)


def devices() -> list[str]:
    """Return this process's GPUs, as ``CUDA_VISIBLE_DEVICES`` names them."""
    if os.environ.get("DS_ACCELERATOR") == "cpu":
        return []
    import torch  # takes seconds

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",") if visible else [str(number) for number in range(torch.cuda.device_count())]


def start_tracking(
    sweep: SweepConfig, base: RunConfig | TaskConfig, trials: Trials
) -> tuple[str | None, "TrackedRun"]:
    """Open or continue the sweep's run, under which its trials hang; return it behind where trials track.

    That is None where they find it themselves.
    """
    from trainer.tracking import Run as TrackedRun  # takes seconds
    from trainer.tracking import flatten, resolve_uri

    settings, kept = base.tracking, RunFolder(trials.folder)
    beside = Path(settings.folder or Path(sweep.output).parent / "mlflow")
    found = settings.uri or os.environ.get("MLFLOW_TRACKING_URI")
    goals = ", ".join(f"{own.metric} ({direction(own).value})" for own in sweep.objectives)
    with trials.alone():  # the first worker makes it
        tracked = TrackedRun.start(
            uri=settings.uri,
            default_folder=beside,
            experiment=settings.experiment,
            name=sweep.name,
            run_id=kept.tracking_run_ids().get(""),
            params=flatten(to_dict(sweep)),
            tags={
                "mlflow.source.name": "launcher/sweep.py",
                "mlflow.source.git.commit": provenance.revision(),
                "stage": "sweep",
                "distil.path": " / ".join([*settings.under, sweep.name]),  # where its trials look for it
                **settings.tags,
            },
            under=settings.under,
            description=f"Sweep of {trials.total} trials over {', '.join(sweep.space)}: {goals}",
        )
        try:
            kept.keep_tracking_run_ids({"": tracked.opened()})
        except ValueError as error:  # trials run, and their runs find the sweep's by its path
            log.warning("%s", error)
    log.info("in MLflow: %s", tracked.url)
    return None if found else resolve_uri(None, beside), tracked


if __name__ == "__main__":
    exits.leave(main())
