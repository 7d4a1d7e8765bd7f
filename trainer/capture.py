"""Capture: hidden states, queries and keys of an unmodified ``transformers`` encoder.

``transformers`` lets a model run with an attention function registered under a name. Ours hands every call
on to the stock SDPA function, and inside ``capture`` also keeps the query and key it was given. No modelling
code is forked and no attention matrix is formed.

Letters: B rows, S sequence, H heads, D head dim, E hidden dim, L layers.
"""

import inspect
from collections.abc import Collection
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

ATTENTION_NAME = "recorded_sdpa"


@dataclass
class Captured:
    """What one forward pass of an encoder of L layers left behind. Entries not asked for are None."""

    hidden: list[Tensor | None]
    """1 + L tensors [B, S, E]: the input of the first layer, then every layer's output. The last one is the
    encoder's final output, after a final normalisation where there is one (ModernBERT). E is the same
    throughout: where embeddings are narrower (ELECTRA), index 0 comes after the encoder's own projection."""
    queries: list[Tensor | None]
    """L tensors [B, H, S, D] as they enter the scores: after rotary embedding where there is one."""
    keys: list[Tensor | None]
    """L tensors [B, H, S, D], likewise."""
    scalings: list[float]
    """L factors: scores before the mask and the softmax are A = Q K' * scaling."""


@dataclass
class _Recording:
    layers: Collection[int] | None
    queries: list[Tensor | None] = field(default_factory=list)
    keys: list[Tensor | None] = field(default_factory=list)
    scalings: list[float] = field(default_factory=list)

    def add(self, query_BHSD: Tensor, key_BHSD: Tensor, scaling: float) -> None:
        self.scalings.append(scaling)
        keep = self.layers is None or len(self.scalings) in self.layers
        self.queries.append(query_BHSD if keep else None)
        self.keys.append(key_BHSD if keep else None)


# A context variable, so that nothing is recorded when the backward pass runs a checkpointed layer again.
_recording: ContextVar[_Recording | None] = ContextVar("recording", default=None)


def _recorded_sdpa(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Stock SDPA attention; inside ``capture``, query and key are kept as well."""
    if (recording := _recording.get()) is not None:
        if query.shape != key.shape:
            raise ValueError(
                f"{type(module).__name__} has queries {tuple(query.shape)} but keys {tuple(key.shape)} "
                "([B, H, S, D]); only self-attention with as many key heads as query heads can be distilled"
            )
        if kwargs.get("position_bias") is not None:
            raise ValueError(
                f"{type(module).__name__} adds a position bias to its scores, which queries and keys do not "
                "show; use an encoder with absolute or rotary positions"
            )
        scaling = kwargs.get("scaling")
        recording.add(query, key, query.shape[-1] ** -0.5 if scaling is None else float(scaling))
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


AttentionInterface.register(ATTENTION_NAME, _recorded_sdpa)
AttentionMaskInterface.register(ATTENTION_NAME, sdpa_mask)


def enable_capture(model: PreTrainedModel) -> None:
    """Switch an encoder to the recording attention function. Its outputs stay those of the SDPA path.

    Raises ValueError when the model's attention is not replaceable, as that of MPNet.
    """
    model.set_attn_implementation(ATTENTION_NAME)
    if model.config._attn_implementation != ATTENTION_NAME:
        raise ValueError(
            f"model type {model.config.model_type!r} ({type(model).__name__}) does not route its attention "
            "through the transformers attention interface, so queries and keys cannot be captured; use an "
            "encoder that does, such as bert, roberta, distilbert, electra or modernbert"
        )


def capture(
    model: nn.Module,
    ids_BS: Tensor,
    mask_BS: Tensor,
    token_type_BS: Tensor | None = None,
    *,
    layers: Collection[int] | None = None,
    hidden: Collection[int] | None = None,
) -> Captured:
    """Run an encoder and return what it computed on the way.

    model: an encoder given to ``enable_capture``, or a wrapper around it (its ``module`` attribute) that
        hands keyword arguments on. The wrapper itself is called, so its hooks run.
    ids_BS: integer token ids. mask_BS: true or 1 for valid tokens.
    token_type_BS: segment ids; passed on only to an encoder with more than one token type.
    layers: 1-based layers whose queries and keys are kept; None keeps all.
    hidden: indices of the hidden states that are kept, 0 for the embeddings; None keeps all.

    Works in training and evaluation mode, with and without gradients, and under non-reentrant gradient
    checkpointing. Collective wherever the wrapper's forward pass is.
    Raises ValueError when the number of attention calls is not the number of layers, or
    when reentrant checkpointing cut queries and keys off from the gradient.
    """
    encoder = _encoder(model)
    inputs = {"input_ids": ids_BS, "attention_mask": mask_BS}
    if token_type_BS is not None and _takes_token_types(encoder):
        inputs["token_type_ids"] = token_type_BS
    recording = _Recording(layers)
    token = _recording.set(recording)
    try:
        # A list of indices, so that the encoder itself lets go of the other hidden states as it runs.
        wanted = True if hidden is None else sorted(hidden)
        output = model(**inputs, output_hidden_states=wanted, return_dict=True)
    finally:
        _recording.reset(token)
    states = list(output.hidden_states) if wanted else [None] * (1 + encoder.config.num_hidden_layers)
    captured = Captured(states, recording.queries, recording.keys, recording.scalings)
    _check(captured, encoder)
    return captured


@torch.no_grad()
def check_supported(model: nn.Module) -> None:
    """Prove on a row of two tokens that ``capture`` works for this model, before a long job relies on it.

    In evaluation mode, so that no random number is drawn. Collective wherever the model's forward pass is.
    Raises ValueError as ``capture`` does.
    """
    encoder, was_training = _encoder(model), model.training
    ids_BS = torch.ones(1, 2, dtype=torch.long, device=encoder.device)
    model.eval()
    try:
        capture(model, ids_BS, torch.ones_like(ids_BS))
    finally:
        model.train(was_training)


def _encoder(model: nn.Module) -> PreTrainedModel:
    """The ``transformers`` model inside wrappers such as a DeepSpeed engine or DistributedDataParallel."""
    inner: Any = model
    while not isinstance(inner, PreTrainedModel):
        if not hasattr(inner, "module"):
            raise ValueError(f"{type(model).__name__} holds no transformers model to capture")
        inner = inner.module
    return inner


def _takes_token_types(encoder: PreTrainedModel) -> bool:
    several = getattr(encoder.config, "type_vocab_size", 0) > 1
    return several and "token_type_ids" in inspect.signature(encoder.forward).parameters


def _check(captured: Captured, encoder: PreTrainedModel) -> None:
    calls, states, layers = len(captured.scalings), len(captured.hidden), encoder.config.num_hidden_layers
    if calls != layers or states != layers + 1:
        raise ValueError(
            f"model type {encoder.config.model_type!r}: captured {calls} attention calls and {states} hidden "
            f"states from {layers} layers; expected one call a layer and one state more. "
            "Was enable_capture called?"
        )
    for entering, query in zip(captured.hidden, captured.queries, strict=False):
        if entering is not None and query is not None and entering.requires_grad > query.requires_grad:
            raise ValueError(
                "queries are cut off from the gradient, as reentrant checkpointing does: checkpoint with "
                "use_reentrant=False"
            )
