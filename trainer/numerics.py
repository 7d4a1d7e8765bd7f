"""Numerics that the losses share: exact float32 products, and scratch memory of bounded size."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


def widen(x: Tensor) -> Tensor:
    """Float32, or float64 for float64 inputs: what a loss is computed in."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def scratch_elements(device: torch.device) -> int:
    """How many elements a tile may have: half a CPU core's share of cache, or what fills a GPU."""
    return 2**19 if device.type == "cpu" else 2**26


def tiles(size: int, elements_each: int, limit: int) -> Iterator[slice]:
    """0..size in consecutive slices of as many items as fit ``limit`` elements, at least one each."""
    step = max(1, limit // max(1, elements_each))
    return (slice(start, min(start + step, size)) for start in range(0, size, step))


def blocks(rows: int, heads: int, elements_each: int, limit: int) -> Iterator[tuple[slice, slice]]:
    """All (rows, heads) in tiles that fit ``limit``: several rows, one row, or some heads of one row."""
    for some_rows in tiles(rows, heads * elements_each, limit):
        for some_heads in tiles(heads, elements_each, limit):
            yield some_rows, some_heads


def padding_of(mask_BS: Tensor | None) -> Tensor | None:
    """[B, 1, S, 1], true where a token is padding; None where none is."""
    return None if mask_BS is None else ~mask_BS.bool()[:, None, :, None]


def flat_tile(x_BRSD: Tensor, tile: tuple[slice, slice], padding_B1S1: Tensor | None) -> Tensor:
    """[N, S, D]: a tile's rows and heads in one dimension, padding zero. Not copied where it need not be."""
    x = x_BRSD[tile]
    return (x if padding_B1S1 is None else x.masked_fill(padding_B1S1[tile[0]], 0)).flatten(0, 1)


@contextmanager
def exact_products(device_type: str) -> Iterator[None]:
    """Products at the precision of their operands: no autocast, no TF32 or bfloat16 inside float32."""
    mkldnn: Any = torch.backends.mkldnn
    backends = (torch.backends.cuda.matmul, mkldnn.matmul)
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        with torch.autocast(device_type, enabled=False):
            yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision
