"""A memory whose state is the weights of a small network: its forward pass, its gradients, and how chunks change it.

    M(x) = x + LN( W_L σ( … σ(x W_1) ) )      or, without the residual,      M(x) = W_L σ( … σ(x W_1) ) ,   σ = GELU

For a key a_1 = k with value v let a_l be the input of layer l and δ_l the gradient of ‖M(k) − v‖² at its output. The
gradient of W_l is the outer product a_lᵀ δ_l, so a chunk of b tokens changes a layer by a sum of b outer products, and
neither a read nor a carried state ever needs the weights behind each token.

Weights have a batch: every sequence and head has a memory of its own. The norm's gain and shift are learned with the
model and fixed while the memory learns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import gelu

from headway.errors import ArgumentError
from headway.kernels.memory_coefficients import Coefficients, Running

#: Added to the variance in the norm.
EPSILON = 1e-5

_Some = TypeVar("_Some")


@dataclass(frozen=True)
class MemoryNet:
    """The network before it reads anything: `weights` has one (heads, in, out) per layer, from dim to dim.

    gain, shift: (heads, dim), those of the norm; given with `residual`, which adds the input. clip: longest gradient
    at the network's output that one token may have (None: any); the loss is then linear beyond clip / 2."""

    weights: tuple[Float[Tensor, "heads from to"], ...]
    residual: bool = False
    gain: Float[Tensor, "heads dim"] | None = None
    shift: Float[Tensor, "heads dim"] | None = None
    clip: float | None = None

    def __post_init__(self) -> None:
        if not self.weights:
            raise ArgumentError("weights: got none, expected one matrix per layer, at least one.")
        sizes = [w.shape[1] for w in self.weights] + [self.weights[-1].shape[2]]
        fits = all(w.shape[2] == size for w, size in zip(self.weights, sizes[1:], strict=True))
        if not fits or sizes[0] != sizes[-1]:
            got = ", ".join("×".join(map(str, w.shape[1:])) for w in self.weights)
            raise ArgumentError(
                f"weights: got layers of {got}, expected each to begin where the one before ends and the last to end "
                "with as many dimensions as the first begins with: the memory maps keys to values of one size."
            )

    @property
    def depth(self) -> int:
        return len(self.weights)

    @property
    def heads(self) -> int:
        return self.weights[0].shape[0]

    def to(self, dtype: torch.dtype) -> MemoryNet:
        """The same in another dtype."""
        gain, shift = (None if x is None else x.to(dtype) for x in (self.gain, self.shift))
        return MemoryNet(tuple(w.to(dtype) for w in self.weights), self.residual, gain, shift, self.clip)

    def finish(self, x: Tensor, z: Tensor) -> Tensor:
        """The network's output from its input and what its last layer gives."""
        if not self.residual:
            return z
        normal = (z - z.mean(-1, keepdim=True)) * _inverse_deviation(z)
        normal = normal if self.gain is None else normal * self.gain[:, None]
        return x + (normal if self.shift is None else normal + self.shift[:, None])

    def __call__(
        self, weights: Sequence[Tensor], x: Float[Tensor, "batch heads tokens dim"]
    ) -> Float[Tensor, "batch heads tokens dim"]:
        """M(x) for given weights (batch, heads, in, out): a read without an update."""
        h = x
        for layer, weight in enumerate(weights):
            z = h @ weight
            h = gelu(z) if layer + 1 < self.depth else self.finish(x, z)
        return h


