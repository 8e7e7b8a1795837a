"""DuoAttention on a decoder that has learned to retrieve: gates, accuracies and effects of one seed.

    first token, filler with KEYS facts among it, filler with questions among it

A fact names a key with its value in one token; a question names a key, and the value is what comes next. Filler follows
a rule of its two last tokens most of the time, so the decoder has local work too. It is trained on both; which heads
retrieve is its own affair. Facts stand further back from every question than streaming heads reach.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from headway.door import use
from headway.evidence.recipes._toy_decoder import fit, small_llama
from headway.methods.long_context.duo_attention import DuoAttention, GateSample, learn_gates

KEYS, VALUES, FILLERS = 6, 8, 8
#: Ids: the first token, filler, pairs (key, value), keys that ask, values that answer.
FILL = 1
PAIR = FILL + FILLERS
ASK = PAIR + KEYS * VALUES
ANSWER = ASK + KEYS
VOCABULARY = ANSWER + VALUES
#: What streaming heads keep, and tokens with facts, between facts and questions, and with questions.
REACH: dict[str, Any] = {"sinks": 2, "recent": 12}
FACTS, GAP, ASKING, QUESTIONS = 24, 12, 20, 8
LENGTH = 1 + FACTS + GAP + ASKING
#: How often filler follows its rule.
RULE = 0.9
LAYERS, HEADS, WIDTH = 3, 4, 64
BATCH, RATE = 32, 3e-3
#: Training goes on, a whole schedule at a time, until so many of the answers to `HELD` sequences are right.
LEARNED, ROUNDS, HELD = 0.99, 4, 100
GATE_RATE, SPARSITY, RANDOM_DRAWS = 0.05, 0.5, 3


@dataclass(frozen=True)
class Recall:
    """Token ids, the rows that ask with the value tokens they ask for, and the rows whose next token the rule gives."""

    ids: Int[Tensor, "batch tokens"]
    rows: Int[Tensor, "batch questions"]
    answers: Int[Tensor, "batch questions"]
    ruled: Bool[Tensor, "batch tokens"]


def recall_batch(count: int, generator: torch.Generator) -> Recall:
    """`count` sequences with every key once among the facts and `QUESTIONS` questions."""
    facts = 1 + _places(count, FACTS, KEYS, generator)
    rows = 1 + FACTS + GAP + _places(count, ASKING, QUESTIONS, generator)
    values = torch.randint(VALUES, (count, KEYS), generator=generator)
    asked = torch.randint(KEYS, (count, QUESTIONS), generator=generator)
    ids, ruled = _filler(count, generator)
    order = torch.rand(count, KEYS, generator=generator).argsort(1)
    ids.scatter_(1, facts, PAIR + order * VALUES + values.gather(1, order))
    ids.scatter_(1, rows, ASK + asked)
    # The rule holds where a token and both before it are filler of one run.
    plain = (ids >= FILL) & (ids < PAIR)
    kept = ruled & plain
    kept[:, 2:] &= plain[:, 1:-1] & plain[:, :-2]
    kept[:, :2] = False
    return Recall(
        ids, rows, ANSWER + values.gather(1, asked), kept.roll(-1, 1).index_fill(1, torch.tensor([-1]), False)
    )


def trained(steps: int, generator: torch.Generator) -> tuple[Any, int]:
    """A decoder trained on fresh sequences, and the rounds of `steps` it took; the loss is that of answers plus that
    of filler.

    When it begins to look back differs from decoder to decoder; one that has not learned gets another round, and at
    most `ROUNDS`."""

    def loss(model: Any) -> Tensor:
        batch = recall_batch(BATCH, generator)
        logits = model(input_ids=batch.ids, use_cache=False).logits
        answers = nn.functional.cross_entropy(_answers(logits, batch).flatten(0, 1), batch.answers.flatten())
        return answers + nn.functional.cross_entropy(logits[batch.ruled], batch.ids.roll(-1, 1)[batch.ruled])

    model = small_llama(
        vocabulary=VOCABULARY, width=WIDTH, layers=LAYERS, heads=HEADS, positions=2 * LENGTH, generator=generator,
        first=0,
    )  # fmt: skip
    held = recall_batch(HELD, generator)
    rounds = 0
    while rounds < ROUNDS:
        fit(model, loss, steps=steps, rate=RATE)
        rounds += 1
        if recalled(model, held) >= LEARNED:
            break
    return model, rounds


def run(seed: int, steps: int, gate_steps: int, count: int) -> dict[str, Any]:
    """One decoder: what it has learned, the gates it gets, the accuracy of each choice of heads on `count` fresh
    sequences, and how far each head alone moves the answers."""
    generator = torch.Generator().manual_seed(seed)
    model, rounds = trained(steps, generator)
    batch = recall_batch(count, generator)
    gates = learn_gates(model, partial(_sample, seed), steps=gate_steps, learning_rate=GATE_RATE, **REACH).gates.values
    accuracy = partial(_accuracy, model, batch)
    random = [accuracy(torch.rand(gates.shape, generator=generator)) for _ in range(RANDOM_DRAWS)]
    return {
        "gates": gates,
        "rounds": rounds,
        "full": recalled(model, batch),
        "local": _follows_rule(model, batch),
        "learned": accuracy(gates),
        "inverted": accuracy(-gates),
        "random": sum(random) / len(random),
        "none": accuracy(gates, 1.0),
        "effects": effects(model, batch, gates.shape),
    }


@torch.no_grad()
def recalled(model: Any, batch: Recall) -> float:
    """The share of questions whose largest answer is right; whatever is attached is measured."""
    found = _answers(model(input_ids=batch.ids, use_cache=False).logits, batch)[..., ANSWER:].argmax(-1)
    return float((found + ANSWER == batch.answers).float().mean())


@torch.no_grad()
def effects(model: Any, batch: Recall, shape: torch.Size) -> Float[Tensor, "layers kv_heads"]:
    """How far the answers' logits move when one head alone is made a streaming head, as a root mean square."""

    def read(*stages: DuoAttention) -> Tensor:
        with use(model, *stages):
            return _answers(model(input_ids=batch.ids, use_cache=False).logits, batch)[..., ANSWER:]

    native, found = read(), torch.zeros(shape)
    for layer in range(shape[0]):
        for head in range(shape[1]):
            gates = torch.ones(shape)
            gates[layer, head] = 0
            found[layer, head] = (
                (read(DuoAttention(gates=gates, threshold=0.5, **REACH)) - native).square().mean().sqrt()
            )
    return found


