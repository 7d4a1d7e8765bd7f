"""The schema of a run (``launcher/general.py``): every key a user can set, its type, default and meaning.

``configs.corpus_schema`` is that of a corpus build. OmegaConf reads both as structured configs;
``configs.load`` merges defaults < YAML < command line into them and reports every problem at once.
``None`` always means "not set"; no number is a sentinel.
"""

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from omegaconf import MISSING


class Precision(Enum):
    """Number format of a model's weights and activations."""

    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


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


class Offload(Enum):
    """Where DeepSpeed keeps a part of the student's state."""

    none = "none"
    cpu = "cpu"


class Quantization(Enum):
    """Number format of the matrix products in the teacher's layers, where it is not its precision."""

    none = "none"
    """That precision throughout."""
    int8 = "int8"
    """Weights by output channel, activations by token as they come. Any device."""
    fp8 = "fp8"
    """e4m3, likewise. CUDA of compute capability 8.9 or newer (Ada, Hopper)."""


class Placement(Enum):
    """Where the teacher's parameters are while it is not computing with them."""

    replicated = "replicated"
    """Whole on every device: fastest."""
    zero3 = "zero3"
    """Partitioned over all ranks' devices (DeepSpeed ZeRO 3), gathered layer by layer."""
    offload = "offload"
    """Partitioned over all ranks' host memory, or files in ``offload_folder``; gathered layer by layer."""


class NonFinite(Enum):
    """What happens when a student's loss or gradient norm is NaN or infinite on any rank."""

    stop = "stop"
    """The student has failed: it is retired and the others go on; the last one ends the run with an error."""
    skip = "skip"
    """Leave the weights as they were, count the step, go on with the next rows."""


class Damaged(Enum):
    """What happens when a block of the corpus does not match its checksums."""

    stop = "stop"
    """End with an error that names shard, member and offset."""
    quarantine = "quarantine"
    """From that step on its rows are masked on all ranks, as padding is. Part of the run's state."""


@dataclass
class TeacherConfig:
    """The large encoder that is distilled. It is never updated."""

    model: str = MISSING
    """Hub name (``bert-base-uncased``) or local folder of a ``transformers`` encoder with its tokenizer."""
    revision: str | None = None
    """Hub revision (branch, tag or commit)."""
    sha256: str | None = None
    """Expected SHA-256 of the weights file ``model.safetensors``; a different file is refused."""
    precision: Precision = Precision.bf16
    """Format of the teacher's forward pass. Nothing is accumulated in it: losses are float32."""
    quantization: Quantization = Quantization.none
    """Quantize the matrix products of the teacher's layers (torchao); ``launcher/preflight.py`` says how far
    its losses then are from float32."""
    compile: bool = False
    """Compile the teacher's layers (torch.compile, static shapes); needs a C++ compiler where it runs."""
    placement: Placement = Placement.replicated
    """Where its parameters are; with zero3 and offload a teacher larger than one device works."""
    offload_folder: str | None = None
    """With ``placement: offload``: a folder on a fast local disk (NVMe) for the partitions, read through the
    page cache; they are gone when the run ends. Not set: host memory."""


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
    """Of the predictions of both models."""
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
    """``random``; ``teacher`` (its embeddings and the mapped layers; needs the teacher's sizes); or the
    folder or hub name of an encoder of the same shape."""
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


@dataclass
class MixtureConfig:
    """One corpus of a mixture."""

    corpus: str = MISSING
    """Folder or URL of the corpus. All corpora of a mixture are built with the same tokenizer."""
    name: str | None = None
    """Names it in metrics; not set: the last part of ``corpus``."""
    weight: float | None = None
    """Share of the run's rows, relative to the other weights; not set, for all or none: the corpus's rows."""


@dataclass
class CacheConfig:
    """The cache of remote corpora on a node's own disk, shared by all its processes and jobs."""

    folder: str | None = None
    """Where it lies; not set: ``tinybert-corpus-cache-UID`` in the system's folder for temporary files
    (``TMPDIR``)."""
    max_bytes: int = 68_719_476_736
    """Most that it may hold; what was used longest ago goes first."""


@dataclass
class DataConfig:
    """The corpora that are read and how."""

    corpus: str | None = None
    """Folder or URL (``s3://``, ``gs://``, ``https://``, anything fsspec reaches) of a corpus that
    ``launcher/corpus.py build`` wrote; it holds ``manifest.json``. Set this or ``mixture``."""
    mixture: list[MixtureConfig] = field(default_factory=list)
    """Several corpora. Those of one ``seq_len`` form a bin; a step draws all its rows from one bin."""
    group_blocks: int = 16
    """Blocks (1,024 rows each) whose rows are shuffled together; memory per reader grows with it."""
    workers: int = 1
    """Reader processes per rank; 0 reads in the training process. The order does not depend on it."""
    prefetch_steps: int = 4
    """Optimizer steps that each reader process prepares ahead."""
    prefetch_blocks: int = 32
    """Remote corpora: blocks beyond the ones in use that are fetched ahead of need."""
    cache: CacheConfig = field(default_factory=CacheConfig)
    """Remote corpora: the node's cache."""
    separate_documents: bool = False
    """Rows that packing filled with several documents: let tokens attend within their own document only, and
    compare attention within it. A document ends at [SEP]."""
    damaged: Damaged = Damaged.stop
    """Policy for a block that does not match its checksums."""


