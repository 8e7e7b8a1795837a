"""Sinks planted in a trained toy, found by the head search and repaired: what one seed gives.

The plant is chosen by what it does to the toy and to nothing else: the accuracy falls to between `DAMAGED`, every
planted head matters by itself, and every planted head still looks at its other keys. The last one bounds the strength:
a head whose other keys get nothing is gone, and what is taken off its sinks has nowhere to go.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from headway.door import use
from headway.door.call import AttentionCall
from headway.door.stages import Observer
from headway.evidence.recipes import _act_toy as toy
from headway.methods.sinks.act import ACT, BETA, search_heads

BETAS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
#: Accuracy to which planted sinks bring the toy, and what each planted head must be worth on its own.
DAMAGED, WORTH = (0.5, 0.7), 0.05
#: Share of its attention that a planted head leaves its other keys, in the median row that asks.
LEFT = 0.01
#: A strength that leaves them under a millionth, where ACT moves nothing: told beside the claims.
SILENCING = 48.0
#: Of the toy, whose sequences have 24 tokens: the released 0.1 is α/N at 50, and among 24 tokens any pair that is asked
#: for as often as the others receives more.
THRESHOLD = "relative"


def repaired(seed: int, steps: int, search: int, fresh: int) -> dict[str, Any]:
    """One toy: trained, damaged, searched on `search` sequences, repaired and judged on `fresh` ones.

    Without `heads` where the toy has no plant that fulfils the conditions."""
    generator = torch.Generator().manual_seed(seed)
    model: Any = toy.train_recall(steps, generator)
    calibration, judged = toy.recall_batch(search, generator), toy.recall_batch(fresh, generator)
    clean = float(toy.recalled(model, judged).mean())
    planted = plant(model, calibration, generator)
    if planted is None:
        return {"accuracy": clean, "heads": []}
    with use(model, planted):
        size = len(planted.heads)
        found = search_heads(
            lambda stage: {"recall": _shares(model, calibration, stage)}, toy.every_head(), threshold=THRESHOLD
        )
        chosen = found.ranking()[:size]
        damaged = float(toy.recalled(model, judged).mean())

        def recovered(heads: Sequence[toy.Head], beta: float, candidates: Sequence[int] | None = None) -> float:
            found = float(_shares(model, judged, _act(heads, beta, candidates)).mean())
            return (found - damaged) / (clean - damaged)

        others = [head for head in toy.every_head() if head not in planted.heads]
        sets = list(itertools.combinations(others, size))
        picked = torch.randperm(len(sets), generator=generator)[:5].tolist()
        result = {
            "accuracy": clean,
            "heads": list(planted.heads),
            "strength": planted.strength,
            "damaged": damaged,
            "chosen": chosen,
            "selected": found.selected,
            "recall": len(set(chosen) & set(planted.heads)) / size,
            "recovered": {beta: recovered(chosen, beta) for beta in BETAS},
            "from_markers": {beta: recovered(chosen, beta, toy.MARKER_PLACES) for beta in BETAS},
            "random": [recovered(sets[i], BETA) for i in picked],
            "errors": [_error_ratios(model, judged, head) for head in planted.heads],
            "difference_at_1": float((_logits(model, judged, _act(chosen, 1.0)) - _logits(model, judged)).abs().max()),
        }
    return result | {"silenced": _silenced(model, judged, planted.heads, clean)}


def plant(model: Any, batch: toy.Recall, generator: torch.Generator) -> toy.PlantedSinks | None:
    """Two or three random heads with sinks of a strength that fulfils the conditions.

    Sets are drawn until one is found; None when there is none."""
    low, high = DAMAGED
    limit = strongest(model, batch)
    sets = [s for size in (2, 3) for s in itertools.combinations(toy.every_head(), size)]
    for index in torch.randperm(len(sets), generator=generator).tolist():
        heads = sets[index]
        weak, strong = 0.0, min(limit[head] for head in heads)
        if _damage(model, batch, heads, strong) > high:
            continue
        for _ in range(8):
            middle = (weak + strong) / 2
            accuracy = _damage(model, batch, heads, middle)
            if low <= accuracy <= high:
                rest = [_damage(model, batch, [h for h in heads if h != head], middle) for head in heads]
                if min(rest) - accuracy >= WORTH:
                    return toy.PlantedSinks(heads=heads, strength=middle)
                break
            weak, strong = (middle, strong) if accuracy > high else (weak, middle)
    return None


def strongest(model: Any, batch: toy.Recall) -> dict[toy.Head, float]:
    """The strength that leaves each head's other keys `LEFT` in the median row that asks, in the undamaged toy.

    With a share m on markers, a constant s on their logits makes it m eˢ / (m eˢ + 1 − m)."""
    keep = _MarkerShares(batch)
    with use(model, keep), torch.no_grad():
        model(input_ids=batch.ids, use_cache=False)
    wanted = math.log((1 - LEFT) / LEFT)
    return {
        (layer, head): wanted - float(torch.logit(shares[:, head].flatten(), eps=1e-12).median())
        for layer, shares in keep.shares.items()
        for head in range(toy.HEADS)
    }


def _act(heads: Sequence[toy.Head], beta: float, candidates: Sequence[int] | None = None) -> ACT:
    return ACT(heads=heads, beta=beta, threshold=THRESHOLD, candidates=candidates)


def _damage(model: Any, batch: toy.Recall, heads: Sequence[toy.Head], strength: float) -> float:
    with use(model, toy.PlantedSinks(heads=heads, strength=strength)):
        return float(toy.recalled(model, batch).mean())


def _silenced(model: Any, batch: toy.Recall, heads: Sequence[toy.Head], clean: float) -> float | None:
    """Accuracy recovered at β = 0 in heads whose other keys get nothing; None where that costs no accuracy."""
    damaged = _damage(model, batch, heads, SILENCING)
    with use(model, toy.PlantedSinks(heads=heads, strength=SILENCING)):
        found = float(_shares(model, batch, _act(heads, 0.0)).mean())
    return None if clean - damaged < WORTH else (found - damaged) / (clean - damaged)


def _shares(model: Any, batch: toy.Recall, stage: ACT | None) -> np.ndarray:
    with use(model, *([] if stage is None else [stage])):
        return toy.recalled(model, batch).numpy()


@torch.no_grad()
def _logits(model: Any, batch: toy.Recall, *stages: ACT) -> Tensor:
    with use(model, *stages):
        logits: Tensor = model(input_ids=batch.ids, use_cache=False).logits
    return logits


def _error_ratios(model: Any, batch: toy.Recall, head: toy.Head) -> dict[float, float]:
    """‖out_β − out_0‖ / ‖out_1 − out_0‖ of one calibrated head."""
    outputs = {}
    for beta in BETAS:
        keep = _HeadOutput(head)
        with use(model, _act([head], beta), keep), torch.no_grad():
            model(input_ids=batch.ids[:64], use_cache=False)
        outputs[beta] = keep.output
    whole = (outputs[1.0] - outputs[0.0]).norm()
    return {beta: float((outputs[beta] - outputs[0.0]).norm() / whole) for beta in BETAS}


class _MarkerShares(Observer):
    """By layer the share of each asking row on markers, (batch, heads, questions)."""

    reads_weights = True

    def __init__(self, batch: toy.Recall) -> None:
        self.markers = batch.ids == toy.MARKER
        self.shares: dict[int, Tensor] = {}

    def observe(self, call: AttentionCall, output: Tensor, lse: Tensor | None = None) -> None:
        rows = torch.arange(call.queries - toy.QUESTIONS, call.queries)
        self.shares[call.site.layer] = (call.weights(rows) * self.markers[:, None, None]).sum(-1)


class _HeadOutput(Observer):
    def __init__(self, head: toy.Head) -> None:
        self.head = head

    def observe(self, call: AttentionCall, output: Tensor, lse: Tensor | None = None) -> None:
        if call.site.layer == self.head[0]:
            self.output = output[:, self.head[1]].double()
