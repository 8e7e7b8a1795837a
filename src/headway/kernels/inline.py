"""Attention through features without its matrix: both ways, causal in blocks, and token by token.

With M = mean_j φ(k_j) v_jᵀ, k̄ = mean_j φ(k_j) and v̄ = mean_j v_j over what row i sees, the rules of
`kernels.feature_rules` give

    subtractive   o_i = s·φ(q_i) M + ( 1 − s·φ(q_i)·k̄ ) v̄                      (InLine attention)
    divisive      o_i = ( s·φ(q_i) M + ε v̄ ) / ( s·φ(q_i)·k̄ + ε )              (ordinary linear attention)

at O(tokens · dim · value_dim). In the causal form the sums behind these means are carried along: one matrix
Σ_j [φ(k_j), 1]ᵀ [v_j, 1] of constant size, which is also the state of a decoder.

Paper: Bridging the Divide: Reconsidering Softmax and Linear Attention, arXiv 2412.06590. The causal form is not in it.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional

from headway.errors import ArgumentError, unknown
from headway.kernels.dense import grouped_values
from headway.kernels.feature_rules import INLINE, Rule, feature_map, feature_weights, widened

MODES = ("reference", "block", "step")
#: Tokens per block of the causal form: as many as a head usually has dimensions, so that the block's own matrix costs
#: no more than the carried one.
BLOCK = 64


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
    if mode == "reference":
        visible = None if mask is None else mask[:, None, None]
        weights = feature_weights(query, key, rule=rule, visible=visible)
        return grouped_values(weights, value.to(weights.dtype)).to(value.dtype)
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
    return rule.output(product_value, product, wide.sum(2, keepdim=True) / count).to(value.dtype)


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
    explicit weights, "step" token by token. Raises ArgumentError for shapes that do not fit."""
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
    real = torch.ones(batch, tokens, dtype=torch.bool, device=key.device) if mask is None else mask
    first, dtype = None if resets is None else resets & real, value.dtype
    query, key, value = (torch.where(real[:, None, :, None], widened(x), 0) for x in (query, key, value))
    ones = real[:, None, :, None].expand(-1, heads, -1, -1).to(value.dtype)
    queries = feature_map(query, rule.feature) * rule.scale_for(dim)
    keys = torch.cat([torch.where(real[:, None, :, None], feature_map(key, rule.feature), 0), ones], -1)
    values = torch.cat([value, ones], -1)
    run = {"reference": _explicit, "block": _in_blocks, "step": _in_steps}[mode]
    output, sums = run(queries, keys, values, first, sums, rule, block)
    return torch.where(real[:, None, :, None], output, 0).to(dtype), sums


# What follows takes scaled query features, and key features and values with a column of ones (zeros at tokens that are
# none).


def _explicit(
    query: Tensor, key: Tensor, value: Tensor, first: Tensor | None, sums: Tensor, rule: Rule, _: int
) -> tuple[Tensor, Tensor]:
    """Through the whole matrix of weights; what was read before joins the totals of a row."""
    tokens = query.shape[2]
    visible = torch.ones(tokens, tokens, dtype=torch.bool, device=query.device).tril()[None, None]
    visible = visible & (key[:, :1, None, :, -1] > 0)
    document = torch.zeros_like(key[:, 0, :, 0]) if first is None else first.cumsum(1)
    visible = visible & (document[:, None, :, None] == document[:, None, None, :])
    past = sums[:, :, None] * (document == 0)[:, None, :, None, None].to(sums.dtype)
    from_past = torch.einsum("bhnd,bhnde->bhne", query, past[..., :-1, :])
    products = torch.where(visible, query @ key[..., :-1].transpose(-1, -2), 0)
    total = products.sum(-1, keepdim=True) + from_past[..., -1:]
    count = visible.sum(-1, keepdim=True) + past[..., -1, -1:]
    weights = rule.from_totals(products, visible, total, count)
    safe = count.clamp(min=1)
    if rule.normaliser == "subtractive":
        rest = (from_past[..., :-1] + (1 - total / safe) * past[..., -1, :-1]) / safe
    else:
        rest = (from_past[..., :-1] + rule.epsilon * past[..., -1, :-1]) / (total + rule.epsilon * safe)
    last = document == document[:, -1:]
    kept = sums if first is None else sums * (~first.any(1))[:, None, None, None].to(sums.dtype)
    added = (key * last[:, None, :, None].to(key.dtype)).transpose(-1, -2) @ value
    return weights @ value[..., :-1] + rest, kept + added


def _in_steps(
    query: Tensor, key: Tensor, value: Tensor, first: Tensor | None, sums: Tensor, rule: Rule, _: int
) -> tuple[Tensor, Tensor]:
    """Token by token."""
    outputs = []
    for token in range(query.shape[2]):
        if first is not None:
            sums = torch.where(first[:, token, None, None, None], 0, sums)
        sums = sums + key[:, :, token, :, None] * value[:, :, token, None, :]
        read = torch.einsum("bhd,bhde->bhe", query[:, :, token], sums[:, :, :-1])
        outputs.append(_from_sums(read, sums[:, :, -1], rule))
    return torch.stack(outputs, 2), sums


def _in_blocks(
    query: Tensor, key: Tensor, value: Tensor, first: Tensor | None, sums: Tensor, rule: Rule, block: int
) -> tuple[Tensor, Tensor]:
    """Blocks of tokens read each other through a small matrix and what came before through the sums."""
    tokens = query.shape[2]
    block = min(block, tokens)
    fill = -tokens % block
    query, key, value = (functional.pad(x, (0, 0, 0, fill)).unflatten(2, (-1, block)) for x in (query, key, value))
    visible = torch.ones(block, block, dtype=query.dtype, device=query.device).tril()
    opened: Tensor | None = None
    if first is not None:
        document = functional.pad(first, (0, fill)).unflatten(1, (-1, block)).cumsum(-1)[:, None]
        visible = visible * (document[..., :, None] == document[..., None, :])
        opened = (document == 0)[..., None].to(query.dtype)
        tail = key * (document == document[..., -1:])[..., None].to(key.dtype)
        added = tail.transpose(-1, -2) @ value
        entering, sums = _scan(added, (document[..., -1] == 0)[..., None, None], sums)
    else:
        added = key.transpose(-1, -2) @ value
        running = torch.cat([sums[:, :, None], added], 2).cumsum(2)
        entering, sums = running[:, :, :-1], running[:, :, -1]
    read = query @ entering[..., :-1, :]
    plain = entering[..., -1:, :].expand_as(read)
    if opened is not None:
        read, plain = read * opened, plain * opened
    read = read + ((query @ key[..., :-1].transpose(-1, -2)) * visible) @ value
    plain = plain + visible.expand(*value.shape[:3], -1, -1) @ value
    return _from_sums(read, plain, rule).flatten(2, 3)[:, :, :tokens], sums


def _scan(added: Tensor, keeps: Tensor, sums: Tensor) -> tuple[Tensor, Tensor]:
    """The sums with which each block is entered, and those behind the last. A block with a first token keeps none."""
    entering = []
    for number in range(added.shape[2]):
        entering.append(sums)
        sums = torch.where(keeps[:, :, number], sums, 0) + added[:, :, number]
    return torch.stack(entering, 2), sums


def _from_sums(read: Tensor, plain: Tensor, rule: Rule) -> Tensor:
    """Outputs from [Σ a_j v_j, Σ a_j] and [Σ v_j, n] of each row."""
    count = plain[..., -1:].clamp(min=1)
    return rule.output(read[..., :-1] / count, read[..., -1:] / count, plain[..., :-1] / count)


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
