"""A tiny teacher, a run's config on it, and real processes under real launchers."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoTokenizer, BertConfig, BertModel, BertPreTrainedModel

ROOT = Path(__file__).resolve().parents[2]
Launch = Callable[..., subprocess.CompletedProcess[str]]


def write_teacher(folder: Path, tokenizer_folder: Path, kind: type[BertPreTrainedModel]) -> Path:
    """A random BERT of 4 layers x 48 with the tiny tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    with torch.random.fork_rng():
        torch.manual_seed(7)
        config = BertConfig(
            vocab_size=len(tokenizer),
            hidden_size=48,
            num_hidden_layers=4,
            num_attention_heads=4,
            intermediate_size=96,
            max_position_embeddings=64,
            initializer_range=0.1,
        )
        kind(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_teacher(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Path) -> Path:
    """Folder of a random BERT of 4 layers x 48 with the tiny tokenizer."""
    return write_teacher(tmp_path_factory.mktemp("teacher"), tiny_tokenizer, BertModel)


@pytest.fixture
def run_config(tmp_path: Path, tiny_teacher: Path, tiny_corpus: Path) -> dict[str, Any]:
    """A run of 6 steps of 24 rows, dropout on, as a YAML tree; tracking off."""
    return {
        "name": "tiny",
        "output": str(tmp_path / "run"),
        "teacher": {"model": str(tiny_teacher), "precision": "fp32"},
        "students": [student("small")],
        "data": {"corpus": str(tiny_corpus), "group_blocks": 2},
        "train": {"global_batch_rows": 24, "micro_batch_rows": 4, "steps": 6, "threads": 1},
        "evaluation": {"every_steps": 3, "rows": 40},
        "checkpoint": {"every_steps": 2},
        "log": {"every_steps": 1, "report": False},
        "tracking": {"enabled": False},
    }


def student(name: str, **changes: Any) -> dict[str, Any]:
    """A student of 2 layers x 24 with large steps, so that six of them show."""
    shape = {"layers": 2, "hidden_size": 24, "heads": 4, "intermediate_size": 48}
    return {"name": name, **shape, "optimizer": {"lr": 5e-3, "warmup": 0.0}, **changes}


@pytest.fixture
def general(tmp_path: Path) -> Launch:
    """Run ``launcher/general.py`` with a config tree, under a launcher, to its end."""

    def launch(
        config: dict[str, Any], *overrides: str, ranks: int = 1, by: str = "python", on: str = "cpu"
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command(tmp_path, config, *overrides, ranks=ranks, by=by),
            capture_output=True,
            text=True,
            timeout=300,
            cwd=tmp_path,  # not the repository: the script finds its own code
            env={**os.environ, "DS_ACCELERATOR": on},
        )

    return launch


def written(config: dict[str, Any]) -> str:
    """The config tree as a YAML file beside the run's folder; its path."""
    path = Path(config["output"]).with_suffix(".yaml")
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return str(path)


def command(folder: Path, config: dict[str, Any], *overrides: str, ranks: int, by: str) -> list[str]:
    """The command line of one run."""
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    address = ["--master_addr", "127.0.0.1", "--master_port", port]
    launcher = {
        "python": [sys.executable],
        "deepspeed": ["-m", "deepspeed.launcher.runner", "--num_accelerators", str(ranks), *address],
        "torchrun": ["-m", "torch.distributed.run", "--nproc_per_node", str(ranks), *address],
    }[by]
    launcher = launcher if by == "python" else [sys.executable, *launcher]
    return [*launcher, str(ROOT / "launcher/general.py"), "--config", str(path), *overrides]


def evaluations(output: str) -> list[dict[str, Any]]:
    """The held-out losses that a run wrote, one entry per evaluation and student."""
    lines = (Path(output) / "evaluations.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]
