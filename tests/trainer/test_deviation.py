"""Deviations from float32, of teachers that are off by a known share."""

import pytest
import torch

from tests.trainer.tiny import rows
from trainer.capture import Captured
from trainer.deviation import deviations
from trainer.layout import Layout
from trainer.models import Inputs, attention_mask
from trainer.transfer import Transfer

E, H, D = 6, 2, 3


def off_by(hidden: float, query: float):
    """An encoder of one layer, off by these shares; its padding is off by far more."""

    def encode(inputs: Inputs) -> Captured:
        generator = torch.Generator().manual_seed(0)
        shape = inputs.ids_BS.shape
        hidden_BSE = torch.randn(*shape, E, generator=generator) * (1 + hidden)
        query_BHSD, key_BHSD = (torch.randn(shape[0], H, shape[1], D, generator=generator) for _ in "qk")
        padding_BS = ~inputs.layout.mask_BS
        hidden_BSE[padding_BS] = 1e4 * hidden
        return Captured([hidden_BSE, None], [query_BHSD * (1 + query)], [key_BHSD], [None], [0.5])

    return encode


def inputs() -> Inputs:
    ids_BS, mask_BS = rows()
    found = Layout(mask_BS, full=False)
    return Inputs(ids_BS, found, attention_mask(found), torch.zeros_like(ids_BS))


def learns(embedding: float, attention: float) -> Transfer:
    return Transfer(
        layer_map=(1,),
        attention_heads=H,
        embedding=embedding,
        hidden=0.0,
        attention=attention,
        layers=(1.0,),
    )


def test_every_kind_is_off_by_what_it_was_made_to_be():
    found = deviations(off_by(0.01, -0.03), off_by(0.0, 0.0), [], inputs(), E)
    assert found == {"hidden": pytest.approx(0.01, rel=1e-4), "scores": pytest.approx(0.03, rel=1e-4)}
    assert deviations(off_by(0, 0), off_by(0, 0), [], inputs(), E) == {"hidden": 0.0, "scores": 0.0}


def test_the_loss_is_off_by_that_of_the_student_it_moves_most():
    """A student at 1.5 times the exact teacher is 0.5 away from it, and 0.48 from one that is 0.02 higher."""
    student, exact, low = off_by(0.5, 0.5), off_by(0.0, 0.0), off_by(0.02, 0.0)
    students = [(student, learns(1.0, 0.0)), (student, learns(0.0, 1.0))]
    found = deviations(low, exact, students, inputs(), E)
    assert found["loss"] == pytest.approx(1 - 0.48**2 / 0.5**2, rel=1e-4)
    only_attention = deviations(low, exact, students[1:], inputs(), E)
    assert only_attention["loss"] == pytest.approx(0.0, abs=1e-6)
