"""General distillation: ``deepspeed launcher/general.py --config configs/demo.yaml [key=value ...]``.

Runs alike under ``deepspeed``, ``torchrun``, ``srun`` and plain ``python``. Started again with the same
output folder, it resumes from the newest checkpoint there.
"""

import gc
import sys
from pathlib import Path

if __package__ in (None, ""):  # run as a script: launchers put this folder on sys.path, not the repository
    gc.disable()  # imports make objects and hardly garbage; to look for it took a quarter of their time
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    import configs  # noqa: F401  before transformers, which finds torchao and makes it talk

import argparse
import os
from functools import partial

from configs.load import load_config
from configs.schema import RunConfig
from launcher import job
from trainer import exits, meeting, world
from trainer.clock import Stations


def main() -> int:
    """Run the job; return the exit code, see ``trainer.exits``."""
    stations = Stations()
    stations.passed("imports")
    gc.freeze()  # what has been imported stays
    gc.enable()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", help="YAML file, see configs/")
    job.add_arguments(parser)
    arguments = parser.parse_args()

    def work() -> int:
        load = partial(load_config, RunConfig, arguments.config, arguments.overrides)
        config = meeting.or_tell(world.find(os.environ), os.environ, None, load)
        return job.distil(config, stations, arguments.profile_steps, arguments.dry_run)

    return job.guarded(work)


if __name__ == "__main__":
    exits.leave(main())
