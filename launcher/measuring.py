"""What an evaluation measures: every model's scores in every form, then size and speed of every shape."""

import copy
import importlib.metadata
import logging
import os
import platform
import tempfile
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import PreTrainedModel

from configs.evaluate_schema import EvaluateConfig
from launcher import provenance
from launcher.results import FORMS, TEACHER, Arm, Column, Results, Timing
from sharding.labels import read_labels, task_of
from sharding.manifest import Corpus
from trainer import metrics, shapes
from trainer.capture import Need
from trainer.flops import teacher_row_flops
from trainer.latency import measure
from trainer.models import parameters
from trainer.onnx_export import export_onnx, quantize_int8
from trainer.scoring import judge, load_model, predict
from trainer.served import Forward, onnx_forward, open_session, torch_forward

log = logging.getLogger("evaluate")

PACKAGES = ("torch", "transformers", "onnxruntime")


@dataclass(frozen=True)
class Task:
    """One task as it is evaluated: its corpus, and the folders of its models by arm, the teacher's first."""

    corpus: Corpus
    models: dict[str, list[str]]
    columns: list[Column]


@dataclass
class Entrant:
    """What is known of an arm so far."""

    name: str
    shape: str = ""
    parameters: int = 0
    row_flops: int | None = None
    file_bytes: dict[str, int] = field(default_factory=dict)
    scores: dict[str, dict[str, list[dict[str, float]]]] = field(
        default_factory=lambda: defaultdict(lambda: defaultdict(list))
    )

    def admit(self, folder: str, model: PreTrainedModel, seq_len: int) -> None:
        """Take over the size of the first model; the others must have the same shape.

        Raises:
            ValueError: another shape.
        """
        config, own = model.config, shapes.as_student("", "", model.config)
        layers, hidden, feed_forward = own.layers, own.hidden_size, own.intermediate_size
        shape = (
            f"{config.model_type}: {layers} layers x {hidden}, {own.heads} heads, feed-forward {feed_forward}"
        )
        if self.shape not in ("", shape):
            raise ValueError(
                f"arms.{self.name}: {folder} has {shape}, the models before it {self.shape}; give each "
                "size an arm of its own"
            )
        if self.shape:
            return
        self.shape, self.parameters = shape, parameters(model)
        files = Path(folder).glob("*.safetensors")  # none: a name on the hub
        self.file_bytes["pytorch"] = sum(path.stat().st_size for path in files) or 4 * self.parameters
        try:
            self.row_flops = teacher_row_flops(config, seq_len, Need(hidden=frozenset({layers})))
        except ValueError as error:
            log.warning("%s: %s", self.name, error)


def results(config: EvaluateConfig, tasks: list[Task]) -> Results:
    """Score all models, then time one of every shape and form, side by side.

    Raises:
        ValueError: a model does not fit its task or its arm, or a teacher scores no better than chance.
    """
    threads = config.latency.threads or len(os.sched_getaffinity(0))
    torch.set_num_threads(threads)
    entrants = {name: Entrant(name) for task in tasks for name in task.models}  # the teacher first
    timed: dict[tuple[str, str, str], Forward] = {}  # by shape, form and device
    with tempfile.TemporaryDirectory(prefix="evaluate-") as scratch:
        for task in tasks:
            for name, folders in task.models.items():
                for folder in folders:
                    model = load_model(folder, task.corpus)
                    entrants[name].admit(folder, model, config.latency.seq_len)
                    found = {("pytorch", cpu_name(threads)): torch_forward(model)}
                    if config.onnx and name in (TEACHER, *config.ship):
                        found |= _onnx(model, Path(tempfile.mkdtemp(dir=scratch)), entrants[name], threads)
                    if torch.cuda.is_available():
                        on_gpu = copy.deepcopy(model).to("cuda")  # type: ignore[arg-type]
                        found["pytorch", torch.cuda.get_device_name()] = torch_forward(on_gpu)
                    _score(
                        {form: forward for (form, _), forward in found.items()},
                        folder,
                        task,
                        entrants[name],
                        config.batch_rows,
                    )
                    for (form, device), forward in found.items():
                        timed.setdefault((entrants[name].shape, form, device), forward)
        log.info("timing %d models and forms, in turns", len(timed))
        vocabulary = min(task.corpus.manifest.tokenizer.vocab_size for task in tasks)
        timings = _timed(config, timed, vocabulary)
    arms = [_arm(entrant, timings) for entrant in entrants.values()]
    return Results(
        name=config.name,
        aim=config.aim,
        ship=list(config.ship),
        columns=[column for task in tasks for column in task.columns],
        teacher=arms[0],
        arms=arms[1:],
        seq_len=config.latency.seq_len,
        batch_rows=list(config.latency.batch_rows),
        machine=_machine(threads),
    )


