"""Capture: what an unmodified ``transformers`` encoder computes on the way, for a student to learn from.

``transformers`` lets a model run with an attention function registered under a name. Ours hands every call
on to the stock SDPA function, and inside ``capture`` also keeps the query, key and value it was given. Hidden
states are kept by hooks on the layers. No modelling code is forked and no attention matrix is formed.

Letters: B rows, S sequence, H heads, D head dim, E hidden dim, L layers, V vocabulary, C classes.
"""

import inspect
from contextvars import ContextVar
from dataclasses import dataclass, field
from enum import Enum
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

ATTENTION_NAME = "recorded_sdpa"
# In rows of up to so many tokens torch's bfloat16 attention on CPU learns slower than its float32 one.
SHORT_ROW = 128
HEAD_DIM_MULTIPLE = 8  # fused attention kernels take head dims that are a multiple of this


class Head(Enum):
    """What an encoder has on top."""

    none = "none"
    masked_lm = "masked_lm"
    """Predictions of masked tokens."""
    sequence = "sequence"
    """One vector of logits for a row: a class, or a number."""
    spans = "spans"
    """Two logits for every token: an answer begins, or ends, there."""


@dataclass(frozen=True)
class Need:
    """What of a forward pass is kept."""

    hidden: frozenset[int] = frozenset()
    """Of 0..L; 0 is the embeddings."""
    scores: frozenset[int] = frozenset()
    """1-based layers whose queries and keys are kept."""
    values: frozenset[int] = frozenset()
    """1-based layers whose values are kept."""
    head: Head = Head.none
    """What the head on top says."""

    def __or__(self, other: "Need") -> "Need":
        assert Head.none in (self.head, other.head) or self.head is other.head, "a model has one head"
        return Need(
            self.hidden | other.hidden,
            self.scores | other.scores,
            self.values | other.values,
            other.head if self.head is Head.none else self.head,
        )

    @classmethod
    def everything(cls, layers: int) -> "Need":
        """All that an encoder of so many layers without a head leaves behind."""
        each = frozenset(range(1, layers + 1))
        return cls(each | {0}, each, each)

    def depth(self, layers: int) -> int:
        """How many of an encoder's layers have to run: all of them where the head is needed."""
        return layers if self.head is not Head.none else max((0, *self.hidden, *self.scores, *self.values))

    def ends_in_attention(self, layers: int) -> bool:
        """Tell whether the last layer that runs is done once its queries, keys and values are known."""
        return self.head is Head.none and self.depth(layers) not in self.hidden


class Prediction(NamedTuple):
    """Masked-language-model logits [B, S, V] = features @ weight.mT + bias, before they are formed."""

    features_BSE: Tensor
    weight_VE: Tensor
    bias_V: Tensor | None


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
    values: list[Tensor | None]
    """L tensors [B, H, S, D]."""
    scalings: list[float]
    """L factors: scores before mask and softmax are A = Q K' * scaling; 0 for layers that did not run."""
    prediction: Prediction | None = None
    """Of a masked-language-model head."""
    logits: Tensor | None = None
    """Of a task's head: [B, C], or [B, S, 2] for spans."""


