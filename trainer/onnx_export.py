"""ONNX: a model as one file that ONNX Runtime serves, in float32 and in int8.

Letters: B rows, S sequence.
"""

import contextlib
import logging
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from onnxruntime.quantization import QuantType, quantize_dynamic
from torch import Tensor, nn
from transformers import PreTrainedModel

from trainer.latency import random_rows
from trainer.served import UNTRAINED, Ids, input_names, onnx_forward, open_session, torch_forward

TOLERANCE = 1e-4
"""How far ONNX Runtime may be from PyTorch in float32, as a share of the largest output (at least of 1)."""
_OPSET = 18


def export_onnx(model: PreTrainedModel, path: Path) -> float:
    """Write ``model`` (float32, on CPU) as an ONNX file, check it against PyTorch, return the difference.

    Inputs (int64 [batch, sequence], both axes free) and outputs have their names in ``transformers``.

    Raises:
        ValueError: ONNX Runtime differs from PyTorch by more than ``TOLERANCE``.
    """
    names = input_names(model)
    sample = [torch.from_numpy(array) for array in padded_rows(2, 16, model.config.vocab_size)[: len(names)]]
    with torch.inference_mode():
        found = model(**dict(zip(names, sample, strict=True)))
    outputs = [name for name in found if name != UNTRAINED]
    axes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("sequence")}
    with _quietly():
        torch.onnx.export(
            _Positional(model, names, outputs),
            tuple(sample),
            path,
            input_names=names,
            output_names=outputs,
            dynamic_shapes=(tuple(axes for _ in names),),
            opset_version=_OPSET,
            dynamo=True,
            external_data=False,
            verbose=False,
        )
    if (found := difference(model, path)) > TOLERANCE:
        raise ValueError(
            f"{path} computes something else than {type(model).__name__} in PyTorch: outputs differ by "
            f"{found:.1e}, more than {TOLERANCE:.0e}; another release of torch or onnxscript may export it"
        )
    return found


def quantize_int8(source: Path, target: Path) -> None:
    """Write an ONNX file with weights in int8; activations are quantized as they come (dynamic)."""
    with _quietly():
        quantize_dynamic(source, target, weight_type=QuantType.QInt8, per_channel=True)


def difference(model: PreTrainedModel, path: Path) -> float:
    """Return the largest difference of an ONNX file's outputs from PyTorch's, over rows of several shapes.

    As a share of the largest output in PyTorch, or of 1 when that is less. Outputs at padding do not count.
    """
    ours, theirs = onnx_forward(open_session(path)), torch_forward(model)
    longest = min(128, model.config.max_position_embeddings - 2)  # RoBERTa's positions begin at 2
    worst = 0.0
    for rows, seq_len in ((1, 1), (1, longest), (3, 7), (8, longest // 2)):
        batch = padded_rows(rows, seq_len, model.config.vocab_size)
        found = ours(*batch)
        for name, expected in theirs(*batch).items():
            error = np.abs(found[name] - expected)
            if error.shape[:2] == batch[1].shape:  # an output per token
                error[batch[1] == 0] = 0
            worst = max(worst, float(error.max() / max(1.0, np.abs(expected).max())))
    return worst


def padded_rows(rows: int, seq_len: int, vocab_size: int) -> tuple[Ids, Ids, Ids]:
    """Ids, mask and token types, int64 [rows, seq_len]: two segments, from the second row on padding."""
    ids_BS, mask_BS, token_type_BS = random_rows(rows, seq_len, vocab_size)
    index_S = np.arange(seq_len)
    for row in range(rows):
        length = max(1, seq_len - row)
        mask_BS[row] = index_S < length
        token_type_BS[row] = (index_S >= length // 2) & (index_S < length)
    return ids_BS, mask_BS, token_type_BS


class _Positional(nn.Module):
    """A model that takes its inputs by position and gives a tuple."""

    def __init__(self, model: PreTrainedModel, names: Sequence[str], outputs: Sequence[str]) -> None:
        super().__init__()
        self.model, self.names, self.outputs = model, names, outputs

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Return the outputs in their order."""
        found = self.model(**dict(zip(self.names, inputs, strict=True)))
        return tuple(found[name] for name in self.outputs)


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Exporters talk of packages that are not needed here; errors are still raised."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)
