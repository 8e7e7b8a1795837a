"""Where a decoder keeps its blocks, and each block its MLP and its attention: found by structure, not by class.

    blocks      the longest outermost ModuleList whose members hold attention, or another mixer of tokens
    MLP         the child that is named like one, else the weight matrices of a block that are outside its attention
    down        the projection that returns to the width of the stream; its output is y, what the MLP writes
    attention   the last projection of the attention child that returns to the width of the stream

Reading y at the down projection and not at the MLP module matters for hosts whose module adds the residual itself
(BLOOM). Mixtures of experts have no single down projection: there y is what the module returns, the routed sum.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from headway.errors import HostError, unknown

_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
_MIXER = re.compile(r"mamba|mixer|rwkv|lstm|temporal|linear_attn|recurrent|conv|ssm", re.IGNORECASE)
_MLP = re.compile(r"mlp|ffn|feed_?forward|(^|_)ff($|_)|moe|dense_?relu|experts", re.IGNORECASE)
_NORM = re.compile(r"norm|^ln_?", re.IGNORECASE)
_ROUTED = re.compile(r"experts|router|moe$|moeblock|sparsemoe", re.IGNORECASE)
_DOWN = re.compile(r"down|dense_4h_to_h|^c_proj$|^wo$|^w2$|^fc2$|^fc_out$|^linear_2$|^lin2$|^Wo$")
_GATE = re.compile(r"gate|^w1$|^wi_0$|^linear_gate$|^linear_fc1_g$")
_ACTIVATION = re.compile(r"act", re.IGNORECASE)
#: The order in which a token passes the stages of an MLP; a host has those that its MLP has.
STAGES = ("input", "gate", "up", "act", "product", "down")


@dataclass(frozen=True)
class Mlp:
    """The MLP of one block. `entry` is the module whose input is the MLP's input, `exit` the one whose output is y; the
    parts are None where the host has none (`fused` is one projection for gate and up)."""

    name: str
    entry: nn.Module
    exit: nn.Module
    module: nn.Module | None = None
    gate: nn.Module | None = None
    up: nn.Module | None = None
    fused: nn.Module | None = None
    act: nn.Module | None = None

    @property
    def whole(self) -> bool:
        """Whether only input and output are known (experts, or a module without a visible down projection)."""
        return self.entry is self.exit

    @property
    def stages(self) -> tuple[str, ...]:
        """Names of the stages that this MLP has, in order."""
        gated = self.fused is not None or self.gate is not None
        has = {
            "input": True,
            "gate": gated,
            "up": self.fused is not None or self.up is not None,
            "act": self.act is not None or (not gated and not self.whole),
            "product": gated and not self.whole,
            "down": True,
        }
        return tuple(stage for stage in STAGES if has[stage])

    @property
    def why_not_alone(self) -> str:
        """Why this MLP cannot be run on its own; empty when it can."""
        if self.module is None:
            return "" if self.act is not None else f"{self.name} has projections but no activation module beside them."
        count = _required(self.module)
        return "" if count in (1, 2) else f"{self.name} needs {count} arguments to run, not just its input."

    @torch.no_grad()
    def apply(self, x: Float[Tensor, "rows width"]) -> Float[Tensor, "rows width"]:
        """y for the given inputs, by the host's own modules. Raises HostError when it cannot be run on its own."""
        if self.why_not_alone:
            raise HostError(f"MLP: got one that cannot be run on its own, expected one that can. {self.why_not_alone}")
        if self.module is None:
            return self.exit(self.act(self.entry(x)))  # type: ignore[misc]
        caught: list[Tensor] = []
        hook = self.exit.register_forward_hook(lambda module, args, output: caught.append(first_tensor(output)))
        try:
            shaped = x[None]
            self.module(*[shaped, *[torch.zeros_like(shaped)] * (_required(self.module) - 1)])
        finally:
            hook.remove()
        return caught[0].reshape(x.shape)


@dataclass(frozen=True)
class Block:
    """One decoder block: the module, its MLP, and its attention's output projection (None for a block without one)."""

    name: str
    module: nn.Module
    mlp: Mlp
    attention: nn.Module | None


