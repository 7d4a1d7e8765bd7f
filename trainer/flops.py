"""Arithmetic of a step, counted from the models' shapes; the machine's rate of such arithmetic.

Counted, as 2 operations per multiply-add: all matrix products of the layers that run (projections of query,
key, value and output, feed-forward, Q K' and its product with V, in full where a window is narrow too),
ELECTRA's embedding projection, the student's projections to the teacher's width, and a masked-language-model
head where predictions are distilled, its product with the vocabulary included. Padding is computed like all
else. A backward pass costs twice its forward pass; what kernels compute again there does not count.

Not counted: embedding look-ups, element-wise work, the optimizer, and the losses' own products, which would
make a clumsier loss look like a busier machine.
"""

import time
from typing import Any

import torch

from trainer.capture import Head, Need

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
_BARE_HEADS = {"eurobert"}  # no dense layer before the product with the vocabulary


def teacher_row_flops(config: Any, seq_len: int, need: Need) -> int:
    """Operations of a teacher's forward pass over a row of ``seq_len`` tokens that runs as far as ``need``.

    config: a ``transformers`` config of an encoder.
    Raises ValueError for a model type whose shape is not known here.
    """
    layers = config.num_hidden_layers
    last = need.depth(layers)
    macs = _layers(config, seq_len, last) + _head(config, need)
    if need.ends_in_attention(layers) and last:
        # The last layer that runs is left when its query, key and value are known.
        macs -= _layers(config, seq_len, 1) - 3 * config.hidden_size**2
    return 2 * seq_len * (macs + _embedding(config))


def student_row_flops(config: Any, seq_len: int, need: Need, teacher_hidden_size: int) -> int:
    """Operations of a student's forward and backward pass over a row of ``seq_len`` tokens.

    All layers run; where the last one is compared on attention alone, what comes after it has no gradient,
    which is not taken off here.
    Raises ValueError for a model type whose shape is not known here.
    """
    macs = _layers(config, seq_len, config.num_hidden_layers) + _embedding(config) + _head(config, need)
    macs += len(need.hidden) * config.hidden_size * teacher_hidden_size
    return 3 * 2 * seq_len * macs


def _layers(config: Any, seq_len: int, layers: int) -> int:
    """Multiply-adds per token of so many layers."""
    if config.model_type not in _FEED_FORWARD_MATRICES:
        raise ValueError(
            f"model type {config.model_type!r} has no operation count; "
            f"known: {', '.join(_FEED_FORWARD_MATRICES)}"
        )
    hidden = config.hidden_size
    intermediate = config.hidden_dim if config.model_type == "distilbert" else config.intermediate_size
    feed_forward = _FEED_FORWARD_MATRICES[config.model_type] * hidden * intermediate
    return layers * (4 * hidden**2 + feed_forward + 2 * seq_len * hidden)


def _embedding(config: Any) -> int:
    """Multiply-adds per token of the projection from embeddings that are narrower than the layers."""
    narrow = _embedding_size(config)
    return narrow * config.hidden_size if narrow != config.hidden_size else 0


def _head(config: Any, need: Need) -> int:
    """Multiply-adds per token of the masked-language-model head: a dense layer and the vocabulary."""
    narrow = _embedding_size(config)
    dense = 0 if config.model_type in _BARE_HEADS else config.hidden_size * narrow
    return (dense + narrow * config.vocab_size) * (need.head is Head.masked_lm)


def _embedding_size(config: Any) -> int:
    return int(getattr(config, "embedding_size", config.hidden_size))


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
