"""FlexPrefill: pattern choice on planted heads, kept mass and needles on a real model at equal density, density by γ.

Everything is compared at equal density, selected over visible pairs, counted on the masks themselves. In a call of the
real model the baselines get what FlexPrefill read there: a sink block with a window, random blocks beside sink and
diagonal, and one fixed number of columns and diagonals for every head (between two such numbers, by interpolation).

Paper: FlexPrefill, arXiv 2502.20766. Its tables (RULER to 128k tokens on 7 to 9 billion parameters) need a GPU; times
are a benchmark.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from headway.door import observe, use
from headway.door.call import AttentionCall, Site
from headway.door.execute import selection_density
from headway.door.selection import BlockMask, Blocks, Dense, Selection, Window
from headway.door.stages import Observer, Selector
from headway.errors import unknown
from headway.evidence.claims import Claim, PaperValue
from headway.evidence.criteria import all_of, at_least, at_most, interval_excludes
from headway.evidence.recipe import Context, Recipe
from headway.kernels.rope import rope_frequencies, rotate
from headway.methods.long_context.flexprefill import FlexPrefill
from headway.statistics import Measurement, bootstrap, bootstrap_difference, bootstrap_ratio, proportion
from headway.tasks.fidelity import Fidelity, fidelity

KINDS = ("topic", "vertical", "noisy local", "clean local", "isotropic")
#: Heads whose pattern is known, and whether it is the query-aware one.
PATTERNS = {"topic": True, "vertical": False, "noisy local": False}
GAMMAS = (0.8, 0.9, 0.95, 0.99)
BASELINES = ("window", "random", "fixed")
#: Query rows, spread over the text, on which kept mass is measured; and the last rows, where a question stands.
ROWS, LAST_ROWS = 96, 64

CRITERIA = {
    "pattern": at_least(0.9, minimum_n=30, label="share of heads"),
    "spread": at_least(5, minimum_n=5, label="density of an isotropic head / a local one"),
    "late-rows": at_most(0.5, minimum_n=5, label="mass of late rows, one quota / a quota by row"),
    "gamma": all_of(
        at_most(0, minimum_n=50, label="heads that read more at a smaller γ"),
        interval_excludes(0, of="fall", side="above", minimum_n=4),
    ),
    "length": interval_excludes(0, side="above", minimum_n=4),
    "mass": all_of(
        *(interval_excludes(0, of=f"over_{name}", side="above", minimum_n=4) for name in BASELINES),
    ),
    "error": interval_excludes(0, side="above", minimum_n=4),
    "needle": all_of(
        *(interval_excludes(0, of=f"over_{name}", side="above", minimum_n=6) for name in ("window", "random")),
    ),
    "needle-dense": at_most(0.25, minimum_n=6, label="nats lost to dense prefill"),
}


def run(context: Context) -> list[Claim]:
    planted = context.stage("planted", lambda: _planted(context))
    texts = context.stage("texts", lambda: _texts(context))
    needles = context.stage("needles", lambda: _needles(context))
    return [
        _pattern_claim(planted),
        _spread_claim(context, planted),
        _late_claim(context, planted),
        _gamma_claim(context, texts),
        _length_claim(context, texts),
        _mass_claim(context, texts),
        _error_claim(context, texts),
        _needle_claim(context, needles),
        _dense_claim(context, needles),
    ]


def planted_head(kind: str, generator: torch.Generator, *, tokens: int = 1024, dim: int = 32) -> AttentionCall:
    """A call of one head whose pattern is known.

    topic: tokens of 4 topics in runs of 32 read their own topic's runs. vertical: six keys that every row reads.
    clean local, noisy local: one direction turned by RoPE, so that logits fall with distance; in the noisy one queries
    and keys carry as much that has nothing to do with position, which block means average away. isotropic: noise."""
    if kind not in KINDS:
        raise unknown("kind", kind, KINDS)
    query, key, value = (torch.randn(tokens, dim, generator=generator) for _ in range(3))
    if kind.endswith("local"):
        base = torch.randn(dim, generator=generator)
        noise = 0.7 if kind == "noisy local" else 0.1
        frequencies = rope_frequencies(dim)
        at = torch.arange(tokens)
        query, key = (rotate(3 * (base + noise * x)[None, None], at, frequencies)[0, 0] for x in (query, key))
    elif kind == "vertical":
        direction = normalize(torch.randn(dim, generator=generator), dim=0)
        query = query + 8 * direction
        key[torch.randperm(tokens, generator=generator)[:6]] += 8 * direction
    elif kind == "topic":
        centres = 3 * torch.randn(4, dim, generator=generator)
        topic = torch.arange(tokens) // 32 % 4
        query, key = centres[topic] + 0.1 * query, centres[topic] + 0.1 * key
    return AttentionCall.from_tensors(query[None, None], key[None, None], value[None, None], causal=True)


def _planted(context: Context) -> dict[str, Any]:
    heads = context.choose(smoke=2, small=15, full=100)
    method = FlexPrefill(block=32, min_budget=None, approximates=False)
    found: dict[str, Any] = {"patterns": [], "density": {"clean local": [], "isotropic": []}, "late": []}
    for number in context.track(range(heads), "planted heads"):
        generator = context.torch_generator(f"planted {number}")
        for kind, aware in PATTERNS.items():
            chosen = method.blocks_of(planted_head(kind, generator))
            found["patterns"].append(
                {
                    "kind": kind,
                    "right": bool(chosen.query_aware) == aware,
                    "divergence": float(chosen.divergence),
                    "density": chosen.density,
                }
            )
        for kind, densities in found["density"].items():
            call = planted_head(kind, generator)
            chosen = method.blocks_of(call)
            densities.append({"density": chosen.density, "mass": fidelity(call, Blocks(chosen.mask)).mean_mass()})
        masses = {}
        for selection in ("global", "row"):
            aware_head = replace(method, tau=1.0, selection=selection)
            kept = fidelity(call, Blocks(aware_head.blocks_of(call).mask))
            masses[selection] = {"mean": kept.mean_mass(), "last": kept.last_mass(32)}
        found["late"].append(masses)
    return found


class Comparison(Observer):
    """At some layers, on the queries and keys of a forward: what FlexPrefill reads and keeps, beside each baseline at
    the same density; its density by γ, and by length (the first tokens of a causal text are a shorter text)."""

    def __init__(self, method: FlexPrefill, layers: Sequence[int], lengths: Sequence[int], seed: int) -> None:
        self.method, self.layers, self.lengths, self.seed = method, frozenset(layers), lengths, seed
        self.start()

    def start(self) -> None:
        self.found: list[dict[str, Any]] = []

    def acts_at(self, site: Site) -> bool:
        return site.layer in self.layers

    def observe(self, call: AttentionCall, output: Tensor, lse: Tensor | None = None) -> None:
        chosen = self.method.blocks_of(call)
        sweep = [replace(self.method, gamma=gamma).blocks_of(call).head_density()[0] for gamma in GAMMAS]
        more = sum(int((less > larger + 1e-6).sum()) for less, larger in itertools.pairwise(sweep))
        first = [call.replace(**{n: getattr(call, n)[:, :, :length] for n in TENSORS}) for length in self.lengths]
        sides = {"flex": _kept(call, Blocks(chosen.mask), chosen.density)}
        generator = torch.Generator().manual_seed(self.seed + call.site.layer)
        window = window_of_density(call, chosen.density, self.method.block)
        sides["window"] = _kept(call, window, selection_density(window, call))
        scattered = random_blocks(call, chosen.density, self.method.block, generator)
        sides["random"] = _kept(call, Blocks(scattered), scattered.density())
        sides["fixed"] = self._fixed(call, chosen.density)
        self.found.append(
            {
                "layer": call.site.layer,
                "sides": sides,
                "by gamma": [float(x.mean()) for x in sweep],
                "heads": call.heads,
                "more at smaller gamma": more,
                "by length": [self.method.blocks_of(part).density for part in first],
                "query-aware": float(chosen.query_aware.double().mean()),
                "densest / sparsest head": float(chosen.head_density().max() / chosen.head_density().min()),
            }
        )

    def _fixed(self, call: AttentionCall, density: float) -> dict[str, float]:
        """The same number of columns and of diagonals for every head; between the two numbers around the density,
        what is kept is interpolated."""
        masks = {
            count: fixed_blocks(self.method, count).blocks_of(call).mask
            for count in _around(lambda n: self._fixed_density(call, n), density, -(-call.keys // self.method.block))
        }
        kept = [_kept(call, Blocks(mask), mask.density()) for mask in masks.values()]
        below, above = kept[0], kept[-1]
        gap = above["density"] - below["density"]
        share = (density - below["density"]) / gap if gap > 0 else 1.0
        return {name: below[name] + min(max(share, 0.0), 1.0) * (above[name] - below[name]) for name in above}

    def _fixed_density(self, call: AttentionCall, count: int) -> float:
        return fixed_blocks(self.method, count).blocks_of(call).density

    def result(self) -> list[dict[str, Any]]:
        return self.found


TENSORS = ("query", "key", "value")


def _around(density_of: Callable[[int], float], density: float, most: int) -> list[int]:
    """The largest count that reads less than a density and the smallest that reads as much (one of them at an end)."""
    low, high = 1, most
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if density_of(middle) >= density else (middle + 1, high)
    return sorted({max(low - 1, 1), low})


def fixed_blocks(method: FlexPrefill, count: int) -> FlexPrefill:
    """`method` with `count` columns and `count` diagonals in every head, whatever they hold."""
    tokens = count * method.block
    return replace(method, min_budget=tokens, max_budget=tokens, tau=0.0)


def window_of_density(call: AttentionCall, density: float, sinks: int) -> Window:
    """The narrowest window, beside `sinks` first keys, that reads at least so much of the triangle."""
    low, high = 1, call.keys
    while low < high:
        middle = (low + high) // 2
        enough = selection_density(Window(sinks, middle), call) >= density
        low, high = (low, middle) if enough else (middle + 1, high)
    return Window(sinks, low)


def random_blocks(call: AttentionCall, density: float, block: int, generator: torch.Generator) -> BlockMask:
    """The sink block, the diagonal, and in every head as many random blocks as reach a density."""
    mask = BlockMask.full(call.keys, call.keys, block, block, heads=call.heads)
    pairs = mask.pairs()
    count = pairs.shape[0]
    always = torch.eye(count, dtype=torch.bool) | (torch.arange(count) == 0)
    always &= torch.ones(count, count, dtype=torch.bool).tril()
    free = (pairs > 0) & ~always
    order = torch.rand(call.heads, count * count, generator=generator).masked_fill(~free.flatten(), 2.0).argsort(-1)
    missing = density * pairs.sum() - pairs[always].sum()
    running = pairs.flatten()[order].cumsum(-1)
    needed = ((running < missing).sum(-1) + 1).clamp(max=int(free.sum())) * (missing > 0)
    taken = torch.arange(count * count) < needed[:, None]
    blocks = torch.zeros(call.heads, count * count, dtype=torch.bool).scatter_(-1, order, taken)
    blocks = blocks.view(1, call.heads, count, count) | always
    return BlockMask(blocks.to(call.query.device), call.keys, call.keys, block, block)


def _kept(call: AttentionCall, selection: Selection, density: float) -> dict[str, float]:
    spread = torch.linspace(0, call.queries - 1, min(ROWS, call.queries)).round().long()
    last = torch.arange(max(call.queries - LAST_ROWS, 0), call.queries)
    whole, late = (fidelity(call, selection, rows=rows) for rows in (spread, last))
    return {"density": density, **_summary(whole), "last": late.mean_mass()}


def _summary(found: Fidelity) -> dict[str, float]:
    return {"mass": found.mean_mass(), "worst 5 %": found.mass_quantile(0.05), "error": found.output_error}


def _texts(context: Context) -> dict[str, Any]:
    """The comparison over several stretches of a text."""
    count, tokens, block = context.choose(smoke=(1, 256, 16), small=(5, 2048, 64), full=(4, 16384, 128))
    lengths = [tokens // 4, tokens // 2, tokens]
    model, tokenizer = _host(context, tokens)
    layers = _some_layers(model, context.choose(smoke=2, small=6, full=8))
    found = []
    for number, ids in enumerate(context.track(_stretches(context, tokenizer, count, tokens), "texts", total=count)):
        method = FlexPrefill(block=block, min_budget=2 * block, approximates=False)
        watch = Comparison(method, layers, lengths, number)
        with observe(model, watch, selftest=number == 0), torch.no_grad():
            model(input_ids=ids.to(next(model.parameters()).device), use_cache=False)
        found.append(watch.result())
    return {"model": _model_name(context), "tokens": tokens, "block": block, "lengths": lengths, "texts": found}


def _model_name(context: Context) -> str:
    return context.choose(smoke="tiny", small="smollm2", full="meta-llama/Llama-3.1-8B-Instruct")


def _host(context: Context, tokens: int) -> tuple[nn.Module, Any]:
    """The model and its tokenizer; a tiny random one, without a tokenizer, to see that the measurement runs."""
    name = _model_name(context)
    if name == "tiny":
        from headway.hosts.tiny import tiny_host

        return tiny_host("llama", max_position_embeddings=tokens)[0], None
    from headway.hosts import load

    if context.size == "full":
        return load(name, device="cuda", dtype="bfloat16")
    return load(name, device="cpu", dtype="float32")


def _stretches(context: Context, tokenizer: Any, count: int, tokens: int) -> list[Tensor]:
    """Stretches of the default text, as far apart as it is long."""
    if tokenizer is None:
        return [torch.randint(8, 60, (1, tokens), generator=context.torch_generator("tiny text")) for _ in range(count)]
    from headway.hosts import default_text, tokenize

    text = default_text().text
    starts = [len(text) * number // count for number in range(count)]
    return [tokenize(tokenizer, text[start:], tokens) for start in starts]


def _some_layers(model: nn.Module, count: int) -> list[int]:
    config: Any = model.config
    layers = int(config.num_hidden_layers)
    return sorted({round(i * (layers - 1) / max(count - 1, 1)) for i in range(count)})


@dataclass(frozen=True, kw_only=True)
class Prefill(Selector):
    """A baseline that reads a given share of the triangle in prefill and is dense in decoding, as FlexPrefill is."""

    density: float
    kind: str
    block: int
    seed: int = 0

    phases = frozenset({"prefill"})

    def select(self, call: AttentionCall) -> Selection:
        if call.queries == 1:
            return Dense()
        if self.kind == "window":
            return window_of_density(call, self.density, self.block)
        generator = torch.Generator().manual_seed(self.seed * 1000 + call.site.layer)
        return Blocks(random_blocks(call, self.density, self.block, generator))


def _needles(context: Context) -> dict[str, Any]:
    """How surely the model gives a planted value when the prompt, question included, is prefilled by each method."""
    found: dict[str, Any] = {"nll": {}, "rank one": {}, "density": {}, "depths": []}
    if context.size == "smoke":
        return found
    from headway.hosts import default_text
    from headway.tasks.needle import needle_grid, planted_score

    length, depths, repeats, block = context.choose(
        small=(768, (10, 30, 50, 70), 2, 32), full=(32768, tuple(range(0, 101, 10)), 5, 128)
    )
    model, tokenizer = _host(context, length)
    samples = list(needle_grid(tokenizer, [length], depths=depths, text=default_text().text, repeats=repeats))
    for number, sample in enumerate(context.track(samples, "needles")):
        flex = FlexPrefill(gamma=0.95, block=block, min_budget=2 * block, approximates=False, record=[])
        density = math.nan
        for name in ("dense", "flex", "window", "random"):
            method: Selector | None = {
                "dense": None,
                "flex": flex,
                "window": Prefill(density=density, kind="window", block=block),
                "random": Prefill(density=density, kind="random", block=block, seed=number),
            }[name]
            with nullcontext() if method is None else use(model, method, selftest=number == 0) as handle:
                score = planted_score(model, tokenizer, sample, question_aware=True)
            if name == "flex":
                density = float(np.mean([chosen.density for chosen in flex.record or ()]))
            if handle is not None:
                found["density"].setdefault(name, []).append(_prefill_density(handle, score.nll.numel() - 1))
            found["nll"].setdefault(name, []).append(score.mean_nll)
            found["rank one"].setdefault(name, []).append(score.rank_one_rate)
        found["depths"].append(sample.meta["depth"])
    return found


def _prefill_density(handle: Any, decoded: int) -> float:
    """Density of the one prefill of a scope: the mean of the report without its dense steps of decoding."""
    rows = handle.report()
    return float(np.mean([row["density"] * row["calls"] - decoded for row in rows]))


def _pattern_claim(found: dict[str, Any]) -> Claim:
    heads = found["patterns"]
    means = {kind: float(np.mean([head["divergence"] for head in heads if head["kind"] == kind])) for kind in PATTERNS}
    return Claim(
        id="pattern",
        statement="Heads that pooling describes get the query-aware pattern, vertical and local ones the other.",
        paper=PaperValue("τ = 0.1", where="section 3 and configuration"),
        measured=proportion(sum(head["right"] for head in heads), len(heads)),
        criterion=CRITERIA["pattern"],
        notes="Planted heads: topics in runs of a block; six read keys; a local head whose queries and keys carry as "
        "much else. They were tried out before this criterion was written. The exact probe is causal in the last block "
        "and the pooled one is not: a head that reads m blocks alike has D of about 0.07 at m = 8 and 0.1, the "
        "threshold, at m = 4 (8 topics), where the choice is a coin toss. A clean local head is described by pooling "
        "too (D about 0.05); both patterns then read the same blocks.",
        details={"mean divergence": means, "heads": heads},
    )


def _spread_claim(context: Context, found: dict[str, Any]) -> Claim:
    densities = {kind: [head["density"] for head in heads] for kind, heads in found["density"].items()}
    masses = {kind: float(np.mean([head["mass"] for head in heads])) for kind, heads in found["density"].items()}
    return Claim(
        id="spread",
        statement="The budget follows the head: one that looks at everything reads many times what a local one reads.",
        paper=PaperValue("dynamic budgets beat fixed ones", where="ablation of the budget"),
        measured=bootstrap_ratio(
            densities["isotropic"], densities["clean local"], paired=True, generator=context.generator("spread")
        ),
        criterion=CRITERIA["spread"],
        notes="Planted heads at γ = 0.9, 1,024 tokens in blocks of 32.",
        details={"density": densities, "mean kept mass": masses},
    )


def _late_claim(context: Context, found: dict[str, Any]) -> Claim:
    late = {name: [masses[name]["last"] for masses in found["late"]] for name in ("global", "row")}
    random = context.generator("late rows")
    return Claim(
        id="late-rows",
        statement="One quota for a whole query-aware head starves its last rows; a quota by row does not.",
        paper=PaperValue("not reported; a reviewer asked for selection by row", where="public reviews"),
        measured=bootstrap_ratio(late["global"], late["row"], paired=True, generator=random),
        baseline=bootstrap(late["row"], generator=random),
        criterion=CRITERIA["late-rows"],
        notes="Isotropic heads at γ = 0.9 without a least budget; kept mass of the last 32 rows. A defect of the "
        "published rule, which stays the default with its least budget of 1,024 tokens.",
        details={"masses": found["late"]},
    )


def _per_text(found: dict[str, Any], of: Any) -> list[float]:
    """The mean over layers of a number, text by text."""
    return [float(np.mean([of(call) for call in text])) for text in found["texts"]]


def _setting(found: dict[str, Any]) -> dict[str, Any]:
    return {name: found[name] for name in ("model", "tokens", "block")}


def _gamma_claim(context: Context, found: dict[str, Any]) -> Claim:
    by_gamma = [_per_text(found, lambda call, i=i: call["by gamma"][i]) for i in range(len(GAMMAS))]
    calls = [call for text in found["texts"] for call in text]
    random = context.generator("gamma")
    return Claim(
        id="gamma",
        statement="Density falls with γ, in every head and on the whole.",
        paper=PaperValue("271 ms at γ = 0.95, 186 ms at 0.9 (dense 659 ms)", "128k tokens, A100", "latency table"),
        measured=Measurement(
            sum(call["more at smaller gamma"] for call in calls), n=sum(call["heads"] for call in calls), unit="heads"
        ),
        criterion=CRITERIA["gamma"],
        others={"fall": bootstrap_difference(by_gamma[2], by_gamma[0], paired=True, generator=random)},
        notes=f"γ = {', '.join(map(str, GAMMAS))}; the fall is from 0.95 to 0.8. Least budget two blocks.",
        details={
            **_setting(found),
            "density by gamma": dict(zip(map(str, GAMMAS), map(np.mean, by_gamma), strict=True)),
            "share of query-aware heads": _per_text(found, lambda call: call["query-aware"]),
            "densest / sparsest head of a layer": _per_text(found, lambda call: call["densest / sparsest head"]),
        },
    )


def _length_claim(context: Context, found: dict[str, Any]) -> Claim:
    densities = [_per_text(found, lambda call, i=i: call["by length"][i]) for i in range(len(found["lengths"]))]
    return Claim(
        id="length",
        statement="At one γ the share that is read falls as the prompt grows.",
        paper=PaperValue("speed-up grows to 2.4 to 3.5 times at 128k", where="latency by length"),
        measured=bootstrap_difference(densities[0], densities[-1], paired=True, generator=context.generator("length")),
        criterion=CRITERIA["length"],
        notes="Density of the shortest minus that of the longest prompt, same text; γ = 0.9.",
        details={**_setting(found), "density": dict(zip(found["lengths"], densities, strict=True))},
    )


def _sides(found: dict[str, Any], what: str) -> dict[str, list[float]]:
    return {name: _per_text(found, lambda call, name=name: call["sides"][name][what]) for name in ("flex", *BASELINES)}


def _mass_claim(context: Context, found: dict[str, Any]) -> Claim:
    masses, random = _sides(found, "mass"), context.generator("mass")
    return Claim(
        id="mass",
        statement="At equal density FlexPrefill keeps more attention mass than a window, random and fixed blocks.",
        paper=PaperValue("RULER 89.18 against 61.62 for sink and window", "Llama-3.1-8B, 4k to 128k", "main table"),
        measured=bootstrap(masses["flex"], generator=random),
        criterion=CRITERIA["mass"],
        others={
            f"over_{name}": bootstrap_difference(masses["flex"], masses[name], paired=True, generator=random)
            for name in BASELINES
        },
        notes=f"Dense weights of {ROWS} rows spread over the text; a text is one unit (mean over heads and some "
        "layers). The baselines are matched call by call. Mass is no output: see the next claim.",
        details={
            **_setting(found),
            "mass": masses,
            "density": _sides(found, "density"),
            "mass of the last rows": _sides(found, "last"),
            "5 % of rows keep less than": _sides(found, "worst 5 %"),
        },
    )


def _error_claim(context: Context, found: dict[str, Any]) -> Claim:
    errors = _sides(found, "error")
    random = context.generator("error")
    return Claim(
        id="error",
        statement="At equal density budgets that follow the head give a smaller output error than a fixed budget.",
        paper=PaperValue("dynamic budgets beat fixed ones", where="ablation of the budget"),
        measured=bootstrap_difference(errors["fixed"], errors["flex"], paired=True, generator=random),
        baseline=bootstrap(errors["fixed"], generator=random),
        criterion=CRITERIA["error"],
        notes="Relative L2 error of attention outputs, fixed budget minus FlexPrefill.",
        details={**_setting(found), "error": errors},
    )


def _needle_difference(context: Context, found: dict[str, Any], more: str, less: str) -> Measurement:
    if not found["nll"]:
        return Measurement(math.nan, n=0, unit="nats")
    random = context.generator(f"{more} {less}")
    return bootstrap_difference(found["nll"][more], found["nll"][less], paired=True, generator=random, unit="nats")


def _needle_claim(context: Context, found: dict[str, Any]) -> Claim:
    values = found["nll"].get("flex")
    unmeasured = Measurement(math.nan, n=0, unit="nats")
    return Claim(
        id="needle",
        statement="A needle is given back more surely after FlexPrefill than after a window or random blocks of equal "
        "density.",
        paper=PaperValue("RULER 89.18 against 61.62 for sink and window", "Llama-3.1-8B, 4k to 128k", "main table"),
        measured=bootstrap(values, generator=context.generator("needle"), unit="nats") if values else unmeasured,
        criterion=CRITERIA["needle"],
        others={f"over_{name}": _needle_difference(context, found, name, "flex") for name in ("window", "random")},
        notes="Mean nll of the value's tokens, given the answer's beginning; γ = 0.95; decoding is always dense. The "
        "baselines get, sample by sample, the mean density of FlexPrefill.",
        details=found,
    )


def _dense_claim(context: Context, found: dict[str, Any]) -> Claim:
    return Claim(
        id="needle-dense",
        statement="At γ = 0.95 the needle is given back about as surely as after dense prefill.",
        paper=PaperValue("RULER 89.18 against 88.70 for full attention", "Llama-3.1-8B, 4k to 128k", "main table"),
        measured=_needle_difference(context, found, "flex", "dense"),
        criterion=CRITERIA["needle-dense"],
    )


def _plots(context: Context, claims: Sequence[Claim]) -> None:
    import plotly.graph_objects as go

    details: Any = next(claim for claim in claims if claim.id == "gamma").details["density by gamma"]
    figure = go.Figure(go.Scatter(x=[float(g) for g in details], y=list(details.values()), mode="lines+markers"))
    figure.update_layout(title="Share of the triangle that is read", xaxis_title="γ", yaxis_title="density")
    context.save_plot(figure, "density-by-gamma")


def _obstacle(size: str) -> str | None:
    if size == "full" and not torch.cuda.is_available():
        return "its model has 8 billion parameters and there is no GPU. Run --size small."
    return None


RECIPE = Recipe(
    slug="flexprefill",
    title="FlexPrefill: A Context-Aware Sparse Attention Mechanism for Efficient Long-Sequence Inference",
    run=run,
    criteria=CRITERIA,
    plots=_plots,
    obstacle=_obstacle,
)
