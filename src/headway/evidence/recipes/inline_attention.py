"""InLine attention: planted queries, small classifiers against linear and softmax attention, a real vision model, cost.

The rank condition and the collisions are exact and are tried on random tensors. Classifiers differ in their mixer alone
and are compared seed by seed on held-out images: scikit-learn's digits with one token per pixel, 5,000 images of MNIST,
and a made set in which only neighbours tell the class. Locality and the masking of near tokens are read off a trained
softmax vision model.

Paper: Bridging the Divide: Reconsidering Softmax and Linear Attention, arXiv 2412.06590. Its tables are of ImageNet-1K,
300 epochs, which no size here repeats; "full" is the same small sets with more seeds and longer budgets.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, interpolate, normalize, scaled_dot_product_attention
from torch.utils.flop_counter import FlopCounterMode

from headway.evidence.claims import Claim, PaperValue
from headway.evidence.criteria import all_of, at_least, at_most, interval_excludes
from headway.evidence.recipe import Context, Recipe
from headway.evidence.recipes._inline_toys import image_set
from headway.evidence.recipes._inline_trained import TRAINED_CRITERIA, budget, trained_claims
from headway.kernels.feature_rules import INLINE, Rule, feature_weights
from headway.kernels.inline import inline_attention
from headway.methods.layers.inline import LocalityObserver, MaskTokens, injectivity, same_row_query
from headway.statistics import Measurement, bootstrap, bootstrap_difference, proportion
from headway.train.images import Images

#: Rows count as one below this, in float64.
EXACT = 1e-9
#: Dimension of the injectivity trials.
DIM = 6
#: Mean and standard deviation of the three colours to which the embedded vision model is used.
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

CRITERIA = {
    "collision": all_of(at_least(0.1, label="mean largest change of a row"), at_most(1e-6, of="linear")),
    "injective": at_most(0, minimum_n=300, label="violations"),
    **TRAINED_CRITERIA,
    "locality": interval_excludes(1, side="above"),
    "masking": interval_excludes(0, side="above", requires=at_least(0.4, of="unmasked", by="value")),
    "cost": all_of(at_most(1.3, label="slope of InLine"), at_least(1.6, of="softmax")),
}


def run(context: Context) -> list[Claim]:
    trained = trained_claims(context)
    real = context.stage("real", lambda: _real(context))
    return [
        _collision_claim(context, context.stage("collision", lambda: _collisions(context))),
        _injective_claim(context.stage("injective", lambda: _ranks(context))),
        *trained,
        _locality_claim(context, real),
        _masking_claim(context, real),
        _cost_claim(context, context.stage("cost", lambda: _cost(context))),
    ]


def _collisions(context: Context) -> dict[str, list[float]]:
    """The largest change of a row when its query is doubled: 2 dimensions, 8 keys, features made positive by ReLU."""
    trials = context.choose(smoke=40, small=400, full=4000)
    generator = context.torch_generator("collision")
    query, key = (torch.randn(trials, 1, n, 2, dtype=torch.float64, generator=generator) for n in (1, 8))
    query = query.abs()
    rows: dict[str, Callable[[Tensor], Tensor]] = {
        "linear": lambda q: feature_weights(q, key, rule=Rule(normaliser="divisive", feature="relu", epsilon=1e-12)),
        "inline": lambda q: feature_weights(q, key, rule=INLINE),
        "inline relu": lambda q: feature_weights(q, key, rule=Rule(feature="relu")),
        "softmax": lambda q: (q @ key.transpose(-1, -2) / 2**0.5).softmax(-1),
    }
    return {name: (row(query) - row(2 * query)).abs().amax((1, 2, 3)).tolist() for name, row in rows.items()}


def _ranks(context: Context) -> dict[str, Any]:
    """Whether the rank of the centred keys says if two queries can share a row, over random numbers of keys."""
    trials = context.choose(smoke=60, small=600, full=6000)
    generator = context.torch_generator("injective")
    violations, injective = 0, 0
    for _ in context.track(range(trials), "random trials of injectivity"):
        tokens = int(torch.randint(1, 2 * DIM + 3, (1,), generator=generator))
        query, key = (torch.randn(1, 1, n, DIM, dtype=torch.float64, generator=generator) for n in (3, tokens))
        if bool(injectivity(key).injective):
            injective += 1
            # The map from query to row is linear up to a constant; its smallest gain is that of the worst direction.
            centred = (key - key.mean(2, keepdim=True)) * DIM**-0.5 / tokens
            violations += int(torch.linalg.svdvals(centred[0, 0])[-1] < EXACT)
        else:
            other = same_row_query(query, key)
            change = feature_weights(query, key) - feature_weights(other, key)
            violations += int(change.abs().max() > EXACT or tokens > DIM)
    return {"violations": violations, "trials": trials, "injective": injective}


def _real(context: Context) -> dict[str, Any]:
    """A trained vision model on digits drawn large: mass near each patch, and what is left of its features when near or
    far tokens are masked in every layer. The class is that of most of three nearest images by the class token."""
    from headway.door import observe, use

    known, asked = context.choose(smoke=(12, 8), small=(300, 100), full=(2000, 1000))
    seed = context.seeds(1)[0]
    images = image_set(context, "mnist-5k").fewer(known + asked, seed=seed)
    old, new = images.split(held_out=asked / (known + asked), seed=seed)
    model, patch = _vision_model(context)
    grid = (8, 8)

    def features(images: Images, *stages: Any) -> Tensor:
        found = []
        with torch.no_grad(), use(model, *stages):
            for part in context.track(images.pixels.split(25), "images"):
                found.append(model(pixel_values=_large(part, grid, patch)).last_hidden_state[:, 0])
        return torch.cat(found)

    locality = LocalityObserver(grid, prefix=1)
    with observe(model, locality), torch.no_grad():
        model(pixel_values=_large(old.pixels[:25], grid, patch))
    gallery, plain = features(old), features(new)
    found: dict[str, Any] = {"unmasked": _right(plain, gallery, old.labels, new.labels)}
    drift = {}
    for kind in ("local", "random"):
        for renormalise in (False, True):
            name = f"{kind} renormalised" if renormalise else kind
            masked = features(new, MaskTokens(grid=grid, kind=kind, prefix=1, renormalise=renormalise))
            found[name] = _right(masked, gallery, old.labels, new.labels)
            drift[name] = (1 - cosine_similarity(masked, plain)).tolist()
    mass = {site: {"ratio": part["ratio"], "mass": part["mass"]} for site, part in locality.result().items()}
    return {"right": found, "drift": drift, "locality": mass, "model": type(model).__name__}


def _large(pixels: Tensor, grid: tuple[int, int], patch: int) -> Tensor:
    """Grey images drawn at the size of the grid, as the vision model's processor would normalise them."""
    size = (grid[0] * patch, grid[1] * patch)
    large = interpolate(pixels, size=size, mode="bilinear", align_corners=False).expand(-1, 3, -1, -1)
    return (large - torch.tensor(MEAN)[:, None, None]) / torch.tensor(DEVIATION)[:, None, None]


