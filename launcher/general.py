"""General distillation: ``deepspeed launcher/general.py --config configs/demo.yaml [key=value ...]``.

Runs alike under ``deepspeed``, ``torchrun``, ``srun`` and plain ``python``. Started again with the same
output folder, it resumes from the newest checkpoint there.
"""

import sys
from pathlib import Path

if __package__ in (None, ""):  # run as a script: launchers put this folder on sys.path, not the repository
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import json
import logging
import os
import time
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from transformers import PreTrainedConfig, PreTrainedModel

from configs.deepspeed import derive
from configs.load import ConfigError, load_config, to_dict, to_yaml
from configs.schema import RunConfig, StudentConfig
from configs.validate import check_batch
from launcher import provenance
from launcher.reporting import Reporter, Tracked, duration
from sharding.corpora import Corpora, open_corpora
from sharding.files import write_text
from sharding.tokens import check_tokenizer
from trainer import checkpoint as checkpoints
from trainer import encoders, engine, shapes, world
from trainer.capture import Captured, capture, check_supported
from trainer.checkpoint import Checkpoint, Progress
from trainer.export import export
from trainer.flops import encoder_forward_flops, matrix_rate
from trainer.loop import NonFiniteError, Run, Trainee, total_steps, train
from trainer.meter import CorpusMeter, SpeedMeter
from trainer.models import Inputs, build_student
from trainer.transfer import teacher_need
from trainer.world import World

log = logging.getLogger("distil")

COLLECTIVE_TIMEOUT = timedelta(minutes=30)


