"""A real Slurm on one machine: its controller and node daemons on loopback, in a folder, for tests.

Without munge, cgroups or systemd. Only root can run it, and only where nobody else listens: its ports take
commands from any process of the machine (``auth/none``).
"""

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[2]

CONFIGURATION = """
ClusterName=test
FirstJobId={port}
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
SlurmctldPort={port}
AuthType=auth/none
AuthInfo=cred_expire=5
CredType=cred/none
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SchedulerType=sched/builtin
SchedulerParameters=batch_sched_delay=1,sched_interval=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool_%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd_%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/%n.log
ReturnToService=2
JobRequeue=1
KillWait=5
InactiveLimit=0
SlurmctldTimeout=30
SlurmdTimeout=10
MessageTimeout=10
GresTypes=gpu
"""
NODE = (
    "NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={cpus} RealMemory=4000 "
    "Gres=gpu:{cpus} State=UNKNOWN\n"
)
PARTITIONS = """
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=1 GraceTime={grace_s} State=UP
PartitionName=urgent Nodes=ALL MaxTime=INFINITE PriorityTier=2 PreemptMode=OFF State=UP
"""


@dataclass
class Cluster:
    """A running Slurm. Commands that it shall take need ``environment``."""

    folder: Path
    environment: dict[str, str]
    daemons: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def ask(self, *command: str, **environment: str) -> str:
        """Run a command in the repository's root, with ``environment`` besides; return what it printed."""
        asked = subprocess.run(
            command, cwd=ROOT, env={**self.environment, **environment}, capture_output=True, text=True
        )
        assert asked.returncode == 0, f"{' '.join(command)}: {asked.stderr}"
        return asked.stdout.strip()

    def sbatch(self, *arguments: str, **environment: str) -> str:
        """Submit a job script; return the job's number."""
        return self.ask("sbatch", "--parsable", *arguments, **environment).partition(";")[0]

    def about(self, job: str) -> dict[str, str]:
        """Return what the controller knows of a job."""
        return self._tasks(job)[0]

    def _tasks(self, job: str) -> list[dict[str, str]]:
        lines = self.ask("scontrol", "show", "job", "-o", job).splitlines()
        return [dict(word.partition("=")[::2] for word in line.split()) for line in lines]

    def state(self, job: str) -> str:
        """Return PENDING, RUNNING, COMPLETING, COMPLETED, FAILED, CANCELLED, TIMEOUT, ..."""
        return self.about(job)["JobState"]

    def wait(self, job: str, states: Collection[str], timeout: float = 120) -> str:
        """Wait until a job is in one of ``states``; return it."""
        until_s = time.monotonic() + timeout
        while (state := self.state(job)) not in states:
            assert time.monotonic() < until_s, f"job {job} is {state}, not {states}:\n{self.log(job)}"
            time.sleep(0.2)
        return state

    def wait_for_all(self, job: str, states: Collection[str], timeout: float = 200) -> None:
        """Wait until all tasks of an array, or a job, are in one of ``states``."""
        until_s = time.monotonic() + timeout
        while not {task["JobState"] for task in self._tasks(job)} <= set(states):
            logs = "".join(self.log(task["JobId"]) for task in self._tasks(job))
            assert time.monotonic() < until_s, f"job {job} is not {states}:\n{logs}"
            time.sleep(0.2)

    def log(self, job: str) -> str:
        """Return what a job has printed so far, over all its starts."""
        path = Path(self.about(job)["StdOut"])
        return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""

    def nodes(self) -> dict[str, str]:
        """Return the state of every node: idle, allocated, mixed, down, ..."""
        lines = self.ask("sinfo", "-h", "-N", "-p", "main", "-o", "%N %T").splitlines()
        return dict(line.split() for line in lines)

    def wait_for_nodes(self, timeout: float = 30) -> None:
        """Wait until every node is idle."""
        until_s = time.monotonic() + timeout
        while set(self.nodes().values()) != {"idle"}:
            logs = "".join(path.read_text() for path in (self.folder / "log").glob("*.log"))
            assert time.monotonic() < until_s, f"nodes are {self.nodes()}:\n{logs}"
            time.sleep(0.1)

    def clear(self) -> None:
        """Cancel all jobs and wait until every node is idle."""
        self.ask("scancel", "--user=root")
        self.wait_for_nodes()

    def start_node(self, name: str) -> None:
        """Start a node's daemon, again if it was killed."""
        self._start(name, "slurmd", "-D", "-N", name)

    def kill_node(self, name: str) -> None:
        """End a node as a power cut would: its daemon and all that it runs, at once."""
        kill([self.daemons[name].pid, *self._processes(name)])
        self.daemons[name].wait()

    def preempt(self, job: str, seconds: int = 1) -> str:
        """Take a running job's nodes away through one of higher priority; return that one's number.

        The job gets SIGCONT and SIGTERM, after ``GraceTime`` SIGKILL, and is queued again.
        """
        nodes = self.about(job)["NumNodes"].partition("-")[0]
        script = f"sleep {seconds}"
        options = ("--partition=urgent", "--exclusive", f"--nodes={nodes}", "--output=/dev/null")
        return self.sbatch(*options, f"--wrap={script}")

    def _start(self, name: str, *command: str) -> None:
        log = (self.folder / "log" / f"{name}.out").open("ab")
        with log:
            self.daemons[name] = subprocess.Popen(
                command, env=self.environment, stdout=log, stderr=log, start_new_session=True
            )

    def _processes(self, node: str | None = None) -> list[int]:
        """Processes of this cluster, or of one node: steps' daemons first, which would report the others."""
        steps, others = [], []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.name().startswith("slurmstepd"):  # has cleared its environment
                    logs = [
                        self.folder / "log" / f"{name}.log" for name in ([node] if node else self.daemons)
                    ]
                    if {Path(file.path) for file in process.open_files()} & set(logs):
                        steps.append(process.pid)
                    continue
                environment = process.environ()
                if environment.get("SLURM_CONF") == self.environment["SLURM_CONF"]:
                    if node in (None, environment.get("SLURMD_NODENAME")):
                        others.append(process.pid)
        return [pid for pid in steps + others if pid != os.getpid()]

    def close(self) -> None:
        """End every process of the cluster."""
        while pids := self._processes():
            kill(pids)
            for daemon in self.daemons.values():
                daemon.poll()
            time.sleep(0.05)


