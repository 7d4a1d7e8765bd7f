"""More examples of a task, made by replacing words: TinyBERT's data augmentation.

Jiao et al. 2019, arXiv:1909.10351, section 3.2 and algorithm 1. Every word of an example has candidates: a
word of one token those that a masked language model finds most probable in its place, a word of several
tokens its nearest neighbours among word vectors. A copy of the example has each word replaced with
probability p by one of its candidates; its label stays. As in the code released with the paper, function
words are not replaced, nor is what is not all letters, and copies that are equal count once. Unlike it, a
copy of a pair has words replaced in both texts, and the model sees the masked row alone, not the unmasked
one beside it.

Letters: N copies, W words of an example.
"""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Encoding
from transformers import PreTrainedTokenizerFast

from configs.task_schema import AugmentationConfig
from sharding.examples import Example
from trainer.masked_words import MaskedWords, plain
from trainer.word_vectors import WordVectors

FUNCTION_WORDS = frozenset(
    "a an the this that these those each every either neither some any no none all both few more most "
    "much many several such other another own same i me my mine myself we us our ours ourselves you "
    "your yours yourself yourselves he him his himself she her hers herself it its itself they them "
    "their theirs themselves one who whom whose which what where when why how am is are was were be "
    "been being have has had having do does did doing done can could may might must shall should will "
    "would ought not nor never and or but if because as until while although though unless since "
    "whether than so then of at by for with about against between among into onto through during before "
    "after above below to from up down in out on off over under again further once here there within "
    "without upon only very too just now also s t d m ll re ve don didn doesn isn aren wasn weren hasn "
    "haven hadn won wouldn couldn shouldn ain".split()
)
"""They carry an example's grammar, and with ``not`` and its like its label; they stay."""


@dataclass(frozen=True)
class Word:
    """One word of an example that may be replaced."""

    text: int
    """0: of the first text, 1: of the second."""
    start: int
    stop: int
    """Characters [start, stop) of that text."""
    written: str
    place: int | None
    """Of its token in the row, if it is one token that the tokenizer knows."""


def words_of(example: Example, row: Encoding, unknown_id: int | None) -> list[Word]:
    """Return the words of an example that may be replaced, in the order of its row, ``row``, of tokens."""
    found = []
    tokens = zip(row.sequence_ids, row.word_ids, row.offsets, row.ids, range(len(row)), strict=True)
    for (text, word), group in groupby(tokens, key=lambda token: token[:2]):
        if text is None or word is None:
            continue
        pieces = list(group)
        whole = example.a if text == 0 else example.b or ""
        start, stop = pieces[0][2][0], pieces[-1][2][1]
        start = stop - len(whole[start:stop].lstrip())  # byte-level tokenizers count the space before
        written = whole[start:stop]
        if not written.isalpha() or written.lower() in FUNCTION_WORDS or whole[stop : stop + 1].isalpha():
            continue  # the last: cut off at the row's end
        known = len(pieces) == 1 and pieces[0][3] != unknown_id
        found.append(Word(text, start, stop, written, pieces[0][4] if known else None))
    return found


def choices(
    seed: int, example_id: str, candidates: Sequence[int], copies: int, probability: float
) -> NDArray[np.int64]:
    """Choose for every copy and word: 0 keeps the word, c its c-th candidate of ``candidates`` [W].

    The numbers are raw outputs of Philox-4x64 (see ``sharding.order``) keyed by (seed, example), two for
    every (copy, word): what a copy is does not depend on how many there are, nor on other examples.

    Returns: int64 [N, W].
    """
    key = np.frombuffer(hashlib.sha256(f"{seed} {example_id}".encode()).digest()[:16], dtype="<u8")
    raw_NW2 = np.random.Philox(key=key).random_raw(2 * copies * len(candidates))
    raw_NW2 = raw_NW2.reshape(copies, len(candidates), 2)
    replaced_NW = (raw_NW2[..., 0] >> np.uint64(11)) * 2.0**-53 < probability
    count_W = np.asarray(candidates, dtype=np.uint64)
    candidate_NW = ((raw_NW2[..., 1] >> np.uint64(32)) * count_W >> np.uint64(32)).astype(np.int64)
    return np.where(replaced_NW, candidate_NW + 1, 0)


