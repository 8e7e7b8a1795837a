"""The toy of the PowerAttention recipe: pass-keys that a small language model recalls after a short fine-tune.

Each model is trained dense and then fine-tuned under every pattern from the same weights on the same texts. A pass-key
is out of reach of a pattern where no path of its graph through the layers leads to it, whatever is learned.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from headway.door import use
from headway.door.stages import Selector
from headway.evidence.claims import Claim, PaperValue
from headway.evidence.criteria import Criterion
from headway.evidence.parallel import side_by_side
from headway.evidence.recipe import Context
from headway.evidence.recipes._power_reach import Pattern, SinkWindow, seed_of, tiny_lm
from headway.methods.long_context.power_attention import (
    PATTERNS,
    PowerAttention,
    fine_tune,
    key_blocks,
    pattern_mask,
    power_mask,
    reached,
)
from headway.statistics import Measurement, bootstrap, bootstrap_difference

#: The toy: tokens, layers, values of a pass-key, tokens that mean nothing.
TOKENS, LAYERS, VALUES, NOISE = 48, 4, 8, 24
TOY = PowerAttention(block=1, window=5, sink=1, trained=True)
#: Keys that the last row of the mask reads beside the sink: the window of equal out-degree.
DEGREE = len(key_blocks(TOKENS - 1)) - 1
#: A window of so many keys hands nothing on beyond this distance.
WINDOW_REACH = LAYERS * (DEGREE - 1)
CHANCE = 1 / VALUES
#: Patterns of equal out-degree beside the mask.
OTHERS = PATTERNS[1:]


def toys(context: Context) -> list[dict[str, Any]]:
    """One result per seed; two seeds at a time, each pair a stage of its own."""
    seeds = list(range(context.choose(smoke=1, small=5, full=10)))
    workers = context.choose(smoke=1, small=2, full=1)
    found = []
    for first in range(0, len(seeds), workers):
        calls = [(context.size, seed, _seeds_of(context, seed)) for seed in seeds[first : first + workers]]
        found += context.stage(f"recall-{first}", partial(side_by_side, recall, calls, workers=workers))
    return found


def _seeds_of(context: Context, seed: int) -> dict[str, int]:
    names = ("toy", "dense data", "test", "probe fit", "probe test", "tune")
    return {name: seed_of(context, f"{name} {seed}") for name in names}


def graph_reach(name: str) -> Tensor:
    """Which earlier tokens (columns) each row of the toy can be informed by through its layers."""
    mask = power_mask(TOKENS) if name == "power" else pattern_mask(name, TOKENS, degree=DEGREE)
    return torch.stack([reached(mask, LAYERS, row)[-1] for row in range(TOKENS)])


def passkeys(generator: torch.Generator, batch: int, *, tokens: int = TOKENS) -> dict[str, Tensor]:
    """Noise with one pass-key at a random place (never the first, which every mask sees). Every later position has to
    say which it was: many supervised tokens a text, at every distance."""
    ids = torch.randint(VALUES, VALUES + NOISE, (batch, tokens), generator=generator)
    at = torch.randint(1, tokens - 1, (batch,), generator=generator)
    value = torch.randint(0, VALUES, (batch,), generator=generator)
    ids[torch.arange(batch), at] = value
    labels = value[:, None].expand(-1, tokens).masked_fill(torch.arange(tokens) <= at[:, None], -100)
    return {"input_ids": ids, "labels": labels}


def stream(generator: torch.Generator, batch: int, tokens: int = TOKENS) -> Iterator[dict[str, Tensor]]:
    """Batches of pass-keys without end."""
    while True:
        yield passkeys(generator, batch, tokens=tokens)


def recall(size: str, seed: int, seeds: dict[str, int]) -> dict[str, Any]:
    """One model: trained dense, then fine-tuned with each mask from the same weights on the same texts."""
    dense_steps, steps, batch, texts = {
        "smoke": (4, 3, 4, 16), "small": (110, 100, 24, 192), "full": (600, 400, 64, 2048)
    }[size]  # fmt: skip
    model = tiny_lm(seeds["toy"], vocabulary=VALUES + NOISE, tokens=TOKENS, layers=LAYERS)
    data = _generator(seeds["dense data"])
    fine_tune(model, stream(data, batch), None, steps=dense_steps, learning_rate=5e-3)
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    test = passkeys(_generator(seeds["test"]), texts)
    probes = [passkeys(_generator(seeds[f"probe {part}"]), texts) for part in ("fit", "test")]
    found: dict[str, Any] = {"seed": seed, "dense": accuracy(model, None, test)}
    methods: dict[str, Selector] = {"power": TOY, **{n: Pattern(pattern=n, degree=DEGREE) for n in OTHERS}}
    for name, method in methods.items():
        model.load_state_dict(start)
        before = accuracy(model, method, test, graph_reach(name))
        tuned = fine_tune(model, stream(_generator(seeds["tune"]), batch), method, steps=steps, learning_rate=3e-3)
        found[name] = {
            "before": before,
            "after": accuracy(model, method, test, graph_reach(name)),
            "probe": _probe(model, method, *probes),
            "loss": tuned.losses[-1],
        }
    return found


@torch.no_grad()
def accuracy(
    model: nn.Module, method: Selector | None, test: dict[str, Tensor], known: Tensor | None = None
) -> dict[str, float | None]:
    """Share of positions that name the pass-key, by its distance; and of those from which a path of the graph leads to
    it, and from which none does (None where there are no such)."""
    with scope(model, method):
        said = cast(Any, model)(input_ids=test["input_ids"], use_cache=False).logits.argmax(-1)
    value = test["labels"][:, -1:]
    at = (test["labels"] == -100).sum(1) - 1
    distance = torch.arange(said.shape[1]) - at[:, None]
    right = said == value
    bins = {
        "near": (distance >= 0) & (distance < DEGREE),
        "between": (distance >= DEGREE) & (distance <= WINDOW_REACH),
        "far": distance > WINDOW_REACH,
    }
    if known is not None:
        there = known[torch.arange(said.shape[1]), at[:, None]]
        bins |= {"reachable": (distance > 0) & there, "unreachable": (distance > 0) & ~there}
    return {name: float(right[inside].double().mean()) if bool(inside.any()) else None for name, inside in bins.items()}


@torch.no_grad()
def _probe(
    model: nn.Module, method: Selector, fit: dict[str, Tensor], test: dict[str, Tensor]
) -> dict[str, list[float]]:
    """Per layer: how often a linear classifier of the last token's hidden state names a pass-key that stood beyond a
    window's reach. Least squares on one-hot targets with a small ridge, in place of a logistic classifier."""
    states = []
    for part in (fit, test):
        with scope(model, method):
            output = cast(Any, model)(input_ids=part["input_ids"], use_cache=False, output_hidden_states=True)
        states.append([layer[:, -1].double() for layer in output.hidden_states])
    ends = [(part["labels"] == -100).sum(1) - 1 for part in (fit, test)]
    far = TOKENS - 1 - ends[1] > WINDOW_REACH
    targets = torch.nn.functional.one_hot(fit["labels"][:, -1], VALUES).double()
    found = []
    for fitted, tested in zip(*states, strict=True):
        x, y = (torch.cat([s, s.new_ones(s.shape[0], 1)], 1) for s in (fitted, tested))
        weights = torch.linalg.solve(x.T @ x + 1e-3 * torch.eye(x.shape[1], dtype=x.dtype), x.T @ targets)
        right = (y @ weights).argmax(-1) == test["labels"][:, -1]
        found.append(float(right[far].double().mean()))
    return {"far": found}


