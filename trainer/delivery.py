"""From the journal into MLflow.

Whatever is delivered may be delivered again, after an answer that was lost or a process that was killed:
people see it once. MLflow stores a point of the same key, step, time and value once, and so it is with params
and tags. A run is made with a tag that holds a made-up key and is searched by it first; should two exist
(an answer came after all), the oldest stays.

MLflow's own asynchronous logging is not used: it drops a batch after one failure, grows without bound and
waits at exit for as long as a dead server lets it.
"""

import json
import logging
import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import takewhile
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, LifecycleStage, Metric, Param, RunTag
from mlflow.entities import Run as StoredRun
from mlflow.exceptions import MlflowException

from configs.public import public
from trainer.journal import FILES, MAIN, Entry, Journal, Position, lane_of
from trainer.tracking_store import TRAINING_KIND, page

logger = logging.getLogger(__name__)

SETTLE_S = 2.0  # after a group is made: who else makes it now is seen by then
READ_LINES = 200
MAX_WINDOWS = 50  # of one lane in a row
MAX_BATCH_POINTS, MAX_BATCH_PARAMS, MAX_PARAM_CHARS = 1000, 100, 6000  # MLflow's limits
MAX_DIGEST_CHARS = 36
MAX_TAG_CHARS = 5000
REFUSED = (400, 413, 415, 422)  # HTTP: malformed, too large, of no such kind, makes no sense

KEY_TAG, PATH_TAG, MADE_BY_TAG = "distil.key", "distil.path", "distil.made_by"
PARENT_TAG, NOTE_TAG = "mlflow.parentRunId", "mlflow.note.content"


