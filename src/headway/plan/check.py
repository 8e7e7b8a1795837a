"""A plan against the clock: this machine's rates from small kernels, then predicted and measured times side by side.

Three rates are measured in the same run, each the best of a few repetitions: arithmetic on a matrix product of the
model's width, bandwidth on matrix-vector products over more weights than caches hold, attention on the fused kernel. A
fourth number, the time of a layer that has next to nothing to compute, stands for everything that is none of these.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from headway.door import use
from headway.door.stages import Stage
from headway.errors import ArgumentError, HostError
from headway.methods.budget import stages_at_budget
from headway.plan.cost import kv_bytes, prompt, step
from headway.plan.footprint import Footprint, dense, of_stages
from headway.plan.hardware import Hardware
from headway.plan.shape import ModelShape, shape_of

#: Least seconds that a repetition of a micro-benchmark takes, and how many there are.
LEAST = 0.05
REPEATS = 3
#: Weights that a bandwidth measurement reads, in bytes: more than the caches of a processor hold.
SWEEP = 192 << 20
#: Rows of the matrix product, and tokens of the attention, that are measured at most.
ROWS = 512
DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


@dataclass(frozen=True, kw_only=True)
class Checked:
    """One method and phase: predicted and measured seconds (of a prompt, or of one step), their ratio, and bytes of the
    cache, predicted and held."""

    method: str
    budget: float | None
    phase: str
    predicted: float
    measured: float
    predicted_bytes: int
    held_bytes: int

    @property
    def ratio(self) -> float:
        """Predicted over measured; below 1 where something is not in the model."""
        return self.predicted / self.measured

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"ratio": self.ratio}


@dataclass(frozen=True, kw_only=True)
class Check:
    """The rates of this machine and a row per method and phase."""

    machine: Hardware
    tokens: int
    rows: tuple[Checked, ...]

    def to_dict(self) -> dict[str, Any]:
        return {
            "machine": asdict(self.machine), "tokens": self.tokens, "rows": [row.to_dict() for row in self.rows]
        }  # fmt: skip


def check(
    model: nn.Module,
    *,
    tokens: int,
    methods: Sequence[tuple[str, float]] = (),
    steps: int = 8,
    repeats: int = 3,
    seed: int = 0,
) -> Check:
    """Predicts and measures a prompt of random tokens and steps behind it, for dense attention and each method.

    Times are medians of `repeats` prompts, and of all steps. Raises ArgumentError for numbers that cannot be and
    HostError for more tokens than the model has positions."""
    if tokens < 2 or steps < 1 or repeats < 1:
        raise ArgumentError(f"tokens, steps, repeats: got {tokens}, {steps}, {repeats}; expected at least 2, 1 and 1.")
    shape = shape_of(model.config)
    if shape.positions is not None and tokens + steps > shape.positions:
        raise HostError(
            f"tokens: got {tokens} and {steps} steps, expected no more than the {shape.positions} positions of the "
            "model. Use fewer."
        )
    parameter = next(model.parameters())
    if parameter.dtype not in DTYPES:
        raise ArgumentError(f"model: got weights in {parameter.dtype}, expected one of {', '.join(DTYPES.values())}.")
    machine = calibrate(model, shape, tokens=tokens)
    common: dict[str, Any] = {"dtype": DTYPES[parameter.dtype], "batch": 1, "devices": 1}
    ids = torch.randint(
        min(8, model.config.get_text_config().vocab_size - 1),  # type: ignore[operator,union-attr]
        model.config.get_text_config().vocab_size,  # type: ignore[operator,union-attr]
        (1, tokens + steps),
        generator=torch.Generator().manual_seed(seed),
    ).to(parameter.device)
    rows = []
    for name, share in (("dense", None), *methods):
        stages = () if share is None else stages_at_budget(name, share, tokens=tokens, model=model)
        used = [_used(name, share, stages, shape, tokens + done) for done in (0, steps)]
        seconds, held = _measure(model, stages, ids, tokens, repeats)
        predicted = (
            prompt(shape, used[0], machine, **common).seconds,
            # The step in the middle of those that are measured stands for them.
            step(shape, _used(name, share, stages, shape, tokens + steps // 2), machine, **common).seconds,
        )
        for index, phase in enumerate(("prompt", "step")):
            rows.append(
                Checked(
                    method=name,
                    budget=share,
                    phase=phase,
                    predicted=predicted[index],
                    measured=seconds[index],
                    predicted_bytes=kv_bytes(shape, used[index], dtype=common["dtype"]),
                    held_bytes=held[index],
                )
            )
    return Check(machine=machine, tokens=tokens, rows=tuple(rows))


def calibrate(model: nn.Module, shape: ModelShape, *, tokens: int) -> Hardware:
    """This machine as a `Hardware`, at the model's type, width and heads."""
    parameter = next(model.parameters())
    like: dict[str, Any] = {"dtype": parameter.dtype, "device": parameter.device}
    rows, wide = min(tokens, ROWS), 4 * shape.hidden
    left, right = torch.randn(rows, shape.hidden, **like), torch.randn(wide, shape.hidden, **like)
    flops = 2 * rows * shape.hidden * wide / best_time(lambda: nn.functional.linear(left, right))
    return Hardware(
        name="here",
        what="this machine",
        flops=flops,
        bandwidth=_bandwidth(shape.hidden, like),
        memory=None,
        source="micro-benchmarks of this run",
        type=DTYPES[parameter.dtype],
        attention_flops=_attention_rate(shape, rows, like),
        overhead=_overhead(model),
    )


