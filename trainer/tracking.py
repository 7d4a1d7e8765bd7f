"""Tracking in MLflow: the only module that knows it.

A ``Run`` is one open MLflow run. Opening it is strict: a store that cannot be used is a ``TrackingError``
within seconds, before anything is trained. From then on nothing it does raises or waits: all goes through
an ``Outbox``, which keeps what a server that is down did not take and sends it again. A point keeps the
time at which it was logged, and MLflow stores a point of the same key, step, time and value once, so
sending again never shows it twice.

MLflow's own asynchronous logging is not used: it drops a batch after one failure, grows without bound and
waits at exit for as long as a dead server lets it.
"""

import getpass
import itertools
import json
import os
import re
import socket
import sqlite3
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from enum import Enum
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit, urlunsplit

from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param
from mlflow.entities import Run as StoredRun
from mlflow.exceptions import MlflowException
from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor
from mlflow.utils.credentials import get_default_host_creds
from mlflow.utils.rest_utils import http_request

from configs.public import public
from trainer.outbox import Outbox

REACH_S = 5.0  # how long a host may take to answer at the start
HTTP_DEFAULTS = {
    # One call, without these, retries a dead server for four minutes. The outbox does its own retrying.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
}
MAX_BATCH_PARAMS, MAX_PARAM_CHARS, MAX_KEY_CHARS, MAX_DIGEST_CHARS = 100, 6000, 250, 36  # MLflow's limits

TRAINING_KIND = {"mlflow.experimentKind": "custom_model_development"}  # not GenAI


class TrackingError(ValueError):
    """The tracking store cannot be used as configured; the message says what happened and the way out."""


def resolve_uri(uri: str | None, default_folder: Path) -> str:
    """URI of the store: ``uri``, else ``MLFLOW_TRACKING_URI``, else SQLite in ``default_folder`` (made)."""
    uri = uri or os.environ.get("MLFLOW_TRACKING_URI")
    if uri:
        return uri
    try:
        default_folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unusable(str(default_folder), error) from error
    return f"sqlite:///{default_folder.resolve()}/mlflow.db"


def flatten(config: Mapping[str, Any]) -> dict[str, str | int | float]:
    """Nested config as MLflow params: dotted keys (``students.0.name``), values as YAML would show them.

    Lists of plain values stay one param. Secrets are left out (``configs.public``).
    """

    def walk(key: str, value: Any) -> Iterator[tuple[str, str | int | float]]:
        nested = isinstance(value, Sequence) and any(isinstance(item, (Mapping, list)) for item in value)
        if isinstance(value, Mapping) and value:
            for name, item in value.items():
                yield from walk(f"{key}.{name}" if key else str(name), item)
        elif nested and not isinstance(value, str):
            for index, item in enumerate(value):
                yield from walk(f"{key}.{index}", item)
        else:
            yield re.sub(r"[^\w.\- :/]", "_", key)[:MAX_KEY_CHARS], _plain(value)

    return dict(walk("", config))


def _plain(value: Any) -> str | int | float:
    if isinstance(value, Enum):
        value = value.value
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return value
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return public(text)


