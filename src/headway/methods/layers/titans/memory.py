"""The neural memory as a module: projections, gates, the network it starts from, and its state by name."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, fields

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import silu

from headway.errors import ArgumentError, unknown
from headway.kernels.deep_memory import READS, Gates, deep_memory
from headway.kernels.memory_coefficients import Running
from headway.kernels.memory_net import MemoryNet, MemoryState
from headway.kernels.short_conv import short_conv

GRANULARITIES = ("scalar", "channel")
#: θ is step · σ(·), times (1 − η) where momentum is counted in, over the chunk where its sum is.
STABILITIES = {"chunk": (True, True), "momentum": (True, False), "mean": (False, True), "none": (False, False)}
#: Where the gates start: η = σ(−2) = 0.12, α = σ(−4) = 0.018, θ at half of its bound.
ETA_BIAS, ALPHA_BIAS = -2.0, -4.0
#: Added to the squared length before keys and queries are brought to length one.
TINY = 1e-6

#: A memory in a mixer's state: names of `State.tensors` without what the mixer adds.
Tensors = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class MemoryOptions:
    """What a neural memory is like.

    depth, expansion: layers of its network, and hidden over outer dimensions. chunk: tokens whose gradients are taken
    at one point (1 is the exact online rule). conv: taps of the causal convolutions. gate_granularity: forgetting per
    head ("scalar") or per output of each layer ("channel"). read: "after" or "before" the token itself is learned.
    residual: M(x) = x + norm(…); None says yes from two layers on.

    stability bounds θ by step × a factor: "chunk" (1 − η) / chunk; "momentum" (1 − η), for keys that do not repeat
    within a chunk; "mean" 1 / chunk, the mean gradient of the chunk; "none" 1. With "chunk" and step ≤ 1 a one-layer
    memory of unit keys is stable whatever it reads without momentum, and with a momentum that stays the same where one
    key repeats. It is no bound where both vary: a step that a small η allows is carried on by a large η of later
    tokens, and with random keys and η the loss grew without end at chunk 1 (`clip` holds it back). clip: longest
    gradient at the network's output of one token.
    momentum, forgetting: False holds η or α at zero, for ablations."""

    depth: int = 2
    expansion: float = 4.0
    chunk: int = 16
    conv: int = 4
    gate_granularity: str = "scalar"
    read: str = "after"
    stability: str = "chunk"
    step: float = 1.0
    clip: float | None = None
    residual: bool | None = None
    momentum: bool = True
    forgetting: bool = True

    def __post_init__(self) -> None:
        for name, least in (("depth", 1), ("chunk", 1), ("conv", 1)):
            if getattr(self, name) < least:
                raise ArgumentError(f"{name}: got {getattr(self, name)}, expected at least {least}.")
        for name in ("expansion", "step", "clip"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ArgumentError(f"{name}: got {value}, expected a positive number.")
        choices = (("gate_granularity", GRANULARITIES), ("read", READS), ("stability", STABILITIES))
        for name, known in choices:
            if getattr(self, name) not in known:
                raise unknown(name, getattr(self, name), known)


@dataclass(frozen=True)
class MemoryTrace:
    """What a memory did at each token and head; zero at padding.

    surprise: length of the token's gradient over all layers. loss: ‖M(k) − v‖² before it was learned. theta: step size.
    eta: momentum. alpha: forgetting, its mean over channels where it has some."""

    surprise: Float[Tensor, "batch heads tokens"]
    loss: Float[Tensor, "batch heads tokens"]
    theta: Float[Tensor, "batch heads tokens"]
    eta: Float[Tensor, "batch heads tokens"]
    alpha: Float[Tensor, "batch heads tokens"]

    def tensors(self) -> tuple[Tensor, ...]:
        return tuple(getattr(self, field.name) for field in fields(self))


class NeuralMemory(nn.Module):
    """(batch, tokens, width) to what a memory of the tokens so far says at each: heads side by side, not projected.

        q = norm(SiLU(conv(x W_Q))) ,   k = norm(SiLU(conv(x W_K))) ,   v = SiLU(conv(x W_V))

    `forward` takes positions instead of resets alone, since every caller has them."""

    no_decay = ("gain", "shift")

    def __init__(self, width: int, heads: int, options: MemoryOptions) -> None:
        super().__init__()
        self.width, self.heads, self.options = width, heads, options
        dim = width // heads
        hidden = max(round(options.expansion * dim), 1)
        sizes = [dim, *[hidden] * (options.depth - 1), dim]
        self.residual = options.depth > 1 if options.residual is None else options.residual
        self.project = nn.Linear(width, 3 * width, bias=False)
        self.conv = nn.Parameter(torch.empty(3 * width, options.conv).uniform_(-1, 1) / options.conv**0.5)
        self.weights = nn.ParameterList(torch.randn(heads, a, b) / a**0.5 for a, b in itertools.pairwise(sizes))
        if not self.residual:
            # Nothing learned yet says nothing, as in linear memories.
            nn.init.zeros_(self.weights[-1])
        self.gain = nn.Parameter(torch.ones(heads, dim)) if self.residual else None
        self.shift = nn.Parameter(torch.zeros(heads, dim)) if self.residual else None
        self.outs = tuple(sizes[1:])
        self.alphas = sum(self.outs) if self.channels else 1
        self.gates = nn.Linear(width, heads * (2 + self.alphas))
        with torch.no_grad():
            bias = self.gates.bias.view(heads, -1)
            bias[:, 0], bias[:, 1], bias[:, 2:] = 0.0, ETA_BIAS, ALPHA_BIAS

    @property
    def channels(self) -> bool:
        return self.options.gate_granularity == "channel"

    @property
    def net(self) -> MemoryNet:
        """The network that a document begins with."""
        return MemoryNet(tuple(self.weights), self.residual, self.gain, self.shift, clip=self.options.clip)

    def start(self, batch: int, dtype: torch.dtype | None = None) -> Tensors:
        """The memory before the first token, for inputs of this dtype; itself in at least float32."""
        dtype = dtype or self.conv.dtype
        net = self.net.to(torch.promote_types(dtype, torch.float32))
        memory = MemoryState.start(net, batch, self.options.chunk, channels=self.channels)
        tail = self.conv.new_zeros(batch, self.options.conv - 1, 3 * self.width, dtype=dtype)
        return {**pack(memory), "tail": tail}

    def gates_of(self, x: Float[Tensor, "batch tokens width"]) -> Gates:
        """θ, η and α of each token, in at least float32."""
        raw = self.gates(x).to(torch.promote_types(x.dtype, torch.float32)).sigmoid()
        raw = raw.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        eta = raw[..., 1] if self.options.momentum else torch.zeros_like(raw[..., 1])
        slower, spread = STABILITIES[self.options.stability]
        theta = self.options.step * raw[..., 0]
        theta = theta * (1 - eta) if slower else theta
        theta = theta / self.options.chunk if spread else theta
        raw = raw if self.options.forgetting else torch.zeros_like(raw)
        alpha = raw[..., 2:].split(list(self.outs), -1) if self.channels else raw[..., 2]
        return Gates(theta, eta, alpha)

    def query(self, x: Float[Tensor, "batch tokens width"]) -> Float[Tensor, "batch heads tokens dim"]:
        """Queries of tokens for themselves, without the convolution over their neighbours."""
        return unit(silu(torch.nn.functional.linear(x, self.project.weight[: self.width])), self.heads)

    def retrieve(
        self, weights: tuple[Tensor, ...], query: Float[Tensor, "batch heads tokens dim"]
    ) -> Float[Tensor, "batch tokens width"]:
        """What a memory with these weights says to queries; it learns nothing."""
        dtype = weights[0].dtype
        with torch.autocast(query.device.type, enabled=False):
            found = self.net.to(dtype)(weights, query.to(dtype))
        return found.transpose(1, 2).flatten(2).to(query.dtype)

    def forward(
        self,
        x: Float[Tensor, "batch tokens width"],
        *,
        position: Int[Tensor, "batch tokens"],
        mask: Bool[Tensor, "batch tokens"] | None = None,
        seen: Int[Tensor, " batch"] | None = None,
        tensors: Tensors | None = None,
        mode: str = "block",
        trace: list[MemoryTrace] | None = None,
        name: str = "memory",
    ) -> tuple[Float[Tensor, "batch tokens width"], Tensors | None]:
        """Reads at every token, and the memory behind the last where `tensors` and `seen` were given.

        x must be finite everywhere. `position` 0 begins a document. A list as `trace` gets what was done at each token.
        Raises NumericError with `name` when the memory is no longer finite."""
        opens = position == 0
        opens = opens if mask is None else opens & mask
        tail = None if tensors is None else tensors["tail"]
        mixed, tail = short_conv(self.project(x), self.conv, tail=tail, mask=mask, resets=opens)
        asked, k, v = silu(mixed).chunk(3, -1)
        query, key, value = unit(asked, self.heads), unit(k, self.heads), split(v, self.heads)
        gates = self.gates_of(x)
        found = deep_memory(
            query,
            key,
            value,
            gates,
            self.net,
            chunk=self.options.chunk,
            position=position,
            mask=mask,
            state=None if tensors is None or seen is None else unpack(tensors, seen),
            reads=self.options.read,
            mode=mode,
            inspect=trace is not None,
            name=name,
        )
        if trace is not None and found.surprise is not None and found.loss is not None:
            alpha = gates.alpha if isinstance(gates.alpha, Tensor) else torch.cat(gates.alpha, -1).mean(-1)
            parts = (found.surprise, found.loss, gates.theta, gates.eta, alpha)
            real = torch.ones_like(opens) if mask is None else mask
            trace.append(MemoryTrace(*(torch.where(real[:, None], part, 0.0).detach() for part in parts)))
        output = found.output.transpose(1, 2).flatten(2).to(x.dtype)
        return output, None if found.state is None else {**pack(found.state), "tail": tail}


def split(x: Float[Tensor, "batch tokens width"], heads: int) -> Float[Tensor, "batch heads tokens dim"]:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def unit(x: Float[Tensor, "batch tokens width"], heads: int) -> Float[Tensor, "batch heads tokens dim"]:
    """Heads of length one, in at least float32."""
    x = split(x, heads).to(torch.promote_types(x.dtype, torch.float32))
    return x * (x.square().sum(-1, keepdim=True) + TINY).rsqrt()


def pack(memory: MemoryState) -> Tensors:
    """A memory by name, as a mixer's state holds it."""
    named: Tensors = {}
    for name in ("weights", "momentum", "inputs", "errors"):
        named |= {f"{name}.{layer}": tensor for layer, tensor in enumerate(getattr(memory, name))}
    for number, running in enumerate(memory.running):
        named |= {f"running_{name}.{number}": getattr(running, name) for name in _RUNNING}
    return named


def unpack(tensors: Tensors, seen: Int[Tensor, " batch"]) -> MemoryState:
    """The memory that `pack` named."""

    def each(name: str) -> tuple[Tensor, ...]:
        found: list[Tensor] = []
        while f"{name}.{len(found)}" in tensors:
            found.append(tensors[f"{name}.{len(found)}"])
        return tuple(found)

    running = tuple(Running(*parts) for parts in zip(*(each(f"running_{name}") for name in _RUNNING), strict=True))
    weights, momentum, inputs, errors = (each(name) for name in ("weights", "momentum", "inputs", "errors"))
    return MemoryState(weights, momentum, inputs, errors, running, seen)


_RUNNING = tuple(field.name for field in fields(Running))
