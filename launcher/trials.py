"""A sweep's trials in Optuna's storage, shared by any number of workers: the only module that knows Optuna.

A trial is taken in one of two ways: one that was started and whose worker and run are gone goes on, else a
new one is asked for. Both happen under the sweep's lock, so that workers do not ask for more trials than
there shall be. Whoever holds a trial's log open has it: the worker and, by inheritance, its run. The lock on
it (``flock``) goes when the last of them is gone, however they end, so none is ever stale, and a trial whose
run outlives its worker is left alone.
"""

import contextlib
import fcntl
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

import numpy as np
import optuna
import yaml
from optuna.pruners import BasePruner, MedianPruner, NopPruner, SuccessiveHalvingPruner
from optuna.samplers import BaseSampler, GridSampler, RandomSampler, TPESampler
from optuna.storages import BaseStorage, JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock
from optuna.trial import FrozenTrial, TrialState

from configs.load import ConfigError, to_dict
from configs.public import public
from configs.schema import RunConfig
from configs.sweep import choices, direction, is_integer, total_trials
from configs.sweep_schema import Pruner, Sampler, SweepConfig
from configs.task_schema import TaskConfig
from sharding.files import write_text

optuna.logging.set_verbosity(optuna.logging.WARNING)

FREE = ("jobs", "trials", "output")
"""What may change when a sweep goes on: it may grow, and move."""


Open: TypeAlias = optuna.Trial
"""A trial without an outcome."""

KEPT, FOLDER = "sweep.yaml", "trials"
"""In the sweep's folder: what it is, and its runs."""


@dataclass
class Taken:
    """Trials that one run holds, and its log, which is open and locked."""

    trials: dict[int, dict[str, Any]]
    """Settings by number; of a run that was started before, all that it was started with."""
    open: dict[int, Open]
    """Those without an outcome, by number."""
    log: BinaryIO

    @property
    def number(self) -> int:
        """The first trial's, which names the run's folder."""
        return min(self.trials)


@dataclass(frozen=True)
class Result:
    """A trial as it stands."""

    number: int
    state: str
    """``running`` (or waiting to be gone on with), ``complete``, ``pruned`` or ``failed``."""
    settings: dict[str, Any]
    values: list[float]
    """By objective; of a pruned trial the last that was measured, of a failed one none."""
    run: int
    """Number of the first trial of its run."""
    seconds: float | None
    """From its first start to its end, interruptions included."""
    error: str = ""
    reported: Mapping[int, float] = field(default_factory=dict)
    """The objective during training, by optimizer step."""


