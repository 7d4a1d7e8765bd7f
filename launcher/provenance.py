"""Where a run comes from: the command, the code's revision and its uncommitted changes, versions."""

import hashlib
import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from configs.load import to_dict
from configs.public import public
from configs.schema import RunConfig
from sharding.corpora import Corpora
from sharding.files import sha256
from trainer import encoders

PACKAGES = ("torch", "deepspeed", "transformers", "tokenizers", "webdataset", "mlflow", "omegaconf", "numpy")
ROOMS = ("configs", "sharding", "trainer", "launcher")
OF_A_HOST = ("data.cache.", "teacher.offload_folder", "train.threads")
"""Settings that may differ from host to host."""
DIGITS = 12
"""Of a digest; enough to tell two from each other."""


def command() -> str:
    """Return the command line of this process, without what a launcher appended and without secrets."""
    own = [public(argument) for argument in sys.argv if not argument.startswith("--local_rank")]
    return shlex.join([Path(sys.executable).name, *own])


def revision() -> str:
    """Return the git commit of this checkout, ``-dirty`` behind it where files differ; else the image's."""
    commit = _git("rev-parse", "HEAD")
    if commit is None:
        return os.environ.get("TINYBERT_REVISION", "unknown")
    return f"{commit}-dirty" if _git("status", "--porcelain", "--untracked-files=no") else commit


def changes() -> str:
    """Return the uncommitted changes of tracked files as a diff, without secrets; empty without changes."""
    return public(_git("diff", "HEAD") or "")


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that decide the result."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def facts(config: RunConfig, corpora: Corpora) -> dict[str, str]:
    """Return what must be equal on all ranks, by name: code, versions, settings, corpora, teacher.

    The code is told by its files, so that what differs is named, and uncommitted changes count.
    """
    root = Path(__file__).resolve().parents[1]
    sources = sorted(path for room in ROOMS for path in (root / room).rglob("*.py"))
    found = {f"code {path.relative_to(root)}": sha256(path)[:DIGITS] for path in sources}
    found |= versions()
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


def _git(*arguments: str) -> str | None:
    root = Path(__file__).resolve().parents[1]
    try:
        done = subprocess.run(["git", "-C", root, *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None  # installed without its repository
    return done.stdout.strip()
