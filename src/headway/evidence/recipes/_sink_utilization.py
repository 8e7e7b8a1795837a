"""The survey's rules that use or unmake a sink, each on a real model through the door.

Caches (H2O, A2SF, KeyDiff, OrthoRank) hold half of a prompt's keys; the tokens behind it are scored, and the rule has
to beat a cache of the last tokens alone, which is what it would be without a score. Editors (lever, broadcast,
redistribution), the register and the norm mask change a forward over whole windows. Windows of a text are the units.
Survey: arXiv 2604.10098, which gives rules and few numbers: borders that are ours are named as such.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from headway.door import AttentionCall, Observer, Site, use
from headway.door.attach import observe as attach
from headway.door.stages import CachePolicy
from headway.evidence.claims import Claim, PaperValue
from headway.evidence.criteria import all_of, at_least, at_most, interval_excludes
from headway.evidence.recipe import Context
from headway.methods.sinks.sink_emergence import measure_sinks, received_mean
from headway.methods.sinks.sink_survey import (
    A2SF,
    H2O,
    HeadBroadcast,
    KeyDiff,
    LogitLever,
    OrthoRank,
    Redistribution,
    find_register_neurons,
    key_difference,
    massive_dimensions,
    norm_mask,
    norm_ratio,
    run_with_register,
    sink_density,
    tune_lever,
)
from headway.statistics import Measurement, bootstrap, bootstrap_difference, bootstrap_ratio
from headway.tasks.perplexity import negative_log_likelihood

CACHES = ("h2o", "a2sf", "keydiff", "orthorank")
#: The correlation that the survey quotes for KeyDiff is ≈ 0.94; it does not say between which two numbers.
KEYDIFF_CORRELATION = 0.9
#: Keys in the last quarter of a window are seen by few queries.
SUPPORTED = 0.75
#: A loss counts as kept within this share. Ours.
KEPT = 1.05
REGISTER_NEURONS = 4

_BETTER = interval_excludes(0, side="below", label="loss − loss with the last tokens alone, nats")
UTILIZATION_CRITERIA = {
    **{f"cache-{name}": _BETTER for name in CACHES},
    "h2o-holds-sink": at_least(0.5, label="share of KV heads whose cache holds the first token unasked"),
    "a2sf-forgets": interval_excludes(
        0, side="below", label="share of the scores on the first token, γ = 0.95 − γ = 1"
    ),
    "keydiff-correlation": at_least(KEYDIFF_CORRELATION, label="correlation of the score with attention received"),
    "lever": interval_excludes(0, side="below", label="loss with the tuned bias − loss on other windows, nats"),
    "broadcast": interval_excludes(
        0, side="below", label="loss with the map of the densest head − with that of the least dense, nats"
    ),
    "redistribution": interval_excludes(
        0, side="above", label="loss with the sink's attention given away − with it dropped, nats"
    ),
    "register": all_of(
        at_most(0.2, label="‖h_1‖ ÷ mean ‖h‖ with a register ÷ without"),
        at_most(KEPT, of="loss", label="loss with a register ÷ without"),
        requires=(at_least(10.0, of="massive", label="‖h_1‖ ÷ mean ‖h‖ without a register"),),
    ),
    "norm-mask": all_of(
        at_most(0.5, label="Sink_1 with the norm mask ÷ without"),
        requires=(at_least(0.05, of="sink", label="Sink_1 without the mask"),),
    ),
}


@dataclass(frozen=True)
class Sizes:
    """`windows` of `prompt` + `scored` tokens for caches, of `length` for editors; `tuning` further ones for the
    lever."""

    windows: int
    prompt: int
    scored: int
    length: int
    tuning: int


def sizes(context: Context) -> Sizes:
    return context.choose(
        smoke=Sizes(3, 24, 12, 24, 2), small=Sizes(8, 192, 64, 96, 4), full=Sizes(32, 1024, 256, 512, 16)
    )


def tokens_needed(size: Sizes) -> int:
    return max(size.windows * (size.prompt + size.scored), (size.windows + size.tuning) * size.length)


@torch.no_grad()
def measure_caches(model: Any, text: Int[Tensor, " tokens"], size: Sizes, generator: torch.Generator) -> dict[str, Any]:
    """Losses behind a prompt by cache and window; what H2O holds unasked; the first token's share of scores."""
    ids = windows_of(text, size.windows, size.prompt + size.scored, generator)
    budget = size.prompt // 2
    recent = budget // 4
    policies: dict[str, Any] = {
        "dense": None,
        "last": H2O(budget=budget, recent=budget, sinks=0),
        "first and last": H2O(budget=budget, recent=budget - min(4, budget - 1), sinks=min(4, budget - 1)),
        "h2o": H2O(budget=budget, recent=budget // 2),
        "a2sf": A2SF(budget=budget, recent=recent),
        "keydiff": KeyDiff(budget=budget, recent=recent),
        "orthorank": OrthoRank(budget=budget, recent=recent),
    }
    losses: dict[str, list[float]] = {}
    for name, policy in policies.items():
        with nullcontext() if policy is None else use(model, policy):
            losses[name] = [behind(model, row[None], size.prompt) for row in ids]
    prompts = ids[:, : size.prompt]
    return {
        "losses": losses,
        "budget": budget,
        "held": _holds_first(model, prompts, H2O(budget=budget, recent=budget // 2, sinks=0)),
        "share": {
            name: _first_score(model, prompts, policy)
            for name, policy in {
                "h2o": H2O(budget=size.prompt, sinks=0, recent=0),
                "a2sf": A2SF(budget=size.prompt, sinks=0, recent=0),
            }.items()
        },
        "correlation": key_correlation(model, prompts),
    }


@torch.no_grad()
def measure_editors(
    model: Any, text: Int[Tensor, " tokens"], size: Sizes, generator: torch.Generator
) -> dict[str, Any]:
    """Losses by window with each rule in a forward over whole windows, and what else the claims read."""
    ids = windows_of(text, size.windows + size.tuning, size.length, generator)
    tuning, ids = ids[: size.tuning], ids[size.tuning :]

    def tuned(stage: LogitLever) -> float:
        with use(model, stage):
            losses = losses_of(model, tuning)
        return sum(losses) / len(losses)

    lever, table = tune_lever(tuned)
    density = sink_density(model, {"input_ids": tuning, "use_cache": False})
    most = {layer: int(d.argmax()) for layer, d in density.items()}
    least = {layer: int(d.argmin()) for layer, d in density.items()}
    neurons = find_register_neurons(model, {"input_ids": tuning}, [0], count=REGISTER_NEURONS)
    start, dimensions = massive_dimensions(model, tuning)
    rules: dict[str, AbstractContextManager[Any]] = {
        "plain": nullcontext(),
        "lever": use(model, lever),
        "densest": use(model, HeadBroadcast(sources=most)),
        "least dense": use(model, HeadBroadcast(sources=least)),
        "given": use(model, Redistribution(alpha=0.0)),
        "dropped": use(model, Redistribution(alpha=0.0, beta=0.0)),
        "masked": nullcontext() if start is None else norm_mask(model, dimensions, start=start),
    }
    found: dict[str, Any] = {"losses": {}}
    for name, rule in rules.items():
        with rule:
            found["losses"][name] = losses_of(model, ids)
            if name in ("plain", "masked"):
                found[f"sink {name}"] = measure_sinks(model, ids, length=None, special_ids=()).by_sequence().tolist()
    plain = model(input_ids=ids, output_hidden_states=True, use_cache=False)
    moved = run_with_register(model, ids, neurons, output_hidden_states=True)
    found["losses"]["register"] = _by_window(moved.logits, ids)
    found["massive"] = [massive_by_window(output.hidden_states) for output in (plain, moved)]
    return found | {
        "bias": lever.bias,
        "bias table": {str(b): loss for b, loss in table.items()},
        "neurons": neurons,
        "mask": {"start": start, "dimensions": list(dimensions)},
        "density": {str(layer): d.tolist() for layer, d in density.items()},
    }


def windows_of(
    text: Int[Tensor, " tokens"], count: int, length: int, generator: torch.Generator
) -> Int[Tensor, "count length"]:
    """`count` stretches of the text that do not overlap."""
    places = torch.randperm(len(text) // length, generator=generator)[:count]
    return torch.stack([text[p * length : (p + 1) * length] for p in places.tolist()])


@torch.no_grad()
def behind(model: Any, ids: Int[Tensor, "1 tokens"], prompt: int) -> float:
    """Mean −ln p of the tokens behind a prompt, which the cache holds as a policy lets it."""
    past = model(input_ids=ids[:, :prompt], use_cache=True).past_key_values
    logits = model(input_ids=ids[:, prompt:], past_key_values=past, use_cache=True).logits[0, :-1]
    return float(negative_log_likelihood(logits, ids[0, prompt + 1 :]).mean())


def losses_of(model: Any, ids: Int[Tensor, "windows tokens"]) -> list[float]:
    """Mean −ln p by window, in one forward."""
    return _by_window(model(input_ids=ids, use_cache=False).logits, ids)


def _by_window(logits: Tensor, ids: Tensor) -> list[float]:
    return [float(negative_log_likelihood(row[:-1], own[1:]).mean()) for row, own in zip(logits, ids, strict=True)]


def massive_by_window(states: Sequence[Float[Tensor, "windows tokens width"]]) -> list[float]:
    """The largest ‖h_1‖ ÷ mean ‖h‖ between blocks, by window."""
    inner = states[1:-1] or states[:1]
    return torch.stack([norm_ratio(h) for h in inner]).amax(0).tolist()


def _holds_first(model: Any, prompts: Tensor, policy: H2O) -> list[float]:
    """Share of KV heads whose cache holds position 0 behind a prompt, by window."""
    found = []
    with use(model, policy):
        for row in prompts:
            past = model(input_ids=row[None], use_cache=True).past_key_values
            found.append(float(torch.cat([(p == 0).any(-1).float().flatten() for p in past.held()]).mean()))
    return found


def _first_score(model: Any, prompts: Tensor, policy: CachePolicy) -> list[float]:
    """Position 0's share of the scores in a cache that evicts nothing, the mean over KV heads, by window."""
    found = []
    with use(model, policy):
        for row in prompts:
            past = model(input_ids=row[None], use_cache=True).past_key_values
            shares = [layer.score[..., 0] / layer.score.sum(-1) for layer in past.layers]
            found.append(float(torch.cat([s.flatten() for s in shares]).mean()))
    return found


@dataclass(frozen=True, kw_only=True)
class _KeyCorrelation(Observer):
    """Pearson's correlation over keys of the KeyDiff score with the mean attention that a key receives, by KV head."""

    found: list[Tensor] = field(default_factory=list)
    reads_weights = True

    def acts_at(self, site: Site) -> bool:
        return site.kind == "self"

    def observe(self, call: AttentionCall, output: Tensor, lse: Tensor | None = None) -> None:
        rows = torch.arange(call.queries)
        received = received_mean(call.weights(rows).float(), visible=call.visible(rows))
        received = received.unflatten(1, (-1, call.groups)).mean(2)
        kept = max(int(SUPPORTED * call.keys), 2)
        score = key_difference(call.key)[..., :kept]
        self.found.append(correlation(score, received[..., :kept]))

    def result(self) -> list[float]:
        """The mean over layers and heads, by sequence."""
        return torch.cat(self.found, 1).mean(1).tolist()


def correlation(first: Float[Tensor, "*batch items"], second: Float[Tensor, "*batch items"]) -> Float[Tensor, "*batch"]:
    """Pearson's, over the last axis."""
    a, b = (x - x.mean(-1, keepdim=True) for x in (first.double(), second.double()))
    return (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1)).clamp(min=1e-30)


def key_correlation(model: Any, ids: Int[Tensor, "windows tokens"]) -> list[float]:
    """How well the KeyDiff score says which keys are attended to, by window."""
    observer = _KeyCorrelation()
    with attach(model, observer):
        model(input_ids=ids, use_cache=False)
    return observer.result()


def utilization_claims(
    caches: Mapping[str, Any], editors: Mapping[str, Any], context: Context, source: str
) -> list[Claim]:
    numbers = _Numbers(context)
    return [*_cache_claims(caches, numbers, source), *_editor_claims(editors, numbers, source)]


def _cache_claims(caches: Mapping[str, Any], numbers: _Numbers, source: str) -> list[Claim]:
    losses, words = caches["losses"], {"h2o": "H2O", "a2sf": "A2SF", "keydiff": "KeyDiff", "orthorank": "OrthoRank"}
    rules = {
        "h2o": "keep top-K by accumulated attention + recent",
        "a2sf": "score ← γ · score + A, γ < 1",
        "keydiff": "1 − cos(k, mean k)",
        "orthorank": "1 − |cos(h_t, h_sink)|",
    }
    claims = [
        Claim(
            id=f"cache-{name}",
            statement=f"With half of the keys {words[name]} predicts better than the same number of last tokens.",
            paper=PaperValue(rules[name], "a rule; the survey gives no number for it", "utilization"),
            measured=numbers.difference(losses[name], losses["last"], name),
            others={
                other: numbers.difference(losses[name], losses[other], f"{name} {other}")
                for other in ("dense", "first and last")
            },
            criterion=UTILIZATION_CRITERIA[f"cache-{name}"],
            notes="`dense` and `first and last` (four first tokens and the last ones) are differences of the same "
            "kind, for comparison. The baseline is this project's choice.",
            details={"losses": losses, "budget": caches["budget"], "source": source} if name == "h2o" else {},
        )
        for name in CACHES
    ]
    share = caches["share"]
    return [
        *claims,
        Claim(
            id="h2o-holds-sink",
            statement="Heavy hitters hold the first token without being told to.",
            paper=PaperValue("keep top-K by accumulated attention", "sinks gather most", "utilization"),
            measured=numbers.mean(caches["held"], "held"),
            criterion=UTILIZATION_CRITERIA["h2o-holds-sink"],
            notes="The border is ours, and was known from a test of this model on another text to be passed.",
        ),
        Claim(
            id="a2sf-forgets",
            statement="Forgetting stops the sink from hoarding the scores.",
            paper=PaperValue("γ < 1 stops sinks hoarding", "", "utilization"),
            measured=numbers.difference(share["a2sf"], share["h2o"], "forgets"),
            others={name: numbers.mean(values, f"share {name}") for name, values in share.items()},
            criterion=UTILIZATION_CRITERIA["a2sf-forgets"],
        ),
        Claim(
            id="keydiff-correlation",
            statement="Keys unlike the mean key are those that queries attend to.",
            paper=PaperValue("≈ 0.94", "between which numbers is not said", "utilization"),
            measured=numbers.mean(caches["correlation"], "correlation"),
            criterion=UTILIZATION_CRITERIA["keydiff-correlation"],
            notes="Pearson's correlation over the first three quarters of the keys, between 1 − cos(k, mean k) and the "
            "mean attention received; the mean over KV heads. What is correlated is our reading.",
        ),
    ]


def _editor_claims(editors: Mapping[str, Any], numbers: _Numbers, source: str) -> list[Claim]:
    losses, plain = editors["losses"], editors["losses"]["plain"]
    massive, moved = editors["massive"]
    return [
        Claim(
            id="lever",
            statement="A bias on the first token's logit, tuned on some texts, makes others easier to predict.",
            paper=PaperValue("s_i1 ← s_i1 + b, b tuned on data", "a rule; no number is given", "utilization"),
            measured=numbers.difference(losses["lever"], plain, "lever"),
            criterion=UTILIZATION_CRITERIA["lever"],
            notes="One bias for all heads. Where 0 is the best of the tried ones, the difference is 0 and nothing "
            "is shown.",
            details={"bias": editors["bias"], "loss by bias": editors["bias table"], "source": source},
        ),
        Claim(
            id="broadcast",
            statement="A layer bears the map of the head that sinks most in all its heads better than that of the head "
            "that sinks least.",
            paper=PaperValue("copy the densest sink head's map", "image models; no number is given", "utilization"),
            measured=numbers.difference(losses["densest"], losses["least dense"], "broadcast"),
            others={"cost": numbers.difference(losses["densest"], plain, "broadcast cost")},
            criterion=UTILIZATION_CRITERIA["broadcast"],
            notes="All layers and heads at once. The survey lists the rule for image models; on text it costs, and the "
            "question is whose map costs less. The comparison is ours.",
            details={"density": editors["density"]},
        ),
        Claim(
            id="redistribution",
            statement="What the sink gets can be dropped at less cost than it can be given to the other keys.",
            paper=PaperValue("full: α = 0, β = 1; reduction: β = 0", "rules; no number is given", "utilization"),
            measured=numbers.difference(losses["given"], losses["dropped"], "redistribution"),
            others={name: numbers.difference(losses[name], plain, f"{name} cost") for name in ("given", "dropped")},
            criterion=UTILIZATION_CRITERIA["redistribution"],
            notes="All heads and layers. If the sink is a no-op, its share does nothing where it is, and mixes what "
            "need not be mixed anywhere else.",
        ),
        Claim(
            id="register",
            statement="A zero token in front takes the massive state off the first token, and the model stays as good.",
            paper=PaperValue("outlier activations move to an appended zero token", "", "test-time register"),
            measured=numbers.ratio(moved, massive, "register"),
            others={
                "loss": numbers.ratio(losses["register"], plain, "register loss"),
                "massive": numbers.mean(massive, "massive"),
            },
            criterion=UTILIZATION_CRITERIA["register"],
            notes=f"{REGISTER_NEURONS} neurons, found on other windows. The first border was known from a test of this "
            "model to be passed; the second is ours.",
            details={"neurons": editors["neurons"]},
        ),
        Claim(
            id="norm-mask",
            statement="Where no block reads the massive dimensions any more, at least half of the sink is gone.",
            paper=PaperValue("zero the massive dimensions in the norm", "a rule; no number is given", "mitigation"),
            measured=numbers.ratio(editors["sink masked"], editors["sink plain"], "mask"),
            others={
                "sink": numbers.mean(editors["sink plain"], "sink"),
                "loss": numbers.ratio(losses["masked"], plain, "mask loss"),
            },
            criterion=UTILIZATION_CRITERIA["norm-mask"],
            notes="From the first block with a massive output on; `loss` is what it costs. The border is ours.",
            details=editors["mask"],
        ),
    ]


@dataclass(frozen=True)
class _Numbers:
    """Measurements over windows, which are the units; NaN where there is nothing to divide by."""

    context: Context

    def mean(self, values: Sequence[float], name: str) -> Measurement:
        return bootstrap(values, generator=self.context.generator(f"use {name}"))

    def difference(self, first: Sequence[float], second: Sequence[float], name: str) -> Measurement:
        return bootstrap_difference(first, second, paired=True, generator=self.context.generator(f"use {name}"))

    def ratio(self, above: Sequence[float], below: Sequence[float], name: str) -> Measurement:
        if not sum(below):
            return Measurement(float("nan"), n=len(below))
        return bootstrap_ratio(above, below, paired=True, generator=self.context.generator(f"use {name}"))
