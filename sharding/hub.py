"""Sources that the ``datasets`` library reads: hub datasets, folders of parquet, arrow or JSON, saved ones.

They are streamed or mapped: nothing is copied to its cache.
"""

import contextlib
import functools
import itertools
import os
from collections.abc import Iterator
from typing import Any

from configs.corpus_schema import SourceConfig
from sharding.documents import Document, Part, record_fields
from sharding.manifest import CorpusError

PART_ROWS = 50_000
"""Rows of a part of a dataset that ``save_to_disk`` wrote."""
ENOUGH_SHARDS = 256
"""A streamed dataset of fewer files is cut finer, where its format allows: parquet at its row groups. Each
process reads the ends of all files for that."""
MOST_PARTS = 2048
"""Shards of a streamed dataset are joined so that there are no more parts."""


def parts(source: SourceConfig, part_rows: int = PART_ROWS, most_parts: int = MOST_PARTS) -> list[Part]:
    """Ranges of rows of a saved dataset, of shards of a streamed one.

    Raises: CorpusError when `datasets` cannot read the source.
    """
    with failures(_named(source)):
        rows = _rows(source.path, source.subset, source.split, source.revision)
        streamed = hasattr(rows, "num_shards")
        if streamed:
            count = min(rows.num_shards, most_parts)
            bounds = [rows.num_shards * part // count for part in range(count + 1)]
        else:
            bounds = [*range(0, len(rows), part_rows), len(rows)]
    sequential = streamed and rows.num_shards == 1  # a file of any size
    return [
        Part(f"{start:012d}", source.path, start, stop, 0, sequential)
        for start, stop in itertools.pairwise(bounds)
    ]


def documents(source: SourceConfig, part: Part) -> Iterator[Document]:
    """The rows of a part. Without ``source.id_field`` their ids are split and row in a saved dataset; else
    split, shard and row in the shard, for rows before a part are not counted.

    Raises: CorpusError naming the row.
    """
    assert part.stop is not None
    with failures(_named(source)):
        rows = _rows(source.path, source.subset, source.split, source.revision)
        if hasattr(rows, "num_shards"):
            for shard in range(part.start, part.stop):
                for row, record in enumerate(rows.shard(rows.num_shards, shard)):
                    place = f"source.path={source.path} shard {shard} row {row}"
                    yield record_fields(record, source, place, f"{source.split}:{shard}:{row}")
        else:
            for row, record in enumerate(rows.select(range(part.start, part.stop)), start=part.start):
                place = f"source.path={source.path} row {row}"
                yield record_fields(record, source, place, default_id=f"{source.split}:{row}")


@functools.lru_cache(maxsize=1)  # a process reads many parts
def _rows(path: str, subset: str | None, split: str, revision: str | None) -> Any:
    import datasets

    if any(os.path.exists(os.path.join(path, name)) for name in ("state.json", "dataset_dict.json")):
        loaded = datasets.load_from_disk(path)
        return loaded[split] if isinstance(loaded, datasets.DatasetDict) else loaded
    rows = datasets.load_dataset(path, subset, split=split, revision=revision, streaming=True)
    return rows if rows.num_shards >= ENOUGH_SHARDS else rows.reshard()


@contextlib.contextmanager
def failures(source: str) -> Iterator[None]:
    """Everything from a missing network to a missing split: `datasets` has exceptions of many kinds."""
    try:
        yield
    except (CorpusError, GeneratorExit):
        raise
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
        raise CorpusError(f"{source} cannot be read by `datasets`: {said}") from error


def _named(source: SourceConfig) -> str:
    own = f"subset {source.subset}, split {source.split}, revision {source.revision}"
    return f"source.path={source.path} ({own})"
