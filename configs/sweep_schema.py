"""The schema of a sweep (``launcher/sweep.py``): which settings of a run are tried, and what judges them.

A *trial* is one set of values of the keys in ``space``, and a run of ``launcher/general.py`` or
``launcher/task.py`` with them. ``configs.sweep`` checks a sweep, and derives the runs of its trials.
"""

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from omegaconf import MISSING


class Launcher(Enum):
    """What runs a trial."""

    general = "general"
    task = "task"


class Sampler(Enum):
    """What chooses the values of the next trial."""

    grid = "grid"
    """Every combination of values once, in an order that ``seed`` draws."""
    random = "random"
    """Independent draws. Trial n draws the same whatever was interrupted, or ran beside it."""
    tpe = "tpe"
    """Tree-structured Parzen estimator (Bergstra et al. 2011; Watanabe, arXiv:2304.11127); its first ten
    trials are random."""


class Pruner(Enum):
    """What ends trials that do not look good, by the objective as it comes during training."""

    none = "none"
    median = "median"
    """Whose best value so far is worse than the median of finished trials at the same step."""
    asha = "asha"
    """Asynchronous successive halving (Li et al., arXiv:1810.05934): only the best
    1 / ``reduction_factor`` of the trials go on beyond ``min_steps``, that times the factor, and so on."""


class Direction(Enum):
    """Which values of an objective are good."""

    minimize = "minimize"
    maximize = "maximize"


@dataclass
class AxisConfig:
    """The values of one key: ``values``, or a range."""

    values: list[Any] | None = None
    """These, without an order; any YAML values."""
    low: Any = None
    """A range: its lowest value. A range of integers, when all of its numbers are written as integers."""
    high: Any = None
    """Its highest value, included."""
    log: bool = False
    """Equal shares to equal ratios, as suits learning rates."""
    step: Any = None
    """Distance of neighbours; not set: any number, or any integer."""


@dataclass
class ObjectiveConfig:
    """One figure by which trials are judged."""

    metric: str = MISSING
    """``heldout/total`` or another held-out loss; ``heldout/score/<metric>`` of a task;
    ``probe/<task>/<metric>``; ``speed/rows_per_s`` in training; of the exported student
    ``student/parameters``, ``student/row_flops`` (operations of a forward pass over a row) or
    ``student/latency_ms`` (of a row, in PyTorch, float32, on the GPU where there is one). The last value of a
    run counts."""
    direction: Direction | None = None
    """Not set: scores, probes and speed are to be high, all else low."""


@dataclass
class PrunerConfig:
    """Pruning, for sweeps of one objective that is measured during training."""

    kind: Pruner = Pruner.none
    """Which rule."""
    startup_trials: int = 5
    """``median``: finished trials before any is pruned."""
    min_steps: int = 1
    """Optimizer steps before a trial may be pruned; for ``asha`` its first rung."""
    reduction_factor: int = 3
    """``asha``: one in so many goes on."""


@dataclass
class SweepConfig:
    """One sweep."""

    name: str = MISSING
    """Names the sweep, and its run in MLflow."""
    output: str = MISSING
    """Folder of the sweep. Started again, the sweep goes on there; all workers need it, with file locks."""
    base: str = MISSING
    """YAML of the run that trials vary; it trains one student."""
    launcher: Launcher = Launcher.general
    """What runs it."""
    stage: str | None = None
    """``launcher: task``: which stage trials run; they read what earlier ones left in the base's output."""
    overrides: list[str] = field(default_factory=list)
    """``key=value`` for all trials."""
    space: dict[str, AxisConfig] = field(default_factory=dict)
    """By key of the run's config (``students.0.optimizer.lr``): what is tried."""
    sampler: Sampler = Sampler.tpe
    """How values are chosen."""
    seed: int = 0
    """Seed of the choice. That of the runs is theirs (``train.seed``)."""
    objectives: list[ObjectiveConfig] = MISSING
    """What is judged. With several, the sweep looks for the Pareto front."""
    pruner: PrunerConfig = field(default_factory=PrunerConfig)
    """Which trials end early."""
    trials: int | None = None
    """How many, over all workers and restarts; not set, for ``grid`` only: all combinations."""
    jobs: int = 1
    """Runs at a time on this machine; they share its cores and GPUs evenly."""
    packed: int = 1
    """Trials that share a run, as students of one teacher; only keys under ``students.0.`` can then vary."""
    storage: str | None = None
    """Database of the trials (``postgresql://...``); not set: a file in ``output``."""
    row_tokens: int = 128
    """Tokens of the row that ``student/row_flops`` and ``student/latency_ms`` are about."""
