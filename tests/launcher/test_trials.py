"""Trials in their storage: workers that share them, one of them killed; samplers, pruners, what is kept."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from math import log10
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import yaml

from configs.load import ConfigError, load_config
from configs.schema import RunConfig
from configs.sweep import load_sweep
from launcher.sweep_results import table, write_results
from launcher.trials import Trials
from tests.launcher.conftest import ROOT, student

RATE = "students.0.optimizer.lr"
WORKER = """
import sys
from configs.sweep import load_sweep
from launcher.trials import Trials
trials = Trials(*load_sweep(sys.argv[1], []))
while (taken := trials.take()) is not None:
    for number, trial in taken.open.items():
        print(number, flush=True)
        trials.report(trial, {1: 0.5})
        trials.complete(number, [1.0])
    taken.log.close()
"""


def write(folder: Path, **changes: Any) -> Path:
    """A sweep and its base, which needs nothing to be loaded."""
    folder.mkdir(exist_ok=True)
    base = {
        "name": "base",
        "output": str(folder / "base"),
        "teacher": {"model": "teacher"},
        "students": [student("small")],
        "data": {"corpus": "corpus"},
        "train": {"steps": 10},
    }
    sweep = {
        "name": "sweep",
        "output": str(folder / "sweep"),
        "base": str(folder / "base.yaml"),
        "space": {RATE: {"low": 1e-5, "high": 1e-3, "log": True}, "train.seed": {"low": 0, "high": 9}},
        "objectives": [{"metric": "heldout/total"}],
        "sampler": "random",
        "trials": 6,
        **changes,
    }
    (folder / "base.yaml").write_text(yaml.safe_dump(base))
    (folder / "sweep.yaml").write_text(yaml.safe_dump(sweep))
    return folder / "sweep.yaml"


def opened(path: Path, *overrides: str) -> Trials:
    return Trials(*load_sweep(path, list(overrides)))


def drained(trials: Trials) -> dict[int, dict[str, Any]]:
    """Take and complete all trials; their settings by number."""
    found = {}
    while (taken := trials.take()) is not None:
        found |= taken.trials
        for number in taken.open:
            trials.complete(number, [float(number)] * len(trials.sweep.objectives))
        taken.log.close()
    return found


def test_workers_share_the_trials_and_one_is_killed(tmp_path: Path) -> None:
    """Three workers; one is killed without warning at some moment: taking, asking, telling."""
    path = write(tmp_path, trials=60, packed=1)
    command = [sys.executable, "-c", WORKER, str(path)]
    workers = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    while len(list((tmp_path / "sweep/trials").glob("*.log"))) < 20:
        time.sleep(0.01)
    workers[0].send_signal(signal.SIGKILL)
    said = [[int(line) for line in worker.communicate(timeout=240)[0].split()] for worker in workers]
    assert [worker.returncode for worker in workers] == [-signal.SIGKILL, 0, 0]
    trials = opened(path)
    drained(trials)  # what the killed one left, if it was so late that nobody came by
    results = trials.results()
    assert [result.number for result in results] == list(range(60))
    assert {result.state for result in results} == {"complete"}
    assert all(result.settings.keys() == {RATE, "train.seed"} for result in results)
    twice = [number for number, count in Counter(sum(said, [])).items() if count > 1]
    assert twice in ([], said[0][-1:]), "but for that of the killed one, each was run by one"


def test_who_is_alive_is_left_alone(tmp_path: Path) -> None:
    """A trial whose worker is gone, but whose run still writes its log, is not taken."""
    first = opened(write(tmp_path, trials=1))
    taken = first.take()
    assert taken is not None and first.take() is None
    run = subprocess.Popen(["sleep", "60"], stdout=taken.log)
    taken.log.close()
    second = opened(tmp_path / "sweep.yaml")
    assert second.take() is None
    run.kill()
    run.wait()
    again = second.take()
    assert again is not None and again.trials == taken.trials and list(again.open) == [0]


def test_draws_do_not_depend_on_restarts(tmp_path: Path) -> None:
    whole = drained(opened(write(tmp_path / "whole")))
    apart, path = {}, write(tmp_path / "apart")
    for _ in range(3):  # a worker that is started three times, and leaves after two trials
        trials = opened(path)
        for _ in range(2):
            taken = trials.take()
            assert taken is not None
            trials.complete(taken.number, [0.0])
            apart |= taken.trials
    assert apart == whole and len(whole) == 6
    assert len({settings[RATE] for settings in whole.values()}) == 6
    assert all(isinstance(settings["train.seed"], int) for settings in whole.values())
    other = drained(opened(write(tmp_path / "other", seed=1)))
    assert other[0] != whole[0]


def test_a_grid_is_every_combination_once_in_packs(tmp_path: Path) -> None:
    space = {RATE: {"values": [1e-5, 1e-4, 1e-3]}, "students.0.layer_map": {"values": ["last", [2, 4]]}}
    path = write(tmp_path, space=space, sampler="grid", trials=None, packed=4)
    trials = opened(path)
    taken = trials.take()
    assert taken is not None and list(taken.trials) == [0, 1, 2, 3]
    taken.log.close()
    trials = opened(path)  # whose worker was killed: the pack stays together
    again = trials.take()
    assert again is not None and again.trials == taken.trials
    for number in again.open:
        trials.complete(number, [0.0])
    again.log.close()
    rest = drained(trials)
    assert list(rest) == [4, 5]
    found = [(own[RATE], str(own["students.0.layer_map"])) for own in (again.trials | rest).values()]
    assert sorted(found) == sorted((rate, m) for rate in (1e-5, 1e-4, 1e-3) for m in ("[2, 4]", "last"))


def test_tpe_goes_where_it_is_good(tmp_path: Path) -> None:
    """A figure that is best at a rate of 1e-4, of four decades: random draws are a decade off."""
    space = {RATE: {"low": 1e-6, "high": 1e-2, "log": True}}
    trials, off = opened(write(tmp_path, sampler="tpe", trials=40, space=space)), []
    while (taken := trials.take()) is not None:
        off.append(abs(log10(taken.trials[taken.number][RATE]) + 4))
        trials.complete(taken.number, [off[-1]])
        taken.log.close()
    assert median(off[20:]) < 0.5


@pytest.mark.parametrize(
    "pruner, ended",
    [
        ({"kind": "none"}, [False, False, False, False]),
        # Worse at step 20 than the median of those before.
        ({"kind": "median", "startup_trials": 2, "min_steps": 15}, [False, False, True, False]),
        # One in two goes on beyond step 10.
        ({"kind": "asha", "min_steps": 10, "reduction_factor": 2}, [False, True, True, False]),
    ],
)
def test_pruners(tmp_path: Path, pruner: dict[str, Any], ended: list[bool]) -> None:
    trials = opened(write(tmp_path, pruner=pruner, trials=4))
    found = []
    for level in (3.0, 4.0, 5.0, 1.0):
        taken = trials.take()
        assert taken is not None
        trial = taken.open[taken.number]
        series: dict[int, float] = {0: 0.1}  # before training: nothing to judge by
        for step in (10, 20):
            series[step] = level
            if over := trials.report(trial, series):
                trials.prune(taken.number)
                break
        else:
            trials.complete(taken.number, [level])
        found.append(over)
    assert found == ended
    states = [result.state for result in trials.results()]
    assert states == ["pruned" if own else "complete" for own in ended]
    assert all(0 not in result.reported for result in trials.results())


def test_another_sweep_is_refused_and_a_longer_one_is_not(tmp_path: Path) -> None:
    path = write(tmp_path)
    first = drained(opened(path))
    assert drained(opened(path)) == {}
    assert list(drained(opened(path, "trials=8", "jobs=2"))) == [6, 7] and len(first) == 6
    with pytest.raises(ConfigError, match="seed is not what it was when this sweep was started"):
        opened(path, "seed=3")
    base = tmp_path / "base.yaml"
    base.write_text(base.read_text().replace("steps: 10", "steps: 11"))
    with pytest.raises(ConfigError, match="base is not what it was"):
        opened(path)


def test_values_that_do_not_fit_each_other_fail_alone(tmp_path: Path) -> None:
    """Each is good with the base. Such a trial starts no run, and its pack goes on without it."""
    space = {"students.0.hidden_size": {"values": [24, 36]}, "students.0.heads": {"values": [4, 8]}}
    path = write(tmp_path, space=space, sampler="grid", trials=None, packed=4)
    path.write_text(path.read_text() + "overrides: [tracking.enabled=false]\n")
    trials = opened(path)
    taken = trials.take()
    assert taken is not None
    wrong = {"students.0.hidden_size": 36, "students.0.heads": 8}
    for number, settings in taken.trials.items():
        if settings != wrong:
            trials.complete(number, [1.0])
    taken.log.close()
    command = [sys.executable, "launcher/sweep.py", "--config", str(path)]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "DS_ACCELERATOR": "cpu"}, capture_output=True)
    assert done.returncode == 1, done.stderr
    (failed,) = [result for result in trials.results() if result.error]
    assert failed.settings == wrong and "36 is not a multiple of heads=8" in failed.error
    assert not list((tmp_path / "sweep/trials").glob("*/"))


def test_a_line_that_a_full_disk_cut_short(tmp_path: Path) -> None:
    path = write(tmp_path, trials=2)
    trials = opened(path)
    taken = trials.take()
    assert taken is not None
    trials.complete(0, [0.5])
    taken.log.close()
    with (tmp_path / "sweep/journal.jsonl").open("ab") as journal:
        journal.write(b'{"op_code":4,"work')
    drained(opened(path))
    assert [result.values for result in opened(path).results()] == [[0.5], [1.0]]


def test_a_database_instead_of_the_file(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/trials.db"
    path = write(tmp_path / "one", storage=url)
    assert len(drained(opened(path))) == 6 and not (tmp_path / "one/sweep/journal.jsonl").exists()
    assert len(opened(path).results()) == 6
    with pytest.raises(
        ConfigError, match="storage holds such a sweep, of another output; choose another name"
    ):
        opened(write(tmp_path / "two", storage=url))
    with pytest.raises(ValueError, match="storage=.* cannot be used: .*unable to open"):
        opened(write(tmp_path / "three", storage=f"sqlite:///{tmp_path}/nowhere/trials.db"))


def test_the_best_become_configs_that_run(tmp_path: Path) -> None:
    goals = [{"metric": "heldout/score/accuracy"}, {"metric": "student/parameters"}]
    path = write(tmp_path, objectives=goals, trials=4)
    trials = opened(path)
    for values in ([0.9, 100.0], [0.8, 50.0], [0.7, 70.0]):
        taken = trials.take()
        assert taken is not None
        trials.complete(taken.number, values)
    failed = trials.take()
    assert failed is not None
    trials.fail(failed.open[3], "it broke")
    written = write_results(trials.sweep, load_sweep(path, [])[1], trials)
    assert [file.name for file in written] == ["trial-0000.yaml", "trial-0001.yaml"], (
        "2 is worse in both than 1"
    )
    kept = json.loads((tmp_path / "sweep/trials.json").read_text())
    assert kept["best"] == [0, 1] and [trial["state"] for trial in kept["trials"]] == ["complete"] * 3 + [
        "failed"
    ]
    assert kept["trials"][3]["error"] == "it broke" and kept["trials"][1]["folder"] == "trials/0001"
    assert [own["direction"] for own in kept["objectives"]] == ["maximize", "minimize"]
    run = load_config(RunConfig, written[1])
    assert run.students[0].optimizer.lr == kept["trials"][1]["settings"][RATE]
    assert run.output == str(tmp_path / "sweep/pareto/trial-0001") and run.students[0].name == "small"
    drawn = table(trials.sweep, trials.results(), trials.best())
    assert list(drawn.columns[0].cells) == ["*0", "*1", "2", "3"]
