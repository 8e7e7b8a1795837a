"""The part of the FlexPrefill recipe on a real model and text: kept mass by γ and density, needles."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from headway.door import observe, use
from headway.door.call import AttentionCall, Forward, Site
from headway.door.execute import selection_density
from headway.door.selection import Blocks, Selection
from headway.door.stages import Observer, Selector
from headway.evidence.recipe import Context
from headway.evidence.recipes._flexprefill_baselines import (
    BASELINES,
    Prefill,
    around,
    fixed_blocks,
    random_blocks,
    window_of_density,
)
from headway.methods.long_context.flexprefill import FlexPrefill
from headway.tasks.fidelity import fidelity

GAMMAS = (0.8, 0.9, 0.95, 0.99)
#: The γ of the claims at one γ: the default.
GAMMA = 0.9
#: Query rows, spread over the text, on which kept mass is measured; and the last rows, where a question stands.
ROWS, LAST_ROWS = 96, 64
TENSORS = ("query", "key", "value")
#: Share of the prompt beyond a window's reach from which on a needle counts as far: a needle and the question.
SLACK = 0.05
#: How a baseline is given its density: what FlexPrefill read in the same call, or its mean over all calls of the text.
BUDGETS = ("call", "mean")


class Recorder(Observer):
    """Keeps the calls of some layers of one forward without a cache."""

    def __init__(self, layers: Sequence[int]) -> None:
        self.layers = frozenset(layers)
        self.start()

    def start(self) -> None:
        self.found: list[AttentionCall] = []

    def acts_at(self, site: Site) -> bool:
        return site.layer in self.layers

    def observe(self, call: AttentionCall, output: Tensor, lse: Tensor | None = None) -> None:
        self.found.append(call.replace(hidden=None, module=None, forward=Forward()))

    def result(self) -> list[AttentionCall]:
        return self.found


def compared(
    calls: Sequence[AttentionCall], method: FlexPrefill, lengths: Sequence[int], seed: int
) -> list[dict[str, Any]]:
    """By call of one text: what FlexPrefill reads and keeps at every γ, beside each baseline at the density of the call
    and at the mean density of all calls; its density by γ, and by length (the first tokens of a causal text are a
    shorter text)."""
    chosen = [[replace(method, gamma=gamma).blocks_of(call) for gamma in GAMMAS] for call in calls]
    means = [float(np.mean([of_call[i].density for of_call in chosen])) for i in range(len(GAMMAS))]
    found = []
    for call, of_call in zip(calls, chosen, strict=True):
        sweep = [selection.head_density()[0] for selection in of_call]
        baselines = Baselines(call, method, seed)
        default = of_call[GAMMAS.index(GAMMA)]
        first = [call.replace(**{n: getattr(call, n)[:, :, :length] for n in TENSORS}) for length in lengths]
        found.append(
            {
                "layer": call.site.layer,
                "flex": [kept(call, Blocks(x.mask), x.density, late=x is default) for x in of_call],
                "call": [baselines.at(x.density, late=x is default) for x in of_call],
                "mean": [baselines.at(density) for density in means],
                "by gamma": [float(x.mean()) for x in sweep],
                "heads": call.heads,
                "more at smaller gamma": sum(
                    int((less > larger + 1e-6).sum()) for less, larger in itertools.pairwise(sweep)
                ),
                "by length": [method.blocks_of(part).density for part in first],
                "query-aware": float(default.query_aware.double().mean()),
                "divergence": default.divergence[0].tolist(),
                "densest / sparsest head": float(default.head_density().max() / default.head_density().min()),
            }
        )
    return found


class Baselines:
    """What the baselines keep of one call at a density that is asked for."""

    def __init__(self, call: AttentionCall, method: FlexPrefill, seed: int) -> None:
        self.call, self.method, self.seed = call, method, seed
        self.counted: dict[int, Blocks] = {}

    def at(self, density: float, *, late: bool = False) -> dict[str, dict[str, float]]:
        call, block = self.call, self.method.block
        window = window_of_density(call, density, block)
        generator = torch.Generator().manual_seed(self.seed * 1000 + call.site.layer)
        scattered = random_blocks(call, density, block, generator)
        return {
            "window": kept(call, window, selection_density(window, call), late=late),
            "random": kept(call, Blocks(scattered), scattered.density(), late=late),
            "fixed": self._fixed(density, late),
        }

    def _fixed(self, density: float, late: bool) -> dict[str, float]:
        """The same number of columns and of diagonals for every head; between the two numbers around the density,
        what is kept is interpolated."""
        counts = around(lambda n: self._blocks(n).mask.density(), density, -(-self.call.keys // self.method.block))
        sides = [kept(self.call, self._blocks(n), self._blocks(n).mask.density(), late=late) for n in counts]
        below, above = sides[0], sides[-1]
        gap = above["density"] - below["density"]
        share = (density - below["density"]) / gap if gap > 0 else 1.0
        return {name: below[name] + min(max(share, 0.0), 1.0) * (above[name] - below[name]) for name in above}

    def _blocks(self, count: int) -> Blocks:
        if count not in self.counted:
            self.counted[count] = Blocks(fixed_blocks(self.method, count).blocks_of(self.call).mask)
        return self.counted[count]


def kept(call: AttentionCall, selection: Selection, density: float, *, late: bool = False) -> dict[str, float]:
    """Kept mass over spread rows and of the worst of them, the relative L2 error of the output, and on request the mass
    of the last rows."""
    spread = torch.linspace(0, call.queries - 1, min(ROWS, call.queries)).round().long()
    whole = fidelity(call, selection, rows=spread)
    found = {
        "density": density,
        "mass": whole.mean_mass(),
        "worst 5 %": whole.mass_quantile(0.05),
        "error": whole.output_error,
    }
    if late:
        last = torch.arange(max(call.queries - LAST_ROWS, 0), call.queries)
        found["last"] = fidelity(call, selection, rows=last).mean_mass()
    return found


def texts(context: Context) -> dict[str, Any]:
    """The comparison over several stretches of a text."""
    count, tokens, block = context.choose(smoke=(1, 256, 16), small=(6, 2048, 64), full=(4, 16384, 128))
    lengths = [tokens // 4, tokens // 2, tokens]
    model, tokenizer = _host(context, tokens)
    layers = _some_layers(model, context.choose(smoke=2, small=6, full=8))
    method = FlexPrefill(gamma=GAMMA, block=block, min_budget=2 * block, approximates=False)
    found = []
    for number, ids in enumerate(context.track(_stretches(context, tokenizer, count, tokens), "texts", total=count)):
        recorder = Recorder(layers)
        with observe(model, recorder, selftest=number == 0), torch.no_grad():
            model(input_ids=ids.to(next(model.parameters()).device), use_cache=False)
        found.append(compared(recorder.result(), method, lengths, number))
    return {"model": _model_name(context), "tokens": tokens, "block": block, "lengths": lengths, "texts": found}


def per_text(found: dict[str, Any], of: Any) -> list[float]:
    """The mean over layers of a number, text by text."""
    return [float(np.mean([of(call) for call in text])) for text in found["texts"]]


def sides_of(found: dict[str, Any], what: str, *, gamma: float = GAMMA, budget: str = "call") -> dict[str, list[float]]:
    """A number of every side at one γ, text by text; the baselines' at the density of the call or at the mean one."""
    i = GAMMAS.index(gamma)
    sides = {"flex": per_text(found, lambda call: call["flex"][i][what])}
    for name in BASELINES:
        sides[name] = per_text(found, lambda call, name=name: call[budget][i][name][what])
    return sides


