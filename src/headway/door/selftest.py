"""The self-test on attach: shows on a small input that what the door sees is what the host computes.

For every site: the door's own kernel gives the host's output, rows sum to one, nothing sees the future where the call
is causal. For the host: its output depends on its heads, and no attention runs past the door.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from headway.door import adapter
from headway.door.call import AttentionCall
from headway.door.evaluating import evaluating
from headway.door.structure import bypasses, why_not
from headway.errors import InterceptionError

if TYPE_CHECKING:
    from headway.door.attach import Door

_PASSED: weakref.WeakKeyDictionary[nn.Module, tuple[Any, dict[Any, Any]]] = weakref.WeakKeyDictionary()
#: Largest allowed difference to the host's output, as a share of its largest entry, by the type of the weights.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.bfloat16: 4e-2, torch.float16: 1e-2}
#: Row sums are computed in float32 whatever the host's type.
ROW_SUM_TOLERANCE = 1e-4


@dataclass
class Probe:
    """Takes the place of the scopes for one forward: checks every call against the host's own function.

    With `silence` the host gets zeros instead of head outputs."""

    silence: bool = False
    failures: list[str] = field(default_factory=list)
    calls: dict[str, AttentionCall] = field(default_factory=dict)

    def __call__(
        self, call: AttentionCall, function: adapter.AttentionFunction, mask: Any, keywords: dict[str, Any]
    ) -> tuple[Tensor, Tensor | None]:
        given = (call.query, call.key, call.value)
        output, weights = function(call.module, *given, mask, **keywords)
        if self.silence:
            return torch.zeros_like(output), weights
        self.calls[call.site.name] = call
        failure = difference(call, output.transpose(1, 2)) or row_fault(call) or future_fault(call)
        if failure:
            extra = sorted(k for k, v in keywords.items() if k not in adapter.KNOWN_KEYWORDS and v is not None)
            hint = f"; keywords the door does not know: {', '.join(extra)}" if extra else ""
            self.failures.append(f"{call.site.name}: {failure}{hint}")
        return output, weights


def ensure_tested(door: Door, example: dict[str, Any] | None = None) -> None:
    """Runs the self-test unless this model passed it with the same modules, type and device already."""
    model = door.model()
    if model is None:
        raise InterceptionError("model: got one that was deleted, expected a live model. Keep a reference to it.")
    parameter = next(model.parameters(), None)
    # Modules by name, so that a model whose blocks were left out or put back is tested anew.
    modules = tuple((name, id(module)) for module, name in door.modules.items())
    state = (modules, *((None, None) if parameter is None else (parameter.dtype, parameter.device)))
    known = _PASSED.get(model)
    if known is not None and known[0] == state and example is None:
        door.sites.update(known[1])
        return
    run_selftest(door, model, example)
    _PASSED[model] = (state, dict(door.sites))


def run_selftest(door: Door, model: nn.Module, example: dict[str, Any] | None, *, probe: Probe | None = None) -> None:
    """Raises InterceptionError with every reason found; leaves the door's table of sites filled and, in `probe`, the
    calls that were seen."""
    from headway.door.example import example_inputs

    inputs = example_inputs(model) if example is None else dict(example)
    probe = Probe() if probe is None else probe
    try:
        with torch.no_grad(), evaluating(model):
            with door.probing(probe), bypasses(model) as missed:
                before = first_tensor(model(**inputs))
            if not probe.calls:
                raise InterceptionError(f"model: {why_not(model)}")
            if missed:
                raise InterceptionError(
                    "model: got attention that does not pass the registry, expected all of it to: "
                    f"{'; '.join(missed)}. Such "
                    "a host cannot be changed or read as a whole."
                )
            if probe.failures:
                shown = "; ".join(probe.failures[:3])
                more = f" and {len(probe.failures) - 3} more" if len(probe.failures) > 3 else ""
                raise InterceptionError(
                    f"model: the door's kernel does not reproduce {len(probe.failures)} of {len(probe.calls)} sites of "
                    f"{type(model).__name__}: {shown}{more}. Load it with attn_implementation='eager' or 'sdpa', "
                    "or report it."
                )
            with door.probing(Probe(silence=True)):
                after = first_tensor(model(**inputs))
    except InterceptionError:
        raise
    except Exception as error:
        raise InterceptionError(
            f"example: a forward of {type(model).__name__} failed with {type(error).__name__}: {error}. Pass "
            f"example={{…}} "
            "with keyword arguments that the model accepts."
        ) from error
    if before is not None and after is not None and torch.equal(before, after):
        raise InterceptionError(
            f"model: the output of {type(model).__name__} does not change when every head is silenced, expected it to "
            "depend on its attention. The host does not use what its attention function returns."
        )


def difference(call: AttentionCall, output: Tensor) -> str:
    """What is wrong with the door's own output against the host's, or an empty string."""
    if not bool(torch.isfinite(output).all()):
        call.check_finite()
        return "the host's own output is not finite on the example"
    own, lse = call.attend(empty_rows="zero")
    if own.shape != output.shape:
        return f"shape {tuple(own.shape)} against the host's {tuple(output.shape)}"
    rows = (lse > -torch.inf)[..., None]
    worst = float(((own.float() - output.float()).abs() * rows).max())
    scale = float((output.float().abs() * rows).max())
    allowed = TOLERANCE.get(output.dtype, 1e-2) * max(scale, 1e-6)
    return "" if worst <= allowed else f"output differs by {worst:.2g} at a scale of {scale:.2g}"


def row_fault(call: AttentionCall) -> str:
    weights = call.weights()
    total = weights.sum(-1)
    seen = call.visible().any(-1).expand_as(total)
    if call.weighing is not None and not call.weighing.whole:
        return ""
    if call.sinks is not None:
        return "" if bool((total[seen] <= 1 + ROW_SUM_TOLERANCE).all()) else "rows sum to more than one"
    worst = float((total[seen] - 1).abs().max()) if bool(seen.any()) else 0.0
    return "" if worst <= ROW_SUM_TOLERANCE else f"rows sum to 1 ± {worst:.2g}"


def future_fault(call: AttentionCall) -> str:
    if not call.causal:
        return ""
    row = torch.arange(call.queries, device=call.query.device)[:, None] + call.offset
    future = torch.arange(call.keys, device=call.query.device)[None] > row
    return "a row of a causal call reads the future" if bool((call.weights() * future).any()) else ""


def first_tensor(output: Any) -> Tensor | None:
    """The first tensor of floats in a host's output: logits or states."""
    values = (
        output.to_tuple()
        if hasattr(output, "to_tuple")
        else (output if isinstance(output, tuple | list) else (output,))
    )
    for value in values:
        if isinstance(value, Tensor) and value.is_floating_point():
            return value
        if hasattr(value, "to_tuple") and (inner := first_tensor(value)) is not None:
            return inner
    return None
