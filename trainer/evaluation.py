"""Held-out evaluation: the training losses, without dropout, on rows that training never sees."""

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch

from sharding.manifest import Corpus
from sharding.stream import Batch, sequential
from trainer.capture import Captured
from trainer.losses import Transfer, denominators, distil, valid_counts, weights
from trainer.models import Inputs
from trainer.world import World, sum_over_ranks

Encode = Callable[[Inputs], Captured]
"""Runs an encoder on a micro batch; for a student, hidden states come projected to the teacher's width."""


@torch.no_grad()
def evaluate(
    teacher: Encode,
    students: Sequence[tuple[Encode, Transfer]],
    teacher_hidden_size: int,
    corpus: Corpus,
    rows: int,
    micro_batch_rows: int,
    world: World,
) -> list[dict[str, float]]:
    """Return each student's losses, ``total`` first, over the first ``rows`` held-out rows (collective).

    Every row is read by one rank; sums and counts are added up over all ranks, so the result does not depend
    on their number. All ranks make the same number of forward calls, which ZeRO stage 3 needs; a rank whose
    rows are used up repeats one and leaves it out.
    """
    rows = min(rows, corpus.split("heldout").rows)
    counts = torch.zeros(2, dtype=torch.int64, device=world.device)
    sums = [dict.fromkeys(weights(transfer), 0.0) for _, transfer in students]
    for batch, counted in _equal_turns(corpus, rows, micro_batch_rows, world):
        inputs = Inputs.of(batch, slice(None), world.device)
        targets = teacher(inputs)
        counts += valid_counts(batch.length_B).to(world.device) * counted
        for (encode, transfer), student_sums in zip(students, sums, strict=True):
            for key, value in distil(encode(inputs), targets, inputs.mask_BS, transfer).items():
                student_sums[key] += float(value) * counted
    tokens, pairs = sum_over_ranks(counts).tolist()
    return [
        _means(student_sums, transfer, tokens, pairs, teacher_hidden_size, world)
        for (_, transfer), student_sums in zip(students, sums, strict=True)
    ]


def _equal_turns(
    corpus: Corpus, rows: int, micro_batch_rows: int, world: World
) -> Iterator[tuple[Batch, bool]]:
    """Yield (batch, counted) equally often on all ranks."""
    turns = -(-rows // (micro_batch_rows * world.size))
    own = sequential(
        corpus, "heldout", rows=rows, batch_rows=micro_batch_rows, rank=world.rank, world_size=world.size
    )
    filler = next(sequential(corpus, "heldout", rows=1, batch_rows=1, rank=0, world_size=1))
    for _ in range(turns):
        batch = next(own, None)
        yield (filler, False) if batch is None else (batch, True)


def _means(
    sums: Mapping[str, float],
    transfer: Transfer,
    tokens: int,
    pairs: int,
    teacher_hidden_size: int,
    world: World,
) -> dict[str, float]:
    reduced = sum_over_ranks(
        torch.tensor(list(sums.values()), dtype=torch.float64, device=world.device)
    ).tolist()
    counts, term_weights = denominators(transfer, tokens, pairs, teacher_hidden_size), weights(transfer)
    values = {key: value / counts[key] for key, value in zip(sums, reduced, strict=True)}
    return {"total": sum(term_weights[key] * value for key, value in values.items()), **values}
