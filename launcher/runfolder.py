"""The folder of a run: who may write there, what happened so far, which MLflow runs it has."""

import json
import logging
import shutil
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from configs.public import public
from sharding.files import lock_holder, try_lock, write_text

log = logging.getLogger("distil")

CLAIM_WAIT_S = 60.0  # the job before may still be ending


def keep_line(file: Path, line: str, what: str) -> None:
    """Append a line to a file. A full disk costs the line and a warning, which says ``what`` it was."""
    try:
        with file.open("a", encoding="utf-8") as lines:
            lines.write(line + "\n")
    except OSError as error:
        log.warning("%s could not be kept: %s", what, error)


class RunFolder:
    """A run's folder as rank 0 uses it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def claim(self, wait_s: float = CLAIM_WAIT_S) -> None:
        """Make the folder and take its lock, which goes when this process does, however it ends.

        Raises:
            ValueError: another process still holds it after ``wait_s``.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        lock = self.path / ".lock"
        until_s = time.monotonic() + wait_s
        while try_lock(lock) is None:
            if time.monotonic() >= until_s:
                raise ValueError(
                    f"output={self.path} is being written by another job ({lock_holder(lock)}); wait for it, "
                    "end it, or set another output"
                )
            time.sleep(0.2)

    def discard_if_new(self) -> None:
        """Take the folder away if it holds nothing but the lock: a start that is refused leaves no trace."""
        if [path.name for path in self.path.iterdir()] == [".lock"]:
            shutil.rmtree(self.path)

    def event(self, event: str, step: int, **facts: Any) -> None:
        """Append a line to ``events.jsonl``: what happened, when (UTC) and after which step."""
        at = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
        line = public(json.dumps({"at": at, "event": event, "step": step, **facts}))
        keep_line(self.path / "events.jsonl", line, f"event {event} of step {step}")

    def tracking_run_ids(self) -> dict[str, str]:
        """Return the ids of the MLflow runs that ``keep_tracking_run_ids`` kept; empty for a new run."""
        try:
            return dict(json.loads((self.path / "mlflow.json").read_text(encoding="utf-8")))
        except FileNotFoundError:
            return {}

    def keep_tracking_run_ids(self, run_ids: dict[str, str]) -> None:
        """Keep the ids of the MLflow runs, for people and other commands."""
        try:
            write_text(self.path / "mlflow.json", json.dumps(run_ids, indent=1) + "\n")
        except OSError as error:  # the journal has them too
            log.warning("%s could not be kept: %s", self.path / "mlflow.json", error)
