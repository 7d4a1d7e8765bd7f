"""What people read."""

import pytest

from launcher.wording import by_kind, duration


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (0.4, "0s"),
        (59.6, "1m00s"),
        (245, "4m05s"),
        (3600, "1h00m"),
        (11_220, "3h07m"),
        (183_600, "2d03h"),
    ],
)
def test_durations(seconds, shown):
    assert duration(seconds) == shown


def test_losses_by_kind_are_means_over_layers():
    figures = {
        "loss/total": 9.0,
        "loss/embedding": 1.0,
        "loss/hidden/1": 2.0,
        "loss/hidden/2": 4.0,
        "lr": 5.0,
    }
    assert by_kind(figures, "loss/") == "embedding 1.0000 hidden 3.0000"
    more = figures | {"loss/relation/qq": 1.0, "loss/relation/kk": 2.0, "loss/prediction": 0.5}
    assert by_kind(more, "loss/") == "embedding 1.0000 hidden 3.0000 relation 1.5000 prediction 0.5000"
    figures |= {
        "loss/corpus/wiki/total": 7.0,
        "loss/corpus/wiki/hidden/1": 9.0,
        "loss/corpus/my.own/total": 8.0,
    }
    assert by_kind(figures, "loss/") == "embedding 1.0000 hidden 3.0000; wiki 7.0000 my.own 8.0000"