def _accuracy(model: Any, batch: Recall, gates: Tensor, sparsity: float = SPARSITY) -> float:
    with use(model, DuoAttention(gates=gates, sparsity=sparsity, **REACH)):
        return recalled(model, batch)


@torch.no_grad()
def _follows_rule(model: Any, batch: Recall) -> float:
    """The share of filler that the rule gives and the model names."""
    found = model(input_ids=batch.ids, use_cache=False).logits.argmax(-1)
    return float((found == batch.ids.roll(-1, 1))[batch.ruled].float().mean())


def _sample(seed: int, step: int) -> GateSample:
    """One sequence for the gates, its questions supervised."""
    batch = recall_batch(1, torch.Generator().manual_seed(seed + 10_000 + step))
    rows = torch.zeros(LENGTH, dtype=torch.bool)
    rows[batch.rows[0]] = True
    return GateSample(batch.ids, rows)


def _answers(
    logits: Float[Tensor, "batch tokens vocabulary"], batch: Recall
) -> Float[Tensor, "batch questions vocabulary"]:
    return logits.gather(1, batch.rows[..., None].expand(-1, -1, logits.shape[-1]))


def _places(count: int, room: int, wanted: int, generator: torch.Generator) -> Int[Tensor, "batch wanted"]:
    """Different places in so much room, in order."""
    return torch.rand(count, room, generator=generator).argsort(1)[:, :wanted].sort(1).values


def _filler(count: int, generator: torch.Generator) -> tuple[Int[Tensor, "batch tokens"], Bool[Tensor, "batch tokens"]]:
    """Filler that follows the rule of its two last tokens with probability `RULE`, and where it does."""
    table = torch.randint(FILLERS, (FILLERS, FILLERS), generator=torch.Generator().manual_seed(0))
    ids = torch.randint(FILLERS, (count, LENGTH), generator=generator)
    ruled = torch.rand(count, LENGTH, generator=generator) < RULE
    for at in range(2, LENGTH):
        ids[:, at] = torch.where(ruled[:, at], table[ids[:, at - 2], ids[:, at - 1]], ids[:, at])
    ids += FILL
    ids[:, 0] = 0
    return ids, ruled
