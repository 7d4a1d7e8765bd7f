"""The stage ``data``: a task's examples as a corpus with labels, one example a row (of spans: a window).

Letters: n rows, L = seq_len, K columns of labels.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from configs.task_schema import TaskConfig, TaskKind
from sharding.examples import Example, examples_of
from sharding.files import install_folder, new_file, new_folder, sync
from sharding.glue import task_of
from sharding.manifest import (
    FORMAT_VERSION,
    MANIFEST_NAME,
    CorpusError,
    LeftOut,
    Manifest,
    Shard,
    SourceInfo,
    Split,
)
from sharding.packing import Rows
from sharding.records import Source
from sharding.shards import write_shard
from sharding.squad import encode_windows, read_questions, write_windows
from sharding.tokens import Encoder, id_dtype, load_tokenizer, tokenizer_info

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

log = logging.getLogger(__name__)

BLOCK_ROWS = 1024
SHARD_ROWS = 256 * BLOCK_ROWS
"""64 MiB of ids at L = 128."""


def build(config: TaskConfig) -> Manifest:
    """Build the corpus OUTPUT/data of a task, in place of one that is there, and return its manifest.

    Raises: CorpusError for a source or tokenizer with which it cannot be done; nothing is changed then.
    """
    if config.corpus is not None:
        raise CorpusError(
            f"corpus={config.corpus} names a corpus that is there; the stage data builds OUTPUT/data: "
            "leave corpus out to build one, or leave out the stage"
        )
    task = task_of(config)
    tokenizer = load_tokenizer(config.teacher.model, config.teacher.revision)
    source = Source(config.source, task)
    output = Path(config.output) / "data"
    broken = 0
    splits: dict[str, Split] = {}
    with new_folder(output) as folder:
        for name in source.splits:
            if task.kind is TaskKind.spans:
                questions = read_questions(source, name)
                rows, labels, windows = encode_windows(questions, tokenizer, config.seq_len)
                if name != "train":
                    write_windows(folder, name, windows)
                count = len(questions)
            else:
                examples, left_out = examples_of(source, task, name)
                rows, labels = encode(examples, tokenizer, config.seq_len)
                count, broken = len(examples), broken + left_out
            full = int((rows.lengths == config.seq_len).sum())
            log.info("%s: %d examples in %d rows, %d of them full or cut", name, count, len(labels), full)
            shards = [
                write_part(
                    folder, f"{name}/{number:05d}.tar", _slice(rows, start), labels[start:][:SHARD_ROWS]
                )
                for number, start in enumerate(range(0, len(labels), SHARD_ROWS))
            ]
            splits[name] = split_of(shards, count)
        manifest = _manifest(config, source, tokenizer, splits, broken)
        _complete(folder, manifest)
    return manifest


def encode(
    examples: Sequence[Example], tokenizer: "PreTrainedTokenizerFast", seq_len: int
) -> tuple[Rows, NDArray[np.float32]]:
    """Rows ``[CLS] A [SEP]`` or ``[CLS] A [SEP] B [SEP]`` of the examples, and labels float32 [n, 1].

    What does not fit is cut from the end of the longer text until both are equally long, then from both in
    turn, as ``transformers`` does by the name of ``longest_first``. Text is never read as a special token.

    Raises: CorpusError if the tokenizer makes special tokens of text all the same.
    """
    cls_id, sep_id, pad_id = tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.pad_token_id
    encoder = Encoder(tokenizer.backend_tokenizer.to_str(), len(tokenizer), (pad_id, cls_id, sep_id))
    first = encoder.encode([example.a for example in examples])
    second = iter(encoder.encode([example.b for example in examples if example.b is not None]))
    ids = np.full((len(examples), seq_len), pad_id, id_dtype(len(tokenizer)))
    ids[:, 0] = cls_id
    lengths, segments = np.empty((2, len(examples)), np.uint16)
    for n, (example, a) in enumerate(zip(examples, first, strict=True)):
        b = None if example.b is None else next(second)
        room_a, room_b = _longest_first(a.size, b.size, seq_len - 3) if b is not None else (seq_len - 2, 0)
        a = a[:room_a]
        ids[n, 1 : 1 + a.size] = a
        end = a.size + 2
        ids[n, end - 1] = sep_id
        segments[n] = end
        if b is not None:
            b = b[:room_b]
            ids[n, end : end + b.size] = b
            end += b.size + 1
            ids[n, end - 1] = sep_id
        lengths[n] = end
    labels = np.array([[example.label] for example in examples], np.float32).reshape(-1, 1)
    return Rows(ids, lengths, segments), labels


def _longest_first(a: int, b: int, room: int) -> tuple[int, int]:
    """Tokens to keep of two texts."""
    if a + b <= room:
        return a, b
    short = min(a, b, room // 2)
    return (room - short, short) if a > b else (short, room - short)


def write_part(root: Path, path: str, rows: Rows, labels: NDArray[np.float32]) -> Shard:
    """Write rows and labels [n, K] as one shard, ``<root>/<path>``, whole or not at all.

    ``path`` is ``train/00000.tar`` and so on; its folder is made. Raises OSError when the disk does.
    """
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    starts = range(0, len(labels), BLOCK_ROWS)
    blocks = (_slice(rows, start, BLOCK_ROWS) for start in starts)
    return write_shard(root, path, blocks, (labels[start:][:BLOCK_ROWS] for start in starts))


def _slice(rows: Rows, start: int, count: int = SHARD_ROWS) -> Rows:
    part = slice(start, start + count)
    return Rows(rows.ids[part], rows.lengths[part], rows.segments[part])


def split_of(shards: Sequence[Shard], examples: int) -> Split:
    """A split of these shards, in this order, made of so many examples."""
    return Split(
        documents=examples,
        rows=sum(sum(shard.rows) for shard in shards),
        tokens=sum(sum(shard.tokens) for shard in shards),
        shards=tuple(shards),
    )


def finish(root: Path, output: Path, manifest: Manifest) -> Manifest:
    """Complete the corpus in the folder ``root``, which holds all shards of ``manifest``, and give it its
    name ``output``, in place of one that may be there. Both are on one file system. Returns the manifest."""
    _complete(root, manifest)
    install_folder(root, output)
    return manifest


def _complete(folder: Path, manifest: Manifest) -> None:
    with new_file(folder / MANIFEST_NAME) as file:
        file.write(manifest.to_json().encode())
    for each in folder.rglob("*/"):
        sync(each)


def _manifest(
    config: TaskConfig,
    source: Source,
    tokenizer: "PreTrainedTokenizerFast",
    splits: dict[str, Split],
    broken: int,
) -> Manifest:
    return Manifest(
        version=FORMAT_VERSION,
        tokenizer=tokenizer_info(tokenizer, config.teacher.model, config.teacher.revision),
        source=SourceInfo(
            kind="files" if source.datasets is None else "datasets",
            names=source.names,
            subset=config.source.subset,
            split=None,
            revision=config.source.revision,
            min_document_chars=0,
            max_documents=None,
        ),
        seq_len=config.seq_len,
        packing="document",
        block_rows=BLOCK_ROWS,
        heldout_share=0.0,
        shuffle_seed=None,
        deduplicate="none",
        near_threshold=None,
        left_out=LeftOut(too_short=0, unparsed=broken, exact_duplicates=0, near_duplicates=0),
        splits=splits,
        task=source.task.info,
    )
