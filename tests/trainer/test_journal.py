"""The journal: what a crash at any byte leaves, steps logged once, segments that go, one deliverer."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.launcher.conftest import ROOT
from trainer import journal
from trainer.journal import FILES, MAIN, Entry, Journal


def point(step: int | None, run: str = "", **values: float) -> Entry:
    return {"kind": "metrics", "run": run, "at": 7, "step": step, "values": values or {"loss": 1.0}}


def steps(found: Journal, key: str = "loss") -> list[int]:
    return [entry["step"] for entry in found.left() if key in entry.get("values", {})]


def read(found: Journal, lane: str = MAIN) -> list[Entry]:
    return [entry for entry, _ in found.read(lane, 1000) if entry["kind"] != "header"]


def test_whatever_byte_a_crash_cuts_at_whole_lines_stay_and_the_next_job_goes_on(tmp_path: Path) -> None:
    whole = Journal(tmp_path / "whole")
    whole.append([{"kind": "open", "run": "", "at": 1}, point(1), point(2), point(3)])
    (segment,) = (tmp_path / "whole").glob("*.jsonl")
    data = segment.read_bytes()
    lines = data.splitlines(keepends=True)
    for size in range(0, len(data) + 1, 3):
        folder = tmp_path / str(size)
        folder.mkdir()
        (folder / segment.name).write_bytes(data[:size])
        again = Journal(folder)
        kept = [line for line in lines if data[:size].find(line) >= 0][1:]
        assert len(again.left()) == len(kept)
        again.append([point(step) for step in (1, 2, 3, 4)])  # trained again, from the start
        assert steps(again) == [1, 2, 3, 4]
        assert steps(Journal(folder)) == [1, 2, 3, 4]


def test_a_step_is_taken_once_by_run_and_metric_over_restarts_until_it_is_to_be_taken_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal, "SEGMENT_BYTES", 200)  # so that what is known comes from headers too
    for _ in range(3):
        found = Journal(tmp_path)
        found.append([point(step) for step in range(10)])
        found.append([point(step, "small") for step in range(5)])
        found.append([point(5, loss=1.0, heldout=2.0)])
    assert steps(found) == [*range(10), *range(5)]
    assert steps(found, "heldout") == [5]
    found.append([{"kind": "again", "run": "small", "at": 8, "step": 2}])
    again = Journal(tmp_path)
    again.append([point(step, "small") for step in range(7)] + [point(9), point(10)])
    assert steps(again) == [*range(10), *range(5), 3, 4, 5, 6, 10]


def test_a_count_goes_on_where_it_was_whatever_the_run_goes_back_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal, "SEGMENT_BYTES", 50)  # so that what is known comes from headers too
    for _ in range(2):
        found = Journal(tmp_path)
        found.append([point(None, cpu=0.5), {"kind": "again", "run": "", "at": 8, "step": -1}])
        found.append([point(None, cpu=0.5)])
    assert steps(found, "cpu") == [0, 1, 2, 3]


def test_segments_go_when_both_lanes_have_passed_and_what_is_known_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal, "SEGMENT_BYTES", 500)
    found = Journal(tmp_path)
    text = {"kind": "text", "run": "", "at": 7, "text": "hello", "path": "a.txt"}
    for step in range(0, 200, 2):
        found.append([point(step), point(step + 1), text])
    assert len(list(tmp_path.glob("*.jsonl"))) > 10
    assert found.lock()
    found.advance(MAIN, found.read(MAIN, 10**6)[-1][1])
    assert len(list(tmp_path.glob("*.jsonl"))) > 10 and len(found.left()) == 100
    found.advance(FILES, found.read(FILES, 10**6)[-1][1])
    assert len(list(tmp_path.glob("*.jsonl"))) == 1 and found.left() == []
    found.unlock()
    again = Journal(tmp_path)
    again.append([point(199), point(200)])
    assert steps(again) == [200]


def test_a_journal_that_is_full_gives_metrics_up_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(journal, "MAX_BYTES", 2000)
    found = Journal(tmp_path)
    for step in range(100):
        found.append([point(step)])
    found.append([{"kind": "status", "run": "", "at": 9, "status": "FINISHED"}])
    kept = found.left()
    assert 10 < len(kept) < 60 and kept[-1]["kind"] == "status"
    assert caplog.text.count("metrics are given up") == 1


@pytest.mark.parametrize("files", ["delivered", "held up"])
def test_a_journal_that_was_full_takes_metrics_again_once_they_are_delivered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: str
) -> None:
    monkeypatch.setattr(journal, "MAX_BYTES", 8000)
    monkeypatch.setattr(journal, "SEGMENT_BYTES", 1000)
    found = Journal(tmp_path)
    for step in range(200):
        text = {"kind": "text", "run": "", "at": 7, "text": str(step), "path": "a.txt"}
        found.append([point(step), *([text] if step % 20 == 0 else [])])
    assert steps(found)[-1] < 100
    assert found.lock()
    if files == "delivered":
        found.advance(FILES, found.read(FILES, 10**6)[-1][1])
    while lines := found.read(MAIN, 10):  # a few at a time, as delivery does
        found.advance(MAIN, lines[-1][1])
    found.append([point(200)])
    assert steps(found) == [200]
    texts = [entry["text"] for entry in read(found, FILES) if entry["kind"] == "text"]
    assert texts == ([] if files == "delivered" else [str(step) for step in range(0, 200, 20)])
    again = Journal(tmp_path)
    again.append([point(200), point(201)])
    assert steps(again) == [200, 201]


def held(folder: Path) -> list[Path]:
    """Files under ``folder`` that this process has open."""
    return [path for fd in Path("/proc/self/fd").iterdir() if folder in (path := fd.resolve()).parents]


@pytest.mark.parametrize("begun", [False, True])
def test_a_segment_that_cannot_be_begun_costs_no_entry_and_no_other_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, begun: bool
) -> None:
    monkeypatch.setattr(journal, "SEGMENT_BYTES", 50)
    folder, aside = tmp_path / "tracking", tmp_path / "aside"
    found = Journal(folder)
    opening = {"kind": "open", "run": "", "at": 1}
    if begun:
        found.append([opening, point(0)])
    folder.rename(aside)  # so that no file can be made
    with pytest.raises(FileNotFoundError):
        found.append([opening, point(1)])
    with (tmp_path / "other").open("w") as other:  # of a number that was perhaps the segment's
        with pytest.raises(FileNotFoundError):
            found.append([point(2)])
        assert found.unwritten == 3
        aside.rename(folder)
        found.append([point(3)])
        other.write("still open")
    assert found.unwritten == 0
    assert found.left()[0]["kind"] == "open" and steps(found) == list(range(0 if begun else 1, 4))
    assert len(held(folder)) == 1
    found.close()
    assert held(folder) == []
    again = Journal(folder)
    again.append([point(step) for step in range(1, 5)])
    assert steps(again)[-2:] == [3, 4]


def test_a_segment_that_goes_while_the_next_is_begun_is_none_that_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal, "SEGMENT_BYTES", 50)
    found = Journal(tmp_path)
    found.append([point(1)])
    listed = found._segments
    monkeypatch.setattr(found, "_segments", lambda: [*listed(), 0])  # one more than there is by now
    found.append([point(2)])
    again = Journal(tmp_path)
    again.append([point(1), point(2), point(3)])
    assert steps(again) == [1, 2, 3]


HOLD = """
import sys
from pathlib import Path
from trainer.journal import Journal
print(Journal(Path(sys.argv[1])).lock(), flush=True)
sys.stdin.read()
"""


def test_one_process_delivers_at_a_time_and_a_killed_one_holds_nothing(tmp_path: Path) -> None:
    def process() -> Any:
        return subprocess.Popen(
            [sys.executable, "-c", HOLD, str(tmp_path)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    with process() as first:
        assert first.stdout.readline() == "True\n"
        found = Journal(tmp_path)
        assert not found.lock() and f"pid {first.pid}" in found.holder()
        found.append([point(1)])  # writing needs no lock
        first.kill()
        first.wait()
    assert found.lock() and [entry["step"] for entry in read(found)] == [1]
    with process() as second:
        assert second.stdout.readline() == "False\n"
        second.stdin.close()
