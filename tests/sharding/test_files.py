"""Folders that are there whole or not at all."""

import hashlib
from pathlib import Path

import pytest

from sharding.files import install_folder, sha256


def folder_of(path: Path, text: str) -> Path:
    path.mkdir()
    (path / "file").write_text(text)
    return path


def test_install_over_nothing_an_empty_folder_and_a_full_one(tmp_path: Path) -> None:
    final = tmp_path / "final"
    for text in ("first", "second"):
        install_folder(folder_of(tmp_path / "partial", text), final)
        assert (final / "file").read_text() == text
        assert [path.name for path in tmp_path.iterdir()] == ["final"]
    (tmp_path / "empty").mkdir()
    install_folder(folder_of(tmp_path / "partial", "third"), tmp_path / "empty")
    assert (tmp_path / "empty" / "file").read_text() == "third"


def test_whatever_step_fails_one_complete_folder_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = Path.rename
    for fail_at in (1, 2):
        root = tmp_path / str(fail_at)
        root.mkdir()
        partial, final = folder_of(root / "partial", "new"), folder_of(root / "final", "old")
        calls: list[Path] = []

        def failing(path: Path, target: Path, fail_at: int = fail_at, calls: list[Path] = calls) -> Path:
            calls.append(path)
            if len(calls) == fail_at:
                raise OSError("power cut")
            return rename(path, target)

        monkeypatch.setattr(Path, "rename", failing)
        with pytest.raises(OSError, match="power cut"):
            install_folder(partial, final)
        monkeypatch.setattr(Path, "rename", rename)
        assert sorted(file.read_text() for file in root.rglob("file")) == ["new", "old"]


def test_sha256(tmp_path: Path) -> None:
    content = bytes(range(256)) * 10_000
    (tmp_path / "file").write_bytes(content)
    assert sha256(tmp_path / "file") == hashlib.sha256(content).hexdigest()
