"""Models as they are served: loaded from an exported folder or an ONNX file, called with host arrays.

A ``Forward`` is called with int64 [B, S] arrays: token ids, attention mask (1 valid, 0 padding) and token
types (0 segment A, 1 segment B). It gives float32 arrays by the names of the model's outputs: ``logits``
[B, C] (or [B, S, V] of a masked language model), ``start_logits`` and ``end_logits`` [B, S], or of an encoder
without a head ``last_hidden_state`` [B, S, E].

Letters: B rows, S sequence, C classes, E hidden dim, V vocabulary.
"""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

from trainer.encoders import read_config

if TYPE_CHECKING:
    import onnxruntime

Ids: TypeAlias = NDArray[np.int64]
Forward: TypeAlias = Callable[[Ids, Ids, Ids], dict[str, NDArray[np.float32]]]

_HEADS: dict[str, Any] = {  # by the end of a model class's name
    "ForSequenceClassification": AutoModelForSequenceClassification,
    "ForQuestionAnswering": AutoModelForQuestionAnswering,
    "ForMaskedLM": AutoModelForMaskedLM,
}


def load_served(folder: str | Path) -> PreTrainedModel:
    """Return the model of an exported folder with the head that it has: float32, CPU, evaluation mode.

    Raises:
        ValueError: the folder cannot be read, or lacks weights.
    """
    name = (read_config("model", str(folder)).architectures or [""])[0]
    auto = next((own for ending, own in _HEADS.items() if name.endswith(ending)), AutoModel)
    try:
        model, report = auto.from_pretrained(
            folder,
            dtype=torch.float32,
            use_safetensors=True,
            weights_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except (OSError, SafetensorError) as error:
        raise ValueError(f"model={folder} cannot be read: {error}. Name an exported folder") from error
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise ValueError(
            f"model={folder} lacks {len(missing)} weights of a {name}, such as {missing[0]}; they would be "
            "random. Name the export of a finished run"
        )
    return model.eval()


def input_names(model: PreTrainedModel) -> tuple[str, ...]:
    """Return what the model takes of a row; a model with one token type takes none."""
    types = "token_type_ids" in inspect.signature(model.forward).parameters
    types = types and getattr(model.config, "type_vocab_size", 0) > 1
    return ("input_ids", "attention_mask", "token_type_ids") if types else ("input_ids", "attention_mask")


def torch_forward(model: PreTrainedModel) -> Forward:
    """Return the model's call in PyTorch, on the device and in the dtype that it has."""
    names = input_names(model)

    @torch.inference_mode()
    def forward(ids_BS: Ids, mask_BS: Ids, token_type_BS: Ids) -> dict[str, NDArray[np.float32]]:
        arrays = zip(names, (ids_BS, mask_BS, token_type_BS), strict=False)
        outputs = model(**{name: torch.from_numpy(array).to(model.device) for name, array in arrays})
        return {name: value.float().cpu().numpy() for name, value in outputs.items() if name != UNTRAINED}

    return forward


UNTRAINED = "pooler_output"
"""Output of an encoder without a head that says nothing: its layer is trained with a head only."""


def onnx_forward(session: "onnxruntime.InferenceSession") -> Forward:
    """Return the call of a session."""
    names = [given.name for given in session.get_inputs()]
    outputs = [output.name for output in session.get_outputs()]

    def forward(ids_BS: Ids, mask_BS: Ids, token_type_BS: Ids) -> dict[str, NDArray[np.float32]]:
        feed = dict(zip(names, (ids_BS, mask_BS, token_type_BS), strict=False))
        return dict(zip(outputs, session.run(None, feed), strict=True))

    return forward


def open_session(
    path: Path, device: str = "cpu", threads: int | None = None
) -> "onnxruntime.InferenceSession":
    """Open an ONNX file in ONNX Runtime.

    Args:
        device: ``cpu`` or ``cuda``.
        threads: that work on one call; one per core when None.

    Raises:
        ValueError: the ONNX Runtime that is installed does not know the device.
    """
    import onnxruntime  # an extra (``pip install '.[onnx]'``), which PyTorch alone does without

    provider = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}[device]
    if provider not in onnxruntime.get_available_providers():
        raise ValueError(f"device={device}: this onnxruntime has no {provider}; install onnxruntime-gpu")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or 0
    options.log_severity_level = 3  # errors
    # Threads that wait for the next call by spinning take the cores from other models in this process.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return onnxruntime.InferenceSession(path, options, providers=[provider])
