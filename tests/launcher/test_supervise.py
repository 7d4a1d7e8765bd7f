"""What follows what, by table; then the supervisor around small commands that end in all ways."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from launcher import hostfile
from launcher.policy import Next, Record, complaint, decide, outcome, pause_s, place
from launcher.slurm_job import Job
from launcher.supervise import output_of
from tests.launcher.conftest import ROOT, command
from tests.launcher.test_stops import events, wait_for
from trainer import exits

AGAIN, REQUEUE, END = Next.again, Next.requeue, Next.end


@pytest.mark.parametrize(
    ("code", "events", "torchrun", "expected"),
    [
        (0, ["started", "training", "finished"], False, exits.DONE),
        (0, ["started", "training"], False, exits.LOST),  # deepspeed, whose own child was killed
        (1, ["started", "stopped"], True, exits.STOPPED),
        (-15, ["started", "training", "stopped"], False, exits.STOPPED),  # deepspeed, asked to leave
        (75, ["started", "stopped"], False, exits.STOPPED),
        (-9, ["started"], False, 137),
        (247, ["started"], False, 247),
        (1, [], False, exits.FAILED),
        (1, ["started", "failed"], True, exits.FAILED),
        (1, ["started", "training"], True, exits.LOST),
        (2, [], False, exits.WRONG),
    ],
)
def test_what_the_run_ended_with(code: int, events: list[str], torchrun: bool, expected: int) -> None:
    assert outcome(code, events, torchrun) == expected


@pytest.mark.parametrize(
    ("code", "fruitless", "asked", "slurm", "expected"),
    [
        (exits.DONE, 0, False, True, END),
        (exits.FAILED, 0, False, True, END),
        (exits.WRONG, 0, True, True, END),
        (exits.INTERRUPTED, 0, False, False, END),
        (exits.STOPPED, 0, False, False, AGAIN),  # train.max_hours, or a signal to a rank alone
        (exits.STOPPED, 0, True, False, END),
        (exits.STOPPED, 0, False, True, REQUEUE),
        (exits.STOPPED, 3, True, True, REQUEUE),
        (exits.STOPPED, 4, True, True, END),
        (exits.LOST, 3, False, True, AGAIN),
        (137, 3, False, False, AGAIN),
        (137, 4, False, True, END),
        (138, 1, True, True, REQUEUE),  # asked before it could save
        (138, 1, True, False, END),
    ],
)
def test_what_follows(code: int, fruitless: int, asked: bool, slurm: bool, expected: Next) -> None:
    assert decide(code, Record(fruitless), 3, asked, slurm) is expected


def test_a_new_checkpoint_forgives_and_a_node_that_fails_twice_is_bad() -> None:
    once = Record().after(False, "n2")
    assert (once.fruitless, once.bad_nodes) == (1, set())
    twice = once.after(False, None).after(False, "n2")
    assert (twice.fruitless, twice.bad_nodes) == (3, {"n2"})
    assert twice.after(True, "n2") == Record()
    assert [pause_s(Record(count), 10.0) for count in (0, 1, 2, 3, 9)] == [0.0, 10.0, 20.0, 40.0, 300.0]


@pytest.mark.parametrize(
    ("up", "bad", "elsewhere", "least", "expected"),
    [
        ("abc", "", 9, 3, (AGAIN, "abc")),
        ("ab", "", 9, 2, (AGAIN, "ab")),  # one lost, and fewer will do
        ("ab", "", 9, 3, (REQUEUE, "")),
        ("abc", "b", 9, 2, (AGAIN, "ac")),
        ("abc", "b", 3, 3, (REQUEUE, "b")),  # three others are to be had
        ("abc", "b", 2, 3, (AGAIN, "abc")),  # they are not
        ("", "", 9, 1, (REQUEUE, "")),
    ],
)
def test_where_it_goes_on(up: str, bad: str, elsewhere: int, least: int, expected: tuple[Next, str]) -> None:
    where, names = place(list(up), set(bad), elsewhere, wanted=3, least=least)
    assert (where, "".join(names)) == expected


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("srun: error: n2: task 1: Killed", ("n2", None)),
        ("srun: error: gpu-07: task 1: Exited with exit code 1", ("gpu-07", 1)),
        ("srun: error: n1: task 0: Exited with exit code 76", (None, 76)),
        ("srun: error: n[1-2]: tasks 0-1: Exited with exit code 2", (None, 2)),
        ("srun: error: n1: task 0: Terminated", (None, None)),
        ("srun: error: Task launch for StepId=1.1 failed on node n2: Communication failure", ("n2", None)),
        ("srun: launch/slurm: _step_signal: Terminating StepId=1.0", None),
        ("srun: error: Timed out waiting for job step to complete", None),
    ],
)
def test_whom_srun_blames(line: str, expected: tuple[str | None, int | None] | None) -> None:
    assert complaint(line) == expected


def supervise(folder: Path, script: str, *options: str) -> subprocess.Popen[str]:
    """The supervisor around a Bash script that has the run's folder as $1."""
    words = [sys.executable, "launcher/supervise.py", "--pause=0.05", f"--output={folder}", *options, "--"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
    return subprocess.Popen(
        [*words, "bash", "-c", script, "run", str(folder)],
        cwd=ROOT,
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
    )


EVENT = 'event() { mkdir -p "$1/checkpoints/"; echo "{\\"event\\": \\"$2\\"}" >> "$1/events.jsonl"; }; '


def test_it_starts_again_as_long_as_there_is_progress(tmp_path: Path) -> None:
    """Killed five times; each time but the last two it had saved. Two fruitless attempts are allowed."""
    script = EVENT + (
        'event "$1" started; n=$(wc -l < "$1/events.jsonl"); ((n > 5)) && event "$1" finished && exit 0; '
        '((n < 4)) && mkdir "$1/checkpoints/step-0000000$n"; kill -9 $$'
    )
    process = supervise(tmp_path, script, "--retries=2")
    assert process.stderr is not None
    said = process.stderr.read()
    assert process.wait() == 0, said
    assert said.count("ended with 137") == 5


def test_it_gives_up_with_the_last_code(tmp_path: Path) -> None:
    process = supervise(tmp_path, EVENT + 'event "$1" started; kill -9 $$', "--retries=2")
    assert process.wait() == 137
    assert len((tmp_path / "events.jsonl").read_text().splitlines()) == 3


@pytest.mark.parametrize("code", [1, 2])
def test_what_cannot_help_is_not_repeated(tmp_path: Path, code: int) -> None:
    process = supervise(tmp_path / "run", EVENT + f'event "$1" started; exit {code}')
    assert process.wait() == code
    assert len((tmp_path / "run/events.jsonl").read_text().splitlines()) == 1


def test_signals_are_handed_on_once_and_what_the_launcher_leaves_behind_is_waited_for(tmp_path: Path) -> None:
    """A launcher that dies by the signal and leaves its rank alone, as deepspeed's does."""
    rank = (
        "import json, signal, sys, time, pathlib\n"
        "got = []\n"
        "signal.signal(signal.SIGTERM, lambda number, frame: got.append(number))\n"
        "pathlib.Path(sys.argv[1], 'ready').touch()\n"
        "while not got: time.sleep(0.01)\n"
        "time.sleep(1)\n"
        "pathlib.Path(sys.argv[1], 'events.jsonl').write_text(json.dumps({'event': 'stopped', 'got': got}))\n"
    )
    (tmp_path / "rank.py").write_text(rank)
    process = supervise(tmp_path, f'{sys.executable} "$1/rank.py" "$1" & wait')
    while not (tmp_path / "ready").exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGUSR1)
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == exits.STOPPED
    stopped = json.loads((tmp_path / "events.jsonl").read_text())
    assert stopped["got"] == [signal.SIGTERM]


