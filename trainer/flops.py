"""Arithmetic of an encoder's forward pass, counted from its shape."""

from typing import Any

# Weight matrices of hidden_size x intermediate_size in a layer's feed-forward part.
_FEED_FORWARD_MATRICES = {
    "bert": 2,
    "camembert": 2,
    "distilbert": 2,
    "electra": 2,
    "modernbert": 3,  # gated: act(x A) * (x B), then back
    "roberta": 2,
    "xlm-roberta": 2,
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
