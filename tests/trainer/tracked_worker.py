"""A process that tracks: ``python -m tests.trainer.tracked_worker URI FOLDER FIRST LAST [GROUP...]``.

It logs steps FIRST to LAST, says so after each hundredth as soon as that could be a checkpoint, and waits to
be killed, or ends well when LAST is 1000.
"""

import sys
import time
from pathlib import Path

from trainer import outbox
from trainer.tracking import Run

LAST = 1000


def main() -> None:
    outbox.SEND_EVERY_S = 0.2
    uri, folder, first, last, *under = sys.argv[1:]
    run = Run.start(
        uri=uri,
        default_folder=Path(folder) / "mlflow",
        experiment="distillation",
        name=Path(folder).name,
        under=under,
        params={"seed": 1},
        tags={},
        journal=Path(folder) / "tracking",
    )
    for step in range(int(first), int(last) + 1):
        run.log_metrics({"loss": step / 8, "speed": 2.0}, step)
        time.sleep(0.001)
        if step % 100 == 0 and run.flush():
            print(step, flush=True)
    if int(last) == LAST:
        run.finish(wait_s=60, outcome=f"all {LAST} steps")
    else:
        time.sleep(600)


if __name__ == "__main__":
    main()
