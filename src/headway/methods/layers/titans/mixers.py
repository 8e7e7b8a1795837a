"""The memory alone (LMM), beside sliding-window attention (MAG) and below it (MAL)."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import silu

from headway.door.mixer import Mixer, State, check_inputs, document_positions, register_mixer, steps
from headway.errors import unknown
from headway.methods.layers.titans.joins import EPSILON, Join
from headway.methods.layers.titans.memory import MemoryOptions, MemoryTrace, NeuralMemory, Tensors
from headway.methods.layers.titans.window import WindowAttention


class TitansMixer(Mixer):
    """What the four have in common: token-by-token calls, the sum of states, and inspection.

    A subclass has `parts`, the modules with a state by name, and `mix`, which maps tokens and the old state to new
    ones."""

    parts: tuple[str, ...] = ("memory",)

    @classmethod
    def option_names(cls) -> list[str]:
        return [name for name in super().option_names() if name != "memory"] + [f.name for f in fields(MemoryOptions)]

    @classmethod
    def memory_options(cls, given: dict[str, Any]) -> MemoryOptions:
        """The options of the memory among those of the constructor. Raises ArgumentError for one that nobody has."""
        for name in given:
            if name not in cls.option_names():
                raise unknown(f"options of {cls.slug}", name, cls.option_names())
        return MemoryOptions(**given)

    def init_state(
        self, batch: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> State:
        tensors: Tensors = {}
        for part in self.parts:
            tensors |= named(part, getattr(self, part).start(batch, dtype))
        own = next(self.parameters()).device if device is None else torch.device(device)
        return stored(tensors, torch.zeros(batch, dtype=torch.long)).to(own)

    def forward(
        self,
        x: Float[Tensor, "batch tokens width"],
        *,
        mask: Bool[Tensor, "batch tokens"] | None = None,
        resets: Bool[Tensor, "batch tokens"] | None = None,
        state: State | None = None,
        mode: str = "block",
        grid: tuple[int, int] | None = None,
    ) -> tuple[Float[Tensor, "batch tokens width"], State | None]:
        x = check_inputs(self, x, mask, resets, state, mode)
        if not x.shape[1]:
            return x, state
        if mode != "step" or x.shape[1] == 1:
            return self._run(x, mask, resets, state, mode, None)
        now = self.init_state(x.shape[0], device=x.device, dtype=x.dtype) if state is None else state
        outputs = []
        for one, real, opens in steps(x, mask, resets):
            output, after = self._run(one, real, opens, now, mode, None)
            outputs.append(output)
            now = now if after is None else after
        return torch.cat(outputs, 1), None if state is None else now

    @torch.no_grad()
    def inspect(
        self,
        x: Float[Tensor, "batch tokens width"],
        *,
        mask: Bool[Tensor, "batch tokens"] | None = None,
        resets: Bool[Tensor, "batch tokens"] | None = None,
        state: State | None = None,
    ) -> MemoryTrace:
        """Surprise, loss, θ, η and α of every token and head: what the memory found new, and what it did about it."""
        trace: list[MemoryTrace] = []
        self._run(check_inputs(self, x, mask, resets, state, "block"), mask, resets, state, "block", trace)
        if not trace:
            return MemoryTrace(*(x.new_zeros(x.shape[0], self.heads, 0) for _ in fields(MemoryTrace)))
        return trace[0]

    def mix(
        self,
        x: Float[Tensor, "batch tokens width"],
        mask: Bool[Tensor, "batch tokens"] | None,
        position: Int[Tensor, "batch tokens"],
        after: Int[Tensor, " batch"],
        state: State | None,
        mode: str,
        trace: list[MemoryTrace] | None,
    ) -> tuple[Float[Tensor, "batch tokens width"], Tensors]:
        """Mixed tokens, and the tensors of the new state (anything where there was none)."""
        raise NotImplementedError

    @property
    def title(self) -> str:
        return f"{self.slug}, layer {self.layer}"

    def _run(
        self,
        x: Tensor,
        mask: Tensor | None,
        resets: Tensor | None,
        state: State | None,
        mode: str,
        trace: list[MemoryTrace] | None,
    ) -> tuple[Tensor, State | None]:
        position, after = document_positions(x, mask, resets, None if state is None else state.seen)
        y, tensors = self.mix(x, mask, position, after, state, mode, trace)
        y = y if mask is None else torch.where(mask[..., None], y, 0.0)
        return y, None if state is None else stored(tensors, after)


class _Readout(nn.Module):
    """Out(SiLU(x W_G) ⊙ norm(m)): what the memory says, gated by the token that asked."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, width, bias=False)
        self.norm = nn.RMSNorm(width, eps=EPSILON)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        return self.out(silu(self.gate(x)) * self.norm(memory))


