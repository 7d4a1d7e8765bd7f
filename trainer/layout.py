"""Layout: which tokens of a batch's rows are valid, and which of them belong to one document.

A row may hold several documents (packing ``full``). Where they are kept apart, tokens attend within their own
document only, and every loss over pairs of tokens, A = Q K', counts the pairs within a document: the row's
score matrix is block-diagonal. Losses then work on documents as if each were a row: ``Documents.take``.

Letters: B rows, S sequence, N documents, L tokens of the longest document, H heads, D head dim.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class Documents:
    """Some documents of a batch, of similar lengths, each on its own."""

    index_NL: Tensor
    """int64: places of a document's tokens among the batch's B * S; padded with 0."""
    mask_NL: Tensor
    """bool: which of these are tokens."""
    row_N: Tensor
    """int64: the row that holds the document."""
    full: bool
    """They are equally long. Known without reading from the device."""

    @property
    def mask(self) -> Tensor | None:
        """``mask_NL``, or None where every place holds a token."""
        return None if self.full else self.mask_NL

    def take(self, x_BHSD: Tensor) -> Tensor:
        """[B, H, S, D] -> [N, H, L, D]: a row for every document. Differentiable."""
        tokens = x_BHSD.transpose(1, 2).flatten(0, 1)  # [B S, H, D]
        taken = tokens.index_select(0, self.index_NL.flatten())  # its gradient is cheaper than that of []
        return taken.unflatten(0, self.index_NL.shape).transpose(1, 2)

    def by_row(self, value_N: Tensor, rows: int) -> Tensor:
        """[N] -> [B]: the sum over every row's documents."""
        return value_N.new_zeros(rows).index_add(0, self.row_N, value_N)

    def to(self, device: torch.device) -> "Documents":
        """The same documents on another device."""
        index_NL, mask_NL = (x.to(device, non_blocking=True) for x in (self.index_NL, self.mask_NL))
        return Documents(index_NL, mask_NL, self.row_N.to(device, non_blocking=True), self.full)


@dataclass(frozen=True)
class Layout:
    """What the losses know of a batch's rows."""

    mask_BS: Tensor
    """bool: valid tokens."""
    full: bool
    """Every token is valid: losses may pass over the mask. Known without reading from the device."""
    documents: tuple[Documents, ...] | None = None
    """All documents, those of lengths from 2^k + 1 to 2^(k+1) together, so that padding them to the longest
    at most doubles them. None: a row is one document."""

    @property
    def mask(self) -> Tensor | None:
        """``mask_BS``, or None where every token is valid."""
        return None if self.full else self.mask_BS

    def to(self, device: torch.device) -> "Layout":
        """The same layout on another device."""
        documents = self.documents
        if documents is not None:
            documents = tuple(some.to(device) for some in documents)
        return replace(self, mask_BS=self.mask_BS.to(device, non_blocking=True), documents=documents)


def layout(ids_BS: Tensor, length_B: Tensor, separator: int | None = None) -> Layout:
    """The layout of rows on CPU; a ``separator``, the id that ends a document, keeps documents apart."""
    mask_BS = torch.arange(ids_BS.shape[1]) < length_B[:, None]
    full = bool((length_B == ids_BS.shape[1]).all())
    if separator is None:
        return Layout(mask_BS, full)
    row_N, start_N, length_N = _documents(ids_BS, mask_BS, separator)
    size_N = (length_N - 1).clamp(min=1).log2().floor()  # in float32, exact for powers of two
    sizes = size_N.unique() if len(size_N) else torch.zeros(1)  # without any document, one group without any
    start_N += row_N * ids_BS.shape[1]
    some = (_group(*(x[size_N == size] for x in (row_N, start_N, length_N))) for size in sizes)
    return Layout(mask_BS, full, tuple(some))


def _group(row_N: Tensor, start_N: Tensor, length_N: Tensor) -> Documents:
    step_L = torch.arange(int(length_N.max()) if len(length_N) else 0)
    mask_NL = step_L < length_N[:, None]
    index_NL = (start_N[:, None] + step_L).masked_fill(~mask_NL, 0)
    return Documents(index_NL, mask_NL, row_N, bool(mask_NL.all()))


class Counts(NamedTuple):
    """What the sums of losses are divided by; over all ranks and micro batches of a step."""

    tokens: float
    """Valid tokens."""
    pairs: float
    """Pairs of valid tokens, within a document where these are kept apart."""
    rows: float
    """Rows with a valid token."""

    def positive(self) -> "Counts":
        """The same, but 1 instead of 0: where every row is masked, sums of 0 are divided."""
        return Counts(*(max(count, 1) for count in self))


def row_counts(ids_BS: Tensor, length_B: Tensor, separator: int | None = None) -> Tensor:
    """int64 [B, 3], on CPU: a row's valid tokens, its pairs of them (of one document), and 1 if it has any.

    They add up over rows, ranks and batches to the ``Counts`` that losses are divided by.
    """
    pairs_B = length_B.square()
    if separator is not None:
        mask_BS = torch.arange(ids_BS.shape[1]) < length_B[:, None]
        row_N, _, length_N = _documents(ids_BS, mask_BS, separator)
        pairs_B = torch.zeros_like(length_B).index_add(0, row_N, length_N.square())
    return torch.stack((length_B, pairs_B, (length_B > 0).long()), dim=1)


def document_BS(layout: Layout) -> Tensor:
    """int64 [B, S]: the number of every token's document within the batch, from 0; -1 for padding."""
    if layout.documents is None:
        rows_B1 = torch.arange(len(layout.mask_BS), device=layout.mask_BS.device)[:, None]
        return torch.where(layout.mask_BS, rows_B1, -1)
    found = torch.full_like(layout.mask_BS, -1, dtype=torch.int64).flatten()
    first = 0
    for some in layout.documents:
        numbers_NL = first + torch.arange(len(some.row_N), device=found.device)[:, None]
        found[some.index_NL[some.mask_NL]] = numbers_NL.expand_as(some.index_NL)[some.mask_NL]
        first += len(some.row_N)
    return found.view_as(layout.mask_BS)


def _documents(ids_BS: Tensor, mask_BS: Tensor, separator: int) -> tuple[Tensor, Tensor, Tensor]:
    """Row, first token and length of every document, int64 [N]; a [SEP] belongs to the document it ends."""
    ends_BS = (ids_BS == separator) & mask_BS
    starts_BS = mask_BS.clone()
    starts_BS[:, 1:] &= ends_BS[:, :-1]
    row_N, start_N = starts_BS.nonzero(as_tuple=True)
    number_T = starts_BS.flatten().cumsum(0)[mask_BS.flatten()] - 1  # of every valid token
    return row_N, start_N, torch.bincount(number_T, minlength=len(row_N))
