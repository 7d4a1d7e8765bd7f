"""Jobs of launcher/slurm/general.sbatch on a real Slurm, and what happens to ranks, nodes and jobs there.

Where only the supervisor and Slurm matter, a script stands for the run: ``PYTHON`` names it.
"""

import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from tests.launcher.conftest import Launch, written
from tests.launcher.slurm import Cluster, cluster
from tests.launcher.test_general import assert_equal, final_weights
from tests.launcher.test_stops import events
from trainer import exits

pytestmark = pytest.mark.network_of_ranks

SCRIPT = "launcher/slurm/general.sbatch"
ONE_TASK = ("--gpus-per-node=1", "--cpus-per-task=1")
QUICK = "--pause=0.1 --retries=2"


@pytest.fixture(scope="module")
def two_nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with cluster(tmp_path_factory.mktemp("slurm")) as running:
        yield running


@pytest.fixture
def slurm(two_nodes: Cluster) -> Iterator[Cluster]:
    """Two idle nodes, n1 and n2."""
    yield two_nodes
    two_nodes.clear()


def wait_for(slurm: Cluster, job: str, output: str, kind: str, count: int = 1) -> dict[str, Any]:
    """Wait until a run has had an event so many times; return it."""
    until_s = time.monotonic() + 150
    while len(found := events(output, kind)) < count:
        assert time.monotonic() < until_s and slurm.state(job) != "FAILED", slurm.log(job)
        time.sleep(0.05)
    return found[-1]


def rank(slurm: Cluster, job: str, number: int) -> psutil.Process:
    """The process of a rank of a job."""
    asked = {"SLURM_JOB_ID": job, "SLURM_PROCID": str(number), "SLURM_CONF": slurm.environment["SLURM_CONF"]}
    for process in psutil.process_iter():
        try:
            parent = process.parent()
            if (
                parent
                and parent.name().startswith("slurmstepd")
                and asked.items() <= process.environ().items()
            ):
                if "launcher/general.py" in process.cmdline():
                    return process
        except psutil.Error:
            continue
    raise AssertionError(f"job {job} has no rank {number}")


def ended(slurm: Cluster, job: str) -> tuple[str, str]:
    """Wait for a job's end; return its exit code, which Slurm gives with a signal, and its restarts."""
    slurm.wait(job, {"COMPLETED", "FAILED"}, 200)
    about = slurm.about(job)
    return about["ExitCode"], about["Restarts"]


def test_killed_and_preempted_it_goes_on_bitwise(
    slurm: Cluster, run_config: dict[str, Any], general: Launch, tmp_path: Path
) -> None:
    """A rank killed: started again within the allocation. The nodes taken: saved, queued again, done."""
    run_config["train"]["steps"] = 300
    run_config |= {"checkpoint": {"every_steps": 30}, "evaluation": {"every_steps": 150, "rows": 40}}
    whole, broken = str(tmp_path / "whole"), str(tmp_path / "broken")
    script = (SCRIPT, "--config", written(run_config), f"output={broken}")
    job = slurm.sbatch("--nodes=2", *ONE_TASK, *script, SUPERVISE=QUICK)
    wait_for(slurm, job, broken, "saved")
    rank(slurm, job, 1).send_signal(signal.SIGKILL)
    wait_for(slurm, job, broken, "training", 2)
    assert slurm.about(job)["Restarts"] == "0"
    slurm.preempt(job)
    stopped = wait_for(slurm, job, broken, "stopped")
    assert "SIGTERM" in stopped["reason"]
    assert ended(slurm, job) == ("0:0", "1"), slurm.log(job)
    assert [event["step"] for event in events(broken, "started")][2] == stopped["step"]

    done = general(run_config, f"output={whole}", ranks=2, by="torchrun")
    assert done.returncode == 0, done.stderr
    assert_equal(final_weights(broken), final_weights(whole))


