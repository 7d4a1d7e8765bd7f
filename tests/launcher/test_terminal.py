"""The panel, as a terminal shows it and in a real run; and a run that only says what it would do."""

import io
import logging
import os
import pty
import re
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from launcher.terminal import Terminal, View
from tests.launcher.conftest import Launch, command


def shown(view: View, width: int = 120) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(view)
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


def figures(loss: float) -> dict[str, float]:
    return {
        "loss/total": loss,
        "loss/hidden/1": 0.5,
        "loss/hidden/2": 0.3,
        "loss/attention/1": 2.0,
        "loss/corpus/wiki/total": 9.0,
        "optimizer/grad_norm": 2.345,
        "optimizer/lr": 1e-3,
    }


SPEED = {
    "time/eta_s": 3 * 3600.0,
    "time/eta_by_rows_s": 2.5 * 3600,
    "speed/rows_per_s": 1234.5,
    "speed/tokens_per_s": 98765.0,
    "speed/mfu": 0.413,
    "share/data": 0.001,
    "share/teacher": 0.31,
}


def test_before_the_first_report_it_says_what_comes() -> None:
    text = shown(View("tiny", 100, 2400))
    assert "tiny" in text and "step 0/100" in text and "first report" in text


def test_a_report_is_shown_whole() -> None:
    view = View("general", 100, 2400, where="http://user:password@tracking:5000/#/runs/1")
    view.evaluated(0, {"a": 20.0, "b": 10.0})
    view.report(25, 600, SPEED, {"a": figures(4.0), "b": figures(3.0)})
    view.evaluated(25, {"a": 5.0})
    view.saved = 20, time.monotonic() - 65
    lines = shown(view).splitlines()
    text = "\n".join(lines)
    assert "step 25/100" in text and "25%" in text and "600 of 2,400 rows" in text
    assert "ETA 3h00m by the wall clock" in text and "2h30m by rows" in text
    assert "saved step 20, 1m05s ago" in text
    assert "1,234.5 rows/s" in text and "98,765 tokens/s" in text and "MFU 41.3%" in text
    assert "teacher 31%" in text and "data 0%" not in text
    row = next(line for line in lines if line.strip("│ ").startswith("a "))
    assert row.split()[2:-1] == [
        "4.0000",
        "0.4000",
        "2.0000",
        "5.0000",
        "at",
        "25",
        "25.0%",
        "2.35",
        "1.0e-03",
    ]
    assert "password" not in text
    assert {len(line) for line in lines} == {120}


def test_the_time_left_runs_down_between_reports() -> None:
    view = View("general", 100, 2400)
    view.report(25, 600, SPEED, {"a": figures(4.0)})
    view.reported_s -= 3600
    assert "ETA 2h00m" in shown(view)
    view.reported_s -= 24 * 3600
    assert "ETA 0s" in shown(view)


def test_lines_that_are_logged_appear_above_the_panel() -> None:
    terminal = io.StringIO()
    root, handler = logging.getLogger(), logging.StreamHandler(terminal)
    root.addHandler(handler)
    try:
        view = View("general", 100, 2400)
        with Terminal(view, Console(file=terminal, width=80, force_terminal=True)) as live:
            assert live.is_live
            logging.getLogger("distil").warning("saved step 20")
        assert handler.stream is terminal
    finally:
        root.removeHandler(handler)
    written = terminal.getvalue()
    assert written.index("saved step 20") < written.rindex("step 0/100")


def test_without_a_terminal_there_is_no_panel() -> None:
    file = io.StringIO()
    with Terminal(View("general", 100, 2400), Console(file=file, force_terminal=False)) as quiet:
        assert not quiet.is_live
    assert file.getvalue() == ""


@pytest.mark.network_of_ranks
def test_a_run_on_a_terminal_and_a_dry_run_of_its_going_on(
    run_config: dict[str, Any], general: Launch, tmp_path: Path
) -> None:
    """Two ranks on a pseudo-terminal: one panel, that of rank 0. Then the same with more steps, dry."""
    inside, outside = pty.openpty()
    line = command(tmp_path, run_config, ranks=2, by="torchrun")
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "TERM": "xterm", "COLUMNS": "130"}
    process = subprocess.Popen(line, cwd=tmp_path, env=environment, stdout=outside, stderr=outside)
    os.close(outside)
    shown = b""
    while True:
        try:
            shown += os.read(inside, 65536)
        except OSError:  # the other end is closed
            break
    assert process.wait(60) == 0, shown.decode()
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode())
    panel = text.rindex("tiny on 2 ranks (cpu)")
    assert "step 6/6" in text[panel:] and "grad" in text[panel:]
    assert text.count("\x1b") == 0 and "step 6/6  loss" not in text, "reports are in the panel alone"
    assert "next: launcher/task.py" in text[panel:]

    before = sorted(path.stat().st_mtime_ns for path in Path(run_config["output"]).rglob("*"))
    done = general(run_config, "train.steps=9", "--dry-run", ranks=2, by="torchrun")
    assert done.returncode == 0, done.stderr
    assert re.search(r"dry run: 9 steps of 24 rows on 2 ranks \(cpu\), from .*step-00000006", done.stderr)
    assert sorted(path.stat().st_mtime_ns for path in Path(run_config["output"]).rglob("*")) == before
    refused = general(run_config, "--dry-run", "train.global_batch_rows=7", f"output={tmp_path}/new")
    assert refused.returncode == 2 and "train.global_batch_rows=7" in refused.stderr
    assert not (tmp_path / "new").exists()
