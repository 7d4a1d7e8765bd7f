"""Build, verify and describe a corpus.

    python launcher/corpus.py build [--config corpus.yaml] [key=value ...]
    python launcher/corpus.py verify FOLDER
    python launcher/corpus.py stat FOLDER [--json]

Keys are those of ``configs.corpus_schema``. Exit codes: 0 done, 1 ``verify`` found damage, 2 a mistake in what
was asked (configuration, input, disk), told in a short message.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

if __package__ in (None, ""):  # run as a script, Python puts launcher/ on the path instead of the repository
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from configs.corpus_schema import CorpusConfig  # noqa: E402
from configs.load import ConfigError, load_config  # noqa: E402
from sharding.manifest import CorpusError, open_corpus, read_manifest  # noqa: E402


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    parser = argparse.ArgumentParser(
        prog="corpus.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    build = commands.add_parser("build", help="build a corpus from text")
    build.add_argument("--config", type=Path, help="YAML file with keys of CorpusConfig")
    build.add_argument(
        "overrides", nargs="*", metavar="key=value", help="such as output=corpora/wiki seq_len=128"
    )
    verify = commands.add_parser("verify", help="read every byte and report all damage")
    verify.add_argument("folder", type=Path)
    stat = commands.add_parser("stat", help="count documents, rows and tokens")
    stat.add_argument("folder", type=Path)
    stat.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(arguments)
    try:
        if options.command == "build":
            return _build(options.config, options.overrides)
        if options.command == "verify":
            return _verify(options.folder)
        return _stat(options.folder, options.json)
    except (ConfigError, CorpusError) as error:
        print(f"corpus.py: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("corpus.py: interrupted; nothing is left of the build", file=sys.stderr)
        return 130


# The worker processes of a build import this file again and do without torch and transformers: what brings
# those in is imported by the commands that need it.


def _build(path: Path | None, overrides: Sequence[str]) -> int:
    from sharding.build import build

    config = load_config(CorpusConfig, path, overrides)
    manifest = build(config, progress=True)
    for name, split in manifest.splits.items():
        print(f"{name}: {split.documents:,} documents, {split.rows:,} rows, {split.tokens:,} tokens")
    print(f"corpus {config.output}, fingerprint {manifest.fingerprint}")
    return 0


def _verify(folder: Path) -> int:
    from sharding.verify import verify

    corpus = read_manifest(folder)
    problems = verify(corpus, progress=True)
    for problem in problems:
        print(problem)
    if problems:
        print(f"{len(problems)} problems; copy the damaged shards again, or build the corpus again")
        return 1
    print(f"corpus {folder} is whole, fingerprint {corpus.fingerprint}")
    return 0


def _stat(folder: Path, as_json: bool) -> int:
    from rich.console import Console
    from rich.table import Table

    from sharding.verify import statistics

    counts = statistics(open_corpus(folder))
    if as_json:
        print(json.dumps(counts, indent=2))
        return 0
    console = Console()
    splits = counts.pop("splits")
    for key, value in counts.items():
        if value is not None:
            console.print(f"{key:>17}  {value}", highlight=False, soft_wrap=True)
    table = Table()
    table.add_column("")
    for name in splits:
        table.add_column(name, justify="right")
    for key in ("documents", "rows", "tokens", "bytes", "shards", "blocks"):
        table.add_row(key, *(f"{split[key]:,}" for split in splits.values()))
    table.add_row(
        "padding", *(f"{split['padding_share']:.2%}" for split in splits.values()), end_section=True
    )
    for bucket in next(iter(splits.values()))["rows_by_length"]:
        shares = [split["rows_by_length"][bucket] / split["rows"] for split in splits.values()]
        table.add_row(f"rows of {bucket} tokens", *(f"{share:.1%}" for share in shares))
    console.print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
