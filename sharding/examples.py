"""A task's examples: one or two texts and a label, from the records of its source."""

import logging
import math
from dataclasses import dataclass
from typing import Any

from configs.task_schema import TaskConfig, TaskKind
from sharding.glue import Task, task_of
from sharding.manifest import CorpusError
from sharding.records import Record, Source

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Example:
    """One example of a task."""

    id: str
    """``train-17``: split, and its place in the source, counted from 0."""
    a: str
    b: str | None
    """The second text of a pair."""
    label: float
    """Index of the class, or the value."""


def read_examples(config: TaskConfig, split: str) -> list[Example]:
    """The examples of a split (``train``, ``heldout``, MNLI: ``heldout-mismatched``) in the source's order.

    Raises: CorpusError naming file and line for anything that cannot be read; for a task of spans, whose
        examples ``sharding.squad`` reads.
    """
    task = task_of(config)
    return examples_of(Source(config.source, task), task, split)[0]


def examples_of(source: Source, task: Task, split: str) -> tuple[list[Example], int]:
    """The same, and how many broken lines were left out. Raises as ``read_examples``."""
    if task.kind is TaskKind.spans:
        raise CorpusError(f"task={task.name} asks for spans: its examples are questions, not labelled texts")
    broken: list[str] = []
    examples: list[Example] = []
    columns: tuple[str, ...] | None = None
    label = ""
    for number, (place, record) in enumerate(source.records(split, broken)):
        if columns is None:
            columns, label = _columns(task, record, place)
        texts = [_text(record, column, place) for column in columns]
        if not any(text.strip() for text in texts):
            raise CorpusError(f"{place} has no text in {' and '.join(columns)}; repair or remove it")
        second = texts[1] if len(texts) == 2 else None
        examples.append(Example(f"{split}-{number}", texts[0], second, _label(task, record, label, place)))
    if not examples:
        raise CorpusError(f"source.path={source.config.path}: the split {split} holds no examples")
    if broken:
        log.warning("%s: %d lines left out, such as %s", split, len(broken), broken[0])
    return examples, len(broken)


def _columns(task: Task, record: Record, place: str) -> tuple[tuple[str, ...], str]:
    """Columns of the texts and of the label in this file."""
    columns = next((each for each in task.columns if set(each) <= set(record)), None)
    label = next((each for each in task.label if each in record), None)
    for key, found, known in (
        ("source.columns", columns, [" and ".join(each) for each in task.columns]),
        ("source.label", label, list(task.label)),
    ):
        if found is None:
            raise CorpusError(
                f"{place}: no column {' or '.join(known)} for task={task.name}; its columns are "
                f"{', '.join(map(str, record))}: set {key}"
            )
    assert columns is not None and label is not None
    return columns, label


def _text(record: Record, column: str, place: str) -> str:
    text = record.get(column)
    if not isinstance(text, str):
        raise CorpusError(f"{place}: {column} holds {text!r}, not text; repair or remove it")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can spell half of a surrogate pair, which no tokenizer takes
        raise CorpusError(
            f"{place}: {column} is not valid Unicode: {error.reason} at character {error.start}; repair or "
            "remove it"
        ) from error
    return text


def _label(task: Task, record: Record, column: str, place: str) -> float:
    value: Any = record.get(column)
    text = str(value).strip()
    try:
        if task.kind is TaskKind.regression:
            number = float(text)
            if not math.isfinite(number):
                raise ValueError
            return number
        if text not in task.labels:
            number = float(value)
            if number < 0 or number % 1:
                raise ValueError
            text = str(int(number))  # a name may be a number, which files of numbers write as 1.0
            if not any(_is_integer(name) for name in task.labels):
                text = task.numbers[int(number)]
        return float(task.labels.index(text))
    except (ValueError, TypeError, IndexError):
        known = (
            f"none of {', '.join(task.labels)}, nor of 0 .. {len(task.labels) - 1}"
            if task.labels
            else "no number"
        )
        raise CorpusError(f"{place}: {column} is {value!r}, {known}; repair it, or set labels") from None


def _is_integer(text: str) -> bool:
    return text.removeprefix("-").isdecimal()
