"""Is the sink made by an outlier circuit: an MLP that writes massive activations, which a later layer takes away?

    trace   per layer, of the sink tokens: max |input of the down-projection|, max |block output|, attention received
    life    emergence: first block whose output is massive;  vanish: first one after it whose output is not
    cause   without its top coordinates after the emergence block, the sink loses attention:  1 − rate' / rate

Survey: arXiv 2604.10098; massive is |h| > 100 and ≥ 1000 · median |h| (arXiv 2402.17762) unless said otherwise.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from headway.errors import ArgumentError, unknown
from headway.methods.sinks.sink_survey.broadcast import sink_density
from headway.methods.sinks.sink_survey.interpretation.finding import Finding, judged
from headway.methods.sinks.sink_survey.metrics import MASSIVE_MAGNITUDE, MASSIVE_RATIO
from headway.methods.sinks.sink_survey.registers import block_list, down_projections

#: Share of its attention that a sink must lose for the coordinates to be its cause. Ours.
CAUSED = 0.5
ABLATIONS = ("zero", "mean")


@dataclass(frozen=True, kw_only=True)
class CircuitTrace:
    """By block: the largest entry of the sinks at the input of the down-projection and in the block's output, the
    median |entry| of that output over all tokens, and the mean attention that the sinks receive. `emergence` and
    `vanish` are blocks, None where there is none."""

    down_input: Float[Tensor, " blocks"]
    output: Float[Tensor, " blocks"]
    median: Float[Tensor, " blocks"]
    received: Float[Tensor, " blocks"]
    emergence: int | None
    vanish: int | None


@torch.no_grad()
def trace_circuit(
    model: nn.Module,
    ids: Int[Tensor, "batch tokens"],
    *,
    sinks: Sequence[int] = (0,),
    magnitude: float = MASSIVE_MAGNITUDE,
    ratio: float = MASSIVE_RATIO,
) -> CircuitTrace:
    """The trace of the sinks, columns of unpadded input."""
    if not sinks or max(sinks) >= ids.shape[1]:
        raise ArgumentError(f"sinks: got {list(sinks)}, expected columns 0..{ids.shape[1] - 1}, at least one.")
    columns = list(sinks)
    down: list[float] = []
    output: list[tuple[float, float]] = []

    def read_down(module: nn.Module, args: tuple[Any, ...]) -> None:
        down.append(float(args[0].reshape(*ids.shape, -1)[:, columns].float().abs().amax()))

    def read_output(module: nn.Module, args: Any, result: Any) -> None:
        h = (result if isinstance(result, Tensor) else result[0]).float().abs()
        output.append((float(h[:, columns].amax()), float(h.median())))

    hooks = [m.register_forward_pre_hook(read_down) for m in down_projections(model)]
    hooks += [m.register_forward_hook(read_output) for m in blocks_of(model)]
    try:
        model(input_ids=ids, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    density = sink_density(model, {"input_ids": ids, "use_cache": False}, sinks=columns)
    top, median = torch.tensor(output).unbind(1)
    massive = (top > magnitude) & (top >= ratio * median)
    emergence = int(massive.long().argmax()) if bool(massive.any()) else None
    later = [] if emergence is None else [b for b in range(emergence, len(top)) if not bool(massive[b])]
    received = torch.stack([density[layer].mean() for layer in sorted(density)])
    return CircuitTrace(
        down_input=torch.tensor(down),
        output=top,
        median=median,
        received=received,
        emergence=emergence,
        vanish=later[0] if later else None,
    )


@torch.no_grad()
def outlier_circuit(
    model: nn.Module,
    ids: Int[Tensor, "batch tokens"],
    *,
    sinks: Sequence[int] = (0,),
    coordinates: int = 3,
    ablation: str = "zero",
    **criteria: float,
) -> Finding:
    """The share of its attention that the sink loses in the layers behind the emergence block when the top coordinates
    of its state there are set to zero, or to their mean over the other tokens. `details` hold the trace and the change
    of the loss."""
    if ablation not in ABLATIONS:
        raise unknown("ablation", ablation, ABLATIONS)
    trace = trace_circuit(model, ids, sinks=sinks, **criteria)
    details: dict[str, Any] = {
        "emergence": trace.emergence,
        "vanish": trace.vanish,
        "down_input": trace.down_input.tolist(),
        "output": trace.output.tolist(),
        "received": trace.received.tolist(),
    }
    if trace.emergence is None:
        return judged(
            "outlier circuit", float("nan"), sentence="", requires=(False, "no block makes the sink massive"),
            details=details,
        )  # fmt: skip
    end = len(trace.received) if trace.vanish is None else trace.vanish + 1
    inputs = {"input_ids": ids, "use_cache": False}
    before = _mean_between(sink_density(model, inputs, sinks=sinks), trace.emergence + 1, end)
    loss = _loss(model, ids)
    with without_coordinates(model, trace.emergence, sinks, coordinates, ablation):
        after = _mean_between(sink_density(model, inputs, sinks=sinks), trace.emergence + 1, end)
        changed = _loss(model, ids)
    details |= {"rate": before, "rate_without": after, "loss": loss, "loss_without": changed}
    fall = 1 - after / before if before > 0 else float("nan")
    return judged(
        "outlier circuit",
        fall,
        at_least=CAUSED,
        sentence=f"without {coordinates} coordinates after block {trace.emergence} the sink loses {fall:.0%} of its "
        f"attention; the loss goes from {loss:.3g} to {changed:.3g}",
        details=details,
    )


@contextmanager
def without_coordinates(
    model: nn.Module, block: int, sinks: Sequence[int], count: int, ablation: str = "zero"
) -> Iterator[None]:
    """While the context is open, the `count` largest coordinates of the sinks in the output of a block are gone."""
    columns = list(sinks)

    def ablate(module: nn.Module, args: Any, result: Any) -> Any:
        h = result if isinstance(result, Tensor) else result[0]
        if h.shape[1] <= max(columns):
            return result
        h = h.clone()
        top = h[:, columns].abs().topk(min(count, h.shape[2]), -1).indices
        others = [t for t in range(h.shape[1]) if t not in columns]
        fill = h[:, others].mean(1, keepdim=True) if ablation == "mean" and others else torch.zeros_like(h[:, :1])
        h[:, columns] = h[:, columns].scatter(2, top, fill.expand(-1, len(columns), -1).gather(2, top))
        return h if isinstance(result, Tensor) else (h, *result[1:])

    hook = blocks_of(model)[block].register_forward_hook(ablate)
    try:
        yield
    finally:
        hook.remove()


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The blocks of a transformer: the longest list of modules in it."""
    return list(block_list(model))


def _mean_between(density: dict[int, Tensor], start: int, stop: int) -> float:
    inside = [d.mean() for layer, d in density.items() if start <= layer < stop]
    return float(torch.stack(inside).mean()) if inside else float("nan")


def _loss(model: nn.Module, ids: Tensor) -> float:
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
    return float(nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()))
