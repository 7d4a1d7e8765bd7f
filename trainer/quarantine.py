"""Going on although a block of the corpus is damaged: all ranks mask its rows from the same step on."""

import logging

import torch

from sharding.stream import Batch
from trainer.checkpoint import Progress
from trainer.world import World, gather_over_ranks, sum_over_ranks

log = logging.getLogger(__name__)


def mask_damaged(batch: Batch, progress: Progress, world: World) -> Batch:
    """The batch without the rows of blocks that some rank has found damaged (collective).

    A block may be damaged on one node only. What any rank finds in this step becomes part of ``progress`` on
    all ranks, and so of the checkpoint; masked rows count as padding, so the order, the shape of the batch
    and the meaning of the loss stay as they are.
    """
    known = set(progress.quarantined)
    new = [damage for damage in batch.damage if (damage.corpus, damage.block) not in known]
    if int(sum_over_ranks(torch.tensor(len(new), device=world.device))):
        found = {(d.corpus, d.block): d.message for damages in gather_over_ranks(new) for d in damages}
        for place in sorted(found):
            if world.is_main:
                log.warning(
                    "step %d: block quarantined, its rows are masked: %s", progress.step + 1, found[place]
                )
            progress.quarantined.append(place)
    return batch.masked(progress.quarantined) if progress.quarantined else batch
