"""Task distillation: ``deepspeed launcher/task.py --config configs/task.yaml stage=teacher [key=value ...]``.

Stages, in this order: ``data`` and, optionally, ``augment`` build the task's corpora; ``teacher`` fine-tunes
the teacher; ``intermediate`` and ``prediction`` distil it; ``baseline`` fine-tunes the same students without
a teacher. ``configs/task_schema.py`` says where each leaves its result. All but ``data`` run alike under
``deepspeed``, ``torchrun``, ``srun`` and plain ``python``; started again, each goes on where it was.
"""

import gc
import sys
from pathlib import Path

if __package__ in (None, ""):  # as in launcher/general.py
    gc.disable()
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    import configs  # noqa: F401

import argparse
import logging
import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

from configs.load import ConfigError, load_config, to_dict
from configs.student_schema import StudentConfig
from configs.task import STAGES, TRAINING, corpus_of, stage_config, tracking_of
from configs.task_schema import TaskConfig
from launcher import job
from launcher.runfolder import RunFolder
from launcher.tracked import corpus_run
from sharding import task_corpus
from trainer import augmentation, encoders, exits, meeting, shapes, world
from trainer.clock import Stations
from trainer.watchdog import Watchdog

log = logging.getLogger("distil")


def main() -> int:
    """Run one stage; return the exit code, see ``trainer.exits``."""
    stations = Stations()
    stations.passed("imports")
    gc.freeze()
    gc.enable()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", help="YAML file, see configs/")
    job.add_arguments(parser)
    arguments = parser.parse_args()
    return job.guarded(lambda: run(arguments, stations))


def run(arguments: argparse.Namespace, stations: Stations) -> int:
    """Do the stage that the arguments name."""
    place = world.find(os.environ)

    stage, config = meeting.or_tell(
        place, os.environ, None, lambda: load(arguments.config, arguments.overrides)
    )
    if stage in ("data", "augment") and arguments.dry_run:
        if place.is_main:
            log.info("dry run: the settings of stage=%s are sound, into %s", stage, config.output)
        return exits.DONE
    if stage == "data":
        if place.is_main:  # seconds of one core; other ranks have nothing to do
            with tracked(config, stage, corpus_of(config)):
                manifest = task_corpus.build(config)
            log.info("corpus %s, fingerprint %s", corpus_of(config), manifest.fingerprint)
            tell_finished(config, stage)
        return exits.DONE
    if stage == "augment":
        meeting.connect(place, os.environ, config.timeouts)
        watchdog = Watchdog(place, config.timeouts.step_s)
        where = config.augmented or f"{config.output}/augmented"
        with tracked(config, stage, where) if place.is_main else nullcontext():
            augmentation.augment(config, place, watchdog.beat)
        world.disconnect()
        watchdog.close()
        if place.is_main:
            tell_finished(config, stage)
        return exits.DONE
    assert stage in TRAINING
    students = meeting.or_tell(place, os.environ, None, lambda: learners(config, stage))
    return job.distil(
        stage_config(config, stage, students), stations, arguments.profile_steps, arguments.dry_run
    )


def load(path: str | None, overrides: list[str]) -> tuple[str, TaskConfig]:
    """Return the stage that ``stage=...`` among the overrides names, and the task's config.

    Raises:
        ConfigError: there is no such stage, or something is wrong with the config.
    """
    named = [text.partition("=")[2] for text in overrides if text.startswith("stage=")]
    others = [text for text in overrides if not text.startswith("stage=")]
    if len(named) != 1 or named[0] not in STAGES:
        raise ConfigError([f"stage={','.join(named) or 'nothing'}: give one of stage={'|'.join(STAGES)}"])
    return named[0], load_config(TaskConfig, path, others)


def tracked(config: TaskConfig, stage: str, output: str) -> AbstractContextManager[None]:
    """Return what tracks the building of one of the task's corpora."""
    name = f"{config.task}-{stage}"
    return corpus_run(name, tracking_of(config, stage), Path(output), stage, to_dict(config))


def tell_finished(config: TaskConfig, stage: str) -> None:
    """Keep that a stage which trains nothing is done, for those who start it: a launcher hides exit codes."""
    folder = RunFolder(Path(config.output, stage))
    folder.path.mkdir(parents=True, exist_ok=True)
    folder.event("finished", 0)


def learners(config: TaskConfig, stage: str) -> list[StudentConfig]:
    """Return who learns in a stage: the students, or the teacher itself.

    Raises:
        ValueError: there are none, or the teacher cannot be read.
    """
    if stage == "teacher":
        shape = encoders.load_teacher_config(config.teacher)
        own = shapes.as_student("teacher", config.teacher.model, shape)
        return [replace(own, overrides=config.teacher_overrides)]
    if not config.students:
        raise ConfigError([f"students is empty, and stage={stage} trains them; name at least one"])
    return config.students


if __name__ == "__main__":
    exits.leave(main())
