"""Tracking in MLflow: the only module that knows it.

A ``Run`` is one open MLflow run. Opening it is strict: a store that cannot be used is a ``TrackingError``
within seconds, before anything is trained. From then on nothing it does raises or waits: metrics, texts
and files are queued in memory, a thread of its own sends them, and what a server that is down did not take
is kept and sent again when it is back. A point keeps the time at which it was logged, and MLflow stores a
point of the same key, step, time and value once, so sending again never shows it twice.

MLflow's own asynchronous logging is not used: it drops a batch after one failure, grows without bound and
waits at exit for as long as a dead server lets it.
"""

import getpass
import itertools
import json
import logging
import os
import re
import socket
import sqlite3
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param
from mlflow.entities import Run as StoredRun
from mlflow.exceptions import MlflowException
from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor
from mlflow.utils.credentials import get_default_host_creds
from mlflow.utils.rest_utils import http_request

logger = logging.getLogger(__name__)

REACH_S = 5.0  # how long a host may take to answer at the start
HTTP_DEFAULTS = {
    # One call, without these, retries a dead server for four minutes. The writer does its own retrying.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
}
MAX_BUFFERED_POINTS = 100_000  # about 30 MB; the oldest are given up first
SEND_EVERY_S, MAX_PAUSE_S = 1.0, 30.0  # between two sends; longest pause between two failing ones
BATCH_POINTS, BATCH_PARAMS = 1000, 100  # limits of MLflow's log_batch
MAX_PARAM_CHARS, MAX_KEY_CHARS, MAX_DIGEST_CHARS = 6000, 250, 36  # limits of MLflow's stores


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

    Lists of plain values stay one param. Passwords inside URIs are left out.
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
    return _public(text)


def _public(text: str) -> str:
    """``text`` without the user and password that a URI in it may carry."""
    return re.sub(r"(\w://)[^/@\s]+@", r"\1", text)


class Run:
    """One open MLflow run; ``start`` opens it, ``finish`` closes it. Several may be open at once."""

    def __init__(self, client: MlflowClient, uri: str, stored: StoredRun, system_metrics: bool) -> None:
        self.id: str = stored.info.run_id
        self._client = client
        self._uri = uri
        self._experiment_id = stored.info.experiment_id
        # Last step the store holds of every metric: a resumed run trains some steps again.
        self._last_step = {metric.key: metric.step for metric in stored.data.to_proto().metrics}
        sampler = _SystemSampler(self.id, uri, self._last_step) if system_metrics else None
        self._writer = _Writer(client, self.id, sampler)

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
        uri = resolve_uri(uri, default_folder)
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
                stored = client.create_run(experiment_id, run_name=name)
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
        uri = _public(self._uri)
        if uri.startswith("http"):
            return f"{uri.rstrip('/')}/#/experiments/{self._experiment_id}/runs/{self.id}"
        return f"make ui STORE={uri}"

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Queue one point per metric; ``step`` counts completed optimizer steps. Never waits, never raises.

        Points at or before the last step that the store held when the run was continued are dropped.
        """
        now_ms = int(time.time() * 1000)
        self._writer.put(
            Metric(key, float(value), now_ms, step)
            for key, value in metrics.items()
            if key not in self._last_step or step > self._last_step[key]
        )

    def log_dataset(
        self, name: str, fingerprint: str, source: str, profile: Mapping[str, int], context: str = "training"
    ) -> None:
        """Queue a corpus as the run's MLflow dataset.

        Args:
            fingerprint: Digest of the manifest. MLflow keeps 36 characters of a digest; the tag
                ``corpus.fingerprint`` keeps the whole.
            source: Where the corpus lies.
            profile: Counts, such as rows and tokens.
        """
        dataset = Dataset(
            name=name,
            digest=fingerprint[:MAX_DIGEST_CHARS],
            source_type="corpus",
            source=json.dumps({"uri": _public(source)}),
            profile=json.dumps(dict(profile)),
        )
        entry = DatasetInput(dataset, [InputTag("mlflow.data.context", context)])

        def send() -> None:
            self._client.log_inputs(self.id, [entry])
            self._client.set_tag(self.id, "corpus.fingerprint", fingerprint)

        self._writer.call(f"dataset {name}", send)

    def log_text(self, text: str, path: str) -> None:
        """Queue a text as the artifact ``path``."""
        self._writer.call(path, lambda: self._client.log_text(self.id, text, path))

    def log_artifacts(self, folder: Path, path: str) -> None:
        """Queue the files of ``folder`` as artifacts under ``path``; leave them in place until ``finish``."""
        self._writer.call(path, lambda: self._client.log_artifacts(self.id, str(folder), path))

    def finish(self, status: str = "FINISHED", wait_s: float = 30.0) -> int:
        """Send what is queued, close the run as FINISHED, FAILED or KILLED; return the points lost.

        Gives up ``wait_s`` after the last thing that the store took, and after ten times that in all.
        """
        return self._writer.close(status, wait_s)


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user id may have no name
        return f"uid {os.getuid()}"


def _unusable(uri: str, happened: object) -> TrackingError:
    return TrackingError(
        f"tracking.uri={_public(uri)} cannot be used: {_public(str(happened))}. Start the server or correct "
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
            return client.create_experiment(name, artifact_location=artifact_folder)
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
        if known.get(key, value) != value[:MAX_PARAM_CHARS]
    }
    for start in range(0, len(new), BATCH_PARAMS):
        client.log_batch(stored.info.run_id, params=new[start : start + BATCH_PARAMS], synchronous=True)
    for key, value in {**tags, **changed}.items():
        client.set_tag(stored.info.run_id, key, _public(value))
    if any(len(value) > MAX_PARAM_CHARS for value in values.values()):
        client.log_text(stored.info.run_id, json.dumps(values, indent=1), "params.json")


class _SystemSampler:
    """MLflow's system metrics as points of our own queue: its own thread stops at the first lost call."""

    def __init__(self, run_id: str, uri: str, last_step: Mapping[str, int]) -> None:
        self._monitor = SystemMetricsMonitor(run_id, tracking_uri=uri)
        taken = [step + 1 for key, step in last_step.items() if key.startswith("system/")]
        self._steps = itertools.count(max(taken, default=0))  # samples before this one, over all restarts
        self._due_s = time.monotonic()

    def due(self) -> list[Metric]:
        """The points of one sample when it is time for one, else none."""
        if time.monotonic() < self._due_s:
            return []
        self._due_s = time.monotonic() + self._monitor.sampling_interval
        self._monitor.collect_metrics()
        values = self._monitor.aggregate_metrics()
        for monitor in self._monitor.monitors:
            monitor.clear_metrics()
        now_ms, step = int(time.time() * 1000), next(self._steps)
        return [Metric(f"system/{key}", value, now_ms, step) for key, value in values.items()]


