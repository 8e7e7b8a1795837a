"""What the Thought Anchors recipe measures, as plain data: on planted traces, on the scripted reasoner, and on a real
model's own reasoning."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import nullcontext
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from headway.door import capture, use
from headway.evidence.recipes import _anchors_scripted as scripted
from headway.evidence.recipes import _anchors_toy as toy
from headway.evidence.recipes._peak_bytes import PeakBytes
from headway.methods.diagnosis import thought_anchors as method

#: Receiver heads of the toy (a quarter of its heads), and the layers left out: none of three.
TOY_TOP, TOY_SKIPPED = 3, ()
#: Random sentence orders behind the null of places.
ORDERS = 5
PLANS, WORK = ("plan_generation", "uncertainty_management"), ("active_computation",)


def planted_edges(model: Any, traces: Sequence[toy.Planted]) -> dict[str, Any]:
    """AUROC of true edges by hiding sentences, by attention and by nearness, without and with idle heads that stare.

    Sources are the sentences of the setup: derivations follow each other in the order of their keys, so whether one
    rests on the one before has no planted truth."""
    found: dict[str, list[float]] = {}
    moved = 0.0
    for made in traces:
        marks = method.edge_marks(len(made.trace), made.edges)
        setup = np.arange(len(made.trace)) < made.derivations[0]
        matrices = []
        for where, columns in (("", ()), ("_idle", made.distractors)):
            with use(model, toy.IdleLooks(columns=columns)) if columns else nullcontext():
                causal = method.suppression_matrix(model, made.trace.input_ids, made.trace.tokens)
                maps = method.sentence_maps(model, made.trace.input_ids, made.trace.tokens)
            scores = {"hiding": causal.normalised, "attention": method.mean_attention(maps)}
            matrices.append(causal.tokens)
            for name, matrix in scores.items():
                found.setdefault(name + where, []).append(method.edge_auroc(np.where(setup, matrix, np.nan), marks))
        found.setdefault("nearness", []).append(
            method.edge_auroc(np.where(setup, method.nearness(len(made.trace)), np.nan), marks)
        )
        moved = max(moved, float(np.nanmax(np.abs(matrices[0] - matrices[1]))))
    return {"auroc": found, "moved_by_idle_heads": moved}


def broadcasting(model: Any, traces: Sequence[toy.Planted]) -> dict[str, Any]:
    """Whether the mode has the highest receiver score of its trace; heads from all traces together."""
    vertical = [method.vertical_scores(method.sentence_maps(model, m.trace.input_ids, m.trace.tokens)) for m in traces]
    kurtoses = [method.kurtosis(v) for v in vertical]
    heads = method.receiver_heads(method.mean_kurtosis(kurtoses), top=TOY_TOP, skip_layers=TOY_SKIPPED)
    scores = [method.receiver_scores(v, heads) for v in vertical]
    known = [(s, m.mode) for s, m in zip(scores, traces, strict=True) if np.isfinite(s[m.mode])]
    return {
        "heads": heads,
        "first": [int(np.nanargmax(s)) == mode for s, mode in known],
        "reliability": method.split_half_reliability(kurtoses).to_dict(),
    }


def branching(model: Any, traces: Sequence[toy.Planted], rollouts: int) -> dict[str, Any]:
    """Resampling with the toy as its own sampler: is the mode first, and are the other sentences level?"""
    sampler = method.LocalSampler(
        model, toy.Words(), temperature=1.0, top_p=1.0, max_tokens=4 * toy.DERIVATIONS, stop=(toy.END,)
    )
    extract = method.pattern_answer(toy.FINAL)
    first, alarms, others, agreements = [], 0, 0, []
    for made in traces:
        starts = list(range(made.mode, len(made.trace) + 1))
        drawn = method.collect(made.trace, sampler, rollouts=rollouts, sentences=starts, batch=rollouts)
        found = method.sentence_importance(made.trace, drawn, extract=extract, encoder=method.exact_encoder)
        value = {one.sentence: one.counterfactual.divergence.value for one in found}
        known = {i: v for i, v in value.items() if np.isfinite(v)}
        first.append(bool(known) and max(known, key=lambda i: known[i]) == made.mode)
        rest = [one for one in found if one.sentence != made.mode]
        alarms += sum(one.resampling.p_value < 0.05 for one in rest)
        others += len(rest)
        causal = method.suppression_matrix(model, made.trace.input_ids, made.trace.tokens)
        effect = method.outgoing(causal.normalised, least=1)
        agreements.append([[float(effect[one.sentence]), one.resampling.divergence.value] for one in found])
    return {"first": first, "alarms": alarms, "others": others, "effect and importance": agreements}


def forced(count: int, rollouts: int) -> dict[str, Any]:
    """The scripted reasoner: does a measure put the unused guess above the coin that decides?"""
    extract = method.pattern_answer(r"answer is (\w+)")
    fooled: dict[str, list[bool]] = {"forced": [], "counterfactual": []}
    for seed in range(count):
        trace = scripted.script(coin=scripted.COIN[seed % 2], guess=scripted.GUESSES[seed % 3])
        drawn = method.collect(trace, scripted.scripted, rollouts=rollouts, seed=10_000 * seed)
        now = method.collect(
            trace, scripted.scripted, rollouts=rollouts, seed=10_000 * seed, kind="forced", force=scripted.NOW
        )
        found = method.sentence_importance(
            trace, drawn, extract=extract, encoder=method.exact_encoder, forced=now, generator=seed
        )
        guess, coin = found[1], found[2]
        fooled["forced"].append(guess.forced.divergence.value > coin.forced.divergence.value)  # type: ignore[union-attr]
        fooled["counterfactual"].append(guess.counterfactual.divergence.value > coin.counterfactual.divergence.value)
    return fooled


def real_heads(model: Any, passages: Sequence[method.Trace], top: int) -> dict[str, Any]:
    """Receiver heads of a real model on passages, their reliability, and what place alone explains of the scores."""
    vertical = [method.vertical_scores(method.sentence_maps(model, t.input_ids, t.tokens)) for t in passages]
    kurtoses = [method.kurtosis(v) for v in vertical]
    mean = method.mean_kurtosis(kurtoses)
    heads = method.receiver_heads(mean, top=top)
    scores = method.receiver_scores(vertical[0], heads)
    random = np.random.default_rng(0)
    null = method.position_null(
        model, passages[0].input_ids, passages[0].tokens, heads, generator=random, orders=ORDERS
    )
    known = np.isfinite(scores)
    return {
        "sentences": [len(t) for t in passages],
        "heads": heads,
        "layers": len(mean),
        "reliability": method.split_half_reliability(kurtoses).to_dict(),
        "place": np.stack([scores[known], null.draws[:, known].mean(0)], 1).tolist(),
    }


def real_thoughts(
    model: Any, thoughts: Sequence[method.Trace], heads: Sequence[tuple[int, int]], proximity: int
) -> dict[str, Any]:
    """Effects, receiver scores and categories of the sentences of a real model's own reasoning."""
    effects, receiver, kinds = [], [], []
    for trace in thoughts:
        causal = method.suppression_matrix(model, trace.input_ids, trace.tokens)
        effects.append(method.outgoing(causal.normalised))
        kinds += [label.category for label in method.rule_labels(trace.sentences)]
        maps = method.sentence_maps(model, trace.input_ids, trace.tokens)
        receiver.append(method.receiver_scores(method.vertical_scores(maps, proximity=proximity), heads))
    flat = np.concatenate(effects)
    return {
        "sentences": [len(t) for t in thoughts],
        "pairs": np.stack([flat, np.concatenate(receiver)], 1).tolist(),
        "kinds": list(zip(kinds, flat.tolist(), strict=True)),
    }


