"""How many keys each layer or head may keep: more where queries are unlike and the pattern cannot be foretold.

    P = 1 − q_sim                                   (the released default)
    P = disp^(1/τ1) · var^(1/τ2) + α (1 − q_sim)    (with the layer preference of CAKE, arXiv 2503.12491)
    b_l = P_l / Σ P · total ,  whole numbers,  0 ≤ b_l ≤ cap_l ,  Σ b_l = min(total, Σ cap_l)

disp is the entropy of the window's weights on the past, var their variance over the window's rows, summed over keys.
The two terms of the second form live on very different scales; here each is divided by its mean over the layers unless
`normalise=False` asks for the released sum. arXiv 2601.21709.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from headway.errors import ArgumentError, unknown

#: What the preference is made of; the last three are ablations.
PREFERENCES = ("similarity", "mixed", "cake", "uniform", "inverted", "random")
#: (model type, largest budget) -> τ1, τ2 of the released settings; others get 1, 1.
TEMPERATURES = {
    ("llama", 128): (1.6, 0.6),
    ("llama", 1024): (1.6, 0.4),
    ("qwen2", 128): (0.4, 0.6),
    ("qwen2", 1024): (1.5, 0.6),
}


def allocate(
    preference: Float[Tensor, " places"], total: int, caps: Int[Tensor, " places"], *, exact: bool = True
) -> Int[Tensor, " places"]:
    """`total` keys shared out in proportion to the preference, none above its cap.

    What a capped place cannot take goes to the others in proportion; what truncation leaves goes one by one to the
    largest fractions (the lower index among equals), so that more preference never means fewer keys. A preference that
    sums to zero is uniform. `exact=False` rounds every share up: the sum may exceed `total` by one per place."""
    if preference.shape != caps.shape or preference.ndim != 1:
        raise ArgumentError(
            f"caps: got {tuple(caps.shape)} for {tuple(preference.shape)}, expected one for each place."
        )
    if total < 0 or bool((caps < 0).any()) or not bool(torch.isfinite(preference).all()):
        raise ArgumentError(
            f"total, caps, preference: got {total}, {caps.tolist()}, {preference.tolist()}; expected a total and caps "
            "of 0 or more, and finite preferences."
        )
    wish = preference.double().clamp(min=0)
    limit = caps.double()
    share, free = torch.zeros_like(wish), limit > 0
    left = float(min(total, int(caps.sum())))
    while bool(free.any()):
        weight = torch.where(free, wish, 0.0)
        weight = weight if bool(weight.sum() > 0) else free.double()
        share = torch.where(free, weight / weight.sum() * left, share)
        over = free & (share >= limit)
        if not bool(over.any()):
            break
        share = torch.where(over, limit, share)
        left -= float(limit[over].sum())
        free = free & ~over
    if not exact:
        return torch.minimum((share - 1e-9).ceil().long(), caps)
    found = (share + 1e-9).floor().long()
    spare = min(total, int(caps.sum())) - int(found.sum())
    open_ = found < caps
    order = torch.where(open_, share - found, -1.0).argsort(descending=True, stable=True)
    found[order[:spare]] += 1
    return found


def dispersion(weights: Float[Tensor, "batch heads rows past"]) -> Float[Tensor, "batch heads"]:
    """Σ over keys of the entropy terms −w ln w, summed over rows; 0 · ln 0 is 0."""
    return torch.special.entr(weights.double()).sum((-1, -2))


def shift(weights: Float[Tensor, "batch heads rows past"]) -> Float[Tensor, "batch heads"]:
    """The variance of each key's weight over the rows, summed over keys."""
    return weights.double().var(2, correction=0).sum(-1)


def temperatures(model_type: str, budget: int) -> tuple[float, float]:
    """τ1, τ2 for a model type and a budget: those of the nearest released budget, or 1, 1."""
    known = [size for name, size in TEMPERATURES if name == model_type]
    if not known:
        return 1.0, 1.0
    return TEMPERATURES[model_type, min(known, key=lambda size: abs(size - budget))]


def preferences(
    kind: str,
    similarity: Float[Tensor, "rows places"],
    spread: Float[Tensor, "rows places"] | None = None,
    variance: Float[Tensor, "rows places"] | None = None,
    *,
    alpha: float = 1.0,
    tau: tuple[float, float] = (1.0, 1.0),
    normalise: bool = True,
    seed: int = 0,
) -> Float[Tensor, "rows places"]:
    """The preference of every place (layer, or KV head of a layer) for each sequence; see PREFERENCES."""
    if kind not in PREFERENCES:
        raise unknown("preference", kind, PREFERENCES)
    if kind in ("mixed", "cake"):
        if spread is None or variance is None:
            raise ArgumentError(f"spread, variance: got none for {kind!r}, expected those of the window's weights.")
        first = spread.clamp(min=0) ** (1 / tau[0]) * variance.clamp(min=0) ** (1 / tau[1])
        second = 1 - similarity
        if normalise:
            first, second = (x / x.mean(-1, keepdim=True).clamp(min=1e-12) for x in (first, second))
        return first if kind == "cake" else first + alpha * second
    if kind == "similarity":
        return 1 - similarity
    if kind == "inverted":
        return similarity.clamp(min=0)
    if kind == "uniform":
        return torch.ones_like(similarity)
    drawn = torch.rand(similarity.shape[1], generator=torch.Generator().manual_seed(seed), dtype=similarity.dtype)
    return drawn.to(similarity.device).expand_as(similarity)


def token_scores(
    weights: Float[Tensor, "batch heads rows past"],
    groups: int,
    *,
    gamma: float = 200.0,
    pool: int = 5,
) -> Float[Tensor, "batch kv_heads past"]:
    """mean + γ · variance of each past key's weight over the window's rows, average-pooled over `pool` neighbours, and
    the mean over the query heads of a KV head."""
    if pool < 1 or pool % 2 == 0:
        raise ArgumentError(f"pool: got {pool}, expected an odd number of at least 1.")
    if weights.shape[1] % groups:
        raise ArgumentError(f"groups: got {groups} for {weights.shape[1]} heads, expected a divisor of them.")
    raw = weights.mean(2)
    if weights.shape[2] > 1:
        raw = raw + gamma * weights.var(2, correction=0)
    if raw.shape[-1]:
        raw = torch.nn.functional.avg_pool1d(raw, pool, stride=1, padding=pool // 2)
    return raw.unflatten(1, (-1, groups)).mean(2)