def over_gammas(found: dict[str, Any], what: str, budget: str) -> dict[str, list[float]]:
    """The same, mean over γ."""
    every = [sides_of(found, what, gamma=gamma, budget=budget) for gamma in GAMMAS]
    return {name: np.mean([sides[name] for sides in every], 0).tolist() for name in every[0]}


def curves(found: dict[str, Any], what: str, budget: str) -> dict[str, Any]:
    """Mean over texts of density and of a number, by side and γ."""
    every = {
        gamma: (
            sides_of(found, "density", gamma=gamma, budget=budget),
            sides_of(found, what, gamma=gamma, budget=budget),
        )
        for gamma in GAMMAS
    }
    return {
        name: {str(gamma): {"density": np.mean(x[name]), what: np.mean(y[name])} for gamma, (x, y) in every.items()}
        for name in ("flex", *BASELINES)
    }


def by_layer(found: dict[str, Any]) -> dict[str, float]:
    """Mean density of FlexPrefill in every layer at the default γ."""
    i, every = GAMMAS.index(GAMMA), [call for text in found["texts"] for call in text]
    return {
        str(layer): float(np.mean([call["flex"][i]["density"] for call in every if call["layer"] == layer]))
        for layer in sorted({call["layer"] for call in every})
    }


def divergences(found: dict[str, Any]) -> dict[str, list[float]]:
    """Mean D over texts of every head, by layer: below τ a head gets the query-aware pattern."""
    every = [call for text in found["texts"] for call in text]
    return {
        str(layer): np.mean([call["divergence"] for call in every if call["layer"] == layer], 0).tolist()
        for layer in sorted({call["layer"] for call in every})
    }


def exact_needles(found: dict[str, Any]) -> tuple[dict[str, list[float]], list[bool]]:
    """Whether every token of the value is ranked first, by side and needle, and which needles lie before the window.

    A window of w of the keys reads 1 − (1 − w)² of the triangle; a needle is far when its depth leaves SLACK more than
    that behind it, for the question stands there as well."""
    exact = {name: [float(rate == 1) for rate in rates] for name, rates in found["rank one"].items()}
    shares = [1 - math.sqrt(max(1 - density, 0.0)) for density in found["density"].get("window", [])]
    return exact, [1 - depth / 100 > share + SLACK for depth, share in zip(found["depths"], shares, strict=True)]


def needles(context: Context) -> dict[str, Any]:
    """How surely the model gives a planted value when the prompt, question included, is prefilled by each method."""
    found: dict[str, Any] = {"nll": {}, "rank one": {}, "density": {}, "depths": []}
    if context.size == "smoke":
        return found
    from headway.hosts import default_text
    from headway.tasks.needle import needle_grid, planted_score

    length, depths, repeats, block = context.choose(
        small=(768, (10, 30, 50, 70, 90), 4, 32), full=(32768, tuple(range(0, 101, 10)), 5, 128)
    )
    model, tokenizer = _host(context, length)
    samples = list(needle_grid(tokenizer, [length], depths=depths, text=default_text().text, repeats=repeats))
    for number, sample in enumerate(context.track(samples, "needles")):
        flex = FlexPrefill(gamma=0.95, block=block, min_budget=2 * block, approximates=False, record=[])
        density = math.nan
        for name in ("dense", "flex", *BASELINES):
            method: Selector | None = None if name == "dense" else flex
            if name in BASELINES:
                method = Prefill(density=density, kind=name, block=block, seed=number)
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


def _prefill_density(handle: Any, decoded: int) -> float:
    """Density of the one prefill of a scope: the mean of the report without its dense steps of decoding."""
    rows = handle.report()
    return float(np.mean([row["density"] * row["calls"] - decoded for row in rows]))
