"""Tasks known by name, and a task of one's own: what is said of an example, and how files say it.

The nine of GLUE (Wang et al. 2018, arXiv:1804.07461) and SQuAD 1.1 (Rajpurkar et al. 2016,
arXiv:1606.05250). The order of classes is that of the data sets on the hub.
"""

from dataclasses import dataclass, replace

from configs.task_schema import TaskConfig, TaskKind
from sharding.manifest import CorpusError, TaskInfo

METRICS = {
    "classification": ("accuracy", "f1", "matthews"),
    "regression": ("pearson", "spearman"),
    "spans": ("exact",),
}
"""What each kind of task can be judged by; ``trainer.metrics`` computes it."""


@dataclass(frozen=True)
class Task:
    """One task."""

    name: str
    kind: TaskKind
    labels: tuple[str, ...]
    """Names of the classes in the order of the model's outputs; empty unless it is classification."""
    metrics: tuple[str, ...]
    columns: tuple[tuple[str, ...], ...]
    """Columns of the one or two texts: each of the ways in which files name them."""
    label: tuple[str, ...] = ("label",)
    """Column of the label: the ways in which files name it."""
    numbers: tuple[str, ...] = ()
    """Names of the classes that data means by 0, 1, ..."""
    header: tuple[str, ...] | None = None
    """Columns of TSV files that do not name them."""
    folder: str | None = None
    """Its folder in GLUE's own download."""
    broken_lines: bool = False
    """The published file has lines with too few or too many columns, which everyone leaves out."""
    per_example: int = 20
    """Examples that augmentation makes of one, in TinyBERT's released code."""

    @property
    def info(self) -> TaskInfo:
        """What the manifest says of it."""
        return TaskInfo(self.name, self.kind.value, self.labels, self.metrics)


def _classes(name: str, labels: tuple[str, ...], texts: tuple[str, ...], **more: object) -> Task:
    task = Task(name, TaskKind.classification, labels, ("accuracy",), (texts,), numbers=labels)
    return replace(task, **more)  # type: ignore[arg-type]


_PAIR = ("sentence1", "sentence2")
_ENTAILMENT = ("entailment", "not_entailment")
_QUESTION = ("question", "context")

TASKS = {
    task.name: task
    for task in (
        _classes(
            "cola",
            ("unacceptable", "acceptable"),
            ("sentence",),
            metrics=("matthews",),
            header=("source", "label", "mark", "sentence"),
            folder="CoLA",
            per_example=30,
        ),
        _classes("sst2", ("negative", "positive"), ("sentence",), folder="SST-2"),
        _classes(
            "mrpc",
            ("not_equivalent", "equivalent"),
            _PAIR,
            columns=(("#1 String", "#2 String"), _PAIR),
            label=("Quality", "label"),
            metrics=("f1", "accuracy"),
            folder="MRPC",
            per_example=30,
        ),
        _classes(
            "qqp",
            ("not_duplicate", "duplicate"),
            ("question1", "question2"),
            label=("is_duplicate", "label"),
            metrics=("f1", "accuracy"),
            folder="QQP",
            broken_lines=True,
            per_example=10,
        ),
        Task(
            "stsb",
            TaskKind.regression,
            (),
            ("pearson", "spearman"),
            (_PAIR,),
            ("score", "label"),
            folder="STS-B",
            per_example=30,
        ),
        _classes(
            "mnli",
            ("entailment", "neutral", "contradiction"),
            _PAIR,
            columns=(_PAIR, ("premise", "hypothesis")),
            label=("gold_label", "label"),
            folder="MNLI",
            per_example=10,
        ),
        _classes("qnli", _ENTAILMENT, ("question", "sentence"), folder="QNLI"),
        _classes("rte", _ENTAILMENT, _PAIR, folder="RTE", per_example=30),
        _classes("wnli", ("not_entailment", "entailment"), _PAIR, folder="WNLI"),
        Task("squad", TaskKind.spans, (), ("exact",), (_QUESTION,), ("answers",)),
    )
}


def positive(task: TaskInfo) -> int:
    """Index of the class that F1 is of: class 1 of the two, in the order that the task is published in."""
    known = TASKS.get(task.name)
    name = known.labels[1] if known is not None and known.labels else None
    return task.labels.index(name) if name in task.labels else 1


def task_of(config: TaskConfig) -> Task:
    """The task that a config describes: a known one, with what the config changes of it, or its own.

    Raises: CorpusError, naming the key, for a task that is not known and not described.
    """
    task = TASKS.get(config.task) or _own(config)
    if config.kind not in (None, task.kind):
        raise CorpusError(
            f"kind={config.kind.value if config.kind else None}: task={config.task} is {task.kind.value}; "
            "leave it out, or give the task a name of its own"
        )
    labels = tuple(config.labels or task.labels)
    if len(set(labels)) != len(labels) or len(labels) != len(task.labels):
        raise CorpusError(
            f"labels={list(labels)} are not {len(task.labels)} different names: task={config.task} has "
            f"{', '.join(task.labels) or 'no classes'}; name them in the order of the teacher's outputs"
        )
    known = METRICS[task.kind.value]
    if unknown := [name for name in config.metrics or () if name not in known]:
        raise CorpusError(f"metrics={unknown}: {task.kind.value} is judged by {', '.join(known)}")
    if len(config.source.columns or ()) > 2:
        raise CorpusError(f"source.columns={config.source.columns}: a row holds one text or two")
    return replace(
        task,
        labels=labels,
        # Numbers keep their meaning when the same names are given in another order.
        numbers=task.labels if set(labels) == set(task.labels) else labels,
        metrics=tuple(config.metrics or task.metrics),
        columns=(tuple(config.source.columns),) if config.source.columns else task.columns,
        label=(config.source.label,) if config.source.label else task.label,
    )


def _own(config: TaskConfig) -> Task:
    spans, classes = config.kind is TaskKind.spans, config.kind is TaskKind.classification
    needed = {"kind": config.kind, "source.columns": config.source.columns or spans}
    if classes:
        needed["labels"] = config.labels
    missing = [key for key, value in needed.items() if not value]
    if config.kind is None or missing:
        raise CorpusError(
            f"task={config.task} is none of {', '.join(TASKS)}: a task of your own needs {', '.join(missing)}"
        )
    labels = tuple(config.labels or ())
    if labels and not classes:
        raise CorpusError(f"labels={list(labels)}: kind={config.kind.value} has no classes; leave them out")
    return Task(
        config.task,
        config.kind,
        labels,
        metrics=METRICS[config.kind.value][:1],
        columns=(tuple(config.source.columns or _QUESTION),),
        label=("answers",) if spans else ("label",),
        numbers=labels,
    )
