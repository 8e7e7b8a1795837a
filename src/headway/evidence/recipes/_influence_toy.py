"""A small decoder that learns to recall, and texts of several kinds that are equally hard for it.

A record is pairs, a stretch of symbols, and questions: a pair is one token that names a key with its value, a question
the bare key, behind which its pair has to be said again. Keys come once in each part, in another order. Only a look-up
tells the value; chance is one of the values. Beside records the model reads texts without look-ups: an order-1 chain, a
chain in which every symbol follows from the one two before it (a skip-gram), a phrase said again and again, symbols
drawn by frequency, each with more or less noise. All have `LENGTH` tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from headway.door import UniformHeads, use
from headway.evidence.recipes._toy_decoder import fit, small_llama
from headway.tasks.copying import CopySample

KEYS, VALUES, SYMBOLS = 6, 8, 16
#: Symbols between the pairs and the questions of a record.
GAP = 10
#: Ids: pairs, then keys that ask, then symbols.
ASK = KEYS * VALUES
SYMBOL = ASK + KEYS
VOCABULARY = SYMBOL + SYMBOLS
LENGTH = KEYS + GAP + 2 * KEYS
#: Rows that predict an answer, and where answers stand.
ASKING = slice(KEYS + GAP, LENGTH - 1, 2)
ANSWERS = slice(KEYS + GAP + 1, LENGTH, 2)
CHANCE = 1 / VALUES
#: Two heads a layer: more of them share the keys among themselves, each looking up some, and so none stands out.
LAYERS, HEADS, WIDTH = 3, 2, 64
RECORDS, OTHERS, RATE, WARM = 32, 16, 3e-3, 30
#: Weight of a token of a record that is no answer: most of them cannot be known.
OTHER = 0.1
KINDS = ("recall", "chain", "skip-gram", "phrase", "frequency")

Head = tuple[int, int]


def records(count: int, generator: torch.Generator) -> Int[Tensor, "count tokens"]:
    """Records with all their questions answered rightly."""
    values = torch.randint(VALUES, (count, KEYS), generator=generator)
    first, second = (torch.rand(count, KEYS, generator=generator).argsort(1) for _ in range(2))
    asked = torch.stack([ASK + second, second * VALUES + values.gather(1, second)], 2).flatten(1)
    gap = chains(count, generator, noise=1.0)[:, :GAP]
    return torch.cat([first * VALUES + values.gather(1, first), gap, asked], 1)


def guessed(ids: Int[Tensor, "count tokens"], generator: torch.Generator) -> Int[Tensor, "count tokens"]:
    """The same records with random values in their answers; the keys stay."""
    changed = ids.clone()
    keys = changed[:, ANSWERS] // VALUES
    changed[:, ANSWERS] = keys * VALUES + torch.randint(VALUES, keys.shape, generator=generator)
    return changed


def chains(
    count: int, generator: torch.Generator, *, noise: float | Tensor = 0.0, distance: int = 1
) -> Int[Tensor, "count tokens"]:
    """Text of a fixed chain over the symbols, in which each follows from the one `distance` before it, with a share of
    the symbols drawn evenly."""
    table = torch.rand(SYMBOLS, SYMBOLS, generator=torch.Generator().manual_seed(6 + distance)).pow(8)
    columns = list(torch.randint(SYMBOLS, (distance, count), generator=generator))
    while len(columns) < LENGTH:
        drawn = torch.multinomial(table[columns[-distance]], 1, generator=generator)[:, 0]
        even = torch.randint(SYMBOLS, (count,), generator=generator)
        columns.append(torch.where(torch.rand(count, generator=generator) < noise, even, drawn))
    return SYMBOL + torch.stack(columns, 1)


def documents(kind: str, count: int, generator: torch.Generator) -> Int[Tensor, "count tokens"]:
    """Texts of one kind, of mixed difficulty: records with some answers guessed, chains and skip-grams with noise, a
    phrase of symbols said again and again with noise, symbols drawn by frequency."""
    level = torch.rand(count, 1, generator=generator)
    flip = torch.rand(count, LENGTH, generator=generator) < level
    if kind == "recall":
        right = records(count, generator)
        return torch.where(flip & (level < 0.3), guessed(right, generator), right)
    if kind in ("chain", "skip-gram"):
        return chains(count, generator, noise=level[:, 0], distance=1 if kind == "chain" else 2)
    even = SYMBOL + torch.randint(SYMBOLS, (count, LENGTH), generator=generator)
    if kind == "phrase":
        size = LENGTH // 4
        phrase = even[:, :size].repeat(1, 4)
        return torch.where(flip & (torch.arange(LENGTH) >= size), even, phrase)
    weights = torch.rand(count, SYMBOLS, generator=generator).pow(1 + 7 * level)
    return SYMBOL + torch.multinomial(weights, LENGTH, replacement=True, generator=generator)


def trained(steps: int, generator: torch.Generator, *, width: int = WIDTH, corpus: Tensor | None = None) -> Any:
    """A decoder trained on fresh records and other texts, or on batches drawn from a corpus."""

    def loss(model: Any) -> Tensor:
        if corpus is None:
            others = [documents(kind, OTHERS // len(KINDS[1:]), generator) for kind in KINDS[1:]]
            ids = torch.cat([records(RECORDS, generator), *others])
        else:
            ids = corpus[torch.randint(len(corpus), (RECORDS + OTHERS,), generator=generator)]
        weight = _weights(ids)
        return (token_losses(model, ids) * weight[:, 1:]).sum() / weight[:, 1:].sum()

    model = small_llama(
        vocabulary=VOCABULARY, width=width, layers=LAYERS, heads=HEADS, positions=8 * LENGTH, generator=generator
    )
    return fit(model, loss, steps=steps, rate=RATE, schedule=_warm_and_fall)


def _warm_and_fall(optimiser: Optimizer, rate: float, steps: int) -> LRScheduler:
    """A rate that rises for `WARM` steps, stays, and falls to zero over the last 30 %."""
    fall = max(int(0.3 * steps), 1)
    return LambdaLR(optimiser, lambda step: min((step + 1) / WARM, (steps - step) / fall, 1.0))


def _weights(ids: Int[Tensor, "count tokens"]) -> Float[Tensor, "count tokens"]:
    """1, and `OTHER` for the tokens of records that are no answers."""
    record = ids[:, :1] < ASK
    answer = torch.zeros(LENGTH, dtype=torch.bool)
    answer[ANSWERS] = True
    return torch.where(record & ~answer, OTHER, 1.0)


def token_losses(model: Any, ids: Int[Tensor, "count tokens"]) -> Float[Tensor, "count predicted"]:
    """Cross-entropy of every token but the first, nats."""
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    return nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view(len(ids), -1)


@torch.no_grad()
def recall(model: Any, ids: Int[Tensor, "count tokens"], heads: Sequence[Head] = ()) -> float:
    """The share of answers that the model gives with some heads masked."""
    with use(model, *([UniformHeads(heads=heads)] if heads else [])):
        found = model(input_ids=ids, use_cache=False).logits[:, ASKING].argmax(-1)
    return float((found == ids[:, ANSWERS]).double().mean())


@torch.no_grad()
def mean_losses(model: Any, ids: Int[Tensor, "count tokens"], heads: Sequence[Head] = ()) -> Float[Tensor, " count"]:
    """The loss of each text with some heads masked."""
    with use(model, *([UniformHeads(heads=heads)] if heads else [])):
        return token_losses(model, ids).double().mean(1)


def probes(count: int, generator: torch.Generator) -> list[CopySample]:
    """The last question of records, as copy samples."""
    samples = []
    for row in records(count, generator):
        place = int((row[:KEYS] == row[-1]).nonzero()[0, 0])
        samples.append(
            CopySample(
                text="",
                ids=row[None],
                answer=row[-1:],
                answer_rows=torch.tensor([LENGTH - 2]),
                value_span=(place, place + 1),
            )
        )
    return samples
