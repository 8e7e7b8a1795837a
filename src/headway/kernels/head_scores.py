"""Scores of attention heads as functions of arrays: what a head does, as one number.

Over query positions i with weights w_ij (keys j):

    previous token     mean_i w_{i,i−1}
    duplicate token    mean_i w_{i,e(i)} ,  e(i) the last earlier place of token i
    induction          mean_i w_{i,e(i)+1}
    retrieval          |{i : argmax_j w_{p_i−1,j} in V and holds a_i}| / m ; on key-value copies
    sink mass          mean_i Σ_{j<S} w_ij
    streaming          mean_i Σ_{j<S or i−j<W} w_ij
    entropy            mean_i −Σ_j w_ij ln w_ij ,  normalised: each row over ln(keys it can see)
    distance           mean_i Σ_j w_ij |i − j|
    receiver           Fisher kurtosis over sentences j of v_j = mean_{i≥j+p} B_ij ,  B_ij the mean weight from sentence
                       i to sentence j

Retrieval: Wu et al., arXiv 2404.15574; the row is the one that predicts the answer token. Induction: Olsson et al.,
arXiv 2209.11895. Streaming: the complement of the "distant mass" that tells DuoAttention's (arXiv 2410.10819) retrieval
heads apart. Receiver: Thought Anchors, arXiv 2506.19143, with p = 4.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from headway.errors import ArgumentError

#: Sinks and recent keys of a streaming head: 4 sinks as in StreamingLLM (arXiv 2309.17453), 64 recent keys so that the
#: score still tells heads apart in texts of some hundred tokens (DuoAttention serves with 64 and 256).
SINKS = 4
WINDOW = 64
#: Sentences this near are left out of the receiver score (Thought Anchors, `proximity_ignore`).
PROXIMITY = 4


def mass_at(
    weights: Float[Tensor, "batch heads rows keys"],
    targets: Int[Tensor, " rows"],
    visible: Bool[Tensor, "#batch #heads rows keys"] | None = None,
) -> Float[Tensor, "batch heads rows"]:
    """The weight of one key per row. NaN where the target is negative (none) or not visible."""
    column = targets.clamp(min=0)[None, None, :, None]
    found = weights.gather(-1, column.expand(*weights.shape[:2], -1, 1))[..., 0]
    missing = (targets < 0).expand_as(found)
    if visible is not None:
        seen = visible.gather(-1, column.expand(*visible.shape[:2], -1, 1))[..., 0]
        missing = missing | ~seen
    return found.masked_fill(missing, torch.nan)


def earlier_places(ids: Int[Tensor, " tokens"]) -> Int[Tensor, " tokens"]:
    """For every token the last earlier position that holds the same id, −1 where there is none."""
    last: dict[int, int] = {}
    places = []
    for position, token in enumerate(ids.tolist()):
        places.append(last.get(token, -1))
        last[token] = position
    return torch.tensor(places, dtype=torch.long)


def previous_token_score(
    weights: Float[Tensor, "batch heads rows keys"], positions: Int[Tensor, " rows"]
) -> Float[Tensor, "batch heads"]:
    """mean_i w_{i,i−1}; the first position has no previous token and is left out."""
    return mass_at(weights, positions - 1).nanmean(-1)


def duplicate_score(
    weights: Float[Tensor, "batch heads rows keys"], rows: Int[Tensor, " rows"], ids: Int[Tensor, " tokens"]
) -> Float[Tensor, "batch heads"]:
    """Mean weight on the last earlier place of the row's own token, over the rows whose token stood before."""
    return mass_at(weights, earlier_places(ids)[rows.cpu()].to(rows.device)).nanmean(-1)


def induction_score(
    weights: Float[Tensor, "batch heads rows keys"], rows: Int[Tensor, " rows"], ids: Int[Tensor, " tokens"]
) -> Float[Tensor, "batch heads"]:
    """Mean weight on the token after the last earlier place of the row's own token, over the rows that have one."""
    places = earlier_places(ids)[rows.cpu()].to(rows.device)
    return mass_at(weights, torch.where(places < 0, places, places + 1)).nanmean(-1)


def retrieval_score(
    argmax: Int[Tensor, "*leading answer"],
    ids: Int[Tensor, " tokens"],
    answer: Int[Tensor, " answer"],
    value_span: tuple[int, int],
) -> Float[Tensor, "*leading"]:
    """Hits over answer tokens. `argmax[..., i]` is the most attended key of the row that predicts `answer[i]`; it hits
    when it lies in `value_span` and its token is `answer[i]`."""
    start, stop = value_span
    inside = (argmax >= start) & (argmax < stop)
    held = ids.to(argmax.device)[argmax.clamp(min=0)]
    return (inside & (held == answer.to(argmax.device))).double().mean(-1)


