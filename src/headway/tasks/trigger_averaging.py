"""Trigger-conditional averaging: a planted task that forces a sink on softmax, and on no normaliser that can be silent.

    y_i = flag_i · mean_{1≤j≤i} content_j        (item 0 is the beginning-of-sequence item, without content)

An item whose flag is set must average all contents so far; any other must output zero. One attention layer without
residual, MLP or positions has to do both. Softmax weights sum to one, so the only way to output zero is to put all
weight on an item whose value is zero: item 0 becomes a sink with a drained value. Normalisers:

    softmax                w = e^s / Σe^s
    softmax_plus_one       w = e^s / (1 + Σe^s)
    learned_denominator    w = e^s / (e^b + Σe^s) ,   b learned, 0 at the start
    sigmoid                w = σ(s) / i               (i contents so far; at least 1)

The task is the trigger-conditional one of arXiv 2603.11487; sizes and training follow the check in which this project
planned it: 8 content channels, 16 items, flags with probability 0.3, Adam at 5e-3 decayed linearly over 3,000 steps.
Several seeds train side by side: the seed is the leading dimension of every tensor, and no seed sees another.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from headway.errors import ArgumentError, unknown
from headway.statistics import generator_of

CONTENT = 8
#: Content, flag, beginning-of-sequence indicator, constant 1.
WIDTH = CONTENT + 3
HEAD_DIM = 16
ITEMS = 16
FLAG_PROBABILITY = 0.3
STEPS = 3000
BATCH = 64
LEARNING_RATE = 5e-3
#: Fresh sequences per seed that a trained layer is judged on.
EVALUATION = 2048
#: Streams of randomness of one seed: the starting weights, the sequences.
WEIGHTS, DATA = 0, 1


@dataclass(frozen=True)
class TriggerBatch:
    """Sequences of the task: what the layer reads, which items carry the flag, what it should say."""

    inputs: Float[Tensor, "seeds sequences items width"]
    flags: Bool[Tensor, "seeds sequences items"]
    targets: Float[Tensor, "seeds sequences items content"]


def data_generators(seeds: Sequence[int]) -> list[torch.Generator]:
    """One stream of sequences per seed, apart from the one that draws its starting weights."""
    return [generator_of(DATA, seed) for seed in seeds]


def trigger_batch(generators: Sequence[torch.Generator], sequences: int, *, items: int = ITEMS) -> TriggerBatch:
    """Fresh sequences, one stream of randomness per seed. Item 0 has no content and no flag."""
    if items < 2:
        raise ArgumentError(f"items: got {items}, expected at least 2: the first one has no content.")
    content = torch.stack([torch.randn(sequences, items, CONTENT, generator=g) for g in generators])
    flags = torch.stack([torch.rand(sequences, items, generator=g) < FLAG_PROBABILITY for g in generators])
    content[:, :, 0] = 0.0
    flags[:, :, 0] = False
    first = torch.zeros_like(flags)
    first[:, :, 0] = True
    marks = torch.stack([flags, first, torch.ones_like(flags)], -1).float()
    count = torch.arange(items).clamp(min=1)[:, None]
    targets = content.cumsum(2) / count * flags[..., None]
    return TriggerBatch(torch.cat([content, marks], -1), flags, targets)


class TriggerAttention(nn.Module):
    """One causal attention head per seed, nothing else: out = W_o Σ_j w_ij v_j.

    Linear maps start as torch's own do, uniform in ±1/√fan_in. They have no biases, for the inputs carry a constant;
    `bias=True` adds them."""

    def __init__(self, seeds: Sequence[int], *, normalizer: str = "softmax", bias: bool = False) -> None:
        super().__init__()
        if normalizer not in NORMALIZERS:
            raise unknown("normalizer", normalizer, NORMALIZERS)
        if len(set(seeds)) != len(seeds) or not seeds:
            raise ArgumentError(f"seeds: got {list(seeds)}, expected at least one, each once.")
        self.normalizer = normalizer
        shapes = {"query": (WIDTH, HEAD_DIM), "key": (WIDTH, HEAD_DIM), "value": (WIDTH, HEAD_DIM)}
        shapes["output"] = (HEAD_DIM, CONTENT)
        generators = [generator_of(WEIGHTS, seed) for seed in seeds]
        self.maps = nn.ParameterDict()
        self.biases = nn.ParameterDict()
        for name, (fan_in, fan_out) in shapes.items():
            bound = fan_in**-0.5
            self.maps[name] = torch.stack([_uniform((fan_in, fan_out), bound, g) for g in generators])
            if bias:
                self.biases[name] = torch.stack([_uniform((1, fan_out), bound, g) for g in generators])
        self.denominator = nn.Parameter(torch.zeros(len(seeds), 1, 1, 1))

    def project(self, name: str, x: Float[Tensor, "seeds *rest fan_in"]) -> Float[Tensor, "seeds *rest fan_out"]:
        flat = x.flatten(1, -2) @ self.maps[name]
        if name in self.biases:
            flat = flat + self.biases[name]
        return flat.unflatten(1, x.shape[1:-1])

    def forward(
        self, inputs: Float[Tensor, "seeds sequences items width"], *, without_first: bool = False
    ) -> tuple[
        Float[Tensor, "seeds sequences items content"],
        Float[Tensor, "seeds sequences items items"],
        Float[Tensor, "seeds sequences items head_dim"],
    ]:
        """Output, weights and values. `without_first` evicts item 0 from what the later items see."""
        query, key, value = (self.project(name, inputs) for name in ("query", "key", "value"))
        items = inputs.shape[2]
        visible = torch.ones(items, items, dtype=torch.bool).tril()
        if without_first:
            visible[1:, 0] = False
        scores = query @ key.transpose(-1, -2) * HEAD_DIM**-0.5
        weights = NORMALIZERS[self.normalizer](scores.masked_fill(~visible, -torch.inf), self.denominator)
        return self.project("output", weights @ value), weights, value


def _uniform(shape: tuple[int, ...], bound: float, generator: torch.Generator) -> Tensor:
    return (torch.rand(shape, generator=generator) * 2 - 1) * bound


def _softmax(scores: Tensor, denominator: Tensor) -> Tensor:
    return scores.softmax(-1)


def _softmax_plus_one(scores: Tensor, denominator: Tensor) -> Tensor:
    return _learned_denominator(scores, torch.zeros_like(denominator))


def _learned_denominator(scores: Tensor, denominator: Tensor) -> Tensor:
    slot = denominator.expand(*scores.shape[:-1], 1)
    return torch.cat([scores, slot], -1).softmax(-1)[..., :-1]


def _sigmoid(scores: Tensor, denominator: Tensor) -> Tensor:
    return scores.sigmoid() / torch.arange(scores.shape[-2]).clamp(min=1)[:, None]


NORMALIZERS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "softmax": _softmax,
    "softmax_plus_one": _softmax_plus_one,
    "learned_denominator": _learned_denominator,
    "sigmoid": _sigmoid,
}


@dataclass(frozen=True, kw_only=True)
class TriggerResult:
    """What a trained layer does with item 0, one number per seed.

    `alpha_first`: mean weight on item 0 over the queries that see it, `alpha_next`: the largest such mean of another
    item. `first_share` and `mass`: weight on item 0, and on all items, at unflagged items. `value_ratio`: ‖v_0‖ over
    the mean of the rest. `error`: mean squared error without item 0's own row; `chance_error`: that of always saying
    zero. `eviction_ratio`: error when item 0 is hidden from the later items ÷ `error`."""

    normalizer: str
    seeds: tuple[int, ...]
    steps: int
    alpha_first: tuple[float, ...]
    alpha_next: tuple[float, ...]
    first_share: tuple[float, ...]
    mass: tuple[float, ...]
    value_ratio: tuple[float, ...]
    error: tuple[float, ...]
    chance_error: tuple[float, ...]
    eviction_ratio: tuple[float, ...]


def run_trigger_averaging(
    normalizer: str,
    seeds: Sequence[int],
    *,
    steps: int = STEPS,
    bias: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> TriggerResult:
    """Trains one layer per seed and judges it on fresh sequences. `progress(done, total)` is called after each step."""
    model = TriggerAttention(seeds, normalizer=normalizer, bias=bias)
    generators = data_generators(seeds)
    train(model, generators, steps=steps, progress=progress)
    return judge(model, trigger_batch(generators, EVALUATION), seeds=seeds, steps=steps)


def train(
    model: TriggerAttention,
    generators: Sequence[torch.Generator],
    *,
    steps: int = STEPS,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Adam on the summed losses of all seeds, which updates each seed as if it were alone."""
    if steps < 1:
        raise ArgumentError(f"steps: got {steps}, expected at least 1.")
    optimiser = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: 1 - step / steps)
    for step in range(steps):
        batch = trigger_batch(generators, BATCH)
        output, _, _ = model(batch.inputs)
        loss = (output - batch.targets).square().mean((1, 2, 3)).sum()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        if progress is not None:
            progress(step + 1, steps)


