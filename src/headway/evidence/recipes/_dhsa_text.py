"""The part of the DHSA recipe on a real model and text: a predictor trained on it, kept mass, planted values.

Every selection reads the same number of keys in every row; the dense suffix is off.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from headway.door.attach import observe, use
from headway.door.call import AttentionCall, Forward
from headway.door.selection import Selection
from headway.door.stages import Observer, Selector
from headway.evidence.recipe import Context
from headway.evidence.recipes._dhsa_planted import near_f1
from headway.methods.long_context.dhsa import (
    DHSA,
    BoundaryPredictor,
    Fixed,
    Given,
    Oracle,
    Predicted,
    Recorded,
    Trained,
    boundary_targets,
    record_boundaries,
    select_gaps,
    train_predictor,
)
from headway.tasks.answering import forward, prefill
from headway.tasks.fidelity import fidelity
from headway.tasks.needle import needle_grid, value_ids
from headway.tasks.perplexity import negative_log_likelihood

#: What predicted chunks are held against.
OTHERS = ("fixed", "window", "random")
#: Tokens of a short document among those that are put one behind the other.
DOCUMENT = (40, 100)


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What the real part runs at: model, tokens of a text, texts to train on and to judge by, layers, the stage's
    numbers, and training."""

    model: str
    tokens: int
    train: int
    judge: int
    every: int
    budget: int
    block: int
    needles: tuple[int, ...]
    epochs: int
    rate: float


def sizes_of(context: Context) -> Sizes:
    return context.choose(
        smoke=Sizes(
            model="tiny",
            tokens=96,
            train=3,
            judge=2,
            every=1,
            budget=32,
            block=8,
            needles=(20, 80),
            epochs=1,
            rate=1e-3,
        ),
        small=Sizes(
            model="smollm2",
            tokens=640,
            train=8,
            judge=6,
            every=6,
            budget=160,
            block=32,
            needles=tuple(range(10, 91, 10)),
            epochs=6,
            rate=5e-4,
        ),
        full=Sizes(
            model="google/gemma-2-2b-it",
            tokens=8192,
            train=200,
            judge=40,
            every=1,
            budget=2048,
            block=64,
            needles=tuple(range(0, 101, 5)),
            epochs=2,
            rate=1e-4,
        ),
    )


def host_of(context: Context) -> tuple[nn.Module, Any]:
    """The model, and its tokenizer (None for the tiny one)."""
    name = sizes_of(context).model
    if name == "tiny":
        from headway.hosts.tiny import tiny_host

        return tiny_host("llama", num_key_value_heads=2, max_position_embeddings=512)[0], None
    from headway.hosts import load

    large = context.size == "full"
    return load(name, device="cuda" if large else "cpu", dtype="bfloat16" if large else "float32")


