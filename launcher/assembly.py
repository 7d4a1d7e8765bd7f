"""A run put together: teacher, students in their engines, meters; new or as a checkpoint has it."""

import functools
import logging
from collections.abc import Callable

from transformers import PreTrainedConfig, PreTrainedModel

from configs.deepspeed import derive
from configs.schema import RunConfig
from configs.student_schema import StudentConfig
from sharding.corpora import Corpora
from trainer import encoders, engine, shapes
from trainer.checkpoint import Checkpoint, Progress
from trainer.clock import Clock, Stations
from trainer.flops import matrix_rate, student_row_flops, teacher_row_flops
from trainer.loop import Run, Trainee, total_steps
from trainer.meter import CorpusMeter, SpeedMeter
from trainer.models import build_student
from trainer.rollback import restore
from trainer.teacher import load_teacher
from trainer.transfer import student_need, teacher_need
from trainer.world import World

log = logging.getLogger("distil")


def build(
    config: RunConfig, place: World, corpora: Corpora, resumed: Checkpoint | None, stations: Stations
) -> Run:
    """Load the teacher, make the students and their engines, and restore what a checkpoint holds."""
    teacher_config = encoders.load_teacher_config(config.teacher)
    need = teacher_need([shapes.transfer(student, teacher_config) for student in config.students])
    teacher = load_teacher(config.teacher, need, place)
    stations.passed("teacher")
    whole = functools.cache(functools.partial(encoders.load_whole_teacher, config.teacher))
    trainees = [
        make_trainee(config, student, teacher_config, whole, place, resumed) for student in config.students
    ]
    whole.cache_clear()  # it was for students that start from it
    stations.passed("students")
    if len(corpora.parts) > 1:
        names = [part.name for part in corpora.parts]
        for trainee in trainees:
            trainee.by_corpus = CorpusMeter(names, trainee.transfer, teacher.hidden_size)

    speed = make_speed_meter(config, place, teacher.config, trainees, corpora)
    stations.passed("meters")
    return Run(
        config=config,
        world=place,
        corpora=corpora,
        teach=teacher,
        teacher_hidden_size=teacher.hidden_size,
        trainees=trainees,
        speed=speed,
        progress=resumed.progress if resumed is not None else Progress(),
        total_steps=total_steps(config, corpora),
        separator=corpora.separator if config.data.separate_documents else None,
    )


def make_trainee(
    config: RunConfig,
    student: StudentConfig,
    teacher: PreTrainedConfig,
    whole_teacher: Callable[[bool], PreTrainedModel],
    place: World,
    resumed: Checkpoint | None,
) -> Trainee:
    """Make one student and its engine (collective), new or as a checkpoint has it."""
    module = build_student(student, whole_teacher, teacher, config.train.seed)
    settings = derive(config, student, place.size, pin_memory=place.device.type == "cuda")
    own = engine.Engine(module, student.optimizer, settings, place)
    own.train()
    trainee = Trainee(student, shapes.transfer(student, teacher), own)
    if resumed is not None:
        restore(trainee, resumed)
    return trainee


def make_speed_meter(
    config: RunConfig, place: World, teacher: PreTrainedConfig, trainees: list[Trainee], corpora: Corpora
) -> SpeedMeter:
    """Count a row's operations and measure how fast this device could do them at best."""
    clock = Clock(place.device)
    need = teacher_need([trainee.transfer for trainee in trainees])
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
