"""A task teacher's logits and labels by row: as model and corpus say; kept; refused at chance."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, BertConfig, BertForQuestionAnswering

from configs.schema import Precision, TeacherConfig
from sharding.corpora import Corpora
from sharding.labels import read_labels, task_of
from sharding.manifest import open_corpus
from sharding.stream import sequential, stream
from sharding.task_corpus import build
from tests.sharding.test_squad import articles, config_of
from tests.tiny_task import write_tiny_model, write_tiny_task
from trainer import teacher_logits
from trainer.capture import Head
from trainer.columns import Columns
from trainer.models import Inputs
from trainer.teacher_logits import TeacherLogits, check_score, kept
from trainer.world import World

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def task(tmp_path_factory, tiny_tokenizer):
    """Corpus, and the folder of a model that knows it."""
    folder = tmp_path_factory.mktemp("mood")
    corpus = open_corpus(write_tiny_task(folder, tiny_tokenizer))
    return corpus, write_tiny_model(folder / "model", tiny_tokenizer, corpus, steps=60)


def keeper(model, folder, precision=Precision.fp32) -> TeacherLogits:
    config = TeacherConfig(model=str(model), precision=precision, logits_folder=str(folder))
    return TeacherLogits(config, Head.sequence, 16, World(0, 1, 0, 1, CPU))


def test_they_are_the_models_own_row_by_row_and_are_kept(task, tmp_path):
    corpus, model_folder = task
    (found,) = keeper(model_folder, tmp_path).of(Corpora.of(corpus), "heldout")
    model = AutoModelForSequenceClassification.from_pretrained(model_folder).eval()
    for batch in sequential(corpus, "heldout", rows=10**6, batch_rows=1, rank=0, world_size=1):
        length = int(batch.length_B[0])
        with torch.no_grad():
            own = model(batch.ids_BS[:, :length], attention_mask=torch.ones(1, length)).logits
        np.testing.assert_allclose(found[int(batch.row_B[0])], own[0], atol=1e-5)
    (file,) = tmp_path.iterdir()
    before = file.stat().st_mtime_ns
    (again,) = keeper(model_folder, tmp_path).of(Corpora.of(corpus), "heldout")
    assert np.array_equal(found, again) and file.stat().st_mtime_ns == before


def test_two_jobs_may_compute_them_at_a_time(task, tmp_path, monkeypatch):
    """The second starts when the first is about to join its parts."""
    corpus, model_folder = task
    found = []
    join = teacher_logits._join

    def overtaken(*arguments):
        monkeypatch.setattr(teacher_logits, "_join", join)
        found.extend(keeper(model_folder, tmp_path).of(Corpora.of(corpus), "heldout"))
        join(*arguments)

    monkeypatch.setattr(teacher_logits, "_join", overtaken)
    found.extend(keeper(model_folder, tmp_path).of(Corpora.of(corpus), "heldout"))
    assert np.array_equal(*found) and len(list(tmp_path.iterdir())) == 1


def test_another_teacher_does_not_find_them(task, tmp_path, tiny_tokenizer):
    corpus, model_folder = task
    other = write_tiny_model(tmp_path / "other", tiny_tokenizer, corpus, steps=0, seed=5)
    (first,), (second,) = (
        keeper(model, tmp_path / "kept").of(Corpora.of(corpus), "heldout") for model in (model_folder, other)
    )
    assert not np.allclose(first, second) and len(list((tmp_path / "kept").iterdir())) == 2
    (low,) = keeper(model_folder, tmp_path / "kept", Precision.bf16).of(Corpora.of(corpus), "heldout")
    assert not np.array_equal(first, low) and len(list((tmp_path / "kept").iterdir())) == 3


def test_an_answers_logits_end_with_its_row(tmp_path, tiny_tokenizer):
    """Padding cannot be the best place, however low all others are."""
    for name, count in (("train", 4), ("dev", 8)):
        (tmp_path / f"{name}-v1.1.json").write_text(json.dumps(articles(count, seed=3)))
    build(config_of(tmp_path, tiny_tokenizer, tmp_path))
    corpus, reader = open_corpus(tmp_path / "data"), tmp_path / "reader"
    shape = {"num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16}
    model = BertForQuestionAnswering(BertConfig(vocab_size=232, max_position_embeddings=96, **shape))
    model.qa_outputs.bias.data.fill_(-100.0)
    model.save_pretrained(reader)
    config = TeacherConfig(model=str(reader), precision=Precision.fp32, logits_folder=str(tmp_path / "kept"))
    (found,) = TeacherLogits(config, Head.spans, 4, World(0, 1, 0, 1, CPU)).of(Corpora.of(corpus), "heldout")
    for batch in sequential(corpus, "heldout", rows=10**6, batch_rows=1, rank=0, world_size=1):
        own, length = found[int(batch.row_B[0])], int(batch.length_B[0])
        assert np.isfinite(own[:length]).all() and np.isneginf(own[length:]).all()


def test_columns_come_with_their_rows_in_the_streams_order(task):
    """In the order of training: what the batch says of a row is what is stored of it."""
    corpus, _ = task
    corpora, rows = Corpora.of(corpus), corpus.split("train").rows
    labels = read_labels(corpus, "train")
    logits = np.random.default_rng(0).normal(size=(rows, 2)).astype(np.float32)
    columns = Columns(Columns.read(corpora, "train").labels, [logits])
    settings = {"seed": 1, "group_blocks": 2, "start_row": 0, "stop_row": 60, "global_batch_rows": 20}
    reading = stream(corpora, "train", rank=0, world_size=1, workers=0, prefetch_steps=1, **settings)
    seen = []
    for batch in reading:
        inputs = Inputs.of(batch, slice(5, 20), CPU, columns=columns, trim=True)
        places = batch.row_B[5:20].numpy()
        seen += places.tolist()
        assert np.array_equal(inputs.labels_BK, labels[places])
        assert np.array_equal(kept(inputs).logits, logits[places])
        assert inputs.ids_BS.shape[1] % 16 == 0 and inputs.ids_BS.shape[1] >= batch.length_B[5:20].max()
    assert len(set(seen)) == 45 and seen != sorted(seen)


def test_trimmed_rows_are_the_same_rows(task):
    corpus, _ = task
    batch = next(sequential(corpus, "heldout", rows=4, batch_rows=4, rank=0, world_size=1))
    whole, short = (Inputs.of(batch, slice(None), CPU, trim=trim) for trim in (False, True))
    width = short.ids_BS.shape[1]
    assert torch.equal(whole.ids_BS[:, :width], short.ids_BS)
    assert whole.layout.mask_BS.sum() == short.layout.mask_BS.sum()


def test_a_teacher_at_chance_is_refused_with_the_way_out(task):
    corpus, _ = task
    info, labels = task_of(corpus), [read_labels(corpus, "heldout")]
    right = [np.eye(2, dtype=np.float32)[labels[0][:, 0].astype(int)]]
    assert check_score(info, right, labels, "m")["accuracy"] == 1.0
    with pytest.raises(ValueError, match=r"accuracy 0\.000.*classes in another order .*low, high") as found:
        check_score(info, [1 - right[0]], labels, "m")
    assert "labels=[...]" in str(found.value)
