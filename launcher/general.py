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

from configs.deepspeed import derive
from configs.load import ConfigError, load_config, to_dict, to_yaml
from configs.schema import RunConfig
from configs.validate import check_batch
from launcher import provenance
from launcher.reporting import Reporter, Tracked, duration
from sharding.manifest import Corpus, open_corpus
from sharding.tokens import check_tokenizer
from trainer import checkpoint as checkpoints
from trainer import encoders, engine, shapes, world
from trainer.capture import Captured, capture, check_supported
from trainer.checkpoint import Checkpoint, Progress
from trainer.export import export
from trainer.flops import encoder_forward_flops, matrix_rate
from trainer.loop import NonFiniteError, Run, Trainee, total_steps, train
from trainer.losses import needed_layers
from trainer.meter import SpeedMeter
from trainer.models import Inputs, build_student
from trainer.world import World

log = logging.getLogger("distil")

COLLECTIVE_TIMEOUT = timedelta(minutes=30)


def main() -> int:
    """Run the job; return the exit code: 0 done, 1 failed, 2 the user has something to correct."""
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
    for chatty in ("httpx", "mlflow", "alembic"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    try:
        distil(load_config(RunConfig, arguments.config, arguments.overrides))
    except (ValueError, OSError, NonFiniteError) as error:
        alone = dist.is_initialized() and not isinstance(error, NonFiniteError)
        if is_main or alone:  # before the ranks meet, and for what all of them see, one message is enough
            print(f"\nerror: {error}", file=sys.stderr, flush=True)
        return 2 if isinstance(error, ValueError) else 1
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
    corpus = check(config, place)
    world.connect(place, os.environ, COLLECTIVE_TIMEOUT)
    engine.attach()

    newest = world.on_main(place, lambda: prepare_folder(config, corpus, place))
    resumed = checkpoints.load(newest) if newest is not None else None
    tracked: Tracked | None = None
    if config.tracking.enabled:
        run_ids = resumed.tracking_run_ids if resumed is not None else {}
        holder: list[Tracked] = []
        world.on_main(place, lambda: holder.append(Tracked.start(config, corpus, run_ids)))
        tracked = holder[0] if holder else None
    status = "FAILED"
    try:
        started_s = time.perf_counter()
        reporter = Reporter(config, place, corpus, tracked)
        run = build(config, place, corpus, resumed)
        reporter.run = run
        describe(run, reporter, resumed)
        train(run, reporter)
        finish(run, reporter, time.perf_counter() - started_s)
        status = "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        if tracked is not None:
            tracked.finish(status)
    dist.barrier()


def check(config: RunConfig, place: World) -> Corpus:
    """Return the corpus, after everything that can be checked without the teacher's weights.

    Raises:
        ConfigError: all problems together.
    """
    problems = check_batch(config.train.global_batch_rows, config.train.micro_batch_rows, place.size)
    corpus = teacher_config = None
    try:
        corpus = open_corpus(config.data.corpus)
        if config.evaluation.every_steps is not None:
            corpus.split("heldout")
    except ValueError as error:
        problems.append(f"data.corpus={config.data.corpus}: {error}")
    try:
        teacher_config = encoders.load_teacher_config(config.teacher)
    except ValueError as error:
        problems.append(str(error))
    if corpus is not None and teacher_config is not None:
        try:
            check_tokenizer(corpus.manifest, encoders.load_tokenizer(config.teacher))
        except ValueError as error:
            problems.append(str(error))
        problems += shapes.check_students(config.students, teacher_config, corpus.manifest.seq_len)
    if problems:
        raise ConfigError(problems)
    assert corpus is not None
    return corpus


def prepare_folder(config: RunConfig, corpus: Corpus, place: World) -> Path | None:
    """Make the run folder and return the newest checkpoint in it; None for a new run (rank 0).

    Raises:
        CheckpointError: the checkpoint is damaged or belongs to another run.
    """
    folder = Path(config.output)
    complete = checkpoints.list_complete(folder / "checkpoints")
    newest = complete[-1] if complete else None
    if newest is not None:
        checkpoints.check_same_run(newest, to_dict(config), corpus.fingerprint, checkpoints.load(newest))
    folder.mkdir(parents=True, exist_ok=True)
    pinned = place.device.type == "cuda"
    engines = {student.name: derive(config, student, place.size, pinned) for student in config.students}
    origin = {
        "command": provenance.command(),
        "revision": provenance.revision(),
        "versions": provenance.versions(),
    }
    (folder / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    (folder / "deepspeed.json").write_text(json.dumps(engines, indent=1) + "\n", encoding="utf-8")
    (folder / "origin.json").write_text(json.dumps(origin, indent=1) + "\n", encoding="utf-8")
    (folder / "changes.diff").write_text(provenance.changes(), encoding="utf-8")
    return newest


def build(config: RunConfig, place: World, corpus: Corpus, resumed: Checkpoint | None) -> Run:
    """Load the teacher, make the students and their engines, and restore what a checkpoint holds."""
    teacher_config = encoders.load_teacher_config(config.teacher)
    teacher = encoders.load_teacher(config.teacher, place.device)
    check_supported(teacher)
    trainees = []
    flops = encoder_forward_flops(teacher_config, 1, corpus.manifest.seq_len)
    floor_s = flops / matrix_rate(teacher.dtype, place.device)
    student_rate = matrix_rate(encoders.DTYPES[config.deepspeed.precision], place.device)
    for student in config.students:
        module = build_student(student, teacher, teacher_config, config.train.seed)
        state = resumed.students[student.name] if resumed is not None else None
        if state is not None:
            module.load_state_dict(state.weights)
        student_flops = 3 * encoder_forward_flops(module.encoder.config, 1, corpus.manifest.seq_len)
        flops, floor_s = flops + student_flops, floor_s + student_flops / student_rate
        settings = derive(config, student, place.size, pin_memory=place.device.type == "cuda")
        own = engine.Engine(module, student.optimizer, settings, place)
        if state is not None:
            own.load(state)
        own.train()
        trainees.append(Trainee(student, shapes.transfer(student, teacher_config), own))
        if resumed is not None:
            trainees[-1].skipped_steps = resumed.skipped_steps[student.name]

    hidden, layers = needed_layers([trainee.transfer for trainee in trainees])

    @torch.no_grad()
    def teach(inputs: Inputs) -> Captured:
        return capture(
            teacher, inputs.ids_BS, inputs.mask_BS, inputs.token_type_BS, layers=layers, hidden=hidden
        )

    return Run(
        config=config,
        world=place,
        corpus=corpus,
        teach=teach,
        teacher_hidden_size=teacher_config.hidden_size,
        trainees=trainees,
        speed=SpeedMeter(flops_per_row=flops, floor_s_per_row=floor_s),
        progress=resumed.progress if resumed is not None else Progress(),
        total_steps=total_steps(config, corpus),
    )


def describe(run: Run, reporter: Reporter, resumed: Checkpoint | None) -> None:
    """Say on rank 0 what is about to run."""
    config, split = run.config, run.corpus.split("train")
    log.info("teacher %s in %s", config.teacher.model, config.teacher.precision.value)
    for trainee in run.trainees:
        log.info(
            "student %s: %d layers x %d, %d heads, learns from teacher layers %s",
            trainee.config.name,
            trainee.config.layers,
            trainee.config.hidden_size,
            trainee.config.heads,
            list(trainee.transfer.layer_map),
        )
    log.info(
        "corpus %s: %d rows, %d tokens, fingerprint %s",
        run.corpus.root,
        split.rows,
        split.tokens,
        run.corpus.fingerprint[:12],
    )
    log.info(
        "%d steps of %d rows on %d ranks (%s), ZeRO stage %d, %s",
        run.total_steps,
        config.train.global_batch_rows,
        run.world.size,
        run.world.device.type,
        config.deepspeed.zero_stage,
        config.deepspeed.precision.value,
    )
    if resumed is not None:
        log.info("resumed at step %d (%d rows consumed)", run.progress.step, run.progress.rows)
    if reporter.tracked is not None:
        log.info("in MLflow: %s", reporter.tracked.run.url)


def finish(run: Run, reporter: Reporter, wall_s: float) -> None:
    """Export every student (collective), sum up, and say what to do next."""
    config, folder = run.config, Path(run.config.output)
    tokenizer = encoders.load_tokenizer(config.teacher)
    summary: dict[str, Any] = {"steps": run.progress.step, "rows": run.progress.rows, "students": {}}
    for number, trainee in enumerate(run.trainees):
        weights = trainee.engine.weights()
        if not run.world.is_main:
            continue
        hf_config = trainee.engine.module.encoder.config
        path = export(folder / "export" / trainee.config.name, hf_config, weights, tokenizer)
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
        (folder / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    if reporter.tracked is not None:
        reporter.tracked.log_file(folder / "summary.json")
        reporter.tracked.log_file(folder / "evaluations.jsonl")
    log.info("done in %s. Load a student with AutoModel.from_pretrained(%r)", duration(wall_s), str(path))


if __name__ == "__main__":
    sys.exit(main())
