"""What a student learns: terms, counts and layouts, against loops and hand-worked numbers."""

import math

import pytest
import torch

from tests.trainer.test_losses import lengths_to_mask, normal
from trainer.attention_loss import common_heads
from trainer.capture import Captured, Head, Need, Prediction
from trainer.layout import Counts, Layout, layout, row_counts
from trainer.transfer import (
    Relation,
    Transfer,
    denominators,
    distil,
    student_need,
    teacher_need,
    total,
    weights,
)


def test_counts_by_hand():
    counts_B3 = row_counts(torch.zeros(4, 5), torch.tensor([3, 1, 4, 0]))
    assert counts_B3.tolist() == [[3, 9, 1], [1, 1, 1], [4, 16, 1], [0, 0, 0]]
    assert counts_B3.dtype == torch.int64


def test_denominators_of_the_other_terms_by_hand():
    relation = Relation(weight=1.0, heads=4, student_layer=1, teacher_layer=2)
    transfer = Transfer((2,), 3, 0.0, 0.0, 0.0, (1.0,), cosine=1.0, relation=relation, prediction=1.0)
    assert denominators(transfer, Counts(10, 20, 4), teacher_hidden_size=5) == {
        "cosine/1": 10,
        "relation/qq": 40,
        "relation/kk": 40,
        "relation/vv": 40,
        "prediction": 10,
    }


def test_total_by_hand():
    transfer = Transfer(
        (2, 4), attention_heads=3, embedding=2.0, hidden=1.0, attention=0.5, layers=(1.0, 3.0)
    )
    # 10 tokens of width 5: 50 elements; 3 heads on 20 pairs: 60 elements.
    sums = {
        "embedding": 100.0,  # 2 * 100 / 50 = 4
        "hidden/1": 25.0,  # 1 * 1 * 25 / 50 = 0.5
        "attention/1": 120.0,  # 0.5 * 1 * 120 / 60 = 1
        "hidden/2": 50.0,  # 1 * 3 * 50 / 50 = 3
        "attention/2": 60.0,  # 0.5 * 3 * 60 / 60 = 1.5
    }
    counts = denominators(transfer, Counts(10, 20, 4), teacher_hidden_size=5)
    assert list(counts) == list(weights(transfer)) == list(sums)
    tensors = {key: torch.tensor(value) for key, value in sums.items()}
    assert total(tensors, counts, weights(transfer)).item() == pytest.approx(10.0)


# A float64 loop over rows, heads, tokens


def reference_error(q_S, k_S, q_T, k_T, scaling_S, scaling_T, lengths):
    """The definition, one score at a time. Relation heads are formed from their heads' raw scores."""
    heads = math.gcd(q_S.shape[1], q_T.shape[1])

    def score(q, k, scaling, row, head, i, j):
        group = q.shape[1] // heads
        raw = sum(
            float(q[row, h, i, d]) * float(k[row, h, j, d])
            for h in range(head * group, (head + 1) * group)
            for d in range(q.shape[3])
        )
        return raw * scaling / math.sqrt(group)

    return sum(
        (score(q_S, k_S, scaling_S, row, head, i, j) - score(q_T, k_T, scaling_T, row, head, i, j)) ** 2
        for row, length in enumerate(lengths)
        for head in range(heads)
        for i in range(length)
        for j in range(length)
    )