def shared_prefix(model: Any, ids: Any, sentences: int, repeats: int) -> dict[str, Any]:
    """Seconds with and without the shared prefix on sentences of one length, and how far the results are apart."""
    spans = even_spans(ids, sentences)
    seconds: dict[str, list[float]] = {"shared": [], "whole": []}
    found = {}
    for repeat in range(repeats):
        order = ["shared", "whole"] if repeat % 2 == 0 else ["whole", "shared"]
        for name in order:
            start = time.perf_counter()
            found[name] = method.suppression_matrix(model, ids, spans, reuse_prefix=name == "shared")
            seconds[name].append(time.perf_counter() - start)
    apart = np.nanmax(np.abs(found["shared"].tokens - found["whole"].tokens))
    return {
        "seconds": seconds,
        "apart": float(apart),
        "forwards": found["shared"].forwards,
        "sentences": sentences,
    }


def block_means(model: Any, ids: Any, sentences: int) -> dict[str, float]:
    """Block means as they stream against those of whole maps: how far they are apart, and the most bytes that the
    tensors of either reading hold at one time, weights left out."""
    spans = even_spans(ids, sentences)
    weights = [*model.parameters(), *model.buffers()]
    with PeakBytes(weights) as streaming:
        streamed = method.sentence_maps(model, ids, spans)
    with PeakBytes(weights) as keeping, torch.no_grad(), capture(model, what=("weights",)) as handle:
        model(input_ids=ids, use_cache=False, logits_to_keep=1)
    found = handle.result()
    worst = 0.0
    for layer, name in enumerate(sorted(found.sites, key=lambda n: found.sites[n].layer)):
        maps = found[name]["weights"][0]
        for i, (first, last) in enumerate(spans):
            for j, (start, stop) in enumerate(spans[:i]):
                mean = maps[:, first:last, start:stop].mean((-1, -2)).numpy()
                worst = max(worst, float(np.abs(mean - streamed[layer, :, i, j]).max()))
    return {"apart": worst, "streamed": streaming.highest, "whole": keeping.highest, "tokens": ids.shape[1]}


def even_spans(ids: Any, sentences: int) -> list[tuple[int, int]]:
    """Sentences of one length."""
    return list(pairwise(np.linspace(0, ids.shape[1], sentences + 1).astype(int).tolist()))
