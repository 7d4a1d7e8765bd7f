"""Checkpoints: what is read is what was written; damage, a kill or a full disk harms no other one."""

import copy
import os
import shutil
import signal
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from configs.load import to_dict
from configs.schema import DataConfig, RunConfig, TeacherConfig
from configs.student_schema import StudentConfig
from tests.conftest import small_disk
from trainer.checkpoint import (
    Checkpoint,
    CheckpointError,
    Progress,
    check_same_run,
    list_complete,
    load,
    save,
    verify,
)
from trainer.engine import EngineState


def checkpoint(step: int, numbers: int = 100, names: tuple[str, ...] = ("a", "b.2")) -> Checkpoint:
    """Tensors that tell step and student apart."""
    generator = torch.Generator().manual_seed(step)

    def state(number: int) -> EngineState:
        weights = {
            "encoder.w": torch.randn(numbers, generator=generator) + number,
            "bias": torch.full((3,), 1e-40 * step),  # denormal
        }
        moments = {f"{key}.{name}": w * w for key in ("exp_avg", "exp_avg_sq") for name, w in weights.items()}
        return EngineState(
            weights, moments, updates=step - 1, loss_scale={"cur_scale": 2.0**16, "cur_iter": 3}
        )

    return Checkpoint(
        progress=Progress(step, 24 * step),
        students={name: state(number) for number, name in enumerate(names)},
        skipped_steps={name: 1 for name in names},
        fingerprint="f" * 64,
        config={"name": "run", "nested": {"list": [1, 2.5, None, "ü"]}},
        tracking_run_ids={"": "run-id", "a": "child-id"},
        revision="0123abcd-dirty",
        world_size=2,
    )


def assert_equal(read: Checkpoint, written: Checkpoint) -> None:
    assert replace(read, students={}) == replace(written, students={})
    assert list(read.students) == list(written.students)
    for name, state in written.students.items():
        other = read.students[name]
        assert (other.updates, other.loss_scale) == (state.updates, state.loss_scale)
        for ours, theirs in ((state.weights, other.weights), (state.moments, other.moments)):
            assert ours.keys() == theirs.keys()
            assert all(torch.equal(ours[key], theirs[key]) for key in ours)
            assert all(value.dtype == torch.float32 for value in theirs.values())


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_is_read_is_what_was_written(tmp_path):
    written = checkpoint(7)
    path = save(tmp_path / "checkpoints", written, keep_last=2)
    assert path == tmp_path / "checkpoints" / "step-00000007" and verify(path) == []
    assert_equal(load(path), written)
    assert names(path.parent) == ["step-00000007"]


def test_the_same_bytes_for_the_same_state(tmp_path):
    paths = [save(tmp_path / name, checkpoint(3), 1) for name in ("one", "two")]
    files = [sorted(path.relative_to(root) for path in root.rglob("*")) for root in paths]
    assert files[0] == files[1] and len(files[0]) == 8
    for file in files[0]:
        if (paths[0] / file).is_file():
            assert (paths[0] / file).read_bytes() == (paths[1] / file).read_bytes()


def test_the_newest_is_last_and_nothing_else_is_listed(tmp_path):
    assert list_complete(tmp_path / "none") == []
    for step in (100, 9, 20):
        save(tmp_path, checkpoint(step), keep_last=9)
    for other in ("step-7", "step-00000030", ".step-00000040.partial", "notes"):
        (tmp_path / other).mkdir()
    shutil.copy(tmp_path / "step-00000009/files.json", tmp_path / "step-7/files.json")
    (tmp_path / "step-00000050").write_text("a file")
    assert [path.name for path in list_complete(tmp_path)] == [
        "step-00000009",
        "step-00000020",
        "step-00000100",
    ]


@pytest.mark.parametrize("keep_last", [1, 2, 3])
def test_the_newest_are_kept(tmp_path, keep_last):
    for step in range(1, 6):
        save(tmp_path, checkpoint(step), keep_last)
        kept = [f"step-{number:08d}" for number in range(1, step + 1)][-keep_last:]
        assert names(tmp_path) == kept


