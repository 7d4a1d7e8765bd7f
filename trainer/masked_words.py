"""Words that a masked language model proposes in place of a word of a row: many masked rows at once.

Letters: R masked rows, B those of one forward pass, S sequence, E hidden dim, W words of the vocabulary, K
words proposed.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Encoding, Tokenizer
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from configs.task_schema import AugmentationConfig
from sharding.tokens import load_tokenizer
from trainer.capture import Head, Need, capture, enable_capture
from trainer.encoders import DTYPES, load_encoder


class MaskedWords:
    """A masked language model, and the words of its vocabulary.

    A word is a token of letters alone that is a whole word: neither a special token nor a piece of a word.
    """

    def __init__(self, config: AugmentationConfig, device: torch.device) -> None:
        """Load the model that ``config.masked_lm`` names.

        Raises:
            ValueError: it cannot be read, or is no masked language model.
        """
        assert config.masked_lm is not None
        self.batch_tokens, self.device = config.batch_tokens, device
        self.tokenizer = load_tokenizer(config.masked_lm, None)
        if self.tokenizer.mask_token_id is None:
            raise ValueError(
                f"augmentation.masked_lm={config.masked_lm} has no mask token; name a masked language model"
            )
        try:
            model = load_encoder(config.masked_lm, head=Head.masked_lm, dtype=DTYPES[config.precision])
        except ValueError as error:
            raise ValueError(
                f"augmentation.masked_lm={config.masked_lm} is not a whole masked language model; name one, "
                "such as bert-base-uncased, or leave it out and set augmentation.vectors: "
                f"{str(error).partition('; ')[0]}"  # without its own way out
            ) from error
        enable_capture(model)
        self.model = model.eval()
        self.model.to(device)
        self.seq_len = min(model.config.max_position_embeddings, self.tokenizer.model_max_length)
        ids, self.words = _words(self.tokenizer)
        self.candidates = min(config.candidates, len(ids) - 1)
        decoder = model.get_output_embeddings()
        self.id_W = torch.tensor(ids, device=device)
        # The last product is float32 whatever the rest is: in bfloat16 many words are equally probable.
        self._weight_WE = decoder.weight.detach()[self.id_W].float()
        self._bias_W = 0.0 if decoder.bias is None else decoder.bias.detach()[self.id_W].float()

    def sha256(self) -> str:
        """Return the SHA-256 (hex) of all weights."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.cpu().reshape(-1).view(torch.uint8).numpy())
        return digest.hexdigest()

    def propose(
        self, encodings: Sequence[Encoding], masked: Sequence[tuple[int, int]], beat: Callable[[str], None]
    ) -> list[list[str]]:
        """Return for each of the R masked places the K most probable words but the one that stands there.

        They stand in the vocabulary's order. Rows of like length share a forward pass, and of a row the
        head's last product is formed at the masked place and for words alone: [B, W], never [B, S, V].

        On CPU every pass runs on one thread, and as many passes at a time as there are threads: so it is
        faster, and no number of threads, which may go into how products are rounded, changes the words.

        Args:
            encodings: rows without padding.
            masked: for each, the index of its row and the place in it, which holds a word of one token.
            beat: called between forward passes.
        """
        lengths = np.array([len(encodings[row]) for row, _ in masked])
        order = np.argsort(lengths, kind="stable")
        batches = list(_batches(lengths[order], self.batch_tokens))
        found_RK = np.empty((len(masked), self.candidates), dtype=np.int64)

        def forward(batch: slice) -> NDArray[np.int64]:
            return self._forward(
                [encodings[masked[r][0]] for r in order[batch]], [masked[r][1] for r in order[batch]]
            )

        threads = torch.get_num_threads() if self.device.type == "cpu" else 1
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            for batch, words_BK in zip(batches, pool.map(forward, batches), strict=True):
                beat("augmentation")
                found_RK[order[batch]] = words_BK
        return [[self.words[index] for index in row] for row in found_RK.tolist()]

    @torch.inference_mode()
    def _forward(self, encodings: list[Encoding], places: list[int]) -> NDArray[np.int64]:
        """Indices [B, K] of words; every row is masked at its place."""
        length_B = torch.tensor([len(encoding) for encoding in encodings])
        ids_BS, type_BS = torch.zeros(2, len(encodings), int(length_B.max()), dtype=torch.long)
        for row, encoding in enumerate(encodings):
            ids_BS[row, : len(encoding)] = torch.tensor(encoding.ids)
            type_BS[row, : len(encoding)] = torch.tensor(encoding.type_ids)
        mask_BS = torch.arange(ids_BS.shape[1]) < length_B[:, None]
        ids_BS[~mask_BS] = self.tokenizer.pad_token_id
        row_B, place_B = torch.arange(len(encodings)), torch.tensor(places)
        own_B1 = ids_BS[row_B, place_B, None].to(self.device)
        ids_BS[row_B, place_B] = self.tokenizer.mask_token_id
        captured = capture(
            self.model,
            ids_BS.to(self.device),
            None if mask_BS.all() else mask_BS.to(self.device),
            type_BS.to(self.device),
            need=Need(head=Head.masked_lm),
        )
        assert captured.prediction is not None
        features_BE = captured.prediction.features_BSE[row_B, place_B].float()
        logits_BW: Tensor = features_BE @ self._weight_WE.mT + self._bias_W
        logits_BW.masked_fill_(own_B1 == self.id_W, -torch.inf)
        return logits_BW.topk(self.candidates).indices.sort().values.cpu().numpy()


def _batches(lengths: NDArray[np.int64], tokens: int) -> Iterator[slice]:
    """Cut rows of ascending lengths so that a batch, padded to its longest row, has at most ``tokens``."""
    start = 0
    for stop in range(1, len(lengths) + 1):
        if stop == len(lengths) or (stop + 1 - start) * lengths[stop] > tokens:
            yield slice(start, stop)
            start = stop


def plain(tokenizer: PreTrainedTokenizerFast, seq_len: int | None = None) -> Tokenizer:
    """Return the Rust tokenizer without padding, cutting rows to ``seq_len``; no text is a special token."""
    copied = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    copied.no_padding()
    copied.no_truncation()
    if seq_len is not None:
        copied.enable_truncation(seq_len, strategy="longest_first")
    copied.encode_special_tokens = True
    return copied


def _words(tokenizer: PreTrainedTokenizerFast) -> tuple[list[int], list[str]]:
    """Ids and texts of the tokens that are words: as words of their own they are read as that one token."""
    tokens = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    texts = [tokenizer.convert_tokens_to_string([token]).strip() for token in tokens]
    letters = [(number, text) for number, text in enumerate(texts) if text.isalpha()]
    read = plain(tokenizer).encode_batch_fast([f" {text}" for _, text in letters], add_special_tokens=False)
    found = [pair for pair, encoding in zip(letters, read, strict=True) if encoding.ids == [pair[0]]]
    return [number for number, _ in found], [text for _, text in found]
