"""Lightning attention and TNL: cost by length, memory, decoding, and language models beside softmax and without parts.

Times are those of this machine, both sides in the same run. The language models are small and read bytes; each claim on
them is paired over seeds and waits for the softmax model to have learned more than the frequencies of bytes.

Paper: Various Lengths, Constant Speed: Efficient Language Modeling with Lightning Attention, arXiv 2405.17381.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from headway.evidence.claims import Claim, PaperValue
from headway.evidence.criteria import all_of, at_least, at_most, between, equals, interval_excludes
from headway.evidence.recipe import Context, Recipe
from headway.evidence.recipes import _lightning_costs as costs
from headway.evidence.recipes import _lightning_text as text
from headway.statistics import Measurement, bootstrap, bootstrap_difference, bootstrap_ratio

#: A softmax model that stays above this share of the unigram cross-entropy has not learned to read.
LEARNED = 0.9
_READS = at_most(LEARNED, of="softmax share", label="loss of softmax / unigram cross-entropy")

CRITERIA = {
    "flat": all_of(
        between(-0.15, 0.15, label="slope of log time per token on log length"),
        at_least(0.6, of="softmax", label="the same slope of softmax"),
    ),
    "steady": at_most(1.1 / 0.9, label="highest / lowest tokens per second"),
    "ratio": at_least(30.0, label="time of softmax / lightning"),
    "backward": at_least(6.3, label="time of softmax / lightning"),
    "training": between(-0.15, 0.15, label="slope of log time per token on log length"),
    "decode-bytes": equals(0.0, 0.0, label="bytes of the cache far − near"),
    "decode-time": between(0.8, 1.25, label="time per token far / near"),
    "memory": all_of(
        at_most(0.1, label="bytes kept, blocks / running sum"),
        at_most(1.05, of="growth", label="bytes kept per token at twice the length"),
    ),
    "language": at_most(0.05, label="loss of TNL − softmax", requires=_READS),
    "linear": interval_excludes(0.0, side="above", requires=_READS),
    "gate": interval_excludes(0.0, side="above", requires=_READS),
    "decay": interval_excludes(0.0, side="above", requires=_READS),
}

SEEN = (
    "Times at 16,384 tokens were known, from a loaded machine, when the recipe was written; the criterion is a number "
    "of the paper or of the task the kernel was written for."
)


def run(context: Context) -> list[Claim]:
    forward = context.stage("forward", lambda: costs.forward(context))
    both = context.stage("backward", lambda: costs.both_ways(context))
    training = context.stage("training", lambda: costs.training(context))
    decoding = context.stage("decoding", lambda: costs.decoding(context))
    memory = context.stage("memory", lambda: costs.memory(context))
    languages = text.languages(context)
    return [
        *_forward_claims(context, forward),
        _backward_claim(context, both),
        _training_claim(context, training),
        *_decoding_claims(context, decoding),
        _memory_claim(memory),
        *_language_claims(context, languages),
    ]


def slopes(lengths: list[int], times: list[list[float]]) -> list[float]:
    """Slope of log(time per token) on log(length), repeat by repeat: 0 at constant speed, 1 for quadratic time."""
    per_token = np.log(np.asarray(times) / np.asarray(lengths)[: len(times), None])
    return [float(s) for s in np.polyfit(np.log(lengths[: len(times)]), per_token, 1)[0]]


def _slope(context: Context, name: str, lengths: list[int], times: list[list[float]]) -> Measurement:
    return bootstrap(slopes(lengths, times), generator=context.generator(f"slope {name}"), statistic="median")


def _forward_claims(context: Context, found: dict[str, Any]) -> list[Claim]:
    lengths, lightning, softmax = found["lengths"], found["lightning"], found["softmax"]
    medians = {name: [float(np.median(t)) for t in found[name]] for name in ("lightning", "softmax")}
    times = medians["lightning"]
    speeds = [n / t for n, t in zip(lengths, times, strict=True)]
    asked = max(i for i, n in enumerate(lengths) if n <= costs.LONG)
    pairs = min(len(lightning[asked]), len(softmax[asked]))
    ratio = bootstrap_ratio(
        softmax[asked][:pairs],
        lightning[asked][:pairs],
        paired=False,
        generator=context.generator("ratio"),
        statistic="median",
    )
    details = {
        "shape": f"1 × {costs.HEADS} heads × tokens × {costs.DIM}, float32",
        "lengths": lengths,
        "milliseconds": medians,
        "softmax / lightning": [s / t for s, t in zip(medians["softmax"], medians["lightning"], strict=False)],
    }
    return [
        Claim(
            id="flat",
            statement="The time per token of lightning attention does not depend on the length, that of softmax grows.",
            paper=PaperValue(
                "0.35 → 17.7 ms, FlashAttention-2 0.094 → 162.9 ms",
                "forward, 512 → 32,768 tokens, batch 4, 32 heads of 128, bfloat16, A100",
                "table of the released code",
            ),
            measured=_slope(context, "lightning", lengths, lightning),
            others={"softmax": _slope(context, "softmax", lengths, softmax)},
            criterion=CRITERIA["flat"],
            details=details,
        ),
        Claim(
            id="steady",
            statement="At all lengths its tokens per second stay within a tenth of their middle.",
            paper=PaperValue(
                "flat", "training speed of models of 1 and 3 billion, 1K to 128K tokens, A100", "figure 1"
            ),
            measured=Measurement(max(speeds) / min(speeds), n=len(speeds), unit="×"),
            criterion=CRITERIA["steady"],
            notes="The heads are few, so the part of a call that does not depend on its length weighs most here: a "
            f"straight line through the times leaves {_constant_part(lengths, times):.2f} ms of it, beside "
            f"{times[0]:.2f} ms for a whole call of {lengths[0]:,} tokens.",
            details={"lengths": lengths, "tokens per ms": speeds},
        ),
        Claim(
            id="ratio",
            statement=f"A forward pass over {lengths[asked]:,} tokens takes 1/30 of the time of softmax or less.",
            paper=PaperValue("162.9 ms / 17.7 ms = 9.2", "32,768 tokens, A100", "table of the released code"),
            measured=ratio,
            criterion=CRITERIA["ratio"],
            notes=SEEN,
            details=details,
        ),
    ]


def _constant_part(lengths: list[int], milliseconds: list[float]) -> float:
    """Where a straight line through the times meets length zero; every time counts relative to its size."""
    return float(np.polynomial.Polynomial.fit(lengths, milliseconds, 1, w=1 / np.array(milliseconds)).convert().coef[0])


def _backward_claim(context: Context, found: dict[str, Any]) -> Claim:
    return Claim(
        id="backward",
        statement=f"Forward and backward pass over {found['tokens']:,} tokens gain at least what the paper's do.",
        paper=PaperValue(
            "470.7 ms / 74.6 ms = 6.3", "backward alone, 32,768 tokens, A100", "table of the released code"
        ),
        measured=bootstrap_ratio(
            found["softmax"],
            found["lightning"],
            paired=True,
            generator=context.generator("backward"),
            statistic="median",
        ),
        criterion=CRITERIA["backward"],
        notes=SEEN,
        details={name: found[name] for name in ("tokens", "lightning", "softmax")},
    )


def _training_claim(context: Context, found: dict[str, Any]) -> Claim:
    return Claim(
        id="training",
        statement="A training step of a whole TNL costs the same per token at every length.",
        paper=PaperValue(
            "flat", "1K to 128K tokens, beside a rapid decline of LLaMA with FlashAttention-2", "figure 1"
        ),
        measured=_slope(context, "training", found["lengths"], found["lightning"]),
        baseline=_slope(context, "training softmax", found["lengths"], found["softmax"]),
        criterion=CRITERIA["training"],
        notes="Small steps cost more per token, for what a step does besides tokens is shared by fewer of them: a "
        "negative slope is that share. One run of each length is the unit of the interval.",
        details={
            "lengths": found["lengths"],
            "milliseconds": {n: [float(np.median(t)) for t in found[n]] for n in ("lightning", "softmax")},
        },
    )


def _decoding_claims(context: Context, found: dict[str, Any]) -> list[Claim]:
    near, far = found["near"], found["far"]
    ours, theirs = found["lightning"], found["softmax"]
    paper = PaperValue("2819.6 tokens/s, up to 11 times as fast", "7 billion, prompt of 512, 1024 new", "section 5")
    return [
        Claim(
            id="decode-bytes",
            statement=f"The cache takes the same bytes behind {far:,} tokens as behind {near}.",
            paper=paper,
            measured=Measurement(ours["bytes"][1] - ours["bytes"][0], unit="bytes"),
            baseline=Measurement(theirs["bytes"][1] - theirs["bytes"][0], unit="bytes"),
            criterion=CRITERIA["decode-bytes"],
            details={"lightning": ours["bytes"], "softmax": theirs["bytes"]},
        ),
        Claim(
            id="decode-time",
            statement=f"A token takes as long behind {far:,} tokens as behind {near}.",
            paper=paper,
            measured=_far_over_near(context, "lightning", ours),
            baseline=_far_over_near(context, "softmax", theirs),
            criterion=CRITERIA["decode-time"],
            notes="A step takes about a millisecond, most of it calls of small products; one pair of runs is the unit.",
            details={"lightning": ours, "softmax": theirs},
        ),
    ]


def _far_over_near(context: Context, name: str, found: dict[str, Any]) -> Measurement:
    generator = context.generator(f"decoding {name}")
    return bootstrap_ratio(found["far"], found["near"], paired=True, generator=generator, statistic="median")


def _memory_claim(found: dict[str, Any]) -> Claim:
    blocks, cumulative = found["blocks"], found["cumulative"]
    return Claim(
        id="memory",
        statement="Training by blocks keeps memory of the order n·d, a running sum over tokens keeps n·d².",
        paper=PaperValue("O(nd + d²)", "", "section 3"),
        measured=Measurement(blocks[-1] / cumulative[-1], unit="×"),
        others={"growth": Measurement(blocks[1] / blocks[0], unit="×")},
        criterion=CRITERIA["memory"],
        details={"tokens": found["tokens"], "bytes per token": {"blocks": blocks, "running sum": cumulative}},
    )


def _language_claims(context: Context, found: dict[str, Any]) -> list[Claim]:
    seeds = found["seeds"]
    share = bootstrap(
        [loss / found["unigram"] for loss in found["softmax"]], generator=context.generator("share"), seeds=seeds
    )
    details = {arm: found[arm] for arm in text.ARMS} | {
        name: found[name] for name in ("unigram", "parameters", "steps")
    }

    def claim(name: str, first: str, second: str, statement: str, paper: PaperValue) -> Claim:
        return Claim(
            id=name,
            statement=statement,
            paper=paper,
            measured=bootstrap_difference(
                found[first],
                found[second],
                paired=True,
                generator=context.generator(f"language {name}"),
                unit="nats per byte",
                seeds=seeds,
            ),
            others={"softmax share": share},
            criterion=CRITERIA[name],
            notes="Byte-level models of a few hundred thousand weights, trained for a few hundred steps on one text.",
            details=details,
        )

    ablation = "385M weights, loss after 100,000 updates"
    return [
        claim(
            "language",
            "tnl",
            "softmax",
            "A TNL reads held-out text no worse than a softmax model of its size (within 0.05 nats).",
            PaperValue("23.46 / 24.03 and 24.40 / 24.78 perplexity", "WikiText-103, about 45M weights", "table 1"),
        ),
        claim(
            "linear",
            "linear",
            "tnl",
            "Linear attention with 1 + elu, without decay and gate, reads it worse than a TNL.",
            PaperValue("27.44 / 28.05 against 23.46 / 24.03 perplexity", "WikiText-103, about 45M weights", "table 1"),
        ),
        claim(
            "gate",
            "no gate",
            "tnl",
            "Without the gate a TNL of the same size reads it worse.",
            PaperValue("2.263 against 2.248", ablation, "ablation of the gate"),
        ),
        claim(
            "decay",
            "no decay",
            "tnl",
            "Without decay a TNL reads it worse.",
            PaperValue("2.287 (LRPE alone) against 2.236 (LRPE-d)", ablation, "ablation of positions"),
        ),
    ]


RECIPE = Recipe(
    slug="lightning-attention",
    title="Lightning attention: one speed at every length",
    run=run,
    criteria=CRITERIA,
)
