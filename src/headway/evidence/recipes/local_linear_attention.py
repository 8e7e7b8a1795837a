"""Local linear attention: test-time regression against softmax, linear attention and ridge, rates, solver, memory,
recall.

The estimators themselves are compared on generated data whose answer is known; nothing is trained there. Two small
trained models, associative recall and in-context linear regression, stand beside. Paper: arXiv 2510.01450.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from headway.evidence.claims import Claim, PaperValue
from headway.evidence.criteria import (
    all_of,
    at_least,
    at_most,
    interval_excludes,
)
from headway.evidence.parallel import Together, processes
from headway.evidence.recipe import Context, Recipe
from headway.evidence.recipes import _local_linear_solver as solver
from headway.evidence.recipes import _local_linear_trained as toys
from headway.statistics import bootstrap, bootstrap_difference, bootstrap_ratio
from headway.tasks.piecewise_regression import (
    Regression,
    linear_attention_estimate,
    local_linear_estimate,
    piecewise_regression,
    ridge_estimate,
    softmax_estimate,
    squared_errors,
)

DIMS = (8, 16, 32)
#: Inverse bandwidth 1/h for h = 0.1, and the ridge, of the sheet this recipe was written from.
SCALE, RIDGE = 10.0, 1e-3
#: What each estimator may choose from, on sequences that are not measured.
SCALES, RIDGES = (2.0, 4.0, 8.0, 16.0, 32.0, 64.0), (1e-4, 1e-3, 1e-2, 1e-1)
LENGTHS = (64, 128, 256, 512, 1024, 2048, 4096)
SMOOTH_RIDGE = 1e-6
WIDE_SCALES = tuple(2.0**i for i in range(13))
RECALL_LEARNED, REGRESSION_LEARNED = 0.8, 0.5

CRITERIA = {
    "piecewise": all_of(*(at_most(0.5, of=f"{other} {d}") for d in DIMS for other in ("to softmax", "to ridge"))),
    "piecewise-tuned": all_of(
        *(interval_excludes(1.0, of=f"{other} {d}", side="below") for d in DIMS for other in ("to softmax", "to ridge"))
    ),
    "stationary": all_of(at_most(2.0, label="local linear / ridge"), at_least(10.0, of="softmax to ridge")),
    "rate": interval_excludes(0.0, side="below", label="difference of log-log slopes"),
    **solver.CRITERIA,
    "recall-softmax": interval_excludes(0.0, side="above", requires=at_least(RECALL_LEARNED, of="softmax", by="value")),
    "recall-linear": interval_excludes(
        0.0, side="above", requires=at_least(RECALL_LEARNED, of="local_linear", by="value")
    ),
    "regression": interval_excludes(
        1.0,
        side="below",
        requires=at_most(REGRESSION_LEARNED, of="softmax", by="value"),
        label="error / error of softmax",
    ),
    "parity": at_most(0.75, label="accuracy"),
}


def run(context: Context) -> list[Claim]:
    pieces = {d: context.stage(f"piecewise-{d}", partial(_fixed, context, d)) for d in DIMS}
    tuned = {d: context.stage(f"tuned-{d}", partial(_tuned, context, d)) for d in DIMS}
    with processes(context.choose(smoke=1, small=2, full=1)) as together:
        trained = [*_trained_claims(context, together), _parity_claim(context, together)]
    return [
        _piecewise_claim(context, "piecewise", pieces),
        _piecewise_claim(context, "piecewise-tuned", tuned),
        _stationary_claim(context, context.stage("stationary", partial(_fixed, context, 16, segments=1))),
        _rate_claim(context, context.stage("rate", partial(_rates, context))),
        *solver.claims(context),
        *trained,
    ]


def _estimators(scale: float, ridge: float) -> dict[str, Callable[[Regression], Tensor]]:
    return {
        "local": partial(local_linear_estimate, scale=scale, ridge=ridge),
        "softmax": partial(softmax_estimate, scale=scale),
        "ridge": partial(ridge_estimate, ridge=ridge),
        "linear": linear_attention_estimate,
    }


def _fixed(context: Context, dim: int, segments: int = 4) -> dict[str, list[float]]:
    """Squared error of each sequence, of all estimators at the bandwidth and ridge of the sheet."""
    count = context.choose(smoke=8, small=200, full=2000)
    per_segment = 64 if segments > 1 else 128
    generator = context.torch_generator(f"pieces {dim} {segments}")
    data = piecewise_regression(count, dim, generator, segments=segments, per_segment=per_segment)
    return {name: squared_errors(f(data), data).tolist() for name, f in _estimators(SCALE, RIDGE).items()}


def _tuned(context: Context, dim: int) -> dict[str, Any]:
    """The same with bandwidth and ridge of each estimator chosen on other sequences."""
    count = context.choose(smoke=8, small=200, full=2000)
    trial = piecewise_regression(max(count // 4, 4), dim, context.torch_generator(f"tuning {dim}"))
    data = piecewise_regression(count, dim, context.torch_generator(f"tuned {dim}"))
    errors: dict[str, Any] = {}
    chosen = {}
    for name in ("local", "softmax", "ridge", "linear"):
        grid = [(s, r) for s in (SCALES if name in ("local", "softmax") else (1.0,)) for r in RIDGES]
        best = min(grid, key=partial(_mean_error, name, trial))
        chosen[name] = {"scale": best[0], "ridge": best[1]}
        errors[name] = squared_errors(_estimators(*best)[name](data), data).tolist()
    return {**errors, "chosen": chosen}


def _mean_error(name: str, data: Regression, at: tuple[float, float]) -> float:
    return float(squared_errors(_estimators(*at)[name](data), data).mean())


def _rates(context: Context) -> dict[str, list[list[float]]]:
    """Mean squared error by length (rows: repetitions) for a smooth map on a part of a sphere, best bandwidth each."""
    lengths = context.choose(smoke=LENGTHS[:3], small=LENGTHS, full=LENGTHS)
    repeats, queries = context.choose(smoke=(4, 16), small=(24, 64), full=(200, 256))
    found: dict[str, list[list[float]]] = {"local": [], "softmax": []}
    for length in context.track(lengths, "lengths"):
        generator = context.torch_generator(f"rate {length}")
        data = _smooth(repeats, length, queries, generator)
        trial = _smooth(repeats, length, queries, generator)
        for name in found:
            best = min(((s, SMOOTH_RIDGE) for s in WIDE_SCALES), key=partial(_mean_error, name, trial))
            found[name].append(squared_errors(_estimators(*best)[name](data), data).tolist())
    return {name: np.array(rows).T.tolist() for name, rows in found.items()}


def _smooth(batch: int, pairs: int, queries: int, generator: torch.Generator) -> Regression:
    """A smooth map of a quarter of the unit sphere in three dimensions, with noise; the edge of the quarter matters."""
    phase = torch.randn(batch, 1, 1, generator=generator, dtype=torch.float64)
    direction = normalize(torch.randn(batch, 3, 1, generator=generator, dtype=torch.float64), dim=1)

    def points(count: int) -> Tensor:
        x = normalize(torch.randn(batch, count, 3, generator=generator, dtype=torch.float64), dim=-1)
        return torch.cat([x[..., :2].abs(), x[..., 2:]], -1)

    key, query = points(pairs), points(queries)
    value, target = (torch.sin(3 * x @ direction + phase) for x in (key, query))
    noise = 0.1 * torch.randn(value.shape, generator=generator, dtype=torch.float64)
    return Regression(key=key, value=value + noise, query=query, target=target)


def _piecewise_claim(context: Context, name: str, found: dict[int, dict[str, Any]]) -> Claim:
    others = {}
    for dim, errors in found.items():
        for other in ("softmax", "ridge", "linear"):
            others[f"to {other} {dim}"] = bootstrap_ratio(
                errors["local"], errors[other], paired=True, generator=context.generator(f"{name} {dim} {other}")
            )
    worst = max((others[f"to {o} {d}"] for d in DIMS for o in ("softmax", "ridge")), key=lambda m: m.value)
    tuned = name == "piecewise-tuned"
    means = {d: {n: float(np.mean(e)) for n, e in errors.items() if n != "chosen"} for d, errors in found.items()}
    details: dict[str, Any] = {"mean squared error": means}
    if tuned:
        details["chosen"] = {d: errors["chosen"] for d, errors in found.items()}
    statement = (
        "On piecewise linear data the local linear fit has at most half the error of softmax and of global ridge."
    )
    if tuned:
        statement = "It has less error than both when every estimator has the bandwidth and ridge that suit it best."
    return Claim(
        id=name,
        statement=statement,
        paper=PaperValue("better than strong baselines under non-stationarity", "test-time regression", "abstract"),
        measured=worst,
        criterion=CRITERIA[name],
        others=others,
        notes="4 segments × 64 unit keys; value noise 0.05; targets without noise. measured: the largest ratio. "
        "The factor of a half was written after a try-out of the same setting in another implementation"
        f"{'.' if not tuned else '; here only the sign is asked for.'}",
        details=details,
    )


def _stationary_claim(context: Context, errors: dict[str, list[float]]) -> Claim:
    ratio = partial(bootstrap_ratio, paired=True)
    return Claim(
        id="stationary",
        statement="Where one linear map holds, the local linear fit is near global ridge, the best; softmax is not.",
        paper=PaperValue("interpolates between linear and softmax attention", where="title, section 3"),
        measured=ratio(errors["local"], errors["ridge"], generator=context.generator("stationary")),
        criterion=CRITERIA["stationary"],
        others={
            "softmax to ridge": ratio(errors["softmax"], errors["ridge"], generator=context.generator("stationary s"))
        },
        notes="One segment of 128 pairs, d = 16, the bandwidth and ridge of the piecewise claim.",
        details={"mean squared error": {name: float(np.mean(e)) for name, e in errors.items()}},
    )


def _rate_claim(context: Context, found: dict[str, list[list[float]]]) -> Claim:
    lengths = LENGTHS[: len(found["local"][0])]
    slopes = {
        name: [float(np.polyfit(np.log(lengths), np.log(row), 1)[0]) for row in rows] for name, rows in found.items()
    }
    return Claim(
        id="rate",
        statement="The error of the local linear fit falls faster with the number of keys than that of softmax.",
        paper=PaperValue("n^(−4/(d+4)) against n^(−3/(d+3))", "integrated error, bounded support", "theorem"),
        measured=bootstrap_difference(
            slopes["local"], slopes["softmax"], paired=True, generator=context.generator("rate")
        ),
        criterion=CRITERIA["rate"],
        others={name: bootstrap(s, generator=context.generator(f"rate {name}")) for name, s in slopes.items()},
        notes="A quarter of a sphere (two dimensions: −0.67 and −0.60 by theory), best bandwidth for every length.",
        details={
            "lengths": lengths,
            "mean squared error": {name: np.mean(rows, 0).tolist() for name, rows in found.items()},
        },
    )


def _trained_claims(context: Context, together: Together) -> list[Claim]:
    seeds = context.seeds(context.choose(smoke=2, small=3, full=10))
    steps, pairs = context.choose(smoke=(2, 8), small=(400, 32), full=(2000, 48))
    found: dict[str, dict[str, list[float]]] = {}
    for task in ("recall", "regression"):
        found[task] = {}
        for mixer in toys.MIXERS:
            calls = [(task, mixer, seed) for seed in seeds]
            train_one = partial(toys.trained, steps=steps, pairs=pairs)
            found[task][mixer] = context.stage(f"{task}-{mixer}", partial(together, train_one, calls))
    settings = {"seeds": len(seeds), "steps": steps, "pairs": pairs, "width": toys.WIDTH, "heads": toys.HEADS}
    means = {
        task: {
            name: toys.mean_of(values, context.generator(f"{task} {name}"), seeds) for name, values in by_mixer.items()
        }
        for task, by_mixer in found.items()
    }
    claims = []
    for other in ("softmax", "linear"):
        claims.append(
            Claim(
                id=f"recall-{other}",
                statement=f"Trained alike, local linear attention recalls more than {other} attention.",
                paper=PaperValue("better than strong baselines", "associative recall", "abstract"),
                measured=bootstrap_difference(
                    found["recall"]["local_linear"],
                    found["recall"][other],
                    paired=True,
                    generator=context.generator(f"recall {other}"),
                    seeds=seeds,
                ),
                criterion=CRITERIA[f"recall-{other}"],
                others=means["recall"],
                notes="One layer, pairs as single tokens, keys never repeated. Difference of accuracies by seed. "
                "The number of steps was set so that the softmax layer learns the task, and heads got a bandwidth "
                "to learn after a try-out with a fixed one.",
                details={**settings, "accuracy": found["recall"]},
            )
        )
    claims.append(
        Claim(
            id="regression",
            statement="Trained alike, local linear attention errs less than softmax in in-context regression.",
            paper=PaperValue("better than strong baselines", "in-context regression", "abstract"),
            measured=bootstrap_ratio(
                found["regression"]["local_linear"],
                found["regression"]["softmax"],
                paired=True,
                generator=context.generator("regression"),
                seeds=seeds,
            ),
            criterion=CRITERIA["regression"],
            others=means["regression"],
            notes="Errors over that of answering zero; y = A x with a new A for every sequence.",
            details={**settings, "error": found["regression"]},
        )
    )
    return claims


def _parity_claim(context: Context, together: Together) -> Claim:
    seeds = context.seeds(context.choose(smoke=2, small=3, full=10))
    steps, count = context.choose(smoke=(2, 6), small=(150, 24), full=(5000, 64))
    track_one = partial(toys.tracked, steps=steps, count=count)
    found = {
        mixer: context.stage(f"parity-{mixer}", partial(together, track_one, [(mixer, seed) for seed in seeds]))
        for mixer in ("local_linear", "softmax")
    }
    means = {name: toys.mean_of(v, context.generator(f"parity {name}"), seeds) for name, v in found.items()}
    return Claim(
        id="parity",
        statement="Two layers of local linear attention do not learn to track the parity of a long row of bits.",
        paper=PaperValue("advantages and limits in state tracking", where="abstract"),
        measured=means["local_linear"],
        baseline=means["softmax"],
        criterion=CRITERIA["parity"],
        notes="A limit, not a win: chance is a half, and the first bits are easy. Baseline: softmax, trained alike.",
        details={"bits": count, "steps": steps, "accuracy": found},
    )


RECIPE = Recipe(
    slug="local-linear-attention",
    title="Local Linear Attention: An Optimal Interpolation of Linear and Softmax Attention For Test-Time Regression",
    run=run,
    criteria=CRITERIA,
)
