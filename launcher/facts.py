"""What must be equal on all ranks, so that they are one run: code, versions, settings, data, teacher."""

import hashlib
from pathlib import Path
from typing import Any

from configs.load import to_dict
from configs.public import public
from configs.schema import RunConfig
from launcher import provenance
from sharding.corpora import Corpora
from sharding.files import sha256
from trainer import encoders

ROOMS = ("configs", "sharding", "trainer", "launcher")
OF_A_HOST = ("data.cache.", "teacher.offload_folder", "train.threads")
"""Settings that may differ from host to host."""
DIGITS = 12
"""Of a digest; enough to tell two from each other."""


def facts(config: RunConfig, corpora: Corpora) -> dict[str, str]:
    """Return what must be equal on all ranks, by name: code, versions, settings, corpora, teacher.

    The code is told by its files, so that what differs is named, and uncommitted changes count.
    """
    root = Path(__file__).resolve().parents[1]
    sources = sorted(path for room in ROOMS for path in (root / room).rglob("*.py"))
    found = {f"code {path.relative_to(root)}": sha256(path)[:DIGITS] for path in sources}
    found |= provenance.versions()
    settings = _flat(to_dict(config))
    found |= {
        f"config {key}": public(text) for key, text in settings.items() if not key.startswith(OF_A_HOST)
    }
    found |= {f"corpus {part.name} fingerprint": part.corpus.fingerprint[:DIGITS] for part in corpora.parts}
    shape = encoders.load_teacher_config(config.teacher).to_json_string()
    found["teacher config"] = hashlib.sha256(shape.encode()).hexdigest()[:DIGITS]
    weights = Path(config.teacher.model).glob("*.safetensors")  # none: a name on the hub
    found["teacher weights"] = f"{sum(path.stat().st_size for path in weights)} bytes"
    return found


def _flat(tree: Any, key: str = "") -> dict[str, str]:
    """Return the leaves of a tree by their dotted keys."""
    if not isinstance(tree, dict | list):
        return {key: str(tree)}
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    return {
        leaf: text for name, item in items for leaf, text in _flat(item, f"{key}.{name}".lstrip(".")).items()
    }
