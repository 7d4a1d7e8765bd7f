"""The config of an evaluation: what its YAML looks like, and all its problems at once."""

from pathlib import Path

import pytest

from configs.evaluate_schema import EvaluateConfig
from configs.load import ConfigError, load_config, to_yaml

YAML = """
output: runs/report
tasks:
  - corpus: runs/sst2/data
    teacher: runs/sst2/teacher/export/teacher
    arms:
      student: [runs/sst2/seed-*/prediction/export/tiny]
      finetuned: [runs/sst2/seed-0/baseline/export/tiny, runs/sst2/seed-1/baseline/export/tiny]
latency: {repeats: 20}
"""


def test_a_config_is_read_and_written(tmp_path: Path) -> None:
    path = tmp_path / "evaluate.yaml"
    path.write_text(YAML)
    config = load_config(EvaluateConfig, path, ["aim=0.9"])
    assert config.tasks[0].arms["student"] == ["runs/sst2/seed-*/prediction/export/tiny"]
    assert (config.ship, config.aim, config.latency.repeats) == (["student"], 0.9, 20)
    path.write_text(to_yaml(config))
    assert load_config(EvaluateConfig, path) == config


def test_all_problems_are_told_at_once() -> None:
    overrides = [
        "output=r",
        "aim=0",
        "latency.batch_rows=[]",
        "ship=[other]",
        "tasks=[{corpus: c, teacher: t, arms: {teacher: [a], student: []}}]",
    ]
    with pytest.raises(ConfigError) as caught:
        load_config(EvaluateConfig, None, overrides)
    told = str(caught.value)
    assert len(caught.value.problems) == 5
    for part in (
        "aim=0",
        "latency.batch_rows=[]",
        "the arm 'teacher'",
        "arms.student names no model",
        "'other'",
    ):
        assert part in told
    with pytest.raises(ConfigError, match="tasks"):
        load_config(EvaluateConfig, None, ["output=r"])
