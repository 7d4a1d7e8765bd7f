"""The schema of an evaluation (``launcher/evaluate.py``): which models are compared, on which tasks, and how.

An *arm* is one way to make a model: the student, the student without general distillation, a model of its
size that was fine-tuned without a teacher, or an ablation. Every arm has a model per seed.
"""

from dataclasses import dataclass, field

from omegaconf import MISSING

from configs.schema import TrackingConfig


@dataclass
class EvaluatedTaskConfig:
    """One task: its corpus, its teacher, and the models that are compared with the teacher."""

    corpus: str = MISSING
    """Folder of the task's corpus (stage ``data``); all its splits but ``train`` are scored."""
    teacher: str = MISSING
    """The fine-tuned teacher: folder or hub name of a ``transformers`` model. Its scores are the 100%."""
    arms: dict[str, list[str]] = field(default_factory=dict)
    """By name of the arm, its models: a folder per seed, or patterns of folders
    (``runs/sst2/seed-*/prediction/export/tiny``)."""


@dataclass
class LatencyConfig:
    """How speed is measured: of the teacher and of every arm's shape, side by side."""

    seq_len: int = 128
    """Tokens in a row; no padding."""
    batch_rows: list[int] = field(default_factory=lambda: [1, 32])
    """Rows in a call. The first gives the latency that choice and figure go by, the last the throughput."""
    repeats: int = 50
    """Timed calls of each model, form and batch, after a warm-up."""
    threads: int | None = None
    """CPU threads; not set: the cores that this process may use."""


@dataclass
class EvaluateConfig:
    """One evaluation."""

    name: str = "evaluation"
    """Names the run in MLflow, and the report."""
    output: str = MISSING
    """Folder of the report; replaced when it exists."""
    tasks: list[EvaluatedTaskConfig] = MISSING
    """The tasks."""
    ship: list[str] = field(default_factory=lambda: ["student"])
    """Arms to choose from. They are scored and timed as ONNX and int8 as well; the others explain."""
    aim: float = 0.96
    """Share of the teacher's score that is to be kept, as a mean over tasks (the paper: 0.968 for 4x312)."""
    batch_rows: int = 64
    """Rows of a forward pass when scores are computed."""
    onnx: bool = True
    """Export the teacher and the arms in ``ship`` to ONNX and int8, score and time them."""
    latency: LatencyConfig = field(default_factory=LatencyConfig)
    """Speed."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    """MLflow."""
