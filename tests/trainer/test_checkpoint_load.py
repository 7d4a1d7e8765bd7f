"""Loading: all damage is found, the one before is used instead, and another run is refused."""

import copy
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from configs.load import to_dict
from configs.schema import DataConfig, RunConfig, TeacherConfig
from configs.student_schema import StudentConfig
from tests.trainer.saved import DAMAGE, checkpoint, damage, keep, names
from trainer.checkpoint import (
    CheckpointError,
    check_same_run,
    is_student,
    list_files,
    load,
    newest_intact,
    save,
    verify,
    weight_shapes,
)


def test_damage_is_found_and_all_of_it_named(tmp_path):
    path = save(tmp_path, checkpoint(1), keep(1))
    flipped, cut, gone = path / "a/weights.safetensors", path / "a/moments.safetensors", path / "run.json"
    data = bytearray(flipped.read_bytes())
    data[-1] ^= 1
    flipped.write_bytes(data)
    size = cut.stat().st_size
    os.truncate(cut, size - 4)
    gone.unlink()
    with pytest.raises(CheckpointError, match="is damaged: ") as error:
        load(path)
    assert "a/weights.safetensors does not match its checksum" in str(error.value)
    assert f"a/moments.safetensors has {size - 4} bytes instead of {size}" in str(error.value)
    assert "run.json is missing" in str(error.value)
    assert "b.2" not in str(error.value)


