"""Held-out evaluation: the training losses, without dropout, on rows that training never sees."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch

from sharding.corpora import Corpora
from sharding.manifest import Corpus
from sharding.stream import Batch, sequential
from trainer.capture import Captured
from trainer.layout import row_counts
from trainer.meter import CorpusMeter
from trainer.models import Inputs
from trainer.transfer import Transfer, distil
from trainer.world import World

Encode = Callable[[Inputs], Captured]
"""Runs an encoder on a micro batch; for a student, hidden states come projected to the teacher's width."""


@torch.no_grad()
def evaluate(
    teacher: Encode,
    students: Sequence[tuple[Encode, Transfer]],
    teacher_hidden_size: int,
    corpora: Corpus | Corpora,
    rows: int,
    micro_batch_rows: int,
    world: World,
    mask_damaged: bool = False,
    separator: int | None = None,
    beat: Callable[[], object] = lambda: None,
) -> list[dict[str, float]]:
    """Return each student's losses, ``total`` first, over the first held-out rows (collective).

    Of several corpora each gives rows by its weight, ``rows`` in all, and its own losses come under
    ``corpus/<name>/`` as well. Every row is read by one rank; sums and counts are added up over all ranks, so
    the result does not depend on their number. All ranks make the same number of forward calls, which ZeRO
    stage 3 needs; a rank whose rows are used up repeats one and leaves it out. Before each comes ``beat``.

    Raises: CorpusError for a damaged block, unless its rows are to be masked.
    """
    corpora = Corpora.of(corpora)
    names = [part.name for part in corpora.parts]
    meters = [CorpusMeter(names, transfer, teacher_hidden_size) for _, transfer in students]
    for number, (corpus, share) in enumerate(zip(corpora.corpora, corpora.shares, strict=True)):
        own_rows = min(max(1, round(rows * share)), corpus.split("heldout").rows)
        read = partial(
            sequential, corpus, "heldout", mask_damaged=mask_damaged, node_cache=corpora.node_cache
        )
        for batch, counted in _equal_turns(read, own_rows, micro_batch_rows, world):
            beat()
            inputs = Inputs.of(batch, slice(None), world.device, separator)
            counts_B2 = row_counts(batch.ids_BS, batch.length_B, separator)
            targets = teacher(inputs)
            corpus_B = torch.full_like(batch.length_B, number).to(world.device)
            for (encode, transfer), meter in zip(students, meters, strict=True):
                sums = distil(encode(inputs), targets, inputs.layout, transfer)
                if counted:
                    meter.add(sums, corpus_B, counts_B2.to(world.device))
    return [meter.means(world.device) for meter in meters]


def _equal_turns(
    read: Callable[..., Iterator[Batch]], rows: int, micro_batch_rows: int, world: World
) -> Iterator[tuple[Batch, bool]]:
    """Yield (batch, counted) equally often on all ranks."""
    turns = -(-rows // (micro_batch_rows * world.size))
    own = read(rows=rows, batch_rows=micro_batch_rows, rank=world.rank, world_size=world.size)
    filler = next(read(rows=1, batch_rows=1, rank=0, world_size=1))
    for _ in range(turns):
        batch = next(own, None)
        yield (filler, False) if batch is None else (batch, True)