@register_mixer
class TitansLMM(TitansMixer):
    """Titans, memory alone: `Out(SiLU(x W_G) ⊙ norm(M(x)))`. Options: `MemoryOptions`."""

    slug = "titans_lmm"

    def __init__(
        self,
        width: int,
        *,
        heads: int,
        layer: int = 0,
        layers: int = 1,
        **memory: Any,
    ) -> None:
        super().__init__(width, heads=heads, layer=layer, layers=layers)
        options = self.memory_options(memory)
        self.memory = NeuralMemory(width, heads, options)
        self.readout = _Readout(width)

    def mix(self, x, mask, position, after, state, mode, trace):
        read, tensors = self.memory(x, **told(self.title, "memory", mask, position, state, mode), trace=trace)
        return self.readout(x, read), named("memory", tensors)

    @classmethod
    def example(cls, **changes: Any) -> Mixer:
        return cls(**{"width": 16, "heads": 2, "chunk": 4, "expansion": 2, **changes})


@register_mixer
class TitansMAG(TitansMixer):
    """Titans, memory as a gate: sliding-window attention and the memory read the same tokens, and are joined.

    window: keys that attention sees. persistent: learned tokens it always sees. join: "gate" or "add". The others:
    `MemoryOptions`. The paper's models have a window of 2,048 and 128 persistent tokens."""

    slug = "titans_mag"
    parts = ("memory", "attention")

    def __init__(
        self,
        width: int,
        *,
        heads: int,
        layer: int = 0,
        layers: int = 1,
        window: int = 256,
        persistent: int = 4,
        join: str = "gate",
        **memory: Any,
    ) -> None:
        super().__init__(width, heads=heads, layer=layer, layers=layers)
        options = self.memory_options(memory)
        self.memory = NeuralMemory(width, heads, options)
        self.attention = WindowAttention(width, heads, window=window, persistent=persistent, layer=layer)
        self.join = Join(width, join)
        self.out = nn.Linear(width, width, bias=False)

    def mix(self, x, mask, position, after, state, mode, trace):
        seen_by = told(None, "attention", mask, position, state, mode)
        attended, kept = self.attention(x, after=after, **seen_by)
        read, tensors = self.memory(x, **told(self.title, "memory", mask, position, state, mode), trace=trace)
        return self.out(self.join(attended, read)), named("memory", tensors) | named("attention", kept)

    @classmethod
    def example(cls, **changes: Any) -> Mixer:
        return cls(**{"width": 16, "heads": 2, "chunk": 4, "expansion": 2, "window": 5, "persistent": 2, **changes})


@register_mixer
class TitansMAL(TitansMixer):
    """Titans, memory as a layer: sliding-window attention reads x + LMM(x).

    The paper writes o = SWA(M(x)) and likens it to stacks of layers; the sum is what such a stack has between two of
    them. Options as in `TitansMAG`, without the join."""

    slug = "titans_mal"
    parts = ("memory", "attention")

    def __init__(
        self,
        width: int,
        *,
        heads: int,
        layer: int = 0,
        layers: int = 1,
        window: int = 256,
        persistent: int = 4,
        **memory: Any,
    ) -> None:
        super().__init__(width, heads=heads, layer=layer, layers=layers)
        options = self.memory_options(memory)
        self.memory = NeuralMemory(width, heads, options)
        self.readout = _Readout(width)
        self.norm = nn.RMSNorm(width, eps=EPSILON)
        self.attention = WindowAttention(width, heads, window=window, persistent=persistent, layer=layer)
        self.out = nn.Linear(width, width, bias=False)

    def mix(self, x, mask, position, after, state, mode, trace):
        read, tensors = self.memory(x, **told(self.title, "memory", mask, position, state, mode), trace=trace)
        below = self.norm(x + self.readout(x, read))
        seen_by = told(None, "attention", mask, position, state, mode)
        attended, kept = self.attention(below, after=after, **seen_by)
        return self.out(attended), named("memory", tensors) | named("attention", kept)

    @classmethod
    def example(cls, **changes: Any) -> Mixer:
        return cls(**{"width": 16, "heads": 2, "chunk": 4, "expansion": 2, "window": 5, "persistent": 2, **changes})


def stored(tensors: Tensors, seen: Int[Tensor, " batch"]) -> State:
    """A state whose tensors lie in memory of their own, so that it can be saved as it is."""
    return State({name: tensor.contiguous() for name, tensor in tensors.items()}, seen)


def named(part: str, tensors: Tensors | None) -> Tensors:
    """The tensors of one part among those of a mixer."""
    return {f"{part}.{name}": tensor for name, tensor in (tensors or {}).items()}


def of_part(part: str, state: State | None) -> Tensors | None:
    """The tensors of a part by its own names."""
    if state is None:
        return None
    start = f"{part}."
    return {name[len(start) :]: t for name, t in state.tensors.items() if name.startswith(start)}


def told(
    title: str | None, part: str, mask: Tensor | None, position: Tensor, state: State | None, mode: str
) -> dict[str, Any]:
    """What a part is told of a call."""
    common = {"mask": mask, "position": position, "mode": mode, "tensors": of_part(part, state)}
    common["seen"] = None if state is None else state.seen
    return common if title is None else {**common, "name": title}
