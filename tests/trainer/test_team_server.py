"""A team's server: MLflow over PostgreSQL, artifacts in an S3 protocol store, users with passwords."""

import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest
from mlflow import MlflowClient
from mlflow.server.auth.client import AuthServiceClient
from moto.server import ThreadedMotoServer

from tests.sharding.servers import free_port
from tests.trainer.mlflow_server import Server, wait_for
from tests.trainer.test_tracking import points, start
from trainer import outbox
from trainer.tracking_store import TrackingError

PASSWORD = "correct horse battery"
AUTH = """[mlflow]
default_permission = READ
database_uri = {uri}
admin_username = admin
authorization_function = mlflow.server.auth:authenticate_request_basic_auth
grant_default_workspace_access = true
"""


class Postgres:
    """A PostgreSQL of its own, as Debian's package installs it, run as its user."""

    def __init__(self) -> None:
        programs = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
        if not programs:
            pytest.fail("PostgreSQL is not installed; `apt-get install postgresql` (Debian)")
        self._bin = programs[-1]
        self._user = "postgres" if os.getuid() == 0 else None  # it refuses to run as root
        self._folder = Path(tempfile.mkdtemp(prefix="postgres-"))  # which that user can reach
        if self._user is not None:
            shutil.chown(self._folder, self._user)
        self._port = free_port()
        self.uri = f"postgresql+psycopg2://tracker@127.0.0.1:{self._port}/postgres"
        self._process: subprocess.Popen[bytes] | None = None
        self._call("initdb", "-D", str(self._folder / "data"), "-U", "tracker", "-A", "trust", "--no-sync")

    def _call(self, name: str, *arguments: str) -> None:
        command = [str(self._bin / name), *arguments]
        subprocess.run(command, check=True, capture_output=True, cwd=self._folder, user=self._user)

    def start(self) -> None:
        where = ["-D", str(self._folder / "data"), "-k", str(self._folder), "-p", str(self._port)]
        with (self._folder.parent / f"{self._folder.name}.log").open("ab") as log:
            self._process = subprocess.Popen(
                [str(self._bin / "postgres"), *where, "-h", "127.0.0.1", "-F"],
                cwd=self._folder,
                user=self._user,
                stdout=log,
                stderr=log,
            )
        wait_for(self._answers, "PostgreSQL to answer")

    def _answers(self) -> bool:
        ready = [str(self._bin / "pg_isready"), "-q", "-h", "127.0.0.1", "-p", str(self._port)]
        return subprocess.run(ready, check=False).returncode == 0

    def stop(self) -> None:
        """At once, connections cut."""
        assert self._process is not None
        self._process.send_signal(signal.SIGQUIT)
        self._process.wait()

    def remove(self) -> None:
        self.stop()
        shutil.rmtree(self._folder)
        self._folder.with_name(f"{self._folder.name}.log").unlink()


@pytest.fixture
def postgres() -> Iterator[Postgres]:
    made = Postgres()
    made.start()
    yield made
    made.remove()


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Address of an S3 protocol store with the bucket ``mlflow``."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
    server = ThreadedMotoServer("127.0.0.1", free_port(), verbose=False)
    server.start()
    address = "http://{}:{}".format(*server.get_host_and_port())
    boto3.client("s3", endpoint_url=address, region_name="us-east-1").create_bucket(Bucket="mlflow")
    yield address
    server.stop()


def test_a_team_s_server_takes_everything_once_and_refuses_whom_it_should(
    postgres: Postgres, s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"):
        monkeypatch.setenv(name, "")  # so that they are as before afterwards
        monkeypatch.delenv(name)
    monkeypatch.setattr(outbox, "SEND_EVERY_S", 0.2)
    (tmp_path / "auth.ini").write_text(AUTH.format(uri=postgres.uri))
    options = ["--backend-store-uri", postgres.uri, "--artifacts-destination", "s3://mlflow/distil"]
    server = Server(
        tmp_path,
        [*options, "--app-name", "basic-auth"],
        MLFLOW_S3_ENDPOINT_URL=s3,
        MLFLOW_AUTH_CONFIG_PATH=str(tmp_path / "auth.ini"),
        MLFLOW_AUTH_ADMIN_PASSWORD=PASSWORD,
        MLFLOW_FLASK_SERVER_SECRET_KEY="of a test",
        MLFLOW_HTTP_REQUEST_MAX_RETRIES="0",
    )
    server.start()
    try:
        place = server.uri.removeprefix("http://")
        with pytest.raises(TrackingError, match="not authenticated"):
            start(f"http://nobody:{PASSWORD}@{place}", tmp_path)
        monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "admin")
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", PASSWORD)
        users = AuthServiceClient(server.uri)
        users.create_user("writer", PASSWORD)
        users.create_user("reader", PASSWORD)

        uri = f"http://writer:{PASSWORD.replace(' ', '%20')}@{place}"
        run = start(uri, tmp_path / "writer", name="team", under=["wiki-2026"], journal=tmp_path / "tracking")
        run.log_text("hello", "notes/a.txt")
        for step in range(1, 501):
            run.log_metrics({"loss": step / 8}, step)
        wait_for(lambda: run.id is not None and len(points(server.uri, run.id, "loss")) > 0, "points")
        postgres.stop()  # the server is there and answers with errors
        for step in range(501, 1001):
            run.log_metrics({"loss": step / 8}, step)
        time.sleep(2)
        postgres.start()
        assert run.finish(wait_s=60, outcome="done") == 0
        assert points(server.uri, run.id, "loss") == [(step, step / 8) for step in range(1, 1001)]
        client = MlflowClient(server.uri)
        assert run.id is not None
        stored = client.get_run(run.id)
        assert stored.info.status == "FINISHED"
        assert client.get_run(stored.data.tags["mlflow.parentRunId"]).data.tags["outcome.team"] == "done"
        listed = boto3.client("s3", endpoint_url=s3, region_name="us-east-1").list_objects_v2(Bucket="mlflow")
        assert [found["Key"].endswith(f"{run.id}/artifacts/notes/a.txt") for found in listed["Contents"]]
        kept = "".join(file.read_text() for file in (tmp_path / "tracking").glob("*.json*"))
        assert "loss" in kept and PASSWORD not in kept

        with pytest.raises(TrackingError, match="Permission denied"):
            start(f"http://reader:{PASSWORD.replace(' ', '%20')}@{place}", tmp_path / "reader")
    finally:
        server.kill()
