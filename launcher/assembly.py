"""A run put together: teacher, students in their engines, meters; new or as a checkpoint has it."""

import functools
import logging
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace

from transformers import PreTrainedConfig, PreTrainedModel

from configs.deepspeed import derive
from configs.schema import RunConfig
from configs.student_schema import StudentConfig
from sharding.corpora import Corpora
from sharding.manifest import TaskInfo
from trainer import encoders, engine, shapes
from trainer.capture import Head, Need
from trainer.checkpoint import Checkpoint, Progress
from trainer.clock import Clock, Stations
from trainer.columns import Columns
from trainer.evaluation import Encode
from trainer.flops import matrix_rate, student_row_flops, teacher_row_flops
from trainer.loop import Run, Trainee, total_steps
from trainer.meter import CorpusMeter, SpeedMeter
from trainer.models import build_student
from trainer.probes import open_probes
from trainer.rollback import restore
from trainer.task_loss import SPANS
from trainer.teacher import load_teacher
from trainer.teacher_logits import TeacherLogits, check_score, kept, no_teacher
from trainer.transfer import student_need, teacher_need
from trainer.world import World

log = logging.getLogger("distil")


def build(
    config: RunConfig, place: World, corpora: Corpora, resumed: Checkpoint | None, stations: Stations
) -> Run:
    """Load the teacher, make the students and their engines, and restore what a checkpoint holds."""
    teacher_config = encoders.load_teacher_config(config.teacher)
    need = teacher_need(
        [shapes.transfer(student, teacher_config, corpora.task) for student in config.students]
    )
    teach, columns, teacher_score = prepare_teacher(config, place, corpora, need)
    stations.passed("teacher")
    whole = functools.cache(functools.partial(encoders.load_whole_teacher, config.teacher))
    trainees = [
        make_trainee(config, student, teacher_config, whole, place, resumed, corpora.task)
        for student in config.students
    ]
    whole.cache_clear()  # it was for students that start from it
    stations.passed("students")
    if len(corpora.parts) > 1:
        names = [part.name for part in corpora.parts]
        for trainee in trainees:
            trainee.by_corpus = CorpusMeter(names, trainee.transfer, teacher_config.hidden_size)

    speed = make_speed_meter(config, place, teacher_config, trainees, corpora)
    stations.passed("meters")
    return Run(
        config=config,
        world=place,
        corpora=corpora,
        teach=teach,
        teacher_hidden_size=teacher_config.hidden_size,
        trainees=trainees,
        speed=speed,
        progress=resumed.progress if resumed is not None else Progress(),
        total_steps=total_steps(config, corpora),
        separator=corpora.separator if config.data.separate_documents else None,
        columns=columns,
        trim=not config.teacher.compile and not any(student.compile for student in config.students),
        teacher_score=teacher_score,
        probes=open_probes(config.probes, config.teacher),
    )


def prepare_teacher(
    config: RunConfig, place: World, corpora: Corpora, need: Need
) -> tuple[Encode, dict[str, Columns], dict[str, float]]:
    """Return the teacher, what belongs to rows beside their tokens, and the teacher's own score (collective).

    Nothing is loaded where students learn from labels alone, or where the teacher's logits are all that they
    learn of it and have been kept.
    """
    columns: dict[str, Columns] = defaultdict(Columns)
    task, teacher_score = corpora.task, {}
    if task is not None:
        columns |= {
            split: Columns.read(corpora, split) for split in ("train", "heldout") if corpora.has(split)
        }
    if need == Need():
        return no_teacher, columns, {}
    if task is not None and config.teacher.logits_folder is not None:
        head = Head.spans if task.kind == SPANS else Head.sequence
        keeper = TeacherLogits(config.teacher, head, config.train.micro_batch_rows, place)
        only_logits = need == Need(head=head)
        logits = {split: keeper.of(corpora, split) for split in columns if only_logits or split == "heldout"}
        if "heldout" in columns:
            labels = columns["heldout"].labels or []
            teacher_score = check_score(task, logits["heldout"], labels, config.teacher.model)
        if only_logits:
            kept_columns = {split: replace(own, logits=logits[split]) for split, own in columns.items()}
            return kept, kept_columns, teacher_score
    return load_teacher(config.teacher, need, place), columns, teacher_score


def make_trainee(
    config: RunConfig,
    student: StudentConfig,
    teacher: PreTrainedConfig,
    whole_teacher: Callable[[Head], PreTrainedModel],
    place: World,
    resumed: Checkpoint | None,
    task: TaskInfo | None = None,
) -> Trainee:
    """Make one student and its engine (collective), new or as a checkpoint has it."""
    module = build_student(student, whole_teacher, teacher, config.train.seed, task)
    settings = derive(config, student, place.size, pin_memory=place.device.type == "cuda")
    own = engine.Engine(module, student.optimizer, settings, place)
    own.train()
    trainee = Trainee(student, shapes.transfer(student, teacher, task), own)
    if resumed is not None:
        restore(trainee, resumed)
    return trainee


def make_speed_meter(
    config: RunConfig, place: World, teacher: PreTrainedConfig, trainees: list[Trainee], corpora: Corpora
) -> SpeedMeter:
    """Count a row's operations and measure how fast this device could do them at best."""
    clock = Clock(place.device)
    need = teacher_need([trainee.transfer for trainee in trainees])
    if config.teacher.logits_folder is not None and need == Need(head=need.head):
        need = Need()  # it does not run
    lengths = [corpus.manifest.seq_len for corpus in corpora.corpora]
    teacher_flops = student_flops = 0.0
    try:
        for share, seq_len in zip(corpora.shares, lengths, strict=True):
            teacher_flops += share * teacher_row_flops(teacher, seq_len, need)
            for trainee in trainees:
                shape, own = trainee.engine.module.encoder.config, student_need(trainee.transfer)
                student_flops += share * student_row_flops(shape, seq_len, own, teacher.hidden_size)
    except ValueError as error:
        log.warning("no MFU: %s", error)
        return SpeedMeter(None, 0.0, clock)
    teacher_s = teacher_flops / matrix_rate(encoders.DTYPES[config.teacher.precision], place.device)
    student_s = student_flops / matrix_rate(encoders.DTYPES[config.deepspeed.precision], place.device)
    return SpeedMeter(teacher_flops + student_flops, teacher_s + student_s, clock)
