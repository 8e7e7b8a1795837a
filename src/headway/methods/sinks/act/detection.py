"""Which keys of a head are sinks, from the attention they receive.

    a_k = mean of w_ik over the rows i that can see k ,   S = { k : a_k > τ , seen by at least n rows } ∖ protected

The threshold is τ itself ("absolute", the released scripts: 0.1, in chat 0.15) or α / N for N keys ("relative", α = 5);
the two agree at N = 50. The first token is not a sink to be calibrated; the released code leaves out the first flagged
key, whatever it is, and has no least number of rows.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from headway.errors import ArgumentError, is_number, unknown

THRESHOLDS = ("absolute", "relative")
#: Threshold of the released classification and multiple-choice scripts, and α of its length-relative form.
TAU, ALPHA = 0.1, 5.0
#: Keys near the end are seen by few rows, and their mean is mostly attention of a token to itself (our choice; the
#: released code has no such floor).
LEAST_ROWS = 8


def received_mass(
    weights: Float[Tensor, "batch heads rows keys"],
    visible: Bool[Tensor, "#batch #heads rows keys"] | None = None,
    real_rows: Bool[Tensor, "batch rows"] | None = None,
) -> tuple[Float[Tensor, "batch heads keys"], Float[Tensor, "batch heads keys"]]:
    """The sum of the weights on each key and the number of rows that can see it; padded rows are left out.

    Without `visible`, rows and keys are those of a causal square whose last row is the last key."""
    rows, keys = weights.shape[2:]
    if visible is None:
        visible = torch.ones(1, 1, rows, keys, dtype=torch.bool, device=weights.device).tril(keys - rows)
    seen = visible.expand(weights.shape).to(weights.dtype)
    if real_rows is not None:
        real = real_rows.to(weights.device, weights.dtype)[:, None, :, None]
        weights, seen = weights * real, seen * real
    return weights.sum(2), seen.sum(2)


def thresholds(
    count: Float[Tensor, "*rest keys"], *, threshold: str = "absolute", tau: float = TAU, alpha: float = ALPHA
) -> Float[Tensor, "*rest 1"]:
    """τ for each head: `tau`, or `alpha` over the number of keys that any row could see."""
    check_threshold(threshold, tau, alpha)
    if threshold == "absolute":
        return torch.full((*count.shape[:-1], 1), tau, dtype=count.dtype, device=count.device)
    return alpha / (count > 0).sum(-1, keepdim=True).clamp(min=1).to(count.dtype)


def find_sinks(
    mass: Float[Tensor, "*rest keys"],
    count: Float[Tensor, "*rest keys"],
    *,
    threshold: str = "absolute",
    tau: float = TAU,
    alpha: float = ALPHA,
    least_rows: int = LEAST_ROWS,
    allowed: Bool[Tensor, "*#rest keys"] | None = None,
) -> Bool[Tensor, "*rest keys"]:
    """True where a key's mean received weight exceeds the threshold, at least `least_rows` rows saw it, and it is
    `allowed`. `mass` and `count` are those of `received_mass`."""
    limit = thresholds(count, threshold=threshold, tau=tau, alpha=alpha)
    found = (mass / count.clamp(min=1) > limit) & (count >= max(least_rows, 1))
    return found if allowed is None else found & allowed


def without_first_flagged(sinks: Bool[Tensor, "*rest keys"]) -> Bool[Tensor, "*rest keys"]:
    """The released rule: the first flagged key counts as the initial sink, be it token 0 or not."""
    return sinks & (sinks.cumsum(-1) > 1)


def first_seen(count: Float[Tensor, "batch *rest keys"]) -> Int[Tensor, batch * rest]:
    """The first key that any row could see: token 0 behind left padding."""
    return (count > 0).long().argmax(-1)


def check_threshold(threshold: str, tau: float, alpha: float) -> None:
    if threshold not in THRESHOLDS:
        raise unknown("threshold", threshold, THRESHOLDS)
    if not (is_number(tau) and 0 < tau < 1):
        raise ArgumentError(f"tau: got {tau!r}, expected a mean weight between 0 and 1; the released scripts use 0.1.")
    if not (is_number(alpha) and alpha > 0):
        raise ArgumentError(f"alpha: got {alpha!r}, expected a number above 0; α / N is the threshold for N keys.")
