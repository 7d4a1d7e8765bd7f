"""Saving while training goes on: a thread writes what the engines have copied to host memory."""

import copy
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from configs.schema import CheckpointConfig
from trainer import checkpoint as checkpoints
from trainer.checkpoint import Checkpoint

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Saved:
    """What became of one checkpoint."""

    step: int
    path: Path | None  # None: it could not be written
    error: OSError | None
    seconds: float  # of writing
    stall_s: float  # that training waited


class Writer:
    """Writes checkpoints one after another, on rank 0.

    A disk that is full or fails, or takes too long, costs a checkpoint, not the run. Any other error is a
    mistake of ours; the next call raises it.
    """

    def __init__(
        self,
        folder: Path,
        keep: CheckpointConfig,
        tell: Callable[[Saved], object],
        patience_s: float,
        before: Callable[[], object] = lambda: None,
    ) -> None:
        """Nothing is written yet.

        Args:
            folder: of the checkpoints.
            keep: which of them stay, and whether to write in the background.
            tell: called after every one, mostly by the thread that wrote it.
            patience_s: seconds of writing one after which the next no longer waits for it.
            before: called by the thread before every one.
        """
        self._before = before
        self._folder, self._keep, self._tell, self._patience_s = folder, keep, tell, patience_s
        self._thread: threading.Thread | None = None
        self._step = 0  # of the newest that it was given
        self._begun_s = 0.0
        self._error: Exception | None = None

    def put(self, checkpoint: Checkpoint, since_s: float) -> None:
        """Write a checkpoint, in the background if so configured.

        While the one before is still being written this waits, until that has taken ``patience_s`` in all;
        then this one is left out.

        Args:
            checkpoint: complete, in host memory; its ``progress`` may go on, nothing else may change.
            since_s: when training began to wait for it, by ``time.perf_counter``.
        """
        checkpoint = replace(checkpoint, progress=copy.deepcopy(checkpoint.progress))
        step = checkpoint.progress.step
        if not self._idle(self._begun_s + self._patience_s):
            now_s = time.perf_counter()
            error = TimeoutError(
                f"the save of step {self._step} has taken {now_s - self._begun_s:.0f} s so far"
            )
            self._tell(Saved(step, None, error, 0.0, now_s - since_s))
            return
        self._step, self._begun_s = step, time.perf_counter()
        self._thread = threading.Thread(target=self._write, args=(checkpoint, since_s), daemon=True)
        self._thread.start()
        if not self._keep.background:
            self._thread.join()
            self._raise()

    def finish(self, timeout_s: float) -> None:
        """Wait for what is being written; after ``timeout_s`` say that it is not there, and go on."""
        if not self._idle(time.perf_counter() + timeout_s):
            log.warning(
                "step %d is NOT saved: %s has not taken it in %.0f s (is the file system hanging?). Nothing "
                "waits for it any more; the checkpoints before it are as they were",
                self._step,
                self._folder,
                time.perf_counter() - self._begun_s,
            )

    def _idle(self, until_s: float) -> bool:
        """Wait for the thread, at most until then; True when it is done."""
        if self._thread is not None:
            self._thread.join(max(0.0, until_s - time.perf_counter()))
            if self._thread.is_alive():
                return False
        self._raise()
        return True

    def _raise(self) -> None:
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _write(self, checkpoint: Checkpoint, since_s: float) -> None:
        path, failure = None, None
        try:
            try:
                self._before()
                path = checkpoints.save(self._folder, checkpoint, self._keep)
            except OSError as error:
                failure = error
            done_s = time.perf_counter()
            stall_s = (self._begun_s if self._keep.background else done_s) - since_s
            self._tell(Saved(checkpoint.progress.step, path, failure, done_s - self._begun_s, stall_s))
        except Exception as error:  # for the thread that trains
            self._error = error
