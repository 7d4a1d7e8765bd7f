"""System metrics of every node: CPU, memory, disk, network and GPUs, as MLflow measures them.

Local rank 0 of each node samples into a file of its own in the run folder, which all nodes share; rank 0
reads them all and logs them. MLflow's own thread would need the server from every node.
"""

import json
import logging
import threading
import time
from pathlib import Path

from mlflow.environment_variables import MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL
from mlflow.system_metrics.metrics.base_metrics_monitor import BaseMetricsMonitor
from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor
from mlflow.system_metrics.metrics.rocm_monitor import ROCMMonitor

from trainer.journal import Entry

logger = logging.getLogger(__name__)

SAMPLE_EVERY_S = 10.0  # unless MLflow's variable says otherwise
READ_EVERY_S = 1.0
MAX_FILE_BYTES = 4 << 20  # then the file begins anew; rank 0 has read it long since


def sample_into(file: Path) -> None:
    """Sample this node into ``file``, a line of JSON each, in a thread, until the process ends."""
    threading.Thread(target=_sample, args=(file,), name="system metrics", daemon=True).start()


def _sample(file: Path) -> None:
    try:
        monitors = [CPUMonitor(), DiskMonitor(), NetworkMonitor(), *_gpus()]
        for each in monitors:
            each.collect_metrics()  # CPU use is measured since the sample before; the first is void
        while True:
            for each in monitors:
                each.clear_metrics()
            time.sleep(MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL.get() or SAMPLE_EVERY_S)
            values: dict[str, float] = {}
            for each in monitors:
                each.collect_metrics()
                values |= each.aggregate_metrics()
            full = file.is_file() and file.stat().st_size > MAX_FILE_BYTES
            file.parent.mkdir(parents=True, exist_ok=True)
            with file.open("w" if full else "a", encoding="utf-8") as lines:
                lines.write(json.dumps({"at": int(time.time() * 1000), "values": values}) + "\n")
    except Exception as error:  # it reads drivers of all kinds, and writes to any disk; not worth a run
        logger.warning("no more system metrics of this node: %s", error)


def _gpus() -> list[BaseMetricsMonitor]:
    for monitor in (GPUMonitor, ROCMMonitor):
        try:
            return [monitor()]
        except Exception:  # no such devices, or no such driver
            continue
    return []


class NodeSamples:
    """What the nodes have sampled since the last call, as entries of a run's journal."""

    def __init__(self, folder: Path, alone: bool) -> None:
        """Forget what jobs before left in ``folder``.

        Args:
            folder: where the nodes' files are, each named by its node.
            alone: there is one node; its metrics need no name.
        """
        for file in folder.glob("*.jsonl"):
            file.unlink()
        self._folder, self._alone = folder, alone
        self._read: dict[str, int] = {}  # bytes, by file
        self._due_s = 0.0

    def __call__(self) -> list[Entry]:
        """Return the entries; their step counts on from that which the journal holds."""
        if time.monotonic() < self._due_s:
            return []
        self._due_s = time.monotonic() + READ_EVERY_S
        return [entry for file in sorted(self._folder.glob("*.jsonl")) for entry in self._new(file)]

    def _new(self, file: Path) -> list[Entry]:
        before = self._read.get(file.name, 0)
        if file.stat().st_size < before:
            before = 0
        with file.open("rb") as lines:
            lines.seek(before)
            data = lines.read()
        whole = data[: data.rfind(b"\n") + 1]
        self._read[file.name] = before + len(whole)
        prefix = "system/" if self._alone else f"system/{file.stem}/"
        return [
            {
                "kind": "metrics",
                "run": "",
                "at": sample["at"],
                "step": None,
                "values": {f"{prefix}{key}": value for key, value in sample["values"].items()},
            }
            for sample in map(json.loads, whole.splitlines())
        ]
