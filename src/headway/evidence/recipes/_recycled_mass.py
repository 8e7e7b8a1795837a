"""How much of a model's dense attention a set of keys holds later on: the method's choice, and others of as many keys.

    mass(r) = mean over heads and layers of Σ_{j in C(r)} w_rj ,   w: the dense attention of row r

The set of a full step at row s loses its lowest scores to the tokens since. Beside it stand sets that are not renewed:

    one choice   the best keys of one row, once, at the end of the prompt
    SnapKV       the same from its last 32 rows, which stay themselves (arXiv 2404.14469)
    H2O          half of the keys by the attention they received from all rows so far, half recent (arXiv 2306.14048),
                 with the exact sums of dense attention, which its own eviction only approximates
    streaming    sinks and a window
    random       any keys, in place of the best of the full step

Every set keeps the tokens that came since it was chosen, up to half of its keys where nothing renews it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from headway.door.attach import observe
from headway.door.call import AttentionCall
from headway.door.stages import Observer
from headway.evidence.recipe import Context
from headway.evidence.recipes._recycled_toys import SINKS
from headway.kernels.head_scores import streaming_mass
from headway.kernels.pooling import ranks
from headway.methods.long_context.recycled_attention import key_scores, recycled_mask

#: Rows whose attention SnapKV adds up, as in its released code.
SNAP_ROWS = 32
#: Sets of keys, the method's own with the scores of either version first.
OWN = ("recycled", "first version")
UNRENEWED = ("one choice", "snapkv", "h2o")
RIVALS = (*UNRENEWED, "streaming", "random")
#: Rows of weights that are held at once.
ROWS = 256


def held_since(
    scores: Float[Tensor, "batch kv_heads prompt"], rows: Int[Tensor, " rows"], keys: int, budget: int
) -> Bool[Tensor, "batch kv_heads rows keys"]:
    """What a choice among the first keys holds at later rows: tokens behind the prompt, the latest budget / 2 of them,
    and as many of the best as the budget leaves."""
    prompt = scores.shape[2]
    at = torch.arange(keys, device=scores.device)
    recent = (at >= prompt) & (at <= rows[:, None]) & (at > rows[:, None] - budget // 2)
    room = budget - recent.sum(-1)
    best = ranks(scores)[:, :, None] < room[:, None]
    best = torch.nn.functional.pad(best, (0, keys - prompt))
    return best | recent


def heavy_and_recent(
    received: Float[Tensor, "batch kv_heads seen"], rows: Int[Tensor, " rows"], keys: int, budget: int
) -> Bool[Tensor, "batch kv_heads rows keys"]:
    """H2O's set at later rows: the latest budget / 2 tokens, and of the older ones those that received most."""
    at = torch.arange(keys, device=received.device)
    recent = (at <= rows[:, None]) & (at > rows[:, None] - budget // 2)
    sums = torch.nn.functional.pad(received, (0, keys - received.shape[2]))[:, :, None]
    older = sums.masked_fill(at > rows[:, None] - budget // 2, -torch.inf)
    return (ranks(older) < budget - budget // 2) & (older > -torch.inf) | recent


class MassObserver(Observer):
    """Mass by steps since a full one, (starts, steps) per site. `prompt` is where unrenewed sets are chosen; None
    leaves all but the method's own set and sinks and a window out."""

    reads_weights = True

    def __init__(
        self, starts: Sequence[int], steps: int, budget: int, *, prompt: int | None, generator: torch.Generator
    ) -> None:
        self.starts, self.steps, self.budget, self.prompt = list(starts), steps, budget, prompt
        self.generator = generator

    def start(self) -> None:
        names = (*OWN, *RIVALS) if self.prompt is not None else (OWN[0], "streaming")
        self.found: dict[str, list[Tensor]] = {name: [] for name in names}

    def observe(self, call: AttentionCall, output: Tensor, lse: Tensor | None = None) -> None:
        once, sums = ({}, {}) if self.prompt is None else self._before(call, self.prompt)
        by_name: dict[str, list[Tensor]] = {name: [] for name in self.found}
        for start in self.starts:
            rows = torch.arange(start, start + self.steps + 1, device=call.query.device)
            weights = call.weights(rows)[..., : start + self.steps + 1]
            later, groups = weights[:, :, 1:], call.groups
            for name, mask in self._masks(call, weights, start, once, sums).items():
                held = (later * mask.repeat_interleave(groups, 1)).sum(-1) / later.sum(-1)
                by_name[name].append(held.mean((0, 1)).cpu())
            near = streaming_mass(later, rows[1:], sinks=SINKS, window=self.budget - SINKS)[1]
            by_name["streaming"].append(near.mean((0, 1)).cpu())
        for name, values in by_name.items():
            self.found[name].append(torch.stack(values))

    def _masks(
        self, call: AttentionCall, weights: Tensor, start: int, once: dict[str, Tensor], sums: dict[int, Tensor]
    ) -> dict[str, Tensor]:
        """Masks (batch, kv_heads, steps, keys) of all sets but sinks and a window."""
        kv_heads, keys = call.key.shape[1], weights.shape[3]
        logs = weights[:, :, 0, : start + 1].log()
        found = {OWN[0]: recycled_mask(key_scores(logs, kv_heads), self.steps, self.budget)}
        if self.prompt is None:
            return found
        found[OWN[1]] = recycled_mask(key_scores(logs, kv_heads, pool=1), self.steps, self.budget)
        any_keys = torch.rand(1, kv_heads, start + 1, generator=self.generator).to(weights.device)
        found["random"] = recycled_mask(any_keys, self.steps, self.budget)
        rows = torch.arange(start + 1, start + self.steps + 1, device=weights.device)
        for name, scores in once.items():
            found[name] = held_since(scores, rows, keys, self.budget)
        found["h2o"] = heavy_and_recent(sums[start], rows, keys, self.budget)
        return found

    def _before(self, call: AttentionCall, prompt: int) -> tuple[dict[str, Tensor], dict[int, Tensor]]:
        """Scores of the sets that are chosen once, and what every key has received by each start, per KV head."""
        kv_heads = call.key.shape[1]
        last = torch.arange(prompt - SNAP_ROWS, prompt, device=call.query.device)
        seen = call.weights(last)[..., :prompt]
        snap = key_scores(seen.sum(2).log(), kv_heads)
        snap[..., -SNAP_ROWS:] = torch.inf
        once = {"one choice": key_scores(seen[:, :, -1].log(), kv_heads), "snapkv": snap}
        received = call.query.new_zeros(1, kv_heads, call.keys, dtype=torch.float32)
        sums, done = {}, 0
        for start in self.starts:
            while done <= start:
                stop = min(done + ROWS, start + 1)
                weights = call.weights(torch.arange(done, stop, device=call.query.device))
                received = received + weights.sum(2).unflatten(1, (kv_heads, -1)).sum(2)
                done = stop
            sums[start] = received[..., : start + 1].clone()
        return once, sums

    def result(self) -> dict[str, Tensor]:
        return {name: torch.stack(values).mean(0) for name, values in self.found.items()}


@torch.no_grad()
def mass_of_sets(
    context: Context, model: Any, ids: Tensor, *, starts: int, steps: int, budget: int, rivals: bool
) -> dict[str, Any]:
    """Mean over heads and layers, by start and by steps since the full one, from starts in the second half of a text;
    the first half is the prompt of the sets that are chosen once."""
    tokens = ids.shape[1]
    at = torch.linspace(tokens // 2, tokens - steps - 1, starts).long().tolist()
    observer = MassObserver(
        at, steps, budget, prompt=tokens // 2 if rivals else None, generator=context.torch_generator(f"any {tokens}")
    )
    with observe(model, observer):
        model(input_ids=ids, use_cache=False)
    return {"budget": budget, "starts": at} | {name: held.tolist() for name, held in observer.result().items()}


def mass_by_stride(by_step: Any, strides: Sequence[int]) -> dict[int, np.ndarray]:
    """Mean mass of whole strides, one number per start: a stride of S reads everything once, then S − 1 steps."""
    curve = np.asarray(by_step)
    return {stride: (1 + curve[:, : stride - 1].sum(1)) / stride for stride in strides}
