"""Tiny random encoders of every architecture that the project names, for the tests of this room."""

import torch
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel

from configs.student_schema import StudentConfig

LAYERS, WIDTH, HEADS, INNER, VOCABULARY = 4, 48, 4, 96, 232
SHAPE = {
    "hidden_size": WIDTH,
    "num_attention_heads": HEADS,
    "num_hidden_layers": LAYERS,
    "intermediate_size": INNER,
    "max_position_embeddings": 64,
}
NO_SPECIAL_TOKENS = {f"{name}_token_id": None for name in ("bos", "eos", "cls", "sep")}
SETTINGS = {
    "bert": SHAPE,
    # Positions are numbered from pad + 1 = 2, so 66 make room for 64 tokens.
    "roberta": {**SHAPE, "max_position_embeddings": 66, "pad_token_id": 1, "type_vocab_size": 1},
    "distilbert": {
        "dim": WIDTH,
        "n_heads": HEADS,
        "n_layers": LAYERS,
        "hidden_dim": INNER,
        "max_position_embeddings": 64,
    },
    "electra": {**SHAPE, "embedding_size": 24},
    # Windows of 4 tokens either side, but for every third layer.
    "modernbert": {**SHAPE, "local_attention": 8, "global_attn_every_n_layers": 3, **NO_SPECIAL_TOKENS},
}
ARCHITECTURES = list(SETTINGS)


def tiny_config(architecture: str, **settings: object) -> PreTrainedConfig:
    """Room for 64 tokens, 4 layers x 48, 4 heads."""
    return AutoConfig.for_model(
        architecture, **{"vocab_size": VOCABULARY, "pad_token_id": 0, **SETTINGS[architecture], **settings}
    )


def tiny_encoder(architecture: str, seed: int = 0, **settings: object) -> PreTrainedModel:
    """Random weights, large enough for attention and outputs that are far from uniform."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModel.from_config(tiny_config(architecture, **settings))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.eval()


def tiny_student(**settings: object) -> StudentConfig:
    """2 layers x 24, 2 heads."""
    shape = {"layers": 2, "hidden_size": 24, "heads": 2, "intermediate_size": 40}
    return StudentConfig(**{"name": "s", **shape, **settings})  # type: ignore[arg-type]


def rows(count: int = 3, length: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask [B, S], the rows after the first padded."""
    ids_BS = torch.randint(5, VOCABULARY, (count, length), generator=torch.Generator().manual_seed(1))
    mask_BS = torch.arange(length) < torch.tensor([length] + [length // 2 + 1] * (count - 1))[:, None]
    return ids_BS.where(mask_BS, 0), mask_BS
