"""A tiny random masked language model in a folder, for the tests of augmentation."""

from pathlib import Path

import torch
from transformers import AutoTokenizer, BertConfig, BertForMaskedLM, BertPreTrainedModel


def write_masked_lm(
    folder: Path, tokenizer_folder: Path, kind: type[BertPreTrainedModel] = BertForMaskedLM
) -> Path:
    """BERT of 2 layers x 48 whose predictions depend much on the row."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        config = BertConfig(
            vocab_size=len(tokenizer),
            hidden_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=96,
            max_position_embeddings=40,
            initializer_range=0.3,
        )
        kind(config).save_pretrained(folder)
    tokenizer.mask_token = "[MASK]"
    tokenizer.unk_token = "[UNK]"
    tokenizer.save_pretrained(folder)
    return folder
