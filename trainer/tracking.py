"""Tracking as a job sees it: runs that are opened, logged to and finished. ``trainer.delivery`` knows MLflow.

Opening a run is strict about what the store refuses: that is a ``TrackingError`` within seconds, before
anything is trained. A store that is down is a warning. From then on nothing here raises or waits: all that is
logged is an entry of a journal on disk (``trainer.journal``), and is delivered from there.
"""

import getpass
import json
import logging
import os
import re
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit, urlunsplit

from configs.public import public
from trainer.delivery import MAX_PARAM_CHARS, Delivery
from trainer.journal import Entry, Journal
from trainer.outbox import Outbox
from trainer.tracking_store import artifact_folder, check, page, unusable

logger = logging.getLogger(__name__)

MLFLOW_DEFAULTS = {
    # One call, without these, retries a dead server for four minutes. The outbox does its own retrying.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # which it would for every run that ends
}
UNDELIVERED = "undelivered"  # folder of the journals of runs that have no folder
MAX_KEY_CHARS = 250  # MLflow's limit


def resolve_uri(uri: str | None, default_folder: Path) -> str:
    """URI of the store: ``uri``, else ``MLFLOW_TRACKING_URI``, else SQLite in ``default_folder`` (made)."""
    uri = uri or os.environ.get("MLFLOW_TRACKING_URI")
    if uri:
        return uri
    try:
        default_folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unusable(str(default_folder), error) from error
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
    """One run, for one rank: ``start`` or ``child`` opens it, ``finish`` closes it."""

    def __init__(self, name: str, uri: str, outbox: Outbox, description: str, passing: bool) -> None:
        self.uri = uri
        self._name = name  # within the journal: "" is the job itself
        self._outbox = outbox
        self._description = description
        self._passing = passing  # its journal goes once it is delivered

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
        under: Sequence[str] = (),
        params: Mapping[str, Any],
        tags: Mapping[str, str],
        description: str = "",
        journal: Path | None = None,
        opened: Callable[[dict[str, str]], object] = lambda ids: None,
        sample: Callable[[], list[Entry]] = list,
    ) -> "Run":
        """Open a new run, or go on with the one that the journal, or ``run_id``, tells of.

        Args:
            uri: The store, see ``resolve_uri``.
            default_folder: Holds the SQLite store when nothing else is set, and the artifacts of any store
                that is no server (those of an SQLite store lie in ``artifacts`` beside its file).
            run_id: Of a run that was made before the journal was begun.
            parent_run_id: The run hangs under it, unless ``under`` says more.
            under: Names of the groups that it hangs under, outermost first.
            params: Flat and resolved (``flatten``). A param of a continued run cannot change in MLflow;
                a new value becomes the tag ``resumed.<key>``.
            tags: Further tags; MLflow's own names (``mlflow.source.git.commit``) are welcome.
            description: What the run is, in Markdown.
            journal: Folder of the journal; not given: one in ``default_folder`` for this run alone, which
                goes once all is delivered.
            opened: Told, by a thread, the MLflow ids of the journal's runs by name, ``""`` being this one.
            sample: Asked for further entries every second, by a thread; see ``trainer.system_metrics``.

        Raises:
            TrackingError: The store refuses, or does not hold ``run_id``.
        """
        uri = credentials_apart(resolve_uri(uri, default_folder))
        silent = check(uri, experiment, run_id)
        kept = Journal(journal) if journal is not None else _journal_alone(default_folder)
        if silent is not None:
            _tell_silent(uri, silent, kept.folder)
        outbox = Outbox(kept, Delivery(kept, uri, opened).deliver, sample)
        run = cls("", uri, outbox, description, passing=journal is None)
        run._open(
            uri=public(uri),
            experiment=experiment,
            artifact_folder=artifact_folder(uri, default_folder),
            name=public(name),
            run_id=run_id,
            parent=None,
            parent_run_id=parent_run_id,
            under=list(under),
            params=params,
            tags=tags,
        )
        return run

    def child(
        self,
        name: str,
        *,
        run_id: str | None = None,
        params: Mapping[str, Any],
        tags: Mapping[str, str],
    ) -> "Run":
        """Open, or go on with, a run under this one, in the same journal; ``finish`` it first."""
        child = Run(name, self.uri, self._outbox, "", passing=False)
        about = {**self._opening, "name": name, "run_id": run_id, "parent": self._name, "under": []}
        child._open(**{**about, "params": params, "tags": tags})
        return child

    def _open(self, **about: Any) -> None:
        self._opening = about
        params = {key: str(value) for key, value in about["params"].items()}
        tags = {"mlflow.source.type": "LOCAL", **{key: public(own) for key, own in about["tags"].items()}}
        if self._description:
            tags["mlflow.note.content"] = public(self._description)
        self._put("open", **{**about, "params": params, "tags": tags, "user": _user()})
        if any(len(value) > MAX_PARAM_CHARS for value in params.values()):
            self.log_text(json.dumps(params, indent=1), "params.json")

    def _put(self, kind: str, **facts: Any) -> None:
        self._outbox.put({"kind": kind, "run": self._name, "at": int(time.time() * 1000), **facts})

    @property
    def id(self) -> str | None:
        """Id of the MLflow run, once it is open."""
        about = self._outbox.journal.state.get("runs", {}).get(self._name)
        return about and str(about["id"])

    def opened(self, wait_s: float = 30.0) -> str:
        """Return the id of the MLflow run, which this waits for.

        Raises:
            TrackingError: the store did not open it in time.
        """
        until_s = time.monotonic() + wait_s
        while self.id is None:
            if time.monotonic() > until_s:
                raise unusable(self.uri, f"the run was not open after {wait_s:.0f} s")
            time.sleep(0.05)
        return self.id

    @property
    def url(self) -> str:
        """Where a person looks at the run, as far as it is known by now."""
        state = self._outbox.journal.state
        return page(self.uri, state["experiment_id"], self.id) if self.id is not None else public(self.uri)

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Log one point per metric; ``step`` counts completed optimizer steps. Never waits, never raises.

        Points at or before the highest step that the run has logged are dropped, see ``log_again``.
        """
        self._put("metrics", step=step, values={key: float(value) for key, value in metrics.items()})

    def flush(self, wait_s: float = 10.0) -> bool:
        """Wait until all that was logged is in the journal; False if the disk did not take it in time.

        For who saves a checkpoint, before it counts: a job that goes on from it logs nothing of the steps
        before. Not for the thread that trains.
        """
        return self._outbox.flush(wait_s)

    def log_again(self, step: int) -> None:
        """Take points after ``step`` once more: the run went back there, and goes another way."""
        self._put("again", step=step)

    def log_dataset(
        self,
        name: str,
        fingerprint: str,
        source: str,
        profile: Mapping[str, int],
        tag: str = "corpus.fingerprint",
    ) -> None:
        """Log a corpus as an MLflow dataset of the run.

        Args:
            fingerprint: Digest of the manifest. MLflow keeps 36 characters of a digest, ``tag`` the whole.
            source: Where the corpus lies.
            profile: Counts, such as rows and tokens.
            tag: One of several corpora has a tag of its own.
        """
        about = {"name": name, "fingerprint": fingerprint, "source": public(source), "tag": tag}
        self._put("dataset", **about, profile=dict(profile))

    def log_text(self, text: str, path: str) -> None:
        """Log a text, without secrets, as the artifact ``path``."""
        self._put("text", text=public(text), path=path)

    def log_artifacts(self, folder: Path, path: str) -> None:
        """Log the files of ``folder`` as artifacts under ``path``; leave them in place until delivered."""
        where = os.path.relpath(folder.resolve(), self._outbox.journal.folder.resolve())
        self._put("artifacts", folder=where, path=path)

    def set_tag(self, key: str, value: str) -> None:
        """Log a tag."""
        self._put("tag", key=key, value=public(value))

    def fail(self, reason: str) -> None:
        """Log the status FAILED and the tag ``failed``, which says why; the run can still be logged to."""
        self.set_tag("failed", reason)
        self._put("status", status="FAILED", outcome=public(f"failed: {reason}"))

    def finish(self, status: str = "FINISHED", wait_s: float = 30.0, outcome: str = "") -> int:
        """Close the run, wait until all is delivered, and return how many entries are not.

        Gives up ``wait_s`` after the last thing that the store took, and after ten times that in all; what is
        left stays in the journal. A child's entries are delivered, and waited for, with its parent's.

        Args:
            status: FINISHED, FAILED, KILLED or SCHEDULED (it goes on later).
            wait_s: patience, in seconds.
            outcome: one line, for the description, and for the group that the run hangs under.
        """
        if outcome:
            note = "\n\n".join(part for part in (self._description, f"**Outcome:** {outcome}") if part)
            self.set_tag("mlflow.note.content", note)
        self._put("status", status=status, outcome=public(outcome))
        if self._opening["parent"] is not None:
            return 0
        left = self._outbox.close(wait_s)
        if self._passing and not left:
            self._outbox.journal.remove()
        return left


def _journal_alone(default_folder: Path) -> Journal:
    """Return a new journal for a run that has no folder."""
    try:
        return Journal(default_folder / UNDELIVERED / uuid.uuid4().hex[:12])
    except OSError:  # exporting needs to write nothing there
        return Journal(Path(tempfile.mkdtemp(prefix=UNDELIVERED)))


def _tell_silent(uri: str, why: str, folder: Path) -> None:
    logger.warning(
        "tracking.uri=%s does not answer: %s. The run starts all the same: what is logged is kept in %s and "
        "delivered once the server is back",
        public(uri),
        why,
        folder,
    )


def credentials_apart(uri: str) -> str:
    """Return a server's URI without user and password: MLflow prints it, and knows them from the environment.

    Settings of MLflow's client that were not made are made here too.
    """
    for variable, value in MLFLOW_DEFAULTS.items():
        os.environ.setdefault(variable, value)
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
