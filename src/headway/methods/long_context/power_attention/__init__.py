"""PowerAttention: a static mask whose receptive field doubles with every layer.

    allow(i, j) = j ≤ i  and  ( Δ < w  or  Δ is a power of the base  or  block(j) < s ) ,   Δ = block(i) − block(j)

Each block of queries reads w local blocks, s sink blocks and the blocks at distances 1, 2, 4, 8, …: at most
w + s + ⌈log₂ n⌉ of n blocks. Writing a distance in binary takes one hop per 1-bit, so every earlier block is within
⌈log₂ n⌉ layers of any later one, without holes; a window of w blocks gains w − 1 blocks per layer.

Paper: PowerAttention: Exponentially Scaling of Receptive Fields for Effective Sparse Attention, arXiv 2503.03588. The
mask is part of the model: it is meant for light continued training, in prefill and decoding alike, so it never gives
way to dense attention. As a query moves on, its distances sweep over all old blocks: no key may ever be dropped, so the
method saves reads and compute, not memory. Every row reads the keys of its own position, in whatever forward it comes:
chunked prefill, batches, beams and assisted decoding give what token by token gives. `fine_tune` trains a host with the
mask in place; `reach`, `hops_to_all` and `pattern_mask` compare its receptive field with a window, a stride, a dilated
window and LongNet's segments.

No released code was available. base other than 2 is an extension of ours (digits of the distance in that base, each
multiple of a power allowed), as is counting blocks from the first real token of a padded sequence. The paper's hybrid
keeps 2 of every 7 layers dense without saying which; `hybrid_layers` takes the first of each group.
"""

from __future__ import annotations

from headway.card import Card
from headway.methods.long_context.power_attention.mask import (
    PATTERNS,
    hops_to_all,
    hybrid_layers,
    key_blocks,
    mask_density,
    pattern_mask,
    power_mask,
    reach,
    reached,
)
from headway.methods.long_context.power_attention.selector import PowerAttention, at_budget
from headway.methods.long_context.power_attention.training import FineTuned, fine_tune

CARD = Card(
    slug="power-attention",
    title="PowerAttention: Exponentially Scaling of Receptive Fields for Effective Sparse Attention",
    year=2025,
    arxiv="2503.03588",
    family="long_context",
    stages=("Selector",),
    needs=("a causal host", "light continued training with the mask on"),
    knobs={
        "block": "tokens per block",
        "window": "local blocks, its own included",
        "sink": "blocks at the start",
        "base": "distances are powers of it",
        "full_layers": "layers that stay dense",
    },
    summary="Reads blocks at power-of-two distances, so that stacked layers reach the whole context at the cost of a "
    "window.",
)

__all__ = [
    "CARD",
    "PATTERNS",
    "FineTuned",
    "PowerAttention",
    "at_budget",
    "fine_tune",
    "hops_to_all",
    "hybrid_layers",
    "key_blocks",
    "mask_density",
    "pattern_mask",
    "power_mask",
    "reach",
    "reached",
]
