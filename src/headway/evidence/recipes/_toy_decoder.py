"""Small Llama decoders of the recipes, and the loop that trains them on fresh batches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR

DECAY = 0.01


def small_llama(
    *,
    vocabulary: int,
    width: int,
    layers: int,
    heads: int,
    positions: int,
    generator: torch.Generator,
    first: int | None = None,
) -> Any:
    """An untrained decoder whose weights depend on the generator; `first` is the id of its first token."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=heads, max_position_embeddings=positions, bos_token_id=first,
        eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(torch.randint(2**31, (1,), generator=generator)))
        return LlamaForCausalLM(config)


def one_cycle(optimiser: Optimizer, rate: float, steps: int) -> LRScheduler:
    """A rate that rises for a tenth of the steps and falls to zero."""
    return OneCycleLR(optimiser, rate, total_steps=max(steps, 2), pct_start=0.1)


def fit(
    model: Any,
    loss: Callable[[Any], Tensor],
    *,
    steps: int,
    rate: float,
    schedule: Callable[[Optimizer, float, int], LRScheduler] = one_cycle,
) -> Any:
    """Trains in place by AdamW; `loss(model)` draws its own batch."""
    optimiser = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=DECAY)
    rates = schedule(optimiser, rate, steps)
    for _ in range(steps):
        value = loss(model)
        optimiser.zero_grad()
        value.backward()
        optimiser.step()
        rates.step()
    return model.eval()
