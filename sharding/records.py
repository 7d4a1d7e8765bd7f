"""A task's files, whatever their layout, as records: GLUE's TSV (no quoting), CSV, JSON lines, parquet (all
but this also as .gz, .xz or .bz2), data sets that ``datasets`` saved, and hub names.
"""

import codecs
import csv
import io
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from configs.task_schema import TaskKind, TaskSourceConfig
from sharding.documents import COMPRESSIONS, content, json_record, open_file, utf8
from sharding.glue import Task
from sharding.hub import failures
from sharding.manifest import CorpusError
from sharding.sources import DAMAGE

Record = dict[str, Any]
Placed = tuple[str, Record]
"""Where a record stands, for messages, and the record."""

JSON_LINES = (".jsonl", ".ndjson", ".json")
SUFFIXES = (".tsv", ".csv", *JSON_LINES, ".parquet")
_PIECE = re.compile(r"-\d+-of-\d+$")
DEV = ("dev", "validation")
_LISTED = "_ids"
"""How the names of files end that list rows, in GLUE's own MRPC."""


class Source:
    """Where a task's splits are; ``splits`` names the files, or the split of a data set, of each.

    Raises: CorpusError when nothing is there, or when it is not clear what is what.
    """

    def __init__(self, config: TaskSourceConfig, task: Task) -> None:
        self.config, self.task = config, task
        self.folder = _folder(config, task)
        saved = self.folder and any(
            (self.folder / name).exists() for name in ("state.json", "dataset_dict.json")
        )
        self.datasets = None if self.folder and not saved else _datasets(config, task)
        available: dict[str, tuple[str, ...]]
        if self.datasets is not None:
            available = {str(name): (str(name),) for name in self.datasets}
        else:
            assert self.folder is not None
            available = _files(self.folder, config)
        self.splits = _choose(available, config)

    def records(self, split: str, broken: list[str]) -> Iterator[Placed]:
        """The records of a split. Lines with too many or too few columns are named in ``broken``, where the
        task's published files are known to have them.

        Raises: CorpusError naming file and line of anything that cannot be read.
        """
        if split not in self.splits:
            raise CorpusError(f"source.path={self.config.path} has no split {split}, only {self._names}")
        for name in self.splits[split]:
            if self.datasets is not None:
                with failures(_named(self.config)):
                    yield from rows_of(self.datasets[name], self.task, f"{self.config.path} {name}")
            else:
                yield from _file(Path(name), self.task, broken)

    @property
    def names(self) -> tuple[str, ...]:
        """What the manifest names: files, or the data set, without their folders."""
        if self.datasets is not None:
            return (self.folder.name if self.folder else self.config.path,)
        return tuple(Path(name).name for names in self.splits.values() for name in names)

    @property
    def _names(self) -> str:
        return ", ".join(self.splits)


def _folder(config: TaskSourceConfig, task: Task) -> Path | None:
    """The folder with the files, which may lie in GLUE's own; None for a hub name."""
    path = Path(config.path).expanduser()
    if not path.exists():
        if config.path.startswith((".", "/", "~")) or config.path.count("/") > 1:
            raise CorpusError(f"source.path={config.path} does not exist; give a folder or a hub name")
        return None
    if not path.is_dir():
        raise CorpusError(
            f"source.path={config.path} is a file; give its folder, and source.train and source.dev"
        )
    below = [path / name for name in (task.folder, task.name) if name and (path / name).is_dir()]
    return below[0] if below else path


def _datasets(config: TaskSourceConfig, task: Task) -> Mapping[Any, Any]:
    import datasets

    with failures(_named(config)):
        path = Path(config.path).expanduser()
        if (path / "dataset_dict.json").exists():
            return datasets.load_from_disk(str(path))
        if path.exists():
            raise CorpusError(
                f"source.path={config.path} is one saved split; a task needs train and dev: save them "
                "together as a DatasetDict"
            )
        glue = config.path in ("glue", "nyu-mll/glue")
        subset = config.subset or (task.name if glue else None)
        return hub_splits(config.path, subset, config.revision)


