"""Arithmetic of an encoder's forward pass, counted from its shape."""

import time
from typing import Any

import torch

# Weight matrices of hidden_size x intermediate_size in a layer's feed-forward part.
_FEED_FORWARD_MATRICES = {
    "bert": 2,
    "camembert": 2,
    "data2vec-text": 2,
    "distilbert": 2,
    "electra": 2,
    "ernie": 2,
    "esm": 2,
    "eurobert": 3,  # 3 where it is gated: act(x A) * (x B), then back
    "jina_embeddings_v3": 2,
    "modernbert": 3,
    "nomic_bert": 3,
    "roberta": 2,
    "roberta-prelayernorm": 2,
    "xlm-roberta": 2,
    "xlm-roberta-xl": 2,
}


def encoder_forward_flops(config: Any, rows: int, seq_len: int) -> int:
    """Floating-point operations of a forward pass over ``rows`` rows of ``seq_len`` tokens, padding included.

    config: a ``transformers`` config of an encoder. Counted, as 2 operations per multiply-add: all matrix
    products of the layers (projections of query, key, value and output, feed-forward, Q K' and its product
    with V, full also where a layer's window is narrower) and ELECTRA's embedding projection. Not counted:
    embedding look-ups, element-wise work, the pooler. A backward pass costs twice a forward pass.

    Raises ValueError for a model type whose shape is not known here.
    """
    if config.model_type not in _FEED_FORWARD_MATRICES:
        raise ValueError(
            f"model type {config.model_type!r} has no operation count; "
            f"known: {', '.join(_FEED_FORWARD_MATRICES)}"
        )
    hidden = config.hidden_size
    intermediate = config.hidden_dim if config.model_type == "distilbert" else config.intermediate_size
    per_layer = (
        4 * hidden**2
        + _FEED_FORWARD_MATRICES[config.model_type] * hidden * intermediate
        + 2 * seq_len * hidden
    )
    narrow = getattr(config, "embedding_size", hidden)
    projection = narrow * hidden if narrow != hidden else 0
    return 2 * rows * seq_len * (config.num_hidden_layers * per_layer + projection)


def matrix_rate(dtype: torch.dtype, device: torch.device, repeats: int = 8) -> float:
    """Measured rate of a square matrix product on this device, floating-point operations per second.

    The yardstick of ``speed/mfu``: the best of ``repeats`` products, large enough to keep the device busy.
    """
    size = 8192 if device.type == "cuda" else 1024
    a = torch.randn(size, size, device=device).to(dtype)
    best_s = float("inf")
    for _ in range(repeats):
        started_s = time.perf_counter()
        a @ a
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best_s = min(best_s, time.perf_counter() - started_s)
    return 2 * size**3 / best_s
