"""How a job ends: every kind of error has its exit code, and a message where people look."""

import pytest

from launcher.job import guarded
from trainer import exits
from trainer.loop import NonFiniteError


def ending_with(error):
    def work():
        raise error

    return work


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ValueError("a key is wrong"), exits.WRONG),
        (OSError("the disk is full"), exits.FAILED),
        (ConnectionError("a server is away"), exits.LOST),
        (NonFiniteError("the loss is not finite"), exits.FAILED),
    ],
)
def test_errors_for_people_become_codes(error, code, capsys):
    assert guarded(ending_with(error)) == code
    assert f"error: {error}" in capsys.readouterr().err


def test_what_is_our_own_mistake_is_raised():
    with pytest.raises(KeyError):
        guarded(ending_with(KeyError("x")))
    with pytest.raises(RuntimeError, match="a shape"):
        guarded(ending_with(RuntimeError("a shape")))


def test_work_that_ends_well_hands_on_its_code():
    assert guarded(lambda: exits.STOPPED) == exits.STOPPED
