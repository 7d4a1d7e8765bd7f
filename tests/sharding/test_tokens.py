"""Token ids and the identity of tokenizers."""

import logging
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from sharding.manifest import CorpusError, open_corpus
from sharding.tokens import (
    Encoder,
    check_tokenizer,
    id_dtype,
    load_tokenizer,
    tokenizer_info,
    tokenizer_sha256,
)


def encoder_of(tokenizer: PreTrainedTokenizerFast) -> Encoder:
    info = tokenizer_info(tokenizer, "x", None)
    special = (info.pad_id, info.cls_id, info.sep_id)
    return Encoder(tokenizer.backend_tokenizer.to_str(), info.vocab_size, special)


def byte_level_tokenizer() -> PreTrainedTokenizerFast:
    """RoBERTa's kind: byte-level, with <s>, </s> and <pad>."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<s>", "<pad>", "</s>", "<unk>", *letters])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in ("<s>", "<pad>", "</s>")])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, cls_token="<s>", sep_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )


def test_ids_are_the_tokenizers_own(tiny_tokenizer: Path) -> None:
    tokenizer = load_tokenizer(str(tiny_tokenizer), None)
    texts = ["bade gofi, kula.", "BADE  mino xyz", ""]
    expected = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    found = encoder_of(tokenizer).encode(texts)
    assert [ids.tolist() for ids in found] == expected
    assert all(ids.dtype == np.uint16 for ids in found)


def test_special_tokens_spelled_out_in_text_stay_text(tiny_tokenizer: Path) -> None:
    tokenizer = load_tokenizer(str(tiny_tokenizer), None)
    assert 3 in tokenizer("bade [SEP] mino", add_special_tokens=False)["input_ids"]  # what must not happen
    (ids,) = encoder_of(tokenizer).encode(["bade [SEP] mino [CLS][PAD] [MASK]"])
    assert not set(ids.tolist()) & {0, 2, 3, 4}
    assert tokenizer.convert_ids_to_tokens(ids.tolist())[1:5] == ["[", "s", "##e", "##p"]

    roberta = byte_level_tokenizer()
    assert 2 in roberta("a</s>b", add_special_tokens=False)["input_ids"]
    (ids,) = encoder_of(roberta).encode(["a</s>b<s><pad>"])
    assert not set(ids.tolist()) & {0, 1, 2}
    assert "".join(roberta.convert_ids_to_tokens(ids.tolist())) == "a</s>b<s><pad>"


def test_long_documents_are_neither_cut_nor_warned_about(
    tiny_tokenizer: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_tokenizer, model_max_length=16)
    tokenizer.backend_tokenizer.enable_truncation(8)
    tokenizer.backend_tokenizer.enable_padding(length=8)
    with caplog.at_level(logging.DEBUG):
        long, short = encoder_of(tokenizer).encode(["bade " * 5000, "bade"])
    assert (long.size, short.size) == (5000, 1)
    assert not caplog.records and capfd.readouterr() == ("", "")


def test_hash_ignores_use_and_notices_words(tiny_tokenizer: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(tiny_tokenizer), None)
    before = tokenizer_sha256(tokenizer)
    tokenizer("bade", truncation=True, max_length=4, padding="max_length")
    assert tokenizer.backend_tokenizer.truncation is not None
    assert tokenizer_sha256(tokenizer) == before
    tokenizer.save_pretrained(tmp_path)
    assert tokenizer_sha256(AutoTokenizer.from_pretrained(tmp_path)) == before
    tokenizer.add_tokens(["quux"])
    assert tokenizer_sha256(tokenizer) != before


def test_a_wrong_tokenizer_is_refused(tiny_corpus: Path, tiny_tokenizer: Path) -> None:
    manifest = open_corpus(tiny_corpus).manifest
    check_tokenizer(manifest, load_tokenizer(str(tiny_tokenizer), None))
    with pytest.raises(
        ValueError, match="built with tokenizer .*232 tokens.*build a corpus with the teacher's"
    ):
        check_tokenizer(manifest, byte_level_tokenizer())


def test_tokenizers_that_cannot_make_rows(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="tokenizer=.*cannot be loaded"):
        load_tokenizer(str(tmp_path / "none"), None)
    bare = byte_level_tokenizer()
    bare.cls_token = bare.sep_token = None
    bare.save_pretrained(tmp_path)
    with pytest.raises(CorpusError, match="has no cls, sep token"):
        load_tokenizer(str(tmp_path), None)


def test_a_tokenizer_that_makes_special_ids_of_words_is_refused() -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({"[PAD]": 0, "[CLS]": 1, "[SEP]": 2, "a": 3}, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    with pytest.raises(CorpusError, match="plain text into its cls, sep or pad"):
        Encoder(tokenizer.to_str(), 4, (0, 1, 2)).encode(["a a [SEP] a"])


def test_a_local_tokenizer_is_named_without_its_path(tiny_tokenizer: Path) -> None:
    tokenizer = load_tokenizer(str(tiny_tokenizer), None)
    assert tokenizer_info(tokenizer, f"{tiny_tokenizer}/", None).name == tiny_tokenizer.name
    assert tokenizer_info(tokenizer, "org/name", "v1").name == "org/name"


def test_large_vocabularies_get_wide_ids() -> None:
    assert id_dtype(2**16) == np.uint16
    assert id_dtype(2**16 + 1) == np.uint32
