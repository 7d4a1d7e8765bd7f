"""What a person sees of a build."""

import pytest

import sharding.progress
from sharding.progress import Progress


def test_lines_off_a_terminal_tell_share_counts_and_time_left(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now_s = iter([1000.0, 1010.0, 1030.0, 1031.0, 1061.0])
    monkeypatch.setattr(sharding.progress.time, "monotonic", lambda: next(now_s))
    with Progress("prepare", 1000, 200, "B", visible=True) as shown:
        shown.advance(100, 5, 7_000)
        shown.advance(100, 5, 7_000)  # 200 of 800 in 30 s: 90 s left
        shown.advance(1, 1, 1)
        shown.advance(0, 0, 0)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "prepare: 40.0%, 10 documents, 14,000 tokens, 0:01:30 left",
        "prepare: 40.1%, 11 documents, 14,001 tokens, 0:03:02 left",
    ]


def test_nothing_is_shown_when_not_asked_for_or_soon_done(capsys: pytest.CaptureFixture[str]) -> None:
    for visible in (False, True):
        with Progress("pack", 0, 0, " tokens", visible) as shown:
            shown.advance(5, 1, 5)
            assert shown.share is None
    assert capsys.readouterr().err == ""
