"""The manifest: what a corpus holds, and the fingerprint that names it.

A corpus is a folder of ``manifest.json``, ``train/00000.tar ...`` and ``heldout/00000.tar ...``. The
fingerprint is the SHA-256 of the manifest's canonical JSON without the fingerprint itself; as the manifest
holds a SHA-256 of every shard, two corpora with the same fingerprint are the same bytes.
"""

import errno
import functools
import hashlib
import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sharding.store import Store, StoreError

MANIFEST_NAME = "manifest.json"
FORMAT_VERSION = 2
_PATH = re.compile(r"(?:train|heldout(?:-[a-z0-9-]+)?)/\d{5,}\.tar")
KINDS = ("ids", "len", "seg", "lab")
"""Of a block's members, in the order in which they lie in the tar; ``lab`` in task corpora alone."""
_SHA256 = re.compile(r"[0-9a-f]{64}")


class CorpusError(ValueError):
    """A corpus that cannot be read, or cannot be built, for a reason that the user can act on."""


class Member(NamedTuple):
    """One ``.npy`` file in a shard: ``offset`` of its first data byte in the tar, size, CRC-32."""

    offset: int
    bytes: int
    crc32: int


class Block(NamedTuple):
    """Rows that are stored, read and checked together: adjacent members ``<name>.KIND.npy``, see KINDS."""

    name: str
    rows: int
    tokens: int
    ids: Member
    len: Member
    seg: Member
    lab: Member | None
    """Labels; None in a corpus without."""


@dataclass(frozen=True)
class Members:
    """The members of one kind, one value for each block of a shard."""

    offset: tuple[int, ...]
    bytes: tuple[int, ...]
    crc32: tuple[int, ...]


@dataclass(frozen=True)
class Shard:
    """One tar file; ``path`` is relative to the corpus, with forward slashes.

    Its blocks are kept as columns: the manifest of a large corpus names 35,000 of them, and is read in a
    tenth of the time that as many objects take.
    """

    path: str
    bytes: int
    sha256: str
    rows: tuple[int, ...]
    """Of each block."""
    tokens: tuple[int, ...]
    ids: Members
    len: Members
    seg: Members
    lab: Members | None = None
    """Labels, in a task's corpus."""

    def block(self, number: int) -> Block:
        """The block with this number in the shard, counted from 0."""
        ids, len_, seg, lab = (
            None
            if members is None
            else Member(members.offset[number], members.bytes[number], members.crc32[number])
            for members in (self.ids, self.len, self.seg, self.lab)
        )
        assert ids and len_ and seg
        name = block_name(self.path, number)
        return Block(name, self.rows[number], self.tokens[number], ids, len_, seg, lab)

    @property
    def blocks(self) -> tuple[Block, ...]:
        """All blocks, made anew."""
        return tuple(self.block(number) for number in range(len(self.rows)))


def block_name(path: str, number: int) -> str:
    """A block's name, unique in its split and without dots, which WebDataset would take for extensions."""
    return f"{PurePosixPath(path).stem}-{number:04d}"


@dataclass(frozen=True)
class Split:
    """One split. ``tokens`` counts valid tokens, special tokens included, padding left out."""

    documents: int
    rows: int
    tokens: int
    shards: tuple[Shard, ...]

    @functools.cached_property
    def block_rows(self) -> NDArray[np.int64]:
        """Rows of every block of the split: int64 [blocks]."""
        return np.concatenate([np.array(shard.rows, dtype=np.int64) for shard in self.shards])

    def block(self, index: int) -> tuple[Shard, Block]:
        """The block with this index in the split, counted from 0, and its shard."""
        shard = int(np.searchsorted(self._first_blocks, index, side="right")) - 1
        return self.shards[shard], self.shards[shard].block(index - int(self._first_blocks[shard]))

    @functools.cached_property
    def _first_blocks(self) -> NDArray[np.int64]:
        counts = [len(shard.rows) for shard in self.shards]
        return np.cumsum([0, *counts])[:-1]


