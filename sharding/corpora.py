"""The corpora of a run: one, or several with weights."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

from sharding.manifest import Corpus
from sharding.mixture import Mixture


@dataclass(frozen=True)
class Part:
    """One corpus of a run."""

    name: str
    """Names it in metrics; unique among the parts."""
    corpus: Corpus
    weight: float
    """Share of the run's rows, up to a common factor."""


@dataclass(frozen=True)
class Corpora:
    """The corpora of a run, in the order in which they are named."""

    parts: tuple[Part, ...]

    @classmethod
    def of(cls, corpora: "Corpus | Corpora") -> "Corpora":
        """A single corpus as the mixture that holds nothing else; a mixture as it is."""
        if isinstance(corpora, Corpora):
            return corpora
        return cls((Part(corpora.store.name, corpora, 1.0),))

    @property
    def corpora(self) -> list[Corpus]:
        """The corpora alone."""
        return [part.corpus for part in self.parts]

    @property
    def fingerprint(self) -> str:
        """The corpus's fingerprint; of several, the SHA-256 of their fingerprints and weights."""
        if len(self.parts) == 1:
            return self.parts[0].corpus.fingerprint
        named = [(part.corpus.fingerprint, part.weight) for part in self.parts]
        return hashlib.sha256(json.dumps(named, separators=(",", ":")).encode("ascii")).hexdigest()

    def rows(self, split: str) -> int:
        """Rows of a split in all corpora."""
        return sum(corpus.split(split).rows for corpus in self.corpora)

    def mixture(self, global_batch_rows: int) -> Mixture:
        """Which rows of which corpora the global steps draw. Raises: ValueError, see ``Mixture``."""
        seq_lens = [corpus.manifest.seq_len for corpus in self.corpora]
        return Mixture(seq_lens, [part.weight for part in self.parts], global_batch_rows)


def mix(named: Sequence[tuple[str, Corpus, float | None]]) -> Corpora:
    """Corpora from names, corpora and weights; without weights each has that of its training rows.

    Raises: ValueError when two have one name, only some have a weight, or tokenizers differ; all together.
    """
    problems = []
    names = [name for name, _, _ in named]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        problems.append(f"the names {', '.join(twice)} are used more than once; give each corpus its own")
    given = [weight for _, _, weight in named if weight is not None]
    if given and len(given) < len(named):
        problems.append("weights are set for some corpora only; set all of them, or none (then rows count)")
    first = named[0][1].manifest.tokenizer
    for name, corpus, _ in named[1:]:
        if corpus.manifest.tokenizer.sha256 != first.sha256:
            problems.append(
                f"{name} was built with tokenizer {corpus.manifest.tokenizer.name}, {names[0]} with "
                f"{first.name}: their ids mean different things; build all corpora with one tokenizer"
            )
    if problems:
        raise ValueError("; ".join(problems))
    return Corpora(
        tuple(
            Part(name, corpus, float(corpus.split("train").rows if weight is None else weight))
            for name, corpus, weight in named
        )
    )