def main() -> int:
    """Run the job; return the exit code: 0 done, 1 failed, 2 for the user to correct, 130 interrupted."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", help="YAML file, see configs/")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # the deepspeed launcher appends it
    parser.add_argument("overrides", nargs="*", help="key=value, such as train.steps=100")
    arguments = parser.parse_args()
    is_main = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0"
    logging.basicConfig(
        level=logging.INFO if is_main else logging.ERROR, format="%(asctime)s %(message)s", datefmt="%H:%M:%S"
    )
    logging.getLogger("sharding").setLevel(logging.WARNING)  # what goes wrong in reading, on every rank
    for chatty in ("httpx", "mlflow", "alembic"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    try:
        distil(load_config(RunConfig, arguments.config, arguments.overrides))
    except (ValueError, OSError, NonFiniteError) as error:
        alone = dist.is_initialized() and not isinstance(error, NonFiniteError)
        if is_main or alone:  # before the ranks meet, and for what all of them see, one message is enough
            print(f"\nerror: {error}", file=sys.stderr, flush=True)
        return 2 if isinstance(error, ValueError) else 1
    except KeyboardInterrupt:
        if is_main:
            print("\ninterrupted; started again, it resumes from the newest checkpoint", file=sys.stderr)
        return 130
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return 0


def distil(config: RunConfig) -> None:
    """Run the whole job: check, connect, resume or start, train, export."""
    place = world.find(os.environ)
    world.share_cores(place, config.train.threads)
    if config.train.deterministic:
        torch.use_deterministic_algorithms(True)
    corpora = check(config, place)
    world.connect(place, os.environ, COLLECTIVE_TIMEOUT)
    engine.attach()

    newest = world.on_main(place, lambda: newest_checkpoint(config, corpora))
    resumed = checkpoints.load(newest) if newest is not None else None
    tracked = start_tracking(config, place, corpora, resumed)
    status = "FAILED"
    try:
        world.on_main(place, lambda: write_folder(config, place))
        started_s = time.perf_counter()
        run = build(config, place, corpora, resumed)
        del resumed  # weights and moments of every student: the engines have them now
        reporter = Reporter(run, tracked)
        reporter.started(resumed=newest is not None)
        train(run, reporter)
        finish(run, reporter, time.perf_counter() - started_s)
        status = "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        if tracked is not None:
            tracked.finish(status)
    world.disconnect()


def check(config: RunConfig, place: World) -> Corpora:
    """Return the corpora, after everything that can be checked before weights are loaded and ranks meet.

    Raises:
        ConfigError: all problems together.
    """
    problems = check_batch(config.train.global_batch_rows, config.train.micro_batch_rows, place.size)
    corpora = teacher_config = None
    try:
        corpora = open_corpora(config.data)
        corpora.mixture(config.train.global_batch_rows)
    except ValueError as error:
        problems.append(f"data: {error}")
    try:
        teacher_config = encoders.load_teacher_config(config.teacher)
        encoders.check_sha256(config.teacher)
    except ValueError as error:
        problems.append(str(error))
    for corpus in corpora.corpora if corpora is not None else ():
        if config.evaluation.every_steps and "heldout" not in corpus.manifest.splits:
            problems.append(
                f"evaluation.every_steps={config.evaluation.every_steps}, but {corpus.store.location} has no "
                "held-out split; build it with heldout_share above 0, or set evaluation.every_steps=null"
            )
    if corpora is not None and teacher_config is not None:
        try:
            check_tokenizer(corpora.corpora[0].manifest, encoders.load_tokenizer(config.teacher))
        except ValueError as error:
            problems.append(str(error))
        seq_len = max(corpus.manifest.seq_len for corpus in corpora.corpora)
        problems += shapes.check_students(config.students, teacher_config, seq_len)
    if problems:
        raise ConfigError(problems)
    assert corpora is not None
    return corpora


def newest_checkpoint(config: RunConfig, corpora: Corpora) -> Path | None:
    """Return the newest checkpoint in the output folder; None for a new run.

    Raises:
        CheckpointError: the checkpoint is damaged or belongs to another run.
    """
    complete = checkpoints.list_complete(Path(config.output) / "checkpoints")
    if not complete:
        return None
    checkpoints.check_same_run(
        complete[-1], to_dict(config), corpora.fingerprint, checkpoints.load(complete[-1])
    )
    return complete[-1]


def start_tracking(
    config: RunConfig, place: World, corpora: Corpora, resumed: Checkpoint | None
) -> Tracked | None:
    """Open or continue the MLflow runs, on rank 0 (collective); None elsewhere, and without tracking."""
    if not config.tracking.enabled:
        return None
    opened: list[Tracked] = []  # kept out of what ``on_main`` hands to the other ranks
    run_ids = resumed.tracking_run_ids if resumed is not None else {}
    world.on_main(place, lambda: opened.append(Tracked.start(config, corpora, run_ids)))
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


def build(config: RunConfig, place: World, corpora: Corpora, resumed: Checkpoint | None) -> Run:
    """Load the teacher, make the students and their engines, and restore what a checkpoint holds."""
    teacher = encoders.load_teacher(config.teacher, place.device)
    check_supported(teacher)
    trainees = [make_trainee(config, student, teacher, place, resumed) for student in config.students]
    need = teacher_need([trainee.transfer for trainee in trainees])
    if len(corpora.parts) > 1:
        names = [part.name for part in corpora.parts]
        for trainee in trainees:
            trainee.by_corpus = CorpusMeter(names, trainee.transfer, teacher.config.hidden_size)

    @torch.no_grad()
    def teach(inputs: Inputs) -> Captured:
        return capture(
            teacher,
            inputs.ids_BS,
            inputs.attention_mask,
            inputs.token_type_BS,
            need=need,
        )

    return Run(
        config=config,
        world=place,
        corpora=corpora,
        teach=teach,
        teacher_hidden_size=teacher.config.hidden_size,
        trainees=trainees,
        speed=make_speed_meter(config, place, teacher.config, trainees, corpora),
        progress=resumed.progress if resumed is not None else Progress(),
        total_steps=total_steps(config, corpora),
        separator=corpora.separator if config.data.separate_documents else None,
    )


def make_trainee(
    config: RunConfig,
    student: StudentConfig,
    teacher: PreTrainedModel,
    place: World,
    resumed: Checkpoint | None,
) -> Trainee:
    """Make one student and its engine (collective), new or as a checkpoint has it."""
    module = build_student(student, lambda head: teacher, teacher.config, config.train.seed)
    settings = derive(config, student, place.size, pin_memory=place.device.type == "cuda")
    state = resumed.students[student.name] if resumed is not None else None
    if state is not None:
        module.load(state.weights)
    own = engine.Engine(module, student.optimizer, settings, place)
    if state is not None:
        own.load(state)
    own.train()
    skipped_steps = resumed.skipped_steps[student.name] if resumed is not None else 0
    return Trainee(student, shapes.transfer(student, teacher.config), own, skipped_steps=skipped_steps)


def make_speed_meter(
    config: RunConfig, place: World, teacher: PreTrainedConfig, trainees: list[Trainee], corpora: Corpora
) -> SpeedMeter:
    """Count a row's operations and measure how fast this device could do them at best."""
    shapes_of_students = [trainee.engine.module.encoder.config for trainee in trainees]
    lengths = [corpus.manifest.seq_len for corpus in corpora.corpora]

    def flops(shape: PreTrainedConfig) -> float:
        found = (encoder_forward_flops(shape, 1, seq_len) for seq_len in lengths)
        return sum(share * of_row for share, of_row in zip(corpora.shares, found, strict=True))

    try:
        teacher_flops, student_flops = flops(teacher), 3 * sum(map(flops, shapes_of_students))
    except ValueError as error:
        log.warning("no MFU: %s", error)
        return SpeedMeter(flops_per_row=None, floor_s_per_row=0.0)
    teacher_s = teacher_flops / matrix_rate(encoders.DTYPES[config.teacher.precision], place.device)
    student_s = student_flops / matrix_rate(encoders.DTYPES[config.deepspeed.precision], place.device)
    return SpeedMeter(flops_per_row=teacher_flops + student_flops, floor_s_per_row=teacher_s + student_s)


def finish(run: Run, reporter: Reporter, wall_s: float) -> None:
    """Export every student (collective), sum up, and say what to do next."""
    config, folder = run.config, Path(run.config.output)
    tokenizer = encoders.load_tokenizer(config.teacher)
    summary: dict[str, Any] = {"steps": run.progress.step, "rows": run.progress.rows, "students": {}}
    for number, trainee in enumerate(run.trainees):
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
            reporter.tracked.students[number].log_artifacts(path, "model")
    if not run.world.is_main:
        return
    if run.speed.total_rows:
        summary |= {"wall_s": wall_s, "rows_per_s": run.speed.total_rows / run.speed.total_s}
        write_text(folder / "summary.json", json.dumps(summary, indent=1) + "\n")
    if reporter.tracked is not None:
        reporter.tracked.log_file(folder / "summary.json")
        reporter.tracked.log_file(folder / "evaluations.jsonl")
    log.info("done in %s. Load a student with AutoModel.from_pretrained(%r)", duration(wall_s), str(path))


if __name__ == "__main__":
    sys.exit(main())