@dataclass(frozen=True)
class TokenizerInfo:
    """The tokenizer that made the ids; ``sha256`` as ``sharding.tokens.tokenizer_sha256`` computes it."""

    name: str
    revision: str | None
    sha256: str
    vocab_size: int
    pad_id: int
    cls_id: int
    sep_id: int


@dataclass(frozen=True)
class SourceInfo:
    """Where the text came from: kind, names of the files (or of the dataset), and what was selected."""

    kind: str
    names: tuple[str, ...]
    subset: str | None
    split: str | None
    revision: str | None
    min_document_chars: int
    max_documents: int | None


@dataclass(frozen=True)
class LeftOut:
    """Documents of the source that are in no split, by reason."""

    too_short: int
    unparsed: int
    exact_duplicates: int
    near_duplicates: int


@dataclass(frozen=True)
class TaskInfo:
    """What the labels of a task's corpus mean."""

    name: str
    kind: str
    """``classification`` (labels [n, 1]: index of the class), ``regression`` ([n, 1]: the value) or ``spans``
    ([n, 2]: first and last token of the answer in the row, both 0 where it does not hold it)."""
    labels: tuple[str, ...]
    """Names of the classes in the order of their indices; empty unless it is classification."""
    metrics: tuple[str, ...]
    """Names, as ``trainer.metrics`` knows them; the first is the task's score."""