@dataclass(frozen=True)
class MemoryState:
    """A memory in the middle of a sequence, of a size that does not depend on how much was read.

    `weights` and `momentum` are those at the start of the open chunk; `inputs` and `errors` are a_l and δ_l of its
    tokens so far, by slot; `running` says how much each of them counts by now (one for all layers, or one per layer
    where forgetting is per channel); `seen` counts the tokens of the document, so seen mod chunk slots are filled."""

    weights: tuple[Float[Tensor, "batch heads in out"], ...]
    momentum: tuple[Float[Tensor, "batch heads in out"], ...]
    inputs: tuple[Float[Tensor, "batch heads chunk in"], ...]
    errors: tuple[Float[Tensor, "batch heads chunk out"], ...]
    running: tuple[Running, ...]
    seen: Int[Tensor, " batch"]

    @classmethod
    def start(cls, net: MemoryNet, batch: int, chunk: int, *, channels: bool = False) -> MemoryState:
        """The memory before the first token. `channels`: forgetting differs between the outputs of a layer."""
        weights = tuple(w.expand(batch, *w.shape) for w in net.weights)
        like = net.weights[0].detach()

        def zeros(size: int) -> Tensor:
            return like.new_zeros(batch, net.heads, chunk, size)

        shapes = [(batch, net.heads, w.shape[2]) for w in net.weights] if channels else [(batch, net.heads)]
        return cls(
            weights,
            tuple(torch.zeros_like(w) for w in weights),
            tuple(zeros(w.shape[1]) for w in net.weights),
            tuple(zeros(w.shape[2]) for w in net.weights),
            tuple(Running.start(shape, chunk, like) for shape in shapes),
            torch.zeros(batch, dtype=torch.long, device=like.device),
        )

    @property
    def chunk(self) -> int:
        return self.inputs[0].shape[2]

    def where(self, chosen: Bool[Tensor, " batch"], other: MemoryState) -> MemoryState:
        """This memory for the chosen rows of the batch, the other one for the rest."""

        def each(mine: tuple[Tensor, ...], theirs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return tuple(torch.where(chosen.view(-1, 1, 1, 1), a, b) for a, b in zip(mine, theirs, strict=True))

        return MemoryState(
            each(self.weights, other.weights),
            each(self.momentum, other.momentum),
            each(self.inputs, other.inputs),
            each(self.errors, other.errors),
            tuple(a.where(chosen, b) for a, b in zip(self.running, other.running, strict=True)),
            torch.where(chosen, self.seen, other.seen),
        )

    def now(self) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Weights and momentum behind the last token, the open chunk folded in."""
        coefficients = per_layer(self.running, len(self.weights))
        with torch.autocast(self.weights[0].device.type, enabled=False):
            return fold(self.weights, self.momentum, self.inputs, self.errors, coefficients)


def errors(
    net: MemoryNet,
    weights: Sequence[Float[Tensor, "batch heads in out"]],
    key: Float[Tensor, "batch heads tokens dim"],
    value: Float[Tensor, "batch heads tokens dim"],
) -> tuple[list[Tensor], list[Tensor], Float[Tensor, "batch heads tokens"]]:
    """Per layer the inputs a_l and the gradients δ_l of ‖M(key) − value‖² at its output; and the loss itself.

    The gradients are made by hand, so that no graph is needed to learn, and one that is there reaches through them."""
    inputs: list[Tensor] = []
    before: list[Tensor] = []
    h = key
    for layer, weight in enumerate(weights):
        inputs.append(h)
        before.append(h @ weight)
        h = gelu(before[-1]) if layer + 1 < net.depth else net.finish(key, before[-1])
    wrong = h - value
    delta = 2 * wrong
    if net.clip is not None:
        delta = delta * (net.clip / delta.norm(dim=-1, keepdim=True).clamp(min=net.clip))
    if net.residual:
        delta = _through_norm(delta if net.gain is None else delta * net.gain[:, None], before[-1])
    found = [delta]
    for layer in range(net.depth - 1, 0, -1):
        delta = (delta @ weights[layer].transpose(-1, -2)) * _gelu_slope(before[layer - 1])
        found.append(delta)
    return inputs, found[::-1], wrong.square().sum(-1)


def read(
    net: MemoryNet,
    weights: Sequence[Tensor],
    momentum: Sequence[Tensor],
    inputs: Sequence[Tensor],
    deltas: Sequence[Tensor],
    coefficients: Sequence[Coefficients],
    query: Float[Tensor, "batch heads steps dim"],
) -> Float[Tensor, "batch heads steps dim"]:
    """M_t(query_t) for every step of a chunk, each with its own weights, which are never made.

    h W_t = decay_t · (h W_0) + carry_t · (h S_0) − Σ_i gradient_ti (h · a_i) δ_i"""
    h = query
    for layer, (weight, pace, a, delta, c) in enumerate(
        zip(weights, momentum, inputs, deltas, coefficients, strict=True)
    ):
        decay, carry = _by_step(c.decay, h.ndim), _by_step(c.carry, h.ndim)
        met = h @ a.transpose(-1, -2)
        if c.decay.ndim == h.ndim:
            learned = torch.einsum("...ti,...oti,...io->...to", met, c.gradient, delta)
        else:
            learned = (met * c.gradient) @ delta
        z = decay * (h @ weight) + carry * (h @ pace) - learned
        h = gelu(z) if layer + 1 < net.depth else net.finish(query, z)
    return h


def fold(
    weights: Sequence[Tensor],
    momentum: Sequence[Tensor],
    inputs: Sequence[Tensor],
    deltas: Sequence[Tensor],
    running: Sequence[Running],
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Weights and momentum behind the steps that the coefficients tell of."""
    new: list[tuple[Tensor, Tensor]] = []
    for weight, pace, a, delta, c in zip(weights, momentum, inputs, deltas, running, strict=True):
        channels = c.decay.ndim == 3
        decay, carry, speed = (
            x[..., None, :] if channels else x[..., None, None] for x in (c.decay, c.carry, c.momentum)
        )
        gradient, pushed = (x.transpose(-1, -2) if channels else x[..., None] for x in (c.gradient, c.pushed))
        turned = a.transpose(-1, -2)
        new.append(
            (
                decay * weight + carry * pace - turned @ (gradient * delta),
                speed * pace - turned @ (pushed * delta),
            )
        )
    return tuple(w for w, _ in new), tuple(s for _, s in new)


def per_layer(shared: Sequence[_Some], depth: int) -> tuple[_Some, ...]:
    """One per layer, where one may stand for all."""
    return tuple(shared) if len(shared) == depth else tuple(shared) * depth


def surprise(inputs: Sequence[Tensor], deltas: Sequence[Tensor]) -> Float[Tensor, "batch heads tokens"]:
    """The length of each token's gradient over all layers: ‖a_lᵀ δ_l‖ = ‖a_l‖ ‖δ_l‖."""
    squares = [a.square().sum(-1) * d.square().sum(-1) for a, d in zip(inputs, deltas, strict=True)]
    return torch.stack(squares).sum(0).sqrt()


def _by_step(x: Tensor, ndim: int) -> Tensor:
    """(…, steps) or (…, out, steps) as it multiplies (…, steps, out)."""
    return x.transpose(-1, -2) if x.ndim == ndim else x[..., None]


def _inverse_deviation(z: Tensor) -> Tensor:
    return (z.var(-1, correction=0, keepdim=True) + EPSILON).rsqrt()


def _through_norm(delta: Tensor, z: Tensor) -> Tensor:
    """The gradient before a layer norm from the one behind it (its gain taken in already)."""
    scale = _inverse_deviation(z)
    normal = (z - z.mean(-1, keepdim=True)) * scale
    along = (delta * normal).mean(-1, keepdim=True)
    return (delta - delta.mean(-1, keepdim=True) - normal * along) * scale


def _gelu_slope(z: Tensor) -> Tensor:
    """The derivative of z Φ(z)."""
    return torch.special.ndtr(z) + z * torch.exp(-0.5 * z.square()) * (2 * torch.pi) ** -0.5
