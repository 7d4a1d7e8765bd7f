"""Sources that the ``datasets`` library reads: hub datasets, folders of parquet, arrow or JSON, saved ones."""

import os
from collections.abc import Iterator

from configs.corpus_schema import SourceConfig
from sharding.documents import Document, Part, record_fields
from sharding.manifest import CorpusError


def parts(source: SourceConfig) -> list[Part]:
    return [Part("00000", source.path, 0, None, 0, sequential=True)]


def documents(source: SourceConfig, part: Part) -> Iterator[Document]:
    """Rows of a ``datasets`` dataset, streamed: nothing is copied to its cache."""
    import datasets

    try:
        saved = os.path.isdir(source.path) and any(
            os.path.exists(os.path.join(source.path, name)) for name in ("state.json", "dataset_dict.json")
        )
        if saved:  # by save_to_disk
            loaded = datasets.load_from_disk(source.path)
            rows = loaded[source.split] if isinstance(loaded, datasets.DatasetDict) else loaded
        else:
            rows = datasets.load_dataset(
                source.path, source.subset, split=source.split, revision=source.revision, streaming=True
            )
        for number, record in enumerate(rows):
            place = f"source.path={source.path} row {number}"
            yield record_fields(record, source, place, default_id=f"{source.split}:{number}")
    except CorpusError:
        raise
    # Everything from a missing network to a missing split comes from `datasets`, in exceptions of many kinds.
    except Exception as error:
        raise CorpusError(
            f"source.path={source.path} (subset {source.subset}, split {source.split}, revision "
            f"{source.revision}) cannot be read by `datasets`: {type(error).__name__}: {error}"
        ) from error
