"""The causal scan of linear attention with a fixed decay per head, in three forms that agree.

    o_t = scale · Σ_{s≤t} λ_h^(t−s) (q_t·k_s) v_s ,      λ_h = exp(−slope_h) ∈ (0, 1]

- parallel ("reference"):  O = scale · [(Q Kᵀ) ⊙ M] V with M_ts = λ^(t−s), zero above the diagonal: O(n²)
- recurrent ("step"):      S_t = λ S_{t−1} + k_t v_tᵀ ,  o_t = scale · S_tᵀ q_t: one token after the other
- blocks ("block"):        the first within blocks, the second between them (`scan_blocks`): O(n)

There is no softmax, no denominator and, with scale = 1, no 1/√d. The state S (d × e) is all that is known of the past.
Distances count real tokens: a masked step neither writes nor decays, and its row is zero. A reset empties the state
before its token. State and sums are in at least float32; the output has the dtype of `value`.

Paper: lightning attention, arXiv 2401.04658 and 2405.17381.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from headway.errors import ArgumentError, unknown
from headway.kernels.scan_blocks import BLOCK, scan_blocks

MODES = ("block", "reference", "step")


def causal_scan(
    query: Float[Tensor, "batch heads tokens dim"],
    key: Float[Tensor, "batch heads tokens dim"],
    value: Float[Tensor, "batch heads tokens value_dim"],
    slopes: Float[Tensor, " heads"] | None = None,
    *,
    scale: float = 1.0,
    state: Float[Tensor, "batch heads dim value_dim"] | None = None,
    mask: Bool[Tensor, "batch tokens"] | None = None,
    resets: Bool[Tensor, "batch tokens"] | None = None,
    mode: str = "block",
    block: int = BLOCK,
) -> tuple[Float[Tensor, "batch heads tokens value_dim"], Float[Tensor, "batch heads dim value_dim"]]:
    """The output and the state behind the last token.

    `slopes` are ≥ 0 and not learned, (heads,) or (heads, 1, 1); None is no decay. `state` is what an earlier call
    returned; it is not changed. `mask` is True at real tokens; what stands at others is never read. `resets` is True at
    the first token of a document, and ignored at padding. Everything else is differentiable, the state included. Raises
    ArgumentError for shapes that do not fit and for slopes below zero."""
    if mode not in MODES:
        raise unknown("mode", mode, MODES)
    slopes = _checked_slopes(slopes, query)
    _check(query, key, value, state, mask, resets, block)
    wide = torch.promote_types(value.dtype, torch.float32)
    if state is None:
        state = value.new_zeros(*query.shape[:2], query.shape[3], value.shape[3], dtype=wide)
    state = state.to(wide)
    mask = None if mask is None or bool(mask.all()) else mask
    if resets is not None:
        resets = resets if mask is None else resets & mask
        resets = resets if bool(resets.any()) else None
    if mask is not None:
        query, key, value = (torch.where(mask[:, None, :, None], x, 0) for x in (query, key, value))
    options: dict[str, Any] = {"scale": scale, "mask": mask, "resets": resets}
    with torch.autocast(query.device.type, enabled=False):
        if mode == "reference":
            return scan_parallel(query, key, value, slopes, state, **options)
        if mode == "step" or query.shape[2] < 2:
            return scan_recurrent(query, key, value, slopes, state, **options)
        return scan_blocks(query, key, value, slopes, state, block=block, **options)


def scan_parallel(
    query: Float[Tensor, "batch heads tokens dim"],
    key: Float[Tensor, "batch heads tokens dim"],
    value: Float[Tensor, "batch heads tokens value_dim"],
    slopes: Float[Tensor, " heads"],
    state: Float[Tensor, "batch heads dim value_dim"],
    *,
    scale: float = 1.0,
    mask: Bool[Tensor, "batch tokens"] | None = None,
    resets: Bool[Tensor, "batch tokens"] | None = None,
) -> tuple[Float[Tensor, "batch heads tokens value_dim"], Float[Tensor, "batch heads dim value_dim"]]:
    """The full matrix, by definition."""
    batch, _, tokens, _ = query.shape
    q, k, v = (x.to(state.dtype) for x in (query, key, value))
    real = torch.ones(batch, tokens, dtype=torch.bool, device=query.device) if mask is None else mask
    at = real.long().cumsum(1)
    document = torch.zeros_like(at) if resets is None else resets.long().cumsum(1)
    weights = scale * (q @ k.transpose(-1, -2)) * scan_decays(slopes, at, document, real).to(q.dtype)
    first = torch.where((document == 0)[:, None], decay_powers(slopes, at), 0).to(q.dtype)
    out = weights @ v + scale * first[..., None] * (q @ state)
    if tokens == 0:
        return out.to(value.dtype), state
    stays = real & (document == document[:, -1:])
    last = torch.where(stays[:, None], decay_powers(slopes, at[:, -1:] - at), 0).to(q.dtype)
    after = (last[..., None] * k).transpose(-1, -2) @ v + first[..., -1, None, None] * state
    return torch.where(real[:, None, :, None], out, 0).to(value.dtype), after


def scan_decays(
    slopes: Float[Tensor, " heads"],
    at: Float[Tensor, "batch tokens"],
    document: Float[Tensor, "batch tokens"],
    real: Bool[Tensor, "batch tokens"],
) -> Float[Tensor, "batch heads tokens tokens"]:
    """M: λ^(number of real tokens between), zero where the key is later, padding, or of another document.

    `at` is the running count of real tokens, `document` the running count of resets."""
    distance = at[:, :, None] - at[:, None, :]
    seen = (document[:, :, None] == document[:, None, :]) & real[:, None, :] & real[:, :, None]
    return torch.where(seen[:, None], decay_powers(slopes, distance.clamp(min=0)), 0).tril()


def decay_powers(
    slopes: Float[Tensor, " heads"], distance: Float[Tensor, "batch ..."]
) -> Float[Tensor, "batch heads ..."]:
    """λ_h^distance in float64 for whole distances ≥ 0; λ^0 is 1 for any slope, infinity included."""
    factor = torch.exp(-slopes.double()).view(-1, *[1] * (distance.ndim - 1))
    return factor ** distance[:, None].double()


def scan_recurrent(
    query: Float[Tensor, "batch heads tokens dim"],
    key: Float[Tensor, "batch heads tokens dim"],
    value: Float[Tensor, "batch heads tokens value_dim"],
    slopes: Float[Tensor, " heads"],
    state: Float[Tensor, "batch heads dim value_dim"],
    *,
    scale: float = 1.0,
    mask: Bool[Tensor, "batch tokens"] | None = None,
    resets: Bool[Tensor, "batch tokens"] | None = None,
) -> tuple[Float[Tensor, "batch heads tokens value_dim"], Float[Tensor, "batch heads dim value_dim"]]:
    """Token by token through the state."""
    q, k, v = (x.to(state.dtype) for x in (query, key, value))
    factor = torch.exp(-slopes.to(state.dtype))[:, None, None]
    outputs = []
    for t in range(query.shape[2]):
        if resets is not None:
            state = torch.where(resets[:, t, None, None, None], 0, state)
        written = torch.addcmul(factor * state, k[:, :, t, :, None], v[:, :, t, None, :])
        state = written if mask is None else torch.where(mask[:, t, None, None, None], written, state)
        row = scale * (q[:, :, t, None, :] @ state)
        outputs.append(row if mask is None else torch.where(mask[:, t, None, None, None], row, 0))
    return (torch.cat(outputs, 2).to(value.dtype) if outputs else value.clone()), state


def _checked_slopes(slopes: Tensor | None, query: Tensor) -> Float[Tensor, " heads"]:
    heads = query.shape[1]
    if slopes is None:
        return torch.zeros(heads, device=query.device)
    if tuple(slopes.shape) not in ((heads,), (heads, 1, 1)):
        raise ArgumentError(f"slopes: got shape {tuple(slopes.shape)}, expected ({heads},) or ({heads}, 1, 1).")
    if slopes.requires_grad:
        raise ArgumentError(
            "slopes: got a tensor that requires a gradient, expected fixed slopes: learned ones give NaN in training, "
            "as the authors report. Pass slopes.detach()."
        )
    if not bool((slopes >= 0).all()):
        raise ArgumentError(f"slopes: got {float(slopes.min())}, expected all ≥ 0: the decay would exceed 1.")
    return slopes.reshape(heads).to(query.device)


def _check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    state: Tensor | None,
    mask: Tensor | None,
    resets: Tensor | None,
    block: int,
) -> None:
    if query.ndim != 4 or key.shape != query.shape:
        raise ArgumentError(
            f"query, key: got shapes {tuple(query.shape)} and {tuple(key.shape)}, expected (batch, heads, tokens, dim) "
            "for both."
        )
    batch, heads, tokens, dim = query.shape
    if value.ndim != 4 or value.shape[:3] != query.shape[:3]:
        raise ArgumentError(
            f"value: got shape {tuple(value.shape)}, expected ({batch}, {heads}, {tokens}, any value dimension)."
        )
    expected = (batch, heads, dim, value.shape[3])
    if state is not None and tuple(state.shape) != expected:
        raise ArgumentError(
            f"state: got shape {tuple(state.shape)}, expected {expected}: (batch, heads, dim, value_dim)."
        )
    for name, tensor in (("mask", mask), ("resets", resets)):
        if tensor is not None and (tuple(tensor.shape) != (batch, tokens) or tensor.dtype != torch.bool):
            raise ArgumentError(
                f"{name}: got {str(tensor.dtype).removeprefix('torch.')} of shape {tuple(tensor.shape)}, expected bool "
                f"of shape {(batch, tokens)}. Turn a 4-D mask into one entry per token first."
            )
    if block < 1:
        raise ArgumentError(f"block: got {block}, expected at least 1.")
