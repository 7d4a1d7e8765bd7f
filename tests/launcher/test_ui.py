"""What a person sees: a small pipeline and a sweep in MLflow's pages, and the reports, in a real browser.

``SHOTS=FOLDER`` keeps a screenshot of every page there, to be looked at.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pytest
import yaml
from mlflow import MlflowClient
from playwright.sync_api import Page, expect, sync_playwright

from tests.conftest import WORDS
from tests.launcher.conftest import ROOT, student
from tests.trainer.mlflow_server import Server

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
TRAINING = "workflowType=machine_learning"
WAIT_MS = 60_000  # against a hang: the pages' scripts are large


class Shown:
    """A store as a person browses it."""

    def __init__(self, folder: Path, server: Server, page: Page) -> None:
        self.folder, self.uri, self.page = folder, server.uri, page
        client = MlflowClient(server.uri)
        experiment = client.get_experiment_by_name("distillation")
        assert experiment is not None
        self.experiment = experiment.experiment_id
        self.runs = {run.info.run_name: run.info.run_id for run in client.search_runs([self.experiment])}

    def open(self, path: str) -> Page:
        self.page.goto("about:blank")
        self.page.goto(f"{self.uri}/#/{path}")
        return self.page

    def run(self, name: str, tab: str = "") -> Page:
        return self.open(f"experiments/{self.experiment}/runs/{self.runs[name]}{tab}?{TRAINING}")

    def keep(self, name: str) -> None:
        if folder := os.environ.get("SHOTS"):
            self.page.wait_for_timeout(1000)
            self.page.screenshot(path=Path(folder) / f"{name}.png")


def call(folder: Path, *arguments: object) -> None:
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def shown(
    tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Path, tiny_teacher: Path
) -> Iterator[Shown]:
    """The pipeline ``wiki-2026``: a corpus, two students of one run, a sweep of two packed trials."""
    if CHROMIUM is None:
        pytest.fail("Chromium is not installed; `apt-get install chromium` (Debian)")
    folder = tmp_path_factory.mktemp("ui")
    (folder / "text.txt").write_text("\n\n".join(" ".join(WORDS[n:] + WORDS[:n]) for n in range(60)))
    server = Server(folder)
    server.start()
    tracking = {"uri": server.uri, "under": ["wiki-2026"]}
    base = {
        "name": "general",
        "output": str(folder / "general"),
        "teacher": {"model": str(tiny_teacher), "precision": "fp32"},
        "students": [student("small"), student("wide", hidden_size=48, intermediate_size=96)],
        "data": {"corpus": str(folder / "corpus")},
        "train": {"global_batch_rows": 8, "micro_batch_rows": 8, "steps": 12, "threads": 1},
        "evaluation": {"every_steps": 6, "rows": 16},
        "log": {"every_steps": 2},
        "tracking": tracking,
    }
    (folder / "general.yaml").write_text(yaml.safe_dump(base))
    alone = {**base, "students": [student("small")], "log": {"every_steps": 2, "report": False}}
    (folder / "alone.yaml").write_text(yaml.safe_dump(alone))
    sweep = {
        "name": "rates",
        "output": str(folder / "sweep"),
        "base": str(folder / "alone.yaml"),
        "space": {"students.0.optimizer.lr": {"values": [1e-3, 1e-2]}},
        "sampler": "grid",
        "objectives": [{"metric": "heldout/total"}],
        "packed": 2,
    }
    (folder / "sweep.yaml").write_text(yaml.safe_dump(sweep))
    corpus = [f"output={folder}/corpus", f"tokenizer={tiny_tokenizer}", "source.kind=text", "seq_len=32"]
    corpus += [f"source.path={folder}/text.txt", "heldout_share=0.1", "deduplicate=none"]
    corpus += ["tracking.enabled=true", f"tracking.uri={server.uri}", "tracking.under=[wiki-2026]"]
    try:
        call(folder, ROOT / "launcher/corpus.py", "build", *corpus)
        call(folder, ROOT / "launcher/general.py", "--config", folder / "general.yaml")
        call(folder, ROOT / "launcher/sweep.py", "--config", folder / "sweep.yaml")
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
            page = browser.new_context(viewport={"width": 1500, "height": 1000}).new_page()
            page.set_default_timeout(WAIT_MS)
            expect.set_options(timeout=WAIT_MS)
            yield Shown(folder, server, page)
            browser.close()
    finally:
        server.kill()


def test_the_runs_are_a_tree(shown: Shown) -> None:
    page = shown.open(f"experiments/{shown.experiment}/runs?{TRAINING}")
    expect(page.get_by_role("link", name="wiki-2026")).to_be_visible()
    assert page.get_by_role("link", name="general", exact=True).count() == 0, "children are folded away"
    row = page.locator("[role=row]", has=page.get_by_role("link", name="wiki-2026"))
    row.get_by_role("button").first.click()
    for name in ("corpus", "general", "rates"):
        expect(page.get_by_role("link", name=name, exact=True)).to_be_visible()
    shown.keep("tree")


def test_a_pipeline_tells_what_became_of_its_parts(shown: Shown) -> None:
    page = shown.run("wiki-2026")
    for name in ("corpus", "general", "rates"):
        expect(page.get_by_role("link", name=name, exact=True).first).to_be_visible()
    expect(page.get_by_text("rows to train on").first).to_be_visible()
    shown.keep("pipeline")


def test_a_students_charts_are_grouped(shown: Shown) -> None:
    page = shown.run("small", "/model-metrics")
    for group in ("heldout", "loss", "optimizer"):
        expect(page.get_by_text(group, exact=True).first).to_be_visible()
    shown.keep("charts")


def test_two_students_are_compared(shown: Shown) -> None:
    both = quote(json.dumps([shown.runs["small"], shown.runs["wide"]]))
    page = shown.open(f"compare-runs?runs={both}&experiments={quote(json.dumps([shown.experiment]))}")
    expect(page.get_by_text("Comparing 2 Runs from 1 Experiment")).to_be_visible()
    for name in ("small", "wide"):
        expect(page.get_by_text(name, exact=True).first).to_be_visible()
    shown.keep("compared")


@pytest.mark.parametrize(
    "run, said", [("general", "What was distilled, and how it went"), ("rates", "What the sweep found")]
)
def test_a_report_is_among_the_artifacts(shown: Shown, run: str, said: str) -> None:
    page = shown.run(run, "/artifacts/report.html")
    expect(page.frame_locator("iframe").get_by_role("heading", name=said)).to_be_visible()
    shown.keep(f"report-{run}")


@pytest.mark.parametrize("width", [400, 1400])
@pytest.mark.parametrize("folder", ["general", "sweep"])
def test_a_report_by_itself_fits_its_window_and_asks_for_nothing(
    shown: Shown, folder: str, width: int
) -> None:
    page, asked = shown.page.context.new_page(), []  # MLflow's own goes on asking for a while
    page.on("request", lambda request: asked.append(request.url))
    page.set_viewport_size({"width": width, "height": 1000})
    page.goto((shown.folder / folder / "report.html").as_uri())
    expect(page.get_by_role("heading", level=1)).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []
    page.close()