def test_older_ones_go_only_after_the_newer_one_is_complete(tmp_path):
    save(tmp_path, checkpoint(1), keep_last=1)
    broken = checkpoint(2)
    broken.config["unwritable"] = object()  # met after the tensors have been written
    with pytest.raises(TypeError, match="not JSON serializable"):
        save(tmp_path, broken, keep_last=1)
    assert names(tmp_path) == ["step-00000001"]
    assert_equal(load(tmp_path / "step-00000001"), checkpoint(1))


def test_everything_is_on_disk_before_it_bears_its_name(tmp_path, monkeypatch):
    """Read off the descriptors that reach ``os.fsync``, which still runs."""
    flushed, fsync = [], os.fsync

    def record(descriptor: int) -> None:
        flushed.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", record)
    final = save(tmp_path, checkpoint(1), keep_last=1)
    partial = f"{tmp_path}/.step-00000001.partial"
    inside = {str(path).replace(str(final), partial) for path in final.rglob("*")}
    assert set(flushed) == {*inside, partial, str(tmp_path)}
    assert flushed[-3:] == [f"{partial}/files.json", partial, str(tmp_path)]  # listed last, then named


def test_a_checkpoint_of_the_same_step_is_replaced(tmp_path):
    save(tmp_path, checkpoint(1), keep_last=2)
    newer = replace(checkpoint(1, numbers=7), revision="newer")
    assert_equal(load(save(tmp_path, newer, keep_last=2)), newer)
    assert names(tmp_path) == ["step-00000001"]


def test_damage_is_found_and_all_of_it_named(tmp_path):
    path = save(tmp_path, checkpoint(1), keep_last=1)
    flipped, cut, gone = path / "a/weights.safetensors", path / "a/moments.safetensors", path / "run.json"
    data = bytearray(flipped.read_bytes())
    data[-1] ^= 1
    flipped.write_bytes(data)
    size = cut.stat().st_size
    os.truncate(cut, size - 4)
    gone.unlink()
    with pytest.raises(CheckpointError, match="is damaged: .* Remove the folder to resume from") as error:
        load(path)
    assert "a/weights.safetensors does not match its checksum" in str(error.value)
    assert f"a/moments.safetensors has {size - 4} bytes instead of {size}" in str(error.value)
    assert "run.json is missing" in str(error.value)
    assert "b.2" not in str(error.value)


@pytest.mark.parametrize("content", [None, b"", b"{broken", b"\xff"])
def test_a_damaged_list_of_files(tmp_path, content):
    path = save(tmp_path, checkpoint(1), keep_last=1)
    (path / "files.json").unlink()
    if content is not None:
        (path / "files.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"files.json cannot be read"):
        load(path)


def test_every_byte_of_every_file_is_guarded(tmp_path):
    path = save(tmp_path, checkpoint(1, numbers=8, names=("a",)), keep_last=1)
    for file in [found for found in path.rglob("*") if found.is_file() and found.name != "files.json"]:
        original = file.read_bytes()
        for position in range(0, len(original), 7):
            file.write_bytes(original[:position] + bytes([original[position] ^ 4]) + original[position + 1 :])
            assert len(verify(path)) == 1
        file.write_bytes(original)
    assert verify(path) == []


CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir"}


def save_and_die(folder: Path, step: int, changes: int) -> bool:
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
        save(folder, checkpoint(step), keep_last=2)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFEXITED(status) or os.WTERMSIG(status) == signal.SIGKILL
    return os.WIFEXITED(status)


@pytest.mark.parametrize("there", [(1, 2), (2, 3)], ids=["a new step", "a step saved before"])
def test_a_kill_at_any_instant_leaves_only_complete_ones(tmp_path, there):
    """By SIGKILL, before every folder made, file opened for writing, name changed and thing removed."""
    template = tmp_path / "template"
    for step in there:
        save(template, checkpoint(step), keep_last=2)
    (template / ".step-00000003.partial" / "a").mkdir(parents=True)  # of an earlier kill
    (template / ".step-00000003.partial" / "a" / "weights.safetensors").write_bytes(b"half")
    found_newest = []
    for changes in range(1_000):
        folder = shutil.copytree(template, tmp_path / "killed")
        finished = save_and_die(folder, 3, changes)
        complete = list_complete(folder)
        assert complete == sorted(folder.glob("step-*")), changes
        assert [problem for path in complete for problem in verify(path)] == [], changes
        newest = load(complete[-1])
        found_newest.append(newest.progress.step)
        assert_equal(newest, checkpoint(newest.progress.step))
        save(folder, checkpoint(3), keep_last=2)  # the run goes on from there
        assert names(folder) == ["step-00000002", "step-00000003"], changes
        assert_equal(load(folder / "step-00000003"), checkpoint(3))
        shutil.rmtree(folder)
        if finished:
            break
    assert changes > 15 and set(found_newest) == {2, 3}


def test_a_full_disk_leaves_what_was_there(tmp_path):
    """With room for one page more each time: every file in turn is the one that does not fit."""
    met = set()
    with small_disk(tmp_path / "disk", 64 * 4096) as disk:
        folder, filler = disk / "checkpoints", disk / "filler"
        save(folder, checkpoint(1), keep_last=2)
        before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        while True:
            free = os.statvfs(disk).f_bavail
            with filler.open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, max(1, (free - len(met)) * 4096))
            try:
                save(folder, checkpoint(2, numbers=2000), keep_last=2)
                break
            except OSError as error:
                assert "No space left on device" in str(error)
            met.add(len(met))
            assert names(folder) == ["step-00000001"]
            assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
            filler.unlink()
        assert names(folder) == ["step-00000001", "step-00000002"] and verify(folder / "step-00000002") == []
    assert len(met) > 8