@torch.no_grad()
def judge(model: TriggerAttention, batch: TriggerBatch, *, seeds: Sequence[int], steps: int) -> TriggerResult:
    """What the layer does on a batch, seed by seed."""
    output, weights, value = model(batch.inputs)
    evicted, _, _ = model(batch.inputs, without_first=True)
    items = weights.shape[-1]
    alpha = weights.sum(-2).mean(1) / torch.arange(items, 0, -1)
    unflagged = ~batch.flags
    unflagged[:, :, 0] = False
    norms = value.norm(dim=-1).mean(1)
    error = _error(output, batch)

    def at_unflagged(x: Tensor) -> Tensor:
        return (x * unflagged).sum((1, 2)) / unflagged.sum((1, 2))

    return TriggerResult(
        normalizer=model.normalizer,
        seeds=tuple(int(s) for s in seeds),
        steps=steps,
        alpha_first=_numbers(alpha[:, 0]),
        alpha_next=_numbers(alpha[:, 1:].amax(1)),
        first_share=_numbers(at_unflagged(weights[..., 0])),
        mass=_numbers(at_unflagged(weights.sum(-1))),
        value_ratio=_numbers(norms[:, 0] / norms[:, 1:].mean(1)),
        error=_numbers(error),
        chance_error=_numbers(_error(torch.zeros_like(output), batch)),
        eviction_ratio=_numbers(_error(evicted, batch) / error),
    )


def _error(output: Tensor, batch: TriggerBatch) -> Tensor:
    return (output - batch.targets)[:, :, 1:].square().mean((1, 2, 3))


def _numbers(x: Tensor) -> tuple[float, ...]:
    return tuple(float(v) for v in x)
