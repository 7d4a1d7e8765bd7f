"""A model's outputs on a corpus against the stock model, row by row and without padding."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertForQuestionAnswering

from sharding.manifest import Corpus, TaskInfo, open_corpus
from sharding.stream import sequential
from tests.tiny_task import write_tiny_model, write_tiny_task
from trainer.scoring import check_outputs, load_model, predict
from trainer.served import torch_forward


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Path) -> Corpus:
    return open_corpus(write_tiny_task(tmp_path_factory.mktemp("mood"), tiny_tokenizer))


def rows_of(corpus: Corpus):
    for batch in sequential(corpus, "heldout", rows=10**6, batch_rows=1, rank=0, world_size=1):
        yield batch.ids_BS[:, : int(batch.length_B)]


@pytest.mark.parametrize("batch_rows", [1, 7, 200])
def test_every_row_is_scored_in_its_place_whatever_the_batches(
    corpus: Corpus, tmp_path: Path, tiny_tokenizer: Path, batch_rows: int
) -> None:
    model = load_model(write_tiny_model(tmp_path / "m", tiny_tokenizer, corpus, steps=2), corpus)
    with torch.no_grad():
        expected = torch.cat([model(input_ids=ids).logits for ids in rows_of(corpus)])
    assert expected.std() > 0.01  # rows differ, so that places can be told
    found = predict(torch_forward(model), corpus, "heldout", batch_rows)
    assert found.shape == (90, 2) and found.dtype == np.float32
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-5)


def test_spans_are_scored_by_token_and_padding_is_never_chosen(corpus: Corpus) -> None:
    torch.manual_seed(0)
    model = BertForQuestionAnswering(BertConfig(vocab_size=232, hidden_size=24, num_hidden_layers=1,
        num_attention_heads=2, intermediate_size=40, max_position_embeddings=40)).eval()  # fmt: skip
    found = predict(torch_forward(model), corpus, "heldout", 7)
    assert found.shape == (90, 32, 2)
    for row, ids in zip(found, rows_of(corpus), strict=True):
        with torch.no_grad():
            output = model(input_ids=ids)
        length = ids.shape[1]
        np.testing.assert_allclose(row[:length, 0], output.start_logits[0], atol=1e-5)
        np.testing.assert_allclose(row[:length, 1], output.end_logits[0], atol=1e-5)
        assert np.isneginf(row[length:]).all()


def test_a_model_that_does_not_fit_is_refused(
    corpus: Corpus, tmp_path: Path, tiny_tokenizer: Path, tiny_teacher_like: Path
) -> None:
    with pytest.raises(ValueError, match="needs one ForSequenceClassification"):
        load_model(tiny_teacher_like, corpus)
    task = TaskInfo("mood", "classification", ("low", "high"), ("accuracy",))
    swapped = BertConfig(id2label={0: "HIGH", 1: "LOW"})
    with pytest.raises(ValueError, match=r"order HIGH, LOW.*labels=\[HIGH,LOW\]"):
        check_outputs("m", swapped, task)
    with pytest.raises(ValueError, match="has 3 outputs .* needs 2"):
        check_outputs("m", BertConfig(num_labels=3), task)
    check_outputs("m", BertConfig(num_labels=2), task)  # LABEL_0, LABEL_1: nobody knows


@pytest.fixture
def tiny_teacher_like(tmp_path: Path, tiny_tokenizer: Path) -> Path:
    from transformers import BertModel

    from tests.launcher.conftest import write_teacher

    return write_teacher(tmp_path / "headless", tiny_tokenizer, BertModel)
