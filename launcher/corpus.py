"""Build, verify, describe and read a corpus.

    python launcher/corpus.py build [--config corpus.yaml] [key=value ...]
    python launcher/corpus.py build --stage prepare|pack|join [--task 0/8] ...      as a job array, one by one
    python launcher/corpus.py verify FOLDER
    python launcher/corpus.py stat FOLDER [--json] [--figure lengths.png]
    python launcher/corpus.py peek FOLDER [--split heldout] [--position P --seed S | --stored N] [--rows 5]
    python launcher/corpus.py simulate FOLDER --ranks 8,3,5 [--global-batch-rows 240] [--epochs 2]

FOLDER may be a URL. Keys: ``configs.corpus_schema``. Exit codes: 0 done, 1 ``verify`` found damage or
``simulate`` a broken property, 2 a mistake in what was asked (configuration, input, disk), told in short.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

if __package__ in (None, ""):  # run as a script, Python puts launcher/ on the path instead of the repository
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from configs.corpus_schema import CorpusConfig  # noqa: E402
from configs.load import load_config, to_dict  # noqa: E402
from configs.public import public  # noqa: E402
from configs.schema import DataConfig, TrainConfig  # noqa: E402
from sharding.manifest import CorpusError, open_corpus, read_manifest  # noqa: E402

# Worker processes (of a build, of verify) import this file again and do without torch, transformers and the
# like: what brings those in is imported by the commands that need it.


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    options = _parser().parse_args(arguments)
    try:
        return options.run(options)
    except ValueError as error:  # of the config, the corpus, or tracking
        print(public(f"corpus.py: error: {error}"), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"corpus.py: interrupted{options.when_interrupted}", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="corpus.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.set_defaults(when_interrupted="")
    commands = parser.add_subparsers(dest="command", required=True)

    build = commands.add_parser("build", help="build a corpus from text")
    build.set_defaults(run=_build, when_interrupted="; the same command goes on where it was")
    build.add_argument("--config", type=Path, help="YAML file with keys of CorpusConfig")
    build.add_argument(
        "--stage", choices=("prepare", "pack", "join"), help="one stage alone, as in a job array"
    )
    build.add_argument("--dry-run", action="store_true", help="check the settings, and do nothing")
    build.add_argument("--task", type=_task, help="I/N: the share I, from 0, of N of prepare or pack")
    build.add_argument(
        "overrides", nargs="*", metavar="key=value", help="such as output=corpora/wiki seq_len=128"
    )

    verify = commands.add_parser("verify", help="read every byte and report all damage")
    verify.set_defaults(run=_verify)
    verify.add_argument("--processes", type=_positive, help="one per core if not given")

    stat = commands.add_parser("stat", help="count documents, rows and tokens")
    stat.set_defaults(run=_stat)
    stat.add_argument("--json", action="store_true", help="print JSON")
    stat.add_argument("--figure", type=Path, help="draw the row lengths: .png, .svg or .pdf")

    peek = commands.add_parser("peek", help="show rows as text")
    peek.set_defaults(run=_peek)
    peek.add_argument("--rows", type=_positive, default=5, help="how many")
    place = peek.add_mutually_exclusive_group()
    place.add_argument("--position", type=int, default=0, help="of the run: rows before the first one shown")
    place.add_argument(
        "--stored", type=int, help="in the corpus: rows of the split before the first one shown"
    )
    peek.add_argument("--tokenizer", help="folder or hub name; the one that the manifest names if not given")

    simulate = commands.add_parser("simulate", help="prove the order's properties on the corpus's blocks")
    simulate.set_defaults(run=_simulate)
    simulate.add_argument("--ranks", type=_ranks, required=True, help="numbers of ranks, in turn: 8,3,5")
    simulate.add_argument("--global-batch-rows", type=_positive, default=240)
    simulate.add_argument("--epochs", type=_positive, default=2)

    for command in (verify, stat, peek, simulate):
        command.add_argument("folder", help="of the corpus, or its URL")
    for command in (peek, simulate):
        command.add_argument("--split", default="train", help="train or heldout")
        command.add_argument("--seed", type=int, default=TrainConfig.seed, help="of the run")
        command.add_argument("--group-blocks", type=int, default=DataConfig.group_blocks)
    return parser


def _positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return number


def _task(text: str) -> tuple[int, int]:
    task, tasks = map(int, text.split("/"))
    if not 0 <= task < tasks:
        raise argparse.ArgumentTypeError(f"{text} is not one of 0/{tasks} .. {tasks - 1}/{tasks}")
    return task, tasks


def _ranks(text: str) -> list[int]:
    return [_positive(part) for part in text.split(",")]


def _build(options: argparse.Namespace) -> int:
    from sharding.build import build, join, pack, prepare

    if options.task and options.stage not in ("prepare", "pack"):
        raise CorpusError(f"--task goes with --stage prepare or pack, not with --stage {options.stage}")
    config = load_config(CorpusConfig, options.config, options.overrides)
    if options.dry_run:
        print(f"dry run: {config.source.path} into {config.output}, rows of {config.seq_len} tokens")
        return 0
    if options.stage in ("prepare", "pack"):
        stage = prepare if options.stage == "prepare" else pack
        stage(config, *(options.task or (0, 1)), progress=True)
        return 0
    with _tracked(config):
        manifest = join(config) if options.stage == "join" else build(config, progress=True)
    for name, split in manifest.splits.items():
        print(f"{name}: {split.documents:,} documents, {split.rows:,} rows, {split.tokens:,} tokens")
    for reason, documents in vars(manifest.left_out).items():
        if documents:
            print(f"left out, {reason.replace('_', ' ')}: {documents:,} documents")
    print(f"corpus {config.output}, fingerprint {manifest.fingerprint}")
    return 0


def _tracked(config: CorpusConfig) -> AbstractContextManager[None]:
    if not config.tracking.enabled:
        return nullcontext()
    from launcher.tracked import corpus_run  # torch and mlflow are not for every builder

    output = Path(config.output)
    return corpus_run(output.name, config.tracking, output, "corpus", to_dict(config))


def _verify(options: argparse.Namespace) -> int:
    from sharding.verify import verify

    corpus = read_manifest(options.folder)
    problems = verify(corpus, progress=True, workers=options.processes)
    for problem in problems:
        print(problem)
    if problems:
        print(f"{len(problems)} problems; copy the damaged shards again, or build the corpus again")
        return 1
    print(f"corpus {options.folder} is whole, fingerprint {corpus.fingerprint}")
    return 0


def _stat(options: argparse.Namespace) -> int:
    from launcher.corpus_views import show_statistics
    from sharding.statistics import count_lengths, draw_lengths, require_figure_suffix, statistics

    if options.figure:
        require_figure_suffix(options.figure)  # before all is read
    corpus = open_corpus(options.folder)
    lengths = count_lengths(corpus)
    counts = statistics(corpus, lengths)
    if options.json:
        print(json.dumps(counts, indent=2))
    else:
        show_statistics(counts)
    if options.figure:
        draw_lengths(corpus, lengths, options.figure)
        print(f"figure {options.figure}", file=sys.stderr)
    return 0


def _peek(options: argparse.Namespace) -> int:
    from launcher.corpus_views import show_rows
    from sharding.peek import corpus_tokenizer, peek_order, peek_stored

    corpus = read_manifest(options.folder)
    tokenizer = corpus_tokenizer(corpus, options.tokenizer)
    if options.stored is not None:
        rows = peek_stored(corpus, options.split, tokenizer, first=options.stored, rows=options.rows)
    else:
        rows = peek_order(
            corpus,
            options.split,
            tokenizer,
            position=options.position,
            rows=options.rows,
            seed=options.seed,
            group_blocks=options.group_blocks,
        )
    show_rows(rows, tokenizer.all_special_tokens)
    return 0


def _simulate(options: argparse.Namespace) -> int:
    from launcher.corpus_views import show_simulation
    from sharding.simulate import simulate

    corpus = read_manifest(options.folder)
    found = simulate(
        [rows for shard in corpus.split(options.split).shards for rows in shard.rows],
        ranks=options.ranks,
        global_batch_rows=options.global_batch_rows,
        epochs=options.epochs,
        seed=options.seed,
        group_blocks=options.group_blocks,
        progress=True,
    )
    show_simulation(found, options.epochs)
    return 0 if all(found.properties().values()) else 1


if __name__ == "__main__":
    sys.exit(main())
