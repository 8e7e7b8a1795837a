"""Planted processes for the recipe of Recycled Attention, and its attention by hand, where time can be taken.

A query drifts among clusters of keys; a chain of names, each of which says where the next one stands; one layer of
attention under the method's own policy and cache, without a model around it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import normalize

from headway.door.call import AttentionCall, Forward
from headway.door.execute import execute_parts
from headway.evidence.recipe import Context
from headway.methods.long_context.recycled_attention import RecycledAttention, query_similarity, top_keys
from headway.tasks.answering import clock

SINKS = 4
#: The paper's dynamic schedule.
CHECK, THRESHOLD = 5, 0.8
#: Keys in clusters, a query that stays with one for about so many steps.
KEYS, CLUSTERS, PLANTED_BUDGET, TOPIC_STEPS = 4096, 64, 128, 60
PLANTED_STRIDES = (5, 10, 25, 50, 100)
#: Tokens that spell one name of a chain.
SPELLING = 8
#: Attention that is timed: heads as in SmolLM2, the budget and stride of a long context.
HEADS, KV_HEADS, DIM, TIMED_BUDGET, TIMED_STRIDE = 9, 3, 64, 1024, 32
#: A module on the CPU, where attention is timed.
_NOWHERE = nn.Linear(1, 1)


def _clusters(generator: torch.Generator) -> tuple[Float[Tensor, "keys dim"], Float[Tensor, "clusters dim"]]:
    """Keys around the directions of their clusters, in random order."""
    centres = normalize(torch.randn(CLUSTERS, DIM, generator=generator), dim=-1)
    keys = centres.repeat_interleave(KEYS // CLUSTERS, 0) + 0.05 * torch.randn(KEYS, DIM, generator=generator)
    return keys[torch.randperm(KEYS, generator=generator)], centres


def _drifting(generator: torch.Generator, centres: Tensor, topics: Sequence[int]) -> Float[Tensor, "steps dim"]:
    """Queries near the direction of their topic; what is added is AR(1) with a coefficient of 0.9."""
    noise, queries = torch.zeros(DIM), []
    for topic in topics:
        noise = 0.9 * noise + 0.19**0.5 * torch.randn(DIM, generator=generator)
        queries.append(centres[topic] + 0.03 * noise)
    return torch.stack(queries)


def _weights(queries: Tensor, keys: Tensor) -> Float[Tensor, "steps keys"]:
    """A logit of 15 where a query agrees with a key."""
    return (15 * queries @ keys.T).softmax(-1)


def _mass_of(weights: Float[Tensor, "steps keys"], full: Sequence[int]) -> float:
    """Mean mass over all steps when the steps in `full` read everything and choose, and the others recycle."""
    mass = torch.ones(weights.shape[0])
    chosen = top_keys(weights[None, :1], PLANTED_BUDGET)[0, 0]
    for step in range(weights.shape[0]):
        if step in full:
            chosen = top_keys(weights[None, step : step + 1], PLANTED_BUDGET)[0, 0]
        else:
            mass[step] = weights[step, chosen].sum()
    return float(mass.mean())


def planted_drift(context: Context, seeds: int) -> dict[str, list[float]]:
    """Mean recovered mass by schedule, one number per seed, over five topics."""
    found: dict[str, list[float]] = {}
    for seed in range(seeds):
        generator = context.torch_generator(f"drift {seed}")
        keys, centres = _clusters(generator)
        lengths = torch.randint(TOPIC_STEPS - 15, TOPIC_STEPS + 16, (5,), generator=generator)
        topics = torch.randperm(CLUSTERS, generator=generator)[:5].repeat_interleave(lengths).tolist()
        weights = _weights(_drifting(generator, centres, topics), keys)
        schedules = {str(stride): set(range(0, len(topics), stride)) for stride in PLANTED_STRIDES}
        schedules["one choice"] = {0}
        for name, full in schedules.items():
            found.setdefault(name, []).append(_mass_of(weights, sorted(full)))
        window = weights[:, -(PLANTED_BUDGET - SINKS) :].sum(-1) + weights[:, :SINKS].sum(-1)
        found.setdefault("streaming", []).append(float(window.mean()))
        some = torch.randperm(KEYS, generator=generator)[:PLANTED_BUDGET]
        found.setdefault("random", []).append(float(weights[:, some].sum(-1).mean()))
    return found


def bursty_drift(context: Context, seeds: int) -> dict[str, list[float]]:
    """Topics that stay for long and then change several times in a row: full steps on low similarity, and as many at
    even distances."""
    found: dict[str, list[float]] = {"dynamic": [], "fixed": [], "full": []}
    for seed in range(seeds):
        generator = context.torch_generator(f"burst {seed}")
        keys, centres = _clusters(generator)
        order = torch.randperm(CLUSTERS, generator=generator).tolist()
        topics: list[int] = []
        for burst in range(3):
            lengths = [7, 7, 7, 7, int(torch.randint(50, 90, (1,), generator=generator))]
            for number, length in enumerate(lengths):
                topics += [order[5 * burst + number]] * length
        queries = _drifting(generator, centres, topics)
        weights = _weights(queries, keys)
        full, reference = [0], queries[0]
        for step in range(CHECK, len(topics), CHECK):
            if float(query_similarity(queries[None, None, step : step + 1], reference[None, None, None])) <= THRESHOLD:
                full.append(step)
                reference = queries[step]
        even = np.linspace(0, len(topics), len(full), endpoint=False).astype(int).tolist()
        found["dynamic"].append(_mass_of(weights, full))
        found["fixed"].append(_mass_of(weights, even))
        found["full"].append(float(len(full)))
    return found


class LayerByHand:
    """One attention layer under a policy, fed by hand."""

    def __init__(self, policy: RecycledAttention) -> None:
        from headway.hosts.tiny import tiny_host

        # The host says only how many layers the cache has.
        model, _ = tiny_host("llama", num_hidden_layers=1)
        self.policy = policy
        self.cache = policy.make_cache(model)

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """The output of the last row of new tokens."""
        layer = self.cache.layers[0]
        first = layer.seen
        layer.update(key, value)
        call = AttentionCall.from_tensors(
            query, key, value, causal=query.shape[2] > 1, forward=Forward(cache=self.cache), first_key=first
        )
        parts = self.policy.read(call)
        output = call.attend()[0] if parts is None else execute_parts(call, parts, [], "", 0.0).output
        return output[:, :, -1]


def chains(context: Context, seeds: int, hops: int) -> dict[str, list[list[bool]]]:
    """Which hops a decoder gets right, by method, one list per chain.

    The context holds, at random places, one token per link: its key is a name and its value the next name. Each of the
    `SPELLING` tokens of an answer asks for the name before it; the value read at the last of them is the next name."""
    names, filler, budget = 64, 448, 64
    found: dict[str, list[list[bool]]] = {}
    methods: dict[str, Callable[[], RecycledAttention] | None] = {
        "dense": lambda: RecycledAttention(budget=budget, stride=1),
        "4": lambda: RecycledAttention(budget=budget, stride=4, pool=1),
        "32": lambda: RecycledAttention(budget=budget, stride=32, pool=1),
        "dynamic": lambda: RecycledAttention(budget=budget, stride=None, threshold=THRESHOLD, check=CHECK, pool=1),
        "one choice": lambda: RecycledAttention(budget=budget, stride=None, pool=1),
        "streaming": None,
    }
    for seed in range(seeds):
        generator = context.torch_generator(f"chain {seed}")
        codes = normalize(torch.randn(names, DIM, generator=generator), dim=-1)
        order = torch.randperm(names, generator=generator)
        keys = normalize(torch.randn(filler + names, DIM, generator=generator), dim=-1)
        values = torch.zeros(filler + names, DIM)
        places = torch.randperm(filler + names, generator=generator)[:names]
        keys[places] = codes[order]
        values[places] = codes[order.roll(-1)]
        for name, make in methods.items():
            found.setdefault(name, []).append(
                _follow(make, keys, values, codes, order.tolist(), min(hops, names - 1), budget)
            )
    return found


def _follow(
    make: Callable[[], RecycledAttention] | None, keys: Tensor, values: Tensor, codes: Tensor, order: list[int],
    hops: int, budget: int,
) -> list[bool]:  # fmt: skip
    """Follows a chain from its first name; a wrong name is followed as well, and counted wrong."""
    sharpness = 20 * DIM**0.5
    if make is None:
        # Sinks and a window read what they hold, whoever asks.
        held = torch.cat([torch.arange(SINKS), torch.arange(keys.shape[0] - budget + SINKS, keys.shape[0])])
        keys, values = keys[held], values[held]
    attention = LayerByHand(RecycledAttention(budget=budget, stride=1) if make is None else make())
    ask = (sharpness * codes[order[0]]).view(1, 1, 1, DIM)
    attention(ask.expand(1, 1, keys.shape[0], DIM), keys[None, None], values[None, None])
    current, right = order[0], list[bool]()
    for hop in range(hops):
        ask = (sharpness * codes[current]).view(1, 1, 1, DIM)
        for _ in range(SPELLING):
            read = attention(ask, torch.zeros(1, 1, 1, DIM), torch.zeros(1, 1, 1, DIM))
        current = int((read[0, 0] @ codes.T).argmax())
        right.append(current == order[hop + 1])
    return right


@torch.no_grad()
def attention_times(context: Context, lengths: Sequence[int], repeats: int) -> dict[str, dict[str, list[float]]]:
    """Mean seconds of a step of attention over one cycle of a stride, dense and recycled, and seconds of the cycle's
    full step, by context length."""
    generator = context.torch_generator("times")
    found: dict[str, dict[str, list[float]]] = {}
    longest = max(lengths) + 2
    key = torch.randn(1, KV_HEADS, longest, DIM, generator=generator)
    query = torch.randn(1, HEADS, 2, DIM, generator=generator)
    step = (query[:, :, -1:], key[:, :, -1:], key[:, :, -1:])
    for length in lengths:
        sides = {
            "dense": LayerByHand(RecycledAttention(budget=TIMED_BUDGET, stride=1)),
            "recycled": LayerByHand(RecycledAttention(budget=TIMED_BUDGET, stride=TIMED_STRIDE)),
        }
        for attention in sides.values():
            attention.cache.layers[0].full.reserve(length + 2000, key, key)
            attention(query[:, :, -1:], key[:, :, :1], key[:, :, :1])
            layer = attention.cache.layers[0]
            layer.update(key[:, :, 1:length], key[:, :, 1:length])
            layer.small.clear()
            layer.score = torch.empty(0)
            attention(*step)
        by_side: dict[str, list[float]] = {name: [] for name in (*sides, "full")}
        for repeat in range(repeats + 1):
            for name, attention in sides.items():
                seconds, full = _cycle(attention, step)
                if repeat:
                    by_side[name].append(seconds / TIMED_STRIDE)
                    if name == "recycled":
                        by_side["full"].append(full)
        found[str(length)] = by_side
    return found


def _cycle(attention: LayerByHand, step: tuple[Tensor, Tensor, Tensor]) -> tuple[float, float]:
    """Seconds of one stride of steps, and of those among them that were full."""
    layer = attention.cache.layers[0]
    total = full = 0.0
    for _ in range(TIMED_STRIDE):
        before = int(layer.full_steps.sum())
        start = clock(_NOWHERE)
        attention(*step)
        seconds = clock(_NOWHERE) - start
        total += seconds
        full += seconds if int(layer.full_steps.sum()) > before else 0.0
    return total, full
