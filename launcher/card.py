"""The model card of an exported model: made of the run that trained it, and of what its files score."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import PreTrainedConfig

from configs.load import load_config, to_dict
from configs.public import public
from configs.schema import RunConfig
from configs.student_schema import LossConfig, StudentConfig
from sharding.manifest import Corpus, CorpusError, read_manifest

Scores = dict[str, dict[str, float]]
"""By split, by metric."""


@dataclass(frozen=True)
class Subject:
    """What a card is about."""

    name: str
    student: str
    """Its name in the run."""
    config: PreTrainedConfig
    pipeline: str
    """What ``transformers.pipeline`` calls its use."""
    parameters: int
    file_bytes: Mapping[str, int]
    """By file name."""
    corpus: Corpus | None
    """Whose splits the files were scored on."""
    scores: Mapping[str, Scores]
    """By file that was loaded back."""
    run: Path | None
    """Folder of the run that trained it."""


def card(subject: Subject) -> ModelCard:
    """Return the card: front matter for the hub, then Markdown for people, without secrets."""
    trained = read_run(subject.run) if subject.run is not None else None
    sections = [f"# {subject.name}", _summary(subject, trained), _files(subject), _usage(subject)]
    if subject.scores:
        sections.append(_scores(subject))
    if trained is not None:
        sections.append(_training(subject, trained))
    front = _front_matter(subject, trained)
    return ModelCard(f"---\n{front.to_yaml()}\n---\n\n" + public("\n\n".join(sections)) + "\n")


@dataclass(frozen=True)
class Trained:
    """What a run folder says of the run."""

    config: RunConfig
    origin: Mapping[str, Any]
    summary: Mapping[str, Any]

    def student(self, name: str) -> StudentConfig | None:
        """Return the student of that name, if the run had one."""
        return next((own for own in self.config.students if own.name == name), None)


def read_run(folder: Path) -> Trained:
    """Read a run folder; what it lacks besides its config is empty.

    Raises:
        ConfigError: it holds no config of a run.
    """
    read = {}
    for name in ("origin.json", "summary.json"):
        path = folder / name
        read[name] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    config = load_config(RunConfig, folder / "config.yaml")
    return Trained(config, read["origin.json"], read["summary.json"])


def _front_matter(subject: Subject, trained: Trained | None) -> ModelCardData:
    task = subject.corpus.manifest.task if subject.corpus is not None else None
    results = [
        EvalResult(
            task_type=subject.pipeline,
            dataset_type=task.name,
            dataset_name=task.name,
            dataset_split=split,
            metric_type=metric,
            metric_value=round(value, 6),
        )
        for split, found in subject.scores.get("model.safetensors", {}).items()
        for metric, value in found.items()
        if task is not None
    ]
    teacher = trained.config.teacher.model if trained is not None else ""
    return ModelCardData(
        model_name=subject.name,
        library_name="transformers",
        pipeline_tag=subject.pipeline,
        tags=["tinybert", "onnx"],
        base_model=None if not teacher or Path(teacher).exists() else teacher,  # a name of the hub
        eval_results=results or None,
    )


def _summary(subject: Subject, trained: Trained | None) -> str:
    config = subject.config
    shape = f"{config.num_hidden_layers} layers, hidden size {config.hidden_size}"
    text = f"A {config.model_type} model of {subject.parameters / 1e6:.1f}M parameters ({shape})"
    if trained is not None:
        text += f", {_method(trained, subject.student)}"
    labels = [str(label) for label in (config.id2label or {}).values()]
    if subject.pipeline == "text-classification" and len(labels) > 1:
        text += f". Classes, in order: {', '.join(labels)}"
    return f"{text}."


def _method(trained: Trained, name: str) -> str:
    if not _distilled(trained, name):
        return "fine-tuned on labels, without a teacher"
    return f"distilled from `{trained.config.teacher.model}`"


def _distilled(trained: Trained, name: str) -> bool:
    """Whether any loss looks at the teacher; labels alone come first only where they are alone."""
    student = trained.student(name)
    return student is None or not losses(student.losses).startswith("labels")


def _files(subject: Subject) -> str:
    meaning = {
        "model.safetensors": "weights in float32, for `transformers`",
        "model.onnx": "the same as ONNX; batch and sequence axes are free",
        "model-int8.onnx": "ONNX with weights in int8, activations quantized as they come",
    }
    rows = [
        f"| `{name}` | {subject.file_bytes[name] / 1e6:.1f} | {text} |"
        for name, text in meaning.items()
        if name in subject.file_bytes
    ]
    return "\n".join(["## Files", "", "| file | MB | what |", "|---|---|---|", *rows])


def _usage(subject: Subject) -> str:
    architecture = (subject.config.architectures or [""])[0]
    heads = ("ForSequenceClassification", "ForQuestionAnswering", "ForMaskedLM")
    auto = "AutoModel" + next((head for head in heads if architecture.endswith(head)), "")
    return f"""## How to load

