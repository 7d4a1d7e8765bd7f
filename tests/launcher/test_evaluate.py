"""Whole evaluations of tiny models, in this process."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from mlflow import MlflowClient
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForQuestionAnswering,
)

from configs.evaluate_schema import EvaluateConfig, EvaluatedTaskConfig, LatencyConfig
from configs.load import ConfigError
from configs.schema import TeacherConfig, TrackingConfig
from configs.task_schema import TaskConfig, TaskSourceConfig
from launcher.evaluate import evaluate, opened
from launcher.measuring import results
from sharding.labels import read_labels
from sharding.manifest import Corpus, open_corpus
from sharding.stream import sequential
from sharding.task_corpus import build
from tests.conftest import WORDS
from tests.tiny_task import write_tiny_model, write_tiny_task


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Path) -> Path:
    """A task's ``corpus``, its ``teacher``, a student of two seeds and one that has learned nothing."""
    folder = tmp_path_factory.mktemp("made")
    location = write_tiny_task(folder, tiny_tokenizer)
    location.rename(folder / "corpus")
    corpus = open_corpus(folder / "corpus")
    write_tiny_model(folder / "teacher", tiny_tokenizer, corpus, steps=60)
    for seed in (0, 1):
        write_tiny_model(folder / f"student-{seed}", tiny_tokenizer, corpus, steps=25, seed=seed, layers=1)
    write_tiny_model(folder / "ignorant", tiny_tokenizer, corpus, steps=0, layers=1)
    return folder


def config_of(made: Path, output: Path, **changes: object) -> EvaluateConfig:
    task = EvaluatedTaskConfig(
        str(made / "corpus"),
        str(made / "teacher"),
        {"student": [str(made / "student-*")], "ignorant": [str(made / "ignorant")]},
    )
    settings: dict[str, object] = {
        "latency": LatencyConfig(seq_len=16, batch_rows=[1, 4], repeats=3),
        "tracking": TrackingConfig(uri=f"sqlite:///{output.parent}/mlflow.db"),
        **changes,
    }
    return EvaluateConfig(output=str(output), tasks=[task], **settings)  # type: ignore[arg-type]


def accuracy(folder: Path, location: Path) -> float:
    """By the stock model, row by row."""
    model, corpus = AutoModelForSequenceClassification.from_pretrained(folder).eval(), open_corpus(location)
    rows = sequential(corpus, "heldout", rows=10**6, batch_rows=1, rank=0, world_size=1)
    answers = [int(model(input_ids=row.ids_BS[:, : int(row.length_B)]).logits.argmax()) for row in rows]
    return float((np.array(answers) == read_labels(corpus, "heldout")[:, 0]).mean())


def test_a_whole_evaluation(made: Path, tmp_path: Path) -> None:
    config = config_of(made, tmp_path / "report")
    found = evaluate(config, opened(config))
    (column,) = found.columns
    assert (column.name, column.metric, column.rows) == ("mood", "accuracy", 90)
    expected = [accuracy(made / f"student-{seed}", made / "corpus") for seed in (0, 1)]
    student, ignorant = found.arms
    assert student.values("pytorch", column) == pytest.approx(expected)
    assert student.values("onnx", column) == pytest.approx(expected)
    assert len(student.values("int8", column)) == 2 and not ignorant.values("onnx", column)
    assert found.teacher.values("pytorch", column)[0] == accuracy(made / "teacher", made / "corpus")
    assert student.file_bytes["int8"] < student.file_bytes["onnx"]
    assert [(timing.form, timing.batch_rows) for timing in student.timings] == [
        (form, rows) for form in ("pytorch", "onnx", "int8") for rows in (1, 4)
    ]
    assert student.timings[:2] == ignorant.timings  # of one shape: measured once
    assert student.row_flops is not None and found.teacher.row_flops == 2 * student.row_flops

    report = tmp_path / "report"
    written = sorted(path.name for path in report.iterdir())
    assert written == ["config.yaml", "figure.png", "report.html", "report.md", "results.json"]
    assert (
        json.loads((report / "results.json").read_text())["teacher"]["shape"]
        == "bert: 2 layers x 24, 2 heads, feed-forward 40"
    )
    client = MlflowClient(tracking_uri=config.tracking.uri)
    experiment = client.get_experiment_by_name("distillation")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED" and run.data.tags["stage"] == "evaluation"
    assert run.data.metrics["score/mood/student/pytorch"] == pytest.approx(np.mean(expected))
    artifacts = [entry.path for entry in client.list_artifacts(run.info.run_id, "report")]
    assert "report/report.html" in artifacts and "report/figure.png" in artifacts
    opened(config)  # the report may be replaced


def test_a_teacher_at_chance_is_an_error_that_names_the_order_of_labels(made: Path, tmp_path: Path) -> None:
    config = config_of(made, tmp_path / "report", onnx=False, tracking=TrackingConfig(enabled=False))
    config.tasks[0].teacher = str(made / "ignorant")
    with pytest.raises(ValueError, match=r"no more than the .* of a constant answer.*order.*\(low, high\)"):
        results(config, opened(config))
    assert not (tmp_path / "report").exists()


