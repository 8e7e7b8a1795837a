"""What a block selection costs on this machine, beside dense causal attention and FlexAttention with the same mask.

Random block masks of 128 x 128 tokens with the sink block and the diagonal, one mask per head, as a query-aware method
would choose them; density is selected over visible pairs. The bar is time <= 1.5 x density x dense.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.harness import compare
from headway.door.selection import BlockMask
from headway.kernels.block_sparse import block_sparse_attention

log = logging.getLogger(__name__)

HEADS, DIM, BLOCK = 9, 64, 128


def tensors(tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, HEADS, tokens, DIM, generator=generator) for _ in range(3))
    return q, k, v


def random_mask(tokens: int, density: float, seed: int = 0) -> BlockMask:
    """Sink and diagonal blocks, and random ones below the diagonal up to a density."""
    count = tokens // BLOCK
    order = torch.rand(1, HEADS, count, count, generator=torch.Generator().manual_seed(seed))
    below = torch.ones(count, count, dtype=torch.bool).tril(-1)
    free = (order.masked_fill(~below, 2.0)).flatten(2).argsort(-1)
    low, high = 0, int(below.sum())
    best = BlockMask.full(tokens, tokens, BLOCK, BLOCK, heads=HEADS)
    while low < high:
        middle = (low + high) // 2
        blocks = torch.zeros(1, HEADS, count * count, dtype=torch.bool).scatter_(-1, free[..., :middle], True)
        best = (
            BlockMask(blocks.view(1, HEADS, count, count), tokens, tokens, BLOCK, BLOCK).with_sinks(1).with_diagonal()
        )
        low, high = (middle + 1, high) if best.density() < density else (low, middle)
    return best


def sparse(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: BlockMask) -> Callable[[], Any]:
    return lambda: block_sparse_attention(q, k, v, mask.blocks, query_block=BLOCK, key_block=BLOCK, causal=True)


def executor() -> None:
    """The block-gather executor at 8,192 tokens, 9 heads of 64, float32, by density: against dense causal SDPA, and
    in the same run against compiled FlexAttention with the same mask."""
    q, k, v = tensors(8192)
    settings = {"tokens": 8192, "heads": HEADS, "dim": DIM, "block": BLOCK}
    for share in (0.1, 0.2, 0.35):
        mask = random_mask(8192, share)
        density = mask.density()
        ours, flex = sparse(q, k, v, mask), flex_attention(q, k, v, mask)
        worst = float((flex() - ours()[0]).abs().max())
        found = compare(
            f"executor_{round(share * 100)}",
            ours,
            lambda: scaled_dot_product_attention(q, k, v, is_causal=True),
            labels=("block gather", "dense causal SDPA"),
            repeats=11,
            warmup=2,
            settings={**settings, "density": density},
        )
        print(f"density {density:.3f}: {found.ratio.value / density:.2f} x density x dense (bar 1.5)")
        compare(
            f"executor_flex_{round(share * 100)}",
            ours,
            flex,
            labels=("block gather", "compiled FlexAttention"),
            repeats=11,
            warmup=1,
            settings={**settings, "density": density, "largest_difference": worst},
        )


def flex_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: BlockMask) -> Callable[[], torch.Tensor]:
    """Compiled FlexAttention with the same mask."""
    from torch.nn.attention import flex_attention as flex

    blocks = mask.blocks

    def visible(b: Any, h: Any, row: Any, column: Any) -> Any:
        return blocks[0, h, row // BLOCK, column // BLOCK] & (column <= row)

    attend: Any = torch.compile(flex.flex_attention)
    tokens = q.shape[2]
    block_mask = flex.create_block_mask(visible, 1, q.shape[1], tokens, tokens, device="cpu", BLOCK_SIZE=BLOCK)

    def run() -> torch.Tensor:
        with torch.no_grad():
            return attend(q, k, v, block_mask=block_mask)

    return run


def crossover() -> None:
    """Where selecting starts to pay: the executor against dense causal SDPA by length, at a density of 0.3."""
    for tokens in (512, 1024, 2048, 4096):
        q, k, v = tensors(tokens)
        mask = random_mask(tokens, 0.3)
        compare(
            f"crossover_{tokens}",
            sparse(q, k, v, mask),
            lambda q=q, k=k, v=v: scaled_dot_product_attention(q, k, v, is_causal=True),
            labels=("block gather", "dense causal SDPA"),
            repeats=21,
            warmup=3,
            settings={"tokens": tokens, "density": mask.density()},
        )
