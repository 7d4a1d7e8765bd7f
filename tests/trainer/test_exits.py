"""Exit codes are a contract with job scripts."""

from trainer import exits


def test_they_are_told_apart_and_from_signals():
    codes = [exits.DONE, exits.FAILED, exits.WRONG, exits.STOPPED, exits.LOST]
    assert codes == [0, 1, 2, 75, 76], "job scripts and docs/reliability.md name these"
    assert len({*codes, exits.INTERRUPTED}) == 6 and max(codes) < 128


def test_what_may_heal_is_to_be_tried_again():
    refused, reset, full = ValueError("a key"), ConnectionResetError("a link"), OSError("a full disk")
    assert [exits.of(error) for error in (refused, reset, full)] == [exits.WRONG, exits.LOST, exits.FAILED]
