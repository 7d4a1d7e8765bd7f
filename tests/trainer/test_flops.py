import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModel

from trainer.flops import _FEED_FORWARD_MATRICES, encoder_forward_flops

WIDE = {"hidden_size": 24, "num_attention_heads": 3, "num_hidden_layers": 2, "intermediate_size": 40}
SHAPES = dict.fromkeys(_FEED_FORWARD_MATRICES, WIDE) | {
    "distilbert": {"dim": 24, "n_heads": 3, "n_layers": 2, "hidden_dim": 40},
    "electra": {**WIDE, "embedding_size": 10},
    "modernbert": {**WIDE, "local_attention": 4},
}


@pytest.mark.parametrize("model_type", SHAPES)
def test_equals_the_operations_that_torch_counts(model_type):
    config = AutoConfig.for_model(model_type, vocab_size=50, pad_token_id=0, **SHAPES[model_type])
    # Eager attention: torch has no operation count for its fused CPU attention.
    model = AutoModel.from_config(config, attn_implementation="eager").eval()
    model.pooler = None
    ids_BS = torch.ones(3, 8, dtype=torch.long)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=ids_BS, attention_mask=torch.ones_like(ids_BS))
    assert encoder_forward_flops(config, rows=3, seq_len=8) == counter.get_total_flops()


def test_bert_base_is_175_megaflops_a_token():
    # Per layer and token: 4 * 768^2 + 2 * 768 * 3072 = 7,077,888 weights and 2 * 128 * 768 = 196,608 products
    # in attention; 12 layers of 7,274,496 multiply-adds, twice: 174,587,904 operations.
    assert encoder_forward_flops(AutoConfig.for_model("bert"), rows=1, seq_len=128) == 174_587_904 * 128


def test_an_unknown_architecture_is_refused():
    with pytest.raises(ValueError, match="'gpt2' has no operation count; known: bert, "):
        encoder_forward_flops(AutoConfig.for_model("gpt2"), rows=1, seq_len=8)