def test_an_arm_has_one_shape(made: Path, tmp_path: Path) -> None:
    config = config_of(made, tmp_path / "report", onnx=False)
    config.tasks[0].arms["student"].append(str(made / "teacher"))
    with pytest.raises(ValueError, match="give each size an arm of its own"):
        results(config, opened(config))


def test_all_problems_are_told_at_once(made: Path, tmp_path: Path) -> None:
    config = config_of(made, made)  # which is no report
    config.tasks[0].arms["gone"] = [str(made / "nothing-*")]
    config.tasks.append(EvaluatedTaskConfig(str(tmp_path), "teacher", {}))
    with pytest.raises(ConfigError) as caught:
        opened(config)
    assert [
        part in str(caught.value) for part in ("is no report", "nothing-* does not exist", "tasks.1")
    ] == [True] * 3


def test_answers_in_texts_are_judged_as_texts(tiny_tokenizer: Path, tmp_path: Path) -> None:
    """One word is the answer, and a model finds it mostly: all forms are scored by the texts they mean."""
    random, mark = np.random.default_rng(0), WORDS[0]
    for name, count in (("train", 120), ("dev", 40)):
        asked = []
        for number in range(count):
            words = random.choice(WORDS[1:], int(random.integers(5, 15))).tolist()
            words.insert(int(random.integers(len(words))), mark)
            context = " ".join(words)
            answers = [{"text": mark, "answer_start": len(" ".join(["", *words]).split(f" {mark} ")[0])}]
            qas = [{"id": f"{name}{number}", "question": "which", "answers": answers}]
            asked.append({"title": "t", "paragraphs": [{"context": context, "qas": qas}]})
        (tmp_path / f"{name}-v1.1.json").write_text(json.dumps({"version": "1.1", "data": asked}))
    build(
        TaskConfig(
            task="squad",
            output=str(tmp_path / "out"),
            source=TaskSourceConfig(path=str(tmp_path)),
            seq_len=96,
            teacher=TeacherConfig(model=str(tiny_tokenizer)),
        )
    )
    corpus = open_corpus(tmp_path / "out/data")
    write_answerer(tmp_path / "teacher", tiny_tokenizer, corpus)
    task = EvaluatedTaskConfig(
        str(tmp_path / "out/data"), str(tmp_path / "teacher"), {"student": [str(tmp_path / "teacher")]}
    )
    latency = LatencyConfig(seq_len=16, batch_rows=[1], repeats=1)
    config = EvaluateConfig(
        output=str(tmp_path / "report"),
        tasks=[task],
        latency=latency,
        tracking=TrackingConfig(enabled=False),
    )
    found = evaluate(config, opened(config))
    (column,) = found.columns
    # The answer is one word: by the stock model it is found where the likeliest start is the mark.
    model = BertForQuestionAnswering.from_pretrained(tmp_path / "teacher").eval()
    (marked,) = AutoTokenizer.from_pretrained(tiny_tokenizer)(mark, add_special_tokens=False).input_ids
    hits = []
    for row in sequential(corpus, "heldout", rows=10**6, batch_rows=1, rank=0, world_size=1):
        ids = row.ids_BS[:, : int(row.length_B)]
        answer = model(
            input_ids=ids, token_type_ids=(torch.arange(ids.shape[1]) >= row.segment_B).long()[None]
        )
        hits.append(
            ids[0, answer.start_logits.argmax()] == marked and ids[0, answer.end_logits.argmax()] == marked
        )
    assert np.mean(hits) > 0.5
    for form in ("pytorch", "onnx"):
        (scores,) = found.teacher.scores[form][column.name]
        assert scores["exact"] == pytest.approx(np.mean(hits), abs=0.1) and scores["f1"] >= scores["exact"]
    assert "exact" in (tmp_path / "report/report.md").read_text()


def write_answerer(folder: Path, tokenizer: Path, corpus: Corpus) -> None:
    """A tiny BERT trained to answer the corpus's questions."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = BertForQuestionAnswering(
            BertConfig(
                vocab_size=232,
                hidden_size=24,
                num_hidden_layers=1,
                num_attention_heads=2,
                intermediate_size=40,
                max_position_embeddings=96,
                hidden_dropout_prob=0.0,
            )
        )
        rows = corpus.split("train").rows
        batch = next(sequential(corpus, "train", rows=rows, batch_rows=rows, rank=0, world_size=1))
        index_S = torch.arange(batch.ids_BS.shape[1])
        mask_BS, types_BS = index_S < batch.length_B[:, None], index_S >= batch.segment_B[:, None]
        labels = torch.from_numpy(read_labels(corpus, "train")).long()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for _ in range(50):
            model(
                input_ids=batch.ids_BS,
                attention_mask=mask_BS.long(),
                token_type_ids=(types_BS & mask_BS).long(),
                start_positions=labels[:, 0],
                end_positions=labels[:, 1],
            ).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
