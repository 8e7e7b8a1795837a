"""Planted sequences for the DHSA recipe: topics of varying length, noise of varying length, weak targets.

key_j = SIGNAL · topic(j) + noise      segments        key_j = noise, in one chunk of n keys + z/√n · topic      targets
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from headway.door.call import AttentionCall
from headway.evidence.recipe import Context
from headway.methods.long_context.dhsa import Piece, Similarity, choose_tokens, chunks_of, normalised

#: Mean length of planted segments and the budgets at which they are asked for, as in the method's sheet.
SEGMENT, BUDGETS, BLOCK = 24, (128, 32), 32
#: Signal of a planted key along its topic, noise of spread 1 in every direction.
SIGNAL = 4.0
#: Lengths of weak targets, and their signals: by how many spreads the sum of a target's keys stands out of noise. Equal
#: at all lengths, so that length alone makes the difference.
LENGTHS, LONG, SHORT = (8, 16, 32, 64), 32, 8
STRENGTHS = (2.0, 2.5, 3.0)
#: What else a segment is looked for with: the last keys, and keys at random.
NO_CHUNKS = ("window", "random keys")
#: Positions by which a found boundary may miss a planted one.
SLACK = 2


def planted(generator: torch.Generator, tokens: int, dim: int = 64) -> tuple[Tensor, Tensor, Tensor]:
    """Keys in segments of one topic each, where segments begin, and the topics."""
    lengths: list[int] = []
    while sum(lengths) < tokens:
        drawn = torch.empty(1).exponential_(1 / (SEGMENT - 4), generator=generator)
        lengths.append(4 + int(drawn))
    lengths[-1] -= sum(lengths) - tokens
    topics = torch.nn.functional.normalize(torch.randn(len(lengths), dim, generator=generator), dim=-1)
    key = SIGNAL * topics.repeat_interleave(torch.tensor(lengths), 0)
    starts = torch.tensor([0, *lengths[:-1]]).cumsum(0)
    return key + torch.randn(tokens, dim, generator=generator), starts, topics


def chosen(key: Tensor, starts: Tensor, query: Tensor, budget: int, norm: str = "sqrt") -> Tensor:
    """Which tokens a query reads under a budget, nothing forced."""
    begins = torch.zeros(1, key.shape[0], dtype=torch.bool).index_fill_(1, starts, True)
    every = torch.ones(1, key.shape[0], dtype=torch.bool)
    chunks = chunks_of(key[None, None], every, begins)
    scores = query[None, None] @ chunks.vectors(norm).transpose(-1, -2)
    allowed = every[:, None].expand(1, query.shape[0], -1)
    member = chunks.of_tokens(0, key.shape[0])
    return choose_tokens(scores, member, allowed, torch.zeros_like(allowed), budget)[0, 0]


def segments(context: Context) -> dict[str, Any]:
    """Recall of the segment a query looks for, and the agreement of key-similarity boundaries with the planted ones."""
    sequences, tokens, asked = context.choose(smoke=(3, 512, 4), small=(40, 2048, 16), full=(200, 2048, 32))
    generator = context.torch_generator("segments")
    names = ("true", "fixed", "similarity", *NO_CHUNKS)
    found: dict[str, list[float]] = {f"{name} {b}": [] for name in names for b in BUDGETS}
    found |= {"f1": [], "random": []}
    for _ in context.track(range(sequences), "planted segments"):
        key, starts, topics = planted(generator, tokens)
        ends = torch.cat([starts[1:], torch.tensor([tokens])])
        call = AttentionCall.from_tensors(*[key[None, None]] * 3, causal=True)
        piece = Piece(key[None, None], torch.ones(1, tokens, dtype=torch.bool), call)
        alike = Similarity(chunk_tokens=SEGMENT, apart=3).starts(piece)[0].nonzero()[:, 0]
        cuts = {"true": starts, "fixed": torch.arange(0, tokens, BLOCK), "similarity": alike}
        which = torch.randint(len(starts), (asked,), generator=generator)
        query = SIGNAL * topics[which]
        for budget in BUDGETS:
            sides = {name: chosen(key, begins, query, budget) for name, begins in cuts.items()}
            sides["window"] = (torch.arange(tokens) >= tokens - budget).expand(asked, -1)
            drawn = torch.rand(asked, tokens, generator=generator).argsort(-1)
            sides["random keys"] = drawn < budget
            for name, kept in sides.items():
                parts = [kept[i, starts[w] : ends[w]].double().mean() for i, w in enumerate(which.tolist())]
                found[f"{name} {budget}"].append(float(torch.stack(parts).mean()))
        guess = torch.randperm(tokens - 1, generator=generator)[: len(alike) - 1] + 1
        found["f1"].append(near_f1(alike[1:], starts[1:]))
        found["random"].append(near_f1(guess, starts[1:]))
    return found


def near_f1(found: Tensor, true: Tensor) -> float:
    """F1 of places that count as right within SLACK tokens."""
    near = (found[:, None] - true[None]).abs() <= SLACK
    precision, recall = (float(near.any(side).double().mean()) for side in (1, 0))
    return 2 * precision * recall / max(precision + recall, 1e-12)


def noise(context: Context) -> dict[str, float]:
    """Spread of the score of a chunk of 64 noise keys over that of one key."""
    trials = context.choose(smoke=4000, small=20_000, full=100_000)
    generator = context.torch_generator("noise")
    query = torch.randn(16, generator=generator)
    spread: dict[tuple[str, int], float] = {}
    for length in (1, 64):
        sums = torch.stack([torch.randn(trials, 16, generator=generator) for _ in range(length)]).sum(0)
        for norm in ("sqrt", "mean", "sum"):
            vectors = normalised(sums[None, None], torch.full((1, trials), length), norm)
            spread[norm, length] = float((vectors @ query).std())
    return {norm: spread[norm, 64] / spread[norm, 1] for norm in ("sqrt", "mean", "sum")} | {"trials": trials}


def targets(context: Context) -> dict[str, list[float]]:
    """Recall of one weak target chunk among noise chunks of length 1 to 64, by its length and the normalisation; mean
    over strengths of its signal."""
    sequences, asked = context.choose(smoke=(4, 2), small=(40, 8), full=(400, 32))
    generator = context.torch_generator("targets")
    found: dict[str, list[float]] = {f"{norm} {length}": [] for norm in ("sqrt", "mean") for length in LENGTHS}
    for _ in context.track(range(sequences), "weak targets"):
        for length in LENGTHS:
            hits: dict[str, list[float]] = {"sqrt": [], "mean": []}
            for strength in STRENGTHS * asked:
                key, starts, topic, inside = weak_target(generator, length, strength / length**0.5)
                for norm, values in hits.items():
                    values.append(float(chosen(key, starts, topic, BUDGETS[0], norm)[0, inside].double().mean()))
            for norm, values in hits.items():
                found[f"{norm} {length}"].append(float(np.mean(values)))
    return found


def weak_target(generator: torch.Generator, length: int, signal: float) -> tuple[Tensor, Tensor, Tensor, slice]:
    """64 chunks of noise of which the one of `length` keys leans to a topic: keys, where chunks begin, topic, where."""
    lengths = torch.randint(1, 65, (64,), generator=generator)
    lengths[20] = length
    starts = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)[:-1]])
    topic = torch.nn.functional.normalize(torch.randn(1, 64, generator=generator), dim=-1)
    key = torch.randn(int(lengths.sum()), 64, generator=generator)
    inside = slice(int(starts[20]), int(starts[20]) + length)
    key[inside] += signal * topic
    return key, starts, topic, inside
