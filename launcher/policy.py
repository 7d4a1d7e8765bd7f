"""What ``launcher/supervise.py`` does next: pure functions of how an attempt ended and of what is left."""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum

from trainer import exits

FOR_GOOD = (exits.DONE, exits.FAILED, exits.WRONG, exits.INTERRUPTED)
TOO_OFTEN = 2  # failures of tasks on one node, without a new checkpoint in between, after which it is avoided
LONGEST_PAUSE_S = 300.0


class Next(Enum):
    """What follows an attempt."""

    end = "end"
    again = "start again"
    requeue = "requeue"


@dataclass(frozen=True)
class Record:
    """What has happened since the last new checkpoint; a requeued job goes on counting."""

    fruitless: int = 0
    """Attempts that ended without a new checkpoint."""
    failures: Mapping[str, int] = field(default_factory=dict)
    """By node: attempts in which a task failed there first."""

    def after(self, progress: bool, suspect: str | None) -> "Record":
        """Return the record with one more attempt that has ended."""
        if progress:
            return Record()
        failures = dict(self.failures)
        if suspect is not None:
            failures[suspect] = failures.get(suspect, 0) + 1
        return replace(self, fruitless=self.fruitless + 1, failures=failures)

    @property
    def bad_nodes(self) -> set[str]:
        """Nodes on which tasks failed too often."""
        return {node for node, count in self.failures.items() if count >= TOO_OFTEN}


def outcome(code: int, events: Sequence[str], torchrun: bool) -> int:
    """Return the exit code of the run itself, see ``trainer.exits``; launchers hide it.

    ``torchrun`` ends with 1 whatever its workers ended with, ``deepspeed`` with 0 if the process that it
    started was killed, with 1 if it was asked to leave. The run's own events tell more.

    Args:
        code: of the launch command; -n where signal n ended it.
        events: what the run kept in ``events.jsonl`` in this attempt, in order.
        torchrun: whether the launch command is ``torchrun``.
    """
    if events and events[-1] == "stopped":
        return exits.STOPPED
    if code == 0:
        return exits.DONE if "finished" in events else exits.LOST
    if code == exits.FAILED and torchrun and not {"failed", "finished"} & set(events):
        return exits.LOST
    return code if code > 0 else 128 - code


def decide(code: int, record: Record, retries: int, asked: bool, slurm: bool) -> Next:
    """Return what to do after an attempt.

    Args:
        code: the run's, see ``outcome``.
        record: with this attempt in it.
        retries: attempts without a new checkpoint that are followed by another.
        asked: whether the supervisor itself has been asked to leave.
        slurm: whether this is a Slurm job that nobody else ends or requeues.
    """
    if code in FOR_GOOD or record.fruitless > retries:
        return Next.end
    if slurm and (asked or code == exits.STOPPED):
        return Next.requeue
    return Next.end if asked else Next.again


def pause_s(record: Record, first_s: float) -> float:
    """Return how long to wait before the next attempt: twice as long each time that brought nothing."""
    return min(first_s * 2 ** max(record.fruitless - 1, 0), LONGEST_PAUSE_S) if record.fruitless else 0.0


def place(
    up: Sequence[str], bad: Collection[str], elsewhere: int, wanted: int, least: int
) -> tuple[Next, list[str]]:
    """Return whether to start again in this allocation, on which nodes, or to be requeued, without which.

    Args:
        up: the allocation's nodes that answer, in order.
        bad: nodes on which tasks failed too often.
        elsewhere: nodes of the partition that answer and are not bad.
        wanted: nodes of the job.
        least: nodes with which the run may go on.
    """
    good = [node for node in up if node not in bad]
    if len(good) >= least:
        return Next.again, good
    if bad and elsewhere >= wanted:
        return Next.requeue, sorted(bad)
    if len(up) >= least:  # nothing better is to be had
        return Next.again, list(up)
    return Next.requeue, []


_COMPLAINT = re.compile(
    r"srun: error: (?:Task launch for \S+ failed on node (?P<unreached>[\w.-]+): "
    r"|(?P<node>[\w.,\[\]-]+): tasks? [\d,-]+: (?P<what>.*))"
)


def complaint(line: str) -> tuple[str | None, int | None] | None:
    """Return whom ``srun`` blames in ``line``: the node, and the exit code of the task; None: nobody.

    No node is blamed where tasks of several ended, or one that only followed another. ``srun`` itself ends
    with the highest code of all tasks, 143 of those that it ended included: the first that it tells counts.
    """
    found = _COMPLAINT.match(line)
    if found is None:
        return None
    if found["unreached"]:
        return found["unreached"], None
    exited = re.match(r"Exited with exit code (\d+)", found["what"])
    code = int(exited[1]) if exited else None
    follows = code in (exits.STOPPED, exits.LOST) or found["what"].startswith("Terminated")
    return None if follows or "[" in found["node"] or "," in found["node"] else found["node"], code
