"""The schema: every key a user can set, its type, its default and its meaning.

Two roots exist, one per job: ``RunConfig`` (general distillation, ``launcher/general.py``) and
``CorpusConfig`` (corpus build, ``launcher/corpus.py``). OmegaConf reads them as structured configs;
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


class NonFinite(Enum):
    """What happens when a student's loss or gradient norm is NaN or infinite on any rank."""

    stop = "stop"
    """End with an error; the newest checkpoint is from before that step."""
    skip = "skip"
    """Leave the weights as they were, count the step, go on with the next rows."""


class Packing(Enum):
    """How documents fill rows."""

    full = "full"
    """Rows are filled across document ends; only the last row of a split can hold padding."""
    document = "document"
    """A row never leaves its document; a document's last row is padded."""


class SourceKind(Enum):
    """What kind of text a corpus is built from."""

    mediawiki = "mediawiki"
    """A MediaWiki XML export, .xml or .xml.bz2, as Wikimedia publishes it."""
    jsonl = "jsonl"
    """One JSON object per line with a text field (.jsonl, .jsonl.gz, .jsonl.bz2, .jsonl.xz)."""
    text = "text"
    """Plain text (optionally .gz, .bz2, .xz); documents are separated by blank lines, or one per line."""
    datasets = "datasets"
    """A Hugging Face ``datasets`` text dataset by hub name or local folder."""


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


@dataclass
class LossConfig:
    """Weights of the terms of L_model (DESIGN: section 2). A weight of 0 switches the term off."""

    embedding: float = 1.0
    """Weight of L_embd, the MSE of the embedding outputs."""
    hidden: float = 1.0
    """Weight of L_hidn, the MSE of the layers' hidden states."""
    attention: float = 1.0
    """Weight of L_attn, the MSE of the attention scores before the softmax."""
    layers: list[float] | None = None
    """lambda_m for the student's layers 1..M; all 1 when not set."""
    relation_heads: int | None = None
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
class DataConfig:
    """The corpus that is read and how."""

    corpus: str = MISSING
    """Folder that ``launcher/corpus.py build`` wrote (it holds ``manifest.json``)."""
    group_blocks: int = 16
    """Blocks (1,024 rows each) whose rows are shuffled together; memory per reader grows with it."""
    workers: int = 1
    """Reader processes per rank; 0 reads in the training process. The order does not depend on it."""
    prefetch_steps: int = 4
    """Optimizer steps that each reader process prepares ahead."""


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
    """With ``non_finite: skip``: consecutive skipped steps after which the run stops all the same."""
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


@dataclass
class SourceConfig:
    """Where the text comes from."""

    kind: SourceKind = MISSING
    """What the source is."""
    path: str = MISSING
    """File, folder or glob of files in sorted order; for ``datasets`` a hub name or a local folder."""
    subset: str | None = None
    """``datasets`` only: configuration name, such as ``20231101.en``."""
    split: str = "train"
    """``datasets`` only: split."""
    revision: str | None = None
    """Revision of the source, kept in the manifest: a dump date, a hub commit."""
    text_field: str = "text"
    """``jsonl`` and ``datasets``: field that holds the text."""
    id_field: str | None = None
    """``jsonl`` and ``datasets``: field that identifies the document; not set: file name and position."""
    one_per_line: bool = False
    """``text`` only: every line is a document; otherwise blank lines separate documents."""


@dataclass
class CorpusConfig:
    """One corpus build."""

    output: str = MISSING
    """Folder of the corpus. Written beside it under a temporary name and renamed when complete."""
    source: SourceConfig = field(default_factory=SourceConfig)
    """The text."""
    tokenizer: str = MISSING
    """Hub name or local folder of the teacher's tokenizer (a fast tokenizer)."""
    tokenizer_revision: str | None = None
    """Hub revision of the tokenizer."""
    seq_len: int = 128
    """Most tokens in a row, special tokens included."""
    packing: Packing = Packing.full
    """How documents fill rows."""
    min_document_chars: int = 200
    """Documents whose clean text is shorter are left out."""
    max_documents: int | None = None
    """Stop after so many documents of the source (redirects and empty pages not counted)."""
    heldout_share: float = 0.005
    """Share of the documents that goes to the held-out split, chosen by a hash of the document id."""
    block_rows: int = 1024
    """Rows in one tar member."""
    max_shard_bytes: int = 134_217_728
    """A shard is closed before it would grow past this size."""
    processes: int | None = None
    """Worker processes; not set: one per core. The output does not depend on it."""
    overwrite: bool = False
    """Replace an existing corpus at ``output``; without it an existing corpus is an error."""
