"""A training job, from its configuration to its exit code; what ``general`` and ``task`` have in common.

Started again with the same output folder, a job resumes from the newest checkpoint there.
"""

import argparse
import json
import logging
import os
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from configs.deepspeed import derive
from configs.load import to_dict, to_yaml
from configs.public import log_publicly, public
from configs.schema import RunConfig
from launcher import provenance, report
from launcher.assembly import build
from launcher.checks import check, check_memory
from launcher.facts import facts
from launcher.reporting import Reporter
from launcher.runfolder import RunFolder
from launcher.tracked import Tracked, store_in_words
from launcher.wording import duration, ranks_in_words
from sharding.corpora import Corpora
from sharding.files import write_text
from trainer import checkpoint as checkpoints
from trainer import encoders, engine, exits, meeting, world
from trainer.checkpoint import Checkpoint
from trainer.clock import Stations
from trainer.export import export
from trainer.interruption import Interruption
from trainer.loop import NonFiniteError, Run, total_steps, train
from trainer.profile import Profile
from trainer.system_metrics import sample_into
from trainer.tracking_store import TrackingError
from trainer.watchdog import Watchdog
from trainer.world import World

log = logging.getLogger("distil")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what every training job takes."""
    parser.add_argument(
        "--profile",
        action="store_const",
        const=3,
        dest="profile_steps",
        help="profile three early steps into OUTPUT/profile, then go on",
    )
    parser.add_argument("--profile-steps", type=_steps, metavar="STEPS", help="the same with so many steps")
    parser.add_argument(
        "--dry-run", action="store_true", help="check everything, say what would be done, and do nothing"
    )
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # the deepspeed launcher appends it
    parser.add_argument("overrides", nargs="*", help="key=value, such as train.steps=100")


def _steps(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return int(text)


def guarded(work: Callable[[], int]) -> int:
    """Do ``work`` and return its exit code, or that of the error that ended it, which is told to people."""
    is_main = world.is_main(os.environ)
    log_publicly(logging.INFO if is_main else logging.ERROR, "%(asctime)s %(message)s")
    logging.getLogger("sharding").setLevel(logging.WARNING)  # what goes wrong in reading, on every rank
    for chatty in ("httpx", "mlflow", "alembic"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    try:
        return work()
    except (ValueError, OSError, RuntimeError) as error:
        if meeting.lost_peer(error):
            leave_lost(error)
        if not isinstance(error, ValueError | OSError | NonFiniteError):
            raise
        if is_main or not isinstance(error, NonFiniteError):  # which all ranks see alike
            print(public(f"\nerror: {error}"), file=sys.stderr, flush=True)
        return exits.of(error)
    except KeyboardInterrupt:
        if is_main:
            print("\ninterrupted; started again, it resumes from the newest checkpoint", file=sys.stderr)
        return exits.INTERRUPTED
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def distil(
    config: RunConfig, stations: Stations, profile_steps: int | None = None, dry_run: bool = False
) -> int:
    """Run the whole job: check, connect, resume or start, train, export; return the exit code."""
    place = world.find(os.environ)
    watchdog = Watchdog(place, config.timeouts.start_s)
    stations.listener = watchdog.beat
    interruption = Interruption(place.rank, config.train.max_hours, stations.started_s)
    world.share_cores(place, config.train.threads)
    if config.train.deterministic:
        torch.use_deterministic_algorithms(True)
    corpora, equal = meeting.or_tell(place, os.environ, config.timeouts, lambda: checked(config, place))
    stations.passed("checks")
    meeting.connect(place, os.environ, config.timeouts, equal)
    if dry_run:
        return rehearse(config, place, corpora, watchdog)
    engine.attach()
    stations.passed("meeting")
    interruption.listen()  # before, there is nothing to save: a signal ends the process

    folder = RunFolder(Path(config.output))
    world.on_main(place, folder.claim)
    newest = world.on_main(place, lambda: newest_checkpoint(config, corpora))
    # Rank 0 has just verified it; what the others read may have come another way.
    resumed = checkpoints.load(newest, verified=place.is_main) if newest is not None else None
    stations.passed("checkpoint")
    tracked = start_tracking(config, place, corpora, resumed, folder)
    stations.passed("tracking")
    status, failure, stopped = "FAILED", None, None
    try:
        world.on_main(place, lambda: write_folder(config, place))
        run = build(config, place, corpora, resumed, stations)
        run.interruption, run.beat = interruption, watchdog.beat
        del resumed  # weights and moments of every student: the engines have them now
        reporter = Reporter(run, tracked, folder, stations, watchdog)
        reporter.started(resumed=newest is not None)
        stopped = conduct(run, reporter, profile_steps)
        if stopped is None:
            finish(run, reporter, time.monotonic() - stations.started_s)
            failure, status = retired_error(run), "FINISHED"
        else:
            reporter.stopped(stopped)
            status = "SCHEDULED"
    except NonFiniteError as error:
        reporter.event("failed", reason=str(error))
        failure = error  # of all ranks alike: none leaves, and has the others ended, before MLflow knows
        if tracked is not None:
            tracked.ended = f"failed: {error}"
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        if tracked is not None:
            tracked.finish(status)
    world.disconnect()
    watchdog.close()
    if failure is not None:
        raise failure
    return exits.DONE if stopped is None else exits.STOPPED


def checked(config: RunConfig, place: World) -> tuple[Corpora, dict[str, str]]:
    """Return the corpora, after all checks that need no other rank, and what must be equal on all ranks."""
    corpora = check(config, place)
    check_memory(config, place, corpora)
    return corpora, facts(config, corpora)


def rehearse(config: RunConfig, place: World, corpora: Corpora, watchdog: Watchdog) -> int:
    """Say what the job would do (collective), after all that is checked before weights are loaded."""

    def tell() -> None:
        newest = newest_checkpoint(config, corpora)
        begins = "from the start" if newest is None else f"from {newest}"
        steps = f"{total_steps(config, corpora)} steps of {config.train.global_batch_rows} rows"
        students = ", ".join(student.name for student in config.students)
        log.info("dry run: %s on %s, %s, into %s", steps, ranks_in_words(place), begins, config.output)
        log.info("dry run: students %s from teacher %s", students, config.teacher.model)
        log.info("dry run: %s", store_in_words(config.tracking))
        log.info("nothing was written. Time and memory: launcher/preflight.py with the same arguments")

    world.on_main(place, tell)
    world.disconnect()
    watchdog.close()
    return exits.DONE


def leave_lost(error: Exception) -> NoReturn:
    """End this process after another rank, or the way to it, was lost; one rank says so for all."""
    if isinstance(error, meeting.UnreachableError):  # before training, and it knows more
        print(public(f"\nerror: {error}"), file=sys.stderr)
    elif meeting.first_to_say():
        who = f"rank {dist.get_rank()} ({socket.gethostname()})"
        print(
            f"\nerror: {who} lost contact with another rank: {meeting.first_line(error)}\n"
            "That process or its node ended, see its messages, or the link broke. Started again, the run "
            "resumes from the newest checkpoint",
            file=sys.stderr,
        )
    sys.stdout.flush()
    sys.stderr.flush()
    # Not through Python's own end: the threads of a broken group hold tensors, which ends in SIGABRT.
    os._exit(exits.LOST)


def conduct(run: Run, reporter: Reporter, profile_steps: int | None) -> str | None:
    """Train to the end or until asked to leave, saved either way; return why it was left early."""
    if profile_steps is not None:
        run.profile = Profile(reporter.folder / "profile", run.world, run.speed, profile_steps, log.info)
    try:
        with reporter.terminal:
            stopped = train(run, reporter)
    finally:
        reporter.finish_saving()
    if run.profile is not None:
        run.profile.close()
    reporter.ending()
    return stopped


def newest_checkpoint(config: RunConfig, corpora: Corpora) -> Path | None:
    """Return the newest intact checkpoint in the output folder; None for a new run.

    Raises:
        CheckpointError: all are damaged, or it belongs to another run.
    """
    newest = checkpoints.newest_intact(Path(config.output) / "checkpoints", log.warning)
    if newest is not None:
        checkpoints.check_same_run(newest, to_dict(config), corpora.fingerprint)
    return newest


def start_tracking(
    config: RunConfig, place: World, corpora: Corpora, resumed: Checkpoint | None, folder: RunFolder
) -> Tracked | None:
    """Open or continue the MLflow runs, on rank 0 (collective); None elsewhere, and without tracking.

    Every node's local rank 0 begins to sample system metrics.
    """
    settings = config.tracking
    if not settings.enabled:
        return None
    hosts = world.gather_over_ranks(socket.gethostname())
    opened: list[Tracked] = []  # kept out of what ``on_main`` hands to the other ranks

    def start() -> None:
        run_ids = (resumed.tracking_run_ids if resumed is not None else {}) or folder.tracking_run_ids()
        try:
            opened.append(Tracked.start(config, corpora, folder, run_ids, hosts))
        except TrackingError as error:
            folder.discard_if_new()
            if run_ids:  # it worked before, so it may again
                raise ConnectionError(f"the run's MLflow runs cannot be continued: {error}") from error
            raise

    world.on_main(place, start)
    if settings.system_metrics and place.local_rank == 0:
        sample_into(folder.path / "tracking" / "system" / f"{socket.gethostname()}.jsonl")
    return opened[0] if opened else None


def write_folder(config: RunConfig, place: World) -> None:
    """Make the run folder and keep in it what the run was made of."""
    folder = Path(config.output)
    folder.mkdir(parents=True, exist_ok=True)
    pinned = place.device.type == "cuda"
    engines = {student.name: derive(config, student, place.size, pinned) for student in config.students}
    origin = {
        "command": provenance.command(),
        "revision": provenance.revision(),
        "versions": provenance.versions(),
    }
    write_text(folder / "config.yaml", to_yaml(config))
    write_text(folder / "deepspeed.json", json.dumps(engines, indent=1) + "\n")
    write_text(folder / "origin.json", json.dumps(origin, indent=1) + "\n")
    write_text(folder / "changes.diff", provenance.changes())


def finish(run: Run, reporter: Reporter, wall_s: float) -> None:
    """Export every student that is not retired (collective), sum up, and say what to do next."""
    config, folder = run.config, Path(run.config.output)
    tokenizer = encoders.load_tokenizer(config.teacher)
    summary: dict[str, Any] = {"steps": run.progress.step, "rows": run.progress.rows, "students": {}}
    summary["retired"] = run.progress.retired
    for trainee in run.active:
        weights = trainee.engine.weights()
        if not run.world.is_main:
            continue
        encoder = trainee.engine.module.encoder
        path = export(folder / "export" / trainee.config.name, encoder, weights, tokenizer)
        summary["students"][trainee.config.name] = {
            "export": str(path),
            "skipped_steps": trainee.skipped_steps,
        }
        log.info("exported %s", path)
        if reporter.tracked is not None and config.tracking.log_models:
            reporter.tracked.students[trainee.config.name].log_artifacts(path, "model")
    if not run.world.is_main:
        return
    if run.speed.total_rows:
        summary |= {"wall_s": wall_s, "rows_per_s": run.speed.total_rows / run.speed.total_s}
        write_text(folder / "summary.json", json.dumps(summary, indent=1) + "\n")
    if reporter.tracked is not None:
        reporter.tracked.log_file(folder / "summary.json")
        reporter.tracked.log_file(folder / "evaluations.jsonl")
    reporter.event("finished")
    if config.log.report and report.at_end(folder) and reporter.tracked is not None:
        reporter.tracked.log_file(folder / report.REPORT)
    log.info("done in %s. Load a student with AutoModel.from_pretrained(%r)", duration(wall_s), str(path))
    for line in next_steps(config, str(path), reporter.tracked.run.url if reporter.tracked else None):
        log.info("%s", line)


def next_steps(config: RunConfig, export: str, url: str | None) -> list[str]:
    """Return what people do after a run: look at it, score or use what it left."""
    stage = config.tracking.tags.get("stage", "general")
    following = {
        "general": f"launcher/task.py with students.0.init={export}: distil a task (docs/tasks.md)",
        "teacher": "launcher/task.py with stage=intermediate: distil it",
        "intermediate": "launcher/task.py with stage=prediction: the predictions",
    }
    last = f"launcher/evaluate.py: scores and speed against the teacher; launcher/export.py --model {export}"
    return [f"next: {following.get(stage, last)}", *([f"look at it: {url}"] if url is not None else [])]


def retired_error(run: Run) -> NonFiniteError | None:
    """Return what a run with students that failed ends with, though all others are done."""
    if not run.progress.retired:
        return None
    failed = "".join(f"\n  - student {name}: {reason}" for name, reason in run.progress.retired.items())
    return NonFiniteError(
        f"{len(run.progress.retired)} of {len(run.trainees)} students failed; the others are trained and "
        f"exported:{failed}\nThis run keeps them retired. Train them in a run of their own, with another "
        "output, and with a lower optimizer.lr or max_grad_norm, or with train.non_finite=skip"
    )
