"""What the recipe of Diagnose, Localize, Align measures, as plain data: on a real model, on the role language, and of
the loss alone."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from headway.door import use
from headway.evidence.recipes import _roles_toy as toy
from headway.methods.diagnosis import diagnose_localize_align as method
from headway.methods.diagnosis.diagnose_localize_align.pairs import FACTS
from headway.statistics import rank_correlation

#: Focal share of the toy's 24 heads: a tenth would be two.
TOY_SHARE = 0.2
MODES = ("uniform", "attention", "reward", "constant")
#: Steps between two looks at a run.
EVERY = 16
#: Compliance that a run is timed to.
REACHED = 0.9


def real_heads(model: Any, tokenizer: Any, kinds: Sequence[str], count: int, held: int, draws: int) -> dict[str, Any]:
    """Localisation on a real model: the place of its focal heads, their drift beside the lexical control on held-out
    conflicts, and what silencing them does beside as many others."""
    items = method.conflict_items(tokenizer, kinds=kinds, count=count)
    held_out = method.conflict_items(tokenizer, kinds=kinds, count=held, first=count)
    gated = [item for item in held_out if item.relation == method.RELATIONS[0]]
    found = method.localize(model, items, held_out, gated=gated, draws=draws)
    rows = [(found.layers.index(layer), head) for layer, head in found.focal]
    return {
        "heads": found.focal,
        "layers": found.focal_layers,
        "share": found.concentration.share,
        "expected": found.concentration.expected,
        "p_middle": found.concentration.p_value,
        "specific": found.specific.to_dict(),
        "focal": found.gates.focal.to_dict(),
        "control": found.gates.control.to_dict(),
        "by_control": found.gates.by_control,
        "p_gates": found.gates.null.p_value,
        "neutral": found.neutral,
        "conflict": found.conflict,
        "relations": _between(found.relations),
        "score": float(np.mean([found.scores[row] for row in rows])),
    }


def planted_heads(model: Any, items: Sequence[method.Item], heads: Sequence[tuple[int, int]]) -> dict[str, list[float]]:
    """Heads made to look at the clause alone in conflict, one at a time: the rank of each by its drift (0 is first),
    by the whole score and by the change of its attention."""
    found: dict[str, list[float]] = {"score": [], "distribution": []}
    for layer, head in heads:
        drifts = []
        for item in items:
            with use(model, toy.LooksAtClause(layer=layer, head=head, span=item.pair.spans["other"][1])):
                drifts.append(method.attention_drift(model, [item.pair]))
        scores = np.mean([one.scores() for one in drifts], 0)
        moved = np.mean([one.distribution[0] for one in drifts], 0)
        row = drifts[0].layers.index(layer)
        found["score"].append(float((scores > scores[row, head]).sum()))
        found["distribution"].append(float((moved > moved[row, head]).sum()))
    return found


def judged(model: Any, tokenizer: Any, kinds: Sequence[str], facts: int) -> dict[str, Any]:
    """Marks of the rule judge and of a model judge for constraint compliance, crossed: both answers of a kind under
    each of its two rules, so that every answer obeys once and disobeys once, and an answer that a judge likes for its
    form gains nothing. `gain` is by answer the model's mark under the rule that it obeys minus that under the other."""
    turns = []
    for kind in (method.KINDS[name] for name in kinds):
        for number, fact in enumerate(FACTS[:facts]):
            for side, answer in enumerate(kind.answers):
                for rule in (side, 1 - side):
                    asked = f"You must always {kind.rules[rule]}. {kind.question or fact.question}"
                    turns.append(
                        method.Turn(
                            conversation=f"{kind.name} {number} answer {side} rule {rule}",
                            index=0,
                            role="assistant",
                            reply=answer(fact),
                            question=asked,
                            rules=method.Rules(constraints=(kind.checks[rule],)),
                        )
                    )
    judge, (rubric, _) = method.ModelJudge(model, tokenizer), method.rubric_for("assistant")
    marks = [judge.mark(turn, rubric, "CC") for turn in turns]
    rules = [one.scores["CC"] for one in method.score_turns(turns, method.RuleJudge())]
    pairs = zip(marks[::2], marks[1::2], strict=True)
    return {"rules": rules, "model": marks, "gain": [first - second for first, second in pairs]}


def located(model: Any, cases: Sequence[toy.Case], held: Sequence[toy.Case], draws: int, seed: int) -> dict[str, Any]:
    """Focal heads and layers of a toy, and what silencing does beside random heads, anywhere or in their layers."""
    found_by_drift = focal(model, cases)
    effects = {}
    for name, same in (("anywhere", False), ("same_layers", True)):
        found = method.gate_effect(
            model,
            found_by_drift["heads"],
            lambda: toy.margins(model, held),
            shape=(toy.LAYERS, toy.HEADS),
            generator=np.random.default_rng(seed),
            draws=draws,
            same_layer=same,
        )
        effects[name] = {"focal": found.focal.value, "by_control": found.by_control, "p": found.null.p_value}
    return found_by_drift | {"effects": effects}


def focal(model: Any, cases: Sequence[toy.Case]) -> dict[str, Any]:
    """Drift scores of a toy, its focal heads and their layers."""
    scores = method.attention_drift(model, [case.pair() for case in cases]).scores()
    heads = method.focal_heads(scores, share=TOY_SHARE)
    return {"scores": scores.tolist(), "heads": heads, "layers": method.focal_layers(scores, heads)}


