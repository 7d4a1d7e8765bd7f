"""A tracking store before it is used: whether it can be, where it keeps files, where people see it."""

import socket
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from mlflow import MlflowClient
from mlflow.entities import LifecycleStage
from mlflow.exceptions import InvalidUrlException, MlflowException
from mlflow.store.db.db_types import DATABASE_ENGINES
from mlflow.utils.credentials import get_default_host_creds
from mlflow.utils.rest_utils import http_request, verify_rest_response

from configs.public import public

REACH_S = 5.0  # how long a store may take to answer at the start
KIND_TAG = "mlflow.experimentKind"
TRAINING_KIND = {KIND_TAG: "custom_model_development"}  # not GenAI


class TrackingError(ValueError):
    """The tracking store refuses what is configured; the message says what happened and the way out."""


def unusable(uri: str, happened: object) -> TrackingError:
    """Return the error that says so."""
    return TrackingError(
        f"tracking.uri={public(uri)} cannot be used: {public(str(happened))}. Correct the URI, "
        "credentials or tracking.experiment; or track into a local file "
        "(tracking.uri=sqlite:////path/to/mlflow.db), or not at all (tracking.enabled=false)"
    )


def check(uri: str, experiment: str, run_id: str | None) -> str | None:
    """Ask a store whether it can be used; return what keeps it from answering, None when it answers.

    Raises:
        TrackingError: it refuses: no such store, no permission, a file that cannot be written, an experiment
            or run that is deleted. It says so within ``REACH_S`` a question.
    """
    try:
        if urlsplit(uri).scheme in ("http", "https"):
            stage = _ask_server(uri, experiment, run_id)
        else:
            _reach(uri)
            client = MlflowClient(uri)
            known = client.get_experiment_by_name(experiment)
            stage = known.lifecycle_stage if known is not None else None
            if run_id is not None:
                stage = client.get_run(run_id).info.lifecycle_stage
    except Exception as error:  # every store and driver fails in its own way
        if _may_heal(error):
            return public(str(error))
        raise unusable(uri, error) from error
    if stage == LifecycleStage.DELETED:
        what = f"run {run_id}" if run_id is not None else f"experiment {experiment}"
        raise unusable(uri, f"{what} is deleted; restore it in MLflow, or choose another")
    return None


def page(uri: str, experiment_id: str, run_id: str) -> str:
    """Return where a person looks at a run: its page on the server, or the command that shows the store."""
    uri = public(uri)
    if uri.startswith("http"):
        path = f"/#/experiments/{experiment_id}/runs/{run_id}"
        return f"{uri.rstrip('/')}{path}?workflowType=machine_learning"  # else MLflow 3 opens on GenAI
    return f"make ui STORE={uri}"


def _may_heal(error: Exception) -> bool:
    """Whether a store may answer later, as it is configured."""
    if isinstance(error, InvalidUrlException):
        return False
    if isinstance(error, MlflowException):
        status = error.get_http_status_code()
        return status in (408, 429) or status >= 500
    if isinstance(error, sqlite3.OperationalError):
        return "locked" in str(error)
    return isinstance(error, ConnectionError | TimeoutError | socket.gaierror)


def _ask_server(uri: str, experiment: str, run_id: str | None) -> str | None:
    """Return the life-cycle stage of a run, else of the experiment; None if the server does not have it yet.

    An experiment that is there is sent a tag that it has: who may only read is refused now.
    """
    if run_id is not None:
        return str(_ask(uri, "GET", "runs/get", run_id=run_id)["run"]["info"]["lifecycle_stage"])
    try:
        found = _ask(uri, "GET", "experiments/get-by-name", experiment_name=experiment)["experiment"]
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return None
        raise
    if found["lifecycle_stage"] == LifecycleStage.ACTIVE:
        tags = TRAINING_KIND | {tag["key"]: tag["value"] for tag in found.get("tags", [])}
        about = {"experiment_id": found["experiment_id"], "key": KIND_TAG, "value": tags[KIND_TAG]}
        _ask(uri, "POST", "experiments/set-experiment-tag", **about)
    return str(found["lifecycle_stage"])


def _ask(uri: str, method: str, what: str, **question: str) -> dict[str, Any]:
    """The answer of a server to one question; an ``MlflowClient`` cannot be told to give up early."""
    endpoint = f"/api/2.0/mlflow/{what}"
    response = http_request(
        get_default_host_creds(uri),
        endpoint,
        method,
        max_retries=0,
        timeout=REACH_S,
        raise_on_status=False,
        **{"params" if method == "GET" else "json": question},
    )
    return dict(verify_rest_response(response, endpoint).json())


def _reach(uri: str) -> None:
    """Raise unless the host, or the SQLite file, behind ``uri`` answers within ``REACH_S``.

    MLflow would retry a database that it cannot open for a minute and a half.
    """
    parts = urlsplit(uri)
    if parts.scheme == "sqlite":
        file = Path(parts.path.removeprefix("/"))
        file.parent.mkdir(parents=True, exist_ok=True)
        with closing(sqlite3.connect(file, timeout=REACH_S)) as connection:
            connection.execute("BEGIN IMMEDIATE")  # fails now if this is no database or cannot be written
    elif parts.scheme.partition("+")[0] in DATABASE_ENGINES and parts.hostname and parts.port:
        socket.create_connection((parts.hostname, parts.port), timeout=REACH_S).close()


def artifact_folder(uri: str, default_folder: Path) -> str | None:
    """Return where a store that is no server keeps artifacts; MLflow's own default is the working folder."""
    parts = urlsplit(uri)
    if parts.scheme in ("http", "https") or parts.scheme.startswith("databricks"):
        return None
    folder = Path(parts.path.removeprefix("/")).parent if parts.scheme == "sqlite" else default_folder
    return (folder.resolve() / "artifacts").as_uri()