def run_config() -> dict:
    shape = {"layers": 2, "hidden_size": 8, "heads": 2, "intermediate_size": 16}
    students = [StudentConfig(name=name, **shape) for name in ("a", "b")]
    config = RunConfig("run", "out", TeacherConfig(model="big"), students, DataConfig(corpus="words"))
    return to_dict(config)


def refused(now: dict, fingerprint: str = "f" * 64) -> str:
    with pytest.raises(CheckpointError) as error:
        check_same_run(Path("out/step-1"), now, fingerprint, replace(checkpoint(1), config=run_config()))
    return str(error.value)


def test_the_same_run_goes_on():
    resumed = replace(checkpoint(1), config=run_config())
    config = run_config()
    check_same_run(Path("step-1"), config, "f" * 64, resumed)
    # What decides neither the rows nor what is learned from them may change.
    config["train"].update(steps=99, micro_batch_rows=8)
    config["deepspeed"].update(zero_stage=3)
    config["students"][0]["optimizer"]["lr"] = 1.0
    config["students"][0]["init"] = "elsewhere"
    config["data"].update(corpus="copied/words", workers=5)
    check_same_run(Path("step-1"), config, "f" * 64, resumed)


def test_another_run_is_refused_and_every_difference_named():
    config = run_config()
    config["train"].update(seed=1, global_batch_rows=512)
    config["data"]["group_blocks"] = 4
    config["teacher"].update(model="bigger", revision="v2")
    config["students"][1]["hidden_size"] = 16
    config["students"][0]["losses"]["hidden"] = 2.0
    said = refused(config, fingerprint="0" * 64)
    for line in (
        f"the corpus or mixture has fingerprint {'0' * 64}, the run was on {'f' * 64}",
        "train.seed=1, the run has 0",
        "train.global_batch_rows=512, the run has 256",
        "data.group_blocks=4, the run has 16",
        "teacher.model='bigger', the run has 'big'",
        "teacher.revision='v2', the run has None",
        "students.1.hidden_size=16, the run has 8",
        "students.0.losses={",
    ):
        assert f"\n  - {line}" in said
    assert said.count("\n  - ") == 8
    assert "this is not the run that out/step-1 belongs to" in said and "another output folder" in said


@pytest.mark.parametrize("change", ["fewer", "more", "another order"])
def test_other_students_are_another_run(change):
    config = run_config()
    if change == "fewer":
        config["students"].pop()
    elif change == "more":
        config["students"].append(copy.deepcopy(config["students"][0]) | {"name": "c"})
    else:
        config["students"].reverse()
    assert "name=" in refused(config)