def hub_splits(path: str, subset: str | None, revision: str | None) -> Mapping[Any, Any]:
    """The splits of a data set by name, streamed: nothing is copied to the cache of ``datasets``."""
    import datasets

    return datasets.load_dataset(path, subset, revision=revision, streaming=True)


def _named(config: TaskSourceConfig) -> str:
    own = f"subset {config.subset}, revision {config.revision}"
    return f"source.path={config.path} ({own}) is no folder, and"


def _files(folder: Path, config: TaskSourceConfig) -> dict[str, tuple[str, ...]]:
    """Data files by their names without endings; pieces (``-00000-of-00002``) are joined."""
    found: dict[str, dict[str, list[str]]] = {}
    for path in sorted(folder.iterdir()):
        stem, suffix = _parted(path)
        if path.is_file() and suffix in SUFFIXES and not stem.endswith(_LISTED):
            found.setdefault(_PIECE.sub("", stem), {}).setdefault(suffix, []).append(str(path))
    available = {}
    for stem, layouts in found.items():
        names = [Path(name).name for files in layouts.values() for name in files]
        pieces = all(_PIECE.search(_parted(Path(name))[0]) for name in names)
        if stem.startswith(("train", *DEV)) and len(names) > 1 and (len(layouts) > 1 or not pieces):
            key = "train" if stem.startswith("train") else "dev"
            if getattr(config, key) is None:
                raise CorpusError(f"{folder} holds {' and '.join(names)}: set source.{key} to one of them")
        available[stem] = tuple(file for files in layouts.values() for file in files)
    for named in (config.train, *(config.dev or ())):
        if named is not None and named not in available:
            path = folder / Path(named).expanduser()
            if not path.is_file() or _parted(path)[1] not in SUFFIXES:
                raise CorpusError(
                    f"source.train or source.dev: {path} is no file that ends in one of {', '.join(SUFFIXES)}"
                )
            available[named] = (str(path),)
    return available


def _parted(path: Path) -> tuple[str, str]:
    """Name without endings, and the ending that tells the layout."""
    name = path.with_suffix("") if path.suffix in COMPRESSIONS else path
    return name.stem, name.suffix


def _choose(available: dict[str, tuple[str, ...]], config: TaskSourceConfig) -> dict[str, tuple[str, ...]]:
    """Splits of the corpus, and what each is made of."""
    train = [config.train] if config.train else [name for name in available if name.startswith("train")]
    dev = config.dev or sorted(name for name in available if name.startswith(DEV))
    problems = []
    if len(train) != 1:
        problems.append(f"{len(train)} sources of training examples ({', '.join(train)}): set source.train")
    if not dev:
        problems.append("nothing to evaluate on (names that begin with dev or validation): set source.dev")
    missing = [name for name in (*train, *dev) if name not in available]
    if problems or missing:
        problems += [f"{name} is not there" for name in missing]
        raise CorpusError(
            f"source.path={config.path} has {'; '.join(problems)}; it holds "
            f"{', '.join(available) or 'nothing'}"
        )
    splits = {"train": available[train[0]], "heldout": available[dev[0]]}
    for name in dev[1:]:
        rest = re.sub(f"^({'|'.join(DEV)})", "", _PIECE.sub("", _parted(Path(name))[0] or name))
        slug = re.sub(r"[^a-z0-9]+", "-", rest.lower()).strip("-")
        splits[f"heldout-{slug or len(splits)}"] = available[name]
    return splits


def rows_of(rows: Any, task: Task, place: str) -> Iterator[Placed]:
    """Of a split of a data set, class numbers by their names where these are the task's."""
    names = {
        column: feature.names
        for column, feature in (rows.features or {}).items()
        if hasattr(feature, "names") and set(feature.names) <= set(task.labels)
    }
    for number, record in enumerate(rows):
        for column, known in names.items():
            if record[column] is not None and 0 <= record[column] < len(known):
                record[column] = known[record[column]]
        yield f"{place} row {number}", record


