"""Export a trained model for serving.

    python launcher/export.py --model runs/sst2/prediction/export/tiny --output dist/sst2 \\
        --corpus runs/sst2/data

OUTPUT becomes a ``transformers`` folder with head and tokenizer, ``model.onnx``, ``model-int8.onnx`` and a
model card; it is registered in the MLflow model registry of the run that trained it. Everything is loaded
back and compared with the source: its outputs, and with ``--corpus`` its scores on all rows that are not for
training. OUTPUT is there whole or not at all, in place of one that was there.
"""

import sys
from pathlib import Path

if __package__ in (None, ""):  # run as a script, which puts this folder on sys.path, not the repository
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    import configs  # noqa: F401  before transformers, which finds torchao and makes it talk

import argparse
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from safetensors import SafetensorError
from transformers import AutoTokenizer, PreTrainedModel

from configs.public import log_publicly, public
from configs.schema import TrackingConfig
from launcher import provenance
from launcher.card import Scores, Subject, card, read_run
from launcher.tracked import store_in_words
from sharding.files import new_folder
from sharding.labels import task_of
from sharding.manifest import Corpus, open_corpus
from trainer import exits, registry
from trainer.models import parameters
from trainer.onnx_export import difference, export_onnx, padded_rows, quantize_int8
from trainer.scoring import judge, load_model, predict
from trainer.served import Forward, load_served, onnx_forward, open_session, torch_forward
from trainer.tracking import Run as TrackedRun

log = logging.getLogger("export")

