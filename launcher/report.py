"""A report, one HTML page that needs nothing else: ``python launcher/report.py FOLDER [--output FILE]``.

Of a run (the output of ``launcher/general.py``, or of a training stage of ``launcher/task.py``), made of its
folder alone; with ``--models`` also what students and teacher compute alike. Of a sweep, made of its folder.
"""

import sys
from pathlib import Path

if __package__ in (None, ""):  # run as a script, which puts this folder on sys.path, not the repository
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    import configs  # noqa: F401  before transformers, which finds torchao and makes it talk

import argparse
import logging

from configs.public import log_publicly, public
from launcher.run_record import Record
from launcher.sweep_record import TRIALS, Sweep
from sharding.files import write_text

log = logging.getLogger("distil")

REPORT = "report.html"


def main() -> int:
    """Write the report; return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="of a run or a sweep")
    parser.add_argument("--output", type=Path, help=f"HTML file; not set: {REPORT} in the folder")
    parser.add_argument("--models", action="store_true", help="load the exported students and the teacher")
    parser.add_argument("--rows", type=int, default=256, help="held-out rows they are compared on")
    arguments = parser.parse_args()
    log_publicly(logging.INFO, "%(asctime)s %(message)s")
    output = arguments.output or arguments.folder / REPORT
    try:
        write_text(output, made(arguments.folder, arguments.models, arguments.rows))
    except (ValueError, OSError) as error:
        print(public(f"\nerror: {error}"), file=sys.stderr, flush=True)
        return 2
    log.info("report: %s", output.resolve())
    return 0


def at_end(folder: Path) -> bool:
    """Write the report of a run that has just ended; a failure is a warning, and never costs the run."""
    try:
        write_text(folder / REPORT, made(folder))
    except Exception as error:  # whatever drawing stumbles over: the run is done and exported
        log.warning("%s could not be written: %s", folder / REPORT, error, exc_info=True)
        return False
    return True


def made(folder: Path, models: bool = False, rows: int = 0) -> str:
    """Return the page of a run's or a sweep's folder. What takes seconds to import is imported here.

    Raises:
        ValueError: it is neither's, or its models cannot be loaded.
    """
    if (folder / TRIALS).is_file():
        from launcher import sweep_report

        return public(sweep_report.to_html(Sweep.read(folder)))
    from launcher import run_report

    record = Record.read(folder)
    comparisons: list[str] = []
    if models:
        from launcher import comparison, comparison_figures

        comparisons = list(comparison_figures.sections(comparison.compare(record, rows)))
    return public(run_report.to_html(record, comparisons))


if __name__ == "__main__":
    sys.exit(main())
