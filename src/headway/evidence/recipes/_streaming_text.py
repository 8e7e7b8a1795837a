"""Perplexities of StreamingLLM on a trained model and real text: what sinks rescue, and beside recomputation.

All perplexities of one claim are of the same tokens, read by the same model in one run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from headway.door.attach import use
from headway.door.capture import capture
from headway.evidence.claims import Claim, PaperValue
from headway.evidence.criteria import at_least, at_most
from headway.evidence.recipe import Context
from headway.evidence.recipes._long_text import perplexity_of, perplexity_ratio
from headway.evidence.recipes._streaming_host import DEFAULT_SINKS, SINKS, Host, Settings, conditions, policy
from headway.methods.sinks.streaming_llm import StreamingLLM, streaming_perplexity
from headway.statistics import Measurement, bootstrap_difference
from headway.tasks.perplexity import perplexity, recompute_perplexity

TEXT_CRITERIA = {
    "sinks-rescue-window": at_least(10, minimum_n=16, label="PPL of a window alone ÷ with four sinks"),
    "sinks-rescue-window-512": at_least(1.1, minimum_n=16, label="PPL of a window alone ÷ with four sinks"),
    "matches-recomputation": at_most(1.02, minimum_n=96, label="PPL ÷ that of recomputation"),
    "four-sinks-suffice": at_most(1.02, minimum_n=16, label="PPL with four sinks ÷ with eight"),
    "position-not-meaning": at_most(1.05, minimum_n=16, label="PPL with four line breaks ÷ with the first tokens"),
}


#: Ways to read the text with the usual cache: dense, by the number of sinks, and with line breaks in their place.
BY_SINKS = ("dense", *map(str, SINKS), "newlines")
#: Ways to read it with a longer window, within the model's positions.
BY_WINDOW: dict[str, dict[str, Any]] = {
    "alone": {"sinks": 0},
    "sinks": {"sinks": DEFAULT_SINKS},
    "positions of the text": {"sinks": DEFAULT_SINKS, "positions": "text"},
}


def by_sinks(host: Host, arm: str) -> list[float]:
    """Per-token nll from `skip` on, in one of the ways of BY_SINKS."""
    settings = host.settings
    model, ids, newline = host.get()
    if arm == "dense":
        return perplexity(model, ids, skip=settings.skip).nll.tolist()
    if arm == "newlines":
        ids = ids.clone()
        ids[0, :DEFAULT_SINKS] = newline
    sinks = DEFAULT_SINKS if arm == "newlines" else int(arm)
    return streaming_perplexity(
        model, ids, chunk=settings.capacity, skip=settings.skip, **policy(settings.capacity, sinks)
    ).nll.tolist()


def by_window(host: Host, arm: str) -> list[float]:
    """The same in one of the ways of BY_WINDOW."""
    settings = host.settings
    model, ids, _ = host.get()
    return streaming_perplexity(
        model, ids[:, : settings.beyond], chunk=settings.window, skip=settings.skip, window=settings.window,
        **BY_WINDOW[arm],
    ).nll.tolist()  # fmt: skip


def beyond(host: Host, arm: str) -> list[float]:
    """Per-token nll behind the model's own positions: "dense", or with `long_capacity` "alone" or with "sinks"."""
    settings = host.settings
    model, ids, _ = host.get_long()
    ids = ids[:, : settings.beyond + settings.beyond_scored]
    if arm == "dense":
        return perplexity(model, ids, chunk=settings.chunk, skip=settings.beyond).nll.tolist()
    sinks = {"alone": 0, "sinks": DEFAULT_SINKS}[arm]
    return streaming_perplexity(
        model, ids, chunk=settings.chunk, skip=settings.beyond, **policy(settings.long_capacity, sinks)
    ).nll.tolist()


