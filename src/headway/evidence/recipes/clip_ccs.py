"""CLIP concept consistency: parts that add up, built heads that score what they write, and silencing at equal
count.

No trained CLIP can be installed from a package, so the models are tiny CLIPs that are trained here on attribute scenes,
gated on their own zero-shot accuracy; the real model is the embedded DINOv2 encoder, on which the decomposition is
checked. The paper's own models and data (six CLIPs, ImageNet, CIFAR, FairFace) need the hub and a GPU.

Paper: Pruning the Paradox, arXiv 2503.11103; decomposition and TextSpan: arXiv 2310.05916.
"""

from __future__ import annotations

from typing import Any

from headway.evidence.claims import Claim
from headway.evidence.parallel import processes
from headway.evidence.recipe import Context, Recipe
from headway.evidence.recipes import _concepts_claims as claims
from headway.evidence.recipes import _concepts_measures as measures
from headway.evidence.recipes._stages import in_stages

CRITERIA = claims.CRITERIA


#: Steps of training and of training on, scenes, draws, and built mixtures of a plain model; without the second and the
#: last for a biased one.
PLAIN = {"smoke": (3, 2, 40, 1, 1), "small": (300, 100, 400, 5, 8), "full": (1500, 500, 4000, 20, 50)}
BIASED = {"smoke": (3, 40, 1), "small": (300, 600, 5), "full": (1500, 6000, 20)}


def run(context: Context) -> list[Claim]:
    count, correlated = context.choose(smoke=(1, 1), small=(8, 3), full=(20, 10))
    seeds = context.seeds(count)
    workers = context.choose(smoke=1, small=2, full=1)
    calls = [("plain", context.size, seed) for seed in seeds]
    calls += [("biased", context.size, seed) for seed in seeds[:correlated]]
    with processes(workers) as together:
        models = in_stages(context, "models", together, measured, calls, size=workers)
    plain, biased = models[:count], models[count:]
    real = context.stage("vit", lambda: {"error": measures.real_vision(stand_in=context.size == "smoke")})
    return [
        claims.decomposition_claim(plain, real["error"]),
        *claims.toy_claims(context, plain),
        *claims.specialised_claims(context, [m["specialised"] for m in plain]),
        claims.bias_claim(context, biased),
    ]


def measured(kind: str, size: str, seed: int) -> dict[str, Any]:
    """What is measured on one CLIP that is trained here, "plain" or "biased"."""
    return _plain(*PLAIN[size], seed) if kind == "plain" else _biased(*BIASED[size], seed)


def _plain(steps: int, tuned: int, count: int, draws: int, mixtures: int, seed: int) -> dict[str, Any]:
    """One CLIP: trained, checked, then its heads described, scored and silenced on scenes that it has not seen."""
    model = measures.trained(seed, steps)
    bank = measures.bank_of(model)
    fresh = seed % 2**31 + 1
    return measures.silenced(model, bank, count, draws, fresh) | {
        "errors": measures.reconstructions(model, min(count, 100), fresh),
        "planted": measures.planted_scores(model, bank, mixtures, count, fresh),
        "kept": measures.kept_by_texts(model, bank, 5, count, fresh),
        "specialised": measures.specialised(model, bank, tuned, count, draws, fresh),
    }


def _biased(steps: int, count: int, draws: int, seed: int) -> dict[str, Any]:
    """One CLIP that saw nearly only red circles, and what its colour heads do to the retrieval of circles."""
    model = measures.trained(seed, steps, correlation=measures.PLANTED)
    return measures.biased(model, measures.bank_of(model), count, draws, seed % 2**31 + 1)


RECIPE = Recipe(
    slug="clip-ccs",
    title="Pruning the Paradox: How CLIP's Most Informative Heads Enhance Performance While Amplifying Bias",
    run=run,
    criteria=CRITERIA,
)
