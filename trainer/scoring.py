"""Scoring: a task model's outputs on the rows of a task corpus, through PyTorch or ONNX Runtime.

Letters: n rows of a split, B rows of a micro batch, S sequence, C outputs (classes, or 1 for a value).
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import (
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
)

from sharding.manifest import Corpus, TaskInfo
from sharding.stream import sequential
from sharding.tokens import check_tokenizer

SORTED_BATCHES = 64
"""Micro batches whose rows are sorted by length together, so that little of them is padding."""


class Session(Protocol):
    """An ONNX Runtime ``InferenceSession``, as far as it is used."""

    def get_inputs(self) -> Sequence[Any]:
        """Return the graph's inputs, each with its ``name``."""

    def run(self, output_names: Any, input_feed: dict[str, NDArray[Any]]) -> Sequence[NDArray[Any]]:
        """Return the outputs: the logits, or those of start and end."""


def load_model(folder: str, corpus: Corpus) -> PreTrainedModel:
    """Load the model of a task from a ``transformers`` folder or hub name, ready to score ``corpus``: in
    float32, on CPU, in evaluation mode.

    Raises:
        ValueError: it cannot be read, has no trained head, another tokenizer than the corpus's, another
            number of outputs than the task, or its classes in another order.
    """
    task = corpus.manifest.task
    if task is None:
        raise ValueError(
            f"corpus {corpus.store.location} holds no task, so nothing can be scored on it; build one with "
            "`python launcher/task.py stage=data`"
        )
    auto = AutoModelForQuestionAnswering if task.kind == "spans" else AutoModelForSequenceClassification
    try:
        model, report = auto.from_pretrained(
            folder,
            dtype=torch.float32,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"model {folder} cannot be read as one for a task: {error}") from error
    if report["missing_keys"]:
        raise ValueError(
            f"model {folder} lacks weights of a {task.kind} model, such as "
            f"{sorted(report['missing_keys'])[0]}; they would be random. Name the export of a stage that "
            "trains the head: teacher, prediction or baseline"
        )
    check_tokenizer(corpus.manifest, tokenizer)
    check_outputs(folder, model.config.id2label, task)
    return model.eval()


def check_outputs(name: str, id2label: dict[int, str], task: TaskInfo) -> None:
    """Raise ValueError unless a model's outputs are the task's, as far as their names tell.

    Names that the task does not know (``LABEL_0``) tell the number alone; the scores have to tell the rest.
    """
    outputs = [id2label[number] for number in sorted(id2label)]
    expected = {"classification": len(task.labels), "regression": 1, "spans": 2}[task.kind]
    if len(outputs) != expected:
        raise ValueError(
            f"model {name} has {len(outputs)} outputs ({', '.join(outputs)}), task {task.name} needs "
            f"{expected}; name a model that was trained on this task"
        )
    classes = [label.lower() for label in task.labels]
    if classes != (own := [label.lower() for label in outputs]) and sorted(classes) == sorted(own):
        raise ValueError(
            f"model {name} has the classes in the order {', '.join(outputs)}, the corpus in the order "
            f"{', '.join(task.labels)}; build the corpus with labels=[{','.join(outputs)}]"
        )


@torch.no_grad()
def predict(
    model: PreTrainedModel | Session, corpus: Corpus, split: str, batch_rows: int, device: torch.device
) -> NDArray[np.float32]:
    """Return a model's outputs for all rows of a split, in their order.

    Rows of similar length share a micro batch, which is trimmed to its longest row.

    Args:
        model: of ``transformers``, in evaluation mode and on ``device``; or a session of ONNX Runtime, which
            has a device of its own.
        batch_rows: rows of a micro batch.

    Returns:
        float32 [n, C] logits; for spans [n, S, 2], of start and end, -inf at padding.

    Raises:
        CorpusError: the split is not there or damaged.
    """
    logits = _through_torch(model, device) if isinstance(model, PreTrainedModel) else _through_onnx(model)
    rows, found = corpus.split(split).rows, []
    for read in sequential(
        corpus, split, rows=rows, batch_rows=batch_rows * SORTED_BATCHES, rank=0, world_size=1
    ):
        order_B = read.length_B.argsort(descending=True, stable=True)
        outputs = []
        for chosen in order_B.split(batch_rows):
            longest = int(read.length_B[chosen[0]])
            index_S = torch.arange(longest)
            mask_BS = index_S < read.length_B[chosen, None]
            types_BS = (index_S >= read.segment_B[chosen, None]) & mask_BS
            output = logits(read.ids_BS[chosen, :longest], mask_BS.long(), types_BS.long()).float()
            if output.dim() == 3:  # spans: of every token
                output = output.masked_fill(~mask_BS[:, :, None], -torch.inf)
                missing = corpus.manifest.seq_len - longest
                output = torch.nn.functional.pad(output, (0, 0, 0, missing), value=-torch.inf)
            outputs.append(output)
        found.append(torch.cat(outputs)[order_B.argsort()])
    return torch.cat(found).numpy()


Logits = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Ids, mask and token types, int64 [B, S] on CPU -> logits on CPU: [B, C], or [B, S, 2]."""


def _through_torch(model: PreTrainedModel, device: torch.device) -> Logits:
    several_types = getattr(model.config, "type_vocab_size", 0) > 1
    takes_types = several_types and "token_type_ids" in inspect.signature(model.forward).parameters

    def logits(ids_BS: Tensor, mask_BS: Tensor, types_BS: Tensor) -> Tensor:
        inputs = {"input_ids": ids_BS, "attention_mask": mask_BS}
        if takes_types:
            inputs["token_type_ids"] = types_BS
        output = model(**{name: value.to(device) for name, value in inputs.items()})
        parts = [output.logits] if "logits" in output else [output.start_logits, output.end_logits]
        return _joined([part.cpu() for part in parts])

    return logits


def _through_onnx(session: Session) -> Logits:
    taken = {entry.name for entry in session.get_inputs()}

    def logits(ids_BS: Tensor, mask_BS: Tensor, types_BS: Tensor) -> Tensor:
        inputs = {"input_ids": ids_BS, "attention_mask": mask_BS, "token_type_ids": types_BS}
        feed = {name: value.numpy() for name, value in inputs.items() if name in taken}
        return _joined([torch.from_numpy(part) for part in session.run(None, feed)])

    return logits


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """The logits, or those of start and end [B, S] side by side."""
    return parts[0] if len(parts) == 1 else torch.stack(list(parts), dim=-1)
