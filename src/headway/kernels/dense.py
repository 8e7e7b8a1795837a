"""Dense attention with its log-sum-exp, block by block over query rows.

    s_ij = cap( scale · q_i·k_j ) + b_ij ,   -inf where j is not visible from i
    w_ij = exp(s_ij) / ( exp(sink_h) + Σ_j exp(s_ij) ) ,   o_i = Σ_j w_ij v_j

`cap(x) = c·tanh(x/c)` when a soft cap c is given (Gemma 2, arXiv 2408.00118), the identity otherwise. `sink_h` is the
learned sink logit of a head (gpt-oss); without one that term is absent. Tensors are (batch, heads, tokens, dim); key
and value may have fewer heads than the query (grouped-query attention, arXiv 2305.13245): head h reads key head h //
groups.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from headway.errors import ArgumentError, EmptyRowError

#: Query rows per block: 128 rows of 9 heads over 4,096 float32 keys are 19 MB, about an L3 cache.
DEFAULT_BLOCK = 128

WeightEdit = Callable[[Tensor, Tensor], Tensor]


def check_heads(query: Tensor, key: Tensor) -> int:
    """Query heads per key head. Raises ArgumentError when they do not divide."""
    heads, kv_heads = query.shape[1], key.shape[1]
    if kv_heads == 0 or heads % kv_heads:
        raise ArgumentError(
            f"query and key: got {heads} query heads and {kv_heads} key heads; expected the first to be a multiple of "
            "the second. Repeat or select heads before the call."
        )
    return heads // kv_heads


def grouped_scores(
    query: Float[Tensor, "batch heads rows dim"], key: Float[Tensor, "batch kv_heads keys dim"]
) -> Float[Tensor, "batch heads rows keys"]:
    """q·k for grouped heads without repeating the keys."""
    groups = check_heads(query, key)
    batch, heads, rows, dim = query.shape
    if groups == 1:
        return query @ key.transpose(-1, -2)
    folded = query.reshape(batch, heads // groups, groups * rows, dim)
    return (folded @ key.transpose(-1, -2)).view(batch, heads, rows, key.shape[2])


def grouped_values(
    weights: Float[Tensor, "batch heads rows keys"], value: Float[Tensor, "batch kv_heads keys dim"]
) -> Float[Tensor, "batch heads rows dim"]:
    """Σ_j w_ij v_j for grouped heads without repeating the values."""
    groups = check_heads(weights, value)
    batch, heads, rows, keys = weights.shape
    if groups == 1:
        return weights @ value
    folded = weights.reshape(batch, heads // groups, groups * rows, keys)
    return (folded @ value).view(batch, heads, rows, value.shape[3])


def widened(x: Tensor) -> Tensor:
    """At least float32: half precision is raised, float64 stays."""
    return x if x.dtype == torch.float64 else x.float()


def soft_capped(logits: Tensor, softcap: float | None) -> Tensor:
    """c · tanh(logits / c); the logits themselves without a cap."""
    return logits if softcap is None else torch.tanh(logits / softcap) * softcap


def with_learned_sinks(
    output: Float[Tensor, "batch heads queries value_dim"],
    lse: Float[Tensor, "batch heads queries"],
    sinks: Float[Tensor, " heads"] | None,
) -> tuple[Float[Tensor, "batch heads queries value_dim"], Float[Tensor, "batch heads queries"]]:
    """Output and log-sum-exp of a softmax once learned sinks join it; as they are without sinks."""
    if sinks is None:
        return output, lse
    total = torch.logaddexp(lse, sinks.to(lse.dtype).view(1, -1, 1).expand_as(lse))
    return (widened(output) * torch.exp(lse - total)[..., None]).to(output.dtype), total


def visible_keys(
    rows: Int[Tensor, " rows"],
    keys: int,
    *,
    causal: bool,
    offset: int,
    mask: Bool[Tensor, "#batch #heads queries keys"] | None = None,
) -> Bool[Tensor, "#batch #heads rows keys"] | None:
    """Which keys the given query rows may read; None when all of them may. Row i sees keys up to i + offset if
    causal."""
    seen = None
    if causal:
        columns = torch.arange(keys, device=rows.device)
        seen = (columns <= rows[:, None] + offset)[None, None]
    if mask is not None:
        picked = mask[:, :, rows] if mask.shape[2] > 1 else mask.expand(-1, -1, rows.numel(), -1)
        seen = picked if seen is None else seen & picked
    return seen


def attention_logits(
    query: Float[Tensor, "batch heads queries dim"],
    key: Float[Tensor, "batch kv_heads keys dim"],
    rows: Int[Tensor, " rows"] | None = None,
    *,
    scale: float,
    causal: bool = False,
    offset: int | None = None,
    mask: Bool[Tensor, "#batch #heads queries keys"] | None = None,
    bias: Float[Tensor, "#batch #heads #queries keys"] | None = None,
    softcap: float | None = None,
) -> Float[Tensor, "batch heads rows keys"]:
    """s_ij for the given query rows (all by default); -inf where the key is not visible. float64 stays float64,
    everything else is float32.

    `offset` places query row i at key position i + offset; by default queries are the last rows of the keys."""
    queries, keys = query.shape[2], key.shape[2]
    if rows is None:
        rows = torch.arange(queries, device=query.device)
    offset = keys - queries if offset is None else offset
    scores = soft_capped(grouped_scores(widened(query[:, :, rows]), widened(key)) * scale, softcap)
    if bias is not None:
        scores = scores + (bias[:, :, rows] if bias.shape[2] > 1 else bias).to(scores.dtype)
    seen = visible_keys(rows, keys, causal=causal, offset=offset, mask=mask)
    return scores if seen is None else scores.masked_fill(~seen, -torch.inf)


def normalise(
    logits: Float[Tensor, "batch heads rows keys"], sinks: Float[Tensor, " heads"] | None = None
) -> tuple[Float[Tensor, "batch heads rows keys"], Float[Tensor, "batch heads rows"]]:
    """Weights and log-sum-exp (natural log, the learned sink included). Rows with nothing visible give zeros and
    -inf."""
    lse = torch.logsumexp(logits, dim=-1)
    if sinks is not None:
        lse = torch.logaddexp(lse, sinks.to(lse.dtype).view(1, -1, 1).expand_as(lse))
    safe = lse.masked_fill(lse == -torch.inf, 0.0)
    return torch.exp(logits - safe[..., None]), lse


def dense_attention(
    query: Float[Tensor, "batch heads queries dim"],
    key: Float[Tensor, "batch kv_heads keys dim"],
    value: Float[Tensor, "batch kv_heads keys value_dim"],
    *,
    scale: float | None = None,
    causal: bool = False,
    offset: int | None = None,
    mask: Bool[Tensor, "#batch #heads queries keys"] | None = None,
    bias: Float[Tensor, "#batch #heads #queries keys"] | None = None,
    softcap: float | None = None,
    sinks: Float[Tensor, " heads"] | None = None,
    edit: WeightEdit | None = None,
    dropout: float = 0.0,
    empty_rows: str = "raise",
    block: int = DEFAULT_BLOCK,
    mode: str = "block",
) -> tuple[Float[Tensor, "batch heads queries value_dim"], Float[Tensor, "batch heads queries"]]:
    """Attention output (dtype of `value`) and log-sum-exp (float32; float64 of float64 inputs).

    `edit(weights, rows)` may return other weights for a block of query rows. `empty_rows="zero"` gives a zero output
    for rows that see no key, as fused kernels do for padding; `"raise"` (default) raises EmptyRowError.
    `mode="reference"` takes all rows at once. Memory is O(block × keys) beside the result."""
    if mode not in ("reference", "block"):
        raise ArgumentError(f"mode: got {mode!r}, expected 'reference' or 'block'.")
    if empty_rows not in ("raise", "zero"):
        raise ArgumentError(f"empty_rows: got {empty_rows!r}, expected 'raise' or 'zero'.")
    queries = query.shape[2]
    scale = query.shape[3] ** -0.5 if scale is None else scale
    step = queries if mode == "reference" else block
    outputs, normalisers = [], []
    for start in range(0, queries, max(step, 1)):
        rows = torch.arange(start, min(start + step, queries), device=query.device)
        logits = attention_logits(
            query, key, rows, scale=scale, causal=causal, offset=offset, mask=mask, bias=bias, softcap=softcap
        )
        if empty_rows == "raise" and bool((logits == -torch.inf).all(-1).any()):
            raise EmptyRowError(
                f"queries {start}..{start + rows.numel() - 1}: got a row with no visible key, expected at least one. "
                "Keep the diagonal or a sink in the mask or selection."
            )
        weights, lse = normalise(logits, sinks)
        if edit is not None:
            weights = edit(weights, rows)
        if dropout:
            weights = torch.nn.functional.dropout(weights, dropout)
        outputs.append(grouped_values(weights.to(value.dtype), value))
        normalisers.append(lse)
    return torch.cat(outputs, 2), torch.cat(normalisers, 2)
