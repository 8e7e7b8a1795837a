"""StreamingLLM on a trained model and real text: what sinks rescue, what they cost, and models trained here.

The small size scores text within the model's positions with caches of 128 to 512 tokens, text beyond them with 1,024,
and measures time and memory along a stream of 14,336 tokens; 200,000 tokens are a job of `benchmarks/streaming.py`, and
the paper streams four million.

Paper: Efficient Streaming Language Models with Attention Sinks, arXiv 2309.17453.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch

from headway.evidence.claims import Claim, PaperValue
from headway.evidence.criteria import all_of, at_least, at_most
from headway.evidence.recipe import Context, Recipe
from headway.evidence.recipes import _streaming_cost as cost
from headway.evidence.recipes import _streaming_text as reading
from headway.evidence.recipes._long_text import no_gpu
from headway.evidence.recipes._streaming_bytes import BYTE_CRITERIA, Bytes, arms_of, byte_claims
from headway.evidence.recipes._streaming_host import Host, Settings
from headway.statistics import Measurement, bootstrap
from headway.tasks.trigger_averaging import (
    EVALUATION,
    HEAD_DIM,
    TriggerAttention,
    data_generators,
    train,
    trigger_batch,
)

#: Window of the planted layer, in items.
PLANTED_WINDOW = 6

CRITERIA = {
    **reading.TEXT_CRITERIA,
    **cost.COST_CRITERIA,
    "planted-sink": all_of(
        at_least(100, minimum_n=3, label="error of the window ÷ of full attention"),
        at_most(3, of="with_sink", label="error of sink and window ÷ of full attention"),
    ),
    **BYTE_CRITERIA,
}

SMOKE = Settings(
    model="tiny", capacity=24, capacities=(12, 24, 48), window=24, tokens=240, skip=48, documents=2, document=112,
    run=8, long_capacity=24, long=400, chunk=40, beyond=128, beyond_scored=64, recomputations=2, planted_steps=20,
    bytes=Bytes(layers=1, width=32, length=16, steps=4, held_out=400, every=16),
)  # fmt: skip
SMALL = Settings(
    model="smollm2", capacity=256, capacities=(128, 256, 512), window=512, tokens=2560, skip=512, documents=4,
    document=1024, run=16, long_capacity=1024, long=14_336, chunk=512, beyond=8192, beyond_scored=1280,
    recomputations=5, planted_steps=3000, workers=2,
    bytes=Bytes(layers=4, width=128, length=128, steps=240, held_out=8192 + 256, every=4),
)  # fmt: skip
FULL = Settings(
    model="meta-llama/Llama-2-13b-hf", capacity=1024, capacities=(256, 512, 1024, 2048), window=1024, tokens=65_000,
    skip=2048, documents=20, document=8192, run=1, long_capacity=1024, long=4_000_000, chunk=1024, beyond=4096,
    beyond_scored=60_904, recomputations=50, planted_steps=3000,
    bytes=Bytes(layers=8, width=512, length=512, steps=20_000, held_out=32_768, every=4),
)  # fmt: skip


def run(context: Context) -> list[Claim]:
    settings = context.choose(smoke=SMOKE, small=SMALL, full=FULL)
    host = Host(settings)
    text = {arm: context.stage(f"sinks-{arm}", partial(reading.by_sinks, host, arm)) for arm in reading.BY_SINKS}
    window = {
        arm: context.stage(f"window-{arm.replace(' ', '-')}", partial(reading.by_window, host, arm))
        for arm in reading.BY_WINDOW
    }
    far = {
        arm: context.stage(f"beyond-{arm}", partial(reading.beyond, host, arm)) for arm in ("dense", "alone", "sinks")
    }
    again = [
        context.stage(f"document-{number}", partial(reading.recomputation, host, number))
        for number in range(settings.documents)
    ]
    sink_share = context.stage("sink-rate", lambda: reading.sink_rate(host))
    fast = context.stage("speed", lambda: cost.speed(host, settings.long_capacity))
    sizes = {
        str(capacity): context.stage(f"cache-{capacity}", partial(cost.by_capacity, host, capacity))
        for capacity in settings.capacities
    }
    long = context.stage("long-stream", lambda: cost.long_stream(context, host))
    turned = context.stage("rotations", lambda: cost.rotations(host))
    planted = context.stage("planted", partial(_planted, context, settings.planted_steps))
    arms = context.stage("byte-models", partial(arms_of, context, settings.bytes, settings.workers))
    return [
        *reading.text_claims(context, settings, text, window, far, again, sink_share),
        *cost.cost_claims(context, settings, fast, sizes, long, turned),
        _planted_claim(context, planted),
        *byte_claims(context, settings.bytes, arms),
    ]


def _planted(context: Context, steps: int) -> dict[str, list[float]]:
    """Mean squared error at unflagged items beyond the window, one number per seed.

    A softmax head that must say nothing at such items can only do so through item 0."""
    seeds = context.seeds(3)
    model = TriggerAttention(seeds)
    generators = data_generators(seeds)
    train(model, generators, steps=steps)
    batch = trigger_batch(generators, EVALUATION)
    items = batch.inputs.shape[2]
    row, column = torch.arange(items)[:, None], torch.arange(items)
    causal, near = column <= row, row - column < PLANTED_WINDOW
    masks = {"full": causal, "window": causal & near, "sink": causal & (near | (column == 0))}
    beyond = ~batch.flags & (torch.arange(items) >= PLANTED_WINDOW)
    found = {}
    with torch.no_grad():
        query, key, value = (model.project(name, batch.inputs) for name in ("query", "key", "value"))
        scores = query @ key.transpose(-1, -2) * HEAD_DIM**-0.5
        for name, mask in masks.items():
            output = model.project("output", scores.masked_fill(~mask, -torch.inf).softmax(-1) @ value)
            error = (output - batch.targets).square().mean(-1)
            found[name] = ((error * beyond).sum((1, 2)) / beyond.sum((1, 2))).tolist()
    return found


def _planted_claim(context: Context, planted: dict[str, list[float]]) -> Claim:
    def ratio(name: str) -> Measurement:
        pairs = [a / b for a, b in zip(planted[name], planted["full"], strict=True)]
        return bootstrap(pairs, generator=context.generator(name), unit="×")

    return Claim(
        id="planted-sink",
        statement="A head that has learned to be silent through its first item fails without it, and only then.",
        paper=PaperValue(
            "no such experiment", "trigger-conditional averaging, 16 items, a window of 6", "planted here"
        ),
        measured=ratio("window"),
        criterion=CRITERIA["planted-sink"],
        others={"with_sink": ratio("sink")},
        notes="An earlier check of this toy, with the same criterion in mind, gave errors of 0.27, 9e-6 and 1.7e-5.",
        details={"error by seed": planted},
    )


def _plots(context: Context, claims: Sequence[Claim]) -> None:
    import plotly.graph_objects as go

    found = next(claim for claim in claims if claim.id == "flat-step-time")
    figure = go.Figure(go.Scatter(x=found.details["places"], y=found.details["seconds"], mode="lines+markers"))
    figure.update_layout(title="Seconds of a step", xaxis_title="tokens streamed", yaxis_title="seconds")
    figure.update_yaxes(rangemode="tozero")
    context.save_plot(figure, "step-time")


RECIPE = Recipe(
    slug="streaming-llm",
    title="Efficient Streaming Language Models with Attention Sinks",
    run=run,
    criteria=CRITERIA,
    plots=_plots,
    obstacle=no_gpu,
)
