"""Saving: what is read is what was written; a kill or a full disk harms no other checkpoint."""

import errno
import os
import shutil
import signal
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from configs.schema import CheckpointConfig
from tests.conftest import small_disk
from tests.trainer.saved import assert_equal, checkpoint, keep, names
from trainer.checkpoint import best, list_complete, load, newest_intact, retained, save, step_of, verify


def test_what_is_read_is_what_was_written(tmp_path):
    written = checkpoint(7)
    path = save(tmp_path / "checkpoints", written, keep(2))
    assert path == tmp_path / "checkpoints" / "step-00000007" and verify(path) == []
    assert_equal(load(path), written)
    assert names(path.parent) == ["step-00000007"]


def test_the_same_bytes_for_the_same_state(tmp_path):
    paths = [save(tmp_path / name, checkpoint(3), keep(1)) for name in ("one", "two")]
    files = [sorted(path.relative_to(root) for path in root.rglob("*")) for root in paths]
    assert files[0] == files[1] and len(files[0]) == 8
    for file in files[0]:
        if (paths[0] / file).is_file():
            assert (paths[0] / file).read_bytes() == (paths[1] / file).read_bytes()


def test_the_newest_is_last_and_nothing_else_is_listed(tmp_path):
    assert list_complete(tmp_path / "none") == []
    for step in (100, 9, 20):
        save(tmp_path, checkpoint(step), keep(9))
    for other in ("step-7", "step-00000030", ".step-00000040.partial", "notes"):
        (tmp_path / other).mkdir()
    shutil.copy(tmp_path / "step-00000009/files.json", tmp_path / "step-7/files.json")
    (tmp_path / "step-00000050").write_text("a file")
    save(tmp_path, checkpoint(20), keep(9))
    shutil.copytree(tmp_path / "step-00000020.1", tmp_path / "step-00000020.10")
    assert [path.name for path in list_complete(tmp_path)] == [
        "step-00000009",
        "step-00000020.1",
        "step-00000020.10",
        "step-00000100",
    ]


@pytest.mark.parametrize("keep_last", [1, 2, 3])
def test_the_newest_are_kept(tmp_path, keep_last):
    for step in range(1, 6):
        save(tmp_path, checkpoint(step), keep(keep_last))
        kept = [f"step-{number:08d}" for number in range(1, step + 1)][-keep_last:]
        assert names(tmp_path) == kept


def test_older_ones_go_only_after_the_newer_one_is_complete(tmp_path):
    save(tmp_path, checkpoint(1), keep(1))
    broken = checkpoint(2)
    broken.config["unwritable"] = object()  # met after the tensors have been written
    with pytest.raises(TypeError, match="not JSON serializable"):
        save(tmp_path, broken, keep(1))
    assert names(tmp_path) == ["step-00000001"]
    assert_equal(load(tmp_path / "step-00000001"), checkpoint(1))


def test_everything_is_on_disk_before_it_bears_its_name(tmp_path, monkeypatch):
    """Read off the descriptors that reach ``os.fsync``, which still runs."""
    flushed, fsync = [], os.fsync

    def record(descriptor: int) -> None:
        flushed.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", record)
    final = save(tmp_path, checkpoint(1), keep(1))
    partial = f"{tmp_path}/.step-00000001.partial"
    inside = {str(path).replace(str(final), partial) for path in final.rglob("*")}
    assert set(flushed) == {*inside, partial, str(tmp_path)}
    # Listed last, then named, then linked.
    assert flushed[-4:] == [f"{partial}/files.json", partial, str(tmp_path), str(tmp_path)]


def test_a_step_that_is_saved_again_replaces_nothing_and_counts_as_newer(tmp_path):
    save(tmp_path, checkpoint(1), keep(2))
    for number in (1, 2):
        newer = replace(checkpoint(1, numbers=7 * number), revision="newer")
        path = save(tmp_path, newer, keep(2))
        assert_equal(load(path), newer)
        assert (step_of(path), names(tmp_path)) == (1, [f"step-00000001.{number}"])  # the older one went last


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        (keep(1), {70: ["last"]}),
        (keep(2, every=20), {20: ["every 20"], 40: ["every 20"], 60: ["last", "every 20"], 70: ["last"]}),
        (keep(1, best=True), {30: ["best of a"], 50: ["best of b"], 70: ["last"]}),
        (keep(1, every=50, best=True), {30: ["best of a"], 50: ["every 50", "best of b"], 70: ["last"]}),
    ],
)
def test_what_is_kept(tmp_path, settings, kept):
    """The best of a comes at 30 and again at 40, of b at 50; what is not a finite number is no best."""
    nan, inf = float("nan"), float("inf")
    heldout = {
        0: {"a": 9.0, "b": 9.0},
        10: {"a": nan, "b": 2.0},
        20: {},
        30: {"a": 1.0, "b": 3.0},
        40: {"a": 1.0, "b": 1.5},
        50: {"a": 2.0, "b": 1.25},
        60: {"a": 3.0},
        70: {"a": nan, "b": -inf},
    }
    for step, losses in heldout.items():
        path = save(tmp_path, replace(checkpoint(step, numbers=1), heldout=losses), settings)
        assert load(path).heldout == pytest.approx(losses, nan_ok=True)
        assert path in list_complete(tmp_path)
    assert names(tmp_path) == [f"step-{step:08d}" for step in kept]
    found = retained(list_complete(tmp_path), settings)
    assert {step_of(path): why for path, why in found.items()} == kept
    if settings.keep_best:
        assert {name: step_of(path) for name, path in best(list_complete(tmp_path)).items()} == {
            "a": 30,
            "b": 50,
        }