def test_its_time_limit_queues_it_again_and_scancel_does_not(
    slurm: Cluster, run_config: dict[str, Any], tmp_path: Path
) -> None:
    run_config["train"]["steps"] = 100000
    output = run_config["output"]
    options = ("--nodes=1", *ONE_TASK, "--time=60", "--signal=B:USR1@300")
    job = slurm.sbatch(*options, SCRIPT, "--config", written(run_config), f"output={output}")
    wait_for(slurm, job, output, "training")
    slurm.ask("scontrol", "update", f"JobId={job}", "TimeLimit=5")  # the last 300 seconds have begun
    stopped = wait_for(slurm, job, output, "stopped")
    assert "SIGUSR1" in stopped["reason"]
    slurm.wait(job, {"PENDING"})
    slurm.ask("scontrol", "update", f"JobId={job}", "TimeLimit=60")
    started = wait_for(slurm, job, output, "started", 2)
    assert started["step"] == stopped["step"] and slurm.about(job)["Restarts"] == "1"
    slurm.ask("scancel", job)
    slurm.wait(job, {"CANCELLED"})
    time.sleep(2)
    assert slurm.state(job) == "CANCELLED"


def test_a_sweeps_worker_is_queued_again_and_its_trial_goes_on(
    slurm: Cluster, run_config: dict[str, Any], tmp_path: Path
) -> None:
    """Slurm says so with SIGUSR1 to the batch script, here at once."""
    run_config["train"]["steps"] = 100000
    sweep = {
        "name": "rates",
        "output": str(tmp_path / "sweep"),
        "base": written(run_config),
        "space": {"students.0.optimizer.lr": {"values": [1e-3]}},
        "sampler": "grid",
        "objectives": [{"metric": "heldout/total"}],
    }
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(sweep))
    script = ("launcher/slurm/sweep.sbatch", "--config", str(tmp_path / "sweep.yaml"))
    job, trial = slurm.sbatch("--nodes=1", *ONE_TASK, *script), str(tmp_path / "sweep/trials/0000")
    wait_for(slurm, job, trial, "training")
    slurm.ask("scancel", "--batch", "--signal=USR1", job)
    stopped = wait_for(slurm, job, trial, "stopped")
    started = wait_for(slurm, job, trial, "started", 2)
    assert started["step"] == stopped["step"] and slurm.about(job)["Restarts"] == "1"
    slurm.ask("scancel", job)
    slurm.wait(job, {"CANCELLED"})


def test_a_task_of_an_array_is_queued_again_alone(slurm: Cluster, tmp_path: Path) -> None:
    """One task of an array has the number of the whole array."""
    script = tmp_path / "task.sh"
    again = "from launcher import slurm_job; assert slurm_job.of_this_process().requeue([])"
    script.write_text(
        "#!/bin/bash\n"
        f'echo "$SLURM_JOB_ID ${{SLURM_RESTART_COUNT:-0}}" >> {tmp_path}/$SLURM_ARRAY_TASK_ID\n'
        f"until [[ -e {tmp_path}/1 && -e {tmp_path}/2 ]]; do sleep 0.1; done\n"
        "if [[ $SLURM_JOB_ID == $SLURM_ARRAY_JOB_ID && -z $SLURM_RESTART_COUNT ]]; then\n"
        f"    {sys.executable} -c '{again}'; sleep 60\n"
        "fi\n"
        f"until grep -q ' 1' {tmp_path}/[12]; do sleep 0.1; done\n"
    )
    array = slurm.sbatch("--array=1-2", "--nodes=1", "--requeue", *ONE_TASK, str(script))
    slurm.wait_for_all(array, {"COMPLETED"})
    starts = sorted((tmp_path / task).read_text().split() for task in "12")
    assert sorted(map(len, starts)) == [2, 4], "the other one was left alone"
    assert max(starts, key=len) == [array, "0", array, "1"]


def test_without_its_first_node_it_goes_on_on_the_other(
    slurm: Cluster, run_config: dict[str, Any], tmp_path: Path
) -> None:
    """The node with rank 0, the batch script and the supervisor dies. ``--nodes=1-2``: one will do."""
    run_config["train"]["steps"] = 100
    output = run_config["output"]
    job = slurm.sbatch("--nodes=1-2", *ONE_TASK, SCRIPT, "--config", written(run_config), f"output={output}")
    saved = wait_for(slurm, job, output, "saved")
    assert slurm.about(job)["BatchHost"] == "n1" and events(output, "started")[0]["ranks"] == 2
    slurm.kill_node("n1")
    try:
        assert ended(slurm, job) == ("0:0", "1"), slurm.log(job)
    finally:
        slurm.start_node("n1")
    started = events(output, "started")[1]
    assert (started["ranks"], started["resumed"]) == (1, True) and started["step"] >= saved["step"]


