"""A run with planted secrets, start to finish and resumed: none is in anything that it writes or says."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

Launch = Callable[..., subprocess.CompletedProcess[str]]

SECRETS = {  # by environment variable
    "TEAM_PASSWORD": "planted-password",
    "HF_TOKEN": "hf_plantedtoken",
    "AWS_SECRET_ACCESS_KEY": "planted/secret+key",
}
IN_ADDRESS = "planted-and-typed"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """Address of a real ``mlflow server`` without users, whose files lie in ``tmp_path/server``."""
    folder = tmp_path / "server"
    folder.mkdir()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--workers", "1", "--backend-store-uri", f"sqlite:///{folder}/server.db"]
    command += ["--artifacts-destination", str(folder / "artifacts")]
    environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with (folder / "server.log").open("ab") as log:
        process = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=log, stderr=log, start_new_session=True
        )
    try:
        deadline_s = time.monotonic() + 120  # against a hang
        while True:
            assert process.poll() is None and time.monotonic() < deadline_s, "the server did not start"
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            except OSError:
                time.sleep(0.1)
        yield f"127.0.0.1:{port}"
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def found_in(text: bytes) -> list[str]:
    return [secret for secret in (*SECRETS.values(), IN_ADDRESS) if secret.encode() in text]


def leaks(folder: Path) -> dict[str, list[str]]:
    """Files that hold a secret, by path below the folder."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert files
    return {str(path.relative_to(folder)): found for path in files if (found := found_in(path.read_bytes()))}


def test_planted_secrets_are_nowhere(
    tmp_path: Path,
    run_config: dict[str, Any],
    general: Launch,
    server: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    run_config["tracking"] = {
        "uri": f"http://planted-user:${{oc.env:TEAM_PASSWORD}}@{server}",
        "experiment": "secrets",
        "tags": {"owner": "${oc.env:HF_TOKEN}"},
    }
    typed = f"tracking.tags.note=https://me:{IN_ADDRESS}@host/${{oc.env:AWS_SECRET_ACCESS_KEY}}"
    said = []
    for steps in (4, 6):
        done = general(run_config, f"train.steps={steps}", typed)
        assert done.returncode == 0, done.stderr
        said.append(done.stdout + done.stderr)
    assert "resumed at step 4" in said[1]
    for name in ("run", "server"):
        assert leaks(tmp_path / name) == {}
    assert [found_in(text.encode()) for text in said] == [[], []]

    [run] = MlflowClient(f"http://{server}").search_runs(["1"])
    assert run.data.params["tracking.uri"] == f"http://{server}"
    assert run.data.tags["owner"] == "***" and run.data.tags["note"] == "https://host/***"
    assert "uri: http://127.0.0.1" in (tmp_path / "run/config.yaml").read_text()


def test_errors_do_not_tell_them(
    run_config: dict[str, Any], general: Launch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TEAM_PASSWORD", SECRETS["TEAM_PASSWORD"])
    with socket.socket() as closed:  # bound and not listening: refuses
        closed.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{closed.getsockname()[1]}"
        uri = f"http://me:{IN_ADDRESS}@{address}"
        done = general(run_config, "tracking.enabled=true", f"tracking.uri={uri}")
        assert done.returncode == 0 and f"tracking.uri=http://{address} does not answer" in done.stderr
        assert leaks(Path(run_config["output"])) == {}
    typed = general(run_config, "name=${oc.env:TEAM_PASSWORD} with a space")
    assert typed.returncode == 2 and "name='*** with a space'" in typed.stderr
    assert found_in("".join(run.stdout + run.stderr for run in (done, typed)).encode()) == []