def texts_of(context: Context, tokenizer: Any, model: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """Texts to train on and texts to judge by: windows of one text that do not overlap, in random order."""
    from headway.hosts import default_text
    from headway.tasks.samples import plain_ids

    sizes = sizes_of(context)
    count, generator = sizes.train + sizes.judge, context.torch_generator("texts")
    if tokenizer is None:
        ids = torch.randint(8, 112, (count * sizes.tokens,), generator=generator)
    else:
        ids = torch.tensor(plain_ids(tokenizer, default_text().text))
    places = torch.randperm(ids.numel() // sizes.tokens, generator=generator)[:count].tolist()
    device = next(model.parameters()).device
    windows = [ids[None, p * sizes.tokens : (p + 1) * sizes.tokens].to(device) for p in places]
    return windows[: sizes.train], windows[sizes.train :]


def layers_of(context: Context, model: nn.Module) -> list[int]:
    config: Any = model.config
    return list(range(0, config.num_hidden_layers, sizes_of(context).every))


def folder_of(context: Context) -> Path:
    return context.out / "predictor"


def learn(context: Context) -> dict[str, Any]:
    """Trains the boundary predictor; F1 of every text it did not see, beside a guess at the rate of its own answers."""
    sizes = sizes_of(context)
    model, tokenizer = host_of(context)
    train, judge = texts_of(context, tokenizer, model)
    layers = layers_of(context, model)
    trained = trained_on(context, model, train)
    trained.predictor.save(folder_of(context))
    found: dict[str, Any] = {"f1": [], "guess": [], "rate": [], "losses": trained.losses}
    for text in judge:
        f1, guess, rate = agreement(trained.predictor, record_boundaries(model, [text], layers=layers))
        found["f1"].append(f1)
        found["guess"].append(guess)
        found["rate"].append(rate)
    return found | {"held out": vars(trained.scores), "model": sizes.model, "layers": layers}


def trained_on(context: Context, model: nn.Module, texts: Sequence[Tensor]) -> Trained:
    """A boundary predictor trained on some texts of the model's own dense attention."""
    sizes = sizes_of(context)
    recorded = record_boundaries(model, texts, layers=layers_of(context, model))
    return train_predictor(model, recorded, epochs=sizes.epochs, rate=sizes.rate, seed=0)


@torch.no_grad()
def agreement(predictor: BoundaryPredictor, recorded: Sequence[Recorded]) -> tuple[float, float, float]:
    """F1 of as many best gaps as are labelled, the expected F1 of as many random ones, and the rate of labels."""
    hits = true = valid = 0
    for sample in recorded:
        targets, counts = (x[0] for x in boundary_targets(sample.ratio[None], window=predictor.window))
        inside = predictor(sample.keys[None])[0][counts]
        wanted = targets[counts]
        size = int(wanted.sum())
        hits += int(wanted[inside.topk(size).indices].sum()) if size else 0
        true += size
        valid += int(counts.sum())
    return hits / max(true, 1), true / max(valid, 1), true / max(valid, 1)


def join_f1(context: Context) -> dict[str, Any]:
    """F1 of boundaries against the joins of short documents put one behind the other, mean over layers, by text.

    As many boundaries as joins, of a predictor trained on such texts (of other documents), of dense attention (its
    labels) and at random; one counts within two tokens."""
    sizes = sizes_of(context)
    model, tokenizer = host_of(context)
    train, judge = texts_of(context, tokenizer, model)
    generator = context.torch_generator("joins")
    trained = trained_on(context, model, [_joined(train, sizes.tokens, generator)[0] for _ in train])
    found: dict[str, Any] = {"predicted": [], "oracle": [], "random": []}
    labels: dict[str, list[float]] = {"f1": [], "guess": []}
    for _ in context.track(range(sizes.judge), "document joins"):
        text, joins = _joined(judge, sizes.tokens, generator)
        scores: dict[str, list[float]] = {name: [] for name in found}
        recorded = record_boundaries(model, [text], layers=layers_of(context, model))
        for sample in recorded:
            with torch.no_grad():
                logits = trained.predictor(sample.keys[None])[0]
            drawn = torch.rand(logits.shape, generator=generator)
            for name, values in (("predicted", logits), ("oracle", sample.ratio), ("random", drawn)):
                gaps = select_gaps(values.float().cpu().numpy(), threshold=-np.inf, most=len(joins))
                scores[name].append(near_f1(torch.tensor(gaps), joins))
        for name, values in scores.items():
            found[name].append(float(np.mean(values)))
        f1, guess, _ = agreement(trained.predictor, recorded)
        labels["f1"].append(f1)
        labels["guess"].append(guess)
    return found | {"labels": labels}


def _joined(texts: Sequence[Tensor], tokens: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Pieces of the texts from random places, one behind the other, and where they meet."""
    pieces: list[Tensor] = []
    while sum(piece.numel() for piece in pieces) < tokens:
        source = texts[int(torch.randint(len(texts), (1,), generator=generator))][0]
        length = int(torch.randint(*DOCUMENT, (1,), generator=generator))
        start = int(torch.randint(max(source.numel() - length, 1), (1,), generator=generator))
        pieces.append(source[start : start + length])
    ends = torch.tensor([piece.numel() for piece in pieces]).cumsum(0)[:-1]
    return torch.cat(pieces)[None, :tokens], ends


@dataclass(frozen=True, kw_only=True, eq=False)
class RandomKeys(Selector):
    """The budget and the forced keys of a DHSA, everything else drawn at random."""

    like: DHSA
    generator: torch.Generator = field(repr=False)

    def select(self, call: AttentionCall) -> Selection:
        drawn = [torch.randn(x.shape, generator=self.generator).to(x) for x in (call.query, call.key)]
        return self.like.select(call.replace(query=drawn[0], key=drawn[1]))


def methods_of(context: Context) -> dict[str, Selector]:
    """Selections of one budget: what differs is where chunks end and what stands for them."""
    sizes = sizes_of(context)
    near, first = sizes.block, sizes.budget // 16
    common: dict[str, Any] = {
        "budget": sizes.budget,
        "block": sizes.block,
        "local_tokens": near,
        "global_tokens": first,
        "suffix": 0,
        "approximates": False,
    }
    predicted = Predicted(predictor=BoundaryPredictor.load(folder_of(context)), threshold=-torch.inf)
    generator = context.torch_generator("random keys")
    return {
        "predicted": DHSA(boundaries=predicted, **common),
        "predicted, mean": DHSA(boundaries=predicted, norm="mean", **common),
        "oracle": DHSA(boundaries=Oracle(threshold=-torch.inf), share_boundaries=False, **common),
        "similarity": DHSA(**common),
        "fixed": DHSA(boundaries=Fixed(size=sizes.block), **common),
        "fixed, as many": DHSA(boundaries=Fixed(size=12), **common),
        "window": DHSA(boundaries=Given(at=()), **(common | {"local_tokens": sizes.budget - first})),
        "random": RandomKeys(like=DHSA(boundaries=Fixed(size=1), **common), generator=generator),
    }


class MassObserver(Observer):
    """Mean kept mass and density of every method, by layer, over rows that see more than the budget."""

    def __init__(self, methods: dict[str, Selector], rows: Tensor) -> None:
        self.methods, self.rows = methods, rows

    def start(self) -> None:
        self.found: dict[str, list[tuple[float, float]]] = {name: [] for name in self.methods}
        self.forwards = {name: Forward() for name in self.methods}

    def observe(self, call: AttentionCall, output: Tensor, lse: Tensor | None = None) -> None:
        for name, method in self.methods.items():
            scope = self.forwards[name]
            scope.inputs = call.forward.inputs
            result = fidelity(call, method.select(call.replace(forward=scope)), rows=self.rows.to(call.query.device))
            self.found[name].append((result.mean_mass(), result.density))

    def result(self) -> dict[str, tuple[float, float]]:
        return {
            name: (float(np.mean([m for m, _ in values])), float(np.mean([d for _, d in values])))
            for name, values in self.found.items()
        }


def kept_mass(context: Context) -> dict[str, Any]:
    """Kept mass by method and text, mean over heads, rows and layers, and the density that was read."""
    sizes = sizes_of(context)
    model, tokenizer = host_of(context)
    _, judge = texts_of(context, tokenizer, model)
    methods = methods_of(context)
    rows = torch.arange(sizes.budget, sizes.tokens, max((sizes.tokens - sizes.budget) // 96, 1))
    found: dict[str, Any] = {"mass": {name: [] for name in methods}, "density": {name: [] for name in methods}}
    for text in context.track(judge, "kept mass"):
        observer = MassObserver(methods, rows)
        with observe(model, observer, layers=layers_of(context, model)), torch.no_grad():
            model(input_ids=text, use_cache=False)
        for name, (mass, density) in observer.result().items():
            found["mass"][name].append(mass)
            found["density"][name].append(density)
    return found


def needle_nll(context: Context) -> dict[str, list[float]]:
    """nll of the planted value by method and needle; "dense" reads everything."""
    model, tokenizer = host_of(context)
    chosen = {name: m for name, m in methods_of(context).items() if name in ("predicted", "similarity", *OTHERS)}
    found: dict[str, list[float]] = {name: [] for name in ("dense", *chosen)}
    for prompt, value in context.track(prompts_of(context, tokenizer), "needles"):
        found["dense"].append(value_nll(model, prompt, value))
        for name, method in chosen.items():
            with use(model, method):
                found[name].append(value_nll(model, prompt, value))
    return found


def prompts_of(context: Context, tokenizer: Any) -> list[tuple[Tensor, Tensor]]:
    """Prompts with a needle in real text, and the value's tokens."""
    sizes = sizes_of(context)
    if tokenizer is None:
        generator = context.torch_generator("needles")
        ids = [torch.randint(8, 112, (1, sizes.tokens + 3), generator=generator) for _ in sizes.needles]
        return [(x[:, :-3], x[0, -3:]) for x in ids]
    from headway.hosts import default_text

    grid = needle_grid(
        tokenizer, [sizes.tokens], depths=sizes.needles, text=default_text().text, seed=context.seeds(1)[0] % 2**31
    )
    return [(s.prompt_ids, torch.tensor(value_ids(tokenizer, s))) for s in grid]


@torch.no_grad()
def value_nll(model: nn.Module, prompt: Tensor, value: Tensor) -> float:
    """Mean nll of the value behind the prompt, fed token by token."""
    running = prefill(model, prompt)
    rows, cache = [running.logits[-1:]], running.cache
    for token in value[:-1]:
        logits, cache = forward(model, token.view(1, 1), cache, keep=1)
        rows.append(logits)
    return float(negative_log_likelihood(torch.cat(rows), value).mean())