class Delivery:
    """What delivers one journal, in the process that holds its lock."""

    def __init__(
        self,
        journal: Journal,
        uri: str | None = None,
        opened: Callable[[dict[str, str]], object] = lambda ids: None,
        drop_missing: bool = False,
    ) -> None:
        """Nothing is delivered yet.

        Args:
            journal: what is to be delivered.
            uri: of the store; not given: where the journal says.
            opened: told the MLflow run ids, by the journal's names, once a run is open.
            drop_missing: leave out what goes to runs that the store does not hold any more.
        """
        self._drop_missing = drop_missing
        self._journal, self._uri, self._opened = journal, uri, opened
        self._client: MlflowClient | None = None
        self._gone: set[str] = set()  # MLflow runs that somebody has deleted

    def deliver(self) -> None:
        """Deliver all that the journal holds, what is refused for good left out with a warning.

        Raises:
            Exception: what keeps the store from taking more; what was delivered is behind the cursor.
        """
        while any([self._deliver_some(lane) for lane in (MAIN, FILES)]):
            pass

    def _deliver_some(self, lane: str) -> bool:
        """Deliver of one lane what is there, up to a bound: the other is not to wait for ever."""
        for windows in range(MAX_WINDOWS):
            lines = self._journal.read(lane, READ_LINES)
            if not lines:
                return windows > 0
            window = list(takewhile(partial(_passes, lane), lines)) or lines[:1]
            self._send([entry for entry, _ in window if lane_of(entry) == lane])
            self._journal.advance(lane, window[-1][1])
        return True

    def _send(self, entries: list[Entry]) -> None:
        points: dict[str, list[Metric]] = {}
        again: dict[str, int] = {}
        for entry in entries:
            run = entry.get("run", "")
            if entry["kind"] == "metrics":
                points.setdefault(run, []).extend(_points(entry, self._runs[run], again.get(run)))
            elif entry["kind"] == "again":
                again[run] = min(entry["step"], again.get(run, entry["step"]))
            elif entry["kind"] != "header":
                self._send_one(entry)
        for run, new in points.items():
            for start in range(0, len(new), MAX_BATCH_POINTS):
                self._send_batch(self._runs[run]["id"], new[start : start + MAX_BATCH_POINTS])
        for run, step in again.items():  # only now: whatever is sent twice is to be the same
            self._runs[run]["again"] = min(step, self._runs[run].get("again", step))

    def _send_batch(self, run_id: str, batch: Sequence[Metric | Param | RunTag]) -> None:
        """Send it; of a batch that is refused, all but the things that are."""
        metrics = [own for own in batch if isinstance(own, Metric)]
        params = [own for own in batch if isinstance(own, Param)]
        tags = [own for own in batch if isinstance(own, RunTag)]
        try:
            self._store(None).log_batch(run_id, metrics, params, tags, synchronous=True)
        except MlflowException as error:
            if not _is_refusal(error):
                raise
            if self._is_gone(run_id):
                return
            if len(batch) > 1:
                half = len(batch) // 2
                self._send_batch(run_id, batch[:half])
                self._send_batch(run_id, batch[half:])
                return
            _tell_refused(f"{type(batch[0]).__name__.lower()} {batch[0].key}", error)

    def _send_one(self, entry: Entry) -> None:
        if entry["kind"] == "open":
            self._open(entry)  # never left out: all that follows needs it
            return
        run_id = self._runs[entry["run"]]["id"]
        try:
            self._send_other(entry, run_id)
        except Exception as error:
            if not _is_refusal(error):
                raise
            if not self._is_gone(run_id):
                _tell_refused(f"{entry['kind']} {entry.get('path') or entry.get('key') or ''}", error)

    def _send_other(self, entry: Entry, run_id: str) -> None:
        client = self._store(None)
        match entry["kind"]:
            case "tag":
                client.set_tag(run_id, entry["key"], entry["value"])
            case "text":
                client.log_text(run_id, entry["text"], entry["path"])
            case "artifacts":
                folder = self._journal.folder / entry["folder"]
                if not folder.is_dir():
                    raise FileNotFoundError(f"{folder} is gone")
                client.log_artifacts(run_id, str(folder), entry["path"])
            case "dataset":
                dataset = Dataset(
                    name=entry["name"],
                    digest=entry["fingerprint"][:MAX_DIGEST_CHARS],
                    source_type="corpus",
                    source=json.dumps({"uri": entry["source"]}),
                    profile=json.dumps(entry["profile"]),
                )
                context = InputTag("mlflow.data.context", "training")
                client.log_inputs(run_id, [DatasetInput(dataset, [context])])
                client.set_tag(run_id, entry["tag"], entry["fingerprint"])
            case "status":
                client.set_terminated(run_id, entry["status"], end_time=entry["at"])
                self._close(entry)

    # Runs and groups

    def _open(self, entry: Entry) -> None:
        """Make the run, or go on with it, and describe it; its groups are running."""
        client, state, runs = self._store(entry), self._journal.state, self._runs
        known = runs.get(entry["run"], {"id": entry["run_id"]})  # else made before this journal was begun
        run_id = known["id"]
        gone = run_id is not None and self._is_gone(run_id)  # asked before a wrong store is written to
        experiment_id = _experiment_id(client, entry["experiment"], entry["artifact_folder"])
        state |= {"uri": entry["uri"], "experiment_id": experiment_id}
        about = {key: entry[key] for key in ("key", "name", "under", "user")}
        groups = self._groups(about)
        parent = runs[entry["parent"]]["id"] if entry["parent"] is not None else entry["parent_run_id"]
        tags = {**entry["tags"], "mlflow.user": entry["user"], KEY_TAG: entry["key"]}
        if groups or parent is not None:
            tags[PARENT_TAG] = groups[-1] if groups else parent
        if run_id is None:
            found = self._find(KEY_TAG, entry["key"])
            made = found[0] if found else client.create_run(experiment_id, entry["at"], tags, entry["name"])
            run_id = made.info.run_id
        elif "floor" not in known and not gone:
            stored = client.get_run(run_id).data.to_proto().metrics
            known = {**known, "floor": {own.key: own.step for own in stored}}
        runs[entry["run"]] = {"floor": {}, **known, **about, "id": run_id}
        self._journal.save()
        if gone:
            return
        for each in (run_id, *groups):
            client.update_run(each, status="RUNNING")
        described = _description(client.get_run(run_id), entry["params"], tags)
        for start in range(0, len(described), MAX_BATCH_PARAMS):
            self._send_batch(run_id, described[start : start + MAX_BATCH_PARAMS])
        self._opened({name: own["id"] for name, own in runs.items()})
        if entry["parent"] is None:
            logger.info("in MLflow: %s", page(state["uri"], experiment_id, run_id))

    def _is_gone(self, run_id: str) -> bool:
        """Whether somebody has deleted a run: what is logged to it is left out, and said once.

        Raises:
            LookupError: the store does not hold it: it may be another one, or have lost its data.
        """
        client = self._store(None)
        try:
            gone = client.get_run(run_id).info.lifecycle_stage == LifecycleStage.DELETED
        except MlflowException as error:
            if not _is_unknown(error):
                raise
            gone = self._drop_missing or run_id in self._gone
            if not gone:
                raise LookupError(
                    f"{public(client.tracking_uri)} does not hold MLflow run {run_id}. What is left for it "
                    f"is kept. For another server: python launcher/track.py sync --uri URI "
                    f"{self._journal.folder}; if the run is gone for good, give that up: sync --drop-missing"
                ) from error
        if gone and run_id not in self._gone:
            self._gone.add(run_id)
            logger.warning("MLflow run %s is deleted: what is logged to it is left out", run_id)
        return gone

    def _close(self, entry: Entry) -> None:
        """Take away what came twice after all, and tell the run's groups how it ended."""
        client, about = self._store(None), self._runs[entry["run"]]
        for other in self._find(KEY_TAG, about["key"]):
            if other.info.run_id != about["id"]:
                client.delete_run(other.info.run_id)
        groups = self._groups(about)
        if groups:
            client.set_tag(about["id"], PARENT_TAG, groups[-1])
        child, outcome = about["name"], entry["outcome"] or entry["status"].lower()
        for group, name in zip(reversed(groups), reversed(about["under"]), strict=True):
            client.set_tag(group, f"outcome.{tag_name(child)}", outcome[:MAX_TAG_CHARS])
            told = client.get_run(group).data.tags
            lines = [f"- **{key[8:]}**: {own}" for key, own in sorted(told.items()) if key[:8] == "outcome."]
            client.set_tag(group, NOTE_TAG, "\n".join(lines)[:MAX_TAG_CHARS])
            client.set_terminated(group, entry["status"], end_time=entry["at"])
            child, outcome = name, f"{child}: {outcome}"

    def _groups(self, about: Mapping[str, Any]) -> list[str]:
        """Ids of the groups that a run is under, outermost first; those that are not there are made."""
        ids: list[str] = []
        for depth in range(1, len(about["under"]) + 1):
            ids.append(self._group(about, depth, ids[-1] if ids else None))
        return ids

    def _group(self, about: Mapping[str, Any], depth: int, parent: str | None) -> str:
        """Find a group by its path, or make it. Where two jobs make one at a time, the oldest stays.

        Each looks again a moment after, and once more when its run ends: by then they see the same.
        """
        client, path = self._store(None), " / ".join(about["under"][:depth])
        found = self._find(PATH_TAG, path)
        if not found:
            tags = {"mlflow.user": about["user"], PATH_TAG: path, MADE_BY_TAG: about["key"]}
            tags["stage"] = "pipeline" if depth == 1 else "group"
            if parent is not None:
                tags[PARENT_TAG] = parent
            name = about["under"][depth - 1]
            client.create_run(self._journal.state["experiment_id"], tags=tags, run_name=name)
            time.sleep(SETTLE_S)
            found = self._find(PATH_TAG, path)
        for other in found[1:]:
            if other.data.tags.get(MADE_BY_TAG) == about["key"]:
                client.delete_run(other.info.run_id)
        return str(found[0].info.run_id)

    def _find(self, tag: str, value: str) -> list[StoredRun]:
        """Runs with this tag, the oldest first."""
        where = f"tags.`{tag}` = '{value}'"
        found = self._store(None).search_runs([self._journal.state["experiment_id"]], where)
        return sorted(found, key=lambda run: (run.info.start_time, run.info.run_id))

    @property
    def _runs(self) -> dict[str, dict[str, Any]]:
        """What is known of every run of the journal, by its name there."""
        runs: dict[str, dict[str, Any]] = self._journal.state.setdefault("runs", {})
        return runs

    def _store(self, opening: Entry | None) -> MlflowClient:
        if self._client is None:
            told = opening["uri"] if opening is not None else self._journal.state["uri"]
            self._client = MlflowClient(self._uri or told)
        return self._client


