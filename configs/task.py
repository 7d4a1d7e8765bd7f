"""Task distillation's stages: what is wrong with a ``TaskConfig``, and the ``RunConfig`` of each stage."""

import os.path
import re
from dataclasses import replace

from configs.schema import RunConfig, TrackingConfig, TrainConfig
from configs.student_schema import StudentConfig
from configs.task_schema import HeadStageConfig, StageConfig, Start, TaskConfig
from configs.validate import check_run

TRAINING = ("teacher", "intermediate", "prediction", "baseline")
STAGES = ("data", "augment", *TRAINING)
"""All stages."""
TASKS = ("cola", "mnli", "mrpc", "qnli", "qqp", "rte", "sst2", "stsb", "wnli", "squad")
"""Tasks that are known by name."""


def check_task(config: TaskConfig) -> list[str]:
    """Return every problem of a task's config, each with key, value, rule and way out."""
    problems = []
    if config.task not in TASKS:
        own = {"kind": config.kind, "source.columns": config.source.columns}
        if config.kind is not None and config.kind.value == "classification":
            own["labels"] = config.labels
        problems += [
            f"task={config.task} is none of {', '.join(TASKS)}, so {key} must be set"
            for key, value in own.items()
            if not value
        ]
    augmentation = config.augmentation
    for key, value, least in (
        ("per_example", augmentation.per_example, 1),
        ("candidates", augmentation.candidates, 1),
        ("batch_tokens", augmentation.batch_tokens, config.seq_len),
        ("part_examples", augmentation.part_examples, 1),
        ("seed", augmentation.seed, 0),
    ):
        if value is not None and value < least:
            problems.append(f"augmentation.{key}={value} must be at least {least}")
    if not 0 < augmentation.probability <= 1:
        problems.append(f"augmentation.probability={augmentation.probability} must be above 0, at most 1")
    if config.data.corpus is not None or config.data.mixture:
        problems.append("data.corpus and data.mixture follow from the stage; set corpus or augmented instead")
    # The teacher's own shape is not known yet: any stands for it.
    some = [StudentConfig(name="teacher", layers=1, hidden_size=1, heads=1, intermediate_size=1)]
    for stage in TRAINING:
        students = some if stage == "teacher" else config.students
        problems += [_named(stage, problem) for problem in check_run(stage_config(config, stage, students))]
    return list(dict.fromkeys(problems))


def stage_config(config: TaskConfig, stage: str, students: list[StudentConfig]) -> RunConfig:
    """Return the run of one training stage.

    Args:
        stage: one of ``TRAINING``.
        students: the config's; for the stage ``teacher`` the teacher itself as the only student.
    """
    own = _stage(config, stage)
    starts = stage == "prediction" and config.start is Start.intermediate
    finetuned = stage in ("intermediate", "prediction")
    corpus = _augmented(config) if own.augmented else corpus_of(config)
    teacher = config.teacher
    if finetuned:
        folder = config.finetuned or f"{config.output}/teacher/export/teacher"
        teacher = replace(
            teacher,
            model=folder,
            revision=None,
            sha256=None,
            logits_folder=teacher.logits_folder or f"{config.output}/teacher_logits",
        )
    return RunConfig(
        name=f"{config.task}-{stage}",
        output=f"{config.output}/{stage}",
        teacher=teacher,
        students=[
            replace(
                student,
                init=f"{config.output}/intermediate/export/{student.name}" if starts else student.init,
                losses=own.losses if isinstance(own, HeadStageConfig) else student.losses,
                optimizer=own.optimizer,
            )
            for student in students
        ],
        data=replace(config.data, corpus=corpus),
        train=TrainConfig(
            global_batch_rows=own.global_batch_rows,
            micro_batch_rows=own.micro_batch_rows,
            epochs=own.epochs,
            steps=own.steps,
            seed=config.seed,
        ),
        deepspeed=config.deepspeed,
        evaluation=config.evaluation,
        checkpoint=config.checkpoint,
        timeouts=config.timeouts,
        log=config.log,
        tracking=tracking_of(config, stage),
    )


def tracking_of(config: TaskConfig, stage: str) -> TrackingConfig:
    """Return how a stage is tracked: all stages of a task hang under one run, named by it."""
    own = config.tracking
    return replace(
        own,
        folder=own.folder or f"{os.path.dirname(config.output) or '.'}/mlflow",
        under=[*own.under, config.task],
        tags={"stage": stage, "task": config.task, **own.tags},
    )


def corpus_of(config: TaskConfig) -> str:
    """Where the task's corpus is."""
    return config.corpus or f"{config.output}/data"


def _augmented(config: TaskConfig) -> str:
    return config.augmented or f"{config.output}/augmented"


def _stage(config: TaskConfig, stage: str) -> StageConfig:
    sections = {"intermediate": config.intermediate, "prediction": config.prediction}
    return sections.get(stage, config.fine_tuning)


def _named(stage: str, problem: str) -> str:
    """Say a problem of a stage's run by the keys of the task's config."""
    section = stage if stage in ("intermediate", "prediction") else "fine_tuning"
    problem = re.sub(r"\btrain\.(?=global_|micro_|epochs|steps)", f"{section}.", problem)
    own = "optimizer" if stage == "intermediate" else "optimizer|losses"
    return re.sub(rf"^students\.\d+\.(?={own})", f"{section}.", problem)
