"""Where a run comes from: the command, the code's revision and its uncommitted changes, versions."""

import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path

from configs.public import public

PACKAGES = ("torch", "deepspeed", "transformers", "tokenizers", "webdataset", "mlflow", "omegaconf", "numpy")


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


def _git(*arguments: str) -> str | None:
    root = Path(__file__).resolve().parents[1]
    try:
        done = subprocess.run(["git", "-C", root, *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None  # installed without its repository
    return done.stdout.strip()
