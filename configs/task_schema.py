"""The schema of task distillation (``launcher/task.py``): one config for all stages of one task.

The stages, each of which reads what the ones before left under ``output``:

    data           the task's examples as a corpus with labels             OUTPUT/data
    teacher        the pretrained teacher, fine-tuned on the labels        OUTPUT/teacher/export/teacher
    augment        more examples: words replaced (TinyBERT, section 3.2)   OUTPUT/augmented
    intermediate   students learn the teacher's layers                     OUTPUT/intermediate/export/STUDENT
    prediction     students learn the teacher's predictions                OUTPUT/prediction/export/STUDENT
    baseline       the same students, fine-tuned without a teacher         OUTPUT/baseline/export/STUDENT

``configs.task`` derives the ``RunConfig`` of a training stage. Published values are those of Jiao et al.
2019, arXiv:1909.10351, section 4.1 (fine-tuning: Devlin et al. 2018, arXiv:1810.04805, appendix A.3).
"""

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from omegaconf import MISSING

from configs.schema import (
    CheckpointConfig,
    DataConfig,
    DeepSpeedConfig,
    EvaluationConfig,
    LogConfig,
    Precision,
    TeacherConfig,
    TimeoutConfig,
    TrackingConfig,
)
from configs.student_schema import LossConfig, OptimizerConfig, StudentConfig


class TaskKind(Enum):
    """What a model says of an example."""

    classification = "classification"
    """One of several classes."""
    regression = "regression"
    """A number."""
    spans = "spans"
    """Where an answer begins and ends in a context (SQuAD 1.1)."""


class Start(Enum):
    """What students start the prediction stage from."""

    intermediate = "intermediate"
    """What they have learned in the intermediate stage."""
    init = "init"
    """Their own ``init``: the intermediate stage is left out."""


@dataclass
class TaskSourceConfig:
    """Where a task's examples are. The nine GLUE tasks and SQuAD need the path alone."""

    path: str = MISSING
    """Folder with the task's files (GLUE's TSV, parquet, JSONL, CSV; SQuAD's JSON), or a hub name."""
    subset: str | None = None
    """Hub only: configuration; not set: for ``glue`` the task's own."""
    revision: str | None = None
    """Hub only: revision."""
    train: str | None = None
    """File or hub split of training examples; not set: the one whose name begins with ``train``."""
    dev: list[str] | None = None
    """Files or hub splits to evaluate on; not set: those whose names begin with ``dev`` or ``validation``.
    The first is the corpus's split ``heldout``; MNLI's mismatched one becomes ``heldout-mismatched``."""
    columns: list[str] | None = None
    """Columns of the text, or of the two texts of a pair; not set: the task's own."""
    label: str | None = None
    """Column of the label; not set: the task's own, else ``label``."""


@dataclass
class AugmentationConfig:
    """Data augmentation (TinyBERT, section 3.2 and algorithm 1)."""

    per_example: int | None = None
    """Examples made of each one, N_a; not set: the task's own in the released code (10 to 30), else 20."""
    probability: float = 0.4
    """Probability of a word to be replaced, p_t."""
    candidates: int = 15
    """Words to choose from, K."""
    masked_lm: str | None = None
    """Hub name or folder of the masked language model that proposes words for words of one piece; not set:
    word vectors propose for all words."""
    vectors: str | None = None
    """File of GloVe word vectors (``word v1 v2 ...`` per line; .gz, .xz, .zip) for words of several pieces;
    not set: these stay as they are."""
    precision: Precision = Precision.fp32
    """Format of the masked language model's forward pass."""
    batch_tokens: int = 16_384
    """Tokens in one forward pass of the masked language model."""
    part_examples: int = 1000
    """Examples made at a time: a part is a shard, and what an interrupted run repeats at most."""
    seed: int = 0
    """Seed of all choices. The result depends on neither ranks nor interruptions."""


@dataclass
class StageConfig:
    """One training stage."""

    epochs: float | None = None
    """Length in passes over its corpus. Set this or ``steps``."""
    steps: int | None = None
    """Length in optimizer steps."""
    global_batch_rows: int = 32
    """Rows per optimizer step over all ranks."""
    micro_batch_rows: int = 32
    """Rows per forward pass on one rank."""
    augmented: bool = False
    """Train on the augmented corpus."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """Optimizer and schedule; it takes the place of the students' own."""


