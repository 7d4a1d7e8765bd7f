"""Operations counted from configs against the operations that torch sees."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from configs.student_schema import Projection
from tests.trainer.tiny import ARCHITECTURES, WIDTH, rows, tiny_config, tiny_student
from trainer.capture import Head, Need, capture, shorten
from trainer.encoders import new_encoder
from trainer.flops import (
    _FEED_FORWARD_MATRICES,
    matrix_rate,
    student_row_flops,
    teacher_row_flops,
)
from trainer.models import build_student

WIDE = {"hidden_size": 24, "num_attention_heads": 3, "num_hidden_layers": 2, "intermediate_size": 40}
SHAPES = dict.fromkeys(_FEED_FORWARD_MATRICES, WIDE) | {
    "distilbert": {"dim": 24, "n_heads": 3, "n_layers": 2, "hidden_dim": 40},
    "electra": {**WIDE, "embedding_size": 10},
    "modernbert": {**WIDE, "local_attention": 4},
}
HEADS = [model_type for model_type in SHAPES if model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES]
WHOLE = Need.everything(2)


def counted(call) -> int:
    """Operations that torch sees; it has no count for its fused attention on CPU, so that is taken apart."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        call()
    return counter.get_total_flops()


@pytest.mark.parametrize("model_type", SHAPES)
def test_an_encoder_equals_the_operations_that_torch_counts(model_type):
    config = AutoConfig.for_model(model_type, vocab_size=50, pad_token_id=0, **SHAPES[model_type])
    model = AutoModel.from_config(config, attn_implementation="eager").eval()
    model.pooler = None
    ids_BS = torch.ones(3, 8, dtype=torch.long)
    found = counted(lambda: model(input_ids=ids_BS, attention_mask=torch.ones_like(ids_BS)))
    assert 3 * teacher_row_flops(config, 8, WHOLE) == found


@pytest.mark.parametrize("model_type", HEADS)
def test_a_head_equals_the_operations_that_torch_counts(model_type):
    config = AutoConfig.for_model(model_type, vocab_size=50, pad_token_id=0, **SHAPES[model_type])
    model = AutoModelForMaskedLM.from_config(config, attn_implementation="eager").eval()
    found = counted(lambda: model(input_ids=torch.ones(3, 8, dtype=torch.long)))
    assert 3 * teacher_row_flops(config, 8, Need(head=Head.masked_lm)) == found


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(
    "need",
    [Need(hidden=frozenset({3})), Need(scores=frozenset({2})), Need(hidden=frozenset({0, 1, 2, 3, 4}))],
    ids=["hidden-3", "scores-2", "all"],
)
def test_a_shortened_teacher_that_may_end_in_its_last_attention(architecture, need):
    teacher = new_encoder(tiny_config(architecture)).eval()
    if need.depth(4) < 4:
        shorten(teacher, need.depth(4))
    ids_BS, _ = rows(3, 12)
    found = counted(lambda: capture(teacher, ids_BS, need=need, may_stop=True))
    assert 3 * teacher_row_flops(teacher.config, 12, need) == found


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("projection", Projection)
def test_a_student_forward_and_backward(architecture, projection):
    config = tiny_config(architecture)
    settings = tiny_student(projection=projection, architecture=architecture, heads=4, layers=4)
    student = build_student(settings, lambda: None, config, seed=0)
    ids_BS, _ = rows(3, 12)

    def step() -> None:
        left = student(ids_BS, None, torch.zeros_like(ids_BS))
        kept = [x for name in ("hidden", "queries", "keys") for x in left[name] if x is not None]
        sum(x.float().square().sum() for x in kept).backward()

    own = student.encoder.config
    assert 3 * student_row_flops(own, 12, student.need, WIDTH) == counted(step)


def test_bert_base_is_175_megaflops_a_token():
    # Per layer and token: 4 * 768^2 + 2 * 768 * 3072 = 7,077,888 weights and 2 * 128 * 768 = 196,608 products
    # in attention; 12 layers of 7,274,496 multiply-adds, twice: 174,587,904 operations.
    assert teacher_row_flops(AutoConfig.for_model("bert"), 128, Need.everything(12)) == 174_587_904 * 128


def test_an_unknown_architecture_is_refused():
    with pytest.raises(ValueError, match="'gpt2' has no operation count; known: bert, "):
        teacher_row_flops(AutoConfig.for_model("gpt2"), 8, WHOLE)


def test_the_rate_is_that_of_a_product():
    """1024^3 multiply-adds: between what a slow core and what the largest accelerator does."""
    assert 1e8 < matrix_rate(torch.float32, torch.device("cpu"), repeats=2) < 1e16
