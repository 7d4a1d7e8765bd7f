"""Held-out losses against one pass in float64, whatever the batches."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from configs.student_schema import Projection
from sharding.manifest import open_corpus
from sharding.stream import sequential
from tests.trainer.tiny import tiny_encoder, tiny_student
from trainer.capture import Captured, capture, enable_capture
from trainer.evaluation import evaluate
from trainer.models import Inputs, build_student
from trainer.shapes import transfer
from trainer.world import World

CPU = torch.device("cpu")
ALONE = World(rank=0, size=1, local_rank=0, local_size=1, device=CPU)


@pytest.fixture
def group(tmp_path: Path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def pair():
    """A teacher and a student of it, both in evaluation mode."""
    teacher = tiny_encoder("bert").eval()
    enable_capture(teacher)
    config = tiny_student(heads=4, projection=Projection.separate)
    return (
        teacher,
        build_student(config, lambda head: teacher, teacher.config, 0).eval(),
        transfer(config, teacher.config),
    )


def encoders(teacher, student):
    def teach(inputs: Inputs) -> Captured:
        return capture(teacher, inputs.ids_BS, inputs.attention_mask, inputs.token_type_BS)

    def learn(inputs: Inputs) -> Captured:
        return Captured(**student(inputs.ids_BS, inputs.attention_mask, inputs.token_type_BS))

    return teach, learn


@torch.no_grad()
def reference(teacher, student, learned, corpus, rows: int) -> dict[str, float]:
    """The losses by their definition, row by row in float64, without padding, masks or sums of ours."""
    squares, counts = {}, {}

    def add(key: str, error: torch.Tensor) -> None:
        squares[key] = squares.get(key, 0.0) + float(error.double().square().sum())
        counts[key] = counts.get(key, 0) + error.numel()

    for batch in sequential(corpus, "heldout", rows=rows, batch_rows=1, rank=0, world_size=1):
        length, segment = int(batch.length_B[0]), int(batch.segment_B[0])
        ids = batch.ids_BS[:, :length]
        types = (torch.arange(length) >= segment).long()[None]
        ones = torch.ones_like(ids)
        t = capture(teacher, ids, ones, types)
        s = Captured(**student(ids, ones, types))
        add("embedding", s.hidden[0] - t.hidden[0])
        for m, g in enumerate(learned.layer_map, start=1):
            add(f"hidden/{m}", s.hidden[m] - t.hidden[g])
            scores_S = s.queries[m - 1].double() @ s.keys[m - 1].double().mT * s.scalings[m - 1]
            scores_T = t.queries[g - 1].double() @ t.keys[g - 1].double().mT * t.scalings[g - 1]
            add(f"attention/{m}", scores_S - scores_T)
    means = {key: squares[key] / counts[key] for key in squares}
    return {"total": sum(means.values()), **means}


@pytest.mark.parametrize("micro_batch_rows", [1, 7, 40])
def test_losses_are_means_over_all_valid_tokens_and_pairs(group, pair, tiny_corpus, micro_batch_rows):
    teacher, student, learned = pair
    corpus = open_corpus(tiny_corpus)
    teach, learn = encoders(teacher, student)
    # The last row of the split is padded: it must weigh by its valid tokens.
    rows = corpus.split("heldout").rows
    (found,) = evaluate(teach, [(learn, learned)], 48, corpus, 10 * rows, micro_batch_rows, ALONE)
    assert found == pytest.approx(reference(teacher, student, learned, corpus, rows), rel=1e-5)


def test_only_the_first_rows_are_read(group, pair, tiny_corpus):
    teacher, student, learned = pair
    corpus = open_corpus(tiny_corpus)
    teach, learn = encoders(teacher, student)
    (found,) = evaluate(teach, [(learn, learned)], 48, corpus, 5, 2, ALONE)
    assert found == pytest.approx(reference(teacher, student, learned, corpus, 5), rel=1e-5)


def test_every_rank_makes_as_many_calls_and_every_row_counts_once(group, pair, tiny_corpus):
    """Three ranks in turn in one process: 5 batches are dealt 2, 2, 1, and the third makes 2 calls too."""
    teacher, student, learned = pair
    corpus = open_corpus(tiny_corpus)
    teach, learn = encoders(teacher, student)
    calls, tokens = [], 0
    for rank in range(3):
        made = []

        def counted(inputs: Inputs, made=made) -> Captured:
            made.append(int(inputs.layout.mask_BS.sum()))
            return learn(inputs)

        place = World(rank=rank, size=3, local_rank=rank, local_size=3, device=CPU)
        evaluate(teach, [(counted, learned)], 48, corpus, 10, 2, place)
        calls.append(len(made))
        tokens += sum(made)
    assert calls == [2, 2, 2]
    lengths = next(sequential(corpus, "heldout", rows=10, batch_rows=10, rank=0, world_size=1)).length_B
    filler = int(lengths[0])
    assert tokens == int(lengths.sum()) + filler
