"""Scoring: a task model's outputs on the rows of a task corpus, however the model is served.

Letters: n rows of a split, B rows of a micro batch, S sequence, C outputs (classes, or 1 for a value).
"""

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedConfig, PreTrainedModel

from sharding.labels import read_labels, task_of
from sharding.manifest import Corpus, TaskInfo
from sharding.squad import read_windows
from sharding.stream import sequential
from sharding.tokens import check_tokenizer, load_tokenizer
from trainer import metrics
from trainer.served import Forward, load_served

SORTED_BATCHES = 64
"""Micro batches whose rows are sorted by length together, so that little of them is padding."""


def load_model(folder: str | Path, corpus: Corpus) -> PreTrainedModel:
    """Return a task's model from an exported folder, fit for ``corpus``: float32, CPU, evaluation mode.

    Raises:
        ValueError: the corpus is not a task's; or the model cannot be read, has no trained head of the
            task's kind, another tokenizer than the corpus's, another number of outputs than the task, or its
            classes in another order.
    """
    task, model = task_of(corpus), load_served(folder)
    head = "ForQuestionAnswering" if task.kind == "spans" else "ForSequenceClassification"
    if not type(model).__name__.endswith(head):
        raise ValueError(
            f"model {folder} is a {type(model).__name__}, task {task.name} needs one {head}; name the export "
            "of a stage that trains a head: teacher, prediction or baseline"
        )
    check_tokenizer(corpus.manifest, load_tokenizer(str(folder), None))
    check_outputs(str(folder), model.config, task)
    return model


def check_outputs(name: str, config: PreTrainedConfig, task: TaskInfo) -> None:
    """Raise ValueError unless a model's outputs are the task's, as far as their names tell.

    Names that the task does not know (``LABEL_0``) tell the number alone; the scores have to tell the rest.
    """
    outputs = [label for _, label in sorted((config.id2label or {}).items())]
    expected = {"classification": len(task.labels), "regression": 1, "spans": 2}[task.kind]
    if len(outputs) != expected:
        raise ValueError(
            f"model {name} has {len(outputs)} outputs ({', '.join(outputs)}), task {task.name} needs "
            f"{expected}; name a model that was trained on this task"
        )
    classes, own = ([label.lower() for label in labels] for labels in (task.labels, outputs))
    if classes != own and sorted(classes) == sorted(own):
        raise ValueError(
            f"model {name} has the classes in the order {', '.join(outputs)}, the corpus in the order "
            f"{', '.join(task.labels)}; build the corpus with labels=[{','.join(outputs)}]"
        )


def predict(forward: Forward, corpus: Corpus, split: str, batch_rows: int) -> NDArray[np.float32]:
    """Return a model's outputs for all rows of a split, in their order.

    Rows of similar length share a micro batch, which is trimmed to its longest row. So int8 models, which
    choose the scale of their activations by micro batch, depend on ``batch_rows`` a little.

    Args:
        forward: the model (``trainer.served``).
        batch_rows: rows of a micro batch.

    Returns:
        float32 [n, C] logits; for spans [n, S, 2], of start and end, -inf at padding.

    Raises:
        CorpusError: the split is not there or damaged.
    """
    rows, read_rows, seq_len = corpus.split(split).rows, batch_rows * SORTED_BATCHES, corpus.manifest.seq_len
    found = []
    for read in sequential(corpus, split, rows=rows, batch_rows=read_rows, rank=0, world_size=1):
        order_B = read.length_B.argsort(descending=True, stable=True)
        outputs = []
        for chosen in order_B.split(batch_rows):
            longest = int(read.length_B[chosen[0]])
            index_S = torch.arange(longest)
            mask_BS = index_S < read.length_B[chosen, None]
            types_BS = (index_S >= read.segment_B[chosen, None]) & mask_BS
            ids_BS = read.ids_BS[chosen, :longest]
            named = forward(ids_BS.numpy(), mask_BS.long().numpy(), types_BS.long().numpy())
            outputs.append(_joined(named, mask_BS.numpy(), seq_len))
        found.append(np.concatenate(outputs)[order_B.argsort().numpy()])
    return np.concatenate(found)


def judge(corpus: Corpus, split: str, logits: NDArray[np.float32]) -> dict[str, float]:
    """Return the metrics of what ``predict`` returned: where answers are texts, those of texts."""
    task = task_of(corpus)
    if task.kind == "spans":
        return metrics.text_score(read_windows(corpus, split), logits)
    return metrics.score(task, logits, read_labels(corpus, split))


def _joined(
    named: dict[str, NDArray[np.float32]], mask_BS: NDArray[np.bool_], seq_len: int
) -> NDArray[np.float32]:
    """The logits; or those of start and end side by side, [B, seq_len, 2]."""
    if "logits" in named:
        return named["logits"]
    spans_BS2 = np.stack([named["start_logits"], named["end_logits"]], axis=-1)
    whole = np.full((len(mask_BS), seq_len, 2), -np.inf, np.float32)
    whole[:, : mask_BS.shape[1]] = np.where(mask_BS[:, :, None], spans_BS2, -np.inf)
    return whole
