"""Quarantine: what one rank finds damaged, all ranks mask from the same step on."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from sharding.stream import Batch, Damage
from trainer.checkpoint import Progress
from trainer.quarantine import mask_damaged
from trainer.world import World

ROOT = Path(__file__).resolve().parents[2]


def batch(*damage: Damage) -> Batch:
    """Four rows of length 5: corpus 0 block 1, corpus 0 block 2, corpus 1 block 1, corpus 0 block 1."""
    length_B = torch.full((4,), 5)
    corpus_B, block_B = torch.tensor([0, 0, 1, 0]), torch.tensor([1, 2, 1, 1])
    return Batch(
        4, torch.ones(4, 8, dtype=torch.int64), length_B, length_B, corpus_B, block_B, block_B, damage
    )


@pytest.fixture
def group(tmp_path: Path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield World(0, 1, 0, 1, torch.device("cpu"))
    dist.destroy_process_group()


def test_rows_of_damaged_blocks_are_masked_from_then_on(group: World, caplog) -> None:
    progress = Progress(step=6)
    assert mask_damaged(batch(), progress, group).length_B.tolist() == [5, 5, 5, 5]
    masked = mask_damaged(batch(Damage(0, 1, "corrupt shard train/00000.tar")), progress, group)
    assert masked.length_B.tolist() == masked.segment_B.tolist() == [0, 5, 5, 0]
    assert progress.quarantined == [(0, 1)]
    assert "step 7: block quarantined" in caplog.text and "corrupt shard train/00000.tar" in caplog.text
    caplog.clear()
    assert mask_damaged(batch(Damage(0, 1, "again")), progress, group).length_B.tolist() == [0, 5, 5, 0]
    assert mask_damaged(batch(Damage(1, 1, "other")), progress, group).length_B.tolist() == [0, 5, 0, 0]
    assert progress.quarantined == [(0, 1), (1, 1)] and "again" not in caplog.text


RANKS = """
import json, os
import torch
from sharding.stream import Damage
from tests.trainer.test_quarantine import batch
from trainer import meeting, world
from trainer.checkpoint import Progress
from trainer.quarantine import mask_damaged
place = world.find(os.environ)
meeting.connect(place, os.environ)
progress, lengths = Progress(), []
own = {0: [[], [(1, 1)], []], 1: [[], [(0, 2), (0, 1)], []]}[place.rank]
for found in own:
    damage = [Damage(corpus, block, f"{corpus}/{block}") for corpus, block in found]
    lengths.append(mask_damaged(batch(*damage), progress, place).length_B.tolist())
print(json.dumps([progress.quarantined, lengths]), flush=True)
torch.distributed.destroy_process_group()
"""


@pytest.mark.network_of_ranks
def test_ranks_agree_on_what_any_of_them_found() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    started = [
        subprocess.Popen(
            [sys.executable, "-c", RANKS],
            cwd=ROOT,
            env={**os.environ, "RANK": rank, "WORLD_SIZE": "2", "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": "2",
                 "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "DS_ACCELERATOR": "cpu"},
            stdout=subprocess.PIPE, text=True,
        )
        for rank in ("0", "1")
    ]  # fmt: skip
    expected = [[[0, 1], [0, 2], [1, 1]], [[5, 5, 5, 5], [0, 0, 0, 0], [0, 0, 0, 0]]]
    assert [json.loads(process.communicate(timeout=120)[0]) for process in started] == [expected] * 2
