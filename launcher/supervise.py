"""Keeps a run going: starts its launch command, and again after what passes.

``python launcher/supervise.py -- deepspeed --hostfile hosts launcher/general.py ... output=runs/a``

A run that was asked to leave (exit code 75), that lost a rank or died by a signal goes on from its newest
checkpoint: at once where it is, on fewer nodes where ``--min-nodes`` allows it, through Slurm's queue where
it must. SIGTERM, SIGUSR1 and SIGINT are handed to the run, which saves and leaves. Job scripts ``exec`` this
around ``srun``. docs/reliability.md lists what follows what.
"""

import sys
from pathlib import Path

if __package__ in (None, ""):  # run as a script: this folder is on sys.path, not the repository
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import contextlib
import ctypes
import dataclasses
import json
import os
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from types import FrameType

from configs.public import public
from launcher import hostfile, slurm_job
from launcher.policy import Next, Record, complaint, decide, outcome, pause_s, place
from sharding.files import write_text
from trainer import exits

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
GRACE_S = 60.0  # for what a launcher leaves behind; deepspeed and torchrun give their ranks 30
PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h


def say(text: str) -> None:
    """Tell people, between the lines of the run."""
    print(f"{time.strftime('%H:%M:%S')} supervise: {text}", file=sys.stderr, flush=True)


class Attempt:
    """The launch command, running in a session of its own, so that nobody's Ctrl-C reaches it directly."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        self._is_srun = is_srun(command)
        self.suspect: str | None = None  # the node where a task failed first, as far as srun tells
        self._code: int | None = None  # of that task
        errors = subprocess.PIPE if self._is_srun else None
        self._process = subprocess.Popen(command, env=environment, start_new_session=True, stderr=errors)
        self._reader = threading.Thread(target=self._read_errors, daemon=True)
        if self._is_srun:
            self._reader.start()

    def ask_to_leave(self) -> None:
        """Have the ranks save and leave. ``srun`` hands SIGUSR1 to all tasks; on SIGTERM it kills them."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGUSR1 if self._is_srun else signal.SIGTERM)

    def wait(self) -> int:
        """Wait for the command, and a while for what it leaves behind; return its exit code, or -signal."""
        _, status = os.waitpid(self._process.pid, 0)
        code = self._process.returncode = os.waitstatus_to_exitcode(status)
        until_s = time.monotonic() + GRACE_S
        with contextlib.suppress(ChildProcessError):  # no child is left
            while time.monotonic() < until_s:
                if os.waitpid(-1, os.WNOHANG)[0] == 0:
                    time.sleep(0.1)
            say("processes of the run do not end")
        if self._is_srun:
            self._reader.join(timeout=5)
        return self._code or code

    def _read_errors(self) -> None:
        assert self._process.stderr is not None
        blamed = []
        for line in self._process.stderr:
            sys.stderr.buffer.write(line)
            sys.stderr.buffer.flush()
            if found := complaint(line.decode(errors="replace")):
                blamed.append(found)
        if blamed:
            self.suspect = next((node for node, _ in blamed if node is not None), None)
            self._code = blamed[0][1]


def is_srun(command: Sequence[str]) -> bool:
    return Path(command[0]).name == "srun"


