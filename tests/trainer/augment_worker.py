"""One rank of the stage ``augment``: ``augment_worker.py CONFIG.json``, started by test_augmentation.py."""

import json
import logging
import os
import sys
from pathlib import Path

from configs.schema import TeacherConfig
from configs.task_schema import AugmentationConfig, TaskConfig, TaskSourceConfig
from trainer import exits, meeting, world
from trainer.augmentation import augment


def config_of(tree: dict) -> TaskConfig:
    """A pair task from plain values."""
    return TaskConfig(
        **{
            **tree,
            "source": TaskSourceConfig(**tree["source"]),
            "teacher": TeacherConfig(**tree["teacher"]),
            "augmentation": AugmentationConfig(**tree["augmentation"]),
        }
    )


def main() -> int:
    """Do the stage."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    place = world.find(os.environ)
    meeting.connect(place, os.environ)
    augment(config_of(json.loads(Path(sys.argv[1]).read_text())), place)
    world.disconnect()
    return exits.DONE


if __name__ == "__main__":
    exits.leave(main())
