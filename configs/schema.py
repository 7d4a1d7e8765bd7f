"""The schema of a run (``launcher/general.py``): every key a user can set, its type, default and meaning.

``configs.student_schema`` is that of its students, ``configs.corpus_schema`` that of a corpus build.
OmegaConf reads them as structured configs; ``configs.load`` merges defaults < YAML < command line into them
and reports every problem at once. ``None`` always means "not set"; no number is a sentinel.
"""

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from omegaconf import MISSING

from configs.student_schema import StudentConfig


class Precision(Enum):
    """Number format of a model's weights and activations."""

    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


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
    rollback = "rollback"
    """Go back to the newest checkpoint, all students, and on from there, the failed one at a lower rate."""


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
    logits_folder: str | None = None
    """Where students learn nothing of the teacher but a task's logits: compute these once for all rows and
    keep them in this folder, which any number of runs can share. Not set: the teacher runs at every step."""


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
    max_rollbacks: int = 3
    """With ``non_finite: rollback``: rollbacks of one student after which it has failed all the same."""
    rollback_lr_factor: float = 0.5
    """With ``non_finite: rollback``: the student's learning rate is multiplied by this at every rollback."""
    max_hours: float | None = None
    """Save and leave after so many hours of this process (exit code 75: start it again); not set: never."""
    elastic: bool = False
    """Allow any number of ranks: their rows of a step then differ by one at most, in micro batches of
    ``micro_batch_rows`` or fewer. Off: a number of ranks that does not divide is refused."""
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
class ProbeConfig:
    """Linear probes: what students' last hidden states tell of small tasks, logged beside the losses."""

    every_steps: int | None = None
    """Probe after every so many optimizer steps, and at the start (the teacher too) and the end; not set:
    never."""
    tasks: list[str] = field(default_factory=list)
    """Folders of task corpora (classification or regression), built with the teacher's tokenizer."""
    rows: int = 2048
    """Training rows of a task to learn from, evenly spaced; its held-out rows up to 2,048 judge."""


@dataclass
class CheckpointConfig:
    """When the run is saved and how many saves are kept."""

    every_steps: int | None = 500
    """Save after every so many optimizer steps, and at the end; not set: only at the end."""
    keep_last: int = 2
    """Newest complete checkpoints to keep; older ones are removed only after a newer one is complete."""
    keep_every_steps: int | None = None
    """Keep those at multiples of so many steps as well, for good."""
    keep_best: bool = False
    """Keep, for each student, the one with the lowest held-out loss as well."""
    background: bool = True
    """Write while training goes on: a step then waits for the copy to host memory only."""


@dataclass
class TimeoutConfig:
    """How long silence may last before it counts as a failure. Every rank then prints its stacks and ends."""

    start_s: float = 1800.0
    """Until all ranks have met, and between stations on the way to the first step (loading, compiling)."""
    step_s: float = 600.0
    """Between two steps, two micro batches of an evaluation, or within a save; also for every collective."""


@dataclass
class LogConfig:
    """Progress on the terminal and metrics in MLflow."""

    every_steps: int = 10
    """Optimizer steps per logged point; every point covers all steps since the one before."""
    report: bool = True
    """Write OUTPUT/report.html at the end (``launcher/report.py``)."""


@dataclass
class TrackingConfig:
    """MLflow."""

    enabled: bool = True
    """Track this run in MLflow."""
    uri: str | None = None
    """Tracking server or store (``http://host:5000``, ``sqlite:///path/mlflow.db``); not set:
    ``MLFLOW_TRACKING_URI``, else an SQLite store in ``folder``."""
    folder: str | None = None
    """Folder of the store when no server is named; not set: ``mlflow/`` beside the run folder, and for a
    task's stages beside the task's, so that all runs under one folder share a store."""
    experiment: str = "distillation"
    """Experiment name: one per project."""
    run_name: str | None = None
    """Name of the run in the UI; not set: the run's ``name``."""
    under: list[str] = field(default_factory=list)
    """Runs that this one hangs under, outermost first, by name, such as [wiki-2026, sst2]; found in the
    experiment or made."""
    tags: dict[str, str] = field(default_factory=dict)
    """Further tags."""
    system_metrics: bool = True
    """Log CPU, memory, disk, network and GPU use of every node."""
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
    probes: ProbeConfig = field(default_factory=ProbeConfig)
    """Probes on small tasks."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """Checkpoints."""
    timeouts: TimeoutConfig = field(default_factory=TimeoutConfig)
    """Hung ranks and dead links."""
    log: LogConfig = field(default_factory=LogConfig)
    """Progress and metrics."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    """MLflow."""
