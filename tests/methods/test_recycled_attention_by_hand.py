"""Recycled Attention against its rules written out: one token, sequence and KV head at a time, in sets and loops."""

from __future__ import annotations

import math

import pytest
import torch
from tests.door.hosts import decoder

from headway.door import AttentionCall
from headway.door.call import Forward
from headway.door.execute import execute_parts
from headway.methods.long_context.recycled_attention import RecycledAttention

BATCH, HEADS, KV_HEADS, DIM = 3, 4, 2, 8
PROMPT, STEPS, BUDGET = 14, 40, 9
SCHEDULES = {
    "fixed": {"stride": 4},
    "fixed, first step full": {"stride": 4, "first": "full"},
    "dynamic": {"stride": None, "threshold": 0.6, "check": 2},
    "both": {"stride": 6, "threshold": 0.6, "check": 2},
    "one choice": {"stride": None},
    "first version": {"stride": 4, "pool": 1, "victim": "latest"},
    "first version, dynamic": {"stride": None, "threshold": 0.6, "check": 2, "pool": 1, "victim": "latest"},
    "mean of a group, narrow pool": {"stride": 4, "group": "mean", "pool": 3},
    "reads without choosing": {"stride": 4, "full_step": "attend"},
    "chooses and reads that": {"stride": 4, "full_step": "select"},
    "chooses and reads that, dynamic": {"stride": None, "threshold": 0.6, "check": 2, "full_step": "select"},
    "sinks": {"stride": 5, "sinks": 2},
}


