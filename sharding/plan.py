"""The plan of a build: which documents go to which shard, worked out from the indices of all runs.

Between the two phases, in one process. Of every document it holds 37 bytes (key, run, position, tokens,
split, digest), as much again while it joins and sorts them, and one band of hashes while it looks for near
duplicates: for 7 million documents 0.76 GB at the peak and 5 s, with near duplicates 0.88 GB and 18 s,
however long they are. The plan itself is 8 bytes a document.
"""

import json
import zipfile
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from configs.corpus_schema import CorpusConfig, Deduplicate, Packing
from sharding.duplicates import bands_and_rows, first_of_equal, groups
from sharding.files import new_file
from sharding.manifest import CorpusError, LeftOut
from sharding.runs import Run
from sharding.shards import most_rows


class NoDocuments(CorpusError):
    """A split that would be empty: the same build can never succeed."""


@dataclass(frozen=True)
class SplitPlan:
    """The documents of one split in the order in which they are packed."""

    run: NDArray[np.uint32]
    """[n]: index of the document's run."""
    position: NDArray[np.uint32]
    """[n]: its place in that run."""
    bounds: NDArray[np.int64]
    """[shards + 1]: shard s holds the documents from bounds[s] to bounds[s + 1]."""
    shard_tokens: NDArray[np.int64]
    """[shards]: tokens of its documents, special ones not counted."""


@dataclass(frozen=True)
class Plan:
    """Which documents go where, and which go nowhere."""

    splits: dict[str, SplitPlan]
    left_out: LeftOut
    unparsed: tuple[str, ...]
    """Ids of the pages whose markup could not be parsed."""


def make_plan(config: CorpusConfig, runs: list[Run], id_bytes: int) -> Plan:
    """Choose, order and deal out the documents of ``runs``, which are in the order of the source.

    Raises: NoDocuments for a split that would be empty; CorpusError for a run that is damaged.
    """
    selected = _Selected.of(runs, config.max_documents)
    kept = np.ones(selected.key.size, dtype=np.bool_)
    exact = near = 0
    if config.deduplicate is not Deduplicate.none:
        kept = first_of_equal(*selected.digest.T)
        exact = int((~kept).sum())
    if config.deduplicate is Deduplicate.near:
        before = int(kept.sum())
        bands = range(bands_and_rows(config.near_threshold)[0])
        group = groups(before, (selected.band(number)[kept] for number in bands))
        kept[kept] = first_of_equal(group)
        near = before - int(kept.sum())
    left_out = LeftOut(selected.too_short, len(selected.unparsed), exact, near)
    _require_documents(config, selected, kept, left_out)
    splits = {}
    for name, wanted in (("train", False), ("heldout", True)):
        if wanted and not config.heldout_share:
            continue
        members = np.flatnonzero(kept & (selected.heldout == wanted))
        members = members[np.argsort(selected.key[members], kind="stable")]
        tokens = selected.tokens[members].astype(np.int64)
        bounds = _bounds(config, tokens, id_bytes)
        splits[name] = SplitPlan(
            run=selected.run[members],
            position=selected.position[members],
            bounds=bounds,
            shard_tokens=np.add.reduceat(tokens, bounds[:-1]),
        )
    return Plan(splits, left_out, tuple(selected.unparsed))


