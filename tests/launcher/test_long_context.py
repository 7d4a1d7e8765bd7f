"""Rows of 8,192 tokens, in less memory than the score matrices of one layer."""

import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, ModernBertConfig, ModernBertModel

from configs.corpus_schema import CorpusConfig
from configs.load import load_config
from sharding.build import build
from tests.conftest import WORDS
from tests.launcher.conftest import command, evaluations, student

SEQ_LEN, HEADS = 8192, 10
SCORE_MATRICES_KIB = HEADS * SEQ_LEN**2 * 4 // 1024  # of one row, one layer, one model, in float32

pytestmark = pytest.mark.network_of_ranks


@pytest.fixture
def long_corpus(tmp_path: Path, tiny_tokenizer: Path) -> Path:
    """Documents of 200 to 12,000 words, packed into rows of 8,192 tokens."""
    random = np.random.default_rng(0)
    text = tmp_path / "text.txt"
    lengths = random.integers(200, 12_000, size=14)
    text.write_text("\n".join(" ".join(random.choice(WORDS, size=n)) for n in lengths), encoding="utf-8")
    overrides = ["source.kind=text", f"source.path={text}", "source.one_per_line=true", "heldout_share=0.3"]
    output = f"output={tmp_path / 'corpus'}"
    build(
        load_config(
            CorpusConfig,
            None,
            [output, f"tokenizer={tiny_tokenizer}", f"seq_len={SEQ_LEN}", "block_rows=2", *overrides],
        ),
        progress=False,
    )
    return tmp_path / "corpus"


@pytest.fixture
def long_teacher(tmp_path: Path, tiny_tokenizer: Path) -> Path:
    """A random ModernBERT of 3 layers x 60, two of them with a window of 128 tokens."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_tokenizer)
    folder = tmp_path / "teacher"
    with torch.random.fork_rng():
        torch.manual_seed(7)
        config = ModernBertConfig(
            vocab_size=len(tokenizer),
            hidden_size=60,
            num_hidden_layers=3,
            num_attention_heads=HEADS,
            intermediate_size=96,
            max_position_embeddings=SEQ_LEN,
            initializer_range=0.1,
            **{f"{name}_token_id": None for name in ("bos", "eos")},
            pad_token_id=tokenizer.pad_token_id,
            cls_token_id=tokenizer.cls_token_id,
            sep_token_id=tokenizer.sep_token_id,
        )
        ModernBertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("separate_documents", [False, True])
def test_a_run_on_rows_of_8192_tokens_never_holds_one_layers_scores(
    run_config: dict[str, Any],
    tmp_path: Path,
    long_corpus: Path,
    long_teacher: Path,
    separate_documents: bool,
) -> None:
    run_config["teacher"] |= {"model": str(long_teacher)}
    run_config["data"] |= {
        "corpus": str(long_corpus),
        "separate_documents": separate_documents,
        "workers": 0,
    }
    run_config["students"] = [student("small", hidden_size=40, heads=HEADS, layer_map=[1, 3])]
    run_config["train"] = {"global_batch_rows": 1, "micro_batch_rows": 1, "steps": 2}
    run_config["evaluation"] = {"every_steps": 2, "rows": 1}
    run_config["checkpoint"] = {"every_steps": None}
    log = tmp_path / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command(tmp_path, run_config, ranks=1, by="python"),
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=tmp_path,
            env={**os.environ, "DS_ACCELERATOR": "cpu"},
        )
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, log.read_text()
    before, after = (entry["losses"]["total"] for entry in evaluations(run_config["output"]))
    assert after < before
    # The whole process, libraries included.
    assert usage.ru_maxrss < SCORE_MATRICES_KIB, f"{usage.ru_maxrss / 2**20:.2f} GiB"
