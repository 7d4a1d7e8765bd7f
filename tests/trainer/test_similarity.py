"""CKA against its definition by [n, n] matrices; its invariances; attention maps against transformers."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import BertConfig, BertModel

from trainer.capture import Need, capture, enable_capture
from trainer.similarity import Moments, attention_map

ROWS, SEQ, P, Q = 12, 7, 5, 9
LENGTHS = torch.tensor([7, 3, 1, 5, 7, 2, 6, 4, 7, 7, 2, 5])
MASK_BS = torch.arange(SEQ) < LENGTHS[:, None]


def layers(count: int, features: int, seed: int) -> list[Tensor]:
    """Outputs with means far from 0; padding is large and must not count."""
    random = torch.Generator().manual_seed(seed)
    mixing = torch.randn(4, features, generator=random)
    shared = torch.randn(ROWS, SEQ, 4, generator=torch.Generator().manual_seed(0))
    found = []
    for layer in range(count):
        own = shared @ mixing + (0.5 + layer) * torch.randn(ROWS, SEQ, features, generator=random)
        found.append(torch.where(MASK_BS[:, :, None], own + 30, 1e6))
    return found


def by_definition(x: Tensor, y: Tensor) -> float:
    """HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L)), K = X X', of Kornblith et al. 2019, section 3."""
    x_nP, y_nQ = (own[MASK_BS].double().numpy() for own in (x, y))
    n = len(x_nP)
    h_nn = np.eye(n) - 1 / n

    def hsic(k_nn: NDArray[np.float64], l_nn: NDArray[np.float64]) -> float:
        return float(np.trace(k_nn @ h_nn @ l_nn @ h_nn)) / (n - 1) ** 2

    k_nn, l_nn = x_nP @ x_nP.T, y_nQ @ y_nQ.T
    return hsic(k_nn, l_nn) / np.sqrt(hsic(k_nn, k_nn) * hsic(l_nn, l_nn))


def cka(x: list[Tensor], y: list[Tensor], batch: int = ROWS) -> Tensor:
    found = Moments()
    for first in range(0, ROWS, batch):
        rows = slice(first, first + batch)
        found.add([own[rows] for own in x], [own[rows] for own in y], MASK_BS[rows])
    assert found.tokens == int(LENGTHS.sum())
    return found.cka()


@pytest.mark.parametrize("batch", [1, 5, ROWS])
def test_cka_is_that_of_the_definition_whatever_the_batches(batch: int) -> None:
    x, y = layers(2, P, 1), layers(3, Q, 2)
    found = cka(x, y, batch)
    assert found.shape == (2, 3) and found.dtype == torch.float64
    for m in range(2):
        for n in range(3):
            assert found[m, n].item() == pytest.approx(by_definition(x[m], y[n]), rel=1e-9)


def test_cka_is_1_of_equal_outputs_and_knows_neither_rotation_nor_scale_nor_shift() -> None:
    x, y = layers(1, P, 1), layers(1, Q, 2)
    assert cka(x, x).item() == pytest.approx(1, abs=1e-12)
    turned, _ = torch.linalg.qr(torch.randn(P, P, generator=torch.Generator().manual_seed(3)))
    moved = [-4 * x[0] @ turned + 100]
    assert cka(x, moved).item() == pytest.approx(1, abs=1e-9)
    assert cka(moved, y).item() == pytest.approx(cka(x, y).item(), rel=1e-6)
    stretched = [x[0] * torch.tensor([10.0, 1, 1, 1, 1])]
    assert cka(stretched, y).item() != pytest.approx(cka(x, y).item(), rel=1e-2)


def test_cka_of_outputs_that_share_nothing_is_small_and_of_constant_ones_unknown() -> None:
    random = torch.Generator().manual_seed(5)
    x, y = torch.randn(50, 100, 4, generator=random), torch.randn(50, 100, 4, generator=random)
    found = Moments()
    found.add([x], [y, torch.ones_like(y)], torch.ones(50, 100, dtype=torch.bool))
    assert found.cka()[0, 0] < 0.01 and found.cka()[0, 1].isnan()


def test_attention_maps_are_those_that_transformers_computes() -> None:
    config = BertConfig(
        vocab_size=50,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=32,
        initializer_range=0.4,
        attn_implementation="eager",
    )
    model = BertModel(config, add_pooling_layer=False).eval()
    ids_BS = torch.randint(1, 50, (ROWS, SEQ), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(ids_BS, attention_mask=MASK_BS.long(), output_attentions=True).attentions
        enable_capture(model)
        seen = capture(model, ids_BS, MASK_BS, need=Need(scores=frozenset({1, 2})))
    for layer in range(2):
        query, key = seen.queries[layer], seen.keys[layer]
        assert query is not None and key is not None
        found = attention_map(query, key, seen.scalings[layer], MASK_BS)
        torch.testing.assert_close(found, expected[layer].mean(dim=1), atol=1e-6, rtol=1e-5)
        assert found.std() > 0.01, "not all the same"
