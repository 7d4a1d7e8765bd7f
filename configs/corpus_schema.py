"""The schema of a corpus build (``launcher/corpus.py``): every key, its type, its default and its meaning."""

from dataclasses import dataclass, field
from enum import Enum

from omegaconf import MISSING

from configs.schema import TrackingConfig


class Packing(Enum):
    """How documents fill rows."""

    full = "full"
    """Rows are filled across document ends; only the last row of a split can hold padding."""
    document = "document"
    """A row never leaves its document; a document's last row is padded."""


class Deduplicate(Enum):
    """Which documents of a source are left out because another one holds the same."""

    none = "none"
    """All stay."""
    exact = "exact"
    """Of documents with the same token ids the first one stays."""
    near = "near"
    """As ``exact``; and of documents that share most word sequences (MinHash LSH) the first stays."""


class SourceKind(Enum):
    """What kind of text a corpus is built from."""

    mediawiki = "mediawiki"
    """A MediaWiki XML export, .xml or .xml.bz2, as Wikimedia publishes it."""
    jsonl = "jsonl"
    """One JSON object per line with a text field (.jsonl, .jsonl.gz, .jsonl.bz2, .jsonl.xz)."""
    text = "text"
    """Plain text (optionally .gz, .bz2, .xz); documents are separated by blank lines, or one per line."""
    datasets = "datasets"
    """A Hugging Face ``datasets`` text dataset by hub name or local folder."""
    webdataset = "webdataset"
    """WebDataset tars whose samples hold text: ``.txt`` members, or ``.json`` ones with a text field."""


@dataclass
class SourceConfig:
    """Where the text comes from."""

    kind: SourceKind = MISSING
    """What the source is."""
    path: str = MISSING
    """File, folder or glob of files in sorted order; for ``datasets`` a hub name or a local folder."""
    subset: str | None = None
    """``datasets`` only: configuration name, such as ``20231101.en``."""
    split: str = "train"
    """``datasets`` only: split."""
    revision: str | None = None
    """Revision of the source, kept in the manifest: a dump date, a hub commit."""
    text_field: str = "text"
    """``jsonl``, ``datasets`` and ``.json`` members of ``webdataset``: field that holds the text."""
    id_field: str | None = None
    """``jsonl``, ``datasets`` and ``.json`` members: field that identifies the document; not set: file name
    and position."""
    one_per_line: bool = False
    """``text`` only: every line is a document; otherwise blank lines separate documents."""


@dataclass
class CorpusConfig:
    """One corpus build."""

    output: str = MISSING
    """Folder of the corpus. Written beside it as ``<output>.partial``, with which a build that was
    interrupted goes on, and renamed when complete."""
    source: SourceConfig = field(default_factory=SourceConfig)
    """The text."""
    tokenizer: str = MISSING
    """Hub name or local folder of the teacher's tokenizer (a fast tokenizer)."""
    tokenizer_revision: str | None = None
    """Hub revision of the tokenizer."""
    seq_len: int = 128
    """Most tokens in a row, special tokens included."""
    packing: Packing = Packing.full
    """How documents fill rows."""
    min_document_chars: int = 200
    """Documents whose clean text is shorter are left out."""
    max_documents: int | None = None
    """Take so many documents of the source, from its start (redirects and empty pages not counted)."""
    deduplicate: Deduplicate = Deduplicate.exact
    """Which documents are left out because an earlier one holds the same."""
    near_threshold: float = 0.8
    """``deduplicate=near``: share of common 5-token sequences (Jaccard) from which documents are
    the same."""
    shuffle_seed: int | None = 0
    """Documents are permuted over the whole source under this seed before they are packed; not set: they
    stay in the source's order."""
    heldout_share: float = 0.005
    """Share of the documents that goes to the held-out split, chosen by a hash of the document id."""
    block_rows: int = 1024
    """Rows in one tar member."""
    max_shard_bytes: int = 134_217_728
    """No shard grows past this size, unless a single document does."""
    processes: int | None = None
    """Worker processes; not set: one per core. The output does not depend on it."""
    tracking: TrackingConfig = field(default_factory=lambda: TrackingConfig(enabled=False))
    """MLflow: a run of its own for the build, off by default; ``under`` puts it into a pipeline."""
    overwrite: bool = False
    """Replace an existing corpus at ``output``; without it an existing corpus is an error."""