def find_blocks(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Path and module of every decoder block, in order.

    Raises HostError that lists what was searched when the model has no list of at least two blocks."""
    lists = list(_outermost_lists(model, ""))
    stacks = [(name, stack) for name, stack in lists if len(stack) > 1 and all(_is_block(b) for b in stack)]
    if not stacks:
        seen = ", ".join(f"{name} ({len(stack)} × {type(stack[0]).__name__})" for name, stack in lists if len(stack))
        raise HostError(
            f"model: searched {type(model).__name__} for a ModuleList of at least two decoder blocks that "
            f"hold attention (or another mixer) and more; found {seen or 'no ModuleList at all'}. Pass the language "
            "model itself (model.language_model, model.model)."
        )
    name, stack = max(stacks, key=lambda item: (len(item[1]), "decoder" in item[0], "visi" not in item[0]))
    return [(f"{name}.{i}", block) for i, block in enumerate(stack)]


def find_structure(model: nn.Module) -> list[Block]:
    """Every decoder block with its MLP and attention output. Raises HostError naming the block that lacks an MLP."""
    return [
        Block(name=name, module=block, mlp=find_mlp(block, name), attention=_attention_output(block))
        for name, block in find_blocks(model)
    ]


def find_mlp(block: nn.Module, name: str = "block") -> Mlp:
    """The MLP of a block. Raises HostError that lists the children searched when there is none."""
    for path, child in _mlp_children(block):
        full = f"{name}.{path}"
        linears = [] if _routed(child, path) else list(_linears(child))
        return _from_linears(full, linears, child, child) or Mlp(name=full, entry=child, exit=child, module=child)
    outside = [(path, m) for path, m in _linears(block) if not _mixes_tokens(path)]
    found = _from_linears(name, outside, None, block)
    if found is not None:
        return found
    children = ", ".join(f"{path} ({type(child).__name__})" for path, child in block.named_children())
    raise HostError(
        f"{name}: searched {children or 'no children'} for an MLP: a child called mlp, ffn, feed_forward or moe, or "
        "projections outside attention that lead away from the width of the stream and back; found none. This host "
        "cannot be analysed for secondary sinks."
    )


def first_tensor(output: Any) -> Tensor:
    """The tensor that a module returned, alone or as the first of a tuple."""
    return output if isinstance(output, Tensor) else output[0]


def find_norms(block: nn.Module) -> list[nn.Module]:
    """The normalisation layers of a block, those inside its attention left out."""
    return [
        module
        for path, module in block.named_modules()
        if path and not _mixes_tokens(path) and _NORM.search(type(module).__name__)
    ]


def check_layer(layer: int, layers: int) -> int:
    """`layer` if the model has it, else ArgumentError."""
    if isinstance(layer, bool) or not 0 <= layer < layers:
        raise unknown("layer", layer, range(layers))
    return layer


def _outermost_lists(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.ModuleList]]:
    """ModuleLists that are not inside the blocks of another: experts of a block are never taken for blocks."""
    for name, child in module.named_children():
        path = f"{prefix}.{name}" if prefix else name
        if isinstance(child, nn.ModuleList):
            yield path, child
        else:
            yield from _outermost_lists(child, path)


def _is_block(module: nn.Module) -> bool:
    return _matrices(module) >= 2 and any(_mixes_tokens(path) for path, _ in module.named_modules())


def _mixes_tokens(name: str) -> bool:
    return bool(_ATTENTION.search(name) or _MIXER.search(name))


def _matrices(module: nn.Module) -> int:
    return sum(p.ndim >= 2 for p in module.parameters())


def _mlp_children(block: nn.Module) -> list[tuple[str, nn.Module]]:
    """Descendants, up to three deep, that look like an MLP: a mixture of experts first, else the last one first."""
    found: list[tuple[str, nn.Module]] = []
    for path, child in block.named_modules():
        parts = path.split(".")
        if not path or len(parts) > 3 or any(path.startswith(f"{taken}.") for taken, _ in found):
            continue
        kind = "" if _MLP.search(parts[-1]) or isinstance(child, nn.ModuleList) else type(child).__name__
        named = _MLP.search(parts[-1]) or _MLP.search(kind)
        excluded = _NORM.search(parts[-1]) or any(_mixes_tokens(name) for name in (*parts, kind))
        if named and not excluded and _matrices(child) >= 2:
            found.append((path, child))
    found.reverse()
    return sorted(found, key=lambda item: not _routed(item[1], item[0]))


def _routed(module: nn.Module, path: str) -> bool:
    names = [path.split(".")[-1], type(module).__name__, *(name for name, _ in module.named_children())]
    return any(_ROUTED.search(name) for name in names)


def _sizes(module: nn.Module) -> tuple[int, int] | None:
    """(inputs, outputs) of a projection; transformers' Conv1D stores its matrix the other way round."""
    if isinstance(module, nn.Embedding) or getattr(getattr(module, "weight", None), "ndim", 0) != 2:
        return None
    if hasattr(module, "in_features"):
        return int(module.in_features), int(module.out_features)  # type: ignore[arg-type]
    inputs, outputs = module.weight.shape  # type: ignore[misc]
    return (int(inputs), int(outputs)) if hasattr(module, "nf") else (int(outputs), int(inputs))


def _linears(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for path, child in module.named_modules():
        if path and _sizes(child) is not None:
            yield path, child


def _from_linears(
    name: str, linears: list[tuple[str, nn.Module]], module: nn.Module | None, home: nn.Module
) -> Mlp | None:
    """The parts of an MLP from its projections, named or by their sizes; None when they do not make one, or when an MLP
    module has further projections, so that its down projection may not be the last word."""
    if len(linears) < 2:
        return None
    width = _sizes(linears[0][1])[0]  # type: ignore[index]
    back = [(p, m) for p, m in linears if _sizes(m)[1] == width]  # type: ignore[index]
    named = [(p, m) for p, m in back if _DOWN.search(p.split(".")[-1])]
    if not (named or back):
        return None
    down = (named or back)[-1][1]
    inner = _sizes(down)[0]  # type: ignore[index]
    ways_in = [(p, m) for p, m in linears if m is not down and _sizes(m) in ((width, inner), (width, 2 * inner))]
    if not ways_in or (module is not None and len(ways_in) + 1 < len(linears)):
        return None
    act = _activation(home)
    entry = ways_in[0][1]
    if _sizes(entry) == (width, 2 * inner):
        return Mlp(name=name, entry=entry, exit=down, module=module, fused=entry, act=act)
    if len(ways_in) == 1:
        return Mlp(name=name, entry=entry, exit=down, module=module, up=entry, act=act)
    gates = [m for p, m in ways_in if _GATE.search(p.split(".")[-1])]
    ups = [m for _, m in ways_in if m not in gates]
    if len(gates) != 1 or len(ups) != 1:
        return Mlp(name=name, entry=entry, exit=down, module=module)
    return Mlp(name=name, entry=entry, exit=down, module=module, gate=gates[0], up=ups[0], act=act)


def _activation(home: nn.Module) -> nn.Module | None:
    for path, module in home.named_modules():
        named = _ACTIVATION.search(path.split(".")[-1]) and not _mixes_tokens(path)
        if named and not any(True for _ in module.parameters()):
            return module
    return None


def _attention_output(block: nn.Module) -> nn.Module | None:
    for name, child in block.named_modules():
        if (
            name
            and _ATTENTION.search(name.split(".")[-1])
            and not _NORM.search(name.split(".")[-1])
            and _matrices(child) >= 2
        ):
            linears = [(m, s) for m in child.modules() if (s := _sizes(m)) is not None]
            width = linears[0][1][0] if linears else 0
            back = [m for m, (_, outputs) in linears if outputs == width]
            return back[-1] if back else child
    return None


def _required(module: nn.Module) -> int:
    """How many arguments a module's forward cannot do without."""
    parameters = inspect.signature(module.forward).parameters.values()
    return sum(p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters)