@torch.no_grad()
def sink_rate(host: Host) -> float:
    """Mean attention weight on the first token, over all heads and the rows of the text's beginning but its first."""
    settings = host.settings
    model, ids, _ = host.get()
    rows = torch.arange(settings.capacity // 4, 2 * settings.capacity)
    with capture(model, what=("first",), rows=rows) as reading:
        model(input_ids=ids[:, : 2 * settings.capacity], use_cache=False)
    return float(reading.result().stack("first").double().mean())


def recomputation(host: Host, document: int) -> dict[str, list[list[float]]]:
    """nll of the same runs of tokens, (runs, run) each: from a stream of a document, and with every run's window read
    afresh. Runs lie side by side and cover the document from `skip` on."""
    settings = host.settings
    model, _, _ = host.get_long()
    ids = host.documents()[document]
    places = list(range(settings.skip, ids.shape[1] - settings.run + 1, settings.run))
    with use(model, StreamingLLM(**policy(settings.capacity))):
        stream = perplexity(model, ids, chunk=settings.capacity, skip=settings.skip).nll
    again = recompute_perplexity(model, ids, places, length=settings.capacity, run=settings.run)
    return {"stream": _runs(stream, settings.run), "afresh": _runs(again, settings.run)}


def _runs(nll: Tensor, run: int) -> list[list[float]]:
    rows: list[list[float]] = nll[: nll.numel() // run * run].view(-1, run).tolist()
    return rows


def text_claims(
    context: Context,
    settings: Settings,
    text: dict[str, list[float]],
    window: dict[str, list[float]],
    far: dict[str, list[float]],
    again: Sequence[dict[str, list[list[float]]]],
    sink_share: float,
) -> list[Claim]:
    """The claims of TEXT_CRITERIA, in their order."""
    return [
        _beyond_claim(context, settings, far),
        _window_claim(context, settings, text, window, sink_share),
        _recompute_claim(context, settings, again),
        Claim(
            id="four-sinks-suffice",
            statement="More than four sinks add little.",
            paper=PaperValue("3359.95 / 11.88 / 10.51 / 9.59 / 9.54", "Llama-2-7B, 0, 1, 2, 4 and 8 sinks", "table 2"),
            measured=perplexity_ratio(context, "four", text["4"], text["8"]),
            criterion=TEXT_CRITERIA["four-sinks-suffice"],
            others={
                f"{sinks}_to_8": perplexity_ratio(context, f"sinks {sinks}", text[str(sinks)], text["8"])
                for sinks in (0, 1, 2)
            },
            details={"perplexity by sinks": _table(text), **conditions(settings)},
        ),
        Claim(
            id="position-not-meaning",
            statement="Line breaks in place of the first four tokens serve as sinks as well: their place counts.",
            paper=PaperValue("5.60 against 5.40", "Llama-2-13B, PG19, cache 1024", "table 1"),
            measured=perplexity_ratio(context, "newlines", text["newlines"], text[str(DEFAULT_SINKS)]),
            criterion=TEXT_CRITERIA["position-not-meaning"],
            details=conditions(settings),
        ),
    ]


def _beyond_claim(context: Context, settings: Settings, far: dict[str, list[float]]) -> Claim:
    return Claim(
        id="sinks-rescue-window",
        statement="Beyond the length a model was trained at, a window of recent tokens alone collapses; the same cache "
        "with the first four tokens does not.",
        paper=PaperValue("5158.07 against 5.40", "Llama-2-13B, PG19, cache 1024", "table 1"),
        measured=perplexity_ratio(context, "beyond", far["alone"], far["sinks"]),
        criterion=TEXT_CRITERIA["sinks-rescue-window"],
        others={"dense_to_sinks": perplexity_ratio(context, "beyond dense", far["dense"], far["sinks"])},
        notes=f"Scored are the {settings.beyond_scored:,} tokens from position {settings.beyond:,} on, where the "
        f"positions of the model end; the cache holds {settings.long_capacity:,}. The size of the collapse depends on "
        "how much attention a model puts on its first tokens and on how it takes to a window without them: the ten "
        "times asked for stand for a thousand in the paper's 13 billion parameters. The model here has 135 million "
        "and reads a text of its own kind.",
        details={
            "perplexity": _table(far),
            "model": settings.model,
            "cache": settings.long_capacity,
            "from": settings.beyond,
            "scored": settings.beyond_scored,
        },
    )


def _window_claim(
    context: Context,
    settings: Settings,
    text: dict[str, list[float]],
    window: dict[str, list[float]],
    sink_share: float,
) -> Claim:
    dense = text["dense"][: len(window["sinks"])]
    return Claim(
        id="sinks-rescue-window-512",
        statement="Within the trained length a window alone predicts worse than the same window with four sinks.",
        paper=PaperValue("no such row", "the paper's texts are longer than the models were trained at"),
        measured=perplexity_ratio(context, "window", window["alone"], window["sinks"]),
        criterion=TEXT_CRITERIA["sinks-rescue-window-512"],
        others={
            "sinks_to_dense": perplexity_ratio(context, "sinks dense", window["sinks"], dense),
            "text_positions_to_dense": perplexity_ratio(context, "text", window["positions of the text"], dense),
        },
        notes=f"A window of {settings.window} tokens. Dense attention reads the whole text, so it is the best that can "
        "be had here.",
        details={
            "perplexity": {"dense": perplexity_of(dense), **_table(window)},
            "mean attention on the first token": sink_share,
            **conditions(settings),
            "cache": f"window {settings.window}",
        },
    )


def _recompute_claim(context: Context, settings: Settings, again: Sequence[dict[str, list[list[float]]]]) -> Claim:
    """`again`: what each document gave."""
    stream, afresh = (np.concatenate([found[name] for found in again]) for name in ("stream", "afresh"))
    difference = bootstrap_difference(
        stream.mean(1), afresh.mean(1), paired=True, generator=context.generator("recompute")
    )
    low, high = np.exp([difference.low, difference.high]).tolist()  # type: ignore[arg-type]
    half = settings.run // 2
    return Claim(
        id="matches-recomputation",
        statement="Sinks with a window predict as well as computing the window anew for every token.",
        paper=PaperValue("5.40 against 5.43", "Llama-2-13B, PG19, cache 1024", "table 1"),
        measured=Measurement(float(np.exp(difference.value)), low, high, n=difference.n, unit="×"),
        criterion=TEXT_CRITERIA["matches-recomputation"],
        notes=f"The same tokens by both, {settings.run} in a row sharing one reading: their contexts are "
        f"{settings.capacity - half} to {settings.capacity + settings.run - half - 1} tokens long. A unit (n) is such "
        f"a run. A ratio below one is better than recomputation.",
        details={
            "stream": perplexity_of(stream.ravel().tolist()),
            "recompute": perplexity_of(afresh.ravel().tolist()),
            "documents": settings.documents,
            "tokens of a document": settings.document,
            "tokens scored": int(stream.size),
            **conditions(settings),
            "tokens": settings.document,
        },
    )


def _table(nll: dict[str, list[float]]) -> dict[str, float]:
    return {name: perplexity_of(values) for name, values in nll.items()}