def _vision_model(context: Context) -> tuple[Any, int]:
    """The embedded vision model and the side of its patches; a random one at smoke size."""
    if context.size != "smoke":
        from headway.hosts import load

        return load("vit")[0], 14
    from transformers import ViTConfig, ViTModel

    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
    }
    return ViTModel(ViTConfig(**sizes, image_size=32, patch_size=4), add_pooling_layer=False).eval(), 4


def _right(features: Tensor, gallery: Tensor, known: Tensor, truth: Tensor) -> list[int]:
    """Per image whether most of the three nearest of the gallery have its class; the nearest decides a tie."""
    nearest = known[(normalize(features, dim=-1) @ normalize(gallery, dim=-1).T).topk(3, -1).indices]
    same = nearest[:, 1] == nearest[:, 2]
    return (torch.where(same, nearest[:, 1], nearest[:, 0]) == truth).long().tolist()


def _cost(context: Context) -> dict[str, Any]:
    """Seconds and operations of attention alone, three heads of 64, over growing grids."""
    lengths, repeats = context.choose(
        smoke=((64, 128, 256), 2), small=((196, 784, 3136, 12544), 5), full=((196, 784, 3136, 12544, 50176), 9)
    )
    forms: dict[str, Callable[..., Tensor]] = {"inline": inline_attention, "softmax": scaled_dot_product_attention}
    seconds: dict[str, list[list[float]]] = {name: [[] for _ in range(repeats)] for name in forms}
    operations: dict[str, list[int]] = {name: [] for name in forms}
    generator = context.torch_generator("cost")
    for tokens in context.track(lengths, "grids"):
        sides = [torch.randn(1, 3, tokens, 64, generator=generator) for _ in range(3)]
        for name, form in forms.items():
            with FlopCounterMode(display=False) as counter:
                form(*sides)
            operations[name].append(counter.get_total_flops())
        for repeat in range(repeats):
            for name, form in forms.items():
                start = time.perf_counter()
                form(*sides)
                seconds[name][repeat].append(time.perf_counter() - start)
    return {"lengths": list(lengths), "seconds": seconds, "operations": operations}


def _slope(lengths: Sequence[float], values: Sequence[float]) -> float:
    """The exponent of growth; NaN where something was not counted."""
    if min(values) <= 0:
        return float("nan")
    return float(np.polyfit(np.log(lengths), np.log(values), 1)[0])


def _collision_claim(context: Context, found: dict[str, list[float]]) -> Claim:
    random = context.generator("collision interval")
    return Claim(
        id="collision",
        statement="Doubling a query leaves its row of linear attention as it is and moves its row of InLine attention.",
        paper=PaperValue("linear attention confuses collinear queries, InLine does not", where="figure 1"),
        measured=bootstrap(found["inline"], generator=random),
        criterion=CRITERIA["collision"],
        others={
            "linear": Measurement(max(found["linear"]), n=len(found["linear"])),
            **{name.replace(" ", "_"): bootstrap(found[name], generator=random) for name in ("inline relu", "softmax")},
        },
        notes="Largest change of an entry. For linear attention the largest over all trials, else the mean.",
    )


