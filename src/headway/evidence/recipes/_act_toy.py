"""A small model that recalls values by their keys, and sinks planted in some of its heads.

A token names a key with its value; later a bare key asks for the value. Two markers without meaning stand among the
pairs. A two-layer decoder learns the task; then a constant is added to the logit of the markers in chosen heads, which
so become sinks that hurt. What the right repair is, is known.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from headway.door.call import AttentionCall, Site
from headway.door.stages import Editor
from headway.evidence.recipes._toy_decoder import fit, small_llama

FIRST, MARKER = 0, 1
KEYS, VALUES = 6, 8
#: Ids: pairs (key, value), then keys that ask, then values that answer.
PAIR, ASK = 2, 2 + KEYS * VALUES
ANSWER = ASK + KEYS
VOCABULARY = ANSWER + VALUES
#: Pairs before which the markers stand, and questions after the last pair.
MARKED_PAIRS, QUESTIONS = (2, 4), 15
#: Where the markers stand in every sequence.
MARKER_PLACES = tuple(1 + pairs + number for number, pairs in enumerate(MARKED_PAIRS))
LENGTH = 1 + KEYS + len(MARKED_PAIRS) + QUESTIONS
LAYERS, HEADS, WIDTH = 2, 4, 64
BATCH, RATE = 64, 3e-3

Head = tuple[int, int]


@dataclass(frozen=True)
class Recall:
    """Token ids, and the value token that each of the last `QUESTIONS` positions asks for."""

    ids: Int[Tensor, "batch tokens"]
    answers: Int[Tensor, "batch questions"]


def recall_batch(count: int, generator: torch.Generator) -> Recall:
    """`count` sequences: a first token, every key once with a value, two markers among them, and questions."""
    order = torch.rand(count, KEYS, generator=generator).argsort(1)
    values = torch.randint(VALUES, (count, KEYS), generator=generator)
    pairs = PAIR + order * VALUES + values.gather(1, order)
    asked = torch.randint(KEYS, (count, QUESTIONS), generator=generator)
    columns = [torch.full((count, 1), FIRST)]
    for place in range(KEYS):
        columns += [torch.full((count, 1), MARKER)] * (place in MARKED_PAIRS) + [pairs[:, place : place + 1]]
    return Recall(torch.cat([*columns, ASK + asked], 1), ANSWER + values.gather(1, asked))


def train_recall(steps: int, generator: torch.Generator) -> Any:
    """A decoder trained on fresh sequences; AdamW with a rate that falls to zero."""

    def loss(model: Any) -> Tensor:
        batch = recall_batch(BATCH, generator)
        logits = model(input_ids=batch.ids, use_cache=False).logits[:, -QUESTIONS:]
        return nn.functional.cross_entropy(logits.flatten(0, 1), batch.answers.flatten())

    model = small_llama(
        vocabulary=VOCABULARY, width=WIDTH, layers=LAYERS, heads=HEADS, positions=2 * LENGTH, generator=generator,
        first=FIRST,
    )  # fmt: skip
    return fit(model, loss, steps=steps, rate=RATE)


@torch.no_grad()
def recalled(model: Any, batch: Recall) -> Float[Tensor, " batch"]:
    """The share of each sequence's questions that the model answers; whatever is attached is measured."""
    found = model(input_ids=batch.ids, use_cache=False).logits[:, -QUESTIONS:].argmax(-1)
    return (found == batch.answers).float().mean(1)


@dataclass(frozen=True, kw_only=True, eq=False)
class PlantedSinks(Editor):
    """Adds `strength` to the logits of markers in some heads."""

    heads: Sequence[Head]
    strength: float

    def acts_at(self, site: Site) -> bool:
        return any(layer == site.layer for layer, _ in self.heads)

    def edit_call(self, call: AttentionCall) -> AttentionCall:
        ids = call.forward.inputs["input_ids"]
        bias = torch.zeros(ids.shape[0], call.heads, 1, call.keys, device=ids.device)
        for layer, head in self.heads:
            if layer == call.site.layer:
                bias[:, head, 0] = self.strength * (ids == MARKER)
        return call.replace(bias=bias)


def every_head() -> list[Head]:
    return [(layer, head) for layer in range(LAYERS) for head in range(HEADS)]
