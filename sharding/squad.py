"""Questions about contexts (SQuAD 1.1) as rows: overlapping windows of the context, each with its question.

A row is ``[CLS] question [SEP] window [SEP]``; its label is the answer's first and last token, both 0 where
the window does not hold all of it. What leads from a row back to text lies beside the shards of the splits
to evaluate on, in ``<split>.windows.jsonl.gz``. Letters: n rows, S sequence length, C tokens of a window.
"""

import gzip
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from sharding.files import new_file
from sharding.manifest import Corpus, CorpusError
from sharding.packing import Rows
from sharding.records import Record, Source
from sharding.tokens import id_dtype

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

STRIDE = 128
"""Tokens from a window's start to the next one's, at most (Devlin et al. 2018); half a window, if less."""
QUESTION_TOKENS = 64
"""Longer questions are cut."""
ANSWER_TOKENS = 30
"""Longest answer that is read from a model's outputs."""


@dataclass(frozen=True)
class Question:
    """One question, with all answers that count as right."""

    id: str
    question: str
    context: str
    answers: tuple[str, ...]
    start: int
    """Where the first answer begins in the context, in characters."""


@dataclass(frozen=True)
class Window:
    """What leads from a row back to text."""

    id: str
    """Of the question."""
    context: str
    answers: tuple[str, ...]
    first: int
    """The row's first token of the context."""
    offsets: tuple[tuple[int, int], ...]
    """[C]: characters of the context that each of its tokens stands for, from, to."""


def read_questions(source: Source, split: str) -> list[Question]:
    """The questions of a split in the source's order. Raises: CorpusError naming file and place."""
    found = [_question(source, record, place) for place, record in source.records(split, [])]
    if not found:
        raise CorpusError(f"source.path={source.config.path}: the split {split} holds no questions")
    return found


def _question(source: Source, record: Record, place: str) -> Question:
    columns, label = source.task.columns[0], source.task.label[0]
    try:
        question, context = (record[column] for column in columns)
        answers: Any = record[label]
        if isinstance(answers, dict):  # as data sets on the hub have them
            answers = [
                {"text": text, "answer_start": start}
                for text, start in zip(answers["text"], answers["answer_start"], strict=True)
            ]
        texts, start = tuple(str(answer["text"]) for answer in answers), int(answers[0]["answer_start"])
        question.encode(), context.encode()
    except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
        raise CorpusError(
            f"{place} is no question with {', '.join(columns)} and {label} (text, answer_start), one at "
            f"least: {error!r}; repair or remove it"
        ) from None
    if not texts[0] or context[start : start + len(texts[0])] != texts[0]:
        raise CorpusError(
            f"{place}: the context does not hold the answer {texts[0]!r} at character {start}; repair or "
            "remove it"
        )
    return Question(str(record.get("id", place)), question, context, texts, start)