def _onnx(
    model: PreTrainedModel, folder: Path, entrant: Entrant, threads: int
) -> dict[tuple[str, str], Forward]:
    """The model as ONNX and as int8, by form and device."""
    whole, small = folder / "model.onnx", folder / "model-int8.onnx"
    export_onnx(model, whole)
    quantize_int8(whole, small)
    found = {}
    for form, path in (("onnx", whole), ("int8", small)):
        entrant.file_bytes.setdefault(form, path.stat().st_size)
        found[form, cpu_name(threads)] = onnx_forward(open_session(path, threads=threads))
        path.unlink()  # the session has read it
    return found


def _score(forms: Mapping[str, Forward], folder: str, task: Task, entrant: Entrant, batch_rows: int) -> None:
    """Score one model in all its forms on all splits of a task."""
    info = task_of(task.corpus)
    for form, forward in forms.items():
        for column in task.columns:
            logits = predict(forward, task.corpus, column.split, batch_rows)
            found = judge(task.corpus, column.split, logits)
            entrant.scores[form][column.name].append(found)
            score = found[column.metric]
            log.info("%s  %s, %s: %s %.4f", column.name, entrant.name, FORMS[form], column.metric, score)
            if entrant.name != TEACHER or form != "pytorch":
                continue
            if doubtful := metrics.doubt(info, logits, read_labels(task.corpus, column.split)):
                raise ValueError(
                    f"{column.name}: the teacher {folder} has {doubtful}. Its classes may be in another "
                    f"order than the corpus's ({', '.join(info.labels) or info.kind}): build the corpus with "
                    "labels in the teacher's order, or fine-tune one on it (launcher/task.py stage=teacher)"
                )


def _timed(
    config: EvaluateConfig, forwards: Mapping[tuple[str, str, str], Forward], vocab_size: int
) -> dict[tuple[str, str], list[Timing]]:
    """Timings by shape and form; everything takes turns, call by call."""
    keys = {" ".join(key): key for key in forwards}
    latency, found = config.latency, defaultdict(list)
    for taken in measure(
        {name: forwards[key] for name, key in keys.items()},
        rows=latency.batch_rows,
        seq_len=latency.seq_len,
        vocab_size=vocab_size,
        calls=latency.repeats,
    ):
        shape, form, device = keys[taken.runtime]
        found[shape, form].append(
            Timing(form, device, taken.rows, taken.p50_ms, taken.p90_ms, taken.p99_ms, taken.rows_per_s)
        )
    return found


def _arm(entrant: Entrant, timings: Mapping[tuple[str, str], list[Timing]]) -> Arm:
    scores = {form: dict(of_column) for form, of_column in entrant.scores.items()}
    return Arm(
        entrant.name,
        entrant.shape,
        entrant.parameters,
        entrant.row_flops,
        entrant.file_bytes,
        scores,
        [timing for form in scores for timing in timings[entrant.shape, form]],
    )


def cpu_name(threads: int) -> str:
    """``CPU, 2 threads``."""
    return f"CPU, {threads} thread{'s' * (threads > 1)}"


def _machine(threads: int) -> dict[str, str]:
    """What the figures depend on."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    found = {"CPU": f"{names[0] if names else platform.machine()}, {threads} threads"}
    if torch.cuda.is_available():
        found["GPU"] = torch.cuda.get_device_name()
    return found | {
        **{name: importlib.metadata.version(name) for name in PACKAGES},
        "code": provenance.revision(),
    }
