import pytest

from trainer.layer_map import resolve


@pytest.mark.parametrize(
    "spec, student, teacher, expected",
    [
        ("uniform", 4, 12, (3, 6, 9, 12)),  # the paper's 4-layer student of BERT-base
        ("uniform", 6, 12, (2, 4, 6, 8, 10, 12)),  # and its 6-layer student
        ("uniform", 3, 3, (1, 2, 3)),
        ("uniform", 1, 5, (5,)),
        ("last", 4, 12, (9, 10, 11, 12)),
        ("last", 5, 5, (1, 2, 3, 4, 5)),
        ("skip", 4, 12, (1, 3, 5, 7)),
        ("skip", 3, 5, (1, 3, 5)),  # 2 M - 1 = N just fits
        ([1, 1, 7], 3, 12, (1, 1, 7)),  # several student layers may learn from one teacher layer
        ((2, 4), 2, 4, (2, 4)),
        ([1, 2, 2, 2], 4, 2, (1, 2, 2, 2)),  # a student deeper than its teacher
    ],
)
def test_maps_worked_out_by_hand(spec, student, teacher, expected):
    assert resolve(spec, student, teacher) == expected


@pytest.mark.parametrize(
    "spec, student, teacher, message",
    [
        ("uniform", 5, 12, r"multiple of M; got .*M=5, .*N=12\. .*fit: 4, 6; .*\[2, 5, 7, 10, 12\]"),
        ("uniform", 24, 12, r"Nearest depths that fit: 12; or"),
        ("last", 13, 12, "needs M <= N"),
        ("skip", 7, 12, r"needs 2 M - 1 <= N; .*at most 6 student layers"),
        ("middle", 4, 12, "'middle' is none of uniform, last, skip"),
        ([3, 6, 9], 4, 12, "has 3 entries, but the student has 4 layers"),
        ([3, 6, 9, 13], 4, 12, r"names teacher layers \[13\], but they run from 1 to 12"),
        ([0, 6, 9, 12], 4, 12, r"names teacher layers \[0\]"),
        ([3, 9, 6, 12], 4, 12, "decreases"),
        ([3, 6.0, 9, 12], 4, 12, "integers only"),
        ([True, 6, 9, 12], 4, 12, "integers only"),
        ("uniform", 0, 12, "at least one layer"),
    ],
)
def test_impossible_maps_are_refused_with_the_rule(spec, student, teacher, message):
    with pytest.raises(ValueError, match=message):
        resolve(spec, student, teacher)


def test_the_suggested_list_is_itself_a_valid_map():
    for teacher in range(1, 30):
        for student in range(1, 30):
            try:
                resolve("uniform", student, teacher)
            except ValueError as error:
                suggested = [int(g) for g in str(error).split("[")[-1].rstrip("]").split(",")]
                assert len(resolve(suggested, student, teacher)) == student
