"""What tracking has not delivered yet: ``python launcher/track.py sync|status RUN_FOLDER...``.

``status`` shows it; ``sync`` delivers it, after an outage that outlasted the run. The journals of the folders
given are taken, and those below them: a folder of runs will do. Exit codes: 0 when nothing is left, 76 when a
server did not take all (try again), 2 when there is no journal.
"""

import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import logging
import time
from collections import Counter

from rich.console import Console
from rich.table import Table

from configs.public import log_publicly, public
from launcher.runfolder import RunFolder
from launcher.wording import duration
from trainer import exits
from trainer.delivery import Delivery
from trainer.journal import Entry, Journal
from trainer.tracking import UNDELIVERED, credentials_apart


def main() -> int:
    """Show or deliver; return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=["sync", "status"])
    parser.add_argument("folders", nargs="+", type=Path, metavar="RUN_FOLDER")
    parser.add_argument("--uri", help="deliver there; not given: where each journal says")
    parser.add_argument(
        "--drop-missing",
        action="store_true",
        help="give up what is left for runs that a server does not hold",
    )
    arguments = parser.parse_args()
    log_publicly(logging.WARNING)
    found = sorted({journal for folder in arguments.folders for journal in journals(folder)})
    if not found:
        shown = ", ".join(map(str, arguments.folders))
        print(f"error: no journal of tracking in {shown}; name run folders, or a folder of them")
        return exits.WRONG
    if arguments.command == "status":
        Console(width=None if sys.stdout.isatty() else 140).print(table(found))
        return exits.DONE
    uri = credentials_apart(arguments.uri or "") or None
    left = sum([sync(folder, uri, arguments.drop_missing) for folder in found])
    return exits.of(ConnectionError()) if left else exits.DONE


def journals(folder: Path) -> list[Path]:
    """Return the folders of all journals at and below ``folder``."""
    return [segment.parent for segment in folder.rglob("????????.jsonl") if segment.stem.isdigit()]


def table(found: list[Path]) -> Table:
    """Return a row for every journal: what is left of it, how old that is, where it goes."""
    shown = Table("journal", "entries left", "oldest", "server", "delivered now by")
    for folder in found:
        left = (journal := Journal(folder)).left()
        oldest = duration(time.time() - left[0]["at"] / 1000) if left else ""
        shown.add_row(str(folder), str(len(left)), oldest, server(journal, left), deliverer(journal))
    return shown


def server(journal: Journal, left: list[Entry]) -> str:
    """Return where a journal goes, as it says itself."""
    opening = next((entry["uri"] for entry in left if entry["kind"] == "open"), "unknown")
    return public(str(journal.state.get("uri", opening)))


def deliverer(journal: Journal) -> str:
    """Return the process that delivers a journal at this moment; empty if there is none."""
    if not journal.lock():
        return journal.holder()
    journal.unlock()
    return ""


def sync(folder: Path, uri: str | None, drop_missing: bool) -> int:
    """Deliver one journal, say what became of it, and return how many entries are left."""
    journal = Journal(folder)
    if not journal.lock():
        print(f"{folder}: is being delivered by {journal.holder()}")
        return len(journal.left())
    before = journal.left()
    opened = RunFolder(folder.parent).keep_tracking_run_ids if folder.name == "tracking" else lambda ids: None
    try:
        Delivery(journal, uri, opened, drop_missing).deliver()
    except Exception as error:  # every store and driver fails in its own way
        print(f"{folder}: not all is delivered: {public(str(error))}")
    left = journal.left()
    journal.unlock()
    kinds = Counter(entry["kind"] for entry in before)
    kinds.subtract(entry["kind"] for entry in left)
    told = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()) if count)
    print(f"{folder}: delivered {told or 'nothing'}; {len(left)} entries left")
    if not left and folder.parent.name == UNDELIVERED:
        journal.remove()
    return len(left)


if __name__ == "__main__":
    sys.exit(main())
