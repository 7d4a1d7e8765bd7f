"""A tiny task, its corpus, and tiny models of it, made here."""

from pathlib import Path

import numpy as np
import torch
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

from configs.schema import TeacherConfig
from configs.task_schema import TaskConfig, TaskKind, TaskSourceConfig
from sharding.labels import read_labels, task_of
from sharding.manifest import Corpus
from sharding.stream import sequential
from sharding.task_corpus import build
from tests.conftest import WORDS


def write_tiny_task(folder: Path, tokenizer: Path, train: int = 300, dev: int = 90) -> Path:
    """The corpus of ``mood``: sentences of 3 to 25 words; the class says from which half of them most are."""
    random = np.random.default_rng(3)
    half = len(WORDS) // 2
    for name, count in (("train", train), ("dev", dev)):
        lines = ["sentence\tlabel"]
        for _ in range(count):
            label, length = int(random.integers(2)), int(random.integers(3, 26))
            likely = np.where(random.random(length) < 0.85, label, 1 - label)
            words = [WORDS[half * side + int(random.integers(half))] for side in likely]
            lines.append(f"{' '.join(words)}\t{label}")
        (folder / f"{name}.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    config = TaskConfig(
        task="mood",
        output=str(folder / "out"),
        source=TaskSourceConfig(path=str(folder), columns=["sentence"]),
        kind=TaskKind.classification,
        labels=["low", "high"],
        metrics=["accuracy", "matthews"],
        seq_len=32,
        teacher=TeacherConfig(model=str(tokenizer)),
    )
    build(config)
    return folder / "out/data"


def write_tiny_model(
    folder: Path, tokenizer: Path, corpus: Corpus, steps: int, seed: int = 0, layers: int = 2
) -> Path:
    """A BERT of so many layers x 24, trained on the task for ``steps`` steps of 32 rows."""
    labels = task_of(corpus).labels
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = BertForSequenceClassification(
            BertConfig(
                vocab_size=232,
                hidden_size=24,
                num_hidden_layers=layers,
                num_attention_heads=2,
                intermediate_size=40,
                max_position_embeddings=40,
                hidden_dropout_prob=0.0,
                id2label=dict(enumerate(labels)),
                label2id={label: number for number, label in enumerate(labels)},
            )
        )
        rows = corpus.split("train").rows
        batch = next(sequential(corpus, "train", rows=rows, batch_rows=rows, rank=0, world_size=1))
        mask_nS = (torch.arange(batch.ids_BS.shape[1]) < batch.length_B[:, None]).long()
        label_n = torch.from_numpy(read_labels(corpus, "train"))[:, 0].long()
        optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
        for _ in range(steps):
            chosen = torch.randint(rows, (32,))
            logits = model(input_ids=batch.ids_BS[chosen], attention_mask=mask_nS[chosen]).logits
            torch.nn.functional.cross_entropy(logits, label_n[chosen]).backward()
            optimizer.step()
            optimizer.zero_grad()
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
    return folder
