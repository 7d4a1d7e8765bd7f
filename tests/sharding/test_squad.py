"""Questions: windows that hold their answers, and the way back to text."""

import json
from pathlib import Path

import numpy as np
import pytest

from configs.schema import TeacherConfig
from configs.task_schema import TaskConfig, TaskSourceConfig
from sharding.labels import read_labels
from sharding.manifest import CorpusError, open_corpus
from sharding.squad import ANSWER_TOKENS, answer_texts, read_windows
from sharding.stream import sequential
from sharding.task_corpus import build
from sharding.verify import verify
from tests.conftest import WORDS
from trainer.metrics import score, text_score


def articles(count: int, seed: int) -> dict:
    """Contexts of 5 to 200 words, of which 1 to 4 are the answer."""
    random = np.random.default_rng(seed)
    found = []
    for number in range(count):
        words = random.choice(WORDS, int(random.integers(5, 200))).tolist()
        first = int(random.integers(len(words)))
        text = " ".join(words[first : first + int(random.integers(1, 5))])
        start = len(" ".join([*words[:first], ""]))
        answers = [{"text": text, "answer_start": start}, {"text": words[0], "answer_start": 0}]
        asked = {"id": f"q{number}", "question": " ".join(words[:3]), "answers": answers}
        found.append({"title": "t", "paragraphs": [{"context": " ".join(words), "qas": [asked]}]})
    return {"version": "1.1", "data": found}


def config_of(folder: Path, tokenizer: Path, output: Path) -> TaskConfig:
    source, teacher = TaskSourceConfig(path=str(folder)), TeacherConfig(model=str(tokenizer))
    return TaskConfig(task="squad", output=str(output), source=source, seq_len=96, teacher=teacher)


@pytest.fixture
def files(tmp_path: Path) -> Path:
    folder = tmp_path / "files"
    folder.mkdir()
    for name, count, seed in (("train", 40, 0), ("dev", 60, 1)):
        (folder / f"{name}-v1.1.json").write_text(json.dumps(articles(count, seed)))
    return folder


def test_labels_lead_back_to_the_answers(files: Path, tiny_tokenizer: Path, tmp_path: Path) -> None:
    build(config_of(files, tiny_tokenizer, tmp_path))
    corpus = open_corpus(tmp_path / "data")
    assert verify(corpus) == [] and corpus.split("heldout").documents == 60
    windows, labels = read_windows(corpus, "heldout"), read_labels(corpus, "heldout")
    assert len(windows) == len(labels) > 60  # some contexts take several
    (batch,) = sequential(corpus, "heldout", rows=10**6, batch_rows=10**6, rank=0, world_size=1)
    logits = np.zeros((len(labels), 96, 2), np.float32)
    answered = set()
    for n, (window, (first, last)) in enumerate(zip(windows, labels.astype(int), strict=True)):
        assert window.first == batch.segment_B[n]
        assert window.first + len(window.offsets) + 1 == batch.length_B[n]
        logits[n, first, 0] = logits[n, last, 1] = 5
        if last:
            answered.add(window.id)
            begin, end = window.offsets[first - window.first][0], window.offsets[last - window.first][1]
            assert window.context[begin:end] == window.answers[0]
    assert len(answered) == 60  # windows overlap: each answer lies whole in one of them
    assert answer_texts(windows, logits) == {window.id: window.answers[0] for window in windows}
    assert text_score(windows, logits) == {"exact": 1.0, "f1": 1.0}
    assert corpus.manifest.task is not None
    assert score(corpus.manifest.task, logits, labels) == {"exact": 1.0}
    with pytest.raises(CorpusError, match="train.windows.jsonl.gz cannot be read"):
        read_windows(corpus, "train")


def test_answers_are_spans_and_short(files: Path, tiny_tokenizer: Path, tmp_path: Path) -> None:
    build(config_of(files, tiny_tokenizer, tmp_path))
    windows = read_windows(open_corpus(tmp_path / "data"), "heldout")
    window = next(window for window in windows if len(window.offsets) > ANSWER_TOKENS + 5)
    logits = np.zeros((1, 96, 2), np.float32)
    logits[0, window.first + 2, 1], logits[0, window.first + 4, 0] = 9, 9  # the last before the first
    logits[0, 0] = 99  # outside the context
    logits[0, window.first + 4 + ANSWER_TOKENS, 1] = 8  # one token too long
    logits[0, window.first + 5, 1] = 7
    (text,) = answer_texts([window], logits).values()
    assert text == window.context[window.offsets[4][0] : window.offsets[5][1]]


def test_malformed_questions_are_named(files: Path, tiny_tokenizer: Path, tmp_path: Path) -> None:
    path = files / "dev-v1.1.json"
    config = config_of(files, tiny_tokenizer, tmp_path)
    for change, message in (
        ({"answers": []}, "article 1 is no question with question, context and answers"),
        ({"answers": [{"text": "elsewhere", "answer_start": 0}]}, "does not hold the answer 'elsewhere'"),
    ):
        changed = articles(3, 1)
        changed["data"][1]["paragraphs"][0]["qas"][0].update(change)
        path.write_text(json.dumps(changed))
        with pytest.raises(CorpusError, match=message):
            build(config)
    path.write_text('{"a": 1}')
    with pytest.raises(CorpusError, match="is not SQuAD's JSON"):
        build(config)
    config.seq_len = 64
    with pytest.raises(CorpusError, match="seq_len=64 leaves a context no room"):
        build(config)
