"""What a run tells people: lines on rank 0's terminal, MLflow, and small files in the run folder."""

import json
import logging
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from configs.load import to_dict
from launcher import provenance
from launcher.run_record import keep_figures
from launcher.runfolder import RunFolder, keep_line
from launcher.terminal import Terminal, View
from launcher.tracked import Tracked
from launcher.wording import by_kind, duration, in_words, ranks_in_words
from trainer import checkpoint as checkpoints
from trainer.checkpoint import Checkpoint, Progress
from trainer.clock import Stations
from trainer.encoders import attention_dropout
from trainer.loop import Run
from trainer.rollback import roll_back
from trainer.saving import Saved, Writer
from trainer.watchdog import Watchdog
from trainer.world import on_main, set_timeouts

log = logging.getLogger("distil")

Figures = Mapping[str, dict[str, float]]
"""By student and key."""


class Reporter:
    """The loop's listener. Terminal, tracking and files happen on rank 0; saving is collective."""

    def __init__(
        self, run: Run, tracked: Tracked | None, folder: RunFolder, stations: Stations, watchdog: Watchdog
    ) -> None:
        self.run = run
        self.config = run.config
        self.world = run.world
        self.tracked = tracked
        self.run_folder = folder
        self.folder = folder.path
        self.stations = stations
        self.watchdog = watchdog
        self.revision = provenance.revision()
        self.heldout: tuple[int, dict[str, float]] = (0, {})  # last evaluation: step, total loss by student
        self.view = View(
            f"{self.config.name} on {ranks_in_words(run.world)}",
            run.total_steps,
            run.total_steps * self.config.train.global_batch_rows,
            step=run.progress.step,
            rows=run.progress.rows,
            where=tracked.run.url if tracked is not None else str(self.folder),
        )
        self.terminal = Terminal(self.view, Console(stderr=True, quiet=not run.world.is_main))
        self.writer = Writer(
            self.folder / "checkpoints",
            self.config.checkpoint,
            self.saved,
            patience_s=self.config.timeouts.step_s / 4,  # the other ranks wait in a collective meanwhile
            before=self._flush,
        )

    def started(self, resumed: bool) -> None:
        """Say what is about to run, and log the files that tell what it is made of."""
        run, train = self.run, self.config.train
        log.info("teacher %s in %s", self.config.teacher.model, self.config.teacher.precision.value)
        for trainee in run.trainees:
            student, layer_map = trainee.config, list(trainee.transfer.layer_map)
            shape = f"{student.layers} layers x {student.hidden_size}, {student.heads} heads"
            log.info("student %s: %s, learns from teacher layers %s", student.name, shape, layer_map)
            key = attention_dropout(trainee.engine.module.encoder.config)
            if key is not None and run.world.device.type == "cpu":
                log.info(
                    "student %s: on CPU attention dropout keeps torch from its fused kernel, which tells "
                    "most on long rows; overrides: {%s: 0.0} is faster",
                    student.name,
                    key,
                )
        for corpus, share in zip(run.corpora.corpora, run.corpora.shares, strict=True):
            split, seq_len = corpus.split("train"), corpus.manifest.seq_len
            counts = f"{split.rows} rows of up to {seq_len}, {split.tokens} tokens, {share:.1%} of the run"
            log.info("corpus %s: %s, fingerprint %s", corpus.store.location, counts, corpus.fingerprint[:12])
        ranks = ranks_in_words(run.world)
        deepspeed = f"ZeRO stage {self.config.deepspeed.zero_stage}, {self.config.deepspeed.precision.value}"
        steps = f"{run.total_steps} steps of {train.global_batch_rows} rows"
        log.info("%s on %s, %s", steps, ranks, deepspeed)
        if run.teacher_score:
            log.info("the teacher has %s on held-out rows", in_words(run.teacher_score))
        if resumed:
            log.info("resumed at step %d (%d rows consumed)", run.progress.step, run.progress.rows)
        self.event("started", ranks=run.world.size, host=socket.gethostname(), resumed=resumed)
        for name, reason in run.progress.retired.items():
            self._tell_retired(name, reason)
        if run.teacher_score:
            self.event("teacher", scores={f"score/{name}": own for name, own in run.teacher_score.items()})
        if self.tracked is not None:
            for name in ("config.yaml", "deepspeed.json", "origin.json", "changes.diff"):
                self.tracked.log_file(self.folder / name)
            scores = {f"teacher/{name}": value for name, value in run.teacher_score.items()}
            self.tracked.run.log_metrics(scores, run.progress.step)

    def logged(self, progress: Progress, speed: Mapping[str, float], students: Figures) -> None:
        """Print one line per student and log everything."""
        if not self.world.is_main:
            return
        self.view.report(progress.step, progress.rows, speed, students)
        for student, figures in students.items() if not self.terminal.is_live else ():
            name = f" {student}" if len(self.run.trainees) > 1 else ""
            log.info(
                "step %d/%d%s  loss %.4f (%s)  grad %.2f  lr %.2e  "
                "%.1f rows/s  %.0f tokens/s  wait %.1f%%  ETA %s (%s by rows)",
                progress.step,
                self.run.total_steps,
                name,
                figures["loss/total"],
                by_kind(figures, "loss/"),
                figures["optimizer/grad_norm"],
                figures["optimizer/lr"],
                speed["speed/rows_per_s"],
                speed["speed/tokens_per_s"],
                100 * speed["share/data"],
                duration(speed["time/eta_s"]),
                duration(speed["time/eta_by_rows_s"]),
            )
        keep_figures(self.folder, progress.step, speed, students)
        if self.tracked is not None:
            self.tracked.run.log_metrics(speed, progress.step)
            for student, figures in students.items():
                self.tracked.students[student].log_metrics(figures, progress.step)

    def evaluated(self, progress: Progress, students: Figures) -> None:
        """Print, keep in ``evaluations.jsonl`` and log the held-out losses."""
        self.heldout = progress.step, {name: losses["total"] for name, losses in students.items()}
        if not self.world.is_main:
            return
        self.view.evaluated(*self.heldout)
        for student, losses in students.items():
            figures = {f"heldout/{key}": value for key, value in losses.items()}
            log.info(
                "step %d/%d %s  held-out loss %.4f (%s)",
                progress.step,
                self.run.total_steps,
                student,
                losses["total"],
                by_kind(figures, "heldout/"),
            )
            if scores := {key.removeprefix("score/"): losses[key] for key in losses if "score/" in key}:
                log.info("step %d/%d %s  %s", progress.step, self.run.total_steps, student, in_words(scores))
        self._keep("evaluations.jsonl", "losses", "heldout", progress.step, students)

    def probed(self, progress: Progress, teacher: Mapping[str, float], students: Figures) -> None:
        """Print, keep in ``probes.jsonl`` and log the probes' scores."""
        if not self.world.is_main:
            return
        for name, scores in [*([("teacher", teacher)] if teacher else []), *students.items()]:
            told = ", ".join(f"{key} {value:.4f}" for key, value in scores.items())
            log.info("step %d/%d %s  probes %s", progress.step, self.run.total_steps, name, told)
        self._keep("probes.jsonl", "scores", "probe", progress.step, students)
        if teacher:
            self.event("teacher", scores=dict(teacher))
        if self.tracked is not None:
            of_teacher = {f"probe/teacher/{key}": value for key, value in teacher.items()}
            self.tracked.run.log_metrics(of_teacher, progress.step)

    def _keep(self, file: str, what: str, prefix: str, step: int, students: Figures) -> None:
        """Keep every student's values as a line of a file, and log them under ``prefix/``."""
        for student, values in students.items():
            line = json.dumps({"step": step, "student": student, what: values})
            keep_line(self.folder / file, line, f"the {what} of {student} at step {step}")
            if self.tracked is not None:
                figures = {f"{prefix}/{key}": value for key, value in values.items()}
                self.tracked.students[student].log_metrics(figures, step)

    def event(self, event: str, **facts: Any) -> None:
        """Keep what happened in the run's ``events.jsonl``."""
        if self.world.is_main:
            self.run_folder.event(event, self.run.progress.step, **facts)

    def training(self, progress: Progress) -> None:
        """Say how long it took from the process's start to the first step's end, by station."""
        self.stations.passed("first_step")
        set_timeouts(self.config.timeouts.step_s)
        self.watchdog.limit(self.config.timeouts.step_s)  # nothing is loaded or compiled any more
        if not self.world.is_main:
            return
        seconds = self.stations.seconds
        parts = ", ".join(f"{name} {own_s:.1f}" for name, own_s in seconds.items())
        log.info("first step done %.1f s after the start (%s)", sum(seconds.values()), parts)
        self.event("training", seconds={name: round(own_s, 3) for name, own_s in seconds.items()})
        if self.tracked is not None:
            figures = {f"start/{name}_s": own_s for name, own_s in seconds.items()}
            self.tracked.run.log_metrics(figures, progress.step)

    def ending(self) -> None:
        """Steps are over: exports follow, and uploads to a server that may be slow."""
        set_timeouts(self.config.timeouts.start_s)
        self.watchdog.limit(self.config.timeouts.start_s)
        self.watchdog.beat("the end")

    def stopped(self, reason: str) -> None:
        """Say why the run leaves early, and how it goes on."""
        if not self.world.is_main:
            return
        step = f"step {self.run.progress.step}/{self.run.total_steps}"
        log.warning("%s  STOPPED by %s. Started again, the run goes on from here", step, reason)
        self.event("stopped", reason=reason)
        if self.tracked is not None:
            self.tracked.run.set_tag("stopped", f"{step}: {reason}")
            self.tracked.ended = f"stopped at {step}: {reason}"

    def roll_back(self, name: str, reason: str) -> None:
        """Restore everything from the newest checkpoint (collective), and say so loudly."""
        step = self.run.progress.step
        newest = on_main(self.world, self.newest_checkpoint)
        roll_back(self.run, checkpoints.load(newest, verified=self.world.is_main), name)
        if self.tracked is not None:  # its steps become others; all other students repeat what they did
            self.tracked.students[name].log_again(self.run.progress.step)
        scale = self.run.progress.lr_scale[name]
        log.warning(
            "student %s has FAILED: %s. All students go back to step %d; from now on its learning "
            "rate is multiplied by %g",
            name,
            reason,
            self.run.progress.step,
            scale,
        )
        self.event("rolled_back", student=name, reason=reason, from_step=step, lr_scale=scale)

    def newest_checkpoint(self) -> Path:
        """Return the newest intact checkpoint, that which is being written included; on rank 0.

        Raises:
            CheckpointError: there is none.
        """
        self.finish_saving()
        newest = checkpoints.newest_intact(self.folder / "checkpoints", log.warning)
        if newest is None:
            raise checkpoints.CheckpointError(f"{self.folder} has no checkpoint to go back to: saving failed")
        return newest

    def retired(self, name: str, reason: str) -> None:
        """Say loudly that a student has failed, keep it, and mark its run."""
        self._tell_retired(name, reason)
        self.event("retired", student=name, reason=reason)

    def _tell_retired(self, name: str, reason: str) -> None:
        log.warning("student %s has FAILED and is retired: %s. The other students go on", name, reason)
        if self.tracked is not None:
            self.tracked.fail(name, reason)

    def save(self, progress: Progress) -> None:
        """Copy the run to host memory (collective), for the writer to save."""
        with self.run.speed.clock.part("checkpoint"):
            self._save(progress, since_s=time.perf_counter())

    def _save(self, progress: Progress, since_s: float) -> None:
        states = {trainee.config.name: trainee.engine.state() for trainee in self.run.trainees}
        if not self.world.is_main:
            return
        evaluated_step, heldout = self.heldout
        checkpoint = Checkpoint(
            progress=progress,
            students=states,
            skipped_steps={trainee.config.name: trainee.skipped_steps for trainee in self.run.trainees},
            fingerprint=self.run.corpora.fingerprint,
            config=to_dict(self.config),
            tracking_run_ids=self.tracked.run_ids() if self.tracked is not None else {},
            revision=self.revision,
            world_size=self.world.size,
            heldout=heldout if evaluated_step == progress.step else {},
        )
        self.writer.put(checkpoint, since_s)

    def _flush(self) -> None:
        """Let the journal of tracking have what was logged before a checkpoint; in vain costs a warning."""
        if self.tracked is not None and not self.tracked.run.flush():
            log.warning(
                "points of tracking are not on disk yet, and the checkpoint is saved all the same: if this "
                "job is killed before they are, they are lost"
            )

    def finish_saving(self) -> None:
        """Wait for the save that is under way, for half of ``timeouts.step_s`` at most."""
        self.writer.finish(self.config.timeouts.step_s / 2)

    def saved(self, saved: Saved) -> None:
        """Say what became of a checkpoint; called on rank 0 by the thread that wrote it."""
        if saved.error is not None:
            log.warning(
                "step %d could not be saved under %s: %s. The checkpoints before it are as they were; "
                "the run goes on. Free space there before it ends",
                saved.step,
                self.folder,
                saved.error,
            )
            self.run_folder.event("save_failed", saved.step, reason=str(saved.error))
            return
        self.view.saved = saved.step, time.monotonic()
        log.info(
            "step %d/%d  saved %s in %.1f s; training waited %.2f s",
            saved.step,
            self.run.total_steps,
            saved.path,
            saved.seconds,
            saved.stall_s,
        )
        taken = {"seconds": round(saved.seconds, 3), "stall_s": round(saved.stall_s, 3)}
        self.run_folder.event("saved", saved.step, **taken)