class Run:
    """One open MLflow run, for one rank: ``start`` opens it, ``finish`` closes it. Many can be open."""

    def __init__(self, client: MlflowClient, uri: str, stored: StoredRun, system_metrics: bool) -> None:
        self.id: str = stored.info.run_id
        self._client = client
        self.uri = uri
        self._experiment_id = stored.info.experiment_id
        # Last step the store holds of every metric: a resumed run trains some steps again.
        self._last_step = {metric.key: metric.step for metric in stored.data.to_proto().metrics}
        self._outbox: Outbox[Metric] = Outbox(
            name=f"MLflow run {self.id}",
            send_points=lambda points: client.log_batch(self.id, metrics=points, synchronous=True),
            is_refusal=lambda error: (
                isinstance(error, MlflowException) and error.get_http_status_code() == 400
            ),
            sample=_SystemSampler(self.id, uri, self._last_step).due if system_metrics else None,
        )

    @classmethod
    def start(
        cls,
        *,
        uri: str | None,
        default_folder: Path,
        experiment: str,
        name: str,
        run_id: str | None = None,
        parent_run_id: str | None = None,
        params: Mapping[str, Any],
        tags: Mapping[str, str],
        description: str = "",
        system_metrics: bool = False,
    ) -> "Run":
        """Open a new run, or go on with ``run_id``.

        Args:
            uri: The store, see ``resolve_uri``.
            default_folder: Holds the SQLite store when nothing else is set, and the artifacts of any store
                that is no server (those of an SQLite store lie in ``artifacts`` beside its file).
            params: Flat and resolved (``flatten``). A param of a continued run cannot change in MLflow;
                a new value becomes the tag ``resumed.<key>``.
            tags: Further tags; MLflow's own names (``mlflow.source.git.commit``) are welcome.
            system_metrics: Sample CPU, memory, disk, network and GPU of this host into the run.

        Raises:
            TrackingError: The store cannot be reached or refuses, or does not hold ``run_id``.
        """
        uri = _credentials_apart(resolve_uri(uri, default_folder))
        for variable, value in HTTP_DEFAULTS.items():
            os.environ.setdefault(variable, value)
        own_tags = {"mlflow.source.type": "LOCAL", "mlflow.user": _user(), **tags}
        if description:
            own_tags["mlflow.note.content"] = description
        if parent_run_id is not None:
            own_tags["mlflow.parentRunId"] = parent_run_id
        try:
            _reach(uri)
            client = MlflowClient(tracking_uri=uri)
            if run_id is None:
                experiment_id = _experiment_id(client, experiment, _artifact_folder(uri, default_folder))
                stored = client.create_run(experiment_id, run_name=public(name))
            else:
                stored = client.get_run(run_id)
                client.update_run(run_id, status="RUNNING")
            _describe(client, stored, params, own_tags)
        except Exception as error:  # every store and driver fails in its own way
            raise _unusable(uri, error) from error
        return cls(client, uri, stored, system_metrics)

    @property
    def url(self) -> str:
        """Where a person looks at the run: its page on the server, or the command that shows the store."""
        uri = public(self.uri)
        if uri.startswith("http"):
            page = f"/#/experiments/{self._experiment_id}/runs/{self.id}"
            return f"{uri.rstrip('/')}{page}?workflowType=machine_learning"  # else MLflow 3 opens on GenAI
        return f"make ui STORE={uri}"

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Queue one point per metric; ``step`` counts completed optimizer steps. Never waits, never raises.

        Points at or before the last step that the store held when the run was continued are dropped.
        """
        now_ms = int(time.time() * 1000)
        self._outbox.put(
            Metric(key, float(value), now_ms, step)
            for key, value in metrics.items()
            if key not in self._last_step or step > self._last_step[key]
        )

    def log_dataset(
        self,
        name: str,
        fingerprint: str,
        source: str,
        profile: Mapping[str, int],
        tag: str = "corpus.fingerprint",
    ) -> None:
        """Queue a corpus as an MLflow dataset of the run.

        Args:
            fingerprint: Digest of the manifest. MLflow keeps 36 characters of a digest, ``tag`` the whole.
            source: Where the corpus lies.
            profile: Counts, such as rows and tokens.
            tag: One of several corpora has a tag of its own.
        """
        dataset = Dataset(
            name=name,
            digest=fingerprint[:MAX_DIGEST_CHARS],
            source_type="corpus",
            source=json.dumps({"uri": public(source)}),
            profile=json.dumps(dict(profile)),
        )
        entry = DatasetInput(dataset, [InputTag("mlflow.data.context", "training")])

        def send() -> None:
            self._client.log_inputs(self.id, [entry])
            self._client.set_tag(self.id, tag, fingerprint)

        self._outbox.call(f"dataset {name}", send)

    def log_text(self, text: str, path: str) -> None:
        """Queue a text, without secrets, as the artifact ``path``."""
        self._outbox.call(path, lambda: self._client.log_text(self.id, public(text), path))

    def log_artifacts(self, folder: Path, path: str) -> None:
        """Queue the files of ``folder`` as artifacts under ``path``; leave them in place until ``finish``."""
        self._outbox.call(path, lambda: self._client.log_artifacts(self.id, str(folder), path))

    def set_tag(self, key: str, value: str) -> None:
        """Queue a tag."""
        self._outbox.call(f"tag {key}", lambda: self._client.set_tag(self.id, key, public(value)))

    def fail(self, reason: str) -> None:
        """Queue the status FAILED and the tag ``failed``, which says why; the run can still be logged to."""

        def send() -> None:
            self._client.set_tag(self.id, "failed", public(reason))
            self._client.set_terminated(self.id, "FAILED")

        self._outbox.call("status FAILED", send)

    def finish(self, status: str = "FINISHED", wait_s: float = 30.0) -> int:
        """Send what is queued, close the run, return the points lost.

        ``status``: FINISHED, FAILED, KILLED or SCHEDULED (it goes on later). Gives up ``wait_s`` after the
        last thing that the store took, and after ten times that in all.
        """
        self._outbox.call(f"status {status}", lambda: self._client.set_terminated(self.id, status))
        return self._outbox.close(wait_s)


def _credentials_apart(uri: str) -> str:
    """A server's URI without user and password: MLflow prints it, and takes them from the environment too."""
    parts = urlsplit(uri)
    if parts.scheme not in ("http", "https") or "@" not in parts.netloc:
        return uri
    os.environ["MLFLOW_TRACKING_USERNAME"] = unquote(parts.username or "")
    os.environ["MLFLOW_TRACKING_PASSWORD"] = unquote(parts.password or "")
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user id may have no name
        return f"uid {os.getuid()}"