@dataclass(frozen=True)
class _Selected:
    """The documents of all runs that ``max_documents`` leaves, in the order of the source."""

    runs: list[Run]
    orders: list[NDArray[np.uint32]]
    """Per run, the positions of its selected documents in the order of the source."""
    key: NDArray[np.uint64]
    run: NDArray[np.uint32]
    position: NDArray[np.uint32]
    tokens: NDArray[np.uint32]
    heldout: NDArray[np.bool_]
    digest: NDArray[np.uint64]
    read: int
    too_short: int
    unparsed: list[str]

    @classmethod
    def of(cls, runs: list[Run], most: int | None) -> "_Selected":
        orders: list[NDArray[np.uint32]] = []
        columns: dict[str, list[NDArray]] = {name: [] for name in ("key", "tokens", "heldout", "digest")}
        read = too_short = 0
        unparsed: list[str] = []
        for run in runs:
            index = run.index()
            left = int(index.read) if most is None else min(int(index.read), most - read)
            order = np.argsort(index.ordinal).astype(np.uint32)
            orders.append(order[: np.searchsorted(index.ordinal[order], left)])
            for name, values in columns.items():
                values.append(getattr(index, name)[orders[-1]])
            too_short += int((index.too_short < left).sum())
            unparsed += index.unparsed_id[index.unparsed < left].tolist()
            read += left
        return cls(
            runs=runs,
            orders=orders,
            run=np.repeat(np.arange(len(runs), dtype=np.uint32), [order.size for order in orders]),
            position=np.concatenate(orders),
            read=read,
            too_short=too_short,
            unparsed=unparsed,
            **{name: np.concatenate(values) for name, values in columns.items()},
        )

    def band(self, number: int) -> NDArray[np.uint64]:
        return np.concatenate(
            [run.band(number)[order] for run, order in zip(self.runs, self.orders, strict=True)]
        )


def _require_documents(
    config: CorpusConfig, selected: _Selected, kept: NDArray[np.bool_], left_out: LeftOut
) -> None:
    if not kept.any():
        raise NoDocuments(
            f"source.path={config.source.path} gives an empty corpus: of {selected.read} documents "
            f"{left_out.too_short} are shorter than min_document_chars={config.min_document_chars} once "
            f"clean, {left_out.unparsed} could not be parsed; check source.kind and source.path, or lower it"
        )
    heldout = int((kept & selected.heldout).sum())
    for name, documents in (("train", int(kept.sum()) - heldout), ("heldout", heldout)):
        if not documents and (name == "train" or config.heldout_share):
            raise NoDocuments(
                f"heldout_share={config.heldout_share} leaves the {name} split without any of the "
                f"{int(kept.sum())} documents; use more documents, another share, or heldout_share=0 for a "
                "corpus without a held-out split"
            )


def _bounds(config: CorpusConfig, tokens: NDArray[np.int64], id_bytes: int) -> NDArray[np.int64]:
    """Where shards begin and end: as many documents [n] each as surely fit, at least one.

    Packing ``document`` takes ceil(tokens / (seq_len - 2)) rows for a document. Packing ``full`` fills rows
    of seq_len - 2 places, and loses at most one between two documents, to a [SEP] or to the end of a row.
    """
    payload = config.seq_len - 2
    rows = most_rows(config.max_shard_bytes, config.block_rows, config.seq_len, id_bytes)
    if config.packing is Packing.full:
        places = np.cumsum(tokens + 1)
        room = rows * payload + 1  # behind the last document nothing is lost
    else:
        places = np.cumsum(-(-tokens // payload))
        room = rows
    bounds = [0]
    while bounds[-1] < tokens.size:
        used = int(places[bounds[-1] - 1]) if bounds[-1] else 0
        fit = int(np.searchsorted(places, used + room, side="right"))
        bounds.append(max(fit, bounds[-1] + 1))
    return np.array(bounds, dtype=np.int64)


def write_plan(path: Path, plan: Plan) -> None:
    """Write the plan whole or not at all. Raises OSError when the disk does."""
    columns = {
        f"{name}.{field.name}": getattr(split, field.name)
        for name, split in plan.splits.items()
        for field in fields(SplitPlan)
    }
    facts = {"splits": list(plan.splits), "left_out": asdict(plan.left_out), "unparsed": plan.unparsed}
    with new_file(path) as file:
        np.savez(file, facts=np.array(json.dumps(facts)), **columns)


def read_plan(path: Path) -> Plan:
    """Raises: CorpusError when the file is damaged."""
    try:
        with np.load(path, allow_pickle=False) as stored:
            facts = json.loads(str(stored["facts"]))
            splits = {
                name: SplitPlan(*(stored[f"{name}.{field.name}"] for field in fields(SplitPlan)))
                for name in facts["splits"]
            }
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile, NotImplementedError) as error:
        raise CorpusError(f"{path} is damaged ({error}); remove it and start the build again") from error
    return Plan(splits, LeftOut(**facts["left_out"]), tuple(facts["unparsed"]))
