"""Small trained models around one kind of mixer: pairs first, then queries whose values are asked for.

A pair is one token, the sum of what its key and its value are embedded as; a query is a key alone. So one layer can
answer, and what differs between mixers is how they estimate the value at a key from the pairs before it. Associative
recall has drawn symbols, in-context regression has y = A x with a map of its own for every sequence.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from headway.models import HeadwayConfig, HeadwayForCausalLM
from headway.models.mixers import build_mixer
from headway.statistics import Measurement
from headway.train import train
from headway.train.generated import StateTracking, score
from headway.train.losses import Loss
from headway.train.streams import Batch

WIDTH, HEADS = 64, 4
#: Symbols of recall; pairs are drawn without repeated keys.
SYMBOLS = 64
DIM, NOISE = 8, 0.05
QUERIES = 16
RATE = 3e-3
#: Mixers with their options; none knows places, as pairs have none.
MIXERS: dict[str, tuple[str, dict[str, Any]]] = {
    "local_linear": ("local_linear", {"position": "none", "solver": "cg"}),
    "softmax": ("softmax", {"position": "none", "qk_norm": True}),
    "linear": ("linear", {"feature": "elu_plus_one"}),
}


class Answerer(nn.Module):
    """Embeddings of keys and values, one residual mixer, and a head on the query tokens."""

    def __init__(self, mixer: str, task: str) -> None:
        super().__init__()
        slug, options = MIXERS[mixer]
        symbols = task == "recall"
        self.key = nn.Embedding(SYMBOLS, WIDTH) if symbols else nn.Linear(DIM, WIDTH)
        self.value = nn.Embedding(SYMBOLS, WIDTH) if symbols else nn.Linear(DIM, WIDTH)
        self.before, self.after = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.mixer = build_mixer(slug, WIDTH, HEADS, 0, 1, options)
        self.head = nn.Linear(WIDTH, SYMBOLS if symbols else DIM)

    def forward(self, keys: Tensor, values: Tensor, queries: Tensor) -> Float[Tensor, "batch queries out"]:
        x = torch.cat([self.key(keys) + self.value(values), self.key(queries)], 1)
        x = x + self.mixer(self.before(x))[0]
        return self.head(self.after(x[:, keys.shape[1] :]))


def recall_batch(batch: int, pairs: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Keys without repetition, values with; queries are keys that were there."""
    keys = torch.stack([torch.randperm(SYMBOLS, generator=generator)[:pairs] for _ in range(batch)])
    values = torch.randint(SYMBOLS, (batch, pairs), generator=generator)
    asked = torch.randint(pairs, (batch, QUERIES), generator=generator)
    return {"keys": keys, "values": values, "queries": keys.gather(1, asked), "labels": values.gather(1, asked)}


def regression_batch(batch: int, pairs: int, generator: torch.Generator) -> dict[str, Tensor]:
    """y = A x + noise with A drawn for every sequence; queries are new x, labels without noise."""

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    maps, keys, queries = draw(batch, DIM, DIM) / DIM**0.5, draw(batch, pairs, DIM), draw(batch, QUERIES, DIM)
    values = keys @ maps.transpose(1, 2)
    labels = queries @ maps.transpose(1, 2)
    return {"keys": keys, "values": values + NOISE * draw(*values.shape), "queries": queries, "labels": labels}


BATCHES = {"recall": recall_batch, "regression": regression_batch}


def trained(task: str, mixer: str, seed: int, *, steps: int, pairs: int, batch: int = 32, test: int = 512) -> float:
    """Accuracy (recall) or mean squared error over that of answering zero (regression) of a trained model."""
    torch.manual_seed(seed % 2**31)
    model = Answerer(mixer, task)
    make = BATCHES[task]

    def batches(number: int) -> Batch:
        return make(batch, pairs, torch.Generator().manual_seed((seed + number) % 2**31))

    train(model, batches, steps=steps, loss=_loss, learning_rate=RATE, weight_decay=0.0, warmup=steps // 10, seed=0)
    held = make(test, pairs, torch.Generator().manual_seed((seed + 10**6) % 2**31))
    with torch.no_grad():
        answer = model(held["keys"], held["values"], held["queries"])
    if task == "recall":
        return float((answer.argmax(-1) == held["labels"]).float().mean())
    return float((answer - held["labels"]).square().mean() / held["labels"].square().mean())


def tracked(mixer: str, seed: int, *, steps: int, count: int) -> float:
    """Accuracy of a trained two-layer language model, with rotary positions, on the running parity of `count` bits."""
    torch.manual_seed(seed % 2**31)
    task = StateTracking(group="parity", count=count, seed=seed % 2**31)
    config = HeadwayConfig(vocab_size=task.vocabulary, width=32, layers=2, heads=2, mixer=mixer, positions=task.length)
    model = HeadwayForCausalLM(config)
    train(model, task, steps=steps, learning_rate=RATE, weight_decay=0.0, warmup=steps // 10, seed=0)
    return score(model, task.held_out(4))["accuracy"]


def _loss(model: nn.Module, batch: Any) -> Loss:
    answer, labels = model(batch["keys"], batch["values"], batch["queries"]), batch["labels"]
    if labels.is_floating_point():
        return Loss(nn.functional.mse_loss(answer, labels), labels.numel())
    return Loss(nn.functional.cross_entropy(answer.flatten(0, 1), labels.flatten()), labels.numel())


def mean_of(values: list[float], generator: Any, seeds: list[int]) -> Measurement:
    """The mean over seeds with its interval."""
    from headway.statistics import bootstrap

    return bootstrap(values, generator=generator, seeds=seeds)
