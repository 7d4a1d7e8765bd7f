"""What is found out before ranks meet, in this process: nothing is loaded, nothing is started."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from configs.load import ConfigError, load_config
from configs.schema import RunConfig
from launcher.checks import check
from tests.launcher.conftest import written
from tests.trainer.saved import checkpoint, keep
from trainer.checkpoint import EngineState, save
from trainer.world import World

ALONE = World(0, 1, 0, 1, torch.device("cpu"))


def test_a_sound_run_gives_its_corpora(run_config: dict[str, Any]) -> None:
    corpora = check(load_config(RunConfig, written(run_config), []), ALONE)
    assert [part.name for part in corpora.parts] == ["tiny"]


def test_all_problems_come_together(run_config: dict[str, Any]) -> None:
    run_config["data"]["corpus"] = "/nowhere"
    run_config["teacher"]["model"] = "/no/teacher"
    with pytest.raises(ConfigError) as error:
        check(load_config(RunConfig, written(run_config), []), replace(ALONE, size=5))
    for part in ("global_batch_rows=24 is not a multiple of 20", "/nowhere", "/no/teacher"):
        assert part in str(error.value)


def test_a_start_from_another_student_is_found_out_before_anything_is_loaded(
    run_config: dict[str, Any], tmp_path: Path
) -> None:
    state = EngineState({"projections.0.weight": torch.zeros(48, 32)}, {}, updates=1, loss_scale={})
    folder = save(tmp_path, replace(checkpoint(1), students={"small": state}), keep(1)) / "small"
    with pytest.raises(ConfigError) as error:
        check(load_config(RunConfig, written(run_config), [f"students.0.init={folder}"]), ALONE)
    assert "projections.0.weight (48, 32) instead of (48, 24)" in str(error.value)
    assert "projections.1.weight missing instead of (48, 24)" in str(error.value)
