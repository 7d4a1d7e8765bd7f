"""Sweeps: every problem is named before anything starts, and trials become the runs that they should be."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from configs.load import ConfigError, load_config
from configs.schema import RunConfig
from configs.sweep import arguments_of, choices, direction, folder_of, load_sweep, total_trials, yaml_of
from configs.sweep_schema import AxisConfig, Direction, ObjectiveConfig
from configs.task_schema import TaskConfig

STUDENT = {"name": "tiny", "layers": 2, "hidden_size": 24, "heads": 4, "intermediate_size": 48}
RATE = "students.0.optimizer.lr"


@pytest.fixture
def base(tmp_path: Path) -> dict[str, Any]:
    return {
        "name": "general",
        "output": str(tmp_path / "general"),
        "teacher": {"model": "teacher"},
        "students": [STUDENT],
        "data": {"corpus": "corpus"},
        "train": {"steps": 10, "global_batch_rows": 32},
    }


@pytest.fixture
def sweep(tmp_path: Path) -> dict[str, Any]:
    return {
        "name": "rates",
        "output": str(tmp_path / "sweep"),
        "base": str(tmp_path / "base.yaml"),
        "space": {RATE: {"low": 1e-5, "high": 1e-3, "log": True}},
        "objectives": [{"metric": "heldout/total"}],
        "trials": 5,
    }


def loaded(sweep: dict[str, Any], base: dict[str, Any]):
    Path(sweep["base"]).write_text(yaml.safe_dump(base))
    path = Path(sweep["base"]).with_name("sweep.yaml")
    path.write_text(yaml.safe_dump(sweep))
    return load_sweep(path, [])


def run_from(arguments: list[str], schema: type = RunConfig):
    """The config as a launcher reads it from its command line."""
    assert arguments[0] == "--config"
    return load_config(
        schema, arguments[1], [text for text in arguments[2:] if not text.startswith("stage=")]
    )


def test_all_problems_come_at_once(sweep, base):
    base["train"]["stesp"] = 3
    sweep |= {
        "name": "two words",
        "trials": None,
        "jobs": 2,
        "packed": 2,
        "stage": "prediction",
        "overrides": ["train.seed=1"],
        "pruner": {"kind": "median", "min_steps": 0},
        "objectives": [{"metric": "heldout/total"}, {"metric": "speed/rows_per_s"}, {"metric": "loss/total"}],
        "space": {
            "output": {"values": ["a"]},
            "students.0.name": {"values": ["a"]},
            "train.seed": {"values": [1, 2]},
            "train.epochs": {"low": 2, "high": 1},
            "students.0.layers": {"low": "two", "high": 4},
            "students.0.heads": {"values": [2, 2], "step": 1},
            "students.0.init": {"values": []},
            "students.0.losses.hidden": {"low": 0, "high": 1, "log": True, "step": 0.5},
            "students.0.losses.cosine": {"low": 0},
        },
    }
    with pytest.raises(ConfigError) as raised:
        loaded(sweep, base)
    for told in (
        r"name='two words' must be letters",
        r"trials is missing: sampler=tpe has no end",
        r"pruner.min_steps=0 must be at least 1",
        r"stage=prediction goes with launcher=task only",
        r"pruner.kind=median needs one objective, not 3",
        r"pruner.kind=median needs an objective that is measured during training .*not speed/rows_per_s",
        r"pruner.kind=median and packed=2: a student does not leave",
        r"objectives.2.metric=loss/total is not known; known: heldout/<loss>",
        r"objectives.1.metric=speed/rows_per_s is that of the run, which packed=2 trials share",
        r"objectives.1.metric=speed/rows_per_s is a time, which jobs=2 at a time would change",
        r"space.output: every trial has its own",
        r"space.students.0.name: every trial has its own",
        r"space.train.seed cannot differ between the packed=2 trials",
        r"space.train.seed is also in overrides",
        r"space.train.epochs: low=2 must be below high=1",
        r"space.students.0.layers.low='two' is not a number",
        r"space.students.0.heads: values and step exclude each other",
        r"space.students.0.heads.values=\[2, 2\] holds a value twice",
        r"space.students.0.init.values=\[\] must hold at least one",
        r"space.students.0.losses.hidden: low=0 must be above 0 where log=true",
        r"space.students.0.losses.hidden: step=0.5 and log=true exclude each other",
        r"space.students.0.losses.cosine needs values, or low and high",
        r"unknown key train.stesp; did you mean train.steps",
    ):
        assert re.search(told, str(raised.value)), f"{told} is not in {raised.value}"


def test_every_value_is_tried_on_the_base(sweep, base):
    sweep["space"] = {
        "students.0.hidden_size": {"values": [24, 25]},
        "students.0.optimizer.lrr": {"low": 1, "high": 2},
        "train.micro_batch_rows": {"low": 16, "high": 48},
    }
    with pytest.raises(ConfigError) as raised:
        loaded(sweep, base)
    problems = raised.value.problems
    assert any(
        "hidden_size=25: students.0.hidden_size=25 is not a multiple of heads=4" in p for p in problems
    )
    assert sum("unknown key students.0.optimizer.lrr" in problem for problem in problems) == 2
    assert any(re.search("rows=48: train.global_batch_rows=32 is not a multiple", p) for p in problems)
    assert len(problems) == 4


def test_what_the_base_does_not_measure_or_train(sweep, base):
    sweep["objectives"].append({"metric": "probe/sst2/accuracy"})
    sweep |= {"sampler": "grid"}
    base |= {"students": [STUDENT, {**STUDENT, "name": "other"}], "evaluation": {"every_steps": None}}
    with pytest.raises(ConfigError) as raised:
        loaded(sweep, base)
    for told in (
        "2 students; a sweep judges one",
        "evaluation.every_steps is not set, so heldout/",
        "probes.every_steps is not set, so probe/",
        f"space.{RATE} must list its values: sampler=grid",
    ):
        assert told in str(raised.value)
    Path(sweep["base"]).unlink()
    with pytest.raises(ConfigError, match="base=.* does not exist"):
        load_sweep(Path(sweep["base"]).with_name("sweep.yaml"), ["sampler=tpe"])


def test_a_trial_is_a_run_of_its_own(sweep, base, tmp_path):
    base["tracking"] = {"under": ["wiki"]}
    sweep["overrides"] = ["train.steps=7"]
    config, own = loaded(sweep, base)
    settings = {RATE: 2e-5, "students.0.layer_map": [1, 3]}
    run = run_from(arguments_of(config, own, {3: settings}, tmp_path / "0003", "sqlite:///here"))
    assert run.output == str(tmp_path / "0003") == str(folder_of(config, tmp_path / "0003"))
    (student,) = run.students
    assert (student.name, student.optimizer.lr, student.layer_map) == ("tiny", 2e-5, [1, 3])
    assert run.train.steps == 7
    tracking = run.tracking
    assert (tracking.run_name, tracking.under, tracking.uri) == (
        "trial-0003",
        ["wiki", "rates"],
        "sqlite:///here",
    )
    assert tracking.tags == {"sweep": "rates", "trial": "3"}


def test_packed_trials_are_the_students_of_one_run(sweep, base, tmp_path):
    sweep["packed"] = 2
    config, own = loaded(sweep, base)
    trials = {4: {RATE: 1e-5}, 5: {RATE: 1e-4, "students.0.overrides": {"hidden_dropout_prob": 0.0}}}
    run = run_from(arguments_of(config, own, trials, tmp_path / "0004", None))
    assert [student.name for student in run.students] == ["trial-0004", "trial-0005"]
    assert [student.optimizer.lr for student in run.students] == [1e-5, 1e-4]
    assert [student.overrides for student in run.students] == [{}, {"hidden_dropout_prob": 0.0}]
    assert run.tracking.tags == {"sweep": "rates", "trials": "4,5"}
    one = run_from(arguments_of(config, own, {6: {RATE: 1e-5}}, tmp_path / "0006", None))
    assert [student.name for student in one.students] == ["trial-0006"], "the last pack may be small"


def test_a_tasks_trial_reads_what_earlier_stages_left(sweep, tmp_path):
    base = {
        "task": "sst2",
        "output": "runs/sst2",
        "source": {"path": "glue"},
        "teacher": {"model": "teacher"},
        "students": [STUDENT],
        "finetuned": "elsewhere/teacher",
    }
    sweep |= {"launcher": "task", "space": {"prediction.optimizer.lr": {"low": 1e-5, "high": 1e-3}}}
    with pytest.raises(ConfigError, match="stage=None: with launcher=task give one of stage=teacher"):
        loaded(sweep, base)
    config, own = loaded({**sweep, "stage": "prediction"}, base)
    arguments = arguments_of(config, own, {0: {"prediction.optimizer.lr": 3e-5}}, tmp_path / "0000", None)
    assert "stage=prediction" in arguments
    assert folder_of(config, tmp_path / "0000") == tmp_path / "0000/prediction"
    run = run_from(arguments, TaskConfig)
    assert (run.output, run.prediction.optimizer.lr) == (str(tmp_path / "0000"), 3e-5)
    assert (run.corpus, run.finetuned) == ("runs/sst2/data", "elsewhere/teacher")
    assert run.teacher.logits_folder == "runs/sst2/teacher_logits", "computed once for all trials"
    assert (run.start.value, run.students[0].init) == ("init", "runs/sst2/intermediate/export/tiny")
    kept = tmp_path / "best.yaml"
    kept.write_text(yaml_of(config, own, {"prediction.optimizer.lr": 3e-5}, "the best", kept))
    again = load_config(TaskConfig, kept)
    assert (again.output, again.students[0].init) == (str(tmp_path / "best"), run.students[0].init)
    assert "launcher/task.py" in kept.read_text() and "stage=prediction" in kept.read_text()


def test_numbers_of_trials_and_directions(sweep, base):
    sweep |= {"sampler": "grid", "trials": None}
    sweep["space"] = {RATE: {"values": [1e-5, 1e-4]}, "train.seed": {"values": [0, 1, 2]}}
    assert total_trials(loaded(sweep, base)[0]) == 6
    assert total_trials(loaded({**sweep, "trials": 4}, base)[0]) == 4
    assert total_trials(loaded({**sweep, "trials": 40}, base)[0]) == 6
    high = ["heldout/score/accuracy", "probe/sst2/f1", "speed/rows_per_s"]
    low = ["heldout/total", "heldout/corpus/wiki/total", "student/parameters", "student/latency_ms"]
    for metrics, expected in ((high, Direction.maximize), (low, Direction.minimize)):
        assert {direction(ObjectiveConfig(metric)) for metric in metrics} == {expected}
    assert direction(ObjectiveConfig("heldout/total", Direction.maximize)) is Direction.maximize
    assert list(choices(AxisConfig(values=["uniform", [1, 2], None, 3]))) == ["uniform", "[1, 2]", None, 3]
