"""Preemptions: on a real Slurm of two nodes on this machine, jobs of higher priority take a run's nodes away.

The run is a job of ``launcher/slurm/general.sbatch``. Slurm signals it, queues it again and starts it again.
"""

import random
import time

from benchmarks.faults import Fault, judge
from benchmarks.tiny_run import BATCH_ROWS, TinyRun, free_port, last_step
from tests.launcher.slurm import Cluster

OPTIONS = ("--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=1", "--cpus-per-task=1")
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")


def preempted(slurm: Cluster, run: TinyRun, stage: int, times: int, chance: random.Random) -> list[Fault]:
    """Submit a run, take its nodes away up to so many times at random moments, and wait for its end."""
    settings = ("--config", str(run.config), f"output={run.output}", f"deepspeed.zero_stage={stage}")
    job = slurm.sbatch(*OPTIONS, "launcher/slurm/general.sbatch", *settings, MASTER_PORT=free_port())
    faults: list[Fault] = []
    while True:
        slurm.wait(job, ("RUNNING", *ENDED))
        run.starts += 1
        since_bytes, expected = run.event_bytes(), run.newest_step()
        fault = None
        if len(faults) < times and _at_a_moment(slurm, run, job, since_bytes, chance):
            fault = _preempt(slurm, run, job, since_bytes)
        if fault is None:
            slurm.wait(job, ENDED, 300)
        events = run.events(since_bytes)
        if faults:
            judge(faults[-1], events, "", expected)
        if fault is None:
            if slurm.state(job) != "COMPLETED":
                why = f"the job ended as {slurm.state(job)}:\n{slurm.log(job)[-4000:]}"
                faults.append(Fault("none: it ended by itself", problem=why))
                print(why, flush=True)
            return faults
        faults.append(fault)
        print(f"{run.output.name}: {fault.kind}, step {run.newest_step()}", flush=True)


def _at_a_moment(slurm: Cluster, run: TinyRun, job: str, since_bytes: int, chance: random.Random) -> bool:
    """Wait for a moment, of the start or of the steps by even chances; False when the job ends before."""
    in_steps, limit_s = chance.random() < 0.5, 120.0
    seconds = chance.uniform(0.0, 2.0 if in_steps else run.startup_s)
    until_s = time.monotonic() + (limit_s if in_steps else seconds)
    while time.monotonic() < until_s:
        if in_steps and not _starting(run, since_bytes):
            in_steps, until_s = False, time.monotonic() + seconds
        if slurm.state(job) != "RUNNING":
            return False
        time.sleep(0.1)
    return True


def _starting(run: TinyRun, since_bytes: int) -> bool:
    """Return whether the first step is still to come."""
    return all(event["event"] != "training" for event in run.events(since_bytes))


def _preempt(slurm: Cluster, run: TinyRun, job: str, since_bytes: int) -> Fault | None:
    """Take the nodes away and wait until the job is queued again; None when it was done before."""
    restarts = slurm.about(job)["Restarts"]
    where = "while starting" if _starting(run, since_bytes) else "in steps"
    fault = Fault(f"preemption by Slurm, {where}")
    slurm.preempt(job)
    until_s = time.monotonic() + 120
    while slurm.about(job)["Restarts"] == restarts:
        if slurm.state(job) in ENDED:
            return None
        if time.monotonic() > until_s:
            fault.problem = "not queued again within 120 s"
            break
        time.sleep(0.1)
    fault.gone_s = time.time() - fault.struck_s
    fault.rows_lost = BATCH_ROWS * max(0, last_step(slurm.log(job)) - run.newest_step())
    return fault