def encode_windows(
    questions: Sequence[Question], tokenizer: "PreTrainedTokenizerFast", seq_len: int
) -> tuple[Rows, NDArray[np.float32], list[Window]]:
    """Rows of all windows of all questions, labels float32 [n, 2], and what leads back to text.

    Raises: CorpusError for a ``seq_len`` that leaves no room for a context.
    """
    if seq_len < QUESTION_TOKENS + 16:
        raise CorpusError(
            f"seq_len={seq_len} leaves a context no room beside a question of {QUESTION_TOKENS} tokens; "
            "384 is usual"
        )
    rust = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    rust.no_truncation()
    rust.no_padding()
    rust.encode_special_tokens = True  # text is never read as a special token
    asked = rust.encode_batch([question.question for question in questions], add_special_tokens=False)
    contexts = rust.encode_batch([question.context for question in questions], add_special_tokens=False)
    cls_id, sep_id = tokenizer.cls_token_id, tokenizer.sep_token_id
    rows: list[list[int]] = []
    labels: list[tuple[int, int]] = []
    windows: list[Window] = []
    for question, a, b in zip(questions, asked, contexts, strict=True):
        head = [cls_id, *a.ids[:QUESTION_TOKENS], sep_id]
        room = seq_len - len(head) - 1
        step = min(STRIDE, room // 2)
        answer = _tokens_of(question, b.offsets)
        for start in range(0, max(len(b.ids) - room, 0) + step, step):
            stop = min(start + room, len(b.ids))
            rows.append([*head, *b.ids[start:stop], sep_id])
            inside = start <= answer[0] and answer[1] < stop
            shift = len(head) - start
            labels.append((answer[0] + shift, answer[1] + shift) if inside else (0, 0))
            offsets = tuple(b.offsets[start:stop])
            windows.append(Window(question.id, question.context, question.answers, len(head), offsets))
            if stop == len(b.ids):
                break
    ids = np.full((len(rows), seq_len), tokenizer.pad_token_id, id_dtype(len(tokenizer)))
    for row, into in zip(rows, ids, strict=True):
        into[: len(row)] = row
    lengths = np.array([len(row) for row in rows], np.uint16)
    segments = np.array([window.first for window in windows], np.uint16)
    return Rows(ids, lengths, segments), np.array(labels, np.float32), windows


def _tokens_of(question: Question, offsets: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """First and last token of the context that touch its first answer."""
    end = question.start + len(question.answers[0])
    touched = [n for n, (start, stop) in enumerate(offsets) if start < end and stop > question.start]
    if not touched:
        raise CorpusError(
            f"question {question.id}: the tokenizer makes no token of its answer {question.answers[0]!r}; "
            "remove it"
        )
    return touched[0], touched[-1]


def write_windows(root: Path, split: str, windows: Iterable[Window]) -> None:
    """Write what leads from the rows of a split back to text, in their order; the same bytes each time."""
    with new_file(root / _name(split)) as file, gzip.GzipFile("", "wb", 6, file, mtime=0) as packed:
        for window in windows:
            packed.write(json.dumps(asdict(window)).encode() + b"\n")


def read_windows(corpus: Corpus, split: str) -> list[Window]:
    """What leads from the rows [n] of a split back to text. Raises: CorpusError when it is not all there."""
    try:
        lines = gzip.decompress(corpus.store.read(_name(split))).splitlines()
    except (OSError, EOFError) as error:
        raise CorpusError(
            f"corpus {corpus.store.location}: {_name(split)} cannot be read ({error}); it is there for "
            "splits to evaluate on of tasks of spans"
        ) from error
    if len(lines) != corpus.split(split).rows:
        raise CorpusError(
            f"corpus {corpus.store.location}: {_name(split)} tells of {len(lines)} rows, the split has "
            f"{corpus.split(split).rows}; build it again"
        )
    windows = []
    for fields in map(json.loads, lines):
        offsets = tuple((start, stop) for start, stop in fields["offsets"])
        windows.append(Window(**{**fields, "answers": tuple(fields["answers"]), "offsets": offsets}))
    return windows


def answer_texts(windows: Sequence[Window], logits: NDArray[np.float32]) -> dict[str, str]:
    """Of each question, by its id, the text that a model's outputs [n, S, 2] mean: the span in any of its
    windows, ANSWER_TOKENS at most, whose first and last token have the greatest sum of logits."""
    best: dict[str, tuple[float, str]] = {}
    for window, row in zip(windows, logits, strict=True):
        first, last = row[window.first : window.first + len(window.offsets)].astype(np.float64).T
        sums = first[:, None] + last[None, :]
        tokens = np.arange(len(first)) - np.arange(len(first))[:, None] + 1
        sums[(tokens < 1) | (tokens > ANSWER_TOKENS)] = -np.inf
        start, stop = np.unravel_index(int(sums.argmax()), sums.shape)
        text = window.context[window.offsets[start][0] : window.offsets[stop][1]].strip()
        if window.id not in best or sums[start, stop] > best[window.id][0]:
            best[window.id] = (float(sums[start, stop]), text)
    return {id: text for id, (_, text) in best.items()}


def _name(split: str) -> str:
    return f"{split}.windows.jsonl.gz"