def _unusable(uri: str, happened: object) -> TrackingError:
    return TrackingError(
        f"tracking.uri={public(uri)} cannot be used: {public(str(happened))}. Start the server or correct "
        "the URI; or track into a local file (tracking.uri=sqlite:////path/to/mlflow.db), or not at all "
        "(tracking.enabled=false)"
    )


def _reach(uri: str) -> None:
    """Raise unless the host, or the SQLite file, behind ``uri`` answers within ``REACH_S``.

    MLflow would retry a database that it cannot open for a minute and a half.
    """
    parts = urlsplit(uri)
    if parts.scheme in ("http", "https"):
        http_request(
            get_default_host_creds(uri),
            "/health",
            "GET",
            max_retries=0,
            timeout=REACH_S,
            raise_on_status=False,
        )
    elif parts.scheme == "sqlite":
        file = Path(parts.path.removeprefix("/"))
        file.parent.mkdir(parents=True, exist_ok=True)
        with closing(sqlite3.connect(file, timeout=REACH_S)) as connection:
            connection.execute("BEGIN IMMEDIATE")  # fails now if this is no database or cannot be written
    elif parts.hostname and parts.port:
        socket.create_connection((parts.hostname, parts.port), timeout=REACH_S).close()


def _artifact_folder(uri: str, default_folder: Path) -> str | None:
    """Where a store that is no server keeps artifacts; MLflow's own default is the working folder."""
    parts = urlsplit(uri)
    if parts.scheme in ("http", "https") or parts.scheme.startswith("databricks"):
        return None
    folder = Path(parts.path.removeprefix("/")).parent if parts.scheme == "sqlite" else default_folder
    return (folder.resolve() / "artifacts").as_uri()


def _experiment_id(client: MlflowClient, name: str, artifact_folder: str | None) -> str:
    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return client.create_experiment(name, artifact_location=artifact_folder, tags=TRAINING_KIND)
        except MlflowException:
            found = client.get_experiment_by_name(name)  # another job may have made it meanwhile
            if found is None:
                raise
    return found.experiment_id


def _describe(
    client: MlflowClient, stored: StoredRun, params: Mapping[str, Any], tags: Mapping[str, str]
) -> None:
    """Write params and tags; params that do not fit are cut, and all go whole into ``params.json``."""
    values = {key: str(value) for key, value in params.items()}
    known = stored.data.params
    new = [Param(key, value[:MAX_PARAM_CHARS]) for key, value in values.items() if key not in known]
    changed = {
        f"resumed.{key}": value
        for key, value in values.items()
        if key in known and known[key] != value[:MAX_PARAM_CHARS]
    }
    for start in range(0, len(new), MAX_BATCH_PARAMS):
        client.log_batch(stored.info.run_id, params=new[start : start + MAX_BATCH_PARAMS], synchronous=True)
    for key, value in {**tags, **changed}.items():
        client.set_tag(stored.info.run_id, key, public(value))
    if any(len(value) > MAX_PARAM_CHARS for value in values.values()):
        client.log_text(stored.info.run_id, json.dumps(values, indent=1), "params.json")


class _SystemSampler:
    """MLflow's system metrics as points of our own queue: its own thread stops at the first lost call."""

    def __init__(self, run_id: str, uri: str, last_step: Mapping[str, int]) -> None:
        self._monitor = SystemMetricsMonitor(run_id, tracking_uri=uri)
        taken = [step + 1 for key, step in last_step.items() if key.startswith("system/")]
        self._steps = itertools.count(max(taken, default=0))  # samples before this one, over all restarts
        self._monitor.collect_metrics()  # CPU use is measured since the sample before; the first is void
        self._clear()

    def due(self) -> list[Metric]:
        """The points of one sample when it is time for one, else none."""
        if time.monotonic() < self._due_s:
            return []
        self._monitor.collect_metrics()
        values = self._monitor.aggregate_metrics()
        self._clear()
        now_ms, step = int(time.time() * 1000), next(self._steps)
        return [Metric(f"system/{key}", value, now_ms, step) for key, value in values.items()]

    def _clear(self) -> None:
        for monitor in self._monitor.monitors:
            monitor.clear_metrics()
        self._due_s = time.monotonic() + self._monitor.sampling_interval