def streaming_mass(
    weights: Float[Tensor, "batch heads rows keys"],
    positions: Int[Tensor, " rows"],
    *,
    sinks: int = SINKS,
    window: int = WINDOW,
    first: Int[Tensor, " batch"] | None = None,
    both_sides: bool = False,
) -> tuple[Float[Tensor, "batch heads rows"], Float[Tensor, "batch heads rows"]]:
    """Mass on the first `sinks` keys, and mass on those or the last `window` keys up to the row's own position.

    `first` is the first key that is a token (after left padding). `both_sides` takes the keys closer than `window` on
    either side, for bidirectional hosts."""
    batch, heads, rows, keys = weights.shape
    device = weights.device
    first = torch.zeros(batch, dtype=torch.long, device=device) if first is None else first.to(device)
    gap = torch.arange(1 - window, window if both_sides else 1, device=device)
    sink = (first[:, None] + torch.arange(sinks, device=device))[:, None].expand(-1, rows, -1)
    near = (positions[:, None] + gap).expand(batch, -1, -1)
    columns = torch.cat([sink, near], -1)
    valid = (columns >= 0) & (columns < keys)
    valid[..., sinks:] &= near >= first[:, None, None] + sinks
    index = columns.clamp(0, keys - 1)[:, None].expand(-1, heads, -1, -1)
    found = weights.gather(-1, index) * valid[:, None]
    return found[..., :sinks].sum(-1), found.sum(-1)


def row_entropy(weights: Float[Tensor, "*rows keys"]) -> Float[Tensor, "*rows"]:
    """−Σ_j w_j ln w_j, nats."""
    return torch.special.entr(weights).sum(-1)


def normalised_entropy(
    entropy: Float[Tensor, "batch heads rows"], visible: Float[Tensor, "#batch #heads rows"]
) -> Float[Tensor, "batch heads rows"]:
    """Entropy over ln(visible keys): 1 is uniform attention. NaN where only one key is visible."""
    return torch.where(visible > 1, entropy / visible.clamp(min=2).log(), torch.nan)


def mean_distance(
    weights: Float[Tensor, "batch heads rows keys"], positions: Int[Tensor, " rows"]
) -> Float[Tensor, "batch heads rows"]:
    """Σ_j w_ij |i − j|, tokens."""
    gap = (positions[:, None] - torch.arange(weights.shape[-1], device=weights.device)).abs()
    return torch.linalg.vecdot(weights, gap.to(weights.dtype)[None, None])


def vertical_scores(
    block_means: Float[np.ndarray, "*heads sentences sentences"], *, proximity: int = PROXIMITY, ranks: bool = False
) -> Float[np.ndarray, "*heads sentences"]:
    """v_j = mean of B_ij over the sentences i ≥ j + proximity; NaN for the last `proximity` sentences.

    `ranks` replaces each row by its ranks over its count first, which takes out how weights shrink with depth."""
    from scipy.stats import rankdata

    means = np.array(block_means, dtype=float)
    count = means.shape[-1]
    if proximity < 1 or count <= proximity:
        raise ArgumentError(
            f"proximity: got {proximity} for {count} sentences, expected at least 1 and less than their number. Pass a "
            "longer text."
        )
    means[..., np.triu(np.ones((count, count), dtype=bool), 1 - proximity)] = np.nan
    if ranks:
        known = np.maximum((~np.isnan(means)).sum(-1, keepdims=True), 1)
        means = rankdata(means, axis=-1, nan_policy="omit") / known
    known = ~np.isnan(means)
    total = np.where(known, means, 0.0).sum(-2)
    return np.divide(total, known.sum(-2), out=np.full(total.shape, np.nan), where=known.any(-2))


def receiver_score(
    block_means: Float[np.ndarray, "*heads sentences sentences"], *, proximity: int = PROXIMITY, ranks: bool = False
) -> Float[np.ndarray, "*heads"]:
    """Fisher kurtosis (biased) of the vertical scores: large when later sentences look back at a few. A head that
    looks at all alike has no kurtosis and gets −inf. Raises ArgumentError for fewer than 2 · proximity sentences."""
    from scipy.stats import kurtosis

    means = np.asarray(block_means, dtype=float)
    if means.shape[-1] < 2 * proximity:
        raise ArgumentError(
            f"block_means: got {means.shape[-1]} sentences, expected at least {2 * proximity}, twice the proximity. "
            "Pass a longer text, or leave the receiver score out."
        )
    scores = vertical_scores(means, proximity=proximity, ranks=ranks)
    spread = np.nanmax(scores, -1) - np.nanmin(scores, -1)
    flat = spread <= 1e-7 * np.abs(np.nanmax(scores, -1))
    varied = np.where(flat[..., None], np.arange(scores.shape[-1]), scores)
    return np.where(flat, -np.inf, kurtosis(varied, axis=-1, fisher=True, bias=True, nan_policy="omit"))
