"""Examples made by replacing words: what is chosen, what is written, what stays."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from configs.task_schema import AugmentationConfig
from sharding.examples import Example
from tests.conftest import WORDS
from tests.trainer.masked_lm import write_masked_lm
from trainer.masked_words import MaskedWords, plain
from trainer.replacement import FUNCTION_WORDS, Augmentor, Word, choices, rewrite, words_of

CPU = torch.device("cpu")
# Of the tiny tokenizer's words; "vobade" and "Zebra" are several pieces, "\u4e2d" it does not know.
PAIR = Example("train-3", "The bade, (FIFI)  not x2 vobade \u4e2d.", "gogo? Zebra [MASK] kuku", 2.5)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Path) -> Path:
    return write_masked_lm(tmp_path_factory.mktemp("masked"), tiny_tokenizer)


@pytest.fixture(scope="module")
def vectors(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Word n lies at n degrees: its neighbours are the words beside it. Two words are no tokens."""
    path = tmp_path_factory.mktemp("vectors") / "vectors.txt"
    words = [*WORDS, "vobade", "zebra"]
    lines = [f"{w} {np.cos(np.radians(n))} {np.sin(np.radians(n))}" for n, w in enumerate(words)]
    path.write_text("\n".join(lines))
    return path


def augmentor(tokenizer: Path, copies: int = 20, seq_len: int = 40, **settings) -> Augmentor:
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in settings.items()}
    loaded = AutoTokenizer.from_pretrained(tokenizer)
    return Augmentor(AugmentationConfig(**settings), copies, loaded, seq_len, CPU)


def row_of(example: Example, folder: Path, seq_len: int = 40):
    tokenizer = plain(AutoTokenizer.from_pretrained(folder), seq_len)
    return tokenizer.encode(example.a, example.b)


def test_words_are_whole_of_letters_and_no_function_words(tiny_tokenizer: Path):
    row = row_of(PAIR, tiny_tokenizer)
    found = words_of(PAIR, row, unknown_id=1)
    assert [(word.text, word.written) for word in found] == [
        *((0, "bade"), (0, "FIFI"), (0, "vobade"), (0, "\u4e2d")),
        *((1, "gogo"), (1, "Zebra"), (1, "MASK"), (1, "kuku")),
    ]
    for word in found:
        assert (PAIR.a, PAIR.b)[word.text][word.start : word.stop] == word.written
    single = {word.written: row.tokens[word.place] for word in found if word.place is not None}
    assert single == {"bade": "bade", "FIFI": "fifi", "gogo": "gogo", "kuku": "kuku"}


def test_a_word_that_the_rows_end_cuts_off_stays(tiny_tokenizer: Path):
    example = Example("train-0", "bade zebra", None, 0)
    assert [word.written for word in words_of(example, row_of(example, tiny_tokenizer), 1)] == [
        "bade",
        "zebra",
    ]
    for seq_len in (4, 5, 6, 7):  # [CLS] bade z ... [SEP]
        assert [word.written for word in words_of(example, row_of(example, tiny_tokenizer, seq_len), 1)] == [
            "bade"
        ]


def test_function_words_hold_negations_and_are_lower_case():
    assert {"not", "no", "never", "nor", "without", "the", "i"} <= FUNCTION_WORDS
    assert all(word == word.lower() and word.isalpha() for word in FUNCTION_WORDS)


def test_choices_are_pinned():
    """Golden values: another release of NumPy, another machine or other copies make the same examples."""
    assert choices(0, "train-0", [3, 15, 1], 4, 0.4).tolist() == [[0, 0, 0], [3, 0, 1], [0, 0, 0], [2, 0, 0]]


def test_a_copys_choices_depend_on_seed_and_example_alone():
    few, many = (choices(5, "train-9", [4, 7], copies, 0.5) for copies in (3, 50))
    assert np.array_equal(few, many[:3])
    others = [choices(6, "train-9", [4, 7], 50, 0.5), choices(5, "train-8", [4, 7], 50, 0.5)]
    assert not any(np.array_equal(many, other) for other in others)


def test_words_are_replaced_with_the_probability_and_candidates_are_equally_likely():
    chosen = choices(1, "train-1", [5, 2], 20_000, 0.4)
    kept = (chosen == 0).mean(axis=0)
    np.testing.assert_allclose(kept, 0.6, atol=0.02)  # a standard deviation is 0.0035
    for word, count in enumerate((5, 2)):
        share = np.bincount(chosen[:, word], minlength=count + 1)[1:] / 20_000
        np.testing.assert_allclose(share, 0.4 / count, atol=0.02)
    assert abs(np.corrcoef((chosen > 0).T)[0, 1]) < 0.03
    assert choices(1, "x", [3], 100, 1.0).min() == 1 and choices(1, "x", [], 3, 0.4).shape == (3, 0)