@pytest.mark.parametrize("heads_S, heads_T", [(3, 3), (2, 4), (4, 6), (1, 3)])
@pytest.mark.parametrize("dim_S, dim_T", [(3, 3), (2, 5), (5, 2)])
def test_distilled_attention_equals_the_loop(heads_S, heads_T, dim_S, dim_T):
    lengths, seq_len = [4, 2, 0], 5
    q_S, k_S = normal(3, heads_S, seq_len, dim_S, seed=1), normal(3, heads_S, seq_len, dim_S, seed=2)
    q_T, k_T = normal(3, heads_T, seq_len, dim_T, seed=3), normal(3, heads_T, seq_len, dim_T, seed=4)
    transfer = Transfer((1,), common_heads(heads_S, heads_T), 0.0, 0.0, 1.0, (1.0,))
    student = Captured([None, None], [q_S], [k_S], [None], [dim_S**-0.5])
    teacher = Captured([None, None], [q_T], [k_T], [None], [dim_T**-0.5])
    sums = distil(student, teacher, Layout(lengths_to_mask(lengths, seq_len), full=False), transfer)
    expected = reference_error(q_S, k_S, q_T, k_T, dim_S**-0.5, dim_T**-0.5, lengths)
    assert list(sums) == ["attention/1"]
    assert sums["attention/1"].sum().item() == pytest.approx(expected, rel=1e-12)
    assert sums["attention/1"].shape == (3,) and sums["attention/1"][2] == 0


# Padding and micro batches: the same sums and gradients however rows are laid out

LENGTHS, WIDTH, HEADS, VOCABULARY, SEPARATOR = [6, 3, 5, 1], 8, 2, 7, 9
ENDS = [(1, 3), (2,), (2, 4), ()]  # places of the separators; rows 0 and 3 end inside a document
TRANSFER = Transfer((2, 2, 3), 2, embedding=0.5, hidden=1.0, attention=2.0, layers=(1.0, 0.0, 3.0))
EVERYTHING = Transfer(
    (2, 2, 3),
    2,
    embedding=0.5,
    hidden=1.0,
    attention=2.0,
    layers=(1.0, 0.0, 3.0),
    cosine=0.7,
    relation=Relation(weight=1.5, heads=1, student_layer=2, teacher_layer=3),
    prediction=0.3,
    temperature=2.0,
)
FIELDS = ("hidden", "queries", "keys", "values")


def models(seq_len, padding=0.0):
    """A student of 3 layers and a teacher of 3; the padded positions hold ``padding``."""
    mask = lengths_to_mask(LENGTHS, seq_len)

    def tensor(shape, seed):
        x = torch.full((len(LENGTHS), *shape[:-1], seq_len, shape[-1]), padding, dtype=torch.float64)
        x[..., : max(LENGTHS), :] = normal(len(LENGTHS), *shape[:-1], max(LENGTHS), shape[-1], seed=seed)
        valid = mask.view(len(LENGTHS), *[1] * (len(shape) - 1), seq_len, 1)
        return x.where(valid, padding).requires_grad_()

    def model(seed, head_dim):
        layers = [[tensor((HEADS, head_dim), seed + 10 * kind + m) for m in range(3)] for kind in (1, 2, 3)]
        weight, bias = (normal(*shape, seed=seed + 50) for shape in ((VOCABULARY, WIDTH), (VOCABULARY,)))
        return Captured(
            [tensor((WIDTH,), seed + m) for m in range(4)],
            *layers,
            [head_dim**-0.5] * 3,
            Prediction(tensor((WIDTH,), seed + 40), weight.requires_grad_(), bias.requires_grad_()),
        )

    return model(100, 3), model(200, 4), mask


def part(captured, rows):
    prediction = captured.prediction
    return Captured(
        **{name: [x[rows] for x in getattr(captured, name)] for name in FIELDS},
        scalings=captured.scalings,
        prediction=prediction._replace(features_BSE=prediction.features_BSE[rows]),
    )


def row_ids(seq_len):
    ids_BS = torch.ones(len(LENGTHS), seq_len, dtype=torch.long)
    for row, ends in enumerate(ENDS):
        ids_BS[row, list(ends)] = SEPARATOR
    return ids_BS


