"""Proposed words against the stock model, asked about one masked row at a time with all its logits."""

from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, BertForMaskedLM, BertModel

from configs.schema import Precision
from configs.task_schema import AugmentationConfig
from tests.conftest import WORDS
from tests.trainer.masked_lm import write_masked_lm
from trainer.masked_words import MaskedWords, plain

CPU = torch.device("cpu")
PAIRS = [(" ".join(WORDS[n : 3 * n + 1]), " ".join(WORDS[5 * n : 6 * n + 1])) for n in (1, 4, 2, 4, 3)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Path) -> Path:
    return write_masked_lm(tmp_path_factory.mktemp("masked"), tiny_tokenizer)


def ask(model: Path, batch_tokens: int, threads: int = 1, **settings) -> tuple[list[list[str]], list, list]:
    found = MaskedWords(AugmentationConfig(masked_lm=str(model), batch_tokens=batch_tokens, **settings), CPU)
    rows = plain(found.tokenizer, 40).encode_batch(PAIRS)
    masked = [(n, place) for n, row in enumerate(rows) for place in range(1, len(row) - 1)]
    masked = [(n, place) for n, place in masked if not rows[n].special_tokens_mask[place]]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return found.propose(rows, masked, lambda place: None), rows, masked
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("batch_tokens", [10_000, 64, 1])
def test_words_are_the_stock_models_most_probable(model: Path, batch_tokens: int):
    found, rows, masked = ask(model, batch_tokens, candidates=5)
    stock, tokenizer = BertForMaskedLM.from_pretrained(model).eval(), AutoTokenizer.from_pretrained(model)
    assert len(found) == len(masked) > 40
    for words, (n, place) in zip(found, masked, strict=True):
        ids = tokenizer(*PAIRS[n], return_tensors="pt")
        own = tokenizer.convert_ids_to_tokens(ids["input_ids"][0, place].item())
        ids["input_ids"][0, place] = tokenizer.mask_token_id
        with torch.no_grad():
            order = stock(**ids).logits[0, place].argsort(descending=True)
        tokens = tokenizer.convert_ids_to_tokens(order)
        expected = [token for token in tokens if token.isalpha() and token != own][:5]
        assert sorted(words) == sorted(expected)


def test_neither_pieces_nor_special_tokens_nor_marks_are_words(model: Path):
    found = MaskedWords(AugmentationConfig(masked_lm=str(model)), CPU)
    assert sorted(found.words) == sorted([*WORDS, *"abcdefghijklmnopqrstuvwxyz"])


def test_the_number_of_threads_changes_nothing(model: Path):
    """Left to themselves, CPU kernels round by it: products 48 wide differ from two threads on."""
    assert ask(model, 64)[0] == ask(model, 64, threads=3)[0]


def test_forward_passes_keep_to_their_tokens(model: Path, monkeypatch):
    shapes = []
    real = MaskedWords._forward

    def seen(self, encodings, places):
        shapes.append((len(encodings), max(map(len, encodings))))
        return real(self, encodings, places)

    monkeypatch.setattr(MaskedWords, "_forward", seen)
    _, rows, masked = ask(model, 64)
    assert sum(count for count, _ in shapes) == len(masked)
    assert all(count * longest <= 64 for count, longest in shapes) and len(shapes) < len(masked) / 2


def test_the_last_product_is_float32_in_bfloat16_too(model: Path):
    """Otherwise equal logits would leave the choice to the sort."""
    exact, low = ask(model, 64)[0], ask(model, 64, precision=Precision.bf16)[0]
    shared = [len(set(a) & set(b)) / len(a) for a, b in zip(exact, low, strict=True)]
    assert sum(shared) / len(shared) > 0.85


def test_more_candidates_than_words_are_all_words_but_one(model: Path):
    found, _, _ = ask(model, 10_000, candidates=1000)
    assert {len(words) for words in found} == {len(WORDS) + 26 - 1}


def test_a_model_without_the_head_is_refused(tmp_path: Path, tiny_tokenizer: Path):
    folder = write_masked_lm(tmp_path / "encoder", tiny_tokenizer, BertModel)
    with pytest.raises(ValueError, match="masked_lm=.*not a whole masked language model; name one.*lacks"):
        MaskedWords(AugmentationConfig(masked_lm=str(folder)), CPU)