def rewrite(example: Example, replacements: Iterable[tuple[Word, str]]) -> tuple[str, str | None]:
    """Return the two texts of an example with words replaced, given in the order of ``words_of``."""
    texts, ends = (example.a, example.b or ""), [0, 0]
    parts: tuple[list[str], list[str]] = ([], [])
    for word, new in replacements:
        parts[word.text].extend((texts[word.text][ends[word.text] : word.start], new))
        ends[word.text] = word.stop
    a, b = ("".join([*done, text[end:]]) for done, text, end in zip(parts, texts, ends, strict=True))
    return a, None if example.b is None else b


class Augmentor:
    """What proposes words, and the examples that are made with them."""

    def __init__(
        self,
        config: AugmentationConfig,
        copies: int,
        tokenizer: PreTrainedTokenizerFast,
        seq_len: int,
        device: torch.device,
    ) -> None:
        """Load the masked language model and the word vectors.

        Args:
            config: where they are, and how many candidates they propose.
            copies: made of every example, at most.
            tokenizer: splits texts into words where there is no masked language model.
            seq_len: most tokens of a row; words beyond it stay as they are.
            device: of the masked language model.

        Raises:
            ValueError: neither is set, or one cannot be read.
        """
        if config.masked_lm is None and config.vectors is None:
            raise ValueError(
                "augmentation.masked_lm and augmentation.vectors are both not set, so nothing proposes "
                "words; set one or both"
            )
        self.config, self.copies = config, copies
        self.masked = MaskedWords(config, device) if config.masked_lm else None
        self.vectors = WordVectors.read(config.vectors, config.candidates) if config.vectors else None
        if self.masked is not None:
            tokenizer, seq_len = self.masked.tokenizer, min(seq_len, self.masked.seq_len)
        self.tokenizer, self.unknown_id = plain(tokenizer, seq_len), tokenizer.unk_token_id

    def augmented(
        self, examples: Sequence[Example], beat: Callable[[str], None] = lambda place: None
    ) -> list[Example]:
        """Return every example, followed by its copies. ``beat`` is called between forward passes."""
        rows = self.tokenizer.encode_batch([e.a if e.b is None else (e.a, e.b) for e in examples])
        words = [words_of(e, row, self.unknown_id) for e, row in zip(examples, rows, strict=True)]
        options = self._options(rows, words, beat)
        return [made for e, own in zip(examples, options, strict=True) for made in (e, *self._copies(e, own))]

    def _options(
        self, rows: Sequence[Encoding], words: Sequence[Sequence[Word]], beat: Callable[[str], None]
    ) -> list[list[tuple[Word, list[str]]]]:
        """The words of every row that have candidates, and these, in the case of the word."""
        flat = [(row, word) for row, own in enumerate(words) for word in own]
        single = [n for n, (_, word) in enumerate(flat) if self.masked is not None and word.place is not None]
        found: dict[int, list[str]] = {}
        if self.masked is not None:
            places = [(row, word.place or 0) for row, word in (flat[n] for n in single)]
            found |= zip(single, self.masked.propose(rows, places, beat), strict=True)
        if self.vectors is not None:
            others = sorted(set(range(len(flat))) - set(single))
            found |= zip(others, self.vectors.nearest(flat[n][1].written for n in others), strict=True)
        options: list[list[tuple[Word, list[str]]]] = [[] for _ in rows]
        for n, (row, word) in enumerate(flat):
            cased = (new.capitalize() if word.written.istitle() else new for new in found.get(n, []))
            if own := [new for new in cased if new.casefold() != word.written.casefold()]:
                options[row].append((word, own))
        return options

    def _copies(self, example: Example, options: Sequence[tuple[Word, Sequence[str]]]) -> list[Example]:
        config, counts = self.config, [len(own) for _, own in options]
        chosen_NW = choices(config.seed, example.id, counts, self.copies, config.probability)
        texts = {(example.a, example.b): None}  # a set that keeps its order
        for chosen_W in chosen_NW.tolist():
            new = ((word, own[c - 1]) for (word, own), c in zip(options, chosen_W, strict=True) if c)
            texts[rewrite(example, new)] = None
        return [replace(example, id=f"{example.id}/{n}", a=a, b=b) for n, (a, b) in enumerate(texts) if n > 0]
