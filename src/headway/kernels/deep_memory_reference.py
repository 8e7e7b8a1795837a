"""The memory, token by token: weights behind every token, gradients by automatic differentiation.

Slow and plain: what `deep_memory` must equal. The loss of a token is ‖M_c(k) − v‖², or beyond a gradient of length
`clip` the line that goes on with that slope.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import gelu, layer_norm

from headway.kernels.memory_coefficients import advance
from headway.kernels.memory_net import EPSILON, MemoryNet, MemoryState

if TYPE_CHECKING:
    from headway.kernels.deep_memory import Gates


def token_by_token(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gates: Gates,
    net: MemoryNet,
    state: MemoryState,
    position: Tensor,
    real: Tensor,
    reads: str,
) -> tuple[Tensor, MemoryState]:
    """What every token reads, and the memory behind the last. Shapes as in `deep_memory`, whose checks come before."""
    if torch.is_inference_mode_enabled():
        # Tensors made in inference mode can never be differentiated, copies made outside it can.
        with torch.inference_mode(False), torch.no_grad():
            query, key, value = (x.clone() for x in (query, key, value))
            weights = tuple(w.clone() for w in net.weights)
            gain, shift = (None if x is None else x.clone() for x in (net.gain, net.shift))
            net = MemoryNet(weights, net.residual, gain, shift, clip=net.clip)
            whole = state.where(torch.ones_like(state.seen, dtype=torch.bool), state)
            return token_by_token(query, key, value, gates, net, whole, position, real, reads)
    chunk, graph = state.chunk, torch.is_grad_enabled()
    fresh = MemoryState.start(net, query.shape[0], chunk, channels=gates.channels)
    start, (weights, momentum) = state, state.now()
    outputs = []
    for t in range(query.shape[2]):
        begins = real[:, t] & (position[:, t] == 0)
        start = fresh.where(begins, start)
        weights, momentum = (_rows(begins, a, b) for a, b in ((fresh.weights, weights), (fresh.momentum, momentum)))
        if reads == "before":
            outputs.append(_forward(net, weights, query[:, :, t])[0])
        gradients, inputs, deltas = _gradients(net, start.weights, key[:, :, t], value[:, :, t], graph)
        theta, eta = (x[:, :, t, None, None] for x in (gates.theta, gates.eta))
        alphas = [a[:, :, t, None, :] if gates.channels else a[:, :, t, None, None] for a in gates.alphas]
        alphas = alphas if gates.channels else alphas * net.depth
        pushed = tuple(eta * s - theta * g for s, g in zip(momentum, gradients, strict=True))
        moved = tuple((1 - a) * w + s for a, w, s in zip(alphas, weights, pushed, strict=True))
        weights, momentum = (_rows(real[:, t], a, b) for a, b in ((moved, weights), (pushed, momentum)))
        if reads == "after":
            outputs.append(_forward(net, weights, query[:, :, t])[0])
        outputs[-1] = torch.where(real[:, t, None, None], outputs[-1], 0.0)
        start = _note(start, gates, inputs, deltas, real[:, t], t)
        full = real[:, t] & (start.seen % chunk == 0)
        ended = MemoryState(weights, momentum, fresh.inputs, fresh.errors, fresh.running, start.seen)
        start = ended.where(full, start)
    return (torch.stack(outputs, 2) if outputs else query), start


def _forward(net: MemoryNet, weights: tuple[Tensor, ...], x: Tensor) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """The network's output for one token per row and head, the input of each layer, and what it gives."""
    inputs, outputs, h = [], [], x
    for layer, weight in enumerate(weights):
        inputs.append(h)
        outputs.append(torch.einsum("bhi,bhio->bho", h, weight))
        h = gelu(outputs[-1]) if layer + 1 < net.depth else outputs[-1]
    if net.residual:
        h = layer_norm(h, h.shape[-1:], eps=EPSILON)
        h = h if net.gain is None else h * net.gain
        h = x + (h if net.shift is None else h + net.shift)
    return h, inputs, outputs


def _gradients(
    net: MemoryNet, weights: tuple[Tensor, ...], key: Tensor, value: Tensor, graph: bool
) -> tuple[tuple[Tensor, ...], list[Tensor], tuple[Tensor, ...]]:
    """Gradients of the loss by weights and by what each layer gives, and the layers' inputs."""
    with torch.enable_grad():
        leaves = tuple(w if w.requires_grad else w.detach().requires_grad_() for w in weights)
        output, inputs, given = _forward(net, leaves, key)
        distance = (output - value).square().sum(-1)
        if net.clip is not None:
            far = 2 * distance.sqrt() > net.clip
            line = net.clip * distance.clamp(min=net.clip**2 / 8).sqrt() - net.clip**2 / 4
            distance = torch.where(far, line, distance)
        found = torch.autograd.grad(distance.sum(), [*leaves, *given], create_graph=graph)
        inputs = inputs if graph else [a.detach() for a in inputs]
    return found[: net.depth], inputs, found[net.depth :]


def _note(
    start: MemoryState, gates: Gates, inputs: list[Tensor], deltas: tuple[Tensor, ...], real: Tensor, t: int
) -> MemoryState:
    """The open chunk with one token more, so that a call in another form can go on from here."""
    slot = start.seen % start.chunk
    own = ((torch.arange(start.chunk, device=real.device) == slot[:, None]) & real[:, None])[:, None, :, None]
    shape = (-1, 1, 1) if gates.channels else (-1, 1)
    running = []
    for before, alpha in zip(start.running, gates.alphas, strict=True):
        theta, eta = (x[:, :, t, None] if gates.channels else x[:, :, t] for x in (gates.theta, gates.eta))
        running.append(advance(before, theta, eta, alpha[:, :, t], slot.view(shape), real.view(shape)))
    return MemoryState(
        start.weights,
        start.momentum,
        tuple(torch.where(own, a[:, :, None], b) for a, b in zip(inputs, start.inputs, strict=True)),
        tuple(torch.where(own, d[:, :, None], b) for d, b in zip(deltas, start.errors, strict=True)),
        tuple(running),
        start.seen + real.long(),
    )


def _rows(chosen: Tensor, new: tuple[Tensor, ...], old: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(torch.where(chosen.view(-1, 1, 1, 1), a, b) for a, b in zip(new, old, strict=True))
