"""Tracking against real stores: an SQLite file, and a real ``mlflow server`` that is killed and restarted."""

import base64
import json
import logging
import math
import shutil
import socket
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from configs.schema import Precision
from tests.conftest import small_disk
from tests.trainer.mlflow_server import Server
from tests.trainer.test_journal import held
from trainer import tracking, tracking_store
from trainer.journal import Journal
from trainer.tracking import Run, flatten, resolve_uri
from trainer.tracking_store import TrackingError

pytestmark = pytest.mark.usefixtures("promptly")


@pytest.fixture(params=["sqlite", "server"])
def uri(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "server":
        return str(request.getfixturevalue("server").uri)
    return f"sqlite:///{tmp_path}/store/mlflow.db"


def start(uri: str | None, folder: Path, **changes: Any) -> Run:
    settings: dict[str, Any] = {"experiment": "distillation", "name": "run", "params": {}, "tags": {}}
    return Run.start(uri=uri, default_folder=folder, **{**settings, **changes})


def points(uri: str, run_id: str | None, key: str) -> list[tuple[int, float]]:
    """(step, value) of every stored point, in the order of the steps."""
    assert run_id is not None
    history = MlflowClient(uri).get_metric_history(run_id, key)
    return sorted((metric.step, metric.value) for metric in history)


def test_all_that_is_logged_is_read_back(uri: str, tmp_path: Path) -> None:
    fingerprint = "0123456789abcdef" * 4
    params = {f"key.{index}": f"value {index}" for index in range(250)}
    exported = tmp_path / "student"
    exported.mkdir()
    (exported / "config.json").write_text("{}")

    parent = start(
        uri,
        tmp_path,
        name="pipeline",
        params=params,
        tags={"mlflow.source.git.commit": "abc"},
        description="All",
    )
    child = parent.child("student", params={"layers": 4}, tags={"kind": "4x312"})
    for step in range(1, 31):
        parent.log_metrics({"speed/rows_per_s": step * 10.0}, step)
        child.log_metrics({"loss/attention/2": 1 / step, "loss/hidden/1": math.nan}, step)
    parent.log_dataset("wikipedia", fingerprint, "s3://me:secret@host/corpus", {"rows": 7, "tokens": 900})
    child.log_text("hello", "notes/a.txt")
    child.log_artifacts(exported, "student")
    child.fail("as told")
    child.finish("FAILED")
    assert parent.finish("KILLED", outcome="interrupted") == 0
    assert parent.id is not None and child.id is not None
    assert not list((tmp_path / "undelivered").iterdir()), "a journal of a run alone goes"

    client = MlflowClient(uri)
    stored, stored_child = client.get_run(parent.id), client.get_run(child.id)
    assert stored.data.params == params
    assert (stored.info.status, stored_child.info.status) == ("KILLED", "FAILED")
    assert stored.data.tags["mlflow.source.git.commit"] == "abc"
    assert stored_child.data.tags["mlflow.parentRunId"] == parent.id
    assert (stored_child.data.tags["kind"], stored_child.data.params) == ("4x312", {"layers": "4"})
    assert stored_child.data.tags["failed"] == "as told"
    assert stored.data.tags["mlflow.note.content"] == "All\n\n**Outcome:** interrupted"
    assert stored.info.start_time <= stored_child.info.start_time <= stored.info.end_time
    assert points(uri, parent.id, "speed/rows_per_s") == [(step, step * 10.0) for step in range(1, 31)]
    assert points(uri, child.id, "loss/attention/2") == [(step, 1 / step) for step in range(1, 31)]
    assert math.isnan(stored_child.data.metrics["loss/hidden/1"])
    (entry,) = stored.inputs.dataset_inputs
    assert (entry.dataset.name, entry.dataset.digest) == ("wikipedia", fingerprint[:36])
    assert json.loads(entry.dataset.profile) == {"rows": 7, "tokens": 900}
    assert json.loads(entry.dataset.source) == {"uri": "s3://host/corpus"}
    assert stored.data.tags["corpus.fingerprint"] == fingerprint
    fetched = Path(client.download_artifacts(child.id, "", str(tmp_path)))
    assert (fetched / "notes" / "a.txt").read_text() == "hello"
    assert (fetched / "student" / "config.json").read_text() == "{}"


@pytest.mark.parametrize("journal", ["kept", "gone"])
def test_a_resumed_run_shows_replayed_steps_once(uri: str, tmp_path: Path, journal: str) -> None:
    folder = tmp_path / "tracking"
    run = start(uri, tmp_path, params={"train.steps": 10, "seed": 1}, journal=folder)
    for step in range(11):
        run.log_metrics({"loss": step / 8}, step)
    run.log_metrics({"heldout/loss": 5.0}, 5)
    run.log_dataset("wikipedia", "f" * 64, "corpus", {"rows": 7})
    run.finish("FAILED")

    if journal == "gone":
        shutil.rmtree(folder)
    params = {"train.steps": 20, "seed": 1, "more": 2}
    again = start(uri, tmp_path, run_id=run.id, params=params, journal=folder)
    for step in range(3, 21):  # from the checkpoint of step 2
        again.log_metrics({"loss": step / 8}, step)
        if step % 5 == 0:
            again.log_metrics({"heldout/loss": float(step)}, step)
    again.log_dataset("wikipedia", "f" * 64, "corpus", {"rows": 7})
    assert again.finish() == 0

    assert again.id == run.id is not None
    stored = MlflowClient(uri).get_run(run.id)
    assert stored.info.status == "FINISHED"
    assert points(uri, run.id, "loss") == [(step, step / 8) for step in range(21)]
    assert points(uri, run.id, "heldout/loss") == [(step, float(step)) for step in (5, 10, 15, 20)]
    assert stored.data.params == {"train.steps": "10", "seed": "1", "more": "2"}
    assert stored.data.tags["resumed.train.steps"] == "20"
    assert len(stored.inputs.dataset_inputs) == 1


def test_what_is_refused_is_left_out_by_name_and_holds_nothing_up(
    server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """MLflow takes no metric, tag or param of such a name; a folder that is gone cannot be sent."""
    run = start(server.uri, tmp_path, tags={"a//b": "no", "fine": "yes"}, params={"../a": 1, "seed": 2})
    run.log_artifacts(tmp_path / "gone", "model")
    run.log_text("hello", "inside.txt")
    for step in range(20):
        run.log_metrics({"loss": 1.0, "bad//name" if step == 7 else "other": 2.0}, step)
    with caplog.at_level(logging.WARNING):
        assert run.finish() == 0
    for what in ("metric bad//name", "artifacts model", "runtag a//b", "param ../a"):
        assert f"MLflow refuses {what} for good" in caplog.text
    assert caplog.text.count("MLflow refuses") == 4
    assert run.id is not None
    stored = MlflowClient(server.uri).get_run(run.id)
    assert stored.info.status == "FINISHED" and stored.data.params == {"seed": "2"}
    assert stored.data.tags["fine"] == "yes"
    assert len(points(server.uri, run.id, "loss")) == 20 and len(points(server.uri, run.id, "other")) == 19
    assert [found.path for found in MlflowClient(server.uri).list_artifacts(run.id)] == ["inside.txt"]


def test_a_run_that_somebody_deletes_holds_nothing_up(
    server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = start(server.uri, tmp_path)
    child = run.child("student", params={}, tags={})
    client = MlflowClient(server.uri)
    client.delete_run(child.opened())
    with caplog.at_level(logging.WARNING):
        for step in range(20):
            run.log_metrics({"loss": 1.0}, step)
            child.log_metrics({"loss": 1.0, "other": 2.0}, step)
        child.log_text("hello", "a.txt")
        child.finish()
        assert run.finish() == 0
    assert caplog.text.count(f"MLflow run {child.id} is deleted") == 1 and "refuses" not in caplog.text
    assert len(points(server.uri, run.id, "loss")) == 20


def test_files_that_cannot_be_stored_hold_up_files_only(tmp_path: Path) -> None:
    """The folder for artifacts is a file."""
    uri = resolve_uri(None, tmp_path)
    (tmp_path / "artifacts").write_text("in the way")
    run = start(None, tmp_path)
    run.log_text("hello", "a.txt")
    for step in range(10):
        run.log_metrics({"loss": step}, step)
    assert run.finish("FINISHED", wait_s=1.0) == 1
    assert run.id is not None
    assert MlflowClient(uri).get_run(run.id).info.status == "FINISHED"
    assert len(points(uri, run.id, "loss")) == 10


@pytest.mark.parametrize(
    ("uri", "happened"),
    [
        ("ftp://me:secret@host:5000", "unsupported URI"),
        ("sqlite:////proc/nowhere/mlflow.db", "No such file"),
        ("./mlruns", "filesystem"),
        ("localhost:5000", "unsupported URI"),
    ],
)
def test_an_unusable_store_is_an_error_with_the_way_out(uri: str, happened: str, tmp_path: Path) -> None:
    with pytest.raises(TrackingError, match=r"tracking\.uri=.*tracking\.enabled=false") as caught:
        start(uri, tmp_path)
    assert happened in str(caught.value)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("how", ["refuses", "is silent", "has no such name", "database"])
def test_a_store_that_is_down_is_a_warning_within_seconds(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tracking_store, "REACH_S", 0.5)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        uri = {
            "refuses": "http://127.0.0.1:9",
            "is silent": f"http://127.0.0.1:{silent.getsockname()[1]}",
            "has no such name": "http://nowhere.invalid:5000",
            "database": "postgresql://me:secret@127.0.0.1:9/mlflow",
        }[how]
        with caplog.at_level(logging.WARNING):
            run = start(uri, tmp_path)
            run.log_metrics({"loss": 1.0}, 1)
            assert "does not answer" in caplog.text and "The run starts all the same" in caplog.text
            assert "secret" not in caplog.text
            assert run.finish(wait_s=0.3) >= 1 and run.id is None
    (kept,) = (tmp_path / "undelivered").iterdir()
    assert [entry["kind"] for entry in Journal(kept).left()] == ["open", "metrics", "status"]
    assert "secret" not in "".join(file.read_text() for file in kept.glob("*.json*"))


def test_a_deleted_experiment_or_run_is_an_error(server: Server, tmp_path: Path) -> None:
    client = MlflowClient(server.uri)
    gone = client.create_experiment("gone")
    run_id = client.create_run(client.create_experiment("stays")).info.run_id
    client.delete_experiment(gone)
    client.delete_run(run_id)
    with pytest.raises(TrackingError, match="experiment gone is deleted"):
        start(server.uri, tmp_path, experiment="gone")
    with pytest.raises(TrackingError, match=f"run {run_id} is deleted"):
        start(server.uri, tmp_path, experiment="stays", run_id=run_id)


def test_a_file_that_is_no_database_is_an_error_and_stays_as_it_was(tmp_path: Path) -> None:
    file = tmp_path / "notes.txt"
    file.write_text("not a database, but long enough to be read as one" * 10)
    before = file.read_bytes()
    with pytest.raises(TrackingError, match="not a database"):
        start(f"sqlite:///{file}", tmp_path)
    assert file.read_bytes() == before


def test_resuming_a_run_that_the_store_does_not_hold_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(TrackingError, match="0123456789abcdef"):
        start(None, tmp_path, run_id="0123456789abcdef" * 2)


def test_the_default_store_keeps_everything_in_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    folder = tmp_path / "mlflow"
    run = start(None, folder)
    run.log_text("hello", "a.txt")
    assert run.finish() == 0
    assert run.url == f"make ui STORE=sqlite:///{folder}/mlflow.db"
    assert list((folder / "artifacts").rglob("a.txt"))
    assert not list(elsewhere.iterdir())


def test_a_run_whose_folder_cannot_be_written_is_tracked_all_the_same(tmp_path: Path) -> None:
    run = start(f"sqlite:///{tmp_path}/mlflow.db", Path("/proc/nowhere"))
    run.log_metrics({"loss": 1.0}, 1)
    assert run.finish() == 0
    assert points(run.uri, run.id, "loss") == [(1, 1.0)]


def test_the_configured_uri_wins_over_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://from-environment:5000")
    assert resolve_uri("http://from-config:5000", tmp_path) == "http://from-config:5000"
    assert resolve_uri(None, tmp_path) == "http://from-environment:5000"


def test_a_journal_that_cannot_go_is_a_warning_and_nothing_in_it_is_open_any_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As on NFS, where an open file keeps its folder."""
    with small_disk(tmp_path / "disk", 256 * 4096) as disk:  # which nobody can remove
        monkeypatch.setattr(tracking, "_journal_alone", lambda folder: Journal(disk))
        run = start(None, tmp_path)
        run.log_metrics({"loss": 1.0}, 1)
        assert run.finish() == 0
        assert held(disk) == [] and not list(disk.iterdir())
    assert f"{disk} is delivered, but could not be removed" in caplog.text


def test_long_params_are_cut_and_kept_whole_beside(tmp_path: Path) -> None:
    long = "x" * 7000
    run = start(None, tmp_path, params={"long": long, "short": "y"})
    assert run.finish() == 0 and run.id is not None
    client = MlflowClient(resolve_uri(None, tmp_path))
    assert client.get_run(run.id).data.params == {"long": long[:6000], "short": "y"}
    whole = Path(client.download_artifacts(run.id, "params.json", str(tmp_path)))
    assert json.loads(whole.read_text()) == {"long": long, "short": "y"}


def test_flatten() -> None:
    config = {
        "teacher": {"model": "bert", "revision": None, "precision": Precision.bf16},
        "students": [{"name": "a", "betas": [0.9, 0.999]}, {"name": "b", "overrides": {}}],
        "deterministic": False,
        "lr": 1e-4,
        "odd (key)": 1,
        "tracking": {"uri": "http://me:secret@host:5000"},
    }
    assert flatten(config) == {
        "teacher.model": "bert",
        "teacher.revision": "null",
        "teacher.precision": "bf16",
        "students.0.name": "a",
        "students.0.betas": "[0.9, 0.999]",
        "students.1.name": "b",
        "students.1.overrides": "{}",
        "deterministic": "false",
        "lr": 1e-4,
        "odd _key_": 1,
        "tracking.uri": "http://host:5000",
    }


def test_a_password_in_the_uri_reaches_the_server_and_nobody_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"):
        monkeypatch.setenv(name, "another")
    asked: list[str | None] = []

    class Refusing(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.headers["Authorization"])
            self.send_error(401)

        do_POST = do_GET

    server = HTTPServer(("127.0.0.1", 0), Refusing)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    uri = f"http://me:sword%40fish@127.0.0.1:{server.server_port}"
    with pytest.raises(TrackingError) as refused:
        Run.start(uri=uri, default_folder=tmp_path, experiment="e", name="r", params={}, tags={})
    server.shutdown()
    server.server_close()
    assert {*asked} == {"Basic " + base64.b64encode(b"me:sword@fish").decode()}
    assert "sword" not in str(refused.value) + "".join(capsys.readouterr())
