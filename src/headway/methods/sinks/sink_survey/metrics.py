"""Sink detection metrics: which tokens are sinks, and what marks them in weights, keys, values and hidden states.

    cumulative   R_j = Σ_i w_ij ,   j is a sink if R_j > τ · mean_k R_k
    massive      |h_td| > 100 and |h_td| ≥ 1000 · median |h|
    norm ratio   mean ‖x_sink‖ / mean ‖x_rest‖ ,  far above 1 for hidden states, far below 1 for values ("value drain")
    kurtosis     mean (x − μ)⁴ / (σ⁴ + eps) ,   3 for a Gaussian vector

The survey (arXiv 2604.10098) quotes τ = 1000 for the cumulative rule. R_j is at most the number of keys times the mean,
so such a τ can find nothing in short inputs: the default here is 10, and a τ that cannot be reached is an error. On
causal maps early keys are seen by more queries; pass the visible counts to compare means per query instead of sums. The
numbers 100 and 1000 are those of Massive Activations in Large Language Models, arXiv 2402.17762. Sink_k^ε is in
`sink_emergence`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from headway.errors import ArgumentError

#: Times the mean received mass; small enough to be reachable by inputs of a dozen tokens.
CUMULATIVE_THRESHOLD = 10.0
#: Absolute size and multiple of the median of a massive activation (arXiv 2402.17762).
MASSIVE_MAGNITUDE = 100.0
MASSIVE_RATIO = 1000.0
#: Keeps the kurtosis of a constant vector finite, below any σ⁴ that float32 activations have.
KURTOSIS_EPS = 1e-30


def cumulative_sinks(
    received: Float[Tensor, "*batch keys"],
    *,
    threshold: float = CUMULATIVE_THRESHOLD,
    visible_counts: Float[Tensor, "*#batch keys"] | None = None,
) -> Bool[Tensor, "*batch keys"]:
    """R_j > threshold · mean_k R_k, for the mass that each key receives from all queries.

    With `visible_counts` (how many queries see each key) both sides are means per query that sees the key; keys that no
    query sees are left out. Raises ArgumentError when no key could ever pass: no key exceeds keys × mean."""
    keys = received.shape[-1]
    if not 0 < threshold < keys:
        raise ArgumentError(
            f"threshold: got {threshold:g} for {keys} keys, expected a number above 0 and below {keys}: no key can "
            "receive more than the number of keys times the mean. Lower the threshold or use a longer input."
        )
    mass = received.float()
    if visible_counts is None:
        return mass > threshold * mean_over(mass, None)
    counts = visible_counts.float().expand_as(mass)
    per_query = torch.where(counts > 0, mass / counts.clamp(min=1), 0.0)
    return (counts > 0) & (per_query > threshold * mean_over(per_query, counts > 0))


def first_token_share(
    weights: Float[Tensor, "*batch queries keys"],
    *,
    visible: Bool[Tensor, "*#batch queries keys"] | None = None,
    first: int = 0,
) -> Float[Tensor, "*batch"]:
    """mean_i w_i,first over the query rows that see key `first`, its own row left out; NaN when there is none.

    The own row of the first token of a causal map can read nothing else, so it says nothing. `visible=None` means
    causal, with the queries as the last rows of the keys."""
    queries, keys = weights.shape[-2:]
    column = weights[..., first].float()
    own = torch.arange(queries, device=weights.device) + keys - queries
    later = (own > first) if visible is None else visible[..., first] & (own != first)
    later = later.expand_as(column)
    return (column * later).sum(-1) / later.sum(-1)


def row_entropy(weights: Float[Tensor, "*batch queries keys"]) -> Float[Tensor, "*batch queries"]:
    """−Σ_j w_ij ln w_ij in nats: 0 for a row on one key, ln n for a row spread evenly over n keys."""
    return torch.special.entr(weights.float()).sum(-1)


def norm_ratio(
    vectors: Float[Tensor, "*batch tokens dim"],
    sinks: Bool[Tensor, "*#batch tokens"] | Sequence[int] = (0,),
    *,
    valid: Bool[Tensor, "*#batch tokens"] | None = None,
) -> Float[Tensor, "*batch"]:
    """Mean ‖x_t‖ over the sinks divided by mean ‖x_t‖ over the other tokens; padding is where `valid` is False.

    Of values this is the value drain, of hidden states the massive-activation ratio. NaN when one side is empty.
    Norms are taken in float32, so that massive entries of float16 states do not overflow."""
    norms = vectors.float().norm(dim=-1)
    is_sink = token_mask(sinks, vectors.shape[-2], vectors.device).expand_as(norms)
    counts = torch.ones_like(is_sink) if valid is None else valid.to(vectors.device).expand_as(norms)
    return (mean_over(norms, is_sink & counts) / mean_over(norms, ~is_sink & counts))[..., 0]


def cosine_to_mean(
    vectors: Float[Tensor, "*batch tokens dim"], *, valid: Bool[Tensor, "*#batch tokens"] | None = None
) -> Float[Tensor, "*batch tokens"]:
    """cos(x_t, mean_s x_s). The sink's key stands apart from the mean key; one minus this is the KeyDiff score."""
    vectors = vectors.float()
    counts = torch.ones(vectors.shape[:-1], dtype=torch.bool, device=vectors.device) if valid is None else valid
    inside = counts.expand(vectors.shape[:-1])[..., None]
    mean = (vectors * inside).sum(-2, keepdim=True) / inside.sum(-2, keepdim=True)
    return torch.nn.functional.cosine_similarity(vectors, mean, dim=-1)


