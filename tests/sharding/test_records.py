"""Files of every layout: the same records, the right splits, and every malformed line named."""

import gzip
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest

from configs.task_schema import TaskSourceConfig
from sharding.glue import TASKS
from sharding.manifest import CorpusError
from sharding.records import Source, hub_splits, rows_of

RECORDS = [
    {"sentence1": 'He said "no', "sentence2": "A line\u2028within, and a comma", "label": "entailment"},
    {"sentence1": "Ünïcode text", "sentence2": "b", "label": "not_entailment"},
    {"sentence1": "third", "sentence2": "", "label": "entailment"},
]
TSV = "".join("\t".join(record.values()) + "\n" for record in [{k: k for k in RECORDS[0]}, *RECORDS])


def source(folder: Path, task: str = "rte", **keys: Any) -> Source:
    return Source(TaskSourceConfig(path=str(folder), **keys), TASKS[task])


def records(found: Source, split: str = "train") -> list[dict]:
    return [record for _, record in found.records(split, [])]


CLASSES = datasets.Features(
    {
        "sentence1": datasets.Value("string"),
        "sentence2": datasets.Value("string"),
        "label": datasets.ClassLabel(names=["not_entailment", "entailment"]),  # not the task's order
    }
)


def as_parquet(path: Path) -> None:
    datasets.Dataset.from_list(RECORDS, features=CLASSES).to_parquet(str(path))


def as_json(path: Path) -> None:
    datasets.Dataset.from_list(RECORDS).to_json(str(path))


def as_csv(path: Path) -> None:
    datasets.Dataset.from_list(RECORDS).to_csv(str(path), index=False)


