"""Coverage: whether a host's attention passes the door, shown by running it there and comparing with the native output.

difference = max |y_door - y_native| / max |y_native|      with the door's own kernel at every site
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from headway.door.adapter import uses_registry
from headway.door.attach import use
from headway.door.call import AttentionCall
from headway.door.selftest import TOLERANCE, first_tensor
from headway.door.stages import Editor
from headway.door.structure import hard_coded, mixer_kind
from headway.errors import ArgumentError, InterceptionError

#: What a kind of module means for the door, by the kind that `attention_report` gives it.
HARD_CODED = "hard-coded attention"
REGISTRY = "registry"


@dataclass(frozen=True)
class AttentionModule:
    """One class of token-mixing modules in a host: how many there are, where the first one is, how it computes."""

    module_class: str
    first: str
    count: int
    kind: str

    @property
    def passes(self) -> bool:
        return self.kind == REGISTRY

    @property
    def reason(self) -> str:
        """One line that says what the kind means for the door."""
        where = f"{self.count} × {self.module_class}, first at {self.first}"
        if self.kind == REGISTRY:
            return f"{where}: asks the attention registry, so it passes the door"
        if self.kind == HARD_CODED:
            return f"{where}: computes attention in its own forward and never asks the attention registry"
        return f"{where}: a {self.kind}, without a softmax over keys"


@dataclass(frozen=True)
class Coverage:
    """What came of trying a host. `outcome` is "passes" when the door reproduces the native output at every site,
    "refused" when attaching raised InterceptionError (its message is `reason`), "differs" when attaching raised nothing
    and the output is another one: a defect of the door. `difference` is relative to the largest native entry."""

    architecture: str
    outcome: str
    reason: str = ""
    sites: int = 0
    difference: float = float("nan")


class DoorKernel(Editor):
    """Leaves every weight as it is; a site with an editor of weights runs the door's kernel, and that is its use."""

    def edit_weights(
        self,
        call: AttentionCall,
        weights: Float[Tensor, "batch heads rows keys"],
        rows: Int[Tensor, " rows"],
    ) -> Float[Tensor, "batch heads rows keys"]:
        return weights


def cover(model: nn.Module, example: dict[str, Any], *, architecture: str = "") -> Coverage:
    """Runs `model(**example)` natively and through the door's own kernel at every site, and compares the outputs.

    `architecture` names the host in the result (its class by default). Errors other than InterceptionError pass."""
    name = architecture or type(model).__name__
    with torch.no_grad():
        native = first_tensor(model(**example))
        if native is None:
            raise ArgumentError(
                f"model: got {name}, whose output holds no tensor of floats; expected logits or states."
            )
        try:
            with use(model, DoorKernel(), example=example) as handle:
                through = first_tensor(model(**example))
        except InterceptionError as error:
            return Coverage(name, "refused", str(error))
    rows = handle.report()
    around = [row["site"] for row in rows if "native" in row["paths"]]
    if around:
        return Coverage(name, "differs", f"the host's own kernel ran at {', '.join(around)}", len(rows))
    difference = float("inf")
    if through is not None and through.shape == native.shape:
        read = _read_rows(native, example.get("attention_mask"))
        difference = float((through - native)[read].abs().max() / native[read].abs().max())
    if difference <= TOLERANCE.get(native.dtype, TOLERANCE[torch.float32]):
        return Coverage(name, "passes", "", len(rows), difference)
    return Coverage(
        name, "differs", f"the output differs by {difference:.2g} of its largest entry", len(rows), difference
    )


def _read_rows(output: Tensor, mask: Tensor | None) -> Tensor:
    """Which (batch, token) rows of an output mean something: not those of padding, which may see no key at all."""
    if mask is not None and mask.ndim == 2 and output.shape[:2] == mask.shape:
        return mask.bool()
    return torch.ones(output.shape[:1], dtype=torch.bool, device=output.device)


def attention_report(model: nn.Module) -> list[AttentionModule]:
    """Every class of modules in a host that mixes tokens, and whether it passes the door, read without running it.

    The kind is "registry", "hard-coded attention", or what a mixer without attention is (state-space mixer, linear
    attention, gated recurrence, RWKV recurrence, convolution mixer)."""
    found: dict[str, tuple[str, int, str]] = {}
    for path, module in model.named_modules():
        kind = REGISTRY if uses_registry(module) else HARD_CODED if hard_coded(module) else mixer_kind(module)
        if kind is not None:
            name = type(module).__name__
            first, count, _ = found.get(name, (path, 0, kind))
            found[name] = (first, count + 1, kind)
    return [AttentionModule(name, first, count, kind) for name, (first, count, kind) in found.items()]
