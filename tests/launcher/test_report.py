"""The report of a real run that was interrupted: what it says against the run's own files and models."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from mlflow import MlflowClient
from transformers import AutoModel

from benchmarks.tiny_run import TinyRun, tiny_config, write_material
from launcher import comparison_figures, report, run_figures
from launcher.comparison import BATCH_ROWS, SAMPLE_TOKENS, SAMPLES, Comparison, compare
from launcher.figure import drawn
from launcher.run_record import Record
from launcher.run_report import verdict
from sharding.manifest import open_corpus
from sharding.stream import sequential
from tests.launcher.conftest import ROOT
from tests.launcher.looks import assert_needs_nothing_else, assert_readable
from tests.tiny_task import write_tiny_task

pytestmark = pytest.mark.network_of_ranks

STEPS, ROWS = 24, 24
STUDENTS = ("small", "other")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    """Two students, probes and tracking; asked to leave after some steps, then started again."""
    folder = tmp_path_factory.mktemp("report")
    write_material(folder)
    (folder / "mood").mkdir()
    mood = write_tiny_task(folder / "mood", folder / "tokenizer")
    config = tiny_config(folder, STEPS)
    config["evaluation"]["every_steps"] = 4
    config["probes"] = {"every_steps": 8, "tasks": [str(mood)], "rows": 64}
    config["log"]["report"] = True
    config["tracking"] = {"enabled": True, "uri": f"sqlite:///{folder}/mlflow.db", "system_metrics": False}
    found = TinyRun(folder / "run", config)
    life = found.start(ranks=1, zero_stage=1)
    try:
        assert life.until(lambda: life.last_step() >= 7, 120), life.tail()
        os.kill(life.ranks[0].pid, signal.SIGTERM)
        assert life.wait(120) == [75], life.tail()
        (found.output / "evaluations.jsonl").open("a").write('{"step": 8, "stud')  # as if torn
        life = found.start(ranks=1, zero_stage=1)
        assert life.wait(120) == [0], life.tail()
    finally:
        life.end()
    assert "report.html could not be written" not in life.said()
    return found


@pytest.fixture(scope="module")
def record(run: TinyRun) -> Record:
    return Record.read(run.output)


@pytest.fixture(scope="module")
def compared(record: Record) -> list[Comparison]:
    return compare(record, ROWS)


def said_by(run: TinyRun) -> str:
    return "".join(path.read_text() for path in sorted(run.output.parent.glob("run-*.log")))


def test_the_run_left_its_report_and_mlflow_has_it(run: TinyRun) -> None:
    page = assert_needs_nothing_else((run.output / "report.html").read_text())
    assert len(page.figures()) == 2 * 8, "loss, each student's, scores, rate, speed, split, time line"
    client = MlflowClient(tracking_uri=f"sqlite:///{run.output.parent}/mlflow.db")
    ids = json.loads((run.output / "mlflow.json").read_text())
    assert "report.html" in [artifact.path for artifact in client.list_artifacts(ids[""])]


def test_the_figures_kept_are_those_that_the_terminal_told(run: TinyRun, record: Record) -> None:
    told = re.findall(r"step (\d+)/\d+ (\w+)  loss ([\d.]+) ", said_by(run))
    kept = [
        (str(line["step"]), student, f"{own['loss/total']:.4f}")
        for line in record.logged
        for student, own in line["students"].items()
    ]
    assert len(kept) >= 2 * STEPS
    assert {entry[:2] for entry in kept} == {entry[:2] for entry in told}
    for step, student, loss in kept:
        assert any(
            abs(float(loss) - float(other[2])) < 2e-4 for other in told if other[:2] == (step, student)
        )
    rows = record.series("loss/total", "small")[0]
    assert rows == [ROWS * step for step in range(1, STEPS + 1)], "every step once"


def test_the_verdict_is_what_the_runs_files_say(run: TinyRun, record: Record) -> None:
    said = verdict(record)
    losses = run_losses(run.output)
    for student in STUDENTS:
        first, last = losses[0, student], losses[STEPS, student]
        assert f"Held-out loss of {student}: {first:.4g} to **{last:.4g}**" in said
    assert "**small** (2 layers x 24) and **other** (4 layers x 24) learn from teacher on corpus" in said
    assert f"{ROWS * STEPS} rows in {STEPS} steps" in said
    assert f"**finished** after {STEPS} of {STEPS} steps; it was interrupted once" in said
    text = (run.output / "report.html").read_text()
    assert said.replace("**", "")[:60] in re.sub("<.*?>", "", text)
    assert "stopped: SIGTERM at rank 0" in text
    assert json.loads((run.output / "origin.json").read_text())["revision"] in text


def run_losses(folder: Path) -> dict[tuple[int, str], float]:
    lines = re.findall(r'^{"step".*}$', (folder / "evaluations.jsonl").read_text(), re.MULTILINE)
    whole = [json.loads(line) for line in lines if line.count('"step"') == 1]
    return {(line["step"], line["student"]): line["losses"]["total"] for line in whole}


def test_settings_are_told_where_they_differ_from_the_defaults(run: TinyRun) -> None:
    words = assert_needs_nothing_else((run.output / "report.html").read_text()).words.split()
    assert "students.1.optimizer.lr" in words and words[words.index("students.1.optimizer.lr") + 1] == "0.005"
    assert "students.1.optimizer.eps" not in words and "train.seed" not in words


def test_a_run_that_has_not_ended_says_so(run: TinyRun, tmp_path: Path) -> None:
    shutil.copytree(run.output, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints", "export"))
    events = (tmp_path / "run/events.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "run/events.jsonl").write_text("".join(events[:-1]) + events[-1][:20])
    assert "has not said how it ended" in verdict(Record.read(tmp_path / "run"))
    for name in ("metrics.jsonl", "evaluations.jsonl", "probes.jsonl", "events.jsonl", "summary.json"):
        (tmp_path / "run" / name).unlink()
        assert_needs_nothing_else(report.made(tmp_path / "run"))
    assert "has not started yet" in verdict(Record.read(tmp_path / "run"))


def figures_of(record: Record) -> Iterator[tuple[str, Any]]:
    yield "totals", partial(run_figures.draw_totals, record)
    for student in STUDENTS:
        yield f"layers of {student}", partial(run_figures.draw_layers, record, student)
    for name in ("scores", "optimizer", "speed", "split", "timeline"):
        yield name, partial(getattr(run_figures, f"draw_{name}"), record)


@pytest.mark.parametrize("wide", [True, False])
def test_the_figures_can_be_read(record: Record, compared: list[Comparison], wide: bool) -> None:
    for name, draw in figures_of(record):
        figure = drawn(draw, wide)
        assert all(axes.get_xlabel() for axes in figure.axes), name
        assert_readable(figure)
    assert_readable(drawn(partial(comparison_figures.draw_cka, compared[1]), wide))


def test_the_figures_show_what_the_files_hold(record: Record) -> None:
    (axes,) = drawn(partial(run_figures.draw_totals, record), True).axes
    for student, (training, heldout) in zip(
        STUDENTS, zip(axes.lines[::2], axes.lines[1::2], strict=True), strict=True
    ):
        assert training.get_ydata().tolist() == record.series("loss/total", student)[1]
        steps = [step for step, name in run_losses(record.folder) if name == student]
        assert sorted(heldout.get_xdata()) == [ROWS * step for step in sorted(set(steps))]
        assert training.get_color() == heldout.get_color() == run_figures.student_colour(record, student)
    figure = drawn(partial(run_figures.draw_layers, record, "other"), True)
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles == ["attention scores, by student layer", "hidden states, by student layer", "embeddings"]
    assert [text.get_text() for text in figure.axes[0].texts] and len(figure.axes[0].lines) == 2 * 4
    figure = drawn(partial(run_figures.draw_scores, record), True)
    teacher = record.teacher_scores
    assert set(teacher) == {"mood/accuracy", "mood/matthews"}
    dashed = [
        line.get_ydata()[0] for axes in figure.axes for line in axes.lines if line.get_linestyle() == "--"
    ]
    assert dashed == list(teacher.values())
    (axes,) = drawn(partial(run_figures.draw_split, record), True).axes
    assert [text.get_text().split()[0] for text in sorted(axes.texts, key=lambda t: t.xy[1])][0] == "data"


def test_the_time_line_accounts_for_all_of_the_time(run: TinyRun, record: Record) -> None:
    (axes,) = drawn(partial(run_figures.draw_timeline, record), True).axes
    names = [label.get_text() for label in axes.get_yticklabels()]
    saved = sum(event["event"] == "saved" for event in run.events())
    assert names[0] == "run" and f"checkpoints ({saved})" in names and "interruptions (1)" in names
    bars = sorted((bar.get_x(), bar.get_x() + bar.get_width()) for bar in axes.patches)
    assert len(bars) == 2 * 2 + 1, "two starts and two trainings, one pause"
    assert all(abs(end - start) < 1e-6 for (_, end), (start, _) in pairwise(bars)), "one after the other"
    lives, spent = record.lives(), run_figures.wall_clock(record)
    whole = (lives[1].end - lives[0].start).total_seconds()
    assert sum(spent.values()) == pytest.approx(whole) and min(spent.values()) >= 0
    assert spent["training"] > 0 and spent["standing still"] < whole / 2


def test_cka_and_attention_are_what_the_models_give_when_asked_plainly(
    run: TinyRun, record: Record, compared: list[Comparison]
) -> None:
    assert ROWS % BATCH_ROWS, "a last batch that is shorter"
    corpus = open_corpus(record.config["data"]["corpus"])
    batch = next(sequential(corpus, "heldout", rows=ROWS, batch_rows=ROWS, rank=0, world_size=1))
    mask_BS = torch.arange(batch.ids_BS.shape[1]) < batch.length_B[:, None]
    ids_BS = batch.ids_BS[0, :SAMPLE_TOKENS][None].clone()
    ids_BS[0, -1] = corpus.manifest.tokenizer.sep_id

    types_BS = ((torch.arange(batch.ids_BS.shape[1]) >= batch.segment_B[:, None]) & mask_BS).long()

    def plainly(folder: str) -> tuple[list[Any], list[torch.Tensor]]:
        model = AutoModel.from_pretrained(folder, attn_implementation="eager").eval()
        with torch.no_grad():
            seen = model(
                batch.ids_BS,
                attention_mask=mask_BS.long(),
                token_type_ids=types_BS,
                output_hidden_states=True,
            )
            attentions = model(
                ids_BS, token_type_ids=types_BS[:1, :SAMPLE_TOKENS], output_attentions=True
            ).attentions
        return [state[mask_BS].double().numpy() for state in seen.hidden_states], attentions

    def cka(x: Any, y: Any) -> float:
        x, y = x - x.mean(axis=0), y - y.mean(axis=0)
        return np.linalg.norm(y.T @ x) ** 2 / np.linalg.norm(x.T @ x) / np.linalg.norm(y.T @ y)

    teacher, of_teacher = plainly(record.config["teacher"]["model"])
    assert [(found.student, found.layer_map) for found in compared] == [
        ("small", (2, 4)),
        ("other", (1, 2, 3, 4)),
    ]
    for found in compared:
        student, of_student = plainly(str(run.output / "export" / found.student))
        expected = [[cka(x, y) for y in teacher] for x in student]
        np.testing.assert_allclose(found.cka, expected, rtol=1e-4)
        assert found.tokens == int(mask_BS.sum()) and len(found.samples) == SAMPLES
        for m, g in enumerate(found.layer_map, start=1):
            for maps, whole in (
                (found.samples[0].student, of_student[m - 1]),
                (found.samples[0].teacher, of_teacher[g - 1]),
            ):
                torch.testing.assert_close(maps[m - 1], whole[0].mean(dim=0), atol=1e-5, rtol=1e-4)


def test_figures_of_models_mark_the_layer_map_and_name_the_tokens(compared: list[Comparison]) -> None:
    small = compared[0]
    heat, _ = drawn(partial(comparison_figures.draw_cka, small), True).axes
    assert [patch.get_xy() for patch in heat.patches] == [(0, 0), (2, 1), (4, 2)]
    sample = small.samples[0]
    figure: Figure = drawn(partial(comparison_figures.draw_attention, small, sample), True)
    maps = figure.axes[:4]
    assert [axes.get_title(loc="left") for axes in maps] == [
        "student 1",
        "student 2",
        "teacher 2",
        "teacher 4",
    ]
    assert [label.get_text() for label in maps[0].get_yticklabels()] == sample.tokens
    np.testing.assert_array_equal(maps[3].images[0].get_array(), sample.teacher[1].numpy())


def test_the_page_holds_what_the_models_have_in_common(run: TinyRun) -> None:
    page = assert_needs_nothing_else(report.made(run.output, models=True, rows=8))
    assert len(page.figures()) == 2 * (8 + 2 * (1 + SAMPLES))
    assert "What the layers of small have in common with the teacher's" in page.words


def test_models_that_are_not_there_are_refused_with_a_way_out(run: TinyRun, tmp_path: Path) -> None:
    shutil.copy(run.output / "config.yaml", tmp_path)
    with pytest.raises(ValueError, match="no exported student yet: leave --models out"):
        report.made(tmp_path, models=True, rows=8)


def test_the_command_writes_a_page_and_refuses_other_folders(run: TinyRun, tmp_path: Path) -> None:
    def call(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(ROOT / "launcher/report.py"), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=200, cwd=tmp_path)

    done = call(str(run.output), "--output", "r.html")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "r.html").read_text() == (run.output / "report.html").read_text()
    done = call(str(tmp_path))
    assert done.returncode == 2 and "is not the folder of a run" in done.stderr


def test_drawing_that_fails_is_a_warning(
    run: TinyRun, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copy(run.output / "config.yaml", tmp_path)
    assert report.at_end(tmp_path)
    shutil.copy(run.output / "events.jsonl", tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": "x", "at": "yesterday"}\n')
    assert not report.at_end(tmp_path)
    assert "report.html could not be written" in caplog.text