def _file(path: Path, task: Task, broken: list[str]) -> Iterator[Placed]:
    suffix = _parted(path)[1]
    try:
        if suffix == ".parquet":
            yield from _parquet(path, task)
            return
        with open_file(path) as raw:
            lines = content(raw, path.suffix)
            if suffix == ".csv":
                yield from _csv(path, lines)
            elif suffix == ".tsv":
                yield from _tsv(path, lines, task, broken)
            elif suffix == ".json" and task.kind is TaskKind.spans:
                yield from _articles(path, lines)
            else:
                for place, line in _lines(path, lines):
                    if line.strip():
                        yield place, json_record(line, place)
    except DAMAGE as error:
        raise CorpusError(
            f"{path} is truncated or damaged: {error}; fetch it again and compare its checksum"
        ) from error


def _lines(path: Path, lines: Any) -> Iterator[tuple[str, bytes]]:
    for number, line in enumerate(lines, start=1):
        yield f"{path}:{number}", line.removeprefix(codecs.BOM_UTF8) if number == 1 else line


def _tsv(path: Path, lines: Any, task: Task, broken: list[str]) -> Iterator[Placed]:
    """Quotation marks are text, and nothing but a line feed ends a line."""
    header: list[str] = []
    for place, line in _lines(path, lines):
        fields = utf8(line, place).rstrip("\r\n").split("\t")
        if not header:
            headless = task.header and not any(set(columns) <= set(fields) for columns in task.columns)
            header = list(task.header) if task.header and headless else fields
            if not headless:
                continue
        if fields == [""]:
            continue
        if len(fields) != len(header):
            problem = f"{place} has {len(fields)} columns, not {len(header)} ({', '.join(header)})"
            if not task.broken_lines:
                raise CorpusError(f"{problem}; repair or remove the line")
            broken.append(problem)
            continue
        yield place, dict(zip(header, fields, strict=True))


def _csv(path: Path, lines: Any) -> Iterator[Placed]:
    """With quotation as RFC 4180 has it."""
    reader = csv.DictReader(io.TextIOWrapper(lines, "utf-8-sig", newline=""), strict=True)
    try:
        for record in reader:
            place = f"{path}:{reader.line_num}"
            if None in record or None in record.values():
                raise CorpusError(
                    f"{place} has not the {len(reader.fieldnames or ())} columns of its header "
                    f"({', '.join(reader.fieldnames or ())}); repair or remove the line"
                )
            yield place, record
    except UnicodeDecodeError as error:
        raise CorpusError(f"{path} is not UTF-8 behind line {reader.line_num}; convert it first") from error
    except csv.Error as error:
        raise CorpusError(f"{path}:{reader.line_num + 1} is not CSV: {error}; repair the line") from error


def _articles(path: Path, lines: Any) -> Iterator[Placed]:
    """SQuAD's own JSON: articles of paragraphs of questions."""
    found = json_record(lines.read(), str(path))
    try:
        for number, article in enumerate(found["data"]):
            for paragraph in article["paragraphs"]:
                for asked in paragraph["qas"]:
                    yield f"{path} article {number}", {**asked, "context": paragraph["context"]}
    except (KeyError, TypeError) as error:
        raise CorpusError(
            f"{path} is not SQuAD's JSON (data, paragraphs, qas, context): {error!r}; other layouts of "
            "questions are JSON lines (.jsonl) and parquet"
        ) from error


def _parquet(path: Path, task: Task) -> Iterator[Placed]:
    """With ``datasets``, which knows what classes its own files mean by their numbers."""
    import datasets

    try:
        rows = datasets.load_dataset("parquet", data_files={"all": str(path)}, split="all", streaming=True)
        yield from rows_of(rows, task, str(path))
    except (GeneratorExit, CorpusError):
        raise
    except Exception as error:  # of many kinds
        raise CorpusError(f"{path} is no parquet file, or damaged: {error}; fetch it again") from error