@dataclass(frozen=True)
class Manifest:
    """All of ``manifest.json`` but the fingerprint. No dates, hosts, absolute paths or process counts."""

    version: int
    tokenizer: TokenizerInfo
    source: SourceInfo
    seq_len: int
    packing: str
    block_rows: int
    heldout_share: float
    shuffle_seed: int | None
    deduplicate: str
    near_threshold: float | None
    """None unless near duplicates were left out."""
    left_out: LeftOut
    splits: dict[str, Split]
    task: TaskInfo | None = None
    """Of a task's corpus."""

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of the canonical JSON."""
        return _sha256(_canonical(_fields(self)))

    def to_json(self) -> str:
        """The text of ``manifest.json``: the canonical JSON, with the fingerprint put in front."""
        canonical = _canonical(_fields(self))
        return _head(_sha256(canonical)) + canonical[1:] + "\n"


@dataclass(frozen=True)
class Corpus:
    """A corpus: its manifest, its fingerprint, and where its shards are."""

    store: Store
    manifest: Manifest
    fingerprint: str

    def split(self, name: str) -> Split:
        """The split ``train`` or ``heldout``; CorpusError when the corpus has no such split."""
        if name not in self.manifest.splits:
            way_out = (
                "a task's splits are the files of its source"
                if self.manifest.task
                else f"it was built with heldout_share={self.manifest.heldout_share}: build it with a larger "
                "share"
            )
            raise CorpusError(
                f"corpus {self.store.location} has no split {name!r}, only "
                f"{', '.join(sorted(self.manifest.splits))}; {way_out}"
            )
        return self.manifest.splits[name]


def open_corpus(location: str | Path) -> Corpus:
    """Read the manifest and check that every shard is there with its size (contents: see ``verify``).

    Raises: CorpusError, naming all missing or cut shards together.
    """
    corpus = read_manifest(location)
    if problems := size_problems(corpus):
        raise CorpusError(
            f"corpus {location} is damaged or was copied in part:\n  " + "\n  ".join(problems) + "\n"
            "copy these shards again, or build the corpus again; "
            f"`python launcher/corpus.py verify {location}` checks all contents"
        )
    return corpus


def read_manifest(location: str | Path) -> Corpus:
    """Read ``manifest.json`` alone. Raises CorpusError when it is missing, changed, or of another format."""
    try:
        store = Store(str(location))
    except StoreError as error:
        raise CorpusError(str(error)) from None  # the location may hold a secret
    path = f"{location}/{MANIFEST_NAME}"
    try:
        text = store.read(MANIFEST_NAME).decode("utf-8")
        fields = json.loads(text)
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOENT, errno.ENOTDIR):
            raise CorpusError(
                f"{path} does not exist, so {location} is no corpus; build one: "
                "`python launcher/corpus.py build`"
            ) from None
        raise CorpusError(
            f"{path} cannot be read ({error}); copy it again, or build the corpus again"
        ) from error
    version = fields.get("version") if isinstance(fields, dict) else None
    if version != FORMAT_VERSION:
        raise CorpusError(
            f"{path} has format version {version!r}, this code reads version {FORMAT_VERSION}; "
            "build the corpus again, or use the code that it was built with"
        )
    stored = fields.pop("fingerprint", None)
    # The text is hashed as it stands: writing the JSON of a large corpus again takes longer than reading it.
    head = _head(stored)
    if not text.startswith(head) or _sha256("{" + text[len(head) :].rstrip("\n")) != stored:
        raise CorpusError(
            f"{path} does not match its own fingerprint {stored}: it was edited or damaged; "
            "copy it again, or build the corpus again"
        )
    return Corpus(store=store, manifest=_manifest_from(fields), fingerprint=stored)


def size_problems(corpus: Corpus) -> list[str]:
    """Shards that are missing or have another size than the manifest's.

    Raises: CorpusError when a remote store does not tell.
    """
    shards = [shard for split in corpus.manifest.splits.values() for shard in split.shards]
    problems = []
    try:
        sizes = corpus.store.sizes([shard.path for shard in shards])
    except StoreError as error:
        raise CorpusError(f"the shards of {corpus.store.location} cannot be checked: {error}") from error
    for shard, size in zip(shards, sizes, strict=True):
        path = f"{corpus.store.location}/{shard.path}"
        if size is None:
            problems.append(f"{path} is missing")
        elif size != shard.bytes:
            problems.append(f"{path}: {size} bytes, the manifest says {shard.bytes}")
    return problems


def _fields(manifest: Manifest) -> dict[str, Any]:
    """As JSON says it. What only task corpora have is left out of others: their fingerprints are older."""

    def present(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        return {key: value for key, value in pairs if value is not None or key not in ("lab", "task")}

    return asdict(manifest, dict_factory=present)


def _canonical(fields: dict[str, Any]) -> str:
    return json.dumps(fields, sort_keys=True, separators=(",", ":"), ensure_ascii=True)


def _sha256(canonical: str) -> str:
    return hashlib.sha256(canonical.encode()).hexdigest()


def _head(fingerprint: str | None) -> str:
    return f'{{"fingerprint":"{fingerprint}",'


def _manifest_from(fields: dict[str, Any]) -> Manifest:
    """The typed manifest; its fingerprint was right, so its shape is what ``to_json`` wrote."""
    splits = {
        name: Split(**{**split, "shards": tuple(shard_from(shard) for shard in split["shards"])})
        for name, split in fields["splits"].items()
    }
    source = SourceInfo(**{**fields["source"], "names": tuple(fields["source"]["names"])})
    tokenizer, left_out = TokenizerInfo(**fields["tokenizer"]), LeftOut(**fields["left_out"])
    typed = {"splits": splits, "source": source, "tokenizer": tokenizer, "left_out": left_out}
    if task := fields.get("task"):
        lists = {key: tuple(task[key]) for key in ("labels", "metrics")}
        typed["task"] = TaskInfo(**{**task, **lists})
    return Manifest(**{**fields, **typed})


def shard_from(fields: dict[str, Any]) -> Shard:
    """A shard from its JSON (``asdict`` makes it).

    Raises: CorpusError for a path or checksum of another form than ours: files are read and cached by them,
        so that ``../../x`` from a stranger's manifest would lead out of the corpus, or of the cache.
    """
    for name, form in (("path", _PATH), ("sha256", _SHA256)):
        if not form.fullmatch(str(fields[name])):
            raise CorpusError(
                f"the manifest has a shard with {name}={fields[name]!r}, which no build writes; do not use "
                "this corpus"
            )
    columns = {name: tuple(fields[name]) for name in ("rows", "tokens")}
    members = {
        kind: Members(**{name: tuple(column) for name, column in fields[kind].items()})
        for kind in KINDS
        if fields.get(kind)
    }
    return Shard(**{**fields, **columns, **members})
