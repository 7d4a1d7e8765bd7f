"""Capture against the stock library: eager attention probabilities, hidden states, outputs, gradients."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM, T5EncoderModel

import trainer.capture
from trainer.capture import Head, Need, capture, check_supported, enable_capture
from trainer.layout import layout
from trainer.models import attention_mask

LAYERS, HEADS, WIDTH, VOCABULARY = 3, 2, 16, 40
SHAPE = {
    "hidden_size": WIDTH,
    "num_attention_heads": HEADS,
    "num_hidden_layers": LAYERS,
    "intermediate_size": 24,
    "max_position_embeddings": 32,
}
NO_SPECIAL_TOKENS = {f"{name}_token_id": None for name in ("bos", "eos", "cls", "sep")}
CONFIGS = {
    "bert": SHAPE,
    "roberta": {**SHAPE, "type_vocab_size": 1},
    "distilbert": {"dim": WIDTH, "n_heads": HEADS, "n_layers": LAYERS, "hidden_dim": 24},
    "electra": {**SHAPE, "embedding_size": 10},
    # Windows of 2 tokens either side in two of the three layers: the mask differs from layer to layer.
    "modernbert": {**SHAPE, "local_attention": 4, "global_attn_every_n_layers": 3, **NO_SPECIAL_TOKENS},
}
every_encoder = pytest.mark.parametrize("model_type", CONFIGS)


def build(model_type, attention="sdpa", **settings):
    """A random encoder with weights large enough for attention that is far from uniform."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        model_type, vocab_size=VOCABULARY, pad_token_id=0, **{**CONFIGS[model_type], **settings}
    )
    model = AutoModel.from_config(config, attn_implementation=attention)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=0.3)
    return model


def recording(model_type, **settings):
    model = build(model_type, **settings)
    enable_capture(model)
    return model


def rows():
    ids_BS = torch.randint(1, VOCABULARY, (3, 12), generator=torch.Generator().manual_seed(1))
    mask_BS = torch.arange(12) < torch.tensor([12, 7, 9])[:, None]
    return ids_BS.where(mask_BS, 0), mask_BS.long()


@every_encoder
def test_recorded_scores_reproduce_eager_attention_probabilities(model_type):
    ids_BS, mask_BS = rows()
    eager = build(model_type, "eager").eval()
    expected = eager(
        input_ids=ids_BS, attention_mask=mask_BS, output_attentions=True, output_hidden_states=True
    )
    captured = capture(recording(model_type).eval(), ids_BS, mask_BS)

    valid = mask_BS.bool()
    assert len(captured.queries) == len(captured.keys) == len(captured.scalings) == LAYERS
    for query, key, scaling, probability in zip(
        captured.queries, captured.keys, captured.scalings, expected.attentions, strict=True
    ):
        assert query.shape == key.shape == (3, HEADS, 12, WIDTH // HEADS)
        seen = probability > 0  # where the layer's mask lets it look
        scores = (query @ key.mT * scaling).masked_fill(~seen, -torch.inf)
        ours, theirs = (x.transpose(1, 2)[valid] for x in (scores.softmax(-1), probability))  # valid queries
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)
    assert len(captured.hidden) == LAYERS + 1
    for ours, theirs in zip(captured.hidden, expected.hidden_states, strict=True):
        assert ours.shape[-1] == WIDTH
        torch.testing.assert_close(ours[valid], theirs[valid], atol=1e-5, rtol=1e-5)


@every_encoder
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("padded", [True, False])  # without padding, transformers passes no mask at all
def test_outputs_are_bitwise_those_of_the_stock_model(model_type, dtype, padded):
    ids_BS, mask_BS = rows()
    mask_BS = mask_BS if padded else torch.ones_like(mask_BS)
    stock, ours = build(model_type).to(dtype).eval(), recording(model_type).to(dtype).eval()
    with torch.inference_mode():
        expected = stock(input_ids=ids_BS, attention_mask=mask_BS, output_hidden_states=True)
        captured = capture(ours, ids_BS, mask_BS.bool())
        outside = ours(input_ids=ids_BS, attention_mask=mask_BS)  # also where nothing is recorded
    assert torch.equal(outside.last_hidden_state, expected.last_hidden_state)
    for layer in range(LAYERS + 1):
        assert captured.hidden[layer].dtype == dtype
        assert torch.equal(captured.hidden[layer], expected.hidden_states[layer])


@every_encoder
def test_gradients_of_short_rows_in_bfloat16_err_no_more_than_the_stock_models(model_type, monkeypatch):
    def error(short_row):
        monkeypatch.setattr(trainer.capture, "SHORT_ROW", short_row)
        found = gradients(recording(model_type).eval().to(torch.bfloat16), *rows())
        return sum((found[name].float() - expected).square().sum() for name, expected in exact.items())

    exact = gradients(recording(model_type).eval(), *rows())
    ours, stock = error(128), error(0)
    assert ours != stock and ours < 1.5 * stock