```python
from transformers import AutoTokenizer, {auto}

tokenizer = AutoTokenizer.from_pretrained("FOLDER")
model = {auto}.from_pretrained("FOLDER")
outputs = model(**tokenizer(["a text"], return_tensors="pt"))
```

```python
import onnxruntime

session = onnxruntime.InferenceSession("FOLDER/model-int8.onnx")
taken = [entry.name for entry in session.get_inputs()]
inputs = tokenizer(["a text"], return_tensors="np")
outputs = session.run(None, {{name: inputs[name].astype("int64") for name in taken}})
```"""


def _scores(subject: Subject) -> str:
    assert subject.corpus is not None
    splits = subject.corpus.manifest.splits
    rows = [
        f"| `{file}` | {split} ({splits[split].rows} rows) | "
        + ", ".join(f"{metric} {value:.4f}" for metric, value in found.items())
        + " |"
        for file, by_split in subject.scores.items()
        for split, found in by_split.items()
    ]
    return "\n".join(
        [
            "## Scores",
            "",
            f"Each file loaded back and scored on corpus `{subject.corpus.store.location}` "
            f"(fingerprint `{subject.corpus.fingerprint[:16]}`).",
            "",
            *("| file | split | scores |", "|---|---|---|", *rows),
        ]
    )


def _training(subject: Subject, trained: Trained) -> str:
    config = trained.config
    student = trained.student(subject.student)
    distilled = _distilled(trained, subject.student)
    facts: dict[str, Any] = {"run": config.name}
    if distilled:
        revision = f" at {config.teacher.revision}" if config.teacher.revision else ""
        facts["teacher"] = f"`{config.teacher.model}`{revision}"
    facts["corpora"] = "; ".join(_corpora(config))
    if student is not None:
        facts |= {"started from": f"`{student.init}`", "losses": losses(student.losses)}
        facts |= {"layer map": student.layer_map} if distilled else {}
        facts["learning rate"] = _rate(student)
    facts |= {
        "rows per step": config.train.global_batch_rows,
        "optimizer steps": trained.summary.get("steps"),
        "rows": trained.summary.get("rows"),
        "seed": config.train.seed,
        "code": trained.origin.get("revision"),
        "command": f"`{trained.origin['command']}`" if "command" in trained.origin else None,
        "versions": ", ".join(f"{name} {own}" for name, own in trained.origin.get("versions", {}).items()),
    }
    rows = [f"| {name} | {value} |" for name, value in facts.items() if value not in (None, "")]
    return "\n".join(["## Training", "", "| | |", "|---|---|", *rows])


def losses(config: LossConfig) -> str:
    """Return the terms that are on, with their weights, and the temperature where one counts."""
    weights = {**to_dict(config), "relation": config.relation.weight}
    names = ("embedding", "hidden", "attention", "cosine", "relation", "prediction", "logits", "labels")
    shown = [f"{name} {weights[name]:g}" for name in names if weights[name]]
    if weights["prediction"] or weights["logits"]:
        shown.append(f"temperature {config.temperature:g}")
    return ", ".join(shown)


def _rate(student: StudentConfig) -> str:
    own = student.optimizer
    return f"{own.lr:g}, warm-up {own.warmup:.0%}, then {own.decay.value}"


def _corpora(config: RunConfig) -> list[str]:
    """Return the corpora of the run, with what their manifests say where they are still there."""
    found = []
    for location in [config.data.corpus, *(part.corpus for part in config.data.mixture)]:
        if location is None:
            continue
        try:
            corpus = read_manifest(location)
        except CorpusError:
            found.append(f"`{location}`")
            continue
        rows = corpus.split("train").rows
        found.append(f"`{location}` ({rows:,} rows, fingerprint `{corpus.fingerprint[:16]}`)")
    return found