def kill(pids: list[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, 9)


def missing() -> str | None:
    """Return why there can be no cluster here; None where there can."""
    absent = [name for name in ("slurmctld", "slurmd", "sbatch", "srun") if shutil.which(name) is None]
    if absent:
        return f"Slurm is not installed ({', '.join(absent)}): apt-get install slurm-wlm"
    return None if os.geteuid() == 0 else "only root can run Slurm's daemons without munge"


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in probes]


@contextlib.contextmanager
def cluster(folder: Path, nodes: int = 2, cpus_per_node: int = 1, grace_s: int = 30) -> Iterator[Cluster]:
    """A Slurm of nodes ``n1``, ``n2`` ..., each with as many GPUs, which do nothing, as CPUs.

    Partition ``main`` is preempted by ``urgent`` after ``grace_s`` seconds. Skips the test where Slurm is
    not installed.
    """
    if reason := missing():
        pytest.skip(reason)
    for name in ("log", "state"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    names = [f"n{number + 1}" for number in range(nodes)]
    host = socket.gethostname().partition(".")[0]
    port, *ports = free_ports(nodes + 1)
    lines = [
        NODE.format(name=name, host=host, port=at, cpus=cpus_per_node)
        for name, at in zip(names, ports, strict=True)
    ]
    text = CONFIGURATION.format(host=host, port=port, folder=folder)
    (folder / "slurm.conf").write_text(text + "".join(lines) + PARTITIONS.format(grace_s=grace_s))
    (folder / "gres.conf").write_text(f"Name=gpu Count={cpus_per_node} File=/dev/null\n")
    environment = {key: value for key, value in os.environ.items() if not key.startswith("SLURM")}
    environment |= {
        "SLURM_CONF": str(folder / "slurm.conf"),
        "SBATCH_OUTPUT": str(folder / "log" / "job-%j.log"),
        "PYTHON": sys.executable,
        "DS_ACCELERATOR": "cpu",
    }
    running = Cluster(folder, environment)
    try:
        running._start("slurmctld", "slurmctld", "-D", "-c")
        for name in names:
            running.start_node(name)
        running.wait_for_nodes()
        yield running
    finally:
        running.close()