LAYOUTS: dict[str, Callable[[Path], object]] = {
    "train.tsv": lambda path: path.write_text(TSV),
    "train.tsv.xz": lambda path: path.write_bytes(lzma.compress(("\ufeff" + TSV).encode())),
    "train.tsv.gz": lambda path: path.write_bytes(gzip.compress(TSV.replace("\n", "\r\n").encode())),
    "train.csv": as_csv,
    "train.jsonl": as_json,
    "train.parquet": as_parquet,
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_gives_the_same_records(name: str, tmp_path: Path) -> None:
    LAYOUTS[name](tmp_path / name)
    LAYOUTS[name](tmp_path / name.replace("train", "dev"))
    found = source(tmp_path)
    assert records(found) == RECORDS and records(found, "heldout") == RECORDS
    assert found.names == (name, name.replace("train", "dev"))


def test_pieces_are_one_split_and_mismatched_is_kept_apart(tmp_path: Path) -> None:
    rows = datasets.Dataset.from_list(RECORDS)
    for number in range(2):
        piece = rows.select(range(2 * number, min(2 * number + 2, 3)))
        piece.to_parquet(str(tmp_path / f"train-{number:05d}-of-00002.parquet"))
    for number, name in enumerate(("matched", "mismatched")):
        rows.select([number]).to_parquet(str(tmp_path / f"validation_{name}-00000-of-00001.parquet"))
    rows.to_parquet(str(tmp_path / "test_matched-00000-of-00001.parquet"))
    found = source(tmp_path, "mnli")
    assert list(found.splits) == ["train", "heldout", "heldout-mismatched"]
    assert records(found) == RECORDS
    assert records(found, "heldout") == RECORDS[:1]
    assert records(found, "heldout-mismatched") == RECORDS[1:2]


def test_folders_below_and_files_by_name(tmp_path: Path) -> None:
    below = tmp_path / "SST-2"
    below.mkdir()
    for name in ("train.tsv", "dev.tsv", "more.tsv"):
        (below / name).write_text(f"sentence\tlabel\n{name}\t1\n")
    (below / "dev_ids.tsv").write_text("1\t2\n")  # GLUE's MRPC has such a list
    assert records(source(tmp_path, "sst2"), "heldout")[0]["sentence"] == "dev.tsv"
    named = source(below, "sst2", train="more.tsv", dev=["dev.tsv", "train.tsv"])
    assert list(named.splits) == ["train", "heldout", "heldout-train"]
    assert records(named)[0]["sentence"] == "more.tsv"


def test_cola_has_no_header(tmp_path: Path) -> None:
    for name in ("train", "dev"):
        (tmp_path / f"{name}.tsv").write_text('gj04\t1\t\tIt rains.\ngj04\t0\t*\tRains it "now.\n')
    assert [(record["label"], record["sentence"]) for record in records(source(tmp_path, "cola"))] == [
        ("1", "It rains."),
        ("0", 'Rains it "now.'),
    ]
    (tmp_path / "train.tsv").write_text("sentence\tlabel\nIt rains.\t1\n")
    assert records(source(tmp_path, "cola")) == [{"sentence": "It rains.", "label": "1"}]


def test_broken_lines_are_named_or_left_out_where_the_published_file_has_them(tmp_path: Path) -> None:
    for name in ("train", "dev"):
        (tmp_path / f"{name}.tsv").write_text("question1\tquestion2\tis_duplicate\na\tb\t1\nonly\nc\td\t0\n")
    broken: list[str] = []
    found = list(source(tmp_path, "qqp").records("train", broken))
    assert [record["question1"] for _, record in found] == ["a", "c"]
    assert broken == [f"{tmp_path}/train.tsv:3 has 1 columns, not 3 (question1, question2, is_duplicate)"]
    with pytest.raises(CorpusError, match=r"train.tsv:3 has 1 columns.*repair or remove"):
        records(source(tmp_path, "rte"))


MALFORMED: dict[str, tuple[str, bytes, str]] = {
    "json": ("train.jsonl", b'{"a": 1}\n{"a": \n', r"train.jsonl:2 is not JSON"),
    "no object": ("train.jsonl", b"[1]\n", r"train.jsonl:1 is a JSON list"),
    "csv": ("train.csv", b"a,b\nx,y\nx\n", r"train.csv:3 has not the 2 columns"),
    "csv quotes": ("train.csv", b'a,b\nx,"y" z\n', r"train.csv:2 is not CSV"),
    "encoding": ("train.tsv", b"a\tb\n\xff\tc\n", r"train.tsv:2 is not UTF-8"),
    "csv encoding": ("train.csv", b"a,b\n\xff,c\n", "train.csv is not UTF-8"),
    "parquet": ("train.parquet", b"PAR1 not really PAR1", "train.parquet is no parquet file"),
    "cut": ("train.tsv.xz", lzma.compress(TSV.encode())[:-20], "train.tsv.xz is truncated or damaged"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_file_is_named_with_its_line(case: str, tmp_path: Path) -> None:
    name, data, message = MALFORMED[case]
    (tmp_path / name).write_bytes(data)
    (tmp_path / "dev.tsv").write_text(TSV)
    with pytest.raises(CorpusError, match=message):
        records(source(tmp_path))


@pytest.mark.parametrize(
    ("files", "keys", "message"),
    [
        ([], {}, "it holds nothing"),
        (["dev.tsv"], {}, "0 sources of training examples.*set source.train; it holds dev"),
        (["train.tsv"], {}, "nothing to evaluate on .*set source.dev"),
        (["train.tsv", "train.csv", "dev.tsv"], {}, "holds train.csv and train.tsv: set source.train"),
        (["train-a.tsv", "train-b.tsv", "dev.tsv"], {}, "2 sources of training examples"),
        (["train.tsv", "dev.tsv"], {"dev": ["missing.tsv"]}, "missing.tsv is no file that ends in"),
    ],
)
def test_what_is_not_clear_is_asked_for(files: list[str], keys: dict, message: str, tmp_path: Path) -> None:
    for name in files:
        (tmp_path / name).write_text(TSV)
    with pytest.raises(CorpusError, match=message):
        source(tmp_path, **keys)


def test_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(CorpusError, match="does not exist; give a folder or a hub name"):
        source(tmp_path / "missing")
    with pytest.raises(CorpusError, match="is a file; give its folder"):
        source(tmp_path / "file")


def test_a_saved_data_set_gives_class_names(tmp_path: Path) -> None:
    rows = datasets.Dataset.from_list(RECORDS, features=CLASSES)
    datasets.DatasetDict(train=rows, validation=rows.select([1])).save_to_disk(str(tmp_path / "saved"))
    found = source(tmp_path / "saved")
    assert records(found) == RECORDS and records(found, "heldout") == RECORDS[1:2]
    assert found.names == ("saved",)
    rows.save_to_disk(str(tmp_path / "one"))
    with pytest.raises(CorpusError, match="one saved split"):
        source(tmp_path / "one")


def test_a_streamed_data_set_gives_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "data").mkdir()
    for name in ("train", "validation"):
        rows = datasets.Dataset.from_list(RECORDS, features=CLASSES)
        rows.to_parquet(str(tmp_path / "data" / f"{name}-00000-of-00001.parquet"))
    splits = hub_splits(str(tmp_path / "data"), None, None)  # what a hub name goes through
    assert sorted(splits) == ["train", "validation"]
    assert [record for _, record in rows_of(splits["train"], TASKS["rte"], "here")] == RECORDS
    other = list(rows_of(splits["train"], TASKS["sst2"], "here"))  # names that are not the task's: numbers
    assert [record["label"] for _, record in other] == [1, 0, 1]
    assert other[2][0] == "here row 2" and not list(tmp_path.glob("cache/**/*.arrow"))


def test_a_hub_name_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CorpusError, match="source.path=nobody/nothing .*cannot be read by `datasets`"):
        Source(TaskSourceConfig(path="nobody/nothing"), TASKS["rte"])