def test_a_damaged_older_one_is_no_best_and_hinders_no_save(tmp_path):
    for step, loss in ((1, 1.0), (2, 2.0)):
        save(tmp_path, replace(checkpoint(step), heldout={"a": loss}), keep(2, best=True))
    (tmp_path / "step-00000001/run.json").write_text("{broken")
    save(tmp_path, checkpoint(3), keep(1, best=True))
    assert names(tmp_path) == ["step-00000002", "step-00000003"]


CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.symlink"}


def save_and_die(folder: Path, step: int, settings: CheckpointConfig, changes: int) -> bool:
    """Save in a process that is killed after so many changes of the disk; True when it lived to the end."""
    child = os.fork()
    if child == 0:
        left = changes

        def count(event: str, arguments: tuple) -> None:
            nonlocal left
            opened = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR)
            if opened or event in CHANGES:
                left -= 1
                if left < 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(count)
        save(folder, checkpoint(step), settings)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFEXITED(status) or os.WTERMSIG(status) == signal.SIGKILL
    return os.WIFEXITED(status)


@pytest.mark.parametrize(
    ("there", "last"),
    [((1, 2), 2), ((2, 3), 2), ((2,), 1), ((3,), 1)],
    ids=["a new step", "a step saved before", "one is kept", "the only one, saved before"],
)
def test_a_kill_at_any_instant_leaves_only_complete_ones(tmp_path, there, last):
    """By SIGKILL, before every folder or link made, file opened to write, name changed and thing removed."""
    template = tmp_path / "template"
    for step in there:
        save(template, checkpoint(step), keep(last))
    (template / ".step-00000003.partial" / "a").mkdir(parents=True)  # of an earlier kill
    (template / ".step-00000003.partial" / "a" / "weights.safetensors").write_bytes(b"half")
    found_newest, linked = [], []
    for changes in range(1_000):
        folder = shutil.copytree(template, tmp_path / "killed", symlinks=True)
        finished = save_and_die(folder, 3, keep(last), changes)
        complete = list_complete(folder)
        assert complete == sorted(folder.glob("step-*")), changes
        assert [problem for path in complete for problem in verify(path)] == [], changes
        assert newest_intact(folder, pytest.fail) == complete[-1]
        newest = load(complete[-1])
        found_newest.append(newest.progress.step)
        assert_equal(newest, checkpoint(newest.progress.step))
        linked.append(load(folder / "latest").progress.step)
        save(folder, checkpoint(3), keep(last))  # the run goes on from there
        assert [step_of(path) for path in list_complete(folder)] == [2, 3][-last:], changes
        assert names(folder) == [path.name for path in list_complete(folder)], changes
        assert_equal(load(folder / "latest"), checkpoint(3))
        shutil.rmtree(folder)
        if finished:
            break
    assert changes > 15 and set(found_newest) == set(linked) == {max(there), 3}


def test_a_full_disk_leaves_what_was_there(tmp_path):
    """With room for one page more each time: every file in turn is the one that does not fit."""
    met = set()
    with small_disk(tmp_path / "disk", 64 * 4096) as disk:
        folder, filler = disk / "checkpoints", disk / "filler"
        save(folder, checkpoint(1), keep(2))
        before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        while True:
            free = os.statvfs(disk).f_bavail
            with filler.open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, max(1, (free - len(met)) * 4096))
            try:
                save(folder, checkpoint(2, numbers=2000), keep(2))
                break
            except OSError as error:
                assert "No space left on device" in str(error)
            met.add(len(met))
            assert names(folder) == ["step-00000001"]
            assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
            filler.unlink()
        assert names(folder) == ["step-00000001", "step-00000002"] and verify(folder / "step-00000002") == []
    assert len(met) > 8


def test_a_file_system_without_links_costs_the_link_only(tmp_path, monkeypatch):
    def refuse(*arguments, **options):
        raise OSError(errno.EPERM, "Operation not permitted")  # what vfat says

    monkeypatch.setattr(os, "symlink", refuse)
    for step in (1, 2, 3):
        save(tmp_path, checkpoint(step), keep(1))
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000003"]
