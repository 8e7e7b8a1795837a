"""From the question's rows of attention to kept sentences: pure functions on tensors.

    A (rows, context)    attention from each question token to each context token, summed over heads
    S_i = A_i ∗ 1_w      phrase smoothing: a token scores by its neighbourhood, w wide
    z_j = Σ_i ω_i^p S_ij weight of each token; ω_i: what question token i gives to the question itself
    J   = the K largest z, ties to the earlier token;   kept = the sentences that hold a token of J

p is 2 in the released code, 0 in the paper (a plain sum).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from headway.errors import ArgumentError

#: Exponent of the question's weights by name.
WEIGHTING = {"squared": 2, "linear": 1, "sum": 0}


def phrase_smooth(
    attention: Float[Tensor, "*rows tokens"], width: int, *, centred: bool = True
) -> Float[Tensor, "*rows tokens"]:
    """Sum over a window of `width` tokens around each, zeros beyond the ends; same length.

    An even window has no middle. `centred` then takes `width` + 1 tokens and counts the two outer ones half, which is
    symmetric; otherwise the window reaches one token further behind than before, as an even convolution does."""
    if isinstance(width, bool) or not isinstance(width, int) or width < 1:
        raise ArgumentError(f"phrase: got {width!r}, expected a whole number of at least 1.")
    if width == 1:
        return attention
    sums = torch.nn.functional.pad(attention.double(), (1, 0)).cumsum(-1)
    before = (width - 1) // 2
    after = width - 1 - before
    smooth = _box(sums, before, after)
    if width % 2 == 0 and centred:
        smooth = (smooth + _box(sums, after, before)) / 2
    return smooth.to(attention.dtype)


def question_weights(question: Float[Tensor, "rows rows"]) -> Float[Tensor, " rows"]:
    """ω_i = Σ_j A_ij over the question's own tokens."""
    return question.sum(-1)


def token_scores(
    attention: Float[Tensor, "rows context"],
    weights: Float[Tensor, " rows"] | None = None,
    *,
    phrase: int = 8,
    power: int = 2,
    centred: bool = True,
) -> Float[Tensor, " context"]:
    """z_j. Without weights every question token counts alike. Raises ArgumentError when rows and weights differ."""
    if weights is None or power == 0:
        total = attention.sum(0)
    else:
        if weights.shape != attention.shape[:1]:
            raise ArgumentError(
                f"weights: got {tuple(weights.shape)} for {attention.shape[0]} rows of attention, expected one each."
            )
        total = weights.to(attention) ** power @ attention
    # Smoothing is linear, so the rows can be added up before it.
    return phrase_smooth(total, phrase, centred=centred)


def top_tokens(scores: Float[Tensor, " context"], count: int) -> Int[Tensor, " top"]:
    """The `count` best tokens, best first; of equals the earlier one. All of them when there are fewer."""
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise ArgumentError(f"topk: got {count!r}, expected a whole number of at least 1.")
    return scores.argsort(descending=True, stable=True)[:count]


def rank_sentences(
    scores: Float[Tensor, " context"], lengths: Sequence[int], topk: int | None = None
) -> tuple[list[int], list[float], list[int]]:
    """The sentences that hold one of the `topk` best tokens (None: every sentence), best first; and the score and the
    place in the context of every sentence's best token. `lengths` are the tokens of each sentence, in order."""
    if sum(lengths) != scores.numel() or any(length < 1 for length in lengths):
        raise ArgumentError(
            f"lengths: got {len(lengths)} sentences of {sum(lengths)} tokens for {scores.numel()} scores, expected "
            "sentences of at least one token that fill the context."
        )
    owner = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(list(lengths)))
    order = scores.cpu().argsort(descending=True, stable=True)
    chosen = order if topk is None else top_tokens(scores.cpu(), topk)
    ranked = list(dict.fromkeys(owner[chosen].tolist()))
    best: dict[int, int] = {}
    for token, sentence in zip(order.tolist(), owner[order].tolist(), strict=True):
        best.setdefault(sentence, token)
    places = [best[number] for number in range(len(lengths))]
    return ranked, [float(scores[place]) for place in places], places


def fill(ranked: Sequence[int], lengths: Sequence[int], budget: int) -> list[int]:
    """The best sentences, in their order in the text, that fit into `budget` tokens together.

    Taken by rank; one that does not fit any more is passed over for later ones that do."""
    chosen, left = [], budget
    for number in ranked:
        if lengths[number] <= left:
            chosen.append(number)
            left -= lengths[number]
    return sorted(chosen)


def _box(sums: Tensor, before: int, after: int) -> Tensor:
    """Windows [j − before, j + after] from running sums with a zero in front."""
    tokens = sums.shape[-1] - 1
    places = torch.arange(tokens, device=sums.device)
    high = (places + after + 1).clamp(max=tokens)
    low = (places - before).clamp(min=0)
    return sums[..., high] - sums[..., low]
