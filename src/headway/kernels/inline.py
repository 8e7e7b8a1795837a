"""Attention through features without its matrix: both ways, causal in blocks, and token by token.

With M = mean_j φ(k_j) v_jᵀ, k̄ = mean_j φ(k_j) and v̄ = mean_j v_j over what row i sees, the rules of
`kernels.feature_rules` give

    subtractive   o_i = s·φ(q_i) M + ( 1 − s·φ(q_i)·k̄ ) v̄                      (InLine attention)
    divisive      o_i = ( s·φ(q_i) M + ε v̄ ) / ( s·φ(q_i)·k̄ + ε )              (ordinary linear attention)

at O(tokens · dim · value_dim). In the causal form the sums behind these means are carried along by `kernels.scan`
without decay: one matrix Σ_j [φ(k_j), 1]ᵀ [v_j, 1] of constant size, which is also the state of a decoder.

Paper: Bridging the Divide: Reconsidering Softmax and Linear Attention, arXiv 2412.06590. The causal form is not in it.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from headway.errors import ArgumentError, unknown
from headway.kernels.dense import grouped_values
from headway.kernels.feature_rules import INLINE, Rule, feature_map, feature_weights, wide_sums, widened
from headway.kernels.scan import MODES, causal_scan
from headway.kernels.scan_blocks import BLOCK


def feature_attention(
    query: Float[Tensor, "batch heads queries dim"],
    key: Float[Tensor, "batch heads keys dim"],
    value: Float[Tensor, "batch heads keys value_dim"],
    *,
    rule: Rule = INLINE,
    mask: Bool[Tensor, "batch keys"] | None = None,
    mode: str = "block",
) -> Float[Tensor, "batch heads queries value_dim"]:
    """Every query reads every real key (`mask` True). What stands at other keys is never read, NaN included.

    `mode="block"` is linear in the number of keys, `"reference"` goes through the explicit weights. Where no key is
    real the output is zero. Raises ArgumentError for shapes that do not fit."""
    _check(query, key, value, mask, None)
    if mode not in ("reference", "block"):
        raise ArgumentError(f"mode: got {mode!r}, expected 'reference' or 'block'; a step needs the causal form.")
    if mask is not None:
        key, value = (torch.where(mask[:, None, :, None], x, 0) for x in (key, value))
    with wide_sums(query):
        run = _through_weights if mode == "reference" else _through_means
        return run(query, key, value, rule, mask).to(value.dtype)


def _through_weights(query: Tensor, key: Tensor, value: Tensor, rule: Rule, mask: Tensor | None) -> Tensor:
    visible = None if mask is None else mask[:, None, None]
    weights = feature_weights(query, key, rule=rule, visible=visible)
    return grouped_values(weights, value.to(weights.dtype))


def _through_means(query: Tensor, key: Tensor, value: Tensor, rule: Rule, mask: Tensor | None) -> Tensor:
    features, wide = feature_map(key, rule.feature), widened(value)
    if mask is None:
        count = torch.full((1, 1, 1, 1), max(key.shape[2], 1), dtype=wide.dtype, device=wide.device)
    else:
        count = mask.sum(1).clamp(min=1).to(wide.dtype)[:, None, None, None]
        features = torch.where(mask[:, None, :, None], features, 0)
    scale = rule.scale_for(query.shape[3])
    share = (scale / count).sqrt()
    queries = feature_map(query, rule.feature)
    product_value = queries @ ((features * share).transpose(-1, -2) @ (wide * share))
    product = queries @ (features.sum(2, keepdim=True) * (scale / count)).transpose(-1, -2)
    return rule.output(product_value, product, wide.sum(2, keepdim=True) / count)


def inline_attention(
    query: Float[Tensor, "batch heads queries dim"],
    key: Float[Tensor, "batch heads keys dim"],
    value: Float[Tensor, "batch heads keys value_dim"],
    *,
    feature: str = "identity",
    scale: float | None = None,
    causal: bool = False,
    mask: Bool[Tensor, "batch keys"] | None = None,
    mode: str = "block",
) -> Float[Tensor, "batch heads queries value_dim"]:
    """InLine attention in one call: `feature_attention`, or `causal_feature_attention` where `causal`."""
    rule = Rule(feature=feature, scale=scale)
    if causal:
        return causal_feature_attention(query, key, value, rule=rule, mask=mask, mode=mode)[0]
    return feature_attention(query, key, value, rule=rule, mask=mask, mode=mode)


def empty_sums(
    batch: int,
    heads: int,
    dim: int,
    value_dim: int,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Float[Tensor, "batch heads dim_and_one value_dim_and_one"]:
    """The state before the first token: Σ [φ(k), 1]ᵀ [v, 1] = 0. Its last row is [Σ v, count], its last column
    [Σ φ(k), count]. In float32 the count is exact up to 16.7 million tokens."""
    return torch.zeros(batch, heads, dim + 1, value_dim + 1, device=device, dtype=dtype)


def causal_feature_attention(
    query: Float[Tensor, "batch heads tokens dim"],
    key: Float[Tensor, "batch heads tokens dim"],
    value: Float[Tensor, "batch heads tokens value_dim"],
    *,
    rule: Rule = INLINE,
    mask: Bool[Tensor, "batch tokens"] | None = None,
    resets: Bool[Tensor, "batch tokens"] | None = None,
    sums: Float[Tensor, "batch heads dim_and_one value_dim_and_one"] | None = None,
    block: int = BLOCK,
    mode: str = "block",
) -> tuple[Float[Tensor, "batch heads tokens value_dim"], Float[Tensor, "batch heads dim_and_one value_dim_and_one"]]:
    """Every token reads the real tokens of its document up to itself. Returns the output and the sums behind the last
    token.

    `sums` are those an earlier call returned (None: nothing was read yet). A token with `mask` False is none: it is not
    read, its output is zero, and a reset on it does not count. `resets` is True for the first token of a document,
    which empties the sums before it. "block" costs O(tokens · (block + dim) · value_dim), "reference" goes through the
    matrix of all products, "step" token by token. Raises ArgumentError for shapes that do not fit."""
    _check(query, key, value, mask, resets)
    if mode not in MODES:
        raise unknown("mode", mode, MODES)
    if key.shape[2] != query.shape[2]:
        raise ArgumentError(f"key: got {key.shape[2]} tokens for {query.shape[2]} queries, expected as many.")
    if block < 1:
        raise ArgumentError(f"block: got {block}, expected 1 or more.")
    batch, heads, tokens, dim = key.shape
    if sums is None:
        wide = torch.promote_types(value.dtype, torch.float32)
        sums = empty_sums(batch, heads, dim, value.shape[3], device=key.device, dtype=wide)
    elif sums.shape != (batch, heads, dim + 1, value.shape[3] + 1):
        raise ArgumentError(
            f"sums: got shape {tuple(sums.shape)}, expected {(batch, heads, dim + 1, value.shape[3] + 1)}: (batch, "
            "heads, dim + 1, value_dim + 1)."
        )
    if tokens == 0:
        return value, sums
    if mask is not None:
        query, key, value = (torch.where(mask[:, None, :, None], x, 0) for x in (query, key, value))
    queries, keys = feature_map(query, rule.feature) * rule.scale_for(dim), feature_map(key, rule.feature)
    one = torch.ones_like(keys[..., :1])
    values = torch.cat([widened(value), one], -1)
    options: dict[str, Any] = {"mask": mask, "resets": resets, "block": block, "mode": mode}
    read, products = causal_scan(queries, keys, values, state=sums[:, :, :-1], **options)
    plain, rest = causal_scan(one, one, values, state=sums[:, :, -1:], **options)
    count = plain[..., -1:].clamp(min=1)
    output = rule.output(read[..., :-1] / count, read[..., -1:] / count, plain[..., :-1] / count)
    return output.to(value.dtype), torch.cat([products, rest], 2)


def _check(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, resets: Tensor | None) -> None:
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.ndim != 4:
            raise ArgumentError(f"{name}: got shape {tuple(tensor.shape)}, expected (batch, heads, tokens, dim).")
    batch, heads, keys, dim = key.shape
    if query.shape[:2] != (batch, heads) or query.shape[3] != dim:
        raise ArgumentError(
            f"query: got shape {tuple(query.shape)} beside keys of {tuple(key.shape)}, expected the same batch, heads "
            "and dim. Repeat grouped keys first."
        )
    if value.shape[:3] != (batch, heads, keys):
        raise ArgumentError(f"value: got shape {tuple(value.shape)}, expected {(batch, heads, keys)} and its own dim.")
    for name, given in (("mask", mask), ("resets", resets)):
        if given is not None and given.dtype != torch.bool:
            raise ArgumentError(f"{name}: got {given.dtype}, expected bool. Pass `{name}.bool()`.")
        if given is not None and given.shape != (batch, keys):
            raise ArgumentError(f"{name}: got shape {tuple(given.shape)}, expected {(batch, keys)}: (batch, tokens).")
