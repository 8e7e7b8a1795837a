"""PowerAttention: exact reach, gradients, recall after a short fine-tune, an untrained real model, and cost.

Reach is checked two ways that share nothing: hop numbers on the mask, and gradients of a random transformer under it.
Recall is the pass-key task on a small language model trained here: trained dense, then fine-tuned for a few steps with
the mask or with another pattern of the same out-degree (window, dilated, stride, segments), from the same weights on
the same data. A pass-key further back than layers · (window − 1) tokens is out of a window's reach whatever it learns.

Paper: PowerAttention, arXiv 2503.03588. Its models (Qwen2-7B, 32k tokens and more) need a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from headway.door import use
from headway.door.stages import Selector
from headway.evidence.claims import Claim, PaperValue
from headway.evidence.criteria import all_of, at_least, at_most, between, interval_excludes
from headway.evidence.recipe import Context, Recipe
from headway.evidence.recipes._power_length import length_claim, long_toys
from headway.evidence.recipes._power_reach import (
    SinkWindow,
    cost_claim,
    hops_claim,
    long_reach_claim,
    measure_cost,
    measure_gradients,
    measure_hops,
    measure_long_reach,
    popcount_claim,
    reach_claim,
    tiny_lm,
)
from headway.evidence.recipes._power_times import measure_times, times_claim
from headway.evidence.recipes._power_toys import (
    CHANCE,
    DEGREE,
    LAYERS,
    OTHERS,
    TOKENS,
    WINDOW_REACH,
    byte_models,
    dense_recall,
    graph_claim,
    patterns_claim,
    toy_values,
    toys,
)
from headway.methods.long_context.power_attention import PowerAttention, key_blocks
from headway.statistics import Measurement, bootstrap, bootstrap_difference

#: On the real model: 16 tokens a block, so that 640 tokens have 40 blocks.
REAL = PowerAttention(block=16, window=5, sink=1)

CRITERIA = {
    "hops": at_most(0, minimum_n=8, label="numbers that differ"),
    "popcount": at_most(0, minimum_n=255, label="distances that take another number of hops"),
    "reach": at_most(0, minimum_n=100, label="tokens on the wrong side"),
    "long-reach": all_of(
        at_most(0, minimum_n=30_000, label="tokens on the wrong side"),
        at_least(1, of="power", label="share of tokens that the mask reaches"),
        at_most(0.9999, of="less", label="with one layer less"),
        at_most(0.5, of="window", label="a window's share"),
    ),
    "recall": all_of(
        at_least(0.9, label="recall beyond a window's reach"),
        at_most(CHANCE + 0.15, of="baseline", label="recall of the window"),
        interval_excludes(0, of="difference", side="above", minimum_n=3),
        requires=at_least(0.9, of="dense", label="recall of the dense model"),
    ),
    "static-patterns": all_of(
        *(
            interval_excludes(0, of=f"over_{name}", side="above", minimum_n=3, label=f"far recall over {name}")
            for name in OTHERS
        ),
        requires=at_least(0.9, of="dense", label="recall of the dense model"),
    ),
    "recall-follows-graph": all_of(
        at_most(CHANCE + 0.15, minimum_n=3, label="recall where no path leads, any pattern"),
        at_least(0.9, of="power", label="recall of the mask where a path leads"),
        requires=at_least(0.9, of="dense", label="recall of the dense model"),
    ),
    "recall-at-length": all_of(
        at_least(0.9, minimum_n=3, label="recall beyond a window's reach, where a path leads"),
        at_most(CHANCE + 0.15, of="no_path", minimum_n=3, label="where none leads"),
        at_most(CHANCE + 0.15, of="baseline", minimum_n=3, label="recall of the window"),
        requires=at_least(0.9, of="dense", by="value", label="recall of the dense model"),
    ),
    "fine-tuning": interval_excludes(
        0, side="above", minimum_n=3, requires=at_least(0.9, of="dense", label="recall of the dense model")
    ),
    "probe": all_of(
        at_least(0.9, label="probe of the last layer"),
        interval_excludes(0, of="difference", side="above", minimum_n=3),
    ),
    "text": at_most(0.05, minimum_n=3, label="nats lost to a window"),
    "untrained-perplexity": interval_excludes(0, side="above", minimum_n=10),
    "untrained-needle": interval_excludes(0, side="above", minimum_n=6),
    "cost": at_most(0.05, minimum_n=4, label="relative error of the growth"),
    "time-growth": all_of(
        between(0.75, 1.25, minimum_n=5, label="growth of time ÷ growth of pairs read"),
        between(3.0, 5.0, of="dense", minimum_n=5, label="growth of dense attention's time"),
    ),
}


def run(context: Context) -> list[Claim]:
    hops = context.stage("hops", lambda: measure_hops(context))
    found = toys(context)
    real = context.stage("real", lambda: _real(context))
    return [
        hops_claim(hops, CRITERIA["hops"]),
        popcount_claim(hops, CRITERIA["popcount"]),
        reach_claim(context.stage("reach", lambda: measure_gradients(context)), CRITERIA["reach"]),
        long_reach_claim(context.stage("long-reach", lambda: measure_long_reach(context)), CRITERIA["long-reach"]),
        _recall_claim(context, found),
        patterns_claim(context, found, CRITERIA["static-patterns"]),
        graph_claim(context, found, CRITERIA["recall-follows-graph"]),
        length_claim(context, long_toys(context), CRITERIA["recall-at-length"]),
        _tuning_claim(context, found),
        _probe_claim(context, found),
        _text_claim(context, context.stage("text", lambda: byte_models(context))),
        _perplexity_claim(context, real),
        _needle_claim(context, real),
        cost_claim(context.stage("cost", lambda: measure_cost(context)), CRITERIA["cost"]),
        times_claim(context, context.stage("times", lambda: measure_times(context)), CRITERIA["time-growth"]),
    ]


def _real(context: Context) -> dict[str, Any]:
    """A trained model with the mask put in as it is: perplexity of text, and how surely it gives a planted value."""
    from headway.hosts import default_text
    from headway.tasks.needle import needle_grid, planted_score
    from headway.tasks.perplexity import perplexity

    model, tokenizer, ids = _host(context)
    degree = len(key_blocks(-(-ids[0].shape[1] // REAL.block) - 1)) - 1
    methods: dict[str, Selector | None] = {
        "dense": None,
        "power": REAL,
        "window": SinkWindow(sinks=REAL.block, window=degree * REAL.block),
    }
    blocks: dict[str, list[float]] = {name: [] for name in methods}
    density: dict[str, float] = {}
    for name, method in methods.items():
        for text in context.track(ids, f"perplexity, {name}"):
            scope = nullcontext() if method is None else use(model, method)
            with scope as handle:
                found = perplexity(model, text, chunk=text.shape[1])
            if handle is not None:
                density[name] = float(np.mean([row["density"] for row in handle.report()]))
            blocks[name] += found.block_means(32).tolist()
    needles: dict[str, list[float]] = {name: [] for name in methods}
    if tokenizer is None:
        return {"model": "tiny", "blocks": blocks, "density": density, "needles": needles, "depths": []}
    length, depths, repeats = context.choose(small=(640, (10, 30, 50), 4), full=(4096, tuple(range(0, 70, 10)), 5))
    samples = list(needle_grid(tokenizer, [length], depths=depths, text=default_text().text, repeats=repeats))
    for name, method in methods.items():
        with nullcontext() if method is None else use(model, method):
            for sample in context.track(samples, f"needles, {name}"):
                needles[name].append(planted_score(model, tokenizer, sample, question_aware=True).mean_nll)
    depths_of = [sample.meta["depth"] for sample in samples]
    return {"model": "smollm2", "blocks": blocks, "density": density, "needles": needles, "depths": depths_of}


def _host(context: Context) -> tuple[nn.Module, Any, list[Tensor]]:
    """The model, its tokenizer and texts; a tiny random one, without a tokenizer, to see that the measurement runs."""
    texts, tokens = context.choose(smoke=(1, 192), small=(2, 640), full=(8, 4096))
    if context.size == "smoke":
        model = tiny_lm(0, vocabulary=64, tokens=tokens, layers=2)
        ids = torch.randint(64, (texts, tokens), generator=context.torch_generator("tiny text"))
        return model.eval(), None, list(ids[:, None])
    from headway.hosts import default_text, load, tokenize

    model, tokenizer = load("smollm2", device="cuda" if context.size == "full" else "cpu")
    whole = tokenize(tokenizer, default_text(), 3 * texts * tokens)
    starts = [3 * tokens * number for number in range(texts)]
    return model, tokenizer, [whole[:, start : start + tokens] for start in starts]


def _recall_claim(context: Context, toys: Sequence[dict[str, Any]]) -> Claim:
    random = context.generator("recall interval")
    power, window = (toy_values(toys, name, "after") for name in ("power", "window"))
    seeds = [toy["seed"] for toy in toys]
    return Claim(
        id="recall",
        statement="After the same short fine-tune the mask recalls pass-keys that a window of equal degree cannot.",
        paper=PaperValue("5 to 40 % better than static patterns", "Qwen2-7B, pass-key and RULER", "abstract"),
        measured=bootstrap(power, generator=random, seeds=seeds),
        baseline=bootstrap(window, generator=random, seeds=seeds),
        criterion=CRITERIA["recall"],
        others={
            "difference": bootstrap_difference(power, window, paired=True, generator=random, seeds=seeds),
            "dense": dense_recall(context, toys),
        },
        notes=f"{TOKENS} tokens, {LAYERS} layers, {DEGREE} keys and a sink per row; pass-keys more than {WINDOW_REACH} "
        f"tokens back; chance is {CHANCE}. Steps and sizes of the toy come from pilot runs on other seeds, made before "
        "this criterion was written, in which dense attention and the mask learned the task and the window did not.",
        details={"by seed": list(toys)},
    )


def _tuning_claim(context: Context, toys: Sequence[dict[str, Any]]) -> Claim:
    before, after = (toy_values(toys, "power", when) for when in ("before", "after"))
    return Claim(
        id="fine-tuning",
        statement="The mask needs light training: put into a model that was trained dense, it loses far recall, and a "
        "short fine-tune brings it back.",
        paper=PaperValue("probe 0.56 untrained, 1.00 trained", "16k tokens, last layer, last block", "section 4.6"),
        measured=bootstrap_difference(
            after, before, paired=True, generator=context.generator("tuning"), seeds=[toy["seed"] for toy in toys]
        ),
        criterion=CRITERIA["fine-tuning"],
        others={"dense": dense_recall(context, toys)},
        details={"before": before, "after": after, "window before": toy_values(toys, "window", "before")},
    )  # fmt: skip


def _probe_claim(context: Context, toys: Sequence[dict[str, Any]]) -> Claim:
    random = context.generator("probe interval")
    layers = {name: np.array([toy[name]["probe"]["far"] for toy in toys]) for name in ("power", "window")}
    power, window = (layers[name][:, -1] for name in ("power", "window"))
    return Claim(
        id="probe",
        statement="After the last layer the last token holds far pass-keys under the mask and not under a window.",
        paper=PaperValue("power 1.00, window 0.37, full 1.00", "post-trained, 6 pass-keys, 16k tokens", "section 4.6"),
        measured=bootstrap(power, generator=random),
        baseline=bootstrap(window, generator=random),
        criterion=CRITERIA["probe"],
        others={"difference": bootstrap_difference(power, window, paired=True, generator=random)},
        notes="A linear probe of the hidden state; by layer in the details, the embedding first.",
        details={"by layer": {name: values.mean(0).tolist() for name, values in layers.items()}},
    )


def _text_claim(context: Context, found: Sequence[dict[str, float]]) -> Claim:
    power, window = ([row[name] for row in found] for name in ("power", "window"))
    random = context.generator("text interval")
    return Claim(
        id="text",
        statement="On natural text the mask, trained briefly, loses next to nothing to a window of equal degree.",
        paper=PaperValue("perplexity tables not seen", "PG19, 4k to 32k", "experiments"),
        measured=bootstrap_difference(power, window, paired=True, generator=random, unit="nats"),
        baseline=bootstrap(window, generator=random, unit="nats"),
        criterion=CRITERIA["text"],
        notes="Byte models from scratch, same initial weights and data; held-out text; 4 tokens a block.",
        details={"by seed": list(found)},
    )


def _perplexity_claim(context: Context, found: dict[str, Any]) -> Claim:
    random = context.generator("perplexity interval")
    dense, power, window = (found["blocks"][name] for name in ("dense", "power", "window"))
    return Claim(
        id="untrained-perplexity",
        statement="Put into a trained model without training, the mask costs perplexity.",
        paper=PaperValue("probe 0.56 without training against 1.00", "Qwen2-7B", "section 4.6"),
        measured=bootstrap_difference(power, dense, paired=True, generator=random, unit="nats"),
        criterion=CRITERIA["untrained-perplexity"],
        others={
            "window_minus_dense": bootstrap_difference(window, dense, paired=True, generator=random, unit="nats"),
            "power_minus_window": bootstrap_difference(power, window, paired=True, generator=random, unit="nats"),
        },
        notes="Mean nll of blocks of 32 tokens, which are taken as the units. "
        f"Mask: {REAL.window} blocks of {REAL.block}, sink block and powers; the window has the same degree.",
        details={
            "model": found["model"],
            "density": found["density"],
            "perplexity": {name: math.exp(float(np.mean(v))) for name, v in found["blocks"].items()},
        },
    )


def _needle_claim(context: Context, found: dict[str, Any]) -> Claim:
    random = context.generator("needle interval")
    power, window = (found["needles"][name] for name in ("power", "window"))
    measured = (
        bootstrap_difference(window, power, paired=True, generator=random, unit="nats")
        if power
        else Measurement(math.nan, n=0, unit="nats")
    )
    return Claim(
        id="untrained-needle",
        statement="Already without training a far needle is easier to give back with the mask than with a window.",
        paper=PaperValue("probe 0.56 against 0.48", "Qwen2-7B, untrained, last layer, last block", "section 4.6"),
        measured=measured,
        criterion=CRITERIA["untrained-needle"],
        notes="Difference of the mean nll of the value's tokens, window minus mask; prefill and decoding both sparse.",
        details={"model": found["model"], "nll": found["needles"], "depths": found["depths"]},
    )


def _plots(context: Context, claims: Sequence[Claim]) -> None:
    import plotly.graph_objects as go

    layers = cast(dict[str, list[float]], next(c for c in claims if c.id == "probe").details["by layer"])
    figure = go.Figure([go.Scatter(y=values, name=name, mode="lines+markers") for name, values in layers.items()])
    figure.update_layout(title="Far pass-keys in the last token", xaxis_title="layer", yaxis_title="probe accuracy")
    context.save_plot(figure, "probe")


def _obstacle(size: str) -> str | None:
    if size == "full" and not torch.cuda.is_available():
        return "it trains and runs models on 4,096 tokens and more and there is no GPU. Run --size small."
    return None


RECIPE = Recipe(
    slug="power-attention",
    title="PowerAttention: Exponentially Scaling of Receptive Fields for Effective Sparse Attention",
    run=run,
    criteria=CRITERIA,
    plots=_plots,
    obstacle=_obstacle,
)