class ByHand:
    """One sequence: what is kept of each KV head, why, and what a step reads."""

    def __init__(self, policy: RecycledAttention, pads: int) -> None:
        self.policy, self.pads = policy, pads
        self.score: list[dict[int, tuple[float, float]]] = [{} for _ in range(KV_HEADS)]
        self.fresh: list[list[int]] = [[] for _ in range(KV_HEADS)]
        self.reference = torch.empty(0)
        self.full_at = self.steps = self.full = 0

    def weights(self, query: torch.Tensor, key: torch.Tensor, head: int, places: list[int]) -> dict[int, float]:
        """Weights of one query head over some places."""
        logits = key[head // (HEADS // KV_HEADS), places] @ query[head, 0] / math.sqrt(DIM)
        return dict(zip(places, logits.softmax(0).tolist(), strict=True))

    def joined(self, query: torch.Tensor, key: torch.Tensor, kv_head: int, places: list[int]) -> dict[int, float]:
        """Weights of the query heads of a KV head, joined."""
        group = HEADS // KV_HEADS
        each = [self.weights(query, key, kv_head * group + i, places) for i in range(group)]
        join = max if self.policy.group == "max" else lambda values: sum(values) / group
        return {place: join([weights[place] for weights in each]) for place in places}

    def choose(self, query: torch.Tensor, key: torch.Tensor) -> None:
        """Everything anew, from one query over all keys."""
        places = list(range(self.pads, key.shape[1]))
        half = self.policy.pool // 2
        for kv_head in range(KV_HEADS):
            own = self.joined(query, key, kv_head, places)
            pooled = {p: max(own.get(other, 0.0) for other in range(p - half, p + half + 1)) for p in places}
            score = {p: (pooled[p], own[p]) for p in places}
            score |= dict.fromkeys(places[: self.policy.sinks], (math.inf, math.inf))
            best = sorted(places, key=lambda p: score[p], reverse=True)[:BUDGET]
            self.score[kv_head] = {p: score[p] for p in best}
            self.fresh[kv_head] = []
        self.reference, self.full_at = query, key.shape[1] - 1

    def push(self, place: int) -> None:
        """The newest token takes the place of the entry of lowest score, or of the oldest that is fresh."""
        policy = self.policy
        renewed = policy.full_step != "attend" and (policy.stride is not None or policy.threshold is not None)
        most_fresh = BUDGET if renewed else BUDGET // 2
        for score, fresh in zip(self.score, self.fresh, strict=True):
            if len(score) + len(fresh) == BUDGET:
                mortal = [p for p in score if score[p][0] < math.inf]
                if len(fresh) >= most_fresh or not mortal:
                    fresh.pop(0)
                else:
                    del score[min(mortal, key=lambda p: score[p])]
            fresh.append(place)

    def is_due(self, query: torch.Tensor, place: int) -> bool:
        policy = self.policy
        index = self.steps + (policy.first == "recycled")
        self.steps += 1
        due = policy.stride is not None and index % policy.stride == 0
        if policy.threshold is not None:
            cosine = torch.cosine_similarity(query, self.reference, dim=-1).mean()
            due |= index % policy.check == 0 and float(cosine) <= policy.threshold
            due |= policy.stride is None and 2 * (place - self.full_at) >= BUDGET
        return due

    def step(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """The output of one step, (heads, dim)."""
        policy, place = self.policy, key.shape[1] - 1
        due = self.is_due(query, place)
        self.full += due
        if due and policy.full_step != "attend":
            self.choose(query, key)
        else:
            self.push(place)
        everything = list(range(self.pads, place + 1))
        output = torch.zeros(HEADS, DIM, dtype=key.dtype)
        for head in range(HEADS):
            kv_head = head // (HEADS // KV_HEADS)
            small = sorted([*self.score[kv_head], *self.fresh[kv_head]])
            places = everything if due and policy.full_step != "select" else small
            weights = self.weights(query, key, head, places)
            output[head] = sum(weights[p] * value[kv_head, p] for p in places)
        if policy.victim == "latest" and not due:
            for kv_head in range(KV_HEADS):
                small = sorted([*self.score[kv_head], *self.fresh[kv_head]])
                now = self.joined(query, key, kv_head, small)
                self.score[kv_head] = {p: (now[p], now[p]) for p in self.score[kv_head]}
        return output


def drifting(tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries that stay alike for some steps and turn away at times that differ between sequences."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(BATCH, heads, tokens, DIM, generator=generator, dtype=torch.float64)
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    )
    for row, hold in enumerate((5, 7, 11)):
        topics = torch.randn(tokens // hold + 1, HEADS, DIM, generator=generator, dtype=torch.float64)
        query[row] = 0.6 * query[row] + 2 * topics[torch.arange(tokens) // hold].transpose(0, 1)
    return query, key, value


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("pads", [(0, 0, 0), (0, 3, 9)], ids=["whole", "padded"])
def test_every_step_reads_what_the_rules_say(schedule, pads):
    policy = RecycledAttention(budget=BUDGET, **SCHEDULES[schedule])
    query, key, value = drifting(PROMPT + STEPS)
    cache = policy.make_cache(decoder("Llama", num_hidden_layers=1))
    padding = torch.arange(PROMPT + STEPS) >= torch.tensor(pads)[:, None]
    hands = [ByHand(policy, pad) for pad in pads]
    for start, stop in [(0, PROMPT), *((i, i + 1) for i in range(PROMPT, PROMPT + STEPS))]:
        new = [x[:, :, start:stop] for x in (key, value)]
        cache.layers[0].update(*new)
        forward = Forward(cache=cache, padding=padding[:, :stop] if any(pads) else None)
        call = AttentionCall.from_tensors(query[:, :, start:stop], *new, causal=stop - start > 1, forward=forward)
        parts = policy.read(call)
        if stop == PROMPT:
            for row, hand in enumerate(hands):
                hand.choose(query[row, :, PROMPT - 1 : PROMPT], key[row, :, :PROMPT])
            continue
        got = execute_parts(call, parts, [], policy.title, 0.0).output[:, :, 0]
        want = torch.stack([hand.step(query[i, :, start:stop], key[i, :, :stop], value[i, :, :stop])
                            for i, hand in enumerate(hands)])  # fmt: skip
        torch.testing.assert_close(got, want, atol=1e-6, rtol=0)
        assert cache.full_steps()[0].tolist() == [hand.full for hand in hands], start
    for row, hand in enumerate(hands):
        for kv_head in range(KV_HEADS):
            held = cache.layers[0].small.positions[row, kv_head]
            assert sorted(held[held >= 0].tolist()) == sorted([*hand.score[kv_head], *hand.fresh[kv_head]])
    if "dynamic" in schedule:
        # The sequences turned away at different steps, or there would be nothing to decide alone.
        assert len({hand.full for hand in hands}) > 1
