"""What is found out before ranks meet, in this process: nothing is loaded, nothing is started."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from configs.load import ConfigError, load_config
from configs.schema import RunConfig
from launcher.checks import check
from tests.launcher.conftest import written
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
