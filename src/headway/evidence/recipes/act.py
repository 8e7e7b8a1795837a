"""ACT: planted sinks found and repaired, the first token as a negative control, and multiple choice on a real model.

The toy is a trained decoder in which sinks are planted, so the right heads are known. The real model answers generated
multiple-choice questions; heads are chosen on one part of them and judged on the other, beside random sets of heads of
the same size. The paper's own datasets need downloads and its models a GPU.

Paper: Unveiling and Harnessing Hidden Attention Sinks, arXiv 2406.15765.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from headway.evidence.claims import Claim, PaperValue
from headway.evidence.criteria import all_of, at_least, at_most, interval_excludes
from headway.evidence.parallel import Together, processes
from headway.evidence.recipe import Context, Recipe
from headway.evidence.recipes._act_choice import Part, first_token_losses, gains_of, judged, later_sinks, questions
from headway.evidence.recipes._act_planting import BETAS, LEFT, WORTH, repaired
from headway.evidence.recipes._stages import in_stages
from headway.methods.sinks.act import BETA, HeadSearch, join_searches
from headway.statistics import Measurement, bootstrap, bootstrap_difference, bootstrap_over_seeds, proportion

RANDOM_SETS = 3
#: Heads tried by one process before what they gained is kept.
TOGETHER = 3
#: The toy counts when it has learned its task.
LEARNED = at_least(0.95, of="accuracy", by="value", label="accuracy of the undamaged toy")

CRITERIA = {
    "planted-heads-rank-first": at_least(0.9, by="value", label="recall of the planted heads", requires=LEARNED),
    "planted-recovery": all_of(
        at_least(0.6, by="value", label="accuracy recovered at β = 0.4"),
        at_least(0.85, of="beta_0", by="value", label="accuracy recovered at β = 0"),
        at_most(0.15, of="random_heads", by="value", label="accuracy recovered in random heads"),
        requires=LEARNED,
    ),
    "error-scales-with-beta": at_most(1e-3, label="largest deviation of the error from β", requires=LEARNED),
    "recovery-falls-with-beta": all_of(
        at_most(0.01, by="value", label="largest rise of the recovery from one β to the next"),
        at_most(0.0, of="difference_at_beta_1", label="difference from the baseline at β = 1"),
        requires=LEARNED,
    ),
    "later-sinks-exist": at_least(0.5, minimum_n=20, label="share of prompts in which some head has a later sink"),
    "first-sink-is-needed": interval_excludes(0.0, side="above", minimum_n=6, label="rise of the loss"),
    "choice-gain": interval_excludes(0.0, side="above", minimum_n=60, label="gain in accuracy on held-out questions"),
    "choice-against-random": interval_excludes(
        0.0, side="above", minimum_n=60, label="accuracy above that with random heads"
    ),
}


def run(context: Context) -> list[Claim]:
    tokens, block = context.choose(smoke=(48, 8), small=(768, 32), full=(4096, 64))
    workers = context.choose(smoke=1, small=2, full=1)
    with processes(workers) as together:
        toys = in_stages(context, "toys", together, repaired, _toy_calls(context), size=workers)
        real = _choice(context, together, workers)
    seed = context.seeds(1)[0]
    control = context.stage("first-token", lambda: first_token_losses(context.size, tokens, block, seed))
    return [
        *_toy_claims(context, toys),
        _later_claim(real),
        _first_token_claim(context, control),
        *_choice_claims(context, real),
    ]


def _toy_calls(context: Context) -> list[tuple[int, int, int, int]]:
    """Seed, steps, and sequences of search and report of every toy."""
    count, steps, search, report = context.choose(
        smoke=(1, 100, 48, 64), small=(5, 300, 256, 1000), full=(10, 2000, 256, 1000)
    )
    return [(seed, steps, search, report) for seed in context.seeds(count)]


def _choice(context: Context, together: Together, workers: int) -> dict[str, Any]:
    """Head search on one part of the questions, accuracy on the other, and how common later sinks are."""
    per_task, share, most = context.choose(smoke=(6, 0.5, 3), small=(40, 0.25, 24), full=(1000, 0.5, 1000))
    part = Part(context.size, context.seed, per_task, share)
    sinks = context.stage("later-sinks", lambda: together(later_sinks, [(part,)])[0])
    heads = [(int(layer), int(head)) for layer, head in sinks["heads"]]
    tried = heads[: min(sinks["with_sinks"], most)] or heads[:most]
    groups = [tried[start : start + TOGETHER] for start in range(0, len(tried), TOGETHER)]
    found = in_stages(context, "search", together, gains_of, [(part, group) for group in groups], size=workers)
    search = join_searches([_search(item) for item in found])
    chosen = list(search.selected)
    random = context.torch_generator("random heads")
    control = [
        [tried[i] for i in torch.randperm(len(tried), generator=random)[: len(chosen)].tolist()]
        for _ in range(RANDOM_SETS)
    ]
    arms: dict[str, Any] = {"dense": None, "chosen": chosen}
    arms |= {f"random_{i}": some for i, some in enumerate(control)}
    runs = in_stages(context, "judged", together, judged, [(part, arm) for arm in arms.values()], size=workers)
    searched, held = questions(part)
    return {
        "model": sinks["model"],
        "tried": len(tried),
        "candidates": len(heads),
        "selected": chosen,
        "gains": [{"head": head, "by task": search.gains[head]} for head in search.ranking()[:20]],
        "search_gain": float(np.mean([search.mean_gain(h) for h in chosen])) if chosen else 0.0,
        "questions": {"search": len(searched), "held out": len(held), "shared": len(set(searched) & set(held))},
        "tasks": [q.task for q in held],
        "correct": {name: run["correct"] for name, run in zip(arms, runs, strict=True)},
        "probability": {name: run["probability"] for name, run in zip(arms, runs, strict=True)},
        "later": {"prompts": sinks["prompts"], "heads": sinks["by_head"], "share": sinks["share"]},
    }


def _search(found: dict[str, Any]) -> HeadSearch:
    gains = {(layer, head): by_task for (layer, head), by_task in found["gains"]}
    return HeadSearch(baseline=found["baseline"], gains=gains, selected=())


def _toy_claims(context: Context, found: Sequence[dict[str, Any]]) -> list[Claim]:
    seeds = tuple(range(len(found)))
    planted = [f for f in found if f["heads"]]
    silenced = [f["silenced"] for f in planted if f["silenced"] is not None]
    accuracy = Measurement(min(f["accuracy"] for f in found), n=len(found), seeds=seeds)
    others = {"accuracy": accuracy}
    random = context.generator("toy intervals")

    def over(values: Sequence[float]) -> Measurement:
        if not planted:
            return Measurement(float("nan"))
        return bootstrap_over_seeds({i: [v] for i, v in enumerate(values)}, generator=random)

    def at(beta: float) -> Measurement:
        return over([f["recovered"][str(beta)] for f in planted])

    deviation = [abs(float(b) - r) for f in planted for row in f["errors"] for b, r in row.items()]
    defined = [value for value in deviation if math.isfinite(value)]
    curves = [[f["recovered"][str(b)] for b in BETAS] for f in planted]
    marked = [[f["from_markers"][str(b)] for b in BETAS] for f in planted]
    note = (
        "The toy names a key with its value in one token; the sinks are two markers, not every separator: a constant "
        "on all separators spreads the mass so thin that most stay below the threshold. Planted sets are drawn at "
        f"random among those in which every head is worth {WORTH} of accuracy, for a sink in an idle head cannot hurt, "
        f"and leaves its other keys {LEFT:.0%} of its attention, for a silenced head has nowhere to put what is taken "
        f"off; {len(found) - len(planted)} of {len(found)} toys have no such set. "
        "The criteria were written before any result of ACT was seen; the threshold became α/N after a trial with 0.1 "
        "had flagged the pairs too."
    )
    return [
        Claim(
            id="planted-heads-rank-first",
            statement="The head search puts the heads with planted sinks first.",
            paper=PaperValue("a search over single heads", "7B to 30B models", "section 4"),
            measured=over([f["recall"] for f in planted]),
            criterion=CRITERIA["planted-heads-rank-first"],
            others=others,
            notes=note,
            details={"toys": found},
        ),
        Claim(
            id="planted-recovery",
            statement="Calibrating the heads that the search found brings back the accuracy that planted sinks took.",
            paper=PaperValue("up to +7.30 % accuracy", "Llama-30B, no training", "abstract"),
            measured=at(BETA),
            criterion=CRITERIA["planted-recovery"],
            others=others | {"beta_0": at(0.0), "random_heads": over([float(np.mean(f["random"])) for f in planted])},
            notes="Shares of the lost accuracy, on fresh sequences; random sets hold as many heads, none planted. "
            "Sinks that leave the other keys under a millionth are out of reach: such rows stay as they are. What "
            "β = 0 recovers there stands in the details.",
            details={"recovered in silenced heads": silenced},
        ),
        Claim(
            id="error-scales-with-beta",
            statement="In a calibrated head the part of the output that came from sinks is multiplied by β.",
            paper=PaperValue("derived: ACT interpolates between attention with and without the sinks"),
            measured=Measurement(max(defined, default=float("nan")), n=len(defined)),
            criterion=CRITERIA["error-scales-with-beta"],
            others=others,
            notes="A head whose output does not change has no such part: it is left out and counted in the details.",
            details={"left out": len(deviation) - len(defined)},
        ),
        Claim(
            id="recovery-falls-with-beta",
            statement="Recovery falls as β grows, and at β = 1 the model is the baseline, bit for bit.",
            paper=PaperValue("β = 0.4 in the released scripts"),
            measured=Measurement(_rises(curves), n=len(curves)),
            criterion=CRITERIA["recovery-falls-with-beta"],
            others=others
            | {
                "difference_at_beta_1": Measurement(max((f["difference_at_1"] for f in planted), default=float("nan"))),
                "rise_from_markers_alone": Measurement(_rises(marked), n=len(marked)),
            },
            notes="Under the method's own rule any key that receives more than α/N of the attention is a sink, and a "
            "pair that is asked for often can be one: a small β then takes off answers too. Beside it stands the "
            "same where only the markers may be sinks, added after the claim had failed once; the criterion stayed on "
            f"the rule as it is. Mean recovery by β from {BETAS[0]:g} to {BETAS[-1]:g}: {_means(curves)} by the rule, "
            f"{_means(marked)} from markers alone.",
            details={"betas": list(BETAS), "recovered": curves, "recovered from markers alone": marked},
        ),
    ]


def _rises(curves: Sequence[Sequence[float]]) -> float:
    """The largest rise from one point of a curve to the next; NaN without curves."""
    return max((b - a for curve in curves for a, b in itertools.pairwise(curve)), default=float("nan"))


def _means(curves: Sequence[Sequence[float]]) -> str:
    return ", ".join(f"{np.mean(at):.2f}" for at in zip(*curves, strict=True)) or "not measured"


def _later_claim(real: dict[str, Any]) -> Claim:
    prompts = real["later"]["prompts"]
    return Claim(
        id="later-sinks-exist",
        statement="Sinks occur at later tokens of a prompt too.",
        paper=PaperValue("sinks within the sentence", "visualised over many inputs", "section 3"),
        measured=proportion(sum(prompts), len(prompts)),
        criterion=CRITERIA["later-sinks-exist"],
        details={"share of (head, prompt) pairs": real["later"]["share"], "by head": real["later"]["heads"]},
    )


def _first_token_claim(context: Context, control: dict[str, list[float]]) -> Claim:
    return Claim(
        id="first-sink-is-needed",
        statement="Not every sink is bad: taking attention off the first token raises the loss.",
        paper=PaperValue("not all sinks hurt", where="section 3"),
        measured=bootstrap_difference(
            control["calibrated"],
            control["dense"],
            paired=True,
            generator=context.generator("first token"),
            unit="nats",
        ),
        baseline=bootstrap(control["dense"], generator=context.generator("dense loss"), unit="nats"),
        criterion=CRITERIA["first-sink-is-needed"],
        notes=f"β = {BETA} on token 0 alone, in all heads but those of the first two layers and the last.",
    )


def _choice_claims(context: Context, real: dict[str, Any]) -> list[Claim]:
    correct = {name: np.array(values) for name, values in real["correct"].items()}
    random = np.mean([correct[f"random_{i}"] for i in range(RANDOM_SETS)], 0)
    generator = context.generator("choice")
    baseline = proportion(int(correct["dense"].sum()), len(correct["dense"]))
    soft = {name: np.array(values) for name, values in real["probability"].items()}
    softer = bootstrap_difference(soft["chosen"], soft["dense"], paired=True, generator=generator)
    moved = correct["chosen"].astype(int) - correct["dense"].astype(int)
    notes = (
        f"{real['questions']['search']} questions for the search, {real['questions']['held out']} held out; "
        f"{real['tried']} heads tried, those with most attention on later sinks of {real['candidates']}, "
        f"{len(real['selected'])} selected by the probability of the right option, which they raise by "
        f"{real['search_gain']:.3f} each in the search. Held out, {int((moved > 0).sum())} answers become right and "
        f"{int((moved < 0).sum())} wrong."
    )
    return [
        Claim(
            id="choice-gain",
            statement="Calibrating the selected heads raises accuracy on questions that they were not chosen on.",
            paper=PaperValue("up to +7.30 %", "average over datasets, Llama-30B", "abstract"),
            measured=bootstrap_difference(correct["chosen"], correct["dense"], paired=True, generator=generator),
            baseline=baseline,
            criterion=CRITERIA["choice-gain"],
            others={"probability_gain": softer},
            notes=notes,
            details=real,
        ),
        Claim(
            id="choice-against-random",
            statement="Selected heads do better than random heads of the same number.",
            paper=PaperValue("not reported"),
            measured=bootstrap_difference(correct["chosen"], random, paired=True, generator=generator),
            baseline=baseline,
            criterion=CRITERIA["choice-against-random"],
            notes=f"Mean of {RANDOM_SETS} random sets among the heads that were tried, those with most attention on "
            f"later sinks. Of {len(moved)} answers the chosen heads turn {int((moved != 0).sum())}.",
        ),
    ]


def _obstacle(size: str) -> str | None:
    if size == "full" and not torch.cuda.is_available():
        return "its model has 7 billion parameters and there is no GPU. Run --size small."
    return None


RECIPE = Recipe(
    slug="act",
    title="Unveiling and Harnessing Hidden Attention Sinks",
    run=run,
    criteria=CRITERIA,
    obstacle=_obstacle,
)
