"""Diagnose, Localize, Align: where a real model's focal heads stand and whether they decide, a planted head found, and
training on focal layers against its controls.

SmolLM2 stands for the real models: its heads, its conflicts, and itself as a judge. Alignment is shown on a role
language with a known answer (`_roles_toy`), because the paper's training needs models of 7 to 8 billion parameters,
served judges and multi-agent frameworks. `headway diagnose roles --align` does the same to any model.

Paper: Diagnose, Localize, Align, arXiv 2509.23188.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from headway.evidence.claims import Claim
from headway.evidence.recipe import Context, Recipe
from headway.evidence.recipes import _roles_claims as claims
from headway.evidence.recipes import _roles_measures as measures
from headway.evidence.recipes import _roles_toy as toy
from headway.methods.diagnosis import diagnose_localize_align as method

CRITERIA = claims.CRITERIA
#: Chosen so that uniform weights on all layers teach the toy; the released rate and β are for models of billions.
RATE, BETA, BATCH = 5e-3, 0.5, 16
#: Part of the rate at which all parameters are trained in place of adapters.
FULL = 0.04


def run(context: Context) -> list[Claim]:
    real = context.stage("smollm2", lambda: _real(context))
    layered, weighted = context.choose(smoke=(1, 1), small=(3, 5), full=(10, 20))
    toys, runs = [], []
    for number, seed in enumerate(context.seeds(weighted)):
        toys.append(context.stage(f"toy-{number}", partial(_toy, context, number, seed % 2**31)))
        plan = [("focal", mode) for mode in measures.MODES]
        if number < layered:
            plan += [(what, "attention") for what in ("random", "least_moved", "all")]
        if number == 0:
            plan.append(("full", "attention"))
        for what, mode in plan:
            name = f"toy-{number}-{what}-{mode}"
            runs.append(context.stage(name, partial(_align, context, toys[-1], what, mode, number)))
    stock = context.stage("stock-loss", lambda: measures.against_stock(context.seed % 2**31, 20))
    return [
        *claims.real_claims(context, real),
        *claims.toy_claims(context, toys, runs),
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


def _toy(context: Context, number: int, seed: int) -> dict[str, Any]:
    """One decoder, trained and kept with its reward model: its compliance before alignment, and its focal heads."""
    pairs, tests, draws, steps, tuned = context.choose(
        smoke=(6, 40, 2, 10, 2), small=(60, 300, 20, 220, 30), full=(200, 1000, 100, 2000, 200)
    )
    model = toy.train(steps, seed)
    _save(context, model, number)
    held = _tests(context, tests)
    cases = toy.draw_cases(pairs, np.random.default_rng([seed, 1]))
    found = {
        "number": number,
        "seed": seed,
        "agreement": toy.agreement_right(model, held["new inputs"]),
        "compliance": {name: toy.compliance(model, some) for name, some in held.items()},
        "located": measures.located(model, cases, held["new inputs"], draws, seed),
    }
    toy.tune(model, toy.draw_cases(400, np.random.default_rng([seed, 4])), tuned, seed)
    _save(context, model, number, "reward")
    return found


def _align(context: Context, made: dict[str, Any], what: str, mode: str, number: int) -> dict[str, Any]:
    steps, count, tests = context.choose(smoke=(4, 16, 40), small=(80, 200, 300), full=(100, 800, 1000))
    located, seed = made["located"], made["seed"]
    layers = _layers(located, what, seed)
    found = measures.trained(
        _load(context, number),
        layers,
        toy.draw_cases(count, np.random.default_rng([seed, 2])),
        _tests(context, tests),
        method.AlignSettings(
            weights=mode,
            beta=BETA,
            steps=steps,
            batch=BATCH,
            accumulate=1,
            learning_rate=RATE * FULL if what == "full" else RATE,
            seed=seed,
        ),
        heads=[(layer, head) for layer, head in located["heads"]],
        reward=_load(context, number, "reward") if mode == "reward" else None,
        curve=what == "focal",
    )
    return {"what": what, "mode": mode, "number": number, "steps": steps, "layers": layers, **found}


def _save(context: Context, model: Any, number: int, name: str = "decoder") -> None:
    path = _path(context, number, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(model.state_dict(), path)


def _load(context: Context, number: int, name: str = "decoder") -> Any:
    model = toy.decoder(0)
    model.load_state_dict(load_file(_path(context, number, name)))
    return model.eval()


def _path(context: Context, number: int, name: str) -> Path:
    return context.out / "data" / f"{name}-{number}.safetensors"


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


def _tests(context: Context, count: int) -> dict[str, list[toy.Case]]:
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
