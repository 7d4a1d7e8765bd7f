"""What a corpus holds: counts, and the distribution of row lengths as numbers and as a figure."""

from collections.abc import Mapping
from dataclasses import asdict
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sharding.blocks import read_lengths
from sharding.manifest import Block, Corpus, CorpusError, Shard, Split

HISTOGRAM_BINS = 8
FIGURE_SUFFIXES = (".png", ".svg", ".pdf")
REQUESTS = 16  # a remote store answers each in tens of milliseconds, whatever else it is asked

Lengths = Mapping[str, NDArray[np.int64]]
"""Per split the number of rows of each length, int64 [S + 1]."""


def count_lengths(corpus: Corpus) -> Lengths:
    """Read the row lengths of a whole corpus, and nothing else of its shards.

    Raises: CorpusError for a member that cannot be read or does not match its checksum.
    """

    def count(place: tuple[Shard, Block]) -> NDArray[np.int64]:
        return np.bincount(read_lengths(corpus.store, *place), minlength=corpus.manifest.seq_len + 1)

    counts = {}
    with ThreadPool(1 if corpus.store.is_local else REQUESTS) as pool:
        for name, split in corpus.manifest.splits.items():
            places = [(shard, block) for shard in split.shards for block in shard.blocks]
            counts[name] = sum(pool.imap_unordered(count, places), np.zeros(1, dtype=np.int64))
    return counts


def statistics(corpus: Corpus, lengths: Lengths) -> dict[str, Any]:
    """Counts of a corpus, ready for JSON."""
    manifest = corpus.manifest
    return {
        "fingerprint": corpus.fingerprint,
        "source": f"{manifest.source.kind}: {', '.join(manifest.source.names)}",
        "revision": manifest.source.revision,
        "tokenizer": manifest.tokenizer.name,
        "tokenizer_sha256": manifest.tokenizer.sha256,
        "vocab_size": manifest.tokenizer.vocab_size,
        "seq_len": manifest.seq_len,
        "packing": manifest.packing,
        "left_out": asdict(manifest.left_out),
        "splits": {
            name: _split_statistics(split, manifest.seq_len, lengths[name])
            for name, split in _largest_first(corpus).items()
        },
    }


def _largest_first(corpus: Corpus) -> dict[str, Split]:
    return dict(sorted(corpus.manifest.splits.items(), key=lambda item: -item[1].rows))


def _edges(seq_len: int) -> NDArray[np.int64]:
    return np.linspace(0, seq_len, HISTOGRAM_BINS + 1).round().astype(int)


def _split_statistics(split: Split, seq_len: int, lengths: NDArray[np.int64]) -> dict[str, Any]:
    edges = _edges(seq_len)
    # Bins are (edge, next edge], so that full rows share the last bin with the nearly full.
    return {
        "documents": split.documents,
        "rows": split.rows,
        "tokens": split.tokens,
        "padding_share": 1 - split.tokens / (split.rows * seq_len),
        "bytes": sum(shard.bytes for shard in split.shards),
        "shards": len(split.shards),
        "blocks": sum(len(shard.rows) for shard in split.shards),
        "rows_by_length": {
            f"{low + 1}-{high}": int(lengths[low + 1 : high + 1].sum())
            for low, high in zip(edges[:-1], edges[1:], strict=True)
        },
    }


def require_figure_suffix(path: Path) -> None:
    """Raise CorpusError unless the name of a figure says a format that can be drawn."""
    if path.suffix not in FIGURE_SUFFIXES:
        raise CorpusError(
            f"figure {path}: its suffix names the format; end it in {' or '.join(FIGURE_SUFFIXES)}"
        )


def draw_lengths(corpus: Corpus, lengths: Lengths, path: Path) -> None:
    """Write a figure of the row lengths, a panel for each split, in the format of the path's suffix.

    Raises: CorpusError for another suffix than ``FIGURE_SUFFIXES``, or a path that cannot be written.
    """
    require_figure_suffix(path)
    from matplotlib.figure import Figure  # slow to import, and rarely wanted

    seq_len, splits = corpus.manifest.seq_len, _largest_first(corpus)
    figure = Figure(figsize=(8, 0.9 + 2.4 * len(splits)), layout="constrained")
    panels = figure.subplots(len(splits), sharex=True, squeeze=False)[:, 0]
    figure.suptitle(
        f"Row lengths of {corpus.store.name} (fingerprint {corpus.fingerprint[:12]})", weight="bold"
    )
    for panel, (name, split) in zip(panels, splits.items(), strict=True):
        full, padding = lengths[name][seq_len] / split.rows, 1 - split.tokens / (split.rows * seq_len)
        panel.bar(np.arange(seq_len + 1), lengths[name], width=1, color="#3b6ea5", linewidth=0)
        panel.set_title(
            f"{name}: {split.documents:,} documents, {split.rows:,} rows, {split.tokens:,} tokens\n"
            f"{full:.1%} of the rows are full, {padding:.2%} of all places are padding",
            loc="left",
            size="medium",
        )
        # Full rows outnumber each other length by thousands, and the others are the ones to look at.
        panel.set_yscale("symlog", linthresh=1)
        panel.set_ylim(bottom=0)
        panel.yaxis.set_major_formatter("{x:,.0f}")
        panel.set_axisbelow(True)
        panel.grid(axis="y", color="#dddddd", linewidth=0.6)
        panel.spines[["top", "right"]].set_visible(False)
        panel.set_ylabel("rows")
    panels[-1].set_xlabel("tokens in the row, special tokens included")
    panels[-1].set_xlim(0, seq_len + 1)
    panels[-1].set_xticks(_edges(seq_len))
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise CorpusError(f"figure {path} cannot be written: {error.strerror}; choose another") from error