STAND_IN = """#!/bin/bash
# A run in place of launcher/general.py, which is the first argument; the last is output=FOLDER.
output="${@: -1}"; output="${output#output=}"
mkdir -p "$output"
event() { echo "{\\"event\\": \\"$1\\", \\"node\\": \\"$SLURMD_NODENAME\\"}" >> "$output/events.jsonl"; }
"""


def stand_in(folder: Path, body: str) -> dict[str, str]:
    """The environment of a job whose ranks are such a script."""
    (folder / "run.sh").write_text(STAND_IN + body)
    (folder / "run.sh").chmod(0o755)
    return {"PYTHON": str(folder / "run.sh"), "SUPERVISOR_PYTHON": "python3", "SUPERVISE": QUICK}


def test_a_node_lost_in_place(slurm: Cluster, tmp_path: Path) -> None:
    """``--no-kill`` and ``--min-nodes``: the job shrinks and starts again on what is left."""
    body = "((SLURM_PROCID == 0)) && event $SLURM_NTASKS; ((SLURM_NTASKS == 1)) && event finished && exit 0\n"
    environment = stand_in(tmp_path, body + f"sleep 4; ((SLURM_PROCID)) || exit {exits.LOST}; sleep 600\n")
    environment["SUPERVISE"] = "--pause=0.1 --min-nodes=1"
    job = slurm.sbatch("--nodes=2", "--no-kill", *ONE_TASK, SCRIPT, f"output={tmp_path}", **environment)
    wait_for(slurm, job, str(tmp_path), "2")
    slurm.kill_node("n2")
    try:
        assert ended(slurm, job) == ("0:0", "0"), slurm.log(job)
    finally:
        slurm.start_node("n2")
    assert [event["node"] for event in events(str(tmp_path), "finished")] == ["n1"]


def test_a_node_that_fails_twice_is_left_to_others(slurm: Cluster, tmp_path: Path) -> None:
    body = "event started; [[ $SLURMD_NODENAME == n2 ]] || kill -9 $$; event finished\n"
    environment = stand_in(tmp_path, body)
    job = slurm.sbatch("--nodes=1", *ONE_TASK, SCRIPT, f"output={tmp_path}", **environment)
    assert ended(slurm, job) == ("0:0", "1"), slurm.log(job)
    assert [event["node"] for event in events(str(tmp_path), "started")] == ["n1", "n1", "n2"]
    assert slurm.about(job)["ExcNodeList"] == "n1"


def test_what_always_fails_ends_and_keeps_counting_over_requeues(slurm: Cluster, tmp_path: Path) -> None:
    """Killed, stopped without a checkpoint, killed: two of these may be followed by another attempt."""
    body = (
        'event started; (($(wc -l < "$output/events.jsonl") == 3)) || kill -9 $$\n'
        f"event stopped; exit {exits.STOPPED}\n"
    )
    environment = stand_in(tmp_path, body.replace("== 3", "== 2"))
    job = slurm.sbatch("--nodes=1", *ONE_TASK, SCRIPT, f"output={tmp_path}", **environment)
    assert ended(slurm, job) == ("137:0", "1"), slurm.log(job)
    assert [event["event"] for event in events(str(tmp_path))] == ["started", "started", "stopped", "started"]


def test_what_the_user_must_correct_is_not_repeated(
    slurm: Cluster, run_config: dict[str, Any], tmp_path: Path
) -> None:
    script = (SCRIPT, "--config", written(run_config), f"output={tmp_path / 'run'}", "train.stesp=3")
    job = slurm.sbatch("--nodes=2", *ONE_TASK, *script)
    assert ended(slurm, job) == (f"{exits.WRONG}:0", "0"), slurm.log(job)
    assert slurm.log(job).count("supervise: srun") == 1 and "stesp" in slurm.log(job)
    job = slurm.sbatch("--nodes=1", *ONE_TASK, SCRIPT)
    assert ended(slurm, job) == ("2:0", "0") and "usage: sbatch" in slurm.log(job)