class Supervisor:
    """A run, over all its attempts."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.command: list[str] = arguments.command
        self.output: Path = arguments.output
        self.retries: int = arguments.retries
        self.min_nodes: int | None = arguments.min_nodes
        self.first_pause_s: float = arguments.pause
        words = {Path(word).name for word in self.command}
        self.torchrun = bool(words & {"torchrun", "torch.distributed.run"})
        self.job = slurm_job.of_this_process()
        self.hostfile = hostfile.find(self.command)
        self.kept = self.output / "supervisor.json"
        self.record = self._kept_record()
        self.asked: list[int] = []  # signals, in order
        self.attempt: Attempt | None = None

    def run(self) -> int:
        """Start the command until nothing is left to do; return the last exit code."""
        for number in SIGNALS:
            signal.signal(number, self._note)
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)  # what a launcher leaves behind becomes our child
        while True:
            where, names = self._place()
            code = self._try(names) if where is Next.again else self._elsewhere(names)
            ended_by_slurm = self.asked[:1] == [signal.SIGTERM]
            slurm = self.job is not None and not ended_by_slurm
            following = decide(code, self.record, self.retries, bool(self.asked), slurm)
            if self.job is not None and following is Next.again:
                following = where
            fruitless = self.record.fruitless
            say(f"ended with {code}; attempts without a new checkpoint: {fruitless}; {following.value}")
            if following is Next.end:
                self.kept.unlink(missing_ok=True)
                return code
            self._keep_record()
            if following is Next.requeue:
                assert self.job is not None
                self.job.requeue(without=names if where is Next.requeue else [])
                return exits.STOPPED
            self._pause()

    def _place(self) -> tuple[Next, list[str]]:
        """Return whether to start here and on which nodes or hosts; or to be requeued, and without which."""
        bad = self.record.bad_nodes
        if self.job is not None:
            elsewhere = len(set(self.job.partition()) - bad) if bad else 0
            wanted = self.job.wanted
            return place(list(self.job.nodes()), bad, elsewhere, wanted, self.min_nodes or wanted)
        if self.hostfile is not None:
            named = list(hostfile.read(self.hostfile))
            answering = hostfile.answering(named)
            return place(answering, bad, 0, len(named), self.min_nodes or len(named))
        return Next.again, []

    def _try(self, names: Sequence[str]) -> int:
        """Run the command once, there; note how it ended; return the run's own exit code."""
        if self.asked:
            return exits.STOPPED
        newest, seen = self._newest(), self._events()
        with contextlib.ExitStack() as stack:
            command, environment = self.command, dict(os.environ)
            if self.job is not None and is_srun(command):
                command = self.job.step(command, names)
                environment |= self.job.meeting_point(names[0])
            elif self.hostfile is not None and len(names) < len(hostfile.read(self.hostfile)):
                folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="supervise-")))
                command = hostfile.narrowed(command, self.hostfile, folder / "hosts", names)
            say(public(" ".join(command)))
            self.attempt = Attempt(command, environment)
            if self.asked:
                self.attempt.ask_to_leave()
            code = self.attempt.wait()
        events = self._events()[len(seen) :]
        if self.asked and self.hostfile is not None:  # pdsh is gone, ranks on other hosts still save
            until_s = time.monotonic() + GRACE_S
            while "stopped" not in events and time.monotonic() < until_s:
                time.sleep(0.5)
                events = self._events()[len(seen) :]
        self.record = self.record.after(self._newest() != newest, self.attempt.suspect)
        self.attempt = None
        return outcome(code, events, self.torchrun)

    def _elsewhere(self, without: Sequence[str]) -> int:
        """Say why not here; that too few nodes answer is taken for an attempt that failed."""
        say(f"goes on without {', '.join(without)}" if without else "too few nodes answer")
        if not without:
            self.record = self.record.after(progress=False, suspect=None)
        return exits.LOST

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.asked.append(number)
        if self.attempt is not None and len(self.asked) == 1:  # further signals change nothing
            self.attempt.ask_to_leave()

    def _pause(self) -> None:
        until_s = time.monotonic() + pause_s(self.record, self.first_pause_s)
        while time.monotonic() < until_s and not self.asked:
            time.sleep(0.1)

    def _newest(self) -> str:
        """Return the name of the newest checkpoint."""
        return max((path.name for path in (self.output / "checkpoints").glob("step-*")), default="")

    def _events(self) -> list[str]:
        """Return what happened to the run, see ``launcher/runfolder.py``."""
        path, found = self.output / "events.jsonl", []
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
            with contextlib.suppress(ValueError):  # a line cut short
                found.append(json.loads(line)["event"])
        return found

    def _kept_record(self) -> Record:
        """Return what this job has met before it was requeued."""
        with contextlib.suppress(FileNotFoundError, ValueError):
            kept = json.loads(self.kept.read_text(encoding="utf-8"))
            if self.job is not None and kept.pop("job") == self.job.id:
                return Record(**kept)
        return Record()

    def _keep_record(self) -> None:
        if self.job is None:
            return
        try:
            self.output.mkdir(parents=True, exist_ok=True)
            write_text(self.kept, json.dumps({"job": self.job.id, **dataclasses.asdict(self.record)}) + "\n")
        except OSError as error:  # such as a full disk: the count is lost, not the run
            say(f"{self.kept} could not be written: {error}")


def output_of(command: Sequence[str]) -> Path | None:
    """Return the run's folder as the command sets it: the last ``output=FOLDER``, of a task its stage's."""
    given = {key: value for key, _, value in (word.partition("=") for word in command)}
    return Path(given["output"], given.get("stage", "")) if "output" in given else None


def main() -> int:
    """Supervise a run; return the exit code of its last attempt, see ``trainer.exits``."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, help="the run's folder; not set: output=FOLDER in the command")
    parser.add_argument("--min-nodes", type=int, help="go on with so many nodes or hosts; not set: all")
    parser.add_argument(
        "--retries", type=int, default=5, help="attempts in a row that may bring no new checkpoint"
    )
    parser.add_argument(
        "--pause", type=float, default=10.0, help="seconds before the first of those, then doubled"
    )
    parser.add_argument("command", nargs=argparse.REMAINDER, help="-- and the launch command")
    arguments = parser.parse_args()
    if arguments.command[:1] == ["--"]:
        arguments.command.pop(0)
    if not arguments.command:
        parser.error("no launch command; give it after --")
    arguments.output = arguments.output or output_of(arguments.command)
    if arguments.output is None:
        parser.error("where is the run's folder? Set output=FOLDER in the launch command, or --output FOLDER")
    return Supervisor(arguments).run()


if __name__ == "__main__":
    sys.exit(main())
