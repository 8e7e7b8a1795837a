"""The part of the InLine recipe that trains: classifiers of digits, of MNIST, and of images that need neighbours."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from headway.evidence.claims import Claim, PaperValue
from headway.evidence.criteria import at_least, interval_excludes
from headway.evidence.parallel import Together, processes
from headway.evidence.recipe import Context
from headway.evidence.recipes._inline_toys import ARMS, edges, image_set, trained
from headway.statistics import Measurement, bootstrap, bootstrap_difference

#: The steps of the sheet's fixed budget, and of the longer one.
SHORT, LONG = 300, 500

#: What had been seen before the arms were what they are.
MORE_SEEDS = (
    "The arms linear and inline on digits have six seeds where a first run had four and a second one eight: the number"
    " was raised after the first had been seen, and lowered for time after the second."
)
NO_ROTATION = (
    "In a first run, whose numbers were seen, the softmax baseline turned queries and keys by position (RoPE); it was "
    "taken out since no other arm does so."
)

TRAINED_CRITERIA = {
    "confusion": interval_excludes(0, side="above", requires=at_least(0.3, of="linear_accuracy", by="value")),
    "digits-budget": at_least(0.15, requires=at_least(0.2, of="baseline", by="value")),
    "digits-softmax": at_least(-0.01, requires=at_least(0.6, of="baseline", by="value")),
    "mnist": interval_excludes(0, side="above", requires=at_least(0.3, of="baseline", by="value")),
    "local-residual": interval_excludes(0, side="above", requires=at_least(0.5, of="with_residual", by="value")),
}

Runs = dict[str, list[dict[str, Any]]]


def trained_claims(context: Context) -> list[Claim]:
    """Trains all arms, a stage each with its seeds side by side, and judges them."""
    with processes(context.choose(smoke=1, small=2, full=1)) as together:
        digits, mnist, patterns = (train_all(context, together) for train_all in (_digits, _mnist, _edges))
    return [
        _confusion_claim(context, digits),
        _budget_claim(context, digits),
        _softmax_claim(context, digits),
        _mnist_claim(context, mnist),
        _residual_claim(context, patterns),
    ]


def _digits(context: Context, together: Together) -> Runs:
    """Two layers of width 32 over one token per pixel. Softmax and InLine run on to the longer budget."""
    few, many = context.choose(smoke=(2, 2), small=(4, 6), full=(20, 20))
    short, long = budget(context)
    images, pair = image_set(context, "digits"), ("linear", "inline")
    shape = {"patch": 1, "width": 32, "layers": 2}

    def arm(name: str) -> list[dict[str, Any]]:
        steps = long if name in ("softmax", "inline + local") else short
        run = partial(trained, name, images, steps=steps, looks=(short,), confusion=True, **shape)
        return together(run, [(seed,) for seed in context.seeds(many if name in pair else few)])

    return _arms(context, "digits", ARMS, arm)


def budget(context: Context) -> tuple[int, int]:
    """The fixed budget and the longer one."""
    return context.choose(smoke=(3, 6), small=(SHORT, LONG), full=(SHORT, 3000))


def _mnist(context: Context, together: Together) -> Runs:
    """Two layers of width 32 over 7 × 7 patches of 4 × 4."""
    seeds = context.seeds(context.choose(smoke=2, small=3, full=20))
    steps = context.choose(smoke=3, small=SHORT, full=3000)
    images = image_set(context, "mnist-5k")

    def arm(name: str) -> list[dict[str, Any]]:
        run = partial(trained, name, images, steps=steps, patch=4, width=32, layers=2)
        return together(run, [(seed,) for seed in seeds])

    return _arms(context, "mnist", ("softmax", "linear", "inline", "inline + local"), arm)


def _edges(context: Context, together: Together) -> Runs:
    """One layer over a grid of 6 × 10 pixels in which only neighbours tell the class."""
    seeds = context.seeds(context.choose(smoke=2, small=4, full=20))
    steps, count = context.choose(smoke=(3, 120), small=(SHORT, 2000), full=(2000, 20_000))
    images = edges(count, context.torch_generator("edges"))

    def arm(name: str) -> list[dict[str, Any]]:
        run = partial(trained, name, images, steps=steps, patch=1, width=32, layers=1)
        return together(run, [(seed,) for seed in seeds])

    return _arms(context, "edges", ("linear", "linear + local", "inline", "inline + local"), arm)


def _arms(context: Context, kind: str, names: Iterable[str], arm: Callable[[str], list[dict[str, Any]]]) -> Runs:
    """Every arm with all its seeds, a stage each."""
    listed = context.track(list(names), f"{kind}: training the arms")
    return {name: context.stage(f"{kind}-{_slug(name)}", partial(arm, name)) for name in listed}


def _slug(name: str) -> str:
    return name.replace(" + ", "-").replace(" ", "-")


def _accuracies(runs: Runs, name: str, step: int | None = None) -> list[float]:
    return [run["accuracy"] if step is None else run["looks"][str(step)] for run in runs[name]]


def _means(context: Context, runs: Runs, step: int | None = None) -> dict[str, Measurement]:
    """The mean accuracy of every arm that has it."""
    known = [name for name in runs if step is None or str(step) in runs[name][0]["looks"]]
    return {
        name: bootstrap(_accuracies(runs, name, step), generator=context.generator(f"mean {name}")) for name in known
    }


def _gain(context: Context, runs: Runs, first: str, second: str, step: int | None = None) -> Measurement:
    return bootstrap_difference(
        _accuracies(runs, first, step),
        _accuracies(runs, second, step),
        paired=True,
        generator=context.generator(f"{first} against {second}"),
    )


def _confusion_claim(context: Context, digits: Runs) -> Claim:
    shares = {
        name: [run["confusion"]["confused"] / max(run["confusion"]["unlike"], 1) for run in runs]
        for name, runs in digits.items()
    }
    random = context.generator("confusion interval")
    return Claim(
        id="confusion",
        statement="In trained classifiers linear attention gives unlike queries the same row more often than InLine.",
        paper=PaperValue("many confused pairs for linear, almost none for softmax and InLine", where="figure 2"),
        measured=bootstrap_difference(shares["linear"], shares["inline"], paired=True, generator=random),
        baseline=bootstrap(shares["inline"], generator=random),
        criterion=TRAINED_CRITERIA["confusion"],
        others={
            "linear_accuracy": bootstrap(_accuracies(digits, "linear"), generator=random),
            **{_slug(name): bootstrap(share, generator=random) for name, share in shares.items()},
        },
        notes="Share of pairs with queries further apart than half their root-mean-square length whose rows differ by "
        f"less than 0.001; both layers, held-out digits. Thresholds are ours. {MORE_SEEDS}",
    )


def _budget_claim(context: Context, digits: Runs) -> Claim:
    step = budget(context)[0]
    means = _means(context, digits, step)
    return Claim(
        id="digits-budget",
        statement="After 300 steps InLine attention classifies digits by 15 points better than linear attention.",
        paper=PaperValue("InLine above linear attention at equal cost", "ImageNet-1K, 300 epochs", "ablation"),
        measured=_gain(context, digits, "inline", "linear", step),
        baseline=means["linear"],
        criterion=TRAINED_CRITERIA["digits-budget"],
        others={_slug(name): mean for name, mean in means.items()},
        notes="One token per pixel, width 32, two layers; no local residual in the two arms of the difference. The "
        f"criterion stands on an earlier run of two seeds on another implementation. {MORE_SEEDS} The claim was "
        "inconclusive in both (0.30, interval from -0.03 to 0.63; 0.25, from 0.11 to 0.42).",
        details={"runs": digits},
    )


def _softmax_claim(context: Context, digits: Runs) -> Claim:
    step = budget(context)[1]
    means = _means(context, digits, step)
    return Claim(
        id="digits-softmax",
        statement="At the longer budget InLine attention with its residual is at most one point below softmax.",
        paper=PaperValue("+0.3 points over PVT, +0.1 over Swin-B", "ImageNet-1K, 300 epochs", "figure of the README"),
        measured=_gain(context, digits, "inline + local", "softmax", step),
        baseline=means["softmax"],
        criterion=TRAINED_CRITERIA["digits-softmax"],
        others={"inline-local": means["inline + local"]},
        notes=NO_ROTATION,
    )


def _mnist_claim(context: Context, runs: Runs) -> Claim:
    means = _means(context, runs)
    return Claim(
        id="mnist",
        statement="On 5,000 images of MNIST InLine attention with its residual is better than linear attention.",
        paper=PaperValue("InLine above linear attention", "ImageNet-1K, 300 epochs", "ablation"),
        measured=_gain(context, runs, "inline + local", "linear"),
        baseline=means["linear"],
        criterion=TRAINED_CRITERIA["mnist"],
        others={
            **{_slug(name): mean for name, mean in means.items()},
            "without_residual": _gain(context, runs, "inline", "linear"),
            "against_softmax": _gain(context, runs, "inline + local", "softmax"),
        },
        notes=NO_ROTATION,
        details={"runs": runs},
    )


def _residual_claim(context: Context, runs: Runs) -> Claim:
    means = _means(context, runs)
    return Claim(
        id="local-residual",
        statement="Where only neighbours tell the class, the local residual makes InLine attention better.",
        paper=PaperValue("the residual adds to InLine and to linear attention", "ImageNet-1K", "ablation"),
        measured=_gain(context, runs, "inline + local", "inline"),
        baseline=means["inline"],
        criterion=TRAINED_CRITERIA["local-residual"],
        others={
            "with_residual": means["inline + local"],
            "linear": means["linear"],
            "linear-local": means["linear + local"],
            "gain_of_linear": _gain(context, runs, "linear + local", "linear"),
        },
        notes="Made images of 6 × 10 pixels, equally bright, with one of four patterns anywhere; chance is 0.25.",
        details={"runs": runs},
    )
