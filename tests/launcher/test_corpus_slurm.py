"""Corpus, pipeline and arrays: job scripts on a real Slurm, and run as it runs them, tasks in any order."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from mlflow import MlflowClient

from sharding.manifest import open_corpus
from tests.conftest import WORDS
from tests.launcher.conftest import ROOT, student, written
from tests.launcher.slurm import cluster
from tests.launcher.test_task import task_config, write_task
from tests.sharding.test_build import files_of

SCRIPTS = ROOT / "launcher" / "slurm"

ONE_NODE = ("--nodes=1", "--cpus-per-task=1")


@pytest.fixture
def keys(tiny_tokenizer: Path, tmp_path: Path) -> list[str]:
    """A build of 7 parts."""
    random = np.random.default_rng(6)
    (tmp_path / "text").mkdir()
    for part in range(7):
        lines = (" ".join(random.choice(WORDS, size=60)) for _ in range(400))
        (tmp_path / "text" / f"{part}.txt").write_text("\n".join(lines))
    sizes = ["seq_len=32", "block_rows=64", "max_shard_bytes=40960"]
    source = ["source.kind=text", f"source.path={tmp_path / 'text'}", "source.one_per_line=true"]
    return [f"tokenizer={tiny_tokenizer}", *source, *sizes]


@pytest.fixture
def plain(keys: list[str], tmp_path: Path) -> dict[str, bytes]:
    """What one build of it makes."""
    command = [sys.executable, "launcher/corpus.py", "build", f"output={tmp_path / 'plain'}", *keys]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return files_of(tmp_path / "plain")


def start(stage: str, task: int, arguments: list[str]) -> subprocess.Popen[str]:
    environment = {
        **os.environ,
        "PYTHON": sys.executable,
        "SLURM_SUBMIT_DIR": str(ROOT),
        "SLURM_ARRAY_TASK_ID": str(task),
        "SLURM_CPUS_PER_TASK": "1",
    }
    script = str(SCRIPTS / "corpus.sbatch")
    return subprocess.Popen(
        ["bash", script, stage, "3", *arguments], env=environment, stderr=subprocess.PIPE, text=True
    )


def test_tasks_in_any_order_one_killed_and_repeated(
    keys: list[str], plain: dict[str, bytes], tmp_path: Path
) -> None:
    output = tmp_path / "corpus"
    arguments = [f"output={output}", *keys]
    made = {"prepare": "runs/*.npz", "pack": "shards/*/*.json"}
    for stage, pattern in made.items():
        both = [start(stage, task, arguments) for task in (2, 0)]
        while not list(Path(f"{output}.partial").glob(pattern)):
            assert any(task.poll() is None for task in both)
            time.sleep(0.01)
        both[1].kill()
        errors = [task.communicate()[1] for task in both]
        assert both[0].returncode == 0, errors
        for task in (1, 0):
            again = start(stage, task, arguments)
            assert (again.communicate()[1], again.returncode) == ("", 0)
        assert not output.exists()
    last = start("join", 0, arguments)
    assert (last.communicate()[1], last.returncode) == ("", 0)
    assert files_of(output) == plain and len(open_corpus(output).split("train").shards) > 5
    assert not Path(f"{output}.partial").exists()


def write_sweep(folder: Path) -> None:
    """Two rates for the task in ``folder``."""
    sweep = {
        "name": "rates",
        "output": str(folder / "sweep"),
        "base": str(folder / "task.yaml"),
        "launcher": "task",
        "stage": "baseline",
        "overrides": [f"output={folder}/mine"],
        "space": {"fine_tuning.optimizer.lr": {"values": [2e-3, 1e-9]}},
        "sampler": "grid",
        "objectives": [{"metric": "heldout/score/accuracy"}],
    }
    (folder / "sweep.yaml").write_text(yaml.safe_dump(sweep))


def run_tree(uri: str) -> list[tuple[str, str | None]]:
    """Every run's name and its parent's."""
    client = MlflowClient(tracking_uri=uri)
    runs = client.search_runs([client.get_experiment_by_name("distillation").experiment_id])
    names = {run.info.run_id: run.info.run_name for run in runs}
    return [(run.info.run_name, names.get(run.data.tags.get("mlflow.parentRunId"))) for run in runs]


@pytest.mark.network_of_ranks
def test_the_pipeline_and_a_sweep_on_a_real_slurm(
    keys: list[str],
    plain: dict[str, bytes],
    run_config: dict[str, Any],
    tiny_teacher: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Corpus (three jobs, two of them arrays), general distillation, two tasks by stages, a sweep."""
    corpus, run = tmp_path / "corpus", tmp_path / "run"
    run_config |= {"data": {"corpus": str(corpus)}, "evaluation": {"every_steps": None}}
    run_config["train"]["steps"] = 2
    config, one_gpu = written(run_config), (*ONE_NODE, "--gpus-per-node=1")
    source = tmp_path / "source"  # a folder named after the task, such as its output, would be taken for it
    source.mkdir()
    for rows in (120, 40):
        write_task(source, rows)
    of_task = task_config(source, tiny_teacher)
    of_task["fine_tuning"] |= {"epochs": None, "steps": 2}
    of_task["students"] = [student("small", init=f"{run}/export/small")]
    monkeypatch.setenv("PIPELINE", "wiki-2026")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    run_config["tracking"] = of_task["tracking"] = {"enabled": True, "system_metrics": False}
    config = written(run_config)
    (tmp_path / "task.yaml").write_text(yaml.safe_dump(of_task))
    tasks = ("sst2,mine", "--config", str(tmp_path / "task.yaml"), f"output={tmp_path}/{{task}}")
    stages = [
        (*ONE_NODE, "corpus", "2", f"output={corpus}", *keys),
        (*one_gpu, "general", "--config", config, f"output={run}"),
        (*one_gpu, "task", *tasks, "stage=data"),
        (*one_gpu, "task", *tasks, "stage=baseline"),
    ]
    write_sweep(tmp_path)
    workers = ("launcher/slurm/sweep.sbatch", "--config", str(tmp_path / "sweep.yaml"))
    with cluster(tmp_path / "slurm") as slurm:
        words = [word for stage in stages for word in (*stage, "--")][:-1]
        said = slurm.ask("launcher/slurm/pipeline.sh", *words).splitlines()
        prepare, pack, join, general, data, task = re.findall(r"\d+", " ".join(said))
        corpus_jobs = f"prepare {prepare}, pack {pack}, join {join}"
        assert said == [f"corpus: {corpus_jobs}", f"general: {general}", f"task: {data}", f"task: {task}"]
        depends = [slurm.about(job)["Dependency"].partition("(")[0] for job in (pack, join, general, data)]
        assert depends == [f"afterok:{job}" for job in (f"{prepare}_*", f"{pack}_*", f"{join}_*", general)]
        slurm.wait_for_all(general, {"COMPLETED"})
        slurm.wait_for_all(task, {"COMPLETED"})
        job = slurm.sbatch("--array=1-2", *one_gpu, *workers)
        slurm.wait_for_all(job, {"COMPLETED"})
    assert files_of(corpus) == plain
    for folder in ("sst2", "mine", "sweep/trials/0000", "sweep/trials/0001"):
        assert (tmp_path / folder / "baseline/export/small/config.json").exists()
    exported = json.loads((tmp_path / "mine/baseline/export/small/config.json").read_text())
    assert exported["architectures"] == ["BertForSequenceClassification"]
    tree = run_tree(f"sqlite:///{tmp_path}/mlflow.db")
    expected = {("wiki-2026", None), ("corpus", "wiki-2026"), ("tiny", "wiki-2026"), ("sst2", "wiki-2026")}
    assert expected | {("sst2-data", "sst2"), ("sst2-baseline", "sst2")} <= set(tree)
    assert tree.count(("wiki-2026", None)) == 1, "however many jobs made it at a time"
    trials = json.loads((tmp_path / "sweep/trials.json").read_text())["trials"]
    assert [trial["state"] for trial in trials] == ["complete", "complete"]


@pytest.mark.parametrize("arguments", [[], ["3"], ["0", "output=x"], ["--config", "x.yaml"]])
def test_the_number_of_tasks_is_asked_for(arguments: list[str]) -> None:
    done = subprocess.run(["bash", str(SCRIPTS / "corpus.sh"), *arguments], capture_output=True, text=True)
    assert done.returncode == 2 and "usage: launcher/slurm/corpus.sh [sbatch options] TASKS" in done.stderr