@dataclass
class _Recording:
    need: Need
    layers: int
    stop: bool  # end the forward pass in the last layer's attention, where the rest of it is not needed
    calls: int = 0
    hidden: list[Tensor | None] = field(init=False)
    queries: list[Tensor | None] = field(init=False)
    keys: list[Tensor | None] = field(init=False)
    values: list[Tensor | None] = field(init=False)
    scalings: list[float] = field(init=False)
    prediction: Prediction | None = None
    logits: Tensor | None = None

    def __post_init__(self) -> None:
        self.hidden = [None] * (self.layers + 1)
        self.queries, self.keys = [None] * self.layers, [None] * self.layers
        self.values = [None] * self.layers
        self.scalings = [0.0] * self.layers

    def attention(self, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> None:
        self.calls += 1
        if self.calls > self.layers:
            return  # ``_check`` reports it
        index = self.calls - 1
        self.scalings[index] = scaling
        if self.calls in self.need.scores:
            self.queries[index], self.keys[index] = query, key
        if self.calls in self.need.values:
            self.values[index] = value
        if self.stop and self.calls == self.need.depth(self.layers):
            raise _Complete


class _Complete(Exception):
    """Everything needed has been recorded."""


# A context variable, so that nothing is recorded when the backward pass runs a checkpointed layer again.
_recording: ContextVar[_Recording | None] = ContextVar("recording", default=None)


@torch.compiler.disable
def _recorded_sdpa(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Stock SDPA attention; inside ``capture``, query, key and value are kept as well."""
    scaling = kwargs.get("scaling")
    scaling = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
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
        recording.attention(query, key, value, scaling)
    dim = query.shape[-1]
    if query.device.type == "cuda" and (missing := -dim % HEAD_DIM_MULTIPLE):
        # Zeros change neither scores nor output; without them a head of 26 falls to the slowest kernel.
        query, key, value = (nn.functional.pad(x, (0, missing)) for x in (query, key, value))
        kwargs["scaling"] = scaling
    dtype, on_cpu = query.dtype, query.device.type == "cpu"
    if on_cpu and dtype == torch.bfloat16 and query.requires_grad and query.shape[2] <= SHORT_ROW:
        query, key, value = query.float(), key.float(), value.float()
    output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    return output[..., :dim].to(dtype), None


AttentionInterface.register(ATTENTION_NAME, _recorded_sdpa)
AttentionMaskInterface.register(ATTENTION_NAME, sdpa_mask)


def enable_capture(model: PreTrainedModel) -> None:
    """Switch an encoder, with or without a masked-language-model head, to being recorded.

    Its outputs stay those of the SDPA path, but for the logits of a head, which are no longer formed: its
    output then holds their features instead (``Prediction``).
    Raises ValueError when the model's attention is not replaceable, as that of MPNet.
    """
    if model.config._attn_implementation == ATTENTION_NAME:
        return
    model.set_attn_implementation(ATTENTION_NAME)
    if model.config._attn_implementation != ATTENTION_NAME:
        raise ValueError(
            f"model type {model.config.model_type!r} ({type(model).__name__}) does not route its attention "
            "through the transformers attention interface, so queries and keys cannot be captured; use an "
            "encoder that does, such as bert, roberta, distilbert, electra or modernbert"
        )
    for index, layer in enumerate(layers_of(model)):
        layer.register_forward_pre_hook(partial(_record_input, index), with_kwargs=True)
    model.base_model.register_forward_hook(_record_output)
    if (decoder := _decoder(model)) is not None:
        decoder.forward = partial(_record_prediction, decoder)  # type: ignore[method-assign]


def layers_of(model: PreTrainedModel) -> nn.ModuleList:
    """The encoder's list of Transformer layers, whatever the architecture calls it."""
    depth = model.config.num_hidden_layers
    return next(
        module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) == depth
    )


def compile_layers(layers: nn.ModuleList) -> None:
    """Compile an encoder's layers for the shapes they meet; attention itself, which is recorded, is left out.

    Layer by layer, one compilation serves all of them, and hooks see what goes in and out.
    """
    for layer in layers:
        layer.forward = torch.compile(layer.forward, dynamic=False)


def shorten(model: PreTrainedModel, depth: int) -> None:
    """Take the layers after the first ``depth`` out of an encoder that was given to ``enable_capture``.

    The layer that follows is hollowed out and hands on what it is given, so that it is still recorded.
    """
    layers = layers_of(model)
    hollow: Any = layers[depth]
    del layers[depth + 1 :]
    for name in [name for name, _ in hollow.named_children()]:
        delattr(hollow, name)
    hollow.forward = _hand_on


def capture(
    model: nn.Module,
    ids_BS: Tensor,
    mask: Any = None,
    token_type_BS: Tensor | None = None,
    *,
    need: Need | None = None,
    may_stop: bool = False,
) -> Captured:
    """Run an encoder and return what it computed on the way.

    model: an encoder given to ``enable_capture``, or a wrapper around it (its ``module`` attribute) that
        hands keyword arguments on. The wrapper itself is called, so its hooks run.
    ids_BS: integer token ids.
    mask: what may be attended to, as the encoder takes it: None for everything, [B, S] true or 1 for valid
        tokens, [B, 1, S, S] true for pairs.
    token_type_BS: segment ids; passed on only to an encoder with more than one token type.
    need: what is kept; None keeps everything but a head's prediction.
    may_stop: the forward pass may end in the attention of the last layer that is needed, by an exception.

    Works in training and evaluation mode, with and without gradients, and under non-reentrant gradient
    checkpointing. Collective wherever the wrapper's forward pass is.
    Raises ValueError when the number of attention calls is not the number of layers, or
    when reentrant checkpointing cut queries and keys off from the gradient.
    """
    encoder = _encoder(model)
    layers = encoder.config.num_hidden_layers
    inputs = {"input_ids": ids_BS, "attention_mask": _by_layer_type(encoder, mask)}
    if token_type_BS is not None and _takes_token_types(encoder):
        inputs["token_type_ids"] = token_type_BS
    need = Need.everything(layers) if need is None else need
    recording = _Recording(need, layers, stop=may_stop and need.ends_in_attention(layers))
    token = _recording.set(recording)
    try:
        output = model(**inputs)
        recording.logits = _task_logits(output, need.head)
    except _Complete:
        pass
    finally:
        _recording.reset(token)
    _check(recording, encoder)
    names = ("hidden", "queries", "keys", "values", "scalings", "prediction", "logits")
    return Captured(**{name: getattr(recording, name) for name in names})


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


def _record_input(index: int, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """The input of layer ``index`` + 1 is hidden state ``index``."""
    if (recording := _recording.get()) is not None and index in recording.need.hidden:
        recording.hidden[index] = args[0] if args else kwargs["hidden_states"]


def _record_output(encoder: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    if (recording := _recording.get()) is not None and recording.layers in recording.need.hidden:
        recording.hidden[-1] = output[0]


def _record_prediction(decoder: nn.Linear, features_BSE: Tensor) -> Tensor:
    if (recording := _recording.get()) is not None and recording.need.head is Head.masked_lm:
        # Views: where the parameters are partitioned, they are whole only here.
        bias_V = decoder.bias if decoder.bias is None else decoder.bias.view_as(decoder.bias)
        recording.prediction = Prediction(features_BSE, decoder.weight.view_as(decoder.weight), bias_V)
    return features_BSE


def _task_logits(output: Any, head: Head) -> Tensor | None:
    if head is Head.spans:
        return torch.stack((output.start_logits, output.end_logits), dim=-1)
    logits: Tensor | None = output.logits if head is Head.sequence else None
    return logits


def _hand_on(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return hidden_states


def _decoder(model: PreTrainedModel) -> nn.Linear | None:
    """The last layer of a masked-language-model head, None for an encoder without one."""
    found = model.get_output_embeddings()
    return found if isinstance(found, nn.Linear) else None


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


def _by_layer_type(encoder: PreTrainedModel, mask: Tensor | None) -> Any:
    """A mask of pairs is taken as it is, so layers that see a window only (ModernBERT) get their own."""
    if (
        mask is None
        or mask.dim() == 2
        or "sliding_attention" not in getattr(encoder.config, "layer_types", ())
    ):
        return mask
    index_S = torch.arange(mask.shape[-1], device=mask.device)
    near_SS = (index_S[:, None] - index_S).abs() <= encoder.config.sliding_window
    return {"full_attention": mask, "sliding_attention": mask & near_SS}


def _check(recording: _Recording, encoder: PreTrainedModel) -> None:
    need, depth = recording.need, recording.need.depth(recording.layers)
    states = sum(state is not None for state in recording.hidden)
    if not depth <= recording.calls <= recording.layers or states != len(need.hidden):
        raise ValueError(
            f"model type {encoder.config.model_type!r}: captured {recording.calls} attention calls and "
            f"{states} hidden states from {depth} of {recording.layers} layers; expected one call a layer "
            f"and {len(need.hidden)} states. Was enable_capture called?"
        )
    for entering, query in zip(recording.hidden, recording.queries, strict=False):
        if entering is not None and query is not None and entering.requires_grad > query.requires_grad:
            raise ValueError(
                "queries are cut off from the gradient, as reentrant checkpointing does: checkpoint with "
                "use_reentrant=False"
            )
