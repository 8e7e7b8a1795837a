"""A static cache for unequal heads: transformers allocates the values with as many heads as the keys have."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, StaticLayer

from headway.errors import ArgumentError

SUPPORTED_CACHES = "DynamicCache, or static_cache(model, tokens) of headway.methods.layers.diffqkv"


class UnequalStaticLayer(StaticLayer):
    """A static layer in which keys and values have head counts and sizes of their own."""

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        super().lazy_initialization(key_states, value_states[:, :1])
        self.values = torch.zeros(
            (value_states.shape[0], value_states.shape[1], self.max_cache_len, value_states.shape[3]),
            dtype=self.dtype,
            device=self.device,
        )


def static_cache(model: Any, tokens: int) -> Cache:
    """Room for `tokens` tokens in every layer, to be given as `past_key_values`."""
    if tokens < 1:
        raise ArgumentError(f"tokens: got {tokens}, expected at least 1.")
    return Cache(layers=[UnequalStaticLayer(max_cache_len=tokens) for _ in range(model.config.num_hidden_layers)])


def refuse_equal_heads(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """A pre-hook of converted attention modules: raises, naming what works, for a static cache of transformers."""
    cache = kwargs.get("past_key_values")
    layers = getattr(cache, "layers", None) or []
    index = getattr(module, "layer_idx", 0)
    layer = layers[index] if index < len(layers) else None
    if isinstance(layer, StaticLayer) and not isinstance(layer, UnequalStaticLayer):
        raise ArgumentError(
            f"past_key_values: got {type(cache).__name__} with {type(layer).__name__}, which stores as many value as "
            f"key heads, for a layer that has different counts. Use {SUPPORTED_CACHES}."
        )
