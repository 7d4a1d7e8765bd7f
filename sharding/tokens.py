"""Token ids of whole documents, and the identity of the tokenizer that makes them.

The Rust tokenizer is used without its Python shell: no truncation, no padding, no special tokens, no warning
about documents longer than the model's row.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from sharding.manifest import CorpusError, Manifest, TokenizerInfo

if TYPE_CHECKING:  # transformers takes seconds to import, and the worker processes do without it
    from transformers import PreTrainedTokenizerFast


def load_tokenizer(name: str, revision: str | None) -> "PreTrainedTokenizerFast":
    """The fast tokenizer at a local folder or on the hub, fit for rows of ``[CLS] A [SEP] B [SEP]``.

    Raises: CorpusError when there is none, it is not a fast one, or it lacks a cls, sep or pad token.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    try:
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise CorpusError(
            f"tokenizer={name} cannot be loaded: {_first_line(error)}; give a hub name or a folder "
            "that holds tokenizer.json (or vocab.txt) and tokenizer_config.json"
        ) from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise CorpusError(
            f"tokenizer={name} is not a fast tokenizer ({type(tokenizer).__name__}); "
            "give one that has a tokenizer.json"
        )
    missing = [token for token in ("cls", "sep", "pad") if getattr(tokenizer, f"{token}_token_id") is None]
    if missing:
        raise CorpusError(
            f"tokenizer={name} has no {', '.join(missing)} token, and rows are [CLS] A [SEP] B [SEP]; "
            "use the tokenizer of an encoder such as BERT or RoBERTa"
        )
    return tokenizer


def tokenizer_info(tokenizer: "PreTrainedTokenizerFast", name: str, revision: str | None) -> TokenizerInfo:
    """What the manifest says of a tokenizer. A local folder is named by its last part alone."""
    return TokenizerInfo(
        name=os.path.basename(os.path.normpath(name)) if os.path.isdir(name) else name,
        revision=revision,
        sha256=tokenizer_sha256(tokenizer),
        vocab_size=len(tokenizer),
        pad_id=tokenizer.pad_token_id,
        cls_id=tokenizer.cls_token_id,
        sep_id=tokenizer.sep_token_id,
    )


def tokenizer_sha256(tokenizer: "PreTrainedTokenizerFast") -> str:
    """SHA-256 (hex) of what decides the ids: the Rust tokenizer's canonical JSON without ``truncation``,
    ``padding`` (settings of use, which any caller may have changed) and ``version`` (of the file format)."""
    fields = json.loads(tokenizer.backend_tokenizer.to_str())
    for key in ("truncation", "padding", "version"):
        fields.pop(key, None)
    canonical = json.dumps(fields, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode("ascii")).hexdigest()


def check_tokenizer(manifest: Manifest, tokenizer: "PreTrainedTokenizerFast") -> None:
    """Raise CorpusError (a ValueError) unless ``tokenizer`` is the one whose ids the corpus holds."""
    found, expected = tokenizer_sha256(tokenizer), manifest.tokenizer
    if found != expected.sha256:
        raise CorpusError(
            f"the corpus was built with tokenizer {expected.name} ({expected.vocab_size} tokens, "
            f"sha256 {expected.sha256[:12]}...), the teacher's is {tokenizer.name_or_path} ({len(tokenizer)} "
            f"tokens, sha256 {found[:12]}...): ids would change meaning; build a corpus with the teacher's"
        )


def id_dtype(vocab_size: int) -> np.dtype[np.uint16] | np.dtype[np.uint32]:
    """The smallest dtype in which every id of the vocabulary can be stored."""
    return np.dtype(np.uint16) if vocab_size <= 2**16 else np.dtype(np.uint32)


class Encoder:
    """Turns texts into ids with one Rust tokenizer, given as its JSON so that it travels to any process."""

    def __init__(self, tokenizer_json: str, vocab_size: int, special_ids: Sequence[int]) -> None:
        self._tokenizer = Tokenizer.from_str(tokenizer_json)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        # A text that says "[SEP]" gets the ids of these characters, never the special token.
        self._tokenizer.encode_special_tokens = True
        self._dtype = id_dtype(vocab_size)
        self._special_ids = np.array(special_ids)

    def encode(self, texts: Sequence[str]) -> list[NDArray[np.integer]]:
        """Ids of each text, uint16 or uint32 [tokens].

        Raises: CorpusError if the tokenizer makes a special token of plain text all the same.
        """
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        documents: list[NDArray[np.integer]] = [np.array(encoding.ids, self._dtype) for encoding in encodings]
        for text, ids in zip(texts, documents, strict=True):
            if np.isin(ids, self._special_ids).any():
                raise CorpusError(
                    f"the tokenizer turns plain text into its cls, sep or pad token (document "
                    f"{text[:60]!r}...), so rows could not be told apart; use another tokenizer"
                )
        return documents


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
