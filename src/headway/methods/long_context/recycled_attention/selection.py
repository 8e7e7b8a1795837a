"""What a full step decides: scores of the keys, the K of them that are recycled, and whether a query has drifted.

All functions are pure; `recycled_mask` is the parallel form of what a cache does step by step.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import cosine_similarity, max_pool1d

from headway.door.call import AttentionCall
from headway.errors import ArgumentError, check_whole, unknown
from headway.kernels.dense import normalise
from headway.kernels.pooling import ranks

GROUPS = ("max", "mean")
#: Share of a key's own log-weight in its score: it orders keys that share one pooled maximum, and no others.
TIE = 1e-9
#: A cosine of two equal float32 vectors is 1 up to this.
ROUNDING = 1e-5


def log_weights(call: AttentionCall, row: int) -> Float[Tensor, "batch heads keys"]:
    """Logarithms of one row's weights: they order keys whose weights are too small for a float."""
    logits = call.logits(torch.tensor([row], device=call.query.device))
    return normalised_logs(logits, normalise(logits, call.sinks)[1])[:, :, 0]


def normalised_logs(
    logits: Float[Tensor, "batch heads rows keys"], lse: Float[Tensor, "batch heads rows"]
) -> Float[Tensor, "batch heads rows keys"]:
    """logits − lse; −inf throughout in a row that sees nothing."""
    return logits - lse.masked_fill(lse == -torch.inf, 0.0)[..., None]


def key_scores(
    logs: Float[Tensor, "batch heads keys"], kv_heads: int, *, pool: int = 7, group: str = "max"
) -> Float[Tensor, "batch kv_heads keys"]:
    """Scores of the keys from the log-weights of one query row, one set per KV head.

    The query heads of a group are joined by their largest weight ("max") or their mean weight ("mean"); then each key
    takes the largest value within `pool` neighbours, itself in the middle (1: its own). Keys that share a maximum are
    ordered by their own weight. Hidden keys (−inf) stay −inf."""
    check_scoring(pool, group)
    heads = logs.shape[1]
    if kv_heads < 1 or heads % kv_heads:
        raise ArgumentError(f"kv_heads: got {kv_heads} for {heads} query heads, expected a divisor of them.")
    grouped = logs.unflatten(1, (kv_heads, -1))
    own = grouped.amax(2) if group == "max" else grouped.logsumexp(2) - math.log(grouped.shape[2])
    pooled = max_pool1d(own, pool, stride=1, padding=pool // 2) if pool > 1 else own
    score = pooled.double() + TIE * own.double()
    return score.masked_fill(own == -torch.inf, -torch.inf)


def top_keys(scores: Float[Tensor, "batch kv_heads keys"], budget: int) -> Int[Tensor, "batch kv_heads chosen"]:
    """The min(budget, keys) keys of largest score, in the order of the text."""
    if budget < 1:
        raise ArgumentError(f"budget: got {budget}, expected at least 1 key.")
    chosen = scores.topk(min(budget, scores.shape[-1]), -1, sorted=False).indices
    return chosen.sort(-1).values


def recycled_mask(
    scores: Float[Tensor, "batch kv_heads keys"], steps: int, budget: int
) -> Bool[Tensor, "batch kv_heads steps keys+steps"]:
    """What the `steps` queries behind a full step read: the chosen keys, less one of lowest score for each new token
    once `budget` is reached, and every token since. Its last `steps` columns are those tokens."""
    if not 0 <= steps < budget:
        raise ArgumentError(
            f"steps: got {steps} for a budget of {budget}, expected fewer: tokens since the full step must stay. Raise "
            "the budget."
        )
    real = (scores > -torch.inf).sum(-1, keepdim=True)
    fresh = torch.arange(1, steps + 1, device=scores.device)
    room = torch.minimum(real, budget - fresh)
    old = (ranks(scores)[:, :, None] < room[..., None]) & (scores > -torch.inf)[:, :, None]
    since = torch.ones(steps, steps, dtype=torch.bool, device=scores.device).tril()
    return torch.cat([old, since.expand(*scores.shape[:2], -1, -1)], -1)


def recovered_mass(
    weights: Float[Tensor, "batch heads steps+1 keys"],
    kv_heads: int,
    budget: int,
    *,
    pool: int = 7,
    group: str = "max",
) -> Float[Tensor, "batch heads steps"]:
    """Share of each row's attention that the recycled set holds. Row 0 is the full step; the rows behind it are the
    next tokens, and the last row sees every key."""
    steps = weights.shape[2] - 1
    seen = weights.shape[3] - steps
    scores = key_scores(weights[:, :, 0, :seen].log(), kv_heads, pool=pool, group=group)
    mask = recycled_mask(scores, steps, budget).repeat_interleave(weights.shape[1] // kv_heads, 1)
    return (weights[:, :, 1:] * mask).sum(-1) / weights[:, :, 1:].sum(-1)


def query_similarity(
    query: Float[Tensor, "batch heads 1 dim"], reference: Float[Tensor, "batch heads 1 dim"]
) -> Float[Tensor, " batch"]:
    """Mean over heads of the cosine between a query and that of the last full step."""
    return cosine_similarity(query.float(), reference.float(), dim=-1)[..., 0].mean(1)


def has_drifted(similarity: Float[Tensor, " batch"], threshold: float) -> Bool[Tensor, " batch"]:
    """Whether a query calls for a full step: similarity ≤ threshold, where 1 means at every check."""
    return similarity <= threshold + ROUNDING


def full_steps(steps: int, stride: int, *, first: str = "recycled") -> list[int]:
    """Which of `steps` decoding steps are full: ⌈n/S⌉ of them if the first is, ⌊n/S⌋ if the prefill counts as one."""
    if stride < 1 or first not in ("recycled", "full"):
        raise ArgumentError(f"stride, first: got {stride}, {first!r}; expected stride ≥ 1 and 'recycled' or 'full'.")
    return [i for i in range(steps) if (i + (first == "recycled")) % stride == 0]


def ideal_speedup(tokens: int, budget: int, stride: int) -> float:
    """S·t / (t + (S − 1)·K): keys read by dense decoding over keys read by recycling."""
    if tokens < 1 or budget < 1 or stride < 1:
        raise ArgumentError(f"tokens, budget, stride: got {tokens}, {budget}, {stride}; expected at least 1 of each.")
    return stride * tokens / (tokens + (stride - 1) * min(budget, tokens))


def check_scoring(pool: int, group: str) -> None:
    check_whole("pool", pool, 1)
    if pool % 2 == 0:
        raise ArgumentError(f"pool: got {pool}, expected an odd number of neighbours; 1 is no pooling.")
    if group not in GROUPS:
        raise unknown("group", group, GROUPS)