def step(seq_len, padding=0.0, micro_batches=(slice(None),), separator=None):
    """Sums of the global batch, and gradients of the total with global denominators, accumulated."""
    student, teacher, _ = models(seq_len, padding)
    ids_BS, length_B = row_ids(seq_len), torch.tensor(LENGTHS)
    counted = Counts(*row_counts(ids_BS, length_B, separator).sum(dim=0).tolist())
    counts = denominators(EVERYTHING, counted, WIDTH)
    sums = dict.fromkeys(weights(EVERYTHING), 0.0)
    for rows in micro_batches:
        where = layout(ids_BS[rows], length_B[rows], separator)
        part_sums = distil(part(student, rows), part(teacher, rows), where, EVERYTHING)
        assert part_sums.keys() == sums.keys()
        total(part_sums, counts, weights(EVERYTHING)).backward()
        sums = {key: sums[key] + part_sums[key].sum().item() for key in sums}
    by_token = [x for name in FIELDS for x in getattr(student, name)] + [student.prediction.features_BSE]
    return sums, [x.grad for x in by_token], [x.grad for x in student.prediction[1:]]


@pytest.mark.parametrize("separator", [None, SEPARATOR])
@pytest.mark.parametrize(
    "way",
    [
        {"seq_len": 20},
        {"seq_len": 9, "padding": 1e3},
        {"seq_len": 9, "padding": math.nan},  # what padded positions hold never matters
        {"seq_len": 6, "micro_batches": [slice(0, 1), slice(1, 2), slice(2, 4)]},
        {"seq_len": 11, "micro_batches": [slice(0, 3), slice(3, 4)]},
    ],
)
def test_layout_changes_neither_sums_nor_gradients(way, separator):
    sums, by_token, whole = step(max(LENGTHS), separator=separator)
    other_sums, other_by_token, other_whole = step(**way, separator=separator)
    for key in sums:
        assert other_sums[key] == pytest.approx(sums[key], rel=1e-12), key
    for gradient, other in zip(by_token, other_by_token, strict=True):
        assert (gradient is None) == (other is None)  # None: layers of weight 0
        if gradient is not None:
            torch.testing.assert_close(other[..., : max(LENGTHS), :], gradient, rtol=1e-12, atol=1e-14)
            assert not other[..., max(LENGTHS) :, :].any()
    for gradient, other in zip(whole, other_whole, strict=True):
        torch.testing.assert_close(other, gradient, rtol=1e-12, atol=1e-14)


def test_documents_are_compared_one_by_one():
    """Sums over pairs of tokens are those of rows that hold one document each; the others do not change."""
    student, teacher, _ = models(max(LENGTHS))
    length_B = torch.tensor(LENGTHS)
    apart = distil(student, teacher, layout(row_ids(6), length_B, SEPARATOR), EVERYTHING)
    together = distil(student, teacher, layout(row_ids(6), length_B), EVERYTHING)
    for key in apart:
        if key.startswith(("attention", "relation")):
            expected = []
            for row, (ends, length) in enumerate(zip(ENDS, LENGTHS, strict=True)):
                found, first = 0.0, 0
                for end in sorted({*(place + 1 for place in ends), length}):
                    alone = (cut(model, row, first, end) for model in (student, teacher))
                    mask = torch.ones(1, end - first, dtype=torch.bool)
                    found += distil(*alone, Layout(mask, full=True), EVERYTHING)[key].item()
                    first = end
                expected.append(found)
            assert apart[key].tolist() == pytest.approx(expected, rel=1e-12), key
        else:
            assert torch.equal(apart[key], together[key])


def cut(captured, row, first, end):
    """A part of one row, as if it were a row of its own."""
    features, weight, bias = captured.prediction
    return Captured(
        **{name: [x[row : row + 1, ..., first:end, :] for x in getattr(captured, name)] for name in FIELDS},
        scalings=captured.scalings,
        prediction=Prediction(features[row : row + 1, first:end], weight, bias),
    )


