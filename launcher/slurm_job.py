"""The Slurm job around this process: its nodes, what a step on some of them is started with, its requeue."""

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence

_GONE = ("DOWN", "FAIL", "NOT_RESPONDING", "*")


def _ask(*command: str) -> str:
    """Run one of Slurm's commands; an error is told and gives no answer: the controller may be restarting."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        print(f"supervise: {' '.join(command)}: {done.stderr.strip()}", file=sys.stderr, flush=True)
    return done.stdout.strip() if done.returncode == 0 else ""


def _facts(line: str) -> dict[str, str]:
    return dict(word.partition("=")[::2] for word in line.split())


class Job:
    """A job with nodes of its own, as ``environment`` describes it to its batch script."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._environment = environment
        self.id = environment["SLURM_JOB_ID"]
        self.name = self.id
        """By which Slurm knows it alone: one task of an array has the number of the whole array."""
        if "SLURM_ARRAY_JOB_ID" in environment:
            self.name = f"{environment['SLURM_ARRAY_JOB_ID']}_{environment['SLURM_ARRAY_TASK_ID']}"
        self.wanted = int(environment["SLURM_JOB_NUM_NODES"])  # it may lose some on the way: --no-kill

    def nodes(self) -> list[str]:
        """Return its nodes that answer, in order."""
        names = _facts(_ask("scontrol", "show", "job", "-o", self.name)).get("NodeList")
        names = names or self._environment["SLURM_JOB_NODELIST"]
        found = [_facts(line) for line in _ask("scontrol", "show", "node", "-o", names).splitlines()]
        return [node["NodeName"] for node in found if not any(state in node["State"] for state in _GONE)]

    def partition(self) -> list[str]:
        """Return the nodes of its partition that answer."""
        partition = self._environment.get("SLURM_JOB_PARTITION", "")
        lines = _ask("sinfo", "-h", "-N", "-p", partition, "-o", "%N %T").splitlines()
        states = dict(line.split() for line in lines)
        return [name for name, state in states.items() if not any(gone in state.upper() for gone in _GONE)]

    def step(self, command: Sequence[str], nodes: Sequence[str]) -> list[str]:
        """Return the ``srun`` command of a step on ``nodes``: a task per GPU, unless the job says else."""
        gpus = self._environment.get("SLURM_GPUS_PER_NODE", "1").rpartition(":")[2]  # 8, or a100:8
        per_node = int(self._environment.get("SLURM_NTASKS_PER_NODE", gpus))
        options = [f"--nodes={len(nodes)}", f"--ntasks={len(nodes) * per_node}"]
        options.append(f"--ntasks-per-node={per_node}")
        if len(nodes) < self.wanted:  # --overlap: a step whose node does not answer still holds its share
            options += [f"--nodelist={','.join(nodes)}", "--overlap"]
        return [command[0], *options, *command[1:]]

    def meeting_point(self, node: str) -> dict[str, str]:
        """Return where the ranks meet, unless the environment says it: ``node``, at a port of this job."""
        address = _facts(_ask("scontrol", "show", "node", "-o", node)).get("NodeAddr", node)
        port = 20000 + int(self.id) % 10000  # jobs that share a node do not meet
        place = {"MASTER_ADDR": address, "MASTER_PORT": str(port)}
        return {name: self._environment.get(name, value) for name, value in place.items()}

    def requeue(self, without: Sequence[str]) -> bool:
        """Queue the job again, and keep it off the nodes ``without``; Slurm then ends this process.

        Returns:
            Whether Slurm took it.
        """
        taken = subprocess.run(["scontrol", "requeue", self.name]).returncode == 0
        if taken and without:  # only a pending job can be told so, which it has been since just now
            _ask("scontrol", "update", f"JobId={self.name}", f"ExcNodeList={','.join(without)}")
        return taken


def of_this_process() -> Job | None:
    """Return the job whose batch script this process is; None outside of Slurm."""
    return Job(os.environ) if "SLURM_JOB_ID" in os.environ else None