@torch.no_grad()
def best_time(run: Callable[[], Any], *, least: float = LEAST, repeats: int = REPEATS) -> float:
    """Seconds of one call: the best of a few repetitions, each of as many calls as take `least` seconds."""
    run()
    start = time.perf_counter()
    run()
    calls = max(math.ceil(least / max(time.perf_counter() - start, 1e-7)), 1)
    found = []
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(calls):
            run()
        _wait()
        found.append((time.perf_counter() - start) / calls)
    return min(found)


def _bandwidth(width: int, like: dict[str, Any]) -> float:
    """Bytes per second of matrix-vector products, one matrix after the other."""
    size = torch.empty((), dtype=like["dtype"]).element_size()
    height = max(4 * width, 1024)
    count = max(SWEEP // (size * width * height), 2)
    weights = [torch.randn(height, width, **like) for _ in range(count)]
    vector = torch.randn(1, width, **like)

    def sweep() -> None:
        for weight in weights:
            nn.functional.linear(vector, weight)

    return count * size * width * height / best_time(sweep)


def _attention_rate(shape: ModelShape, rows: int, like: dict[str, Any]) -> float:
    layer = shape.layers[0]
    query, key, value = (torch.randn(1, layer.heads, rows, dim, **like) for dim in (
        layer.key_dim, layer.key_dim, layer.value_dim))  # fmt: skip
    taken = best_time(lambda: nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True))
    return 2 * layer.entry * layer.heads * (rows * (rows + 1) // 2) / taken


def _overhead(model: nn.Module) -> float:
    """Seconds per layer of a step through a model of the same kind in which nothing is large."""
    from headway.hosts.tiny import tiny_host

    small, inputs = tiny_host(str(model.config.model_type))  # type: ignore[union-attr]
    one = inputs["input_ids"][:1, :1]
    parameter = next(model.parameters())
    small = small.to(dtype=parameter.dtype, device=parameter.device)
    one = one.to(parameter.device)
    layers = small.config.get_text_config().num_hidden_layers  # type: ignore[operator,union-attr]
    return best_time(lambda: small(input_ids=one, use_cache=True)) / layers


def _used(name: str, share: float | None, stages: tuple[Stage, ...], shape: ModelShape, tokens: int) -> Footprint:
    if share is None:
        layers = tuple(dense(layer, tokens) for layer in shape.layers)
        return Footprint(method=name, budget=None, tokens=tokens, layers=layers, exact=True)
    return of_stages(name, share, stages, shape, tokens)


@torch.no_grad()
def _measure(
    model: nn.Module, stages: tuple[Stage, ...], ids: torch.Tensor, tokens: int, repeats: int
) -> tuple[tuple[float, float], tuple[int, int]]:
    """Median seconds of a prompt and of a step, and the bytes held after the prompt and after all steps."""
    prompts, steps, held = [], [], (0, 0)
    with use(model, *stages):
        for _ in range(repeats):
            start = time.perf_counter()
            out: Any = model(input_ids=ids[:, :tokens], use_cache=True, logits_to_keep=1)
            _wait()
            prompts.append(time.perf_counter() - start)
            first = held_bytes(out.past_key_values)
            for place in range(tokens, ids.shape[1]):
                start = time.perf_counter()
                out = model(input_ids=ids[:, place : place + 1], past_key_values=out.past_key_values, use_cache=True)
                _wait()
                steps.append(time.perf_counter() - start)
            held = (first, held_bytes(out.past_key_values))
    return (statistics.median(prompts), statistics.median(steps)), held


def held_bytes(cache: Any) -> int:
    """Bytes of the keys and values that a cache holds."""
    if hasattr(cache, "stored_bytes"):
        return int(cache.stored_bytes())
    found = 0
    for layer in cache.layers:
        for tensor in (getattr(layer, "keys", None), getattr(layer, "values", None)):
            if isinstance(tensor, torch.Tensor):
                found += tensor.numel() * tensor.element_size()
    return found


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