def test_attention_of_documents_is_a_block_diagonal_matrix():
    student, teacher, _ = models(max(LENGTHS))
    sums = distil(student, teacher, layout(row_ids(6), torch.tensor(LENGTHS), SEPARATOR), TRANSFER)
    for row, (ends, length) in enumerate(zip(ENDS, LENGTHS, strict=True)):
        number = [sum(end < place for end in ends) for place in range(length)]  # of each token's document
        for m, g in ((1, 2), (3, 3)):
            expected = 0.0
            for head in range(HEADS):
                for i in range(length):
                    for j in range(length):
                        if number[i] == number[j]:
                            own, target = (
                                x.queries[n - 1][row, head, i] @ x.keys[n - 1][row, head, j] * x.scalings[0]
                                for x, n in ((student, m), (teacher, g))
                            )
                            expected += (own - target).item() ** 2
            assert sums[f"attention/{m}"][row].item() == pytest.approx(expected, rel=1e-12)


def test_the_total_is_the_mean_over_valid_elements():
    student, teacher, mask = models(9)
    tokens, pairs = sum(LENGTHS), sum(length**2 for length in LENGTHS)
    expected = 0.5 * (student.hidden[0] - teacher.hidden[0])[mask].square().mean()
    for m, g, layer_weight in ((1, 2, 1.0), (3, 3, 3.0)):  # layer 2 has weight 0
        expected = expected + layer_weight * (student.hidden[m] - teacher.hidden[g])[mask].square().mean()
        score_S = student.queries[m - 1] @ student.keys[m - 1].mT / math.sqrt(3)
        score_T = teacher.queries[g - 1] @ teacher.keys[g - 1].mT / math.sqrt(4)
        valid = (mask[:, :, None] & mask[:, None, :])[:, None].expand_as(score_S)
        expected = expected + 2.0 * layer_weight * (score_S - score_T)[valid].square().mean()
    counts = denominators(TRANSFER, Counts(tokens, pairs, len(mask)), WIDTH)
    result = total(distil(student, teacher, Layout(mask, full=False), TRANSFER), counts, weights(TRANSFER))
    torch.testing.assert_close(result, expected, rtol=1e-12, atol=0)


# What is computed and what is needed


def test_terms_of_weight_zero_are_not_computed():
    student, teacher, mask = models(6)
    hidden_only = Transfer((1, 2, 3), 2, embedding=0.0, hidden=1.0, attention=0.0, layers=(0.0, 1.0, 1.0))
    student.hidden[:2], student.queries, student.keys = [None, None], [None] * 3, [None] * 3
    student.prediction = None
    assert list(distil(student, teacher, Layout(mask, full=False), hidden_only)) == ["hidden/2", "hidden/3"]
    assert list(denominators(hidden_only, Counts(4, 4, 4), 4)) == ["hidden/2", "hidden/3"]
    with pytest.raises(AssertionError, match="left out a layer"):
        distil(student, teacher, Layout(mask, full=False), TRANSFER)


def test_needed_layers_are_those_of_all_students():
    only_attention = Transfer((3, 6, 9), 2, embedding=0.0, hidden=0.0, attention=1.0, layers=(1.0, 0.0, 1.0))
    assert teacher_need([only_attention]) == Need(scores=frozenset({3, 9}))
    assert teacher_need([TRANSFER]) == Need(frozenset({0, 2, 3}), frozenset({2, 3}))
    assert teacher_need([only_attention, TRANSFER]) == Need(frozenset({0, 2, 3}), frozenset({2, 3, 9}))
    assert teacher_need([]) == Need()
    assert student_need(TRANSFER) == Need(frozenset({0, 1, 3}), frozenset({1, 3}))
    values = {"values": frozenset({3}), "head": Head.masked_lm}
    assert teacher_need([EVERYTHING]) == Need(frozenset({0, 2, 3}), frozenset({2, 3}), **values)
    values["values"] = frozenset({2})
    assert student_need(EVERYTHING) == Need(frozenset({0, 1, 3}), frozenset({1, 2, 3}), **values)
