"""What a run's exported students compute against their teacher, on held-out rows.

Models are run in float32, on a CUDA device where there is one.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from configs.load import from_dict
from configs.schema import RunConfig
from launcher.run_record import Record
from sharding.corpora import Corpora, open_corpora
from sharding.stream import Batch, sequential
from trainer.capture import Head, Need, capture, enable_capture
from trainer.encoders import load_encoder, load_tokenizer, load_whole_teacher
from trainer.layer_map import resolve
from trainer.models import Inputs
from trainer.similarity import Moments, attention_map

log = logging.getLogger("distil")

BATCH_ROWS = 16
SAMPLES = 2
SAMPLE_TOKENS = 18
"""Of a sample's row, from its start; more could not be read in a figure."""


@dataclass(frozen=True)
class Sample:
    """Attention on the first tokens of a row, mean over heads: a [S, S] map for each student layer."""

    tokens: list[str]
    student: list[Tensor]
    teacher: list[Tensor]
    """Of the layers that the student's learn from."""


@dataclass(frozen=True)
class Comparison:
    """A student against its teacher."""

    student: str
    layer_map: tuple[int, ...]
    cka: list[list[float]]
    """Of student layers 0..M with teacher layers 0..N; 0 are the embeddings."""
    tokens: int
    """On which it was computed."""
    samples: list[Sample]


@torch.no_grad()
def compare(record: Record, rows: int) -> list[Comparison]:
    """Return every exported student against the teacher, on the first ``rows`` held-out rows.

    Raises:
        ValueError: no student is exported, the teacher or the corpus cannot be read, or it has no held-out
            rows.
    """
    config = from_dict(RunConfig, record.config)
    exported = {
        student.name: folder
        for student in config.students
        if (folder := record.folder / "export" / student.name).is_dir()
    }
    if not exported:
        raise ValueError(
            f"{record.folder} has no exported student yet: leave --models out, or wait for its end"
        )
    corpora = open_corpora(config.data)
    if not corpora.has("heldout"):
        raise ValueError("the corpus has no held-out rows to compare models on: leave --models out")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    teacher = _ready(load_whole_teacher(config.teacher, Head.none), device)
    students = {name: _ready(load_encoder(str(folder)), device) for name, folder in exported.items()}
    separator = corpora.separator if config.data.separate_documents else None
    moments = {name: Moments() for name in students}
    done = 0
    for batch in _heldout(corpora, rows):
        inputs = Inputs.of(batch, slice(None), device, separator, trim=True)
        of_teacher = _hidden(teacher, inputs)
        for name, student in students.items():
            moments[name].add(_hidden(student, inputs), of_teacher, inputs.layout.mask_BS)
        done += len(batch.length_B)
        log.info("compared on %d of %d rows", done, rows)
    samples = [Inputs.of(row, slice(None), device) for row in _samples(corpora)]
    tokenizer = load_tokenizer(config.teacher)
    found = []
    for settings in (own for own in config.students if own.name in students):
        student, own = students[settings.name], moments[settings.name]
        layer_map = resolve(settings.layer_map, settings.layers, teacher.config.num_hidden_layers)
        shown = [
            Sample(
                tokenizer.convert_ids_to_tokens(row.ids_BS[0].tolist()),
                _maps(student, row, range(1, settings.layers + 1)),
                _maps(teacher, row, layer_map),
            )
            for row in samples
        ]
        found.append(Comparison(settings.name, layer_map, own.cka().tolist(), own.tokens, shown))
    return found


def _ready(encoder: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    enable_capture(encoder)
    encoder.eval().to(device)
    return encoder


def _heldout(corpora: Corpora, rows: int) -> Iterator[Batch]:
    """Held-out rows of all corpora, of each by its share, at least one."""
    for corpus, share in zip(corpora.corpora, corpora.shares, strict=True):
        yield from sequential(
            corpus,
            "heldout",
            rows=max(1, round(rows * share)),
            batch_rows=BATCH_ROWS,
            rank=0,
            world_size=1,
            node_cache=corpora.node_cache,
        )


def _hidden(encoder: PreTrainedModel, inputs: Inputs) -> list[Tensor]:
    need = Need(hidden=frozenset(range(encoder.config.num_hidden_layers + 1)))
    found = capture(encoder, inputs.ids_BS, inputs.attention_mask, inputs.token_type_BS, need=need)
    return [state for state in found.hidden if state is not None]


def _samples(corpora: Corpora) -> Iterator[Batch]:
    """Yield a few rows' first tokens; where a row goes on, the last one shown is its separator."""
    batch = next(_heldout(corpora, SAMPLES))
    for row in range(min(SAMPLES, len(batch.length_B))):
        length = int(batch.length_B[row])
        ids_BS = batch.ids_BS[row : row + 1, : min(length, SAMPLE_TOKENS)].clone()
        if length > SAMPLE_TOKENS:
            ids_BS[0, -1] = corpora.separator
        shown_B = torch.tensor([ids_BS.shape[1]])
        yield replace(batch, ids_BS=ids_BS, length_B=shown_B, segment_B=batch.segment_B[row : row + 1])


def _maps(encoder: PreTrainedModel, row: Inputs, layers: Sequence[int]) -> list[Tensor]:
    need = Need(scores=frozenset(layers))
    seen = capture(encoder, row.ids_BS, row.attention_mask, row.token_type_BS, need=need)
    maps = []
    for layer in layers:
        query, key = seen.queries[layer - 1], seen.keys[layer - 1]
        assert query is not None and key is not None
        maps.append(attention_map(query, key, seen.scalings[layer - 1], row.layout.mask_BS)[0].cpu())
    return maps