def trained(
    base: Any,
    layers: Sequence[int] | None,
    cases: Sequence[toy.Case],
    tests: Mapping[str, Sequence[toy.Case]],
    settings: method.AlignSettings,
    *,
    heads: Sequence[tuple[int, int]],
    reward: Any = None,
    curve: bool = False,
) -> dict[str, Any]:
    """One alignment of a copy of the toy: LoRA on layers, or every parameter (None). Compliance on each test set and
    right answers in agreement afterwards; with `curve` the compliance on the first set and CRAS as it went."""
    model = copy.deepcopy(base)
    count = sum(p.numel() for p in model.parameters())
    if layers is not None:
        adapted = method.add_lora(model, layers, seed=settings.seed)
        model, count = adapted.model, adapted.trainable
    seen: list[list[float]] = []
    first = next(iter(tests.values()))
    inner = model.get_base_model() if layers is not None else model

    def look(run: Any) -> None:
        if curve and (run.step % EVERY == 0 or run.step == 1):
            inner.eval()
            seen.append([run.step, toy.compliance(inner, first), cras_of(inner, first)])
            inner.train()

    method.align(
        model, [case.preference() for case in cases], settings, heads=heads, reward_model=reward, callbacks=[look]
    )
    inner.eval()
    return {
        "compliance": {name: toy.compliance(inner, some) for name, some in tests.items()},
        "agreement": toy.agreement_right(inner, first),
        "parameters": count,
        "curve": seen,
    }


def preferred_loss(
    base: Any, layers: Sequence[int] | None, pairs: Sequence[toy.Case], held: Sequence[toy.Case],
    settings: method.AlignSettings,
) -> float:  # fmt: skip
    """−log p of the preferred answers of held pairs after one alignment, nats by answer; what a rate is chosen by. Inf
    where the alignment diverged."""
    model = copy.deepcopy(base)
    if layers is not None:
        model = method.add_lora(model, layers, seed=settings.seed).model
    method.align(model, [case.preference() for case in pairs], settings)
    inner = (model.get_base_model() if layers is not None else model).eval()
    ids = torch.tensor([case.conflict + case.obeys for case in held])
    with torch.no_grad():
        logps = inner(input_ids=ids, use_cache=False).logits[:, toy.PROMPT - 1 : -1].log_softmax(-1)
    found = -logps.gather(-1, ids[:, toy.PROMPT :, None])[..., 0].sum(-1).mean()
    return float(found) if bool(torch.isfinite(found)) else float("inf")


def cras_of(model: Any, cases: Sequence[toy.Case], most: int = 60) -> float:
    """CRAS of the model's own answers by the rule judge."""
    some = cases[:most]
    turns = [
        case.turn(str(i), reply) for i, (case, reply) in enumerate(zip(some, toy.answers(model, some), strict=True))
    ]
    scored = method.score_turns(turns, method.RuleJudge())
    return float(np.mean([one.value() for one in scored]))


def steps_to(curve: Sequence[Sequence[float]], most: int) -> float:
    """The step at which compliance first reached `REACHED`; one look beyond the end where it never did."""
    return next((step for step, share, _ in curve if share >= REACHED), most + EVERY)


def follows(curve: Sequence[Sequence[float]]) -> float:
    """Spearman's ρ of compliance and CRAS over the looks at one run."""
    return rank_correlation([row[1] for row in curve], [row[2] for row in curve], generator=0).value


def against_stock(seed: int, batches: int) -> dict[str, float]:
    """Largest difference of loss and gradients to plain DPO at unit weights, and of the loss to ln 2 at the start."""
    generator = torch.Generator().manual_seed(seed)
    loss, gradient, start = 0.0, 0.0, 0.0
    for _ in range(batches):
        chosen, rejected = (torch.randn(4, n, generator=generator).requires_grad_() for n in (9, 12))
        ours = method.preference_loss(chosen, rejected, torch.ones(4, 9), torch.ones(4, 12)).loss
        stock = -torch.nn.functional.logsigmoid(method.preference.BETA * (chosen.sum(-1) - rejected.sum(-1))).mean()
        loss = max(loss, float((ours - stock).detach().abs()))
        pairs = zip(_gradients(ours, chosen, rejected), _gradients(stock, chosen, rejected), strict=True)
        gradient = max(gradient, *(float((a - b).abs().max()) for a, b in pairs))
        weights = [torch.rand(4, n, generator=generator) for n in (9, 12)]
        zero = method.preference_loss(torch.zeros(4, 9), torch.zeros(4, 12), *weights).loss
        start = max(start, abs(float(zero) - float(np.log(2))))
    return {"loss": loss, "gradient": gradient, "start": start}


def _gradients(loss: torch.Tensor, *inputs: torch.Tensor) -> Sequence[torch.Tensor]:
    return torch.autograd.grad(loss, inputs)


def _between(relations: dict[str, np.ndarray]) -> float:
    """Spearman's ρ of the drift scores of heads in the two relations."""
    first, second = (scores.ravel() for scores in relations.values())
    return rank_correlation(first, second, generator=0).value
