"""The folder of a build: whose work it holds, who may write it, and that its end is one step."""

import errno
import fcntl
import json
import logging
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from configs.corpus_schema import CorpusConfig
from sharding.manifest import CorpusError, open_corpus, read_manifest
from sharding.workspace import open_workspace

RECIPE = {"seq_len": 32, "source files (bytes)": {"a.txt": 5}, "shuffle_seed": None}


@pytest.fixture
def config(tmp_path: Path) -> CorpusConfig:
    return CorpusConfig(output=str(tmp_path / "deep" / "corpus"))


def test_work_of_the_same_recipe_goes_on(config: CorpusConfig) -> None:
    with open_workspace(config, RECIPE, shared=False) as work:
        assert json.loads((work.partial / "recipe.json").read_text()) == RECIPE
        (work.runs / "a.npz").write_text("")
        (work.runs / ".b.npz.123.tmp").write_text("")
        with pytest.raises(CorpusError, match="another build is writing"):
            with open_workspace(config, RECIPE, shared=True):
                pass
    with open_workspace(config, RECIPE, shared=True) as one, open_workspace(config, RECIPE, shared=True):
        assert len(list(one.runs.iterdir())) == 2  # another task may still write its own
        with pytest.raises(CorpusError, match="another build is writing"):
            with open_workspace(config, RECIPE, shared=False):
                pass
    with open_workspace(config, RECIPE, shared=False) as work:
        assert [path.name for path in work.runs.iterdir()] == ["a.npz"]


def test_another_recipe_is_refused_by_its_differences(config: CorpusConfig) -> None:
    with open_workspace(config, RECIPE, shared=False):
        pass
    other = {**RECIPE, "source files (bytes)": {"a.txt": 6}, "new": 1}
    with pytest.raises(CorpusError) as error:
        with open_workspace(config, other, shared=False):
            pass
    assert "source files (bytes): {'a.txt': 5} then, {'a.txt': 6} now; new: None then, 1 now" in str(
        error.value
    )
    assert "seq_len" not in str(error.value)


def test_a_failure_says_that_finished_work_stays(
    config: CorpusConfig, caplog: pytest.LogCaptureFixture
) -> None:
    for made in (0, 1):
        with pytest.raises(KeyboardInterrupt), open_workspace(config, RECIPE, shared=False) as work:
            if made:
                (work.runs / "a.npz").write_text("")
            raise KeyboardInterrupt
        assert ("what is finished stays in" in caplog.text) == bool(made)


def test_a_file_system_without_locks_is_told(
    config: CorpusConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def flock(descriptor: int, how: int) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", flock)
    with caplog.at_level(logging.WARNING), open_workspace(config, RECIPE, shared=False) as work:
        assert "no locks" in caplog.text and work.runs.is_dir()


def test_installing_replaces_and_leaves_nothing_else(config: CorpusConfig, tiny_corpus: Path) -> None:
    manifest = read_manifest(tiny_corpus).manifest
    config.overwrite = True
    for _ in range(2):
        with open_workspace(config, RECIPE, shared=False) as work:
            for path in [*tiny_corpus.rglob("*.tar")]:
                target = work.corpus / path.relative_to(tiny_corpus)
                target.parent.mkdir(exist_ok=True)
                target.write_bytes(path.read_bytes())
            (work.corpus / "train" / ".00009.tar.123.tmp").write_text("half")
            work.install(manifest)
        assert [path.name for path in work.output.parent.iterdir()] == ["corpus"]
        assert sorted(path.name for path in work.output.iterdir()) == ["heldout", "manifest.json", "train"]
        assert open_corpus(work.output).manifest == manifest
        assert not list(work.output.rglob(".*"))


def test_tasks_may_start_at_the_same_time(config: CorpusConfig) -> None:
    """Many at once, again and again: none takes another's folders for somebody else's."""

    def start(number: int) -> str:
        with open_workspace(config, RECIPE, shared=True) as work:
            return work.partial.name

    with ThreadPoolExecutor(8) as pool:
        for round_ in range(20):
            config.output = str(Path(config.output).with_name(f"corpus{round_}"))
            assert set(pool.map(start, range(8))) == {f"corpus{round_}.partial"}