def scope(model: nn.Module, method: Selector | None) -> Any:
    return nullcontext() if method is None else use(model, method, selftest=False)


def byte_models(context: Context) -> list[dict[str, float]]:
    """Byte language models trained on natural text from scratch, with the mask and with a window of equal degree."""
    seeds = context.choose(smoke=1, small=8, full=10)
    workers = context.choose(smoke=1, small=2, full=1)
    names = ("text", "text test", "text data")
    calls = [(context.size, n, {name: seed_of(context, f"{name} {n}") for name in names}) for n in range(seeds)]
    return side_by_side(byte_model, calls, workers=workers)


def byte_model(size: str, seed: int, seeds: dict[str, int]) -> dict[str, float]:
    """Nats a byte of held-out text, by pattern."""
    from headway.hosts import default_text

    steps, tokens, batch, held_out = {
        "smoke": (2, 64, 2, 4), "small": (40, 128, 16, 32), "full": (2000, 512, 32, 256)
    }[size]  # fmt: skip
    data = torch.frombuffer(bytearray(default_text().text.encode()), dtype=torch.uint8).long()
    edge = data.numel() * 9 // 10
    block, window = 4, 3
    degree = len(key_blocks(tokens // block - 1, window=window)) - 1
    methods: dict[str, Selector] = {
        "power": PowerAttention(block=block, window=window, sink=1, trained=True),
        "window": SinkWindow(sinks=block, window=degree * block),
    }
    test = _pieces(data[edge:], held_out, tokens, _generator(seeds["text test"]))
    losses = {}
    for name, method in methods.items():
        model = tiny_lm(seeds["text"], vocabulary=256, tokens=tokens, layers=LAYERS)
        generator = _generator(seeds["text data"])
        batches = (_pieces(data[:edge], batch, tokens, generator) for _ in range(steps))
        fine_tune(model, batches, method, steps=steps, learning_rate=5e-3)
        with torch.no_grad(), use(model, method, selftest=False):
            losses[name] = float(cast(Any, model)(input_ids=test, labels=test, use_cache=False).loss)
    return {"seed": seed, **losses}


def _pieces(data: Tensor, count: int, tokens: int, generator: torch.Generator) -> Tensor:
    starts = torch.randint(0, data.numel() - tokens, (count,), generator=generator)
    return data[starts[:, None] + torch.arange(tokens)]


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def toy_values(toys: Sequence[dict[str, Any]], name: str, when: str, where: str = "far") -> list[float]:
    return [toy[name][when][where] for toy in toys]


def dense_recall(context: Context, toys: Sequence[dict[str, Any]]) -> Measurement:
    return bootstrap([toy["dense"]["far"] for toy in toys], generator=context.generator("dense"))


def patterns_claim(context: Context, toys: Sequence[dict[str, Any]], criterion: Criterion) -> Claim:
    random = context.generator("patterns interval")
    far = {name: toy_values(toys, name, "after") for name in ("power", *OTHERS)}
    seeds = [toy["seed"] for toy in toys]
    return Claim(
        id="static-patterns",
        statement="After the same short fine-tune the mask recalls far pass-keys better than every other static "
        "pattern of equal degree.",
        paper=PaperValue("5 to 40 % better than static patterns", "Qwen2-7B, pass-key and RULER", "abstract"),
        measured=bootstrap(far["power"], generator=random, seeds=seeds),
        criterion=criterion,
        others={
            **{
                f"over_{name}": bootstrap_difference(
                    far["power"], far[name], paired=True, generator=random, seeds=seeds
                )
                for name in OTHERS
            },
            "dense": dense_recall(context, toys),
        },
        notes="Exact strides of the paper's baselines were not seen: stride takes every "
        f"{max(TOKENS // max(DEGREE - DEGREE // 2, 1), 1)}th diagonal beside a window of {DEGREE // 2}.",
        details={"far recall": {name: float(np.mean(values)) for name, values in far.items()}},
    )


def graph_claim(context: Context, toys: Sequence[dict[str, Any]], criterion: Criterion) -> Claim:
    random = context.generator("graph interval")
    lost = [
        np.mean([toy[name]["after"]["unreachable"] for name in OTHERS if toy[name]["after"]["unreachable"] is not None])
        for toy in toys
    ]
    table = {
        name: {
            where: None if any(v is None for v in values) else float(np.mean(values))
            for where in ("reachable", "unreachable")
            for values in [toy_values(toys, name, "after", where)]
        }
        for name in ("power", *OTHERS)
    }
    return Claim(
        id="recall-follows-graph",
        statement="A pass-key is recalled where the pattern's graph leads to it through the layers, and nowhere else.",
        paper=PaperValue("accuracy follows the receptive field", where="appendix A"),
        measured=bootstrap(lost, generator=random),
        criterion=criterion,
        others={
            "power": bootstrap(toy_values(toys, "power", "after", "reachable"), generator=random),
            "dense": dense_recall(context, toys),
        },
        notes=f"Chance is {CHANCE}. Patterns that reach everything have no share where no path leads.",
        details={"recall": table},
    )
