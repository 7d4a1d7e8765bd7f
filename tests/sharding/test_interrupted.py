"""Builds that end too early: what is finished stays, nothing is made twice, nobody else's work is touched."""

import ctypes
import fcntl
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from configs.corpus_schema import CorpusConfig
from sharding.build import build, join, pack, prepare
from sharding.manifest import CorpusError, open_corpus
from tests.conftest import small_disk
from tests.sharding.test_build import files_of


@pytest.fixture
def config(text_config: CorpusConfig) -> CorpusConfig:
    return text_config


def test_finished_runs_and_shards_are_not_made_again(config: CorpusConfig) -> None:
    plain = replace(config, output=f"{config.output}-plain")
    build(plain, progress=False)
    partial = Path(f"{config.output}.partial")
    prepare(config, 0, 1, progress=False)
    pack(config, 0, 2, progress=False)
    (partial / "runs" / ".killed.tmp").write_bytes(b"half")
    (partial / "corpus" / "train" / ".killed.tmp").write_bytes(b"half")
    assert len(list(partial.glob("shards/*/*.json"))) >= 2

    def identities() -> dict[Path, int]:
        made = [*partial.glob("runs/*.*"), *partial.glob("corpus/*/*.tar")]
        return {path: path.stat().st_ino for path in made}

    before = identities()
    prepare(config, 0, 1, progress=False)
    pack(config, 0, 1, progress=False)
    after = identities()
    assert before.items() <= after.items() and len(before) < len(after)
    assert build(config, progress=False) == open_corpus(plain.output).manifest
    assert files_of(Path(config.output)) == files_of(Path(plain.output))
    assert not partial.exists()


@pytest.mark.parametrize("suffix", [".ids", ".npz"])
def test_a_run_that_was_damaged_is_named_and_made_again(config: CorpusConfig, suffix: str) -> None:
    plain = replace(config, output=f"{config.output}-plain")
    build(plain, progress=False)
    prepare(config, 0, 1, progress=False)
    path = sorted(Path(f"{config.output}.partial/runs").glob(f"*{suffix}"))[3]
    with open(path, "r+b") as file:
        file.truncate(path.stat().st_size * 2 // 3)
    with pytest.raises(CorpusError, match=f"{path.stem}.npz or {path.stem}.ids is damaged"):
        build(config, progress=False)
    for both in (".ids", ".npz"):
        path.with_suffix(both).unlink()
    build(config, progress=False)
    assert files_of(Path(config.output)) == files_of(Path(plain.output))


def test_steps_that_come_too_early_name_what_is_missing(config: CorpusConfig) -> None:
    prepare(config, 1, 2, progress=False)
    with pytest.raises(CorpusError, match="3 of 6 parts .* not prepared: 00000-.*--stage prepare"):
        pack(config, 0, 1, progress=False)
    prepare(config, 0, 2, progress=False)
    pack(config, 0, 2, progress=False)
    with pytest.raises(CorpusError, match=r"shards are not finished: train/00001.tar.*--stage pack"):
        join(config)
    (Path(f"{config.output}.partial") / "corpus/train/00000.tar").unlink()
    with pytest.raises(CorpusError, match=r"shards are not finished: train/00000.tar, train/00001.tar"):
        join(config)


def test_another_build_does_not_go_on_with_the_work_of_this_one(config: CorpusConfig) -> None:
    prepare(config, 0, 2, progress=False)
    other = replace(config, seq_len=16, shuffle_seed=None, processes=2, source=replace(config.source))
    other.source.revision = "2"
    with pytest.raises(CorpusError) as error:
        build(other, progress=False)
    message = str(error.value)
    assert "seq_len: 32 then, 16 now" in message and "shuffle_seed: 0 then, None now" in message
    assert "source.revision: None then, '2' now" in message and "processes" not in message
    assert "finish that one, remove the folder, or choose another output" in message
    assert build(replace(config, processes=2), progress=False).seq_len == 32


def test_a_folder_under_the_partial_name_that_is_no_builds(config: CorpusConfig) -> None:
    (Path(f"{config.output}.partial") / "runs").mkdir(parents=True)
    with pytest.raises(CorpusError, match="was not left by a build"):
        build(config, progress=False)


@pytest.mark.parametrize("stage", [build, join, lambda config, **kwargs: prepare(config, 0, 1, **kwargs)])
def test_two_builds_of_one_output(config: CorpusConfig, stage: Callable[..., object]) -> None:
    partial = Path(f"{config.output}.partial")
    partial.mkdir()
    with open(partial / "lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(CorpusError, match="another build is writing"):
            stage(config, **({} if stage is join else {"progress": False}))
    assert partial.exists()


def test_tasks_work_at_the_same_time_but_not_beside_a_whole_build(config: CorpusConfig) -> None:
    partial = Path(f"{config.output}.partial")
    partial.mkdir()
    with open(partial / "lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        prepare(config, 0, 1, progress=False)
        with pytest.raises(CorpusError, match="another build is writing"):
            build(config, progress=False)
    build(config, progress=False)


def resize(disk: Path, size: int) -> None:
    remount = 32
    assert not ctypes.CDLL(None).mount(
        b"tmpfs", str(disk).encode(), b"tmpfs", remount, f"size={size}".encode()
    )


@pytest.mark.parametrize("size", [16_384, 90_112, 122_880])
def test_no_space_left_and_then_some(config: CorpusConfig, tmp_path: Path, size: int) -> None:
    plain = replace(config, output=f"{config.output}-plain")
    build(plain, progress=False)
    with small_disk(tmp_path / "disk", size) as disk:
        config.output = str(disk / "corpus")
        with pytest.raises(
            CorpusError, match=f"no space left for {config.output}: .*bytes are needed"
        ) as error:
            build(config, progress=False)
        assert f"{config.output}.partial" in str(error.value) and not Path(config.output).exists()
        done = len(list(disk.rglob("*.npz")))
        assert done == 0 if size == 16_384 else done > 1
        resize(disk, 1 << 20)
        build(config, progress=False)
        assert files_of(Path(config.output)) == files_of(Path(plain.output))