@dataclass
class TrainConfig:
    """Length of the run and arithmetic of its batches."""

    global_batch_rows: int = 256
    """Rows per optimizer step over all ranks."""
    micro_batch_rows: int = 32
    """Rows per forward pass on one rank. ``global_batch_rows`` must be a multiple of this times the
    number of ranks; the quotient is the number of gradient accumulation steps."""
    epochs: float | None = None
    """Length of the run in passes over the corpus. Set this or ``steps``."""
    steps: int | None = None
    """Length of the run in optimizer steps. Set this or ``epochs``."""
    seed: int = 0
    """Seed of the data order, the initial weights and dropout."""
    non_finite: NonFinite = NonFinite.stop
    """Policy for a NaN or infinite loss or gradient norm."""
    max_skipped_steps: int = 10
    """With ``non_finite: skip``: consecutive skipped steps after which a student has failed all the same."""
    deterministic: bool = False
    """Ask torch for deterministic kernels (slower on GPU; CPU float32 is deterministic anyway)."""
    threads: int | None = None
    """CPU threads per rank; not set: the host's cores divided by its local ranks (on CPU only)."""


@dataclass
class DeepSpeedConfig:
    """How DeepSpeed holds the students. The DeepSpeed config is derived from this and ``train``."""

    zero_stage: int = 1
    """0: replicated; 1: optimizer state, 2: and gradients, 3: and parameters partitioned over the ranks."""
    offload_optimizer: Offload = Offload.none
    """Keep optimizer state in host memory (ZeRO 1-3)."""
    offload_parameters: Offload = Offload.none
    """Keep parameters in host memory (ZeRO 3 only)."""
    precision: Precision = Precision.fp32
    """Format of the students' weights and activations; bf16 and fp16 keep float32 master weights."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Merged into the derived DeepSpeed config. Keys that are derived from other settings are refused."""


@dataclass
class EvaluationConfig:
    """Held-out evaluation: the same losses, in evaluation mode, on rows that training never sees."""

    every_steps: int | None = 500
    """Evaluate after every so many optimizer steps, and at the start and the end; not set: never."""
    rows: int = 2048
    """Rows of the held-out split to use, from its start; all of them when it holds fewer."""


@dataclass
class CheckpointConfig:
    """When the run is saved and how many saves are kept."""

    every_steps: int | None = 500
    """Save after every so many optimizer steps, and at the end; not set: only at the end."""
    keep_last: int = 2
    """Complete checkpoints to keep; older ones are removed only after a newer one is complete."""


@dataclass
class LogConfig:
    """Progress on the terminal and metrics in MLflow."""

    every_steps: int = 10
    """Optimizer steps per logged point; every point covers all steps since the one before."""


@dataclass
class TrackingConfig:
    """MLflow."""

    enabled: bool = True
    """Track this run in MLflow."""
    uri: str | None = None
    """Tracking server or store (``http://host:5000``, ``sqlite:///path/mlflow.db``); not set:
    ``MLFLOW_TRACKING_URI``, else an SQLite store in ``mlflow/`` beside the run folders."""
    experiment: str = "distillation"
    """Experiment name: one per project."""
    run_name: str | None = None
    """Name of the run in the UI; not set: the run's ``name``."""
    tags: dict[str, str] = field(default_factory=dict)
    """Further tags."""
    system_metrics: bool = True
    """Log CPU, memory, disk, network and GPU use."""
    log_models: bool = True
    """Log the exported students as artifacts."""


@dataclass
class RunConfig:
    """One general distillation job: a teacher, its students, a corpus."""

    name: str = MISSING
    """Name of the run."""
    output: str = MISSING
    """Run folder: resolved config, checkpoints, exported students. Started again, the run resumes from it."""
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    """The teacher."""
    students: list[StudentConfig] = MISSING
    """The students; all learn from the same teacher forward pass."""
    data: DataConfig = field(default_factory=DataConfig)
    """The corpus."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """Length and batches."""
    deepspeed: DeepSpeedConfig = field(default_factory=DeepSpeedConfig)
    """DeepSpeed."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    """Held-out evaluation."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """Checkpoints."""
    log: LogConfig = field(default_factory=LogConfig)
    """Progress and metrics."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    """MLflow."""
