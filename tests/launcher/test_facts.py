"""What must be equal on all ranks, against other tools; ranks that differ: ``test_hosts.py``."""

import importlib.metadata
import subprocess
from pathlib import Path
from typing import Any

from configs.load import from_dict
from configs.schema import RunConfig
from launcher.facts import DIGITS, ROOMS, facts
from sharding.corpora import open_corpora
from sharding.manifest import read_manifest

ROOT = Path(__file__).resolve().parents[2]


def test_what_must_be_equal_on_all_ranks(
    run_config: dict[str, Any], tiny_corpus: Path, tiny_teacher: Path
) -> None:
    """Every tracked source file, by the digest that sha256sum prints; settings without secrets."""
    run_config["tracking"] = {"uri": "http://me:password1@server:5000"}
    run_config["data"]["cache"] = {"folder": "/local/disk"}
    config = from_dict(RunConfig, run_config)
    found = facts(config, open_corpora(config.data))
    files = [path for room in ROOMS for path in (ROOT / room).rglob("*.py")]
    summed = subprocess.run(["sha256sum", *files], capture_output=True, text=True, check=True).stdout
    for line in summed.splitlines():
        digest, path = line.split()
        assert found[f"code {Path(path).relative_to(ROOT)}"] == digest[:DIGITS]
    assert found["torch"] == importlib.metadata.version("torch")
    assert found["config train.global_batch_rows"] == "24" and found["config students.0.layers"] == "2"
    assert found["config tracking.uri"] == "http://server:5000"
    assert not [name for name in found if name.startswith("config data.cache")]
    assert found["corpus tiny fingerprint"] == read_manifest(tiny_corpus).fingerprint[:DIGITS]
    size = (tiny_teacher / "model.safetensors").stat().st_size
    assert found["teacher weights"] == f"{size} bytes"
