"""Diagnose, Localize, Align: where a real model's focal heads stand and whether they decide, a planted head found, and
training on focal layers against its controls.

SmolLM2 stands for the real models: its heads, its conflicts, and itself as a judge. Alignment is shown on a role
language with a known answer (`_roles_toy`), because the paper's training needs models of 7 to 8 billion parameters,
served judges and multi-agent frameworks. `headway diagnose roles --align` does the same to any model.

Paper: Diagnose, Localize, Align, arXiv 2509.23188.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from headway.evidence.claims import Claim
from headway.evidence.parallel import processes
from headway.evidence.recipe import Context, Recipe
from headway.evidence.recipes import _roles_claims as claims
from headway.evidence.recipes import _roles_measures as measures
from headway.evidence.recipes import _roles_toy as toy
from headway.evidence.recipes._stages import in_stages
from headway.methods.diagnosis import diagnose_localize_align as method

CRITERIA = claims.CRITERIA
#: What is trained: adapters on sets of layers, or all parameters.
SETS = ("focal", "random", "least_moved", "all", "full")
#: Rates that are tried for each of them on a decoder of their own. The one under which preferred answers that it was
#: not trained on are likeliest is used for every measured run of that set. Their preference loss does not tell: it
#: falls on, at rates that make both answers unlikely. The released rate and β are for models of billions.
RATES = {"lora": (1e-3, 2e-3, 5e-3), "full": (5e-5, 2e-4, 8e-4)}
BETA, BATCH = 0.5, 16


#: Pairs that heads are found on, control sets, steps of the toy and of its reward model; steps and pairs of alignment;
#: cases of each test.
TOY = {"smoke": (6, 2, 10, 2), "small": (60, 20, 220, 30), "full": (200, 100, 2000, 200)}
ALIGN = {"smoke": (4, 16), "small": (160, 400), "full": (200, 800)}
TESTS = {"smoke": 40, "small": 300, "full": 1000}


@dataclass(frozen=True)
class Work:
    """Where decoders are kept, the size of the run, and what compliance is measured on."""

    folder: Path
    size: str
    tests: dict[str, list[toy.Case]]


def run(context: Context) -> list[Claim]:
    real = context.stage("smollm2", lambda: _real(context))
    layered, weighted = context.choose(smoke=(1, 1), small=(3, 5), full=(10, 20))
    workers = context.choose(smoke=1, small=2, full=1)
    rates = context.stage("rates", lambda: _rates(context))
    work = Work(context.out / "data", context.size, _tests(context))
    drawn = [(work, number, seed % 2**31) for number, seed in enumerate(context.seeds(weighted))]
    with processes(workers) as together:
        toys = in_stages(context, "toys", together, trained_toy, drawn, size=workers)
        plan = [
            (work, made, what, mode, rates["chosen"])
            for number, made in enumerate(toys)
            for what, mode in [("focal", mode) for mode in measures.MODES]
            + [(what, "attention") for what in SETS[1:] if number < layered]
        ]
        runs = in_stages(context, "aligned", together, aligned, plan, size=2 * workers)
    stock = context.stage("stock-loss", lambda: measures.against_stock(context.seed % 2**31, 20))
    return [
        *claims.real_claims(context, real),
        *claims.toy_claims(context, toys, runs, rates),
        claims.loss_claim(stock),
    ]


def _real(context: Context) -> dict[str, Any]:
    """A real model: its focal heads, planted heads in it, and itself as a judge."""
    from headway.hosts import load

    model, tokenizer = load("smollm2")
    if context.size == "smoke":
        model.model.layers = model.model.layers[:4]
        model.config.num_hidden_layers = 4
    count, held, draws, planted, facts = context.choose(
        smoke=(1, 1, 2, 2, 2), small=(1, 1, 20, 10, 1), full=(3, 3, 50, 50, 6)
    )
    kinds = list(method.KINDS)[:1] if context.size == "smoke" else list(method.KINDS)
    heads = measures.real_heads(model, tokenizer, kinds, count, held, draws)
    layers, per_layer = model.config.num_hidden_layers, model.config.num_attention_heads
    drawn = context.generator("planted").permutation(layers * per_layer)[:planted]
    places = [(int(i) // per_layer, int(i) % per_layer) for i in drawn]
    items = method.conflict_items(tokenizer, kinds=kinds[:1], relations=method.RELATIONS[:1])
    return {
        "heads": heads,
        "planted": measures.planted_heads(model, items, places),
        "planted_at": places,
        "marks": measures.judged(model, tokenizer, kinds, facts),
    }


def _rates(context: Context) -> dict[str, Any]:
    """The loss of preferred answers by what is trained and rate, and the rate of the least, on one decoder that nothing
    else is measured on."""
    (drifting, _, train, _), (steps, count) = TOY[context.size], ALIGN[context.size]
    seed = int(context.generator("rates").integers(2**31))
    base = toy.train(train, seed)
    pairs, held = (toy.draw_cases(count, np.random.default_rng([seed, place])) for place in (2, 5))
    located = measures.focal(base, toy.draw_cases(drifting, np.random.default_rng([seed, 1])))

    def loss(what: str, rate: float) -> float:
        layers = _layers(located, what, seed)
        return measures.preferred_loss(base, layers, pairs, held, _settings("uniform", steps, rate, seed))

    losses = {what: {str(rate): loss(what, rate) for rate in RATES[_form(what)]} for what in SETS}
    return {"losses": losses, "chosen": {what: float(min(some, key=some.__getitem__)) for what, some in losses.items()}}


def _form(what: str) -> str:
    return "full" if what == "full" else "lora"


def _settings(mode: str, steps: int, rate: float, seed: int) -> method.AlignSettings:
    return method.AlignSettings(
        weights=mode, beta=BETA, steps=steps, batch=BATCH, accumulate=1, learning_rate=rate, seed=seed
    )


def trained_toy(work: Work, number: int, seed: int) -> dict[str, Any]:
    """One decoder, trained and kept with its reward model: its compliance before alignment, and its focal heads."""
    pairs, draws, steps, tuned = TOY[work.size]
    model = toy.train(steps, seed)
    _save(work, model, number)
    cases, first = toy.draw_cases(pairs, np.random.default_rng([seed, 1])), work.tests["new inputs"]
    found = {
        "number": number,
        "seed": seed,
        "agreement": toy.agreement_right(model, first),
        "compliance": {name: toy.compliance(model, some) for name, some in work.tests.items()},
        "located": measures.located(model, cases, first, draws, seed),
    }
    toy.tune(model, toy.draw_cases(400, np.random.default_rng([seed, 4])), tuned, seed)
    _save(work, model, number, "reward")
    return found


def aligned(work: Work, made: dict[str, Any], what: str, mode: str, rates: dict[str, float]) -> dict[str, Any]:
    """One alignment of a decoder that `trained_toy` kept, and what it is worth."""
    steps, count = ALIGN[work.size]
    located, seed, number = made["located"], made["seed"], made["number"]
    layers = _layers(located, what, seed)
    found = measures.trained(
        _load(work, number),
        layers,
        toy.draw_cases(count, np.random.default_rng([seed, 2])),
        work.tests,
        _settings(mode, steps, rates[what], seed),
        heads=[(layer, head) for layer, head in located["heads"]],
        reward=_load(work, number, "reward") if mode == "reward" else None,
        curve=what == "focal",
    )
    return {"what": what, "mode": mode, "number": number, "steps": steps, "layers": layers, **found}


def _save(work: Work, model: Any, number: int, name: str = "decoder") -> None:
    work.folder.mkdir(parents=True, exist_ok=True)
    save_file(model.state_dict(), work.folder / f"{name}-{number}.safetensors")


def _load(work: Work, number: int, name: str = "decoder") -> Any:
    model = toy.decoder(0)
    model.load_state_dict(load_file(work.folder / f"{name}-{number}.safetensors"))
    return model.eval()


def _layers(located: dict[str, Any], what: str, seed: int) -> list[int] | None:
    focal = located["layers"]
    if what == "focal":
        return list(focal)
    if what == "least_moved":
        return method.inverse_layers(np.asarray(located["scores"]), len(focal))
    if what == "random":
        generator = np.random.default_rng([seed, 3])
        return method.random_layers(toy.LAYERS, len(focal), generator=generator, avoid=focal)
    return list(range(toy.LAYERS)) if what == "all" else None


def _tests(context: Context) -> dict[str, list[toy.Case]]:
    count = TESTS[context.size]
    return {
        "new inputs": toy.draw_cases(count, context.generator("new inputs")),
        "held pairs": toy.draw_cases(count, context.generator("held pairs"), pairs=toy.HELD_PAIRS),
        "held relation": toy.draw_cases(count, context.generator("held relation"), relation=1),
    }


def _obstacle(size: str) -> str | None:
    if size == "full" and not torch.cuda.is_available():
        return "it trains hundreds of alignments and there is no GPU. Run --size small."
    return None


RECIPE = Recipe(
    slug="diagnose-localize-align",
    title="Diagnose, Localize, Align: A Full-Stack Framework for Reliable LLM Multi-Agent Systems under Instruction "
    "Conflicts",
    run=run,
    criteria=CRITERIA,
    obstacle=_obstacle,
)