def test_a_text_is_rewritten_in_place():
    first, second, other = Word(0, 0, 1, "a", 1), Word(0, 4, 6, "bc", 2), Word(1, 1, 2, "d", 3)
    pair = Example("e", "a - bc!", "(d)", 1)
    assert rewrite(pair, [(first, "one"), (second, "two"), (other, "three")]) == ("one - two!", "(three)")
    assert rewrite(pair, [(other, "x")]) == ("a - bc!", "(x)")
    assert rewrite(Example("e", "a - bc!", None, 1), [(second, "x")]) == ("a - x!", None)


def test_both_texts_of_a_pair_change_and_all_else_stays(tiny_tokenizer: Path, model: Path, vectors: Path):
    made = augmentor(tiny_tokenizer, 60, masked_lm=model, vectors=vectors, candidates=4).augmented([PAIR])
    assert made[0] == PAIR and 50 < len(made) <= 61
    assert {example.label for example in made} == {2.5}
    assert len({example.id for example in made}) == len({(e.a, e.b) for e in made}) == len(made)
    seen: dict[int, set[str]] = {}
    for example in made:
        tokens = f"{example.a} {example.b}".replace("  ", " ").split(" ")
        assert tokens[0] == "The" and tokens[3:5] == ["not", "x2"] and tokens[6] == "\u4e2d."
        assert tokens[1].endswith(",") and tokens[2][0] + tokens[2][-1] == "()" and tokens[7].endswith("?")
        for place, token in enumerate(tokens):
            seen.setdefault(place, set()).add(token.strip("(),?.[]"))
    # One token: the model's 4 and the word itself. Several: its neighbours in degrees, in its own case.
    assert {place: len(words) for place, words in seen.items() if len(words) > 1} == {
        **{1: 5, 2: 5, 5: 5, 7: 5, 8: 5, 10: 5}
    }
    assert seen[5] == {"vobade", "zebra", *WORDS[-3:]}
    assert seen[8] == {"Zebra", "Vobade", *(word.capitalize() for word in WORDS[-3:])}


def test_the_model_sees_the_whole_masked_pair(tiny_tokenizer: Path, model: Path):
    """The candidates of a word in the first text are those of its row with the second text."""
    found = augmentor(tiny_tokenizer, 400, masked_lm=model, candidates=3, probability=1.0)
    for b in ("gogo", "kuku lala"):
        example = Example("train-0", "bade", b, 0)
        words = MaskedWords(found.config, CPU).propose(
            [row_of(example, tiny_tokenizer)], [(0, 1)], lambda place: None
        )
        assert {made.a for made in found.augmented([example])[1:]} == set(words[0])


def test_vectors_alone_propose_for_all_words(tiny_tokenizer: Path, vectors: Path):
    example = Example("train-0", f"{WORDS[50]} zebra", None, 1)
    made = augmentor(tiny_tokenizer, 200, vectors=vectors, candidates=2, probability=1.0).augmented([example])
    found = [set(words) for words in zip(*(e.a.split() for e in made[1:]), strict=True)]
    assert found == [{WORDS[49], WORDS[51]}, {"vobade", WORDS[-1]}]


def test_the_model_alone_leaves_words_of_several_pieces(tiny_tokenizer: Path, model: Path):
    made = augmentor(tiny_tokenizer, masked_lm=model, probability=1.0).augmented(
        [Example("train-0", "zebra bade", None, 1), Example("train-1", "zebra 12 !", None, 0)]
    )
    assert all(example.a.startswith("zebra ") for example in made)
    assert [example.id for example in made if example.id.startswith("train-1")] == ["train-1"]


def test_examples_do_not_depend_on_those_beside_them(tiny_tokenizer: Path, model: Path, vectors: Path):
    random = np.random.default_rng(0)
    examples = [
        Example(f"train-{n}", " ".join(random.choice(WORDS, random.integers(1, 12))), None, n % 2)
        for n in range(12)
    ]
    found = augmentor(tiny_tokenizer, masked_lm=model, vectors=vectors)
    together = found.augmented(examples)
    assert together == [made for example in examples for made in found.augmented([example])]


def test_nothing_that_proposes_is_refused(tiny_tokenizer: Path):
    with pytest.raises(ValueError, match="masked_lm and augmentation.vectors are both not set"):
        augmentor(tiny_tokenizer)