def _points(entry: Entry, run: Mapping[str, Any], again: int | None) -> list[Metric]:
    """What is new to the store of an entry: it held points up to ``floor`` when the journal was begun.

    Points after the step ``again`` are others than it holds. A count of our own goes on from the store's.
    """
    floor: dict[str, int] = run["floor"]
    if entry.get("counted"):
        steps = {key: entry["step"] + 1 + floor.get(key, -1) for key in entry["values"]}
    else:
        last = min(own for own in (again, run.get("again"), math.inf) if own is not None)
        steps = {key: entry["step"] for key in entry["values"]}
        steps = {key: own for key, own in steps.items() if own > min(last, floor.get(key, own - 1))}
    return [Metric(key, entry["values"][key], entry["at"], step) for key, step in steps.items()]


def tag_name(text: str) -> str:
    """Return ``text`` with only what MLflow allows in names of tags, params and metrics."""
    return re.sub(r"[^\w.\- :/]", "_", text)


def _passes(lane: str, line: tuple[Entry, Position]) -> bool:
    """Whether a line can be sent with those beside it: metrics, and what is not for this lane."""
    entry = line[0]
    return entry["kind"] in ("metrics", "header", "again") or lane_of(entry) != lane


def _tell_refused(what: str, error: Exception) -> None:
    logger.warning("MLflow refuses %s for good, it is left out: %s", what.strip(), public(str(error)))


