"""What is shown of a corpus says what was found, the bad news too."""

import numpy as np
import pytest

from launcher.corpus_views import show_rows, show_simulation
from sharding.peek import PeekedRow
from sharding.simulate import Leg, Simulation


def simulation(**findings: int) -> Simulation:
    leg = Leg(world_size=2, first_step=0, steps=5, blocks_of_rank=np.array([3, 4]))
    figures = {"step_blocks": [2, 1, 2, 2, 1], "step_largest": [1, 2, 1, 1, 2]}
    return Simulation(10, 4, 2, 5, [leg], neighbours=9, neighbour_distance_sum=27, **figures, **findings)


@pytest.mark.parametrize(
    "findings, line",
    [
        ({"rows_missed": 1}, "FAILED  every row exactly once per epoch (1 missed, 0 repeated)"),
        ({"batches_wrong": 2}, "FAILED  the same global batches as one rank (2 of 5 differ)"),
        ({"steps_uneven": 3}, "FAILED  every rank the same number of rows in every step (3 steps uneven)"),
        (
            {"seeks_wrong": 1},
            "FAILED  a restart continues where the run was, seek = replay (1 of 0 ranks differ)",
        ),
    ],
)
def test_a_broken_property_is_said(
    capsys: pytest.CaptureFixture[str], findings: dict[str, int], line: str
) -> None:
    show_simulation(simulation(**findings), epochs=1)
    lines = capsys.readouterr().out.splitlines()
    assert line in lines and sum(text.startswith("PROVED") for text in lines) == 3


def test_the_figures_of_a_simulation(capsys: pytest.CaptureFixture[str]) -> None:
    show_simulation(simulation(), epochs=1)
    shown = capsys.readouterr().out
    assert "0 .. 4" in shown and "3 .. 4" in shown
    assert "blocks in a global batch: 1 to 2, mean 1.6" in shown
    assert "lie 3 rows apart in the corpus, 90% of a perfect shuffle" in shown
    assert "all ranks together: 7, 1.8 times the corpus per epoch" in shown


def test_brackets_of_a_text_are_text(capsys: pytest.CaptureFixture[str]) -> None:
    row = PeekedRow(None, "train/00000.tar", "00000-0001", 7, 6, 4, "[CLS] [bold]x [SEP]", "[/red] [SEP]")
    show_rows([row], ["[CLS]", "[SEP]"])
    assert [line.rstrip() for line in capsys.readouterr().out.splitlines()] == [
        "train/00000.tar, block 00000-0001, row 7: 6 tokens, segment B from token 4",
        "A [CLS] [bold]x [SEP]",
        "B [/red] [SEP]",
        "",
    ]