@pytest.mark.parametrize(
    "content",
    [None, b"", b"{broken", b"\xff", b"{}", b"[]", b'{"run.json": 3}', b'{"run.json": {"bytes": 3}}'],
)
def test_a_damaged_list_of_files(tmp_path, content):
    path = save(tmp_path, checkpoint(1), keep(1))
    (path / "files.json").unlink()
    if content is not None:
        (path / "files.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"files.json cannot be read"):
        load(path)


def test_every_byte_of_every_file_is_guarded(tmp_path):
    path = save(tmp_path, checkpoint(1, numbers=8, names=("a",)), keep(1))
    for file in [found for found in path.rglob("*") if found.is_file()]:
        original = file.read_bytes()
        for position in range(0, len(original), 7):
            file.write_bytes(original[:position] + bytes([original[position] ^ 4]) + original[position + 1 :])
            assert len(verify(path)) >= 1
        file.write_bytes(original)
    assert verify(path) == []


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_newest_steps_aside_for_the_one_before(tmp_path, how):
    assert newest_intact(tmp_path / "none", pytest.fail) is None
    for step in (1, 2, 3):
        save(tmp_path, checkpoint(step), keep(3))
    damage(tmp_path / "step-00000003", how)
    damage(tmp_path / "step-00000002", "cut")
    told: list[str] = []
    assert newest_intact(tmp_path, told.append) == tmp_path / "step-00000001"
    assert names(tmp_path) == ["damaged-step-00000002", "damaged-step-00000003", "step-00000001"]
    assert len(told) == 2 and all(
        "is DAMAGED" in line and "going back to step-00000001" in line for line in told
    )
    assert (
        tmp_path / "damaged-step-00000002/a/weights.safetensors"
    ).stat().st_size == 16  # nothing is removed

    save(tmp_path, checkpoint(3), keep(3))
    damage(tmp_path / "step-00000003", how)
    assert newest_intact(tmp_path, told.append) == tmp_path / "step-00000001"
    assert names(tmp_path)[:3] == [
        "damaged-step-00000002",
        "damaged-step-00000003",
        "damaged-step-00000003.1",
    ]


def test_where_all_are_damaged_no_run_starts_from_nothing(tmp_path):
    for step in (1, 2):
        save(tmp_path, checkpoint(step), keep(2))
    damage(tmp_path / "step-00000002", "cut")
    assert newest_intact(tmp_path, lambda text: None) == tmp_path / "step-00000001"
    damage(tmp_path / "step-00000001", "unlisted")
    for _ in range(2):
        with pytest.raises(CheckpointError, match="every checkpoint of this run is damaged") as error:
            newest_intact(tmp_path, pytest.fail)
        assert "step-00000001: files.json cannot be read" in str(error.value)
        assert "damaged-step-00000002: found damaged before" in str(error.value)
        assert "put back a copy of one of them; to start anew, remove them" in str(error.value)
    shutil.rmtree(tmp_path / "step-00000001")
    with pytest.raises(CheckpointError, match="damaged-step-00000002: found damaged before"):
        newest_intact(tmp_path, pytest.fail)


def test_a_checkpoint_of_another_version_is_told_from_a_damaged_one(tmp_path):
    old = replace(checkpoint(1))
    path = save(tmp_path, old, keep(1))
    run = json.loads((path / "run.json").read_text())
    del run["world_size"]
    (path / "run.json").write_text(json.dumps(run))
    with pytest.raises(CheckpointError, match="not of this version of the code: .*world_size"):
        load(path, verified=True)


def test_one_student_of_a_checkpoint(tmp_path):
    path = save(tmp_path, checkpoint(1), keep(1))
    assert weight_shapes(path / "b.2") == {"encoder.w": (100,), "bias": (3,)}
    assert is_student(str(path / "a")) and is_student(str(tmp_path / "latest/a"))
    assert not any(
        is_student(str(other)) for other in (path, tmp_path, tmp_path / "none", "bert-base-uncased")
    )
    assert list_files(path)["a/weights.safetensors"][0] == (path / "a/weights.safetensors").stat().st_size
    damage(path, "cut")
    assert verify(path, ["b.2/weights.safetensors", "run.json"]) == []
    assert "has 16 bytes instead of" in verify(path, ["a/weights.safetensors"])[0]
    assert verify(path, ["c/weights.safetensors"]) == ["c/weights.safetensors is not listed in files.json"]


def run_config() -> dict:
    shape = {"layers": 2, "hidden_size": 8, "heads": 2, "intermediate_size": 16}
    students = [StudentConfig(name=name, **shape) for name in ("a", "b")]
    config = RunConfig("run", "out", TeacherConfig(model="big"), students, DataConfig(corpus="words"))
    return to_dict(config)


@pytest.fixture
def resumed(tmp_path) -> Path:
    return save(tmp_path, replace(checkpoint(1), config=run_config()), keep(1))


def refused(now: dict, resumed: Path, fingerprint: str = "f" * 64) -> str:
    with pytest.raises(CheckpointError) as error:
        check_same_run(resumed, now, fingerprint)
    return str(error.value)


def test_the_same_run_goes_on(resumed):
    config = run_config()
    check_same_run(resumed, config, "f" * 64)
    # What decides neither the rows nor what is learned from them may change.
    config["train"].update(steps=99, micro_batch_rows=8)
    config["deepspeed"].update(zero_stage=3)
    config["students"][0]["optimizer"]["lr"] = 1.0
    config["students"][0]["init"] = "elsewhere"
    config["data"].update(corpus="copied/words", workers=5)
    check_same_run(resumed, config, "f" * 64)


def test_another_run_is_refused_and_every_difference_named(resumed):
    config = run_config()
    config["train"].update(seed=1, global_batch_rows=512)
    config["data"]["group_blocks"] = 4
    config["teacher"].update(model="bigger", revision="v2")
    config["students"][1]["hidden_size"] = 16
    config["students"][0]["losses"]["hidden"] = 2.0
    said = refused(config, resumed, fingerprint="0" * 64)
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
    assert f"this is not the run that {resumed} belongs to" in said and "another output folder" in said


@pytest.mark.parametrize("change", ["fewer", "more", "another order"])
def test_other_students_are_another_run(resumed, change):
    config = run_config()
    if change == "fewer":
        config["students"].pop()
    elif change == "more":
        config["students"].append(copy.deepcopy(config["students"][0]) | {"name": "c"})
    else:
        config["students"].reverse()
    assert "name=" in refused(config, resumed)
