"""What ``datasets`` reads: saved with the library itself, read part by part."""

from pathlib import Path

import datasets
import pytest

from configs.corpus_schema import SourceConfig, SourceKind
from sharding import hub
from sharding.documents import Document
from sharding.manifest import CorpusError
from sharding.sources import documents, parts, source_files

ROWS = [{"id": f"id {row}", "text": f"Text {row}" if row % 7 else " "} for row in range(230)]
KEPT = [row["text"] for row in ROWS if row["text"].strip()]


def source_of(path: Path, **keys: str) -> SourceConfig:
    return SourceConfig(kind=SourceKind.datasets, path=str(path), **keys)  # type: ignore[arg-type]


def read(source: SourceConfig) -> list[Document]:
    return [document for part in parts(source) for document in documents(source, part)]


@pytest.fixture
def no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache"


def test_parquet_is_cut_at_row_groups(tmp_path: Path, no_cache: Path) -> None:
    (tmp_path / "data").mkdir()
    records = datasets.Dataset.from_list(ROWS)
    for number, start in enumerate((0, 50, 130)):
        stop = (50, 130, 230)[number]
        file = tmp_path / "data" / f"train-{number:05d}-of-00003.parquet"
        records.select(range(start, stop)).to_parquet(str(file), batch_size=20)
    source = source_of(tmp_path / "data")
    assert source_files(source) == [] and len(parts(source)) == 3 + 4 + 5
    for most in (1, 2, 5, 11, 12, 2_000):
        found = hub.parts(source, most_parts=most)
        assert len(found) == min(most, 12) and not any(part.sequential for part in found)
        assert [part.name for part in found] == sorted({part.name for part in found})
        read = [document for part in found for document in documents(source, part)]
        assert [document.text for document in read] == KEPT
        assert len({document.id for document in read}) == len(KEPT)
        assert read[0].id == "train:0:1" and read[-1].id == "train:11:19"
    late = hub.parts(source, most_parts=5)[3]  # the third file's first row groups
    assert [document.id for document in documents(source_of(tmp_path / "data", id_field="id"), late)][:2] == [
        "id 130",
        "id 131",
    ]
    assert not list(no_cache.rglob("*.arrow"))


def test_of_many_files_each_is_a_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data").mkdir()
    for number in range(4):
        records = datasets.Dataset.from_list(ROWS[number * 50 : number * 50 + 50])
        records.to_parquet(str(tmp_path / "data" / f"{number}.parquet"), batch_size=20)
    monkeypatch.setattr(hub, "ENOUGH_SHARDS", 4)
    source = source_of(tmp_path / "data")
    assert [(part.start, part.stop) for part in parts(source)] == [(0, 1), (1, 2), (2, 3), (3, 4)]
    assert [document.text for document in read(source)] == [text for text in KEPT if int(text[5:]) < 200]


def test_a_single_shard_is_sequential(tmp_path: Path) -> None:
    (tmp_path / "json").mkdir()
    datasets.Dataset.from_list(ROWS).to_json(str(tmp_path / "json" / "train.jsonl"))
    (part,) = parts(source_of(tmp_path / "json"))
    assert part.sequential
    assert [document.text for document in read(source_of(tmp_path / "json"))] == KEPT


@pytest.mark.parametrize("name", ["disk", "dict"])
def test_saved_datasets_are_cut_at_rows(tmp_path: Path, no_cache: Path, name: str) -> None:
    records = datasets.Dataset.from_list(ROWS)
    records.save_to_disk(str(tmp_path / "disk"), num_shards=3)
    datasets.DatasetDict({"train": records}).save_to_disk(str(tmp_path / "dict"))
    source = source_of(tmp_path / name)
    for rows in (1, 60, 229, 230, 1_000):
        found = hub.parts(source, part_rows=rows)
        assert len(found) == -(-230 // rows) and not any(part.sequential for part in found)
        assert [part.name for part in found] == sorted({part.name for part in found})
        assert [(document.id, document.text) for part in found for document in documents(source, part)] == [
            (f"train:{number}", row["text"]) for number, row in enumerate(ROWS) if row["text"].strip()
        ]
    assert not list(no_cache.rglob("*.arrow"))


def test_what_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    datasets.Dataset.from_list(ROWS).to_parquet(str(tmp_path / "data" / "train.parquet"))
    datasets.Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "disk"))
    with pytest.raises(
        CorpusError, match="shard 0 row 0 has no source.text_field='body'; its fields are: id, text"
    ):
        read(source_of(tmp_path / "data", text_field="body"))
    with pytest.raises(CorpusError, match="disk row 0 has no source.id_field='key'"):
        read(source_of(tmp_path / "disk", id_field="key"))
    for source in (source_of(tmp_path / "data", split="nope"), source_of(tmp_path / "nothing")):
        with pytest.raises(CorpusError, match="cannot be read by `datasets`"):
            read(source)


def test_a_damaged_row_group(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    path = tmp_path / "data" / "train.parquet"
    datasets.Dataset.from_list(ROWS).to_parquet(str(path), batch_size=50)
    content = bytearray(path.read_bytes())
    content[20:400] = bytes(380)
    path.write_bytes(content)
    with pytest.raises(CorpusError, match=r"source.path=.*data .* cannot be read by `datasets`"):
        read(source_of(tmp_path / "data"))