@dataclass
class HeadStageConfig(StageConfig):
    """One training stage of models with the task's head."""

    losses: LossConfig = field(default_factory=LossConfig)
    """What is learned; it takes the place of the students' own."""


def _teacher_logits() -> LossConfig:
    return LossConfig(embedding=0.0, hidden=0.0, attention=0.0, logits=1.0)


def _labels() -> LossConfig:
    return LossConfig(embedding=0.0, hidden=0.0, attention=0.0, labels=1.0)


def _fine_tuning() -> HeadStageConfig:
    return HeadStageConfig(epochs=3.0, losses=_labels(), optimizer=OptimizerConfig(lr=2e-5))


def _intermediate() -> StageConfig:
    return StageConfig(epochs=20.0, augmented=True, optimizer=OptimizerConfig(lr=5e-5))


def _prediction() -> HeadStageConfig:
    return HeadStageConfig(
        epochs=3.0, augmented=True, losses=_teacher_logits(), optimizer=OptimizerConfig(lr=2e-5)
    )


@dataclass
class TaskConfig:
    """Task distillation of one task."""

    task: str = MISSING
    """``cola``, ``mnli``, ``mrpc``, ``qnli``, ``qqp``, ``rte``, ``sst2``, ``stsb``, ``wnli``, ``squad``, or
    one of your own, which then needs ``kind``, ``source.columns`` and, to classify, ``labels``."""
    output: str = MISSING
    """Folder of all stages."""
    source: TaskSourceConfig = field(default_factory=TaskSourceConfig)
    """The examples."""
    kind: TaskKind | None = None
    """Task of your own: what is said of an example."""
    labels: list[str] | None = None
    """Names of the classes, in the order of the teacher's outputs; not set: the task's own order. Data that
    holds class names is read by them, data that holds numbers (0, 1, ...) by their order."""
    metrics: list[str] | None = None
    """Of ``accuracy``, ``f1``, ``matthews``, ``pearson``, ``spearman``; the first is the score; not set: the
    task's own."""
    seq_len: int = 128
    """Most tokens in a row; published: 64 for single sentences, 128 for pairs."""
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    """The pretrained teacher, from which the stage ``teacher`` starts; its tokenizer serves all."""
    teacher_overrides: dict[str, Any] = field(default_factory=dict)
    """Keys of the teacher's ``transformers`` config when it is fine-tuned: ``hidden_dropout_prob`` ...."""
    students: list[StudentConfig] = field(default_factory=list)
    """The students; ``init`` is the export of a general student, or ``random``."""
    corpus: str | None = None
    """The task's corpus; not set: OUTPUT/data."""
    augmented: str | None = None
    """The augmented corpus; not set: OUTPUT/augmented."""
    finetuned: str | None = None
    """The fine-tuned teacher; not set: OUTPUT/teacher/export/teacher."""
    seed: int = 0
    """Seed of data order, new heads, random students and dropout."""
    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)
    """Stage ``augment``."""
    fine_tuning: HeadStageConfig = field(default_factory=_fine_tuning)
    """Stages ``teacher`` and ``baseline``."""
    intermediate: StageConfig = field(default_factory=_intermediate)
    """Stage ``intermediate``, by the students' own ``losses``; published: 20 epochs, batch 32, 5e-5."""
    prediction: HeadStageConfig = field(default_factory=_prediction)
    """Stage ``prediction``; published: 3 epochs, batch 16 or 32, 1e-5, 2e-5 or 3e-5."""
    start: Start = Start.intermediate
    """What the stage ``prediction`` starts from."""
    data: DataConfig = field(default_factory=DataConfig)
    """How corpora are read; ``corpus`` and ``mixture`` in it follow from the stage."""
    deepspeed: DeepSpeedConfig = field(default_factory=DeepSpeedConfig)
    """DeepSpeed."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    """Held-out losses and the task's score during training."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """Checkpoints."""
    timeouts: TimeoutConfig = field(default_factory=TimeoutConfig)
    """Hung ranks and dead links."""
    log: LogConfig = field(default_factory=LogConfig)
    """Progress and metrics."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    """MLflow."""
