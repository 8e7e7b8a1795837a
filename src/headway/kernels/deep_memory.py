"""Learning while reading: a memory network trained by gradient descent on the sequence it reads, chunk by chunk.

    S_t = η_t S_{t−1} − θ_t ∇ℓ(M_c; k_t, v_t) ,   M_t = (1 − α_t) M_{t−1} + S_t ,   y_t = M_t(q_t) ,   ℓ = ‖M(k) − v‖²

M_c is the memory at the start of the chunk that token t stands in: its gradients are taken at one point, all at once.
Chunks of one token are the exact online rule. Chunks are counted in the tokens of a document, so that padding, packing
and the split into calls change nothing.

Three forms give the same numbers: "block" works on whole chunks with matrix products (`memory_net.read`), "step" takes
one token after the other into an open chunk, "reference" makes the weights behind every token by automatic
differentiation. All are differentiable through the learning itself. Titans, arXiv 2501.00663, section 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from headway.errors import ArgumentError, NumericError, unknown
from headway.kernels.deep_memory_reference import token_by_token
from headway.kernels.document_chunks import Chunks, document_chunks
from headway.kernels.memory_coefficients import Coefficients, Running, advance, memory_coefficients
from headway.kernels.memory_net import MemoryNet, MemoryState, errors, fold, per_layer, read, surprise

READS = ("after", "before")


@dataclass(frozen=True)
class Gates:
    """Per head and token: step size θ ≥ 0, momentum η and forgetting α in [0, 1].

    α is one number for the whole memory, or for each layer one per output channel."""

    theta: Float[Tensor, "batch heads tokens"]
    eta: Float[Tensor, "batch heads tokens"]
    alpha: Float[Tensor, "batch heads tokens"] | tuple[Float[Tensor, "batch heads tokens out"], ...]

    @property
    def channels(self) -> bool:
        return isinstance(self.alpha, tuple)

    @property
    def alphas(self) -> tuple[Tensor, ...]:
        return self.alpha if isinstance(self.alpha, tuple) else (self.alpha,)

    def to(self, dtype: torch.dtype) -> Gates:
        alpha = tuple(a.to(dtype) for a in self.alphas)
        return Gates(self.theta.to(dtype), self.eta.to(dtype), alpha if self.channels else alpha[0])

    def part(self, tokens: slice) -> Gates:
        alpha = tuple(a[:, :, tokens] for a in self.alphas)
        return Gates(self.theta[:, :, tokens], self.eta[:, :, tokens], alpha if self.channels else alpha[0])


@dataclass(frozen=True)
class MemoryRead:
    """`output` is zero at masked tokens. `state` is there if one was given; `surprise` (length of each gradient) and
    `loss` (before the token is learned) if they were asked for."""

    output: Float[Tensor, "batch heads tokens dim"]
    state: MemoryState | None
    surprise: Float[Tensor, "batch heads tokens"] | None = None
    loss: Float[Tensor, "batch heads tokens"] | None = None


def deep_memory(
    query: Float[Tensor, "batch heads tokens dim"],
    key: Float[Tensor, "batch heads tokens dim"],
    value: Float[Tensor, "batch heads tokens dim"],
    gates: Gates,
    net: MemoryNet,
    *,
    chunk: int = 16,
    position: Tensor | None = None,
    mask: Bool[Tensor, "batch tokens"] | None = None,
    state: MemoryState | None = None,
    reads: str = "after",
    mode: str = "block",
    inspect: bool = False,
    name: str = "memory",
) -> MemoryRead:
    """Reads of a memory that learns (key, value) pairs as it goes.

    position: (batch, tokens), of each token in its document; 0 empties the memory (None: one document that goes on from
    the state). mask: True at real tokens; what stands at the others must be finite. reads: whether a token reads
    "after" or "before" it is learned. Work is done in at least float32. Raises ArgumentError for settings that
    do not fit, and NumericError, which names the chunk, when the memory is no longer finite."""
    _check(query, key, value, gates, net, chunk, reads, mode, state)
    work = torch.promote_types(query.dtype, torch.float32)
    net, gates = net.to(work), gates.to(work)
    query, key, value = (x.to(work) for x in (query, key, value))
    batch, tokens = query.shape[0], query.shape[2]
    began = state or MemoryState.start(net, batch, chunk, channels=gates.channels)
    real = torch.ones(batch, tokens, dtype=torch.bool, device=query.device) if mask is None else mask
    if position is None:
        position = began.seen[:, None] + real.long().cumsum(1) - real.long()
    # Autocast would learn in half precision.
    with torch.autocast(query.device.type, enabled=False):
        if mode == "block":
            found = _blocks(query, key, value, gates, net, began, position, real, reads, inspect, name)
        else:
            form = token_by_token if mode == "reference" else _steps
            output, after = form(query, key, value, gates, net, began, position, real, reads)
            _check_finite(output.split(chunk, 2), after.weights, gates, name)
            found = MemoryRead(output, after)
    return found if state is not None else replace(found, state=None)


def _blocks(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gates: Gates,
    net: MemoryNet,
    state: MemoryState,
    position: Tensor,
    real: Tensor,
    reads: str,
    inspect: bool,
    name: str,
) -> MemoryRead:
    """Chunk after chunk; in each, all keys meet the weights at its start and all queries are read at once."""
    if not query.shape[2]:
        return MemoryRead(query, state, *([query[..., 0]] * 2 if inspect else ()))
    size, dim = state.chunk, query.shape[-1]
    chunks = document_chunks(position, size, mask=real, seen=state.seen)
    grouped = chunks.gather(torch.cat([query, key, value], -1)).split(dim, -1)
    coefficients = _chunk_coefficients(gates, chunks)
    slots = torch.arange(size, device=query.device)
    fresh = MemoryState.start(net, query.shape[0], size, channels=gates.channels)
    weights, momentum, kept = state.weights, state.momentum, fresh
    outputs, lengths, losses = [], [], []
    for index, (opens, closes, stays) in enumerate(_boundaries(chunks)):
        if opens:
            weights, momentum = (
                _choose(chunks.opens[:, index], a, b) for a, b in ((fresh.weights, weights), (fresh.momentum, momentum))
            )
        asked, k, v = (x[:, :, index] for x in grouped)
        inputs, deltas, loss = errors(net, weights, k, v)
        now = [c.chunk(index) for c in coefficients]
        if index == 0:
            begun = (slots < chunks.carried[:, None])[:, None, :, None]
            inputs = [torch.where(begun, a, b) for a, b in zip(state.inputs, inputs, strict=True)]
            deltas = [torch.where(begun, a, b) for a, b in zip(state.errors, deltas, strict=True)]
            now = [c.after(before) for c, before in zip(now, state.running, strict=True)]
        met = [c.shifted() for c in now] if reads == "before" else now
        outputs.append(read(net, weights, momentum, inputs, deltas, per_layer(met, net.depth), asked))
        if inspect:
            lengths.append(surprise(inputs, deltas))
            losses.append(loss)
        last = [c.at(size - 1) for c in now]
        if stays:
            mine = MemoryState(weights, momentum, tuple(inputs), tuple(deltas), tuple(last), state.seen)
            kept = mine.where(chunks.stays[:, index], kept)
        if closes:
            both = fold(weights, momentum, inputs, deltas, per_layer(last, net.depth))
            weights, momentum = (
                _choose(chunks.closes[:, index], a, b) for a, b in zip(both, (weights, momentum), strict=True)
            )
    _check_finite(outputs, weights, gates, name)
    seen = seen_after(position, real, state.seen)
    filled = (slots < (seen % size)[:, None])[:, None, :, None]
    inputs, deltas = ([torch.where(filled, x, 0.0) for x in side] for side in (kept.inputs, kept.errors))
    after = MemoryState(weights, momentum, tuple(inputs), tuple(deltas), kept.running, seen)
    shown = real[:, None]
    traces = (torch.where(shown, _back(chunks, x), 0.0) for x in (lengths, losses)) if inspect else ()
    return MemoryRead(torch.where(shown[..., None], chunks.scatter(torch.stack(outputs, 2)), 0.0), after, *traces)


def _steps(
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
    """Token after token: each adds its inputs and errors to the open chunk, which is folded in when it is full."""
    fresh = MemoryState.start(net, query.shape[0], state.chunk, channels=gates.channels)
    outputs = []
    for t in range(query.shape[2]):
        one = slice(t, t + 1)
        begins = real[:, t] & (position[:, t] == 0)
        if bool(begins.any()):
            state = fresh.where(begins, state)
        q, k, v = (x[:, :, one] for x in (query, key, value))
        output, state = memory_step(q, k, v, gates.part(one), net, state, real[:, t], reads)
        outputs.append(torch.where(real[:, t].view(-1, 1, 1, 1), output, 0.0))
    return (torch.cat(outputs, 2) if outputs else query), state


def memory_step(
    query: Float[Tensor, "batch heads 1 dim"],
    key: Float[Tensor, "batch heads 1 dim"],
    value: Float[Tensor, "batch heads 1 dim"],
    gates: Gates,
    net: MemoryNet,
    state: MemoryState,
    real: Bool[Tensor, " batch"],
    reads: str = "after",
) -> tuple[Float[Tensor, "batch heads 1 dim"], MemoryState]:
    """One token: what it reads, and the memory behind it. Rows that are not real keep theirs."""
    chunk = state.chunk
    slot = state.seen % chunk
    inputs, deltas, _ = errors(net, state.weights, key, value)
    own = ((torch.arange(chunk, device=query.device) == slot[:, None]) & real[:, None])[:, None, :, None]
    inputs = [torch.where(own, a, b) for a, b in zip(inputs, state.inputs, strict=True)]
    deltas = [torch.where(own, a, b) for a, b in zip(deltas, state.errors, strict=True)]
    running = []
    for before, alpha in zip(state.running, gates.alphas, strict=True):
        shape = (-1, 1, 1) if gates.channels else (-1, 1)
        theta, eta = (x if gates.channels else x[..., 0] for x in (gates.theta, gates.eta))
        running.append(advance(before, theta, eta, alpha[:, :, 0], slot.view(shape), real.view(shape)))
    met = state.running if reads == "before" else running
    rows = [_as_row(c) for c in per_layer(met, net.depth)]
    output = read(net, state.weights, state.momentum, inputs, deltas, rows, query)
    seen = state.seen + real.long()
    after = MemoryState(state.weights, state.momentum, tuple(inputs), tuple(deltas), tuple(running), seen)
    full = real & (seen % chunk == 0)
    if not bool(full.any()):
        return output, after
    empty = MemoryState.start(net, query.shape[0], chunk, channels=gates.channels)
    folded = MemoryState(*after.now(), empty.inputs, empty.errors, empty.running, seen)
    return output, folded.where(full, after)


def seen_after(position: Tensor, real: Bool[Tensor, "batch tokens"], seen: Tensor) -> Tensor:
    """How many tokens of the present document were read: one more than the position of the last real token."""
    order = torch.arange(1, real.shape[1] + 1, device=real.device)
    last = torch.where(real, order, 0).amax(1, keepdim=True)
    return torch.where(last[:, 0] > 0, position.gather(1, (last - 1).clamp(min=0))[:, 0] + 1, seen)


def _chunk_coefficients(gates: Gates, chunks: Chunks) -> list[Coefficients]:
    """The coefficients of all chunks, one set for all layers or one per layer."""
    theta, eta = (chunks.gather(x[..., None])[..., 0] for x in (gates.theta, gates.eta))
    real = chunks.real[:, None]
    if not gates.channels:
        alpha = chunks.gather(gates.alphas[0][..., None])[..., 0]
        return [memory_coefficients(theta, eta, alpha, real=real)]
    each = [chunks.gather(a).movedim(-1, 2) for a in gates.alphas]
    return [memory_coefficients(theta[:, :, None], eta[:, :, None], a, real=real[:, :, None]) for a in each]


def _as_row(c: Running) -> Coefficients:
    """The coefficients behind one step as those of a chunk of one step."""
    return Coefficients(
        c.decay[..., None], c.carry[..., None], c.momentum[..., None], c.gradient[..., None, :], c.pushed[..., None, :]
    )


def _boundaries(chunks: Chunks) -> list[tuple[bool, bool, bool]]:
    """Per chunk: whether it opens a document, is full at its end, or stays open, in any row."""
    return list(zip(*(x.any(0).tolist() for x in (chunks.opens, chunks.closes, chunks.stays)), strict=True))


def _choose(rows: Tensor, new: tuple[Tensor, ...], old: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    if bool(rows.all()):
        return new
    return tuple(torch.where(rows.view(-1, 1, 1, 1), a, b) for a, b in zip(new, old, strict=True))


def _back(chunks: Chunks, parts: list[Tensor]) -> Tensor:
    return chunks.scatter(torch.stack(parts, 2)[..., None])[..., 0]


def _check_finite(outputs: Sequence[Tensor], weights: tuple[Tensor, ...], gates: Gates, name: str) -> None:
    """One look at everything; only when something is wrong, which chunk it began in."""
    whole = torch.stack([x.detach().sum() for x in (*outputs, *weights)])
    if bool(whole.isfinite().all()):
        return
    # The sum may overflow where no number does.
    broken = [index for index, x in enumerate(outputs) if not bool(x.isfinite().all())]
    if not broken and all(bool(w.isfinite().all()) for w in weights):
        return
    chunk = broken[0] if broken else len(outputs) - 1
    raise NumericError(
        f"{name}: got NaN or infinity in chunk {chunk} of {len(outputs)} (largest θ {float(gates.theta.max()):.3g}, "
        f"largest η {float(gates.eta.max()):.3g}), expected a memory that learns with a finite loss. Lower the step "
        "size, shorten the chunk, bound θ by (1 − η) / chunk, or clip the gradient; or look for NaN in the input."
    )


def _check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gates: Gates,
    net: MemoryNet,
    chunk: int,
    reads: str,
    mode: str,
    state: MemoryState | None,
) -> None:
    if reads not in READS:
        raise unknown("reads", reads, READS)
    if mode not in ("block", "reference", "step"):
        raise unknown("mode", mode, ("block", "reference", "step"))
    if chunk < 1:
        raise ArgumentError(f"chunk: got {chunk}, expected at least one token.")
    if state is not None and state.chunk != chunk:
        raise ArgumentError(f"state: got one for chunks of {state.chunk} tokens, expected {chunk}. Use one chunk size.")
    dim = net.weights[0].shape[1]
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.shape != query.shape or x.ndim != 4 or x.shape[1] != net.heads or x.shape[3] != dim:
            raise ArgumentError(
                f"{name}: got shape {tuple(x.shape)}, expected (batch, {net.heads}, tokens, {dim}), alike for query, "
                "key and value: the memory maps its input dimensions to as many."
            )
    outs = [w.shape[2] for w in net.weights]
    if gates.channels and [a.shape[-1] for a in gates.alphas] != outs:
        got = [a.shape[-1] for a in gates.alphas]
        raise ArgumentError(f"alpha: got {got} channels, expected {outs}: one per output of each layer.")
