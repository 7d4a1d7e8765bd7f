"""Layout against plain loops over tokens."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.layout import document_BS, layout, row_counts

SEPARATOR, PAD = 9, 0


def documents_of(row, length):
    """A row's documents as (first token, end), token by token."""
    found, first = [], 0
    for place in range(length):
        if row[place] == SEPARATOR or place == length - 1:
            found.append((first, place + 1))
            first = place + 1
    return found


# Tokens 1, 2 and separators; a row may be empty, end inside a document, or hold separators in its padding.
ROWS = st.integers(1, 12).flatmap(
    lambda seq_len: st.lists(
        st.tuples(
            st.lists(st.sampled_from([1, 2, SEPARATOR]), min_size=seq_len, max_size=seq_len),
            st.integers(0, seq_len),
        ),
        min_size=1,
        max_size=5,
    )
)


def tensors(rows):
    return torch.tensor([row for row, _ in rows]), torch.tensor([length for _, length in rows])


@given(ROWS)
@settings(max_examples=200, deadline=None)
def test_documents_are_those_of_the_loop(rows):
    ids_BS, length_B = tensors(rows)
    found = layout(ids_BS, length_B, SEPARATOR)
    expected = [(row, *ends) for row, given_row in enumerate(rows) for ends in documents_of(*given_row)]
    documents = []
    for some in found.documents:
        assert some.full == bool(some.mask_NL.all())
        assert (some.mask is None) == some.full
        lengths = some.mask_NL.sum(dim=1)
        assert not len(lengths) or lengths.max() == some.mask_NL.shape[1] <= max(2, 2 * lengths.min() - 1)
        for index_L, mask_L, row in zip(some.index_NL, some.mask_NL, some.row_N, strict=True):
            places = index_L[mask_L].tolist()
            first = places[0] - int(row) * ids_BS.shape[1]
            assert places == list(range(places[0], places[0] + len(places)))
            assert not index_L[~mask_L].any()
            documents.append((int(row), first, first + len(places)))
    assert sorted(documents) == expected


@given(ROWS)
@settings(max_examples=200, deadline=None)
def test_tokens_have_the_same_number_within_a_document_only(rows):
    ids_BS, length_B = tensors(rows)
    numbers = document_BS(layout(ids_BS, length_B, SEPARATOR))
    assert numbers.shape == ids_BS.shape
    inside = {}
    for row, given_row in enumerate(rows):
        for first, end in documents_of(*given_row):
            inside[row, first] = set(numbers[row, first:end].tolist())
        assert (numbers[row, given_row[1] :] == -1).all()
    assert all(len(values) == 1 for values in inside.values())
    assert sorted(value for values in inside.values() for value in values) == list(range(len(inside)))


@given(ROWS)
@settings(max_examples=200, deadline=None)
def test_counts_are_those_of_the_loop(rows):
    ids_BS, length_B = tensors(rows)
    expected = [
        [length, sum((end - first) ** 2 for first, end in documents_of(row, length)), int(length > 0)]
        for row, length in rows
    ]
    counts_B3 = row_counts(ids_BS, length_B, SEPARATOR)
    assert counts_B3.tolist() == expected and counts_B3.dtype == torch.int64
    assert row_counts(ids_BS, length_B).tolist() == [
        [length, length**2, int(length > 0)] for _, length in rows
    ]


def test_rows_that_are_one_document():
    found = layout(torch.full((2, 3), SEPARATOR), torch.tensor([3, 1]))
    assert found.documents is None and not found.full and found.mask is found.mask_BS
    assert found.mask_BS.tolist() == [[True, True, True], [True, False, False]]
    assert document_BS(found).tolist() == [[0, 0, 0], [1, -1, -1]]
    full = layout(torch.ones(2, 3), torch.tensor([3, 3]))
    assert full.full and full.mask is None


@given(ROWS)
@settings(max_examples=50, deadline=None)
def test_taking_documents_and_adding_up_by_row(rows):
    ids_BS, length_B = tensors(rows)
    found = layout(ids_BS, length_B, SEPARATOR)
    shape = (len(rows), 2, ids_BS.shape[1], 3)  # B, H, S, D
    x = torch.randn(
        shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64, requires_grad=True
    )
    sums = x.new_zeros(len(rows))
    for some in found.documents:
        taken = some.take(x).where(some.mask_NL[:, None, :, None], 0)
        for number, row in enumerate(some.row_N.tolist()):
            first = int(some.index_NL[number, 0]) % ids_BS.shape[1]
            length = int(some.mask_NL[number].sum())
            assert torch.equal(taken[number, :, :length], x[row, :, first : first + length])
        sums = sums + some.by_row(taken.square().sum(dim=(1, 2, 3)), len(rows))
    valid = found.mask_BS[:, None, :, None]
    torch.testing.assert_close(sums, (x * valid).square().sum(dim=(1, 2, 3)))
    (gradient,) = torch.autograd.grad(sums.sum(), x)
    torch.testing.assert_close(gradient, 2 * x.detach() * valid)


def test_many_short_documents_beside_a_long_one_are_not_padded_to_it():
    ids_BS = torch.ones(2, 4096, dtype=torch.long)
    ids_BS[1, 31::32] = SEPARATOR  # 128 documents of 32 tokens beside one of 4,096
    found = layout(ids_BS, torch.tensor([4096, 4096]), SEPARATOR)
    assert sum(some.index_NL.numel() for some in found.documents) == ids_BS.numel()
    assert all(some.full for some in found.documents)


def test_a_layout_moves_to_another_device():
    before = layout(torch.tensor([[1, SEPARATOR, 1]]), torch.tensor([3]), SEPARATOR)
    after = before.to(torch.device("meta"))
    assert after.mask_BS.device.type == "meta" and after.full == before.full
    for moved, some in zip(after.documents, before.documents, strict=True):
        for x, y in (
            (moved.index_NL, some.index_NL),
            (moved.mask_NL, some.mask_NL),
            (moved.row_N, some.row_N),
        ):
            assert (x.device.type, x.shape, x.dtype) == ("meta", y.shape, y.dtype)
        assert moved.full == some.full


@pytest.mark.parametrize("seq_len", [1, 4])
def test_no_document_at_all(seq_len):
    found = layout(torch.zeros(2, seq_len), torch.tensor([0, 0]), SEPARATOR)
    x = torch.randn(2, 1, seq_len, 2, requires_grad=True)
    (some,) = found.documents
    sums = some.by_row(some.take(x).sum(dim=(1, 2, 3)), 2)
    sums.sum().backward()  # a graph all the same: every rank makes the same steps
    assert not sums.any() and not x.grad.any()
    assert (document_BS(found) == -1).all()
