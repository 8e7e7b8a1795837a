"""`diagnose_anchors`: from a model and traces to an `Anchors`."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from headway.diagnose.anchors.columns import Columns
from headway.diagnose.anchors.findings import agreements, findings
from headway.diagnose.anchors.result import Anchors, TraceAnchors
from headway.diagnose.hosts import check_continues_text
from headway.errors import ArgumentError
from headway.hosts import positions_of
from headway.hosts.facts import model_facts, versions
from headway.hosts.fingerprint import fingerprint
from headway.methods.diagnosis import thought_anchors as method
from headway.methods.diagnosis.thought_anchors import LocalSampler, RolloutCache, Trace
from headway.methods.diagnosis.thought_anchors.answers import Extractor, stated_answer
from headway.methods.diagnosis.thought_anchors.receivers import PROXIMITY, SKIPPED_LAYERS, TOP_HEADS
from headway.progress import Tell

#: Sets of other heads that the receiver heads are held against.
CONTROLS = 4
#: Sentences for each of proximity from which kurtosis is told without a warning.
LONG = 4


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is measured and how. `rollouts`, `settle`, `extract`, `tokens` belong to the rollouts; `proximity`, `top`,
    `depth_control`, `orders` to receiver heads; `baseline` to the causal matrix."""

    rollouts: int = 0
    settle: float | None = None
    extract: Extractor = stated_answer
    tokens: int = 200
    proximity: int = PROXIMITY
    top: int = TOP_HEADS
    depth_control: bool = False
    orders: int = 8
    baseline: str = "full"
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("rollouts", 0), ("orders", 0), ("proximity", 1), ("top", 1), ("tokens", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise ArgumentError(f"{name}: got {getattr(self, name)}, expected at least {least}.")
        if self.settle is not None and not self.settle > 0:
            raise ArgumentError(
                f"settle: got {self.settle}, expected a width in nats above 0. Leave it out to draw all."
            )


@dataclass
class _Reading:
    """What is read of a trace before its scores: maps where it is long enough, and vertical scores."""

    trace: Trace
    vertical: np.ndarray | None = None
    layers: tuple[int, ...] = ()


def diagnose_anchors(
    model: nn.Module,
    tokenizer: Any,
    traces: Sequence[Trace],
    *,
    options: Options | None = None,
    encoder: method.similarity.Encoder | None = None,
    sampler: method.Sampler | None = None,
    labels: Callable[[Sequence[str]], Sequence[method.Label]] = method.rule_labels,
    out: Path | None = None,
    name: str | None = None,
    progress: Tell | None = None,
) -> Anchors:
    """The anchors of traces under a model.

    sampler: draws rollouts, by default from the model itself; encoder: tells alike sentences, by default MiniLM; both
    are used only where `options.rollouts` asks for rollouts. A sampler tells by `settings` what its rollouts depend on,
    as `LocalSampler` does; one without is known by its name alone, so give another one another folder. labels:
    categories of sentences. out: a folder for finished parts; a run that was interrupted goes on from there. Raises
    ArgumentError for no traces and for ones that are longer than the model has positions, HostError for a model that
    does not continue text."""
    start = time.perf_counter()
    wanted = options if options is not None else Options()
    tell = progress if progress is not None else lambda *_: None
    _check(model, tokenizer, traces)
    readings = _read(model, traces, wanted, tell)
    known = [r.vertical for r in readings if r.vertical is not None]
    kurtoses = [method.kurtosis(v) for v in known]
    mean = method.mean_kurtosis(kurtoses) if kurtoses else None
    layers = next((r.layers for r in readings if r.vertical is not None), ())
    skip = [row for row, layer in enumerate(layers) if layer in SKIPPED_LAYERS] if len(layers) > 1 else []
    heads = method.receiver_heads(mean, top=wanted.top, skip_layers=skip) if mean is not None else []
    done = [
        _one(model, tokenizer, r, heads, wanted, encoder, sampler, labels, out, tell, f"{i + 1} of {len(readings)}")
        for i, r in enumerate(readings)
    ]
    found = Anchors(
        model=model_facts(model, name),
        run=_run_facts(wanted, done),
        traces=done,
        kurtosis=[] if mean is None else np.where(np.isfinite(mean), mean, np.nan).tolist(),
        layers=list(layers),
        receivers=[] if mean is None else [[layers[row], head, float(mean[row, head])] for row, head in heads],
        reliability=method.split_half_reliability(kurtoses).to_dict() if len(kurtoses) > 1 else None,
        ablation=_ablation(model, readings, heads, mean, wanted, tell),
        categories=_categories(done),
        warnings=_warnings(done, wanted),
    )
    found.agreement, found.concordance = agreements(done)
    found.findings = findings(found)
    found.run["seconds"] = round(time.perf_counter() - start, 1)
    return found


def _read(model: nn.Module, traces: Sequence[Trace], options: Options, tell: Tell) -> list[_Reading]:
    readings = []
    for i, trace in enumerate(traces):
        tell("reading attention", i, len(traces))
        reading = _Reading(trace)
        if len(trace) >= 2 * options.proximity:
            maps, reading.layers = method.layered_maps(model, trace.input_ids, trace.tokens)
            reading.vertical = method.vertical_scores(
                maps, proximity=options.proximity, depth_control=options.depth_control
            )
        readings.append(reading)
    return readings


def _one(
    model: nn.Module,
    tokenizer: Any,
    reading: _Reading,
    heads: Sequence[tuple[int, int]],
    options: Options,
    encoder: Any,
    sampler: Any,
    labels: Callable[[Sequence[str]], Sequence[method.Label]],
    out: Path | None,
    tell: Tell,
    which: str,
) -> TraceAnchors:
    trace = reading.trace
    facts = (trace.fingerprint(), fingerprint(model).weights, str(next(model.parameters()).dtype))
    causal = method.suppression_matrix(
        model,
        trace.input_ids,
        trace.tokens,
        baseline=options.baseline,
        store=None if out is None else Columns(out / "parts", *facts, options.baseline),
        progress=lambda done, total: tell(f"hiding sentences, trace {which}", done, total),
    )
    receiver, null = _receiver(model, reading, heads, options, lambda d, t: tell(f"other orders, trace {which}", d, t))
    return TraceAnchors(
        name=trace.name,
        prompt=trace.text[: trace.characters[0][0]],
        sentences=trace.sentences,
        ranges=[list(s) for s in trace.characters],
        categories=[label.category for label in labels(trace.sentences)],
        tokens=[b - a for a, b in trace.tokens],
        matrix=causal.normalised.tolist(),
        effect=method.outgoing(causal.normalised).tolist(),
        edges=[[e.source, e.target, e.weight] for e in method.strongest_edges(causal.normalised)],
        forwards=causal.forwards,
        receiver=receiver,
        receiver_null=null,
        importance=_importance(model, tokenizer, trace, options, encoder, sampler, out, tell, which),
        answer=trace.answer,
    )


def _receiver(
    model: nn.Module,
    reading: _Reading,
    heads: Sequence[tuple[int, int]],
    options: Options,
    progress: Callable[[int, int], None],
) -> tuple[list[float], list[list[float]]]:
    """Receiver scores, and the middle 95 % of what other sentences draw at each place."""
    trace = reading.trace
    if reading.vertical is None or not heads:
        return [math.nan] * len(trace), []
    scores = method.receiver_scores(reading.vertical, heads)
    if not options.orders:
        return scores.tolist(), []
    null = method.position_null(
        model,
        trace.input_ids,
        trace.tokens,
        heads,
        generator=np.random.default_rng(options.seed),
        orders=options.orders,
        proximity=options.proximity,
        depth_control=options.depth_control,
        progress=progress,
    )
    places = [null.at(k, float(s)) for k, s in enumerate(scores)]
    return scores.tolist(), [[math.nan] * 3 if n is None else [n.low, n.high, n.quantile] for n in places]


def _importance(
    model: nn.Module,
    tokenizer: Any,
    trace: Trace,
    options: Options,
    encoder: Any,
    sampler: Any,
    out: Path | None,
    tell: Tell,
    which: str,
) -> list[dict[str, Any]]:
    if not options.rollouts:
        return []
    draws: Any = LocalSampler(model, tokenizer, max_tokens=options.tokens) if sampler is None else sampler
    settings = getattr(draws, "settings", {"sampler": getattr(draws, "__qualname__", type(draws).__qualname__)})
    settled = None
    if options.settle is not None:
        settled = method.settled_starts(trace, extract=options.extract, width=options.settle)
    drawn = method.collect(
        trace,
        draws,
        rollouts=options.rollouts,
        seed=options.seed,
        cache=None if out is None else RolloutCache(out / "parts", trace, settings),
        settled=settled,
        max_tokens=options.tokens,
        progress=lambda done, total: tell(f"rollouts, trace {which}", done, total),
    )
    tell(f"comparing answers, trace {which}", 0, 1)
    alike = method.sentence_encoder() if encoder is None else encoder
    found = method.sentence_importance(
        trace, drawn, extract=options.extract, encoder=alike, generator=np.random.default_rng(options.seed)
    )
    return [_plain(one) for one in found]


def _plain(one: method.Importance) -> dict[str, Any]:
    def effect(found: method.Effect) -> dict[str, Any]:
        accuracy = None if found.accuracy is None else found.accuracy.to_dict()
        return {"divergence": found.divergence.to_dict(), "p_value": found.p_value, "accuracy": accuracy}

    return {
        "sentence": one.sentence,
        "resampling": effect(one.resampling),
        "counterfactual": effect(one.counterfactual),
        "different": one.different,
        "overdetermined": one.overdetermined,
    }


def _ablation(
    model: nn.Module,
    readings: Sequence[_Reading],
    heads: Sequence[tuple[int, int]],
    mean: np.ndarray | None,
    options: Options,
    tell: Tell,
) -> dict[str, Any] | None:
    """The loss of the longest trace without its receiver heads, and without others of the same layers."""
    layers = {layer for layer, _ in heads}
    if mean is None or not heads or all(sum(h[0] == x for h in heads) == mean.shape[1] for x in layers):
        return None
    tell("gating receiver heads", 0, 1)
    trace = max((r.trace for r in readings), key=lambda t: len(t.ids))
    shape = (int(mean.shape[0]), int(mean.shape[1]))
    first = max(trace.tokens[0][0], 1)
    found = method.ablate(
        model, trace.input_ids, heads, shape=shape, first=first, draws=CONTROLS, generator=options.seed,
        layers=next(r.layers for r in readings if r.vertical is not None),
    )  # fmt: skip
    rises = [c - found.plain for c in found.controls]
    return {"trace": trace.name, "plain": found.plain, "rise": found.rise, "controls": rises, "p": found.null.p_value}


def _categories(traces: Sequence[TraceAnchors]) -> dict[str, dict[str, Any]]:
    labels = [method.Label((c,)) for t in traces for c in t.categories]
    values = [e for t in traces for e in t.effect]
    return {name: m.to_dict() for name, m in method.by_category(labels, values).items()}


def _check(model: nn.Module, tokenizer: Any, traces: Sequence[Trace]) -> None:
    if not traces:
        raise ArgumentError("traces: got none, expected at least one. Use `read_trace`, or `think`.")
    check_continues_text(model, tokenizer)
    room = positions_of(model)
    for trace in traces:
        if room is not None and len(trace.ids) > room:
            raise ArgumentError(
                f"traces: got {trace.name} of {len(trace.ids):,} tokens, and the model has {room:,} positions. Cut it."
            )


def _run_facts(options: Options, traces: Sequence[TraceAnchors]) -> dict[str, Any]:
    settings = {k: v for k, v in asdict(options).items() if k != "extract"}
    settings["answer"] = getattr(options.extract, "__name__", repr(options.extract))
    return {
        "date": datetime.now(UTC).date().isoformat(),
        **versions(),
        "settings": settings,
        "forwards": {t.name: round(t.forwards, 2) for t in traces},
    }


def _warnings(traces: Sequence[TraceAnchors], options: Options) -> list[str]:
    found = []
    short = [t.name for t in traces if len(t.sentences) < 2 * options.proximity]
    if short:
        found.append(
            f"Too short for receiver scores ({', '.join(short)}): they need {2 * options.proximity} sentences. A "
            "longer trace, or a smaller proximity, gives them."
        )
    counts = [len(t.sentences) for t in traces if len(t.sentences) >= 2 * options.proximity]
    if counts and max(counts) < LONG * options.proximity:
        found.append(
            f"The longest trace has {max(counts)} sentences, {max(counts) - options.proximity} of them with a receiver "
            f"score: a kurtosis over so few says little. {LONG * options.proximity} or more are better."
        )
    if not options.rollouts:
        starts = sum(len(t.sentences) + 1 for t in traces)
        found.append(
            "No answers were resampled, so nothing here says which sentences decide the answer. "
            f"20 rollouts would draw {20 * starts:,} continuations of up to {options.tokens} tokens."
        )
    if len(traces) < 4:
        found.append(f"Receiver heads were chosen on {len(traces)} trace{'s' if len(traces) > 1 else ''}; use more.")
    found.append("Categories come from cue words, not from a reader of the text.")
    return found
