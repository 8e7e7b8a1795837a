"""A small decoder that is trained to follow chains of names, for the recipe of Recycled Attention.

    first token, one fact per name in any order, then each name of a chain SPELLING times

A fact says at one place which name follows a name: its embedding is the sum of that of the name as a key and that of
the next as a value. All facts make one ring. Every token of an answer asks for the name
behind its own, and what is answered at the last of them is spelled next: each answer names the next question. What the
heads look at is their own affair.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from headway.door import use
from headway.door.stages import CachePolicy
from headway.evidence.recipes._recycled_toys import CHECK, SPELLING, THRESHOLD
from headway.evidence.recipes._toy_decoder import fit, small_llama
from headway.methods.long_context.recycled_attention import RecycledAttention
from headway.methods.sinks.streaming_llm import StreamingLLM

NAMES = 32
#: Ids: the first token, names as keys and as values of facts, names that are spelled.
KEY, VALUE, NAME = (1 + NAMES * kind for kind in range(3))
VOCABULARY = NAME + NAMES
#: Links of a chain in training and in the report.
HOPS = 8
LENGTH = 1 + NAMES + HOPS * SPELLING
LAYERS, HEADS, WIDTH = 2, 4, 64
BATCH, RATE = 32, 3e-3
#: Names of the rings that are trained on, one size behind the other: who has never found a fact among few does not find
#: it among many.
SIZES = (4, 8, 16, NAMES)
#: A size is trained on, a whole schedule at a time, until so many of the answers to `HELD` chains are right.
LEARNED, ROUNDS, HELD = 0.99, 3, 50
#: Keys that are read in a recycled step, of which one choice keeps half for the tokens since.
BUDGET, SINKS = 12, 1


@dataclass(frozen=True)
class Chains:
    """Facts (name, next name), and the names of each chain, the first one given."""

    facts: Int[Tensor, "batch facts 2"]
    names: Int[Tensor, "batch links"]


def chain_batch(count: int, generator: torch.Generator, size: int = NAMES) -> Chains:
    """`count` rings of `size` names, their facts in any order, and a chain of `HOPS` links on each (around a small ring
    more than once)."""
    ring = torch.rand(count, NAMES, generator=generator).argsort(1)[:, :size]
    facts = torch.stack([ring, ring.roll(-1, 1)], -1)
    order = torch.rand(count, size, generator=generator).argsort(1)
    chain = ring[:, torch.arange(HOPS + 1) % size]
    return Chains(facts.gather(1, order[..., None].expand_as(facts)), chain)


def trained(steps: int, generator: torch.Generator) -> Any:
    """A decoder trained on true chains; every token of an answer is asked for the next name."""

    def loss(model: Any, size: int) -> Tensor:
        batch = chain_batch(BATCH, generator, size)
        return nn.functional.cross_entropy(_answers(model, batch).flatten(0, 1), _wanted(batch).flatten())

    model = small_llama(
        vocabulary=VOCABULARY, width=WIDTH, layers=LAYERS, heads=HEADS, positions=2 * LENGTH, generator=generator,
        first=0,
    )  # fmt: skip
    for size in SIZES:
        held = chain_batch(HELD, generator, size)
        for _ in range(ROUNDS):
            fit(model, partial(loss, size=size), steps=steps, rate=RATE)
            if _right(model, held) >= LEARNED:
                break
    return model


@torch.no_grad()
def _right(model: Any, batch: Chains) -> float:
    return float((_answers(model, batch).argmax(-1) == _wanted(batch)).double().mean())


def arms() -> dict[str, Callable[[], CachePolicy] | None]:
    """The methods of the chain by hand, around a model."""

    def recycled(stride: int | None, threshold: float | None = None) -> CachePolicy:
        return RecycledAttention(budget=BUDGET, stride=stride, threshold=threshold, check=CHECK, pool=1)

    return {
        "dense": None,
        "4": lambda: recycled(4),
        "dynamic": lambda: recycled(None, THRESHOLD),
        "one choice": lambda: recycled(None),
        "streaming": lambda: StreamingLLM(sinks=SINKS, window=BUDGET - SINKS),
    }


def run(seed: int, steps: int, count: int) -> dict[str, list[list[bool]]]:
    """Which hops of `count` chains one decoder gets right, by method."""
    generator = torch.Generator().manual_seed(seed)
    model = trained(steps, generator)
    batch = chain_batch(count, generator)
    found = {}
    for name, make in arms().items():
        with use(model, *([] if make is None else [make()])):
            found[name] = followed(model, batch).tolist()
    return found


@torch.no_grad()
def followed(model: Any, batch: Chains) -> Bool[Tensor, "batch hops"]:
    """Follows each chain from its first name, token by token; a wrong name is followed too, and counted wrong."""
    current = batch.names[:, 0]
    out = model(inputs_embeds=_read(model, batch, current[:, None]), use_cache=True, logits_to_keep=1)
    right = []
    for hop in range(HOPS):
        for _ in range(SPELLING - (hop == 0)):
            out = model(input_ids=NAME + current[:, None], past_key_values=out.past_key_values, use_cache=True)
        current = out.logits[:, -1, NAME:].argmax(-1)
        right.append(current == batch.names[:, hop + 1])
    return torch.stack(right, 1)


def _answers(model: Any, batch: Chains) -> Tensor:
    """Logits of names at every token of the true chain but its last name, (batch, tokens, names)."""
    spelled = batch.names[:, :-1].repeat_interleave(SPELLING, 1)
    out = model(inputs_embeds=_read(model, batch, spelled), use_cache=False, logits_to_keep=spelled.shape[1])
    logits: Tensor = out.logits
    return logits[..., NAME:]


def _read(model: Any, batch: Chains, spelled: Int[Tensor, "batch tokens"]) -> Float[Tensor, "batch places width"]:
    """Embeddings of the first token, the facts, and names that are spelled."""
    embed = model.get_input_embeddings()
    first = embed(batch.names.new_zeros(len(spelled), 1))
    return torch.cat(
        [first, embed(KEY + batch.facts[..., 0]) + embed(VALUE + batch.facts[..., 1]), embed(NAME + spelled)], 1
    )


def _wanted(batch: Chains) -> Int[Tensor, "batch tokens"]:
    return batch.names[:, 1:].repeat_interleave(SPELLING, 1)