class _Writer:
    """Two queues, of points and of calls, and the thread that empties them into the store.

    Only the thread takes from the queues, so what it is sending stays in them until the store has it.
    """

    def __init__(self, client: MlflowClient, run_id: str, sampler: _SystemSampler | None) -> None:
        self._client = client
        self._run_id = run_id
        self._sampler = sampler
        self._lock = threading.Lock()  # guards the two queues
        self._points: deque[Metric] = deque()
        self._calls: deque[tuple[str, Callable[[], object]]] = deque()
        self._lost_points = 0
        self._failures = 0  # in a row
        self._last_success_s = time.monotonic()
        self._wait_s = 0.0  # patience once closing
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._work, name=f"mlflow-{run_id[:8]}", daemon=True)
        self._thread.start()

    def put(self, points: Iterable[Metric]) -> None:
        with self._lock:
            self._points.extend(points)

    def call(self, what: str, send: Callable[[], object]) -> None:
        with self._lock:
            self._calls.append((what, send))

    def close(self, status: str, wait_s: float) -> int:
        self.call(f"status {status}", lambda: self._client.set_terminated(self._run_id, status))
        self._wait_s, self._last_success_s = wait_s, time.monotonic()
        self._closing.set()
        self._thread.join(10 * wait_s)
        with self._lock:
            lost_points = self._lost_points + len(self._points)
            unsent = ", ".join(what for what, _ in self._calls)
        if lost_points or unsent:
            self._warn(f"incomplete: {lost_points} points lost; not sent: {unsent or 'nothing else'}")
        return lost_points

    def _warn(self, text: str) -> None:
        logger.warning("MLflow run %s: %s", self._run_id, _public(text))

    def _work(self) -> None:
        while not self._closing.wait(min(SEND_EVERY_S * 2.0**self._failures, MAX_PAUSE_S)):
            self._sample()
            self._drain()
        while not self._drain() and time.monotonic() < self._last_success_s + self._wait_s:
            time.sleep(SEND_EVERY_S)

    def _sample(self) -> None:
        try:
            if self._sampler is not None:
                self.put(self._sampler.due())
        except Exception as error:  # drivers of all kinds; not worth a run
            self._warn(f"system metrics stop here: {error}")
            self._sampler = None

    def _drain(self) -> bool:
        """Send until nothing is queued (True) or something has to be sent again (False)."""
        while self._points or self._calls:
            with self._lock:
                batch = [self._points[index] for index in range(min(BATCH_POINTS, len(self._points)))]
                what, send = self._calls[0] if not batch else self._sending(batch)
            try:
                send()
                self._failures, self._last_success_s = 0, time.monotonic()
            except Exception as error:
                if not (isinstance(error, MlflowException) and error.get_http_status_code() == 400):
                    self._keep(error)
                    return False
                self._warn(f"{what} refused for good: {error}")
                self._lost_points += len(batch)
            with self._lock:
                for _ in batch:
                    self._points.popleft()
                if not batch:
                    self._calls.popleft()
        return True

    def _sending(self, batch: list[Metric]) -> tuple[str, Callable[[], object]]:
        send = partial(self._client.log_batch, self._run_id, metrics=batch, synchronous=True)
        return f"{len(batch)} points", send

    def _keep(self, error: Exception) -> None:
        """After a failure: say it once, bound the memory, let another call go first next time."""
        if self._failures == 0:
            self._warn(f"no answer; training goes on, what is logged is kept and sent again. {error}")
        self._failures += 1
        with self._lock:
            while len(self._points) > MAX_BUFFERED_POINTS:
                self._points.popleft()
                self._lost_points += 1
            self._calls.rotate(-1)
