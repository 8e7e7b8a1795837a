"""The claims of the Diagnose, Localize, Align recipe: criteria, and how numbers answer them.

Not every criterion was written before its numbers were seen. Those of SmolLM2's focal heads followed one look at the
output of the command, but for the planned bound of 2; the condition `WORKS` came after a design in which training all
layers taught nothing; judges were held against each other in a first form before this one. Thresholds did not move, and
the notes of each claim say what had been seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from headway.evidence.claims import Claim, PaperValue
from headway.evidence.criteria import all_of, at_least, at_most, interval_excludes, rank_correlation_at_least
from headway.evidence.recipe import Context
from headway.evidence.recipes import _roles_measures as measures
from headway.evidence.recipes import _roles_toy as toy
from headway.statistics import Measurement, bootstrap, bootstrap_difference, bootstrap_ratio, rank_correlation

#: The toy counts when it answers agreement rightly, and disobeys in conflict, as the paper's models do.
LEARNED = (
    at_least(0.95, of="accuracy", by="value", label="accuracy of the toy in agreement"),
    at_most(0.4, of="base", by="value", label="compliance of the toy before training"),
)
#: What is said of alignment counts when training all layers, the reference, works at all.
WORKS = at_least(0.8, of="taught", by="value", label="compliance after LoRA on all layers")
HALF_WAY = f"Compliance half-way through training; steps to {measures.REACHED:.0%} beside it."
#: Of the 270 heads of SmolLM2: a planted head may be beaten by none.
FIRST = 0.8

CRITERIA = {
    "focal-heads-are-middle": all_of(
        at_least(0.5, by="value", label="share of SmolLM2's focal heads in the middle third"),
        at_most(0.05, of="p", by="value", label="chance of as many there"),
    ),
    "drift-is-of-the-conflict": interval_excludes(
        0.0, side="above", minimum_n=7, label="turn of focal heads in conflict minus the same words without one"
    ),
    "focal-heads-decide-in-smollm2": all_of(
        at_least(2.0, by="value", label="effect of silencing focal heads over that of as many in the same layers"),
        at_most(0.05, of="p", by="value", label="rank among the control sets"),
    ),
    "planted-head-ranks-first": at_least(FIRST, by="value", label="share of planted heads that no other outranks"),
    "judges-agree": interval_excludes(
        0.0, side="above", minimum_n=14, label="ρ of SmolLM2 as a judge and the rule judge on constraints"
    ),
    "focal-heads-decide-in-the-toy": all_of(
        at_least(2.0, by="value", label="effect of silencing focal heads over that of as many random heads"),
        at_most(0.05, of="p", by="value", label="rank among the control sets"),
        requires=LEARNED,
    ),
    "focal-layers-are-enough": at_least(
        0.9, by="value", label="gain by LoRA on focal layers over that on all layers", requires=(*LEARNED, WORKS)
    ),
    "focal-beats-other-layers": all_of(
        interval_excludes(0.0, side="above", of="over_random", label="compliance above that of random layers"),
        interval_excludes(0.0, side="above", label="compliance above that of least moved layers"),
        requires=(*LEARNED, WORKS),
    ),
    "agreement-is-kept": at_most(
        0.01, by="value", label="answers in agreement that focal training loses", requires=(*LEARNED, WORKS)
    ),
    "attention-weights-help": at_least(
        0.0, label="compliance with attention weights minus uniform ones, at equal steps", requires=(*LEARNED, WORKS)
    ),
    "reward-weights-help": at_least(
        0.0, label="compliance with reward weights minus uniform ones, at equal steps", requires=(*LEARNED, WORKS)
    ),
    "reward-weights-beat-a-constant": interval_excludes(
        0.0,
        side="above",
        label="compliance with reward weights minus those of one constant reward, at equal steps",
        requires=(*LEARNED, WORKS),
    ),
    "cras-follows-compliance": rank_correlation_at_least(
        0.8, by="value", label="ρ of CRAS and compliance over checkpoints", requires=(*LEARNED, WORKS)
    ),
    "unit-weights-are-dpo": all_of(
        at_most(1e-6, label="largest difference of the loss to DPO"),
        at_most(1e-6, of="gradient", label="largest difference of its gradient"),
        at_most(1e-6, of="start", label="distance from ln 2 without a difference to the reference"),
    ),
}


def real_claims(context: Context, real: dict[str, Any]) -> list[Claim]:
    heads, planted, marks = real["heads"], real["planted"], real["marks"]
    n = len(heads["conflict"])
    ratio = heads["focal"]["value"] / max(heads["control"]["value"], 1e-12)
    first = [rank == 0 for rank in planted["score"]]
    notes = (
        "SmolLM2 on templates of seven kinds, system against user and peer against peer; k = 10 % of the heads. These "
        "numbers had been seen once in the output of the command, on the same cases with fewer control sets, before "
        "the criteria were written; the bound of 2 had been planned before that, the others follow the paper's words."
    )
    return [
        Claim(
            id="focal-heads-are-middle",
            statement="Heads that arbitrate between conflicting instructions stand in the middle layers.",
            paper=PaperValue("predominantly in the middle layers", "their backbones", "abstract"),
            measured=Measurement(heads["share"], n=len(heads["heads"])),
            baseline=Measurement(heads["expected"]),
            criterion=CRITERIA["focal-heads-are-middle"],
            others={"p": Measurement(heads["p_middle"])},
            details={"heads": heads["heads"], "layers": heads["layers"]},
            notes=f"{notes} The paper's formulas of drift are not public; ours ranks three changes.",
        ),
        Claim(
            id="drift-is-of-the-conflict",
            statement="Focal heads answer to the conflict, not to its words.",
            paper=PaperValue("not reported"),
            measured=Measurement.from_dict(heads["specific"]),
            criterion=CRITERIA["drift-is-of-the-conflict"],
            others={"rho_of_relations": Measurement(heads["relations"])},
            notes=f"{notes} On held-out conflicts; the control has the same two messages under a rule of another kind.",
        ),
        Claim(
            id="focal-heads-decide-in-smollm2",
            statement="Silencing focal heads changes which rule wins more than silencing others of the same layers.",
            paper=PaperValue("not reported; focal heads are said to arbitrate", where="abstract"),
            measured=Measurement(ratio, n=n),
            criterion=CRITERIA["focal-heads-decide-in-smollm2"],
            others={
                "p": Measurement(heads["p_gates"]),
                "focal": Measurement.from_dict(heads["focal"]),
                "control": Measurement.from_dict(heads["control"]),
                "won_in_conflict": Measurement(float(np.mean(np.asarray(heads["conflict"]) > 0)), n=n),
                "won_in_agreement": Measurement(float(np.mean(np.asarray(heads["neutral"]) > 0)), n=n),
            },
            details={"by_control": heads["by_control"]},
            notes=notes,
        ),
        Claim(
            id="planted-head-ranks-first",
            statement="A head that is made to look at the opposing message alone, in conflict only, drifts most.",
            paper=PaperValue("not reported"),
            measured=Measurement(float(np.mean(first)), n=len(first)),
            criterion=CRITERIA["planted-head-ranks-first"],
            others={
                "by_attention_alone": Measurement(float(np.mean([rank == 0 for rank in planted["distribution"]]))),
                "median_rank": Measurement(float(np.median(planted["score"]))),
            },
            details={"heads": real["planted_at"], "ranks": planted},
            notes="Ranks among all heads of the model, 0 is first. Heads behind the planted one move with it.",
        ),
        Claim(
            id="judges-agree",
            statement="A local model as a judge marks constraints as the rule judge does.",
            paper=PaperValue("not reported; one served judge", "DeepSeek-R1", "released code"),
            measured=rank_correlation(marks["rules"], marks["model"], generator=context.generator("judges")),
            criterion=CRITERIA["judges-agree"],
            others={"gain": bootstrap(marks["gain"], generator=context.generator("gain"))},
            details={"gain": marks["gain"]},
            notes="SmolLM2's expected mark for constraint compliance. Both answers of a kind stand under each of its "
            "two rules; `gain` is the mark of an answer where it obeys minus that where it does not. A first form had "
            "each answer under one rule only and gave ρ −0.66: the answers that obeyed were capitals, single words and "
            "“1. Paris”, the others plain sentences, and about 3 went to any sentence, 2 to an answer that begins "
            "with the digit 1, whatever the rule. The sign and the calibration of the judge are right. This form "
            "was tried once before the record: ρ −0.07.",
        ),
    ]


def toy_claims(
    context: Context, toys: Sequence[dict[str, Any]], runs: Sequence[dict[str, Any]], rates: dict[str, Any]
) -> list[Claim]:
    gates = {
        "accuracy": Measurement(min(one["agreement"] for one in toys), n=len(toys)),
        "base": Measurement(max(one["compliance"]["new inputs"] for one in toys), n=len(toys)),
    }

    def column(what: str, mode: str = "attention", test: str = "new inputs") -> list[float]:
        return [run["compliance"][test] for run in runs if run["what"] == what and run["mode"] == mode]

    def mean(values: Sequence[float], name: str) -> Measurement:
        return bootstrap(values, generator=context.generator(name))

    focal, whole = column("focal"), column("all")
    gates["taught"] = mean(whole, "taught")
    layered = len(whole)
    start = [one["compliance"]["new inputs"] for one in toys[:layered]]
    gain = _ratio(context, np.subtract(focal[:layered], start), np.subtract(whole, start), "gain")
    lost = [
        toys[run["number"]]["agreement"] - run["agreement"]
        for run in runs
        if run["what"] == "focal" and run["mode"] == "attention"
    ]
    curves = [run["curve"] for run in runs if run["curve"]]
    followed = [measures.follows(curve) for curve in curves if run_rises(curve)]
    table = {
        what: mean(column(what), what) for what in ("focal", "random", "least_moved", "all", "full") if column(what)
    }
    parameters = {
        what: [run["parameters"] for run in runs if run["what"] == what and run["mode"] == "attention"]
        for what in ("focal", "all")
    }
    share = np.divide(parameters["focal"][:layered], parameters["all"])
    anywhere, close = ([one["located"]["effects"][name] for one in toys] for name in ("anywhere", "same_layers"))
    note = (
        f"{len(toys)} decoders of {toy.LAYERS} layers and {toy.HEADS} heads a layer, each trained here on a role "
        "language in which it learns to disobey, are the independent units. Compliance is on new inputs of the pairs "
        "of rules that alignment saw; pairs and a relation that it never saw stand beside it. An earlier design (35 "
        "facts, β 0.1, 24 steps at 1e-3, compliance on pairs of rules that were held out) was measured whole and given "
        "up: LoRA on all layers did not turn it. β, steps and the test set were then chosen on one decoder, and the "
        "gate on all layers was added; the thresholds stayed. A first record missed that gate at 0.71: its rate was "
        "that of the least preference loss on unseen pairs, 5e-3, at which both answers became unlikely and 0.71 of "
        "the answers in agreement were lost. Two decoders of other seeds, looked at then, obeyed in 0.92 and 0.90 of "
        "the conflicts at 2e-3 after 80 and 160 steps, and kept 0.79 and 0.92 of their answers in agreement. The rate "
        "is now the one under which preferred answers are likeliest on unseen pairs, of a decoder that nothing else is "
        "measured on, and steps and pairs are twice as many; the criteria stayed. A second record, with "
        "one rate for all sets of layers, had 0.95 with all layers, 0.40 with focal ones and 0.96 with the least "
        "moved, and lost 0.82 of the answers in agreement. Each set now has a rate of its own, chosen alike."
    )
    others = {
        "over_random": bootstrap_difference(
            focal[:layered], column("random"), paired=True, generator=context.generator("random")
        ),
        **table,
        **gates,
    }
    return [
        Claim(
            id="focal-heads-decide-in-the-toy",
            statement="Silencing focal heads changes which rule wins more than silencing as many random heads.",
            paper=PaperValue("not reported; focal heads are said to arbitrate", where="abstract"),
            measured=_ratio(context, *_effects(anywhere), "anywhere"),
            criterion=CRITERIA["focal-heads-decide-in-the-toy"],
            others={
                "p": Measurement(max(one["p"] for one in anywhere), n=len(anywhere)),
                "ratio_in_the_same_layers": _ratio(context, *_effects(close), "same layers"),
                **gates,
            },
            details={name: [one["located"][name] for one in toys] for name in ("heads", "layers")},
            notes=note,
        ),
        Claim(
            id="focal-layers-are-enough",
            statement="LoRA on the focal layers alone gains nearly what LoRA on all layers gains.",
            paper=PaperValue("hierarchy compliance + 5.60 %", "AutoGen, MedQA", "abstract"),
            measured=gain,
            criterion=CRITERIA["focal-layers-are-enough"],
            others={
                **table,
                "share_of_parameters": mean(share.tolist(), "parameters"),
                "gain_of_full_training": _ratio(
                    context, np.subtract(column("full"), start), np.subtract(whole, start), "full"
                ),
                **{
                    f"{test.replace(' ', '_')}_{what}": mean(column(what, test=test), f"{test} {what}")
                    for test in ("held pairs", "held relation")
                    for what in ("focal", "all")
                },
                **gates,
            },
            notes=note,
        ),
        Claim(
            id="focal-beats-other-layers",
            statement="Focal layers are better to train than as many of the least moved, or random, layers.",
            paper=PaperValue("not reported; asked for by reviewers"),
            measured=bootstrap_difference(
                focal[:layered], column("least_moved"), paired=True, generator=context.generator("least moved")
            ),
            criterion=CRITERIA["focal-beats-other-layers"],
            others=others,
            details={"layers": [[run["number"], run["what"], run["layers"]] for run in runs], "rates": rates},
            notes=note,
        ),
        Claim(
            id="agreement-is-kept",
            statement="Training on focal layers costs nothing where instructions agree.",
            paper=PaperValue("accuracy gains are frequent", where="reviews"),
            measured=mean(lost, "lost"),
            criterion=CRITERIA["agreement-is-kept"],
            others=gates,
            notes=note,
        ),
        *(_weighting(context, runs, mode, gates, note) for mode in ("attention", "reward")),
        _constant_claim(context, runs, gates, note),
        Claim(
            id="cras-follows-compliance",
            statement="CRAS by the rule judge rises with true compliance.",
            paper=PaperValue("CRAS gains are consistent", where="reviews"),
            measured=Measurement(float(np.median(followed)) if followed else float("nan"), n=_looks(curves)),
            criterion=CRITERIA["cras-follows-compliance"],
            others={"lowest": Measurement(min(followed, default=float("nan"))), **gates},
            notes=f"{note} The median over {len(followed)} runs whose compliance moved, of looks at each run.",
        ),
    ]


def loss_claim(found: dict[str, float]) -> Claim:
    return Claim(
        id="unit-weights-are-dpo",
        statement="With unit weights the token-weighted loss and its gradient are those of DPO.",
        paper=PaperValue("DPO with token weights", where="released code"),
        measured=Measurement(found["loss"]),
        criterion=CRITERIA["unit-weights-are-dpo"],
        others={"gradient": Measurement(found["gradient"]), "start": Measurement(found["start"])},
    )


def run_rises(curve: Sequence[Sequence[float]]) -> bool:
    """Whether compliance took different values, so that it can be followed at all."""
    return len(curve) >= 3 and len({row[1] for row in curve}) > 1 and len({row[2] for row in curve}) > 1


def _effects(found: Sequence[dict[str, Any]]) -> tuple[list[float], list[float]]:
    """What silencing does by decoder: focal heads, and the mean of the control sets."""
    return [one["focal"] for one in found], [float(np.mean(one["by_control"])) for one in found]


def _ratio(context: Context, above: Any, below: Any, name: str) -> Measurement:
    """A ratio of means over decoders, unknown where nothing is below."""
    if not np.mean(below):
        return Measurement(float("nan"), n=len(below))
    return bootstrap_ratio(above, below, paired=True, generator=context.generator(name))


def _looks(curves: Sequence[Sequence[Any]]) -> int:
    return min((len(curve) for curve in curves), default=0)


def _weighting(
    context: Context, runs: Sequence[dict[str, Any]], mode: str, gates: dict[str, Measurement], note: str
) -> Claim:
    return Claim(
        id=f"{mode}-weights-help",
        statement=f"Token weights by {mode} reach at least the compliance of uniform ones in as many steps.",
        paper=PaperValue(
            "tokens are credited by focal attention" if mode == "attention" else "reward-guided weights",
            where="abstract" if mode == "attention" else "released code",
        ),
        measured=_at_budget(context, runs, mode, "uniform"),
        criterion=CRITERIA[f"{mode}-weights-help"],
        others={**_reached(context, runs, ("uniform", mode)), **gates},
        notes=f"{note} {HALF_WAY}",
    )


def _constant_claim(
    context: Context, runs: Sequence[dict[str, Any]], gates: dict[str, Measurement], note: str
) -> Claim:
    return Claim(
        id="reward-weights-beat-a-constant",
        statement="Rewards of their own for tokens do better than one reward for all of them.",
        paper=PaperValue("a constant reward does worse", where="reviews"),
        measured=_at_budget(context, runs, "reward", "constant"),
        criterion=CRITERIA["reward-weights-beat-a-constant"],
        others={**_reached(context, runs, ("constant", "reward")), **gates},
        notes=f"{note} {HALF_WAY} A constant reward r weighs chosen tokens by 1 + a β r and rejected ones by "
        "1 − a β r; with r = 0 both are DPO's.",
    )


def _by_mode(runs: Sequence[dict[str, Any]], mode: str) -> list[dict[str, Any]]:
    return [run for run in runs if run["what"] == "focal" and run["mode"] == mode]


def _at_budget(context: Context, runs: Sequence[dict[str, Any]], mode: str, other: str) -> Measurement:
    """Compliance half-way through training by one source of weights minus that by another, decoder by decoder."""
    first, second = ([half_way(run["curve"]) for run in _by_mode(runs, name)] for name in (mode, other))
    name = f"weights {mode}" if other == "uniform" else f"weights {mode} {other}"
    return bootstrap_difference(first, second, paired=True, generator=context.generator(name))


def _reached(context: Context, runs: Sequence[dict[str, Any]], modes: Sequence[str]) -> dict[str, Measurement]:
    return {
        f"steps_{name}": bootstrap(
            [measures.steps_to(run["curve"], run["steps"]) for run in _by_mode(runs, name)],
            generator=context.generator(f"steps {name}"),
        )
        for name in modes
    }


def half_way(curve: Sequence[Sequence[float]]) -> float:
    """Compliance at the look nearest to the middle of a run."""
    last = curve[-1][0]
    return float(min(curve, key=lambda row: abs(row[0] - last / 2))[1])
