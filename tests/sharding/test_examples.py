"""Examples of each task as its published files spell them, and what is no example."""

import json
from pathlib import Path

import pytest

from configs.task_schema import TaskConfig, TaskKind, TaskSourceConfig
from sharding.examples import Example, read_examples
from sharding.manifest import CorpusError

# A line of each task's own columns, and what it means: class names in the order of sharding.glue, or a value.
PUBLISHED = {
    "cola": ("src\t0\t*\tOne two.", None, ("One two.", None, 0.0)),
    "sst2": ("one two \t1", "sentence\tlabel", ("one two ", None, 1.0)),
    "mrpc": (
        '1\t70\t71\tHe said "a\tShe',
        "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String",
        ('He said "a', "She", 1.0),
    ),
    "stsb": (
        "0\tg\tf\t2012\t01\tn\tn\tA plane.\tAn air plane.\t3.800",
        "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore",
        ("A plane.", "An air plane.", 3.8),
    ),
    "qqp": (
        "1\t2\t3\tWhy?\tWhy not?\t0",
        "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate",
        ("Why?", "Why not?", 0.0),
    ),
    "mnli": (
        "0\t1\t1n\tfiction\tp\tp\tp\tp\tPremise\tHypothesis\tneutral\tcontradiction",
        "index\tpromptID\tpairID\tgenre\tsentence1_binary_parse\tsentence2_binary_parse\tsentence1_parse\t"
        "sentence2_parse\tsentence1\tsentence2\tlabel1\tgold_label",
        ("Premise", "Hypothesis", 2.0),
    ),
    "qnli": ("0\tWhat?\tThat.\tnot_entailment", "index\tquestion\tsentence\tlabel", ("What?", "That.", 1.0)),
    "rte": ("0\tA\tB\tentailment", "index\tsentence1\tsentence2\tlabel", ("A", "B", 0.0)),
    "wnli": ("0\tA\tB\t1", "index\tsentence1\tsentence2\tlabel", ("A", "B", 1.0)),
}


def of(folder: Path, task: str, **keys: object) -> TaskConfig:
    source = TaskSourceConfig(path=str(folder))
    for key in ("columns", "label"):
        setattr(source, key, keys.pop(key, None))
    return TaskConfig(task=task, source=source, **keys)  # type: ignore[arg-type]


def written(folder: Path, name: str, lines: list[str]) -> Path:
    for split in ("train", "dev"):
        (folder / f"{split}{name}").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


@pytest.mark.parametrize("task", PUBLISHED)
def test_glue(task: str, tmp_path: Path) -> None:
    line, header, expected = PUBLISHED[task]
    written(tmp_path, ".tsv", [header, line, line] if header else [line, line])
    assert read_examples(of(tmp_path, task), "train") == [Example(f"train-{n}", *expected) for n in range(2)]
    assert read_examples(of(tmp_path, task), "heldout")[1].id == "heldout-1"


def test_mnli_keeps_matched_and_mismatched_apart(tmp_path: Path) -> None:
    for name in ("train", "dev_matched", "dev_mismatched"):
        (tmp_path / f"{name}.tsv").write_text(f"sentence1\tsentence2\tgold_label\n{name}\tb\tentailment\n")
    found = {
        split: read_examples(of(tmp_path, "mnli"), split)[0].a
        for split in ("train", "heldout", "heldout-mismatched")
    }
    assert found == {"train": "train", "heldout": "dev_matched", "heldout-mismatched": "dev_mismatched"}
    with pytest.raises(CorpusError, match="no split test, only train, heldout, heldout-mismatched"):
        read_examples(of(tmp_path, "mnli"), "test")


def test_labels_follow_their_names_not_their_order(tmp_path: Path) -> None:
    lines = [json.dumps({"premise": "p", "hypothesis": "h", "label": label}) for label in (0, "neutral", 2)]
    written(tmp_path, ".jsonl", lines)
    teacher = of(tmp_path, "mnli", labels=["contradiction", "entailment", "neutral"])
    assert [example.label for example in read_examples(teacher, "train")] == [1, 2, 0]
    assert [example.label for example in read_examples(of(tmp_path, "mnli"), "train")] == [0, 1, 2]


