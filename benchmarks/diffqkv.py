"""What DiffQKV saves and costs on this machine: attention of a decoding step, the whole step with the augmented query,
selected values, and reading a prompt. Sizes are those of Sigma-1.5B: 32 query heads of 64, 4 key and 16 value heads
against 16 of both."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.harness import compare, write_facts
from headway.kernels.unequal import selective_attention, unequal_attention
from headway.methods.layers.diffqkv import DiffQKV, HeadLayout, break_even_tokens

WIDTH, HEADS, KEY_HEADS, VALUE_HEADS, BASELINE, DIM, AUG = 2048, 32, 4, 16, 16, 64, 3072
CONTEXTS = (2048, 8192, 32_768)


def _tensors(queries: int, tokens: int, key_heads: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((HEADS, queries), (key_heads, tokens), (VALUE_HEADS, tokens))
    return tuple(torch.randn(1, heads, count, DIM, generator=generator) for heads, count in shapes)


def _settings(**further: Any) -> dict[str, Any]:
    return {"heads": [HEADS, KEY_HEADS, VALUE_HEADS], "baseline": [HEADS, BASELINE, BASELINE], "dim": DIM} | further


def diffqkv_decode() -> None:
    """Attention of one step, 4/16 against 16/16, which takes the faster of two forms."""
    for tokens in CONTEXTS:
        query, key, value = _tensors(1, tokens, KEY_HEADS)
        _, other, _ = _tensors(1, tokens, BASELINE)
        forms: dict[str, Callable[[], Any]] = {
            "two products": partial(unequal_attention, query, other, value),
            "fused": partial(scaled_dot_product_attention, query, other, value, enable_gqa=True),
        }
        for form, baseline in forms.items():
            compare(
                f"diffqkv_decode_{tokens}_{form.replace(' ', '_')}",
                partial(unequal_attention, query, key, value),
                baseline,
                labels=("4 key and 16 value heads", f"16 of both, {form}"),
                repeats=21,
                warmup=3,
                settings=_settings(tokens=tokens),
            )


@torch.no_grad()
def diffqkv_step() -> None:
    """A whole step of a layer, the augmented query included, against one of 16/16 without it, to see where it pays."""
    sigma = DiffQKV(WIDTH, heads=HEADS, key_heads=KEY_HEADS, value_heads=VALUE_HEADS, aug_dim=AUG).eval()
    plain = DiffQKV(WIDTH, heads=HEADS, key_heads=BASELINE, value_heads=BASELINE, aug_dim=0).eval()
    for tokens in (256, *CONTEXTS):
        x = torch.randn(1, 1, WIDTH, generator=torch.Generator().manual_seed(1))
        sides = [partial(_step, layer, x, *_tensors(1, tokens, layer.layout.key_heads)[1:]) for layer in (sigma, plain)]
        compare(
            f"diffqkv_step_{tokens}",
            *sides,
            labels=("4/16 with augmented query", "16/16"),
            repeats=15,
            settings=_settings(tokens=tokens, width=WIDTH, aug_dim=AUG),
        )
    layouts = sigma.layout, HeadLayout.grouped(HEADS, BASELINE, DIM)
    points = {batch: break_even_tokens(*layouts, WIDTH, aug_dim=AUG, batch=batch) for batch in (1, 8, 64)}
    write_facts("diffqkv_break_even", {"tokens by batch, in numbers read": points})
    print(f"break-even in numbers read, by batch: {points}")


def _step(layer: DiffQKV, x: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Projections, augmentation and attention over stored keys; filing the new key is left out on both sides."""
    query = layer.q_proj(x)
    if layer.augment is not None:
        query = layer.augment(query)
    layer.k_proj(x), layer.v_proj(x)
    mixed = unequal_attention(query.view(1, 1, HEADS, DIM).transpose(1, 2), key, value)
    return layer.o_proj(mixed.transpose(1, 2).flatten(2))


def diffqkv_selected() -> None:
    """One step that reads 100 values per query head against one that reads all."""
    for tokens in CONTEXTS:
        query, key, value = _tensors(1, tokens, KEY_HEADS)
        compare(
            f"diffqkv_selected_{tokens}",
            partial(selective_attention, query, key, value, top=100),
            partial(unequal_attention, query, key, value),
            labels=("100 values", "all values"),
            repeats=15,
            settings=_settings(tokens=tokens, top=100),
        )


def diffqkv_prefill() -> None:
    """Causal attention of 2,048 rows: fused calls on views of 4/16 against one fused call of 16/16; peak memory too."""
    query, key, value = _tensors(2048, 2048, KEY_HEADS)
    _, other, _ = _tensors(2048, 2048, BASELINE)
    compare(
        "diffqkv_prefill_2048",
        lambda: unequal_attention(query, key, value, causal=True),
        lambda: scaled_dot_product_attention(query, other, value, is_causal=True, enable_gqa=True),
        labels=("4 key and 16 value heads", "16 of both, fused"),
        repeats=7,
        memory=True,
        settings=_settings(tokens=2048),
    )