WEIGHTS, ONNX, INT8 = "model.safetensors", "model.onnx", "model-int8.onnx"
TOLERANCE = {WEIGHTS: 0.0, ONNX: 0.002}
"""How far a file's score may be from the source's, in points of 1: rounding may turn an undecided row."""
PIPELINES = {"ForSequenceClassification": "text-classification", "ForMaskedLM": "fill-mask"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Export; return the exit code, see ``trainer.exits``."""
    options = _parser().parse_args(arguments)
    log_publicly(logging.INFO, "%(asctime)s %(message)s")
    for chatty in ("httpx", "mlflow", "alembic", "onnxscript", "onnx_ir"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    try:
        if options.dry_run:
            rehearse(options)
            return exits.DONE
        subject = export(options)
        if options.registry:
            register(options, subject)
    except (ValueError, OSError) as error:
        print(public(f"\nerror: {error}"), file=sys.stderr, flush=True)
        return exits.of(error)
    return exits.DONE


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="export.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", type=Path, required=True, help="exported folder of a run: RUN/export/STUDENT"
    )
    parser.add_argument("--output", type=Path, required=True, help="folder to write, replaced if it exists")
    parser.add_argument("--corpus", help="the task's corpus, to score everything on")
    parser.add_argument("--run", type=Path, help="run folder for the card; RUN of --model if not given")
    parser.add_argument("--name", help="in the card and the registry; the student's name if not given")
    parser.add_argument("--batch-rows", type=int, default=32, help="rows of a forward pass when scoring")
    parser.add_argument(
        "--int8-tolerance",
        type=float,
        default=0.02,
        help="how far the int8 score may be from the source's, in points of 1",
    )
    parser.add_argument("--tracking-uri", help="MLflow store; the run's own if not given")
    parser.add_argument("--dry-run", action="store_true", help="load and check everything, and write nothing")
    parser.add_argument("--no-registry", dest="registry", action="store_false", help="files alone")
    return parser


def rehearse(options: argparse.Namespace) -> None:
    """Say what would be done.

    Raises:
        ValueError: the model cannot be read, or a tracking server refuses.
    """
    model, corpus = load(options)
    files = ", ".join([WEIGHTS, ONNX, INT8, registry.CARD])
    log.info("dry run: %s, %d parameters, into %s", type(model).__name__, parameters(model), options.output)
    log.info("dry run: %s; scored on %s", files, options.corpus or "nothing, without --corpus")
    run = options.run or _run_of(options.model)
    settings = read_run(run).config.tracking if run is not None else TrackingConfig()
    uri = options.tracking_uri or settings.uri
    store = store_in_words(replace(settings, enabled=options.registry, uri=uri))
    log.info("dry run: %s. Nothing was written", store)


def load(options: argparse.Namespace) -> tuple[PreTrainedModel, Corpus | None]:
    """Return the model, and the corpus that judges it.

    Raises:
        ValueError: one of them cannot be read, they do not fit, or OUTPUT holds the model.
    """
    if options.output.resolve() in (options.model.resolve(), *options.model.resolve().parents):
        raise ValueError(f"--output {options.output} holds --model {options.model}; name another folder")
    corpus = open_corpus(options.corpus) if options.corpus else None
    return load_model(options.model, corpus) if corpus is not None else load_served(options.model), corpus


def export(options: argparse.Namespace) -> Subject:
    """Write OUTPUT and return what it holds.

    Raises:
        ValueError: the model cannot be read, or a file gives other outputs or scores than the source.
        OSError: the disk is full or fails.
    """
    model, corpus = load(options)
    run = options.run or _run_of(options.model)
    with new_folder(options.output) as folder:
        forwards = write_files(options.model, model, folder)
        scores = {}
        if corpus is not None:
            tolerance = {**TOLERANCE, INT8: options.int8_tolerance}
            scores = compare_scores(torch_forward(model), forwards, corpus, options.batch_rows, tolerance)
        subject = Subject(
            name=options.name or options.model.resolve().name,
            student=options.model.resolve().name,
            config=model.config,
            pipeline=next(
                (own for end, own in PIPELINES.items() if type(model).__name__.endswith(end)),
                "feature-extraction",
            ),
            parameters=parameters(model),
            file_bytes={name: (folder / name).stat().st_size for name in forwards},
            corpus=corpus,
            scores=scores,
            run=run,
        )
        card(subject).save(folder / registry.CARD)
    log.info("wrote %s", options.output)
    return subject


def _run_of(model: Path) -> Path | None:
    """Return RUN of RUN/export/STUDENT."""
    run = model.resolve().parents[1]
    return run if (run / "config.yaml").is_file() else None


def write_files(source: Path, model: PreTrainedModel, folder: Path) -> dict[str, Forward]:
    """Write all forms of the model; return each as it is loaded back.

    Raises:
        ValueError: a form gives other outputs than the model.
    """
    try:
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(source, trust_remote_code=False).save_pretrained(folder)
    except SafetensorError as error:  # so comes a full disk
        raise OSError(f"{folder} cannot be written: {error}") from error
    loaded = torch_forward(load_served(folder))
    check_equal(f"{WEIGHTS} loaded back", loaded, source)
    log.info("%s differs from PyTorch by %.1e", ONNX, export_onnx(model, folder / ONNX))
    quantize_int8(folder / ONNX, folder / INT8)
    log.info("%s differs from PyTorch by %.1e", INT8, difference(model, folder / INT8))
    served = {name: onnx_forward(open_session(folder / name)) for name in (ONNX, INT8)}
    return {WEIGHTS: loaded, **served}


def check_equal(name: str, forward: Forward, source: Path) -> None:
    """Raise ValueError unless the outputs are those of the model in the folder ``source``, bit by bit."""
    model = load_served(source)
    batch = padded_rows(4, 16, model.config.vocab_size)
    found = forward(*batch)
    for output, expected in torch_forward(model)(*batch).items():
        if not np.array_equal(found[output], expected):
            raise ValueError(f"{name} gives other {output} than {source}: is the disk sound? Export again")


def compare_scores(
    source: Forward,
    forwards: Mapping[str, Forward],
    corpus: Corpus,
    batch_rows: int,
    tolerance: Mapping[str, float],
) -> dict[str, Scores]:
    """Return the scores of every form, and check them against the source's.

    Raises:
        ValueError: a form's score is further from the source's than its ``tolerance``.
    """
    expected, metric = score(source, corpus, batch_rows), task_of(corpus).metrics[0]
    found = {name: score(forward, corpus, batch_rows) for name, forward in forwards.items()}
    for name, scores in found.items():
        for split, own in scores.items():
            log.info("%s on %s: %s", name, split, own)
            lost = abs(own[metric] - expected[split][metric])
            if lost > tolerance[name]:
                raise ValueError(
                    f"{name} scores {metric}={own[metric]:.4f} on {split}, its source "
                    f"{expected[split][metric]:.4f}: {lost:.4f} apart, allowed is {tolerance[name]}"
                    + (". Allow more with --int8-tolerance, or serve another file" if name == INT8 else "")
                )
    return found


def score(forward: Forward, corpus: Corpus, batch_rows: int) -> Scores:
    """Return the scores of a model on every split of a task's corpus that is not for training."""
    return {
        split: judge(corpus, split, predict(forward, corpus, split, batch_rows))
        for split in corpus.manifest.splits
        if split != "train"
    }


def register(options: argparse.Namespace, subject: Subject) -> str:
    """Register OUTPUT, load it back through MLflow, compare; return its ``models:/NAME/VERSION``.

    Raises:
        TrackingError: the store cannot be used.
        ValueError: what MLflow loads gives other outputs.
    """
    scores = {
        f"{file}/{split}/{metric}": value
        for file, by_split in subject.scores.items()
        for split, own in by_split.items()
        for metric, value in own.items()
    }
    run = start_run(options, subject)
    status = "FAILED"
    try:
        tags = {"task": task_of(subject.corpus).name} if subject.corpus is not None else {}
        shown = {**tags, **{name: f"{value:.4f}" for name, value in scores.items()}}
        text = (options.output / registry.CARD).read_text(encoding="utf-8")
        version = registry.register(run, subject.name, options.output, subject.pipeline, shown, text)
        loaded = torch_forward(registry.load_registered(run.uri, version))
        check_equal(f"{version} in {public(run.uri)}", loaded, options.output)
        if subject.corpus is not None:
            again = score(loaded, subject.corpus, options.batch_rows)
            assert again == subject.scores[WEIGHTS], again  # the same outputs, as has just been seen
        run.log_metrics({f"export/{name}": value for name, value in scores.items()}, step=0)
        run.log_metrics({f"export/bytes/{name}": size for name, size in subject.file_bytes.items()}, step=0)
        run.set_tag("registered", version)
        status = "FINISHED"
    finally:
        run.finish(status)
    log.info("registered as %s, loaded back and equal. In MLflow: %s", version, run.url)
    return version


def start_run(options: argparse.Namespace, subject: Subject) -> TrackedRun:
    """Open the MLflow run of this export: a child of the run that trained the model, where that is known."""
    settings: Any = None
    parent = None
    if subject.run is not None:
        settings = read_run(subject.run).config.tracking
        ids = subject.run / "mlflow.json"
        if ids.is_file() and options.tracking_uri in (None, settings.uri):
            parent = json.loads(ids.read_text(encoding="utf-8"))[""]
    own = (subject.run or options.output.resolve()).parent / "mlflow"
    folder = Path(settings.folder) if settings is not None and settings.folder else own
    return TrackedRun.start(
        uri=options.tracking_uri or (settings.uri if settings is not None else None),
        default_folder=folder,
        experiment=settings.experiment if settings is not None else "distillation",
        name=f"export {subject.name}",
        parent_run_id=parent,
        params={"model": str(options.model), "output": str(options.output), "corpus": str(options.corpus)},
        tags={
            "mlflow.source.name": "launcher/export.py",
            "mlflow.source.git.commit": provenance.revision(),
            "stage": "export",
        },
    )


if __name__ == "__main__":
    sys.exit(main())