@pytest.mark.parametrize(
    ("labels", "values", "expected"),
    [
        (["no", "yes"], ["yes", "no", 1, 0, "1", 1.0, True], [1, 0, 1, 0, 1, 1, 1]),
        (["1", "2", "3"], [1, "3", 2.0], [0, 2, 1]),  # names that are numbers
        (["0", "1", "-1"], [-1, 0], [2, 0]),
        (["-1", "1"], ["1", -1], [1, 0]),
    ],
)
def test_names_and_numbers_of_ones_own_classes(
    labels: list[str], values: list, expected: list[int], tmp_path: Path
) -> None:
    written(tmp_path, ".jsonl", [json.dumps({"text": "t", "class": value}) for value in values])
    own = of(tmp_path, "own", kind=TaskKind.classification, labels=labels, columns=["text"], label="class")
    assert [example.label for example in read_examples(own, "train")] == expected


def test_names_that_are_numbers_are_not_places_as_well(tmp_path: Path) -> None:
    """0, 1, 2 of a file, where the classes are called 1, 2, 3, would become two classes."""
    written(tmp_path, ".jsonl", ['{"text": "t", "class": 0}'])
    settings = {"kind": TaskKind.classification, "columns": ["text"], "label": "class"}
    with pytest.raises(CorpusError, match="class is 0, none of 1, 2, 3"):
        read_examples(of(tmp_path, "own", labels=["1", "2", "3"], **settings), "train")


def test_regression_and_pairs_of_ones_own(tmp_path: Path) -> None:
    written(tmp_path, ".csv", ["question,answer,grade", '"Why, then?","So ""it"" is",-2.5', "a,,1e1"])
    own = of(tmp_path, "own", kind=TaskKind.regression, columns=["question", "answer"], label="grade")
    assert read_examples(own, "train") == [
        Example("train-0", "Why, then?", 'So "it" is', -2.5),
        Example("train-1", "a", "", 10.0),
    ]


@pytest.mark.parametrize(
    ("task", "record", "message"),
    [
        ("sst2", {"sentence": "x", "label": 2}, r"train.jsonl:2: label is 2, none of negative, positive"),
        ("sst2", {"sentence": "x", "label": -1}, "label is -1, none of"),
        ("sst2", {"sentence": "x", "label": 0.5}, "label is 0.5, none of"),
        ("sst2", {"sentence": "x", "label": None}, "label is None, none of"),
        ("sst2", {"sentence": "x"}, "label is None, none of"),
        ("sst2", {"sentence": None, "label": 1}, "sentence holds None, not text"),
        ("sst2", {"sentence": 7, "label": 1}, "sentence holds 7, not text"),
        ("sst2", {"sentence": " ", "label": 1}, "has no text in sentence"),
        ("sst2", {"sentence": "\ud800", "label": 1}, "sentence is not valid Unicode"),
        ("stsb", {"sentence1": "x", "sentence2": "y", "label": "high"}, "label is 'high', no number"),
        ("stsb", {"sentence1": "x", "sentence2": "y", "label": "nan"}, "label is 'nan', no number"),
    ],
)
def test_what_is_no_example_is_named(task: str, record: dict, message: str, tmp_path: Path) -> None:
    sound = {"sentence": "x", "sentence1": "x", "sentence2": "y", "label": 1}
    written(tmp_path, ".jsonl", [json.dumps(sound), json.dumps(record)])
    with pytest.raises(CorpusError, match=message):
        read_examples(of(tmp_path, task), "train")


def test_missing_columns_are_named_with_the_ones_there_are(tmp_path: Path) -> None:
    written(tmp_path, ".csv", ["text,gold", "a,1"])
    with pytest.raises(CorpusError, match="no column sentence for task=sst2; .* text, gold: set source.col"):
        read_examples(of(tmp_path, "sst2"), "train")
    with pytest.raises(CorpusError, match="no column label .*set source.label"):
        read_examples(of(tmp_path, "sst2", columns=["text"]), "train")
    assert read_examples(of(tmp_path, "sst2", columns=["text"], label="gold"), "train")[0].label == 1


def test_empty_splits_and_spans_are_refused(tmp_path: Path) -> None:
    written(tmp_path, ".tsv", ["sentence\tlabel"])
    with pytest.raises(CorpusError, match="the split train holds no examples"):
        read_examples(of(tmp_path, "sst2"), "train")
    with pytest.raises(CorpusError, match="task=squad asks for spans"):
        read_examples(of(tmp_path, "squad"), "train")