def loss_of(captured):
    """Something that depends on every captured tensor."""
    return sum(x.float().square().sum() for x in captured.hidden + captured.queries + captured.keys)


def gradients(model, *inputs):
    model.zero_grad()
    torch.manual_seed(5)  # of dropout
    loss_of(capture(model, *inputs)).backward()
    return {
        name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None
    }


@every_encoder
def test_gradients_under_checkpointing_equal_those_without_in_training_mode(model_type):
    model = recording(model_type).train()
    plain = gradients(model, *rows())
    model.activation_checkpointing_enable()
    checkpointed = gradients(model, *rows())
    assert plain.keys() == checkpointed.keys() and len(plain) > 6 * LAYERS
    for name in plain:
        torch.testing.assert_close(checkpointed[name], plain[name], msg=name)


def test_reentrant_checkpointing_would_lose_gradients_and_is_refused():
    model = recording("bert").train()
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": True})
    with pytest.raises(ValueError, match="cut off from the gradient"):
        capture(model, *rows())


def test_frozen_lower_layers_are_no_cut_off_gradient():
    model = recording("bert")
    model.embeddings.requires_grad_(False)
    model.encoder.layer[0].requires_grad_(False)
    captured = capture(model, *rows())
    assert [query.requires_grad for query in captured.queries] == [False, True, True]


def test_two_models_one_after_another_and_one_inside_the_other():
    ids_BS, mask_BS = rows()
    first, second = recording("bert").eval(), recording("modernbert").eval()
    alone = [capture(model, ids_BS, mask_BS) for model in (first, second)]
    inner = []
    hook = first.encoder.layer[1].register_forward_hook(
        lambda *_: inner.append(capture(second, ids_BS, mask_BS))
    )
    outer = capture(first, ids_BS, mask_BS)
    hook.remove()
    for nested, reference in ((outer, alone[0]), (inner[0], alone[1])):
        for ours, expected in zip(
            nested.hidden + nested.queries, reference.hidden + reference.queries, strict=True
        ):
            assert torch.equal(ours, expected)


def test_an_error_in_the_forward_pass_ends_the_recording():
    model = recording("bert").eval()
    with pytest.raises(IndexError):
        capture(model, torch.full((1, 4), VOCABULARY), torch.ones(1, 4))
    assert len(capture(model, *rows()).scalings) == LAYERS


def test_only_what_is_asked_for_is_kept():
    model = recording("bert").eval()
    everything = capture(model, *rows())
    some = capture(model, *rows(), need=Need(frozenset({0, 2}), frozenset({1, 3})))
    assert [x is not None for x in some.hidden] == [True, False, True, False]
    assert [x is not None for x in some.queries] == [x is not None for x in some.keys] == [True, False, True]
    assert torch.equal(some.queries[2], everything.queries[2]) and torch.equal(
        some.hidden[2], everything.hidden[2]
    )
    assert some.scalings == everything.scalings
    nothing = capture(model, *rows(), need=Need())
    assert nothing.hidden == [None] * (LAYERS + 1) and nothing.queries == [None] * LAYERS


@pytest.mark.parametrize("model_type, counts", [("bert", True), ("roberta", False), ("distilbert", False)])
def test_token_types_reach_only_an_encoder_that_has_several(model_type, counts):
    model, (ids_BS, mask_BS) = recording(model_type).eval(), rows()
    without = capture(model, ids_BS, mask_BS).hidden[-1]
    segments = capture(model, ids_BS, mask_BS, torch.ones_like(ids_BS)).hidden[-1]
    assert torch.equal(without, segments) != counts


@every_encoder
def test_fully_padded_rows_make_no_nan(model_type):
    model, (ids_BS, mask_BS) = recording(model_type).train(), rows()
    mask_BS[1] = 0
    captured = capture(model, ids_BS, mask_BS)
    assert all(x.isfinite().all() for x in captured.hidden + captured.queries + captured.keys)
    loss_of(captured).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


class Wrapper(nn.Module):
    """As a DeepSpeed engine or DistributedDataParallel holds a model."""

    def __init__(self, module):
        super().__init__()
        self.module, self.calls = module, 0

    def forward(self, *args, **kwargs):
        self.calls += 1
        return self.module(*args, **kwargs)


def test_a_wrapper_is_called_itself():
    model = recording("bert").eval()
    wrapped = Wrapper(Wrapper(model))
    captured = capture(wrapped, *rows())
    assert wrapped.calls == wrapped.module.calls == 1
    assert torch.equal(captured.hidden[-1], capture(model, *rows()).hidden[-1])
    with pytest.raises(ValueError, match="Linear holds no transformers model"):
        capture(nn.Linear(2, 2), *rows())


def test_autocast_is_left_to_the_caller():
    model = recording("bert").eval()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert capture(model, *rows()).queries[0].dtype == torch.bfloat16


def test_check_supported_leaves_mode_and_random_state_alone():
    model = recording("modernbert").train()
    before = torch.get_rng_state()
    check_supported(model)
    assert model.training and torch.equal(before, torch.get_rng_state())
    with pytest.raises(ValueError, match="captured 0 attention calls .*from 3 of 3 layers.*enable_capture"):
        check_supported(build("bert"))


