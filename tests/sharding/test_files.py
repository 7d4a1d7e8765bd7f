"""Folders that are there whole or not at all."""

import hashlib
from pathlib import Path

import pytest

from sharding.files import UNFINISHED, install_folder, new_file, new_folder, sha256, sync, write_text


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


def test_a_new_folder_appears_when_it_is_filled(tmp_path: Path) -> None:
    final = tmp_path / "deep" / "final"
    for text in ("first", "second"):
        with new_folder(final) as partial:
            assert partial.parent == final.parent and list(partial.iterdir()) == []
            (partial / "file").write_text(text)
            assert final.exists() == (text == "second")
        assert (final / "file").read_text() == text
        assert list(final.parent.iterdir()) == [final]


@pytest.mark.parametrize("error", [OSError("no space"), KeyboardInterrupt(), SystemExit(1)])
def test_a_new_folder_that_fails_leaves_what_was_there(tmp_path: Path, error: BaseException) -> None:
    final = folder_of(tmp_path / "final", "old")
    with pytest.raises(type(error)), new_folder(final) as partial:
        (partial / "file").write_text("half")
        raise error
    assert (final / "file").read_text() == "old" and list(tmp_path.iterdir()) == [final]


def test_what_a_killed_process_left_is_not_mixed_in(tmp_path: Path) -> None:
    folder_of(tmp_path / ".final.partial", "stale")
    folder_of(tmp_path / ".final.replaced", "older")
    folder_of(tmp_path / "final", "old")
    with new_folder(tmp_path / "final") as partial:
        (partial / "other").write_text("new")
    assert [path.name for path in tmp_path.rglob("*")] == ["final", "other"]


def test_a_new_file_appears_when_it_is_filled(tmp_path: Path) -> None:
    final = tmp_path / "final"
    for content in (b"first", b"second"):
        with new_file(final) as file:
            file.write(content)
            assert [path for path in tmp_path.glob(UNFINISHED) if path != final]
            assert final.exists() == (content == b"second")
        assert final.read_bytes() == content and list(tmp_path.iterdir()) == [final]
    with pytest.raises(KeyboardInterrupt), new_file(final) as file:
        file.write(b"half")
        raise KeyboardInterrupt
    assert final.read_bytes() == b"second" and list(tmp_path.iterdir()) == [final]


def test_two_writers_of_a_file_do_not_meet(tmp_path: Path) -> None:
    final = tmp_path / "final"
    with new_file(final) as one, new_file(final) as other:
        one.write(b"one")
        other.write(b"other")
    assert final.read_bytes() == b"one" and list(tmp_path.iterdir()) == [final]  # the outer one ends last


def test_sync_takes_files_and_folders(tmp_path: Path) -> None:
    sync(folder_of(tmp_path / "folder", "text"))
    sync(tmp_path / "folder" / "file")
    with pytest.raises(FileNotFoundError):
        sync(tmp_path / "none")


def test_sha256(tmp_path: Path) -> None:
    content = bytes(range(256)) * 10_000  # longer than what is read at once
    (tmp_path / "file").write_bytes(content)
    assert sha256(tmp_path / "file") == hashlib.sha256(content).hexdigest()
    (tmp_path / "empty").touch()
    assert sha256(tmp_path / "empty").startswith("e3b0c44298fc1c14")  # FIPS 180-4's value for no input


def test_a_text_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    write_text(path, "first")
    write_text(path, "second ü")
    assert path.read_text(encoding="utf-8") == "second ü"
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "third, cut off by \ud800")
    assert path.read_text(encoding="utf-8") == "second ü"
    assert list(tmp_path.iterdir()) == [path]