def _injective_claim(found: dict[str, Any]) -> Claim:
    return Claim(
        id="injective",
        statement="Two queries can share a row exactly when the centred keys have a rank below the head dimension.",
        paper=PaperValue("InLine attention is injective for injective features", where="propositions 1 and 2"),
        measured=Measurement(found["violations"], n=found["trials"], unit="violations"),
        criterion=CRITERIA["injective"],
        notes="The paper leaves the condition on the keys open. Where it is not met another query with the same row is "
        "constructed; where it is met the smallest gain of the map from query to row is above zero.",
        details={"injective": found["injective"]},
    )


def _locality_claim(context: Context, found: dict[str, Any]) -> Claim:
    ratios = [float(np.mean(site["ratio"])) for site in found["locality"].values()]
    heads = np.concatenate([site["ratio"] for site in found["locality"].values()])
    return Claim(
        id="locality",
        statement="A trained softmax vision model gives the 3 × 3 patches around a patch more than their even share.",
        paper=PaperValue("local mass above the even share, most in shallow layers", "DeiT-T", "figure"),
        measured=bootstrap(heads, generator=context.generator("locality interval"), unit="× even share"),
        criterion=CRITERIA["locality"],
        notes="Heads are the units; images are averaged.",
        details={"model": found["model"], "mean of each layer": ratios},
    )


def _masking_claim(context: Context, found: dict[str, Any]) -> Claim:
    right, random = found["right"], context.generator("masking interval")

    def loss(suffix: str) -> Measurement:
        sides = right[f"random{suffix}"], right[f"local{suffix}"]
        return bootstrap_difference(*sides, paired=True, generator=random)

    drifts = {f"drift_{name.replace(' ', '_')}": bootstrap(x, generator=random) for name, x in found["drift"].items()}
    return Claim(
        id="masking",
        statement="Masking the 3 × 3 tokens around each patch costs more accuracy than masking as many elsewhere.",
        paper=PaperValue("a far larger drop for local tokens", "DeiT-T on ImageNet-1K", "table of masked tokens"),
        measured=loss(""),
        baseline=proportion(sum(right["random"]), len(right["random"])),
        criterion=CRITERIA["masking"],
        others={
            "unmasked": proportion(sum(right["unmasked"]), len(right["unmasked"])),
            "local": proportion(sum(right["local"]), len(right["local"])),
            "renormalised": loss(" renormalised"),
            **drifts,
        },
        notes="A vision model without a classifier: three nearest neighbours by the class token among unmasked images "
        "of MNIST drawn at 112 pixels. Weights are zeroed in every layer; 'renormalised' shares them out instead.",
        details={"model": found["model"]},
    )


def _cost_claim(context: Context, found: dict[str, Any]) -> Claim:
    random, lengths = context.generator("cost interval"), found["lengths"]
    slopes = {
        name: bootstrap([_slope(lengths, row) for row in rows], generator=random, unit="")
        for name, rows in found["seconds"].items()
    }
    medians = {name: np.median(np.array(rows), 0) for name, rows in found["seconds"].items()}
    faster = [n for n, own, other in zip(lengths, medians["inline"], medians["softmax"], strict=True) if own < other]
    return Claim(
        id="cost",
        statement="The time of InLine attention grows with the number of tokens, that of softmax with its square.",
        paper=PaperValue("2.4 × at 640², 4.8 × at 1024²", "DeiT-T, whole model on a GPU", "figure"),
        measured=slopes["inline"],
        criterion=CRITERIA["cost"],
        others={
            "softmax": slopes["softmax"],
            **{
                f"operations_{name}": Measurement(_slope(lengths, x))
                for name, x in found["operations"].items()
                if min(x)
            },
        },
        notes="Exponents of growth of the attention alone on this machine, three heads of 64, one image.",
        details={
            "tokens": lengths,
            "median seconds": {name: list(x) for name, x in medians.items()},
            "first grid at which InLine is faster": faster[0] if faster else None,
        },
    )


def _plots(context: Context, claims: Sequence[Claim]) -> None:
    import plotly.graph_objects as go

    found = next(claim for claim in claims if claim.id == "digits-budget")
    runs, step = found.details["runs"], str(budget(context)[0])
    figure = go.Figure([go.Box(y=[run["looks"][step] for run in runs[name]], name=name) for name in runs])
    figure.update_layout(title=f"Digits, {step} steps", yaxis_title="held-out accuracy", showlegend=False)
    context.save_plot(figure, "digits")


RECIPE = Recipe(
    slug="inline-attention",
    title="Bridging the Divide: Reconsidering Softmax and Linear Attention",
    run=run,
    criteria=CRITERIA,
    plots=_plots,
)