def _is_refusal(error: Exception) -> bool:
    """Whether an entry will never be taken. What a password or a permission can mend is none."""
    if isinstance(error, MlflowException):
        return _is_unknown(error) or error.get_http_status_code() in REFUSED
    response = getattr(error, "response", None)  # of an upload through the server
    return isinstance(error, FileNotFoundError) or getattr(response, "status_code", None) in REFUSED


def _is_unknown(error: MlflowException) -> bool:
    """Whether the store does not hold what was asked for."""
    return bool(error.error_code == "RESOURCE_DOES_NOT_EXIST")


def _experiment_id(client: MlflowClient, name: str, artifacts: str | None) -> str:
    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return client.create_experiment(name, artifact_location=artifacts, tags=TRAINING_KIND)
        except MlflowException:
            found = client.get_experiment_by_name(name)  # another job may have made it meanwhile
            if found is None:
                raise
    return found.experiment_id


def _description(
    stored: StoredRun, params: Mapping[str, str], tags: Mapping[str, str]
) -> list[Param | RunTag]:
    """What a run is not told yet; params that do not fit are cut. Those of a run cannot change: the new
    value becomes the tag ``resumed.<key>``."""
    known = stored.data.params
    new = [Param(key, value[:MAX_PARAM_CHARS]) for key, value in params.items() if key not in known]
    changed = {
        f"resumed.{key}": value[:MAX_TAG_CHARS]
        for key, value in params.items()
        if key in known and known[key] != value[:MAX_PARAM_CHARS]
    }
    return [*new, *(RunTag(key, value) for key, value in {**tags, **changed}.items())]