def test_without_a_run_folder_it_says_how_to_name_it(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "launcher/supervise.py")]
    done = subprocess.run([*command, "--", "python", "x.py"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and "Set output=FOLDER" in done.stderr
    assert subprocess.run(command, capture_output=True, cwd=tmp_path).returncode == 2


def test_a_narrowed_hostfile(tmp_path: Path) -> None:
    old, new = tmp_path / "hosts", tmp_path / "fewer"
    old.write_text("# ours\nnode1 slots=8\n\nnode2 slots=8  # new\nnode3 slots=4\n")
    command = ["deepspeed", f"--hostfile={old}", "--master_addr", "node1", "launcher/general.py"]
    assert hostfile.find(command) == old and list(hostfile.read(old)) == ["node1", "node2", "node3"]
    changed = hostfile.narrowed(command, old, new, ["node2", "node3"])
    assert changed == ["deepspeed", f"--hostfile={new}", "--master_addr", "node2", "launcher/general.py"]
    assert new.read_text() == "node2 slots=8\nnode3 slots=4\n"
    assert hostfile.find(["deepspeed", "--hostfile", "h", "x.py"]) == Path("h")
    assert hostfile.find(["deepspeed", "x.py"]) is None


def test_a_step_on_fewer_nodes() -> None:
    environment = {"SLURM_JOB_ID": "30007", "SLURM_JOB_NUM_NODES": "3", "SLURM_GPUS_PER_NODE": "a100:8"}
    command, tasks = ["srun", "--wait=30", "python"], "--ntasks-per-node=8"
    whole = Job(environment).step(command, ["a", "b", "c"])
    assert whole == ["srun", "--nodes=3", "--ntasks=24", tasks, *command[1:]]
    fewer = Job(environment).step(command, ["a", "c"])
    left = ["--nodelist=a,c", "--overlap"]
    assert fewer == ["srun", "--nodes=2", "--ntasks=16", tasks, *left, *command[1:]]
    assert "--ntasks=6" in Job(environment | {"SLURM_NTASKS_PER_NODE": "2"}).step(command, ["a", "b", "c"])


@pytest.mark.network_of_ranks
def test_torchrun_is_the_inner_loop(run_config: dict[str, Any], tmp_path: Path) -> None:
    """A rank killed: torchrun starts its workers again, and the supervisor has nothing to do."""
    run_config["train"]["steps"] = 60
    output = run_config["output"]
    launch = command(tmp_path, run_config, f"output={output}", ranks=2, by="torchrun")
    launch.insert(launch.index("--nproc_per_node"), "--max-restarts=1")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "launcher/supervise.py"), "--", *launch],
        env={**environment, "DS_ACCELERATOR": "cpu"},
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for(process, output, "saved")
    (torchrun,) = psutil.Process(process.pid).children()
    torchrun.children()[1].kill()
    assert process.stderr is not None
    said = process.stderr.read()
    assert process.wait() == 0, said
    assert [event["resumed"] for event in events(output, "started")] == [False, True]
    assert said.count("supervise: ") == 2, "one command, one end"


def test_the_folder_of_a_tasks_stage_is_within_the_tasks():
    assert output_of(["torchrun", "x.py", "output=a", "output=runs/sst2"]) == Path("runs/sst2")
    assert output_of(["srun", "x.py", "stage=teacher", "output=runs/sst2"]) == Path("runs/sst2/teacher")
    assert output_of(["srun", "x.py"]) is None
