"""Provenance: the command, the code, the versions."""

import importlib.metadata
import platform
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from launcher import provenance

ROOT = Path(__file__).resolve().parents[2]


def test_the_command_can_be_typed_again(monkeypatch):
    own = ["launcher/general.py", "--config", "my runs/a.yaml", "students.0.layer_map=[1, 2]"]
    monkeypatch.setattr(sys, "argv", [own[0], "--local_rank=3", *own[1:]])
    program, *arguments = shlex.split(provenance.command())
    assert program == Path(sys.executable).name and arguments == own


def test_versions_are_those_installed():
    found = provenance.versions()
    assert found.pop("python") == platform.python_version()
    assert {"torch", "deepspeed", "transformers", "omegaconf"} <= found.keys()
    for package, version in found.items():
        assert version == importlib.metadata.version(package)


def test_a_package_that_is_not_installed_is_left_out(monkeypatch):
    monkeypatch.setattr(provenance, "PACKAGES", ("torch", "no-such-package"))
    assert provenance.versions().keys() == {"python", "torch"}


def test_the_revision_of_this_checkout():
    assert re.fullmatch(r"[0-9a-f]{40}(-dirty)?|unknown", provenance.revision())


SHOW = "from launcher import provenance as p; print(p.revision()); print(p.changes())"


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=A", "-c", "user.email=a@b"]
    done = subprocess.run(
        ["git", "-C", folder, *identity, *arguments], check=True, capture_output=True, text=True
    )
    return done.stdout.strip()


def shown(folder: Path) -> tuple[str, str]:
    done = subprocess.run(
        [sys.executable, "-c", SHOW], cwd=folder, check=True, capture_output=True, text=True
    )
    revision, _, changes = done.stdout.partition("\n")
    return revision, changes.strip()


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The module and what it imports, in a folder that is no repository yet."""
    for name in (
        "launcher/__init__.py",
        "launcher/provenance.py",
        "configs/__init__.py",
        "configs/public.py",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def test_code_outside_any_repository_is_of_unknown_revision(checkout, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(checkout.parent))
    monkeypatch.delenv("TINYBERT_REVISION", raising=False)
    assert shown(checkout) == ("unknown", "")
    monkeypatch.setenv("TINYBERT_REVISION", "as the image says")
    assert shown(checkout) == ("as the image says", "")


def test_the_revision_and_what_was_changed_since(checkout, monkeypatch):
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    monkeypatch.setenv("HF_TOKEN", "planted-token")
    git(checkout, "init", "-q")
    git(checkout, "add", "launcher")
    git(checkout, "commit", "-q", "-m", "first")
    commit = git(checkout, "rev-parse", "HEAD")
    assert shown(checkout) == (commit, "")
    (checkout / "notes.txt").write_text("not part of the code")
    assert shown(checkout) == (commit, "")
    with (checkout / "launcher/provenance.py").open("a") as file:
        file.write("# tried something with planted-token\n")
    revision, changes = shown(checkout)
    assert revision == f"{commit}-dirty"
    assert "+# tried something with ***" in changes and "provenance.py" in changes
