"""What counts of files that a run appended to while it was cut off and repeated steps."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from launcher.run_figures import wall_clock
from launcher.run_record import FIGURES, Record, duration, keep_figures, latest, read_lines


def at(second: int) -> str:
    return f"2027-03-01T10:{second // 60:02d}:{second % 60:02d}.000+00:00"


def logged(second: int, step: int, loss: float) -> dict[str, Any]:
    return {"at": at(second), "step": step, "run": {}, "students": {"s": {"loss/total": loss}}}


def write_run(folder: Path, events: list[dict[str, Any]], figures: list[dict[str, Any]]) -> Record:
    folder.mkdir()
    config = {"name": "r", "train": {"global_batch_rows": 8}, "students": [{"name": "s"}]}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    for name, lines in (("events.jsonl", events), (FIGURES, figures)):
        (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return Record.read(folder)


def test_a_repeated_step_counts_as_it_was_last_done_and_what_lay_ahead_of_it_not_at_all() -> None:
    steps = [(0, "a"), (0, "b"), (5, "a"), (5, "b"), (10, "a"), (5, "a"), (5, "b"), (8, "a"), (9, "a")]
    lines = [{"step": step, "student": student, "n": n} for n, (step, student) in enumerate(steps)]
    kept = [(line["step"], line["student"], line["n"]) for line in latest(lines, 8)]
    assert kept == [(0, "a", 0), (0, "b", 1), (5, "a", 5), (5, "b", 6), (8, "a", 7)]


def test_torn_lines_are_left_out_wherever_they_are(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2, "x{"step": 3}\n{"step": 4}\n\xff\n7\n{"st')
    assert [line["step"] for line in read_lines(path)] == [1, 4]
    assert read_lines(tmp_path / "none.jsonl") == []


def test_figures_are_kept_to_six_digits_and_a_line_that_cannot_be_written_is_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    keep_figures(tmp_path, 3, {"speed/rows_per_s": 1234.56789}, {"s": {"loss/total": float("nan")}})
    (line,) = read_lines(tmp_path / FIGURES)
    assert line["step"] == 3 and line["run"] == {"speed/rows_per_s": 1234.57}
    assert line["students"]["s"]["loss/total"] != line["students"]["s"]["loss/total"]
    keep_figures(tmp_path / "gone", 4, {}, {})
    assert "figures of step 4 could not be kept" in caplog.text


def test_lives_begin_with_their_process_and_end_as_they_said_or_with_the_last_sign_of_them(
    tmp_path: Path,
) -> None:
    start = {"event": "started", "ranks": 2, "host": "here"}
    events = [
        {**start, "at": at(10), "step": 0},
        {"event": "training", "at": at(12), "step": 1, "seconds": {"imports": 8.0, "first_step": 4.0}},
        {"event": "saved", "at": at(20), "step": 4, "seconds": 0.1},
        {**start, "at": at(100), "step": 4},
        {"event": "stopped", "at": at(130), "step": 6, "reason": "SIGTERM"},
        {**start, "at": at(200), "step": 6},
        {"event": "finished", "at": at(220), "step": 9},
    ]
    figures = [logged(s, step, 1.0) for s, step in ((15, 2), (25, 5), (110, 5), (120, 6), (210, 8), (219, 9))]
    record = write_run(tmp_path / "run", events, figures)
    told = [
        (life.start.second, life.end.second, life.first_step, life.last_step, life.in_words)
        for life in record.lives()
    ]
    assert told == [(0, 25, 0, 5, "cut off"), (40, 10, 4, 6, "stopped: SIGTERM"), (20, 40, 6, 9, "finished")]
    assert record.series("loss/total", "s")[0] == [16, 40, 48, 64, 72]
    assert record.last_step == 9


def test_what_a_run_repeats_does_not_count_before_it_is_done_again(tmp_path: Path) -> None:
    """Cut off after step 9, resumed at 4 and asked to leave at 5; then rolled back from 7 to 6."""
    start = {"event": "started", "ranks": 2, "host": "here"}
    events = [
        {**start, "at": at(0), "step": 0},
        {**start, "at": at(100), "step": 4},
        {"event": "stopped", "at": at(110), "step": 5, "reason": "SIGTERM"},
    ]
    figures = [logged(second, step, 1.0) for second, step in ((10, 2), (20, 4), (30, 6), (40, 8))]
    evaluations = [{"step": step, "student": "s", "losses": {"total": 1.0}} for step in (0, 4, 8)]
    (tmp_path / "lines.jsonl").write_text("".join(json.dumps(line) + "\n" for line in evaluations))
    folder = tmp_path / "run"
    write_run(folder, events, figures)
    (folder / "evaluations.jsonl").write_bytes((tmp_path / "lines.jsonl").read_bytes())
    record = Record.read(folder)
    assert record.last_step == 5 and record.heldout("total", "s")[0] == [0, 32]
    assert record.series("loss/total", "s")[0] == [16, 32]
    back = {"event": "rolled_back", "at": at(230), "step": 6, "student": "s", "from_step": 7}
    more = [{**start, "at": at(200), "step": 5}, back]
    record = write_run(tmp_path / "again", events + more, [*figures, logged(220, 7, 1.0)])
    assert record.last_step == 6 and record.series("loss/total", "s")[0] == [16, 32, 48]


def test_a_roll_backs_steps_take_their_time_twice(tmp_path: Path) -> None:
    events = [
        {"event": "started", "at": at(0), "step": 0, "ranks": 1, "host": "here"},
        {"event": "training", "at": at(10), "step": 1, "seconds": {"imports": 10.0}},
        {"event": "rolled_back", "at": at(110), "step": 20, "student": "s", "from_step": 100},
        {"event": "finished", "at": at(190), "step": 100},
    ]
    figures = [logged(10 + step - 1, step, 1.0) for step in (50, 100)]
    figures += [logged(110 + step - 20, step, 1.0) for step in (50, 100)]
    for line in figures:
        line["run"] = {"speed/step_s": 1.0}
    spent = wall_clock(write_run(tmp_path / "run", events, figures))
    assert spent["training"] == 99 + 80 and spent["starting"] == 10
    assert spent["evaluation, exports, rest"] == pytest.approx(1)


def test_a_folder_that_is_no_runs_is_refused_with_a_way_out(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not the folder of a run.*give the output of"):
        Record.read(tmp_path)


def test_durations() -> None:
    spelled = [duration(seconds) for seconds in (0.04, 6.23, 59.6, 245, 11_220, 183_600)]
    assert spelled == ["0.0 s", "6.2 s", "1 min 0 s", "4 min 5 s", "3 h 7 min", "2 d 3 h"]
