"""``launcher/corpus.py`` as a person runs it: exit codes and what is printed."""

import importlib.util
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from mlflow import MlflowClient

from launcher.corpus import main
from sharding.manifest import open_corpus
from tests.conftest import WORDS, heed_interrupts

SCRIPT = Path(__file__).resolve().parents[2] / "launcher" / "corpus.py"


@pytest.fixture
def wiki_dump() -> str:
    """206 real pages that gensim's package carries; found without importing it."""
    gensim = importlib.util.find_spec("gensim")
    if gensim is None or gensim.origin is None:
        pytest.skip("gensim, whose package carries a real dump, is not installed")
    return str(
        Path(gensim.origin).parent
        / "test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
    )


def run(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(SCRIPT), *arguments], cwd=cwd, capture_output=True, text=True)


def test_a_real_dump_from_another_folder(wiki_dump: str, tiny_tokenizer: Path, tmp_path: Path) -> None:
    yaml = (
        f"tokenizer: {tiny_tokenizer}\nsource:\n  kind: mediawiki\n  path: {wiki_dump}\nheldout_share: 0.05\n"
    )
    (tmp_path / "corpus.yaml").write_text(yaml)
    done = run(
        "build", "--config", "corpus.yaml", "output=wiki", "max_documents=30", "processes=2", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    corpus = open_corpus(tmp_path / "wiki")
    assert f"fingerprint {corpus.fingerprint}" in done.stdout
    assert sum(split.documents for split in corpus.manifest.splits.values()) == 30
    done = run("verify", "wiki", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "") and "corpus wiki is whole" in done.stdout


def test_mistakes_are_told_in_short(tmp_path: Path) -> None:
    done = run("build", "output=x", "seq_length=5", "processes=0", cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert "unknown key seq_length" in done.stderr and "source.path" in done.stderr
    done = run(
        "build", "output=x", "tokenizer=t", "source.kind=mediawiki", "source.path=no.xml.bz2", cwd=tmp_path
    )
    assert done.returncode == 2
    assert done.stderr.startswith("corpus.py: error: source.path=no.xml.bz2 does not exist")
    done = run("stat", "nowhere", cwd=tmp_path)
    assert done.returncode == 2 and "nowhere/manifest.json does not exist" in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_as_a_module() -> None:
    command = [sys.executable, "-m", "launcher.corpus", "--help"]
    done = subprocess.run(command, cwd=SCRIPT.parents[1], capture_output=True, text=True)
    assert done.returncode == 0 and "build,verify,stat,peek,simulate" in done.stdout


def test_verify_and_stat(tiny_corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["stat", str(tiny_corpus), "--json"]) == 0
    counts = json.loads(capsys.readouterr().out)
    assert counts["splits"]["train"]["documents"] == 480
    assert main(["stat", str(tiny_corpus)]) == 0
    table = capsys.readouterr().out
    assert counts["fingerprint"] in table and "480" in table and "padding" in table

    folder = shutil.copytree(tiny_corpus, tmp_path / "copy")
    shard = open_corpus(folder).split("heldout").shards[0]
    content = bytearray((folder / shard.path).read_bytes())
    content[shard.blocks[0].ids.offset + 999] ^= 1
    (folder / shard.path).chmod(0o644)
    (folder / shard.path).write_bytes(content)
    assert main(["verify", str(folder)]) == 1
    found = capsys.readouterr().out
    assert f"member {shard.blocks[0].name}.ids.npy" in found and "2 problems" in found


def test_a_figure_of_lengths(tiny_corpus: Path, tmp_path: Path) -> None:
    done = run("stat", str(tiny_corpus), "--figure", "lengths.gif", cwd=tmp_path)
    assert done.returncode == 2 and "lengths.gif: its suffix names the format" in done.stderr
    done = run("stat", str(tiny_corpus), "--json", "--figure", "lengths.svg", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["splits"]["heldout"]["documents"] == 60
    drawn = (tmp_path / "lengths.svg").read_text()
    assert all(
        f"<!-- {words} -->" in drawn for words in ("rows", "tokens in the row, special tokens included")
    )


def test_peek(tiny_corpus: Path, tiny_tokenizer: Path, tmp_path: Path) -> None:
    peek = ("peek", str(tiny_corpus), "--rows", "2", "--tokenizer", str(tiny_tokenizer))
    done = run(*peek, "--position", "7", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    places = [line for line in done.stdout.splitlines() if line.startswith("position")]
    assert [place.split(" = ")[0] for place in places] == ["position 7", "position 8"]
    assert done.stdout.count("A [CLS]") == 2
    assert done.stdout.count("\nB ") == done.stdout.count("segment B from")
    done = run(*peek, "--stored", "0", "--split", "heldout", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    block = open_corpus(tiny_corpus).split("heldout").shards[0].blocks[0].name
    assert f"heldout/00000.tar, block {block}, row 1: 32 tokens" in done.stdout
    done = run(*peek, "--stored", "0", "--position", "1", cwd=tmp_path)
    assert done.returncode == 2 and "not allowed with" in done.stderr


def test_simulate(tiny_corpus: Path, tmp_path: Path) -> None:
    done = run("simulate", str(tiny_corpus), "--ranks", "8,3,5", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("PROVED") == 4 and "FAILED" not in done.stdout
    done = run("simulate", str(tiny_corpus), "--ranks", "7,3", cwd=tmp_path)
    assert done.returncode == 2 and "nearest: 231, 252" in done.stderr


BUILD = ["output=c", "source.kind=text", "source.one_per_line=true", "source.path=lines", "processes=2"]


def write_lines(folder: Path, count: int) -> None:
    """Documents in eight files, which as many processes can read at a time."""
    random = np.random.default_rng(0)
    (folder / "lines").mkdir()
    for number in range(8):
        lines = (" ".join(random.choice(WORDS, size=60)) for _ in range(count // 8))
        (folder / "lines" / f"{number}.txt").write_text("\n".join(lines) + "\n")


def test_stages_and_tasks_make_what_one_build_makes(tiny_tokenizer: Path, tmp_path: Path) -> None:
    write_lines(tmp_path, 200)
    keys = [
        *BUILD,
        f"tokenizer={tiny_tokenizer}",
        "max_shard_bytes=40000",
        "block_rows=32",
        "heldout_share=0.1",
    ]
    done = run("build", *keys, "output=whole", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for stage in ("prepare", "pack"):
        for task in ("1/2", "0/2"):
            done = run("build", "--stage", stage, "--task", task, *keys, cwd=tmp_path)
            assert (done.returncode, done.stdout) == (0, ""), done.stderr
            assert not (tmp_path / "c").exists()
    done = run("build", "--stage", "join", *keys, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert open_corpus(tmp_path / "c").fingerprint == open_corpus(tmp_path / "whole").fingerprint
    assert len(open_corpus(tmp_path / "c").split("train").shards) > 1


def test_tasks_that_do_not_exist(tmp_path: Path) -> None:
    done = run("build", "--stage", "pack", "--task", "8/8", *BUILD, cwd=tmp_path)
    assert done.returncode == 2 and "8/8 is not one of 0/8 .. 7/8" in done.stderr
    done = run("build", "--stage", "join", "--task", "0/8", *BUILD, cwd=tmp_path)
    assert done.returncode == 2 and "--task goes with --stage prepare or pack" in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_an_ended_build_leaves_no_workers_and_goes_on(
    tiny_tokenizer: Path, tmp_path: Path, how: signal.Signals
) -> None:
    write_lines(tmp_path, 20_000)
    build = [sys.executable, str(SCRIPT), "build", *BUILD, f"tokenizer={tiny_tokenizer}", "heldout_share=0"]
    process = subprocess.Popen(
        build, cwd=tmp_path, stderr=subprocess.PIPE, text=True, preexec_fn=heed_interrupts
    )
    while len(workers := psutil.Process(process.pid).children(recursive=True)) < 3:  # two, and their tracker
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(how)
    _, errors = process.communicate(timeout=60)
    assert psutil.wait_procs(workers, timeout=60)[1] == []
    assert not (tmp_path / "c").exists()
    if how is signal.SIGINT:
        assert process.returncode == 130 and "Traceback" not in errors
        assert "interrupted; the same command goes on where it was" in errors
    done = run(*build[2:], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert open_corpus(tmp_path / "c").split("train").documents == 20_000
    assert not (tmp_path / "c.partial").exists()


def test_a_build_is_part_of_a_pipeline_in_mlflow(tiny_tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("\n\n".join(" ".join(WORDS) for _ in range(40)))
    settings = [f"tokenizer={tiny_tokenizer}", "source.kind=text", "source.path=text.txt", "seq_len=32"]
    tracking = ["tracking.enabled=true", "tracking.under=[wiki-2026]"]
    done = run(
        "build", "output=wiki", "deduplicate=none", "heldout_share=0.1", *settings, *tracking, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path}/mlflow/mlflow.db")
    experiment = client.get_experiment_by_name("distillation")
    assert experiment is not None
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    assert sorted(runs) == ["wiki", "wiki-2026"]
    build, corpus = runs["wiki"], open_corpus(tmp_path / "wiki")
    assert build.data.tags["mlflow.parentRunId"] == runs["wiki-2026"].info.run_id
    assert build.data.tags["corpus.fingerprint"] == corpus.fingerprint
    assert build.data.metrics["train/rows"] == corpus.split("train").rows
    assert build.info.status == "FINISHED" and build.data.params["seq_len"] == "32"