class Trials:
    """All trials of a sweep."""

    def __init__(self, sweep: SweepConfig, base: RunConfig | TaskConfig) -> None:
        """Open the storage, or make it.

        Raises:
            ConfigError: it holds another sweep.
            ValueError: it cannot be used, or ``output`` has no file locks.
        """
        self.sweep, self.folder = sweep, Path(sweep.output)
        self.logs = self.folder / FOLDER
        self.total = total_trials(sweep)
        self._axes = {key: choices(axis) for key, axis in sweep.space.items()}
        self._reported: dict[int, set[int]] = {}  # steps, by trial
        self.logs.mkdir(parents=True, exist_ok=True)
        with self.alone():
            started = self._check_same(base)
            try:
                self._study = optuna.create_study(
                    study_name=sweep.name,
                    storage=self._storage(),
                    sampler=RandomSampler(),  # ``_ask`` takes the sweep's own
                    pruner=_pruner(sweep),
                    directions=[direction(objective).value for objective in sweep.objectives],
                    load_if_exists=True,
                )
            except Exception as error:  # every database fails in its own way
                where = public(sweep.storage or sweep.output)
                raise ValueError(
                    f"storage={where} cannot be used: {public(str(error))}. Start the database or correct "
                    "the URL; or leave storage unset for a file in output"
                ) from error
            if not started:
                if self._study.trials:
                    other = f"name={sweep.name}: storage holds such a sweep, of another output"
                    raise ConfigError([f"{other}; choose another name"])
                write_text(self.folder / KEPT, yaml.safe_dump(_identity(sweep, base), sort_keys=False))

    def take(self) -> Taken | None:
        """Return trials to run now; None when all are done or held by others."""
        with self.alone():
            found = self._study.get_trials()
            runs: dict[int, list[FrozenTrial]] = {}
            for trial in found:
                runs.setdefault(trial.user_attrs.get("run", -1), []).append(trial)
            halfway = [trial for trial in runs.pop(-1, []) if trial.state is TrialState.RUNNING]
            for number, members in runs.items():
                waits = any(trial.state is TrialState.RUNNING for trial in members)
                if waits and (taken := self._again([trial.number for trial in members], number)) is not None:
                    return taken
            # Of asking for these a worker was killed; for others there is room.
            asked = [self._ask(trial) for trial in halfway[: self.sweep.packed]]
            room = min(self.sweep.packed - len(asked), self.total - len(found))
            asked += [self._ask(None) for _ in range(room)]
            if not asked:
                return None
            for new in asked:
                new.set_user_attr("run", asked[0].number)
                self._reported[new.number] = set()
            log = self._held_log(asked[0].number)
            assert log is not None, "nobody else has heard of it"
            settings = {new.number: self._decoded(new.params) for new in asked}
            return Taken(settings, {new.number: new for new in asked}, log)

    def _again(self, members: list[int], run: int) -> Taken | None:
        """Take the trials of a run that was started before; None when somebody has it, or just ended it."""
        log = self._held_log(run)
        if log is None:
            return None
        trials = self._study.get_trials()  # as they are now that the log is ours
        found = [trials[number] for number in members]
        running = [trial for trial in found if trial.state is TrialState.RUNNING]
        if not running:
            log.close()
            return None
        self._reported |= {trial.number: set(trial.intermediate_values) for trial in running}
        again = {trial.number: optuna.Trial(self._study, trial._trial_id) for trial in running}
        return Taken({trial.number: self._decoded(trial.params) for trial in found}, again, log)

    def report(self, trial: Open, series: Mapping[int, float]) -> bool:
        """Tell of an objective by optimizer step, all so far; return whether the trial shall end."""
        known = self._reported[trial.number]
        for step, value in sorted(series.items()):
            if step > 0 and step not in known:  # at step 0 nothing has been learned
                known.add(step)
                trial.report(value, step)
                if trial.should_prune():
                    return True
        return False

    def complete(self, number: int, values: Sequence[float]) -> None:
        """A trial has these values, by objective."""
        self._study.tell(number, list(values))

    def prune(self, number: int) -> None:
        """A trial has ended early."""
        self._study.tell(number, state=TrialState.PRUNED)

    def fail(self, trial: Open, reason: str) -> None:
        """A trial has failed."""
        trial.set_user_attr("error", public(reason))
        self._study.tell(trial.number, state=TrialState.FAIL)

    def results(self) -> list[Result]:
        """Return all trials as they stand."""
        found = []
        for trial in self._study.get_trials():
            states = {TrialState.COMPLETE: "complete", TrialState.PRUNED: "pruned", TrialState.FAIL: "failed"}
            found.append(
                Result(
                    number=trial.number,
                    state=states.get(trial.state, "running"),
                    settings=self._decoded(trial.params),
                    values=list(trial.values or []),
                    run=trial.user_attrs.get("run", trial.number),
                    seconds=trial.duration.total_seconds() if trial.duration is not None else None,
                    error=trial.user_attrs.get("error", ""),
                    reported=dict(sorted(trial.intermediate_values.items())),
                )
            )
        return found

    def best(self) -> list[int]:
        """Return the numbers of the best complete trial, or of those on the Pareto front."""
        if not self._study.get_trials(states=(TrialState.COMPLETE,)):
            return []
        several = len(self.sweep.objectives) > 1
        return [trial.number for trial in (self._study.best_trials if several else [self._study.best_trial])]

    def _storage(self) -> BaseStorage | str:
        if self.sweep.storage is not None:
            return self.sweep.storage
        path = self.folder / "journal.jsonl"
        _mend(path)
        return JournalStorage(JournalFileBackend(str(path)))

    def _check_same(self, base: RunConfig | TaskConfig) -> bool:
        """Return whether this sweep has been started before; raise if it was another one."""
        try:
            then = yaml.safe_load((self.folder / KEPT).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return False
        now = yaml.safe_load(yaml.safe_dump(_identity(self.sweep, base)))
        changed = [key for key in now if key not in FREE and now[key] != then.get(key)]
        if changed:
            raise ConfigError(
                [
                    f"{key} is not what it was when this sweep was started ({self.folder / KEPT}); set it "
                    "back to go on, or set another output to start a new sweep"
                    for key in changed
                ]
            )
        return True

    def _ask(self, halfway: FrozenTrial | None) -> optuna.Trial:
        """Draw the settings of a new trial, or of one of which a worker was killed in doing so."""
        number = halfway.number if halfway is not None else len(self._study.trials)
        # By number, so that neither workers nor restarts draw the same twice.
        mixed = np.random.SeedSequence([self.sweep.seed, number]).generate_state(1)
        drawing, self._study.sampler = self._study.sampler, self._sampler(int(mixed[0]))
        try:
            trial = optuna.Trial(self._study, halfway._trial_id) if halfway is not None else self._study.ask()
            for key, axis in self.sweep.space.items():
                if axis.values is not None:
                    trial.suggest_categorical(key, list(self._axes[key]))
                elif is_integer(axis):
                    trial.suggest_int(key, axis.low, axis.high, step=axis.step or 1, log=axis.log)
                else:
                    trial.suggest_float(key, axis.low, axis.high, step=axis.step, log=axis.log)
        finally:
            self._study.sampler = drawing
        return trial

    def _sampler(self, seed: int) -> BaseSampler:
        if self.sweep.sampler is Sampler.grid:
            return GridSampler({key: list(labels) for key, labels in self._axes.items()}, self.sweep.seed)
        return RandomSampler(seed) if self.sweep.sampler is Sampler.random else TPESampler(seed=seed)

    def _decoded(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """Values of the config, by what stands for them in the storage."""
        return {key: self._axes[key].get(value, value) for key, value in params.items()}

    def _held_log(self, number: int) -> BinaryIO | None:
        """Return a run's log, open and locked; None when somebody else has it."""
        log = (self.logs / f"{number:04d}.log").open("ab")
        try:
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.close()
            return None
        return log

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Keep other workers from taking trials meanwhile."""
        with (self.folder / ".sweep.lock").open("ab") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX)
            except OSError as error:
                raise ValueError(
                    f"output={self.folder} cannot be locked ({error}): two workers might run the same trial. "
                    "Name a folder on a file system with file locks (Lustre: mounted with -o flock)"
                ) from error
            yield


def _mend(journal: Path) -> None:
    """Cut off a last line that a full disk or a crash of the machine left unfinished.

    Optuna would write on behind it, and could never read the file again.
    """
    lock = JournalFileSymlinkLock(str(journal))  # that of Optuna itself
    lock.acquire()
    try:
        written = journal.read_bytes() if journal.exists() else b""
        if written and not written.endswith(b"\n"):
            os.truncate(journal, written.rfind(b"\n") + 1)
    finally:
        lock.release()


def _identity(sweep: SweepConfig, base: RunConfig | TaskConfig) -> dict[str, Any]:
    """Return what a sweep is, its base included."""
    resolved = {key: value for key, value in to_dict(base).items() if key != "tracking"}
    return {**to_dict(sweep), "base": resolved}


def _pruner(sweep: SweepConfig) -> BasePruner:
    own = sweep.pruner
    if own.kind is Pruner.median:
        return MedianPruner(n_startup_trials=own.startup_trials, n_warmup_steps=own.min_steps)
    if own.kind is Pruner.asha:
        return SuccessiveHalvingPruner(min_resource=own.min_steps, reduction_factor=own.reduction_factor)
    return NopPruner()