def test_mpnet_does_not_route_through_the_interface():
    model = AutoModel.from_config(AutoConfig.for_model("mpnet", vocab_size=VOCABULARY, **SHAPE))
    with pytest.raises(ValueError, match="model type 'mpnet' .* does not route its attention"):
        enable_capture(model)


def test_grouped_query_attention_is_refused():
    config = AutoConfig.for_model(
        "eurobert", vocab_size=VOCABULARY, pad_token_id=0, num_key_value_heads=1, **SHAPE
    )
    model = AutoModel.from_config(config)
    enable_capture(model)
    with pytest.raises(ValueError, match=r"queries \(1, 2, 2, 8\) but keys \(1, 1, 2, 8\)"):
        check_supported(model)


def test_a_position_bias_in_the_scores_is_refused():
    config = AutoConfig.for_model(
        "t5", vocab_size=VOCABULARY, d_model=WIDTH, num_layers=1, num_heads=HEADS, d_kv=8, d_ff=16
    )
    model = T5EncoderModel(config)
    enable_capture(model)
    with pytest.raises(ValueError, match="adds a position bias"):
        check_supported(model)


def test_a_saved_model_knows_nothing_of_the_recording(tmp_path):
    model = recording("bert").eval()
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path).eval()
    assert loaded.config._attn_implementation == "sdpa"
    ids_BS, mask_BS = rows()
    expected = capture(copy.deepcopy(model), ids_BS, mask_BS).hidden[-1]
    assert torch.equal(loaded(input_ids=ids_BS, attention_mask=mask_BS).last_hidden_state, expected)


# Rows of several documents


@every_encoder
def test_documents_kept_apart_are_encoded_as_if_alone(model_type):
    model, separator = recording(model_type).eval(), 2
    ids_BS = torch.randint(3, VOCABULARY, (2, 16), generator=torch.Generator().manual_seed(2))
    ids_BS[0, [5, 9, 15]], ids_BS[1, [2, 11]] = separator, separator
    together = layout(ids_BS, torch.tensor([16, 12]), separator)
    captured = capture(model, ids_BS, attention_mask(together))
    seen = 0
    for row, first, end in ((0, 0, 6), (0, 6, 10), (0, 10, 16), (1, 0, 3), (1, 3, 12)):
        only_it = torch.zeros(1, 16, dtype=torch.bool)
        only_it[0, first:end] = True
        alone = capture(model, ids_BS[row : row + 1], only_it)  # at the same positions
        for ours, expected in zip(captured.hidden, alone.hidden, strict=True):
            torch.testing.assert_close(ours[row, first:end], expected[0, first:end], atol=1e-6, rtol=1e-6)
        seen += end - first
    assert seen == int(together.mask_BS.sum())


# The masked-language-model head


@every_encoder
def test_the_prediction_reproduces_the_stock_logits(model_type):
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, vocab_size=VOCABULARY, pad_token_id=0, **CONFIGS[model_type])
    stock = AutoModelForMaskedLM.from_config(config).eval()
    ours = copy.deepcopy(stock)
    enable_capture(ours)
    ids_BS, mask_BS = rows()
    need = Need(frozenset({0, LAYERS}), frozenset({1}), frozenset({2}), head=Head.masked_lm)
    captured = capture(ours, ids_BS, mask_BS, need=need)
    features_BSE, weight_VE, bias_V = captured.prediction
    logits = torch.nn.functional.linear(features_BSE, weight_VE, bias_V)
    expected = stock(input_ids=ids_BS, attention_mask=mask_BS, output_hidden_states=True)
    torch.testing.assert_close(logits, expected.logits, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(captured.hidden[-1], expected.hidden_states[-1], atol=1e-6, rtol=1e-6)
    assert [x is not None for x in captured.values] == [False, True, False]
    logits.square().sum().backward()
    assert weight_VE.requires_grad and ours.get_input_embeddings().weight.grad is not None
    assert capture(ours, ids_BS, mask_BS).prediction is None  # only on request


@every_encoder
def test_values_weighed_by_the_scores_are_what_attention_returns(model_type):
    """With the probabilities known (see above), the output of a layer's attention follows from its values."""
    ids_BS, mask_BS = rows()
    model, given = recording(model_type).eval(), []

    def note(*args, **kwargs):
        given.append(scaled_dot_product_attention(*args, **kwargs))
        return given[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", note)
        captured = capture(model, ids_BS, torch.ones_like(mask_BS))
    layer = LAYERS if model_type != "modernbert" else 1  # ModernBERT's first layer sees the whole row
    query, key, value = (x[layer - 1] for x in (captured.queries, captured.keys, captured.values))
    expected = (query @ key.mT * captured.scalings[layer - 1]).softmax(-1) @ value
    torch.testing.assert_close(given[layer - 1], expected, atol=1e-5, rtol=1e-5)
