"""The schema of a student: its shape, what it learns and how. See ``configs.schema``."""

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from omegaconf import MISSING


class Projection(Enum):
    """How many matrices carry the student's hidden size to the teacher's (W_e, W_h of the paper)."""

    separate = "separate"
    """One for the embeddings, one shared by all layers (the paper, section 3.1)."""
    shared = "shared"
    """One for the embeddings and all layers together (the released code)."""
    per_layer = "per_layer"
    """One for the embeddings and one per layer (later versions of the released code)."""


class Decay(Enum):
    """Shape of the learning rate after warm-up."""

    linear = "linear"
    cosine = "cosine"
    constant = "constant"


@dataclass
class RelationConfig:
    """MiniLMv2's self-attention relations: of queries, of keys, of values (Wang et al., arXiv:2012.15828)."""

    weight: float = 0.0
    """Weight of each of the three."""
    heads: int | None = None
    """Relation heads: all heads' queries (keys, values) are split anew into so many; must divide both hidden
    sizes. Not set: 48, or the largest number below that divides both."""
    student_layer: int | None = None
    """Student layer that learns; not set: the last."""
    teacher_layer: int | None = None
    """Teacher layer that it learns from; not set: the last. The paper takes one above the middle of large
    teachers."""


@dataclass
class LossConfig:
    """Weights of the terms of L_model (docs/method.md). A weight of 0 switches the term off."""

    embedding: float = 1.0
    """Weight of L_embd, the MSE of the embedding outputs."""
    hidden: float = 1.0
    """Weight of L_hidn, the MSE of the layers' hidden states."""
    attention: float = 1.0
    """Weight of L_attn, the MSE of the attention scores before the softmax."""
    cosine: float = 0.0
    """Weight of the cosine distance of the layers' hidden states (DistilBERT, arXiv:1910.01108)."""
    relation: RelationConfig = field(default_factory=RelationConfig)
    """MiniLMv2's relations, of one layer."""
    prediction: float = 0.0
    """Weight of the divergence of the masked-language-model predictions; needs a teacher with that head."""
    temperature: float = 1.0
    """Of the predictions, and of the task's logits, of both models."""
    logits: float = 0.0
    """Weight of L_pred, the cross entropy of the student's task predictions against the teacher's (squared
    error where the task is regression). Needs a corpus of a task and a teacher fine-tuned on it."""
    labels: float = 0.0
    """Weight of the same against the task's labels."""
    layers: list[float] | None = None
    """lambda_m for the student's layers 1..M; all 1 when not set."""
    attention_heads: int | None = None
    """Number of heads on which student and teacher attention are compared; must divide both head counts.
    Not set: the common count when equal, otherwise the greatest common divisor, refused when that is 1."""


@dataclass
class OptimizerConfig:
    """AdamW (Loshchilov and Hutter, arXiv:1711.05101) and the schedule of its learning rate."""

    lr: float = 1e-4
    """Peak learning rate, reached at the end of warm-up."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    """Exponential decay rates of the first and second moment."""
    eps: float = 1e-8
    """Added to the denominator."""
    weight_decay: float = 0.01
    """Decoupled weight decay; not applied to biases and normalisation weights."""
    max_grad_norm: float | None = 1.0
    """Clip the global gradient norm to this; not set: no clipping."""
    warmup: float = 0.1
    """Share of all optimizer steps over which the rate rises linearly from 0."""
    decay: Decay = Decay.linear
    """Shape after warm-up."""
    min_lr_ratio: float = 0.0
    """The rate at the end, as a share of ``lr``."""


@dataclass
class StudentConfig:
    """One student: its shape, its layer map, its losses, its optimizer."""

    name: str = MISSING
    """Names its folder, its metrics and its MLflow run. Letters, digits, ``-``, ``_`` and ``.``."""
    architecture: str | None = None
    """``transformers`` model type (``bert``, ``roberta``, ...); not set: the teacher's."""
    layers: int = MISSING
    """Number of Transformer layers, M."""
    hidden_size: int = MISSING
    """Width of the hidden states; must be a multiple of ``heads``."""
    heads: int = MISSING
    """Number of attention heads."""
    intermediate_size: int = MISSING
    """Width of the feed-forward layers."""
    overrides: dict[str, Any] = field(default_factory=dict)
    """Further keys of the ``transformers`` config, such as ``hidden_dropout_prob``."""
    compile: bool = False
    """Compile its layers (torch.compile, static shapes); needs a C++ compiler where it runs. On CPU it was
    measured not to pay (docs/LOG.md)."""
    init: str = "random"
    """``random``; ``teacher`` (its embeddings and the mapped layers, not a task's head; needs its sizes); the
    folder or hub name of an encoder of the same shape; or the folder of the same student in a checkpoint
    (``OUTPUT/checkpoints/step-00000500/NAME``): its weights and projections, with a fresh optimizer."""
    layer_map: Any = "uniform"
    """Which teacher layer each student layer learns from: ``uniform`` (g(m) = m N / M), ``last``
    (g(m) = N - M + m), ``skip`` (every other layer from the bottom: g(m) = 2m - 1), or the list
    [g(1), ..., g(M)] with 1 <= g(m) <= N, not decreasing. Layer 0, the embeddings, maps to 0."""
    projection: Projection = Projection.separate
    """How many projection matrices; they are trained with the student and left out of the export."""
    losses: LossConfig = field(default_factory=LossConfig)
    """Weights of the loss terms."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """Optimizer and schedule."""
