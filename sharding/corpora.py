"""The corpora of a run: one, or several with weights."""

import hashlib
import json
from dataclasses import dataclass, replace

from configs.schema import CacheConfig, DataConfig
from sharding.cache import NodeCache
from sharding.manifest import Corpus, CorpusError, TaskInfo, open_corpus
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
    node_cache: NodeCache | None = None
    """Through which remote ones are read."""

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
    def shares(self) -> list[float]:
        """Share of the run's rows of each; they add up to 1."""
        return [part.weight / sum(other.weight for other in self.parts) for part in self.parts]

    @property
    def fingerprint(self) -> str:
        """The corpus's fingerprint; of several, the SHA-256 of their fingerprints and weights."""
        if len(self.parts) == 1:
            return self.parts[0].corpus.fingerprint
        named = [(part.corpus.fingerprint, part.weight) for part in self.parts]
        return hashlib.sha256(json.dumps(named, separators=(",", ":")).encode("ascii")).hexdigest()

    @property
    def separator(self) -> int:
        """Id of the token that ends a document within a row; all corpora share the tokenizer."""
        return self.corpora[0].manifest.tokenizer.sep_id

    @property
    def task(self) -> TaskInfo | None:
        """The task whose labels all corpora hold; None where one has none."""
        tasks = {corpus.manifest.task for corpus in self.corpora}
        return tasks.pop() if len(tasks) == 1 else None

    def has(self, split: str) -> bool:
        """Whether all corpora have this split."""
        return all(split in corpus.manifest.splits for corpus in self.corpora)

    def rows(self, split: str) -> int:
        """Rows of a split in all corpora."""
        return sum(corpus.split(split).rows for corpus in self.corpora)

    def mixture(self, global_batch_rows: int) -> Mixture:
        """Which rows of which corpora the global steps draw. Raises: ValueError, see ``Mixture``."""
        seq_lens = [corpus.manifest.seq_len for corpus in self.corpora]
        return Mixture(seq_lens, [part.weight for part in self.parts], global_batch_rows)


def open_corpora(data: DataConfig) -> Corpora:
    """Open the corpus or the mixture of a run; without weights each corpus has that of its training rows.

    Raises: CorpusError, naming all problems together.
    """
    if data.corpus is not None:
        found = Corpora.of(open_corpus(data.corpus))
        return replace(found, node_cache=_node_cache(found, data.cache))
    problems: list[str] = []
    parts: list[Part] = []
    for number, entry in enumerate(data.mixture):
        try:
            corpus = open_corpus(entry.corpus)
            weight = corpus.split("train").rows if entry.weight is None else entry.weight
            parts.append(Part(entry.name or corpus.store.name, corpus, float(weight)))
        except CorpusError as error:
            problems.append(f"data.mixture.{number}: {error}")
    problems += _conflicts(parts)
    if problems:
        raise CorpusError("\n".join(problems))
    mixed = Corpora(tuple(parts))
    return replace(mixed, node_cache=_node_cache(mixed, data.cache))


def _node_cache(corpora: Corpora, settings: CacheConfig) -> NodeCache | None:
    if all(corpus.store.is_local for corpus in corpora.corpora):
        return None
    return NodeCache(settings.folder, settings.max_bytes)


def _conflicts(parts: list[Part]) -> list[str]:
    names = [part.name for part in parts]
    problems = [
        f"data.mixture: the name {name!r} is used {names.count(name)} times; set data.mixture.N.name"
        for name in sorted(set(names))
        if names.count(name) > 1
    ]
    for part in parts[1:]:
        first, own = parts[0].corpus.manifest.tokenizer, part.corpus.manifest.tokenizer
        if own.sha256 != first.sha256:
            problems.append(
                f"data.mixture: {part.name} was built with tokenizer {own.name}, {parts[0].name} with "
                f"{first.name}: their ids mean different things; build all corpora with one tokenizer"
            )
    return problems