def massive_activations(
    hidden: Float[Tensor, "*batch tokens width"],
    *,
    magnitude: float = MASSIVE_MAGNITUDE,
    ratio: float = MASSIVE_RATIO,
) -> Bool[Tensor, "*batch tokens width"]:
    """|h_td| > magnitude and |h_td| ≥ ratio · median |h|, the median over all tokens and channels of that state.

    `torch.nonzero` of the result lists the (token, channel) pairs."""
    size = hidden.float().abs()
    median = size.flatten(-2).median(-1).values[..., None, None]
    return (size > magnitude) & (size >= ratio * median)


def infinity_norm(vectors: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch"]:
    """max_d |x_d|."""
    return vectors.float().abs().amax(-1)


def top_to_median(vectors: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch"]:
    """max_d |x_d| / median_d |x_d| (the lower of the two middle values when their number is even)."""
    size = vectors.float().abs()
    return size.amax(-1) / size.median(-1).values


def kurtosis(vectors: Float[Tensor, "*batch dim"], *, eps: float = KURTOSIS_EPS) -> Float[Tensor, "*batch"]:
    """mean (x − μ)⁴ / (σ⁴ + eps) with the population σ: 3 for a Gaussian vector, dim for one lone spike at most."""
    centred = vectors.float() - vectors.float().mean(-1, keepdim=True)
    return centred.pow(4).mean(-1) / (centred.square().mean(-1).square() + eps)


def token_mask(
    tokens: Bool[Tensor, "*batch tokens"] | Int[Tensor, " chosen"] | Sequence[int], length: int, device: torch.device
) -> Bool[Tensor, "*batch tokens"]:
    """A boolean mask over `length` tokens from a mask or from positions. Raises ArgumentError when they do not fit."""
    if isinstance(tokens, Tensor) and tokens.dtype == torch.bool:
        if tokens.shape[-1] != length:
            raise ArgumentError(
                f"sinks: got a mask over {tokens.shape[-1]} tokens, expected {length}. Build it from the same input."
            )
        return tokens.to(device)
    positions = [int(p) for p in tokens]
    outside = [p for p in positions if not 0 <= p < length]
    if outside:
        raise ArgumentError(f"sinks: got position {outside[0]}, expected 0..{length - 1}. Name positions in the input.")
    mask = torch.zeros(length, dtype=torch.bool, device=device)
    mask[positions] = True
    return mask


def mean_over(
    x: Float[Tensor, "*batch tokens"], counted: Bool[Tensor, "*batch tokens"] | None
) -> Float[Tensor, "*batch 1"]:
    """Mean over the tokens that count; NaN where none does."""
    if counted is None:
        return x.mean(-1, keepdim=True)
    return torch.where(counted, x, 0.0).sum(-1, keepdim=True) / counted.sum(-1, keepdim=True)
