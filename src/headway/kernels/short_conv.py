"""A causal depthwise convolution over the last few tokens of a document, with a tail that is carried on.

    y_t = bias + Σ_{j<k} weight[:, k−1−j] ⊙ x_{t−j}        (the last column meets the token itself)

x_{t−j} is the j-th real token before t in the same document; before the first one stands zero. A padded step is no
step: its output is zero, and neither the tail nor a distance between real tokens knows of it.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from headway.errors import ArgumentError


def short_conv(
    x: Float[Tensor, "batch tokens channels"],
    weight: Float[Tensor, "channels taps"],
    bias: Float[Tensor, " channels"] | None = None,
    *,
    tail: Float[Tensor, "batch taps_less_one channels"] | None = None,
    mask: Bool[Tensor, "batch tokens"] | None = None,
    resets: Bool[Tensor, "batch tokens"] | None = None,
) -> tuple[Float[Tensor, "batch tokens channels"], Float[Tensor, "batch taps_less_one channels"]]:
    """The convolution and the new tail: the last `taps − 1` real tokens of the present document, oldest first.

    `tail` is what an earlier call returned (None: nothing was read yet). `mask` is True for real tokens; what stands at
    the others is never read, NaN included. `resets` is True for the first token of a document, and ignored at padding.
    Products are summed in at least float32. Raises ArgumentError for shapes that do not fit."""
    _check(x, weight, bias, tail, mask, resets)
    (batch, tokens, channels), taps = x.shape, weight.shape[1]
    if tail is None:
        tail = x.new_zeros(batch, taps - 1, channels)
    document = latest = None
    if resets is not None:
        opens = resets if mask is None else resets & mask
        document, latest = opens.long().cumsum(1), opens.sum(1)[:, None]
    if mask is None:
        real, count = x, x.new_full((batch,), tokens, dtype=torch.long)
    else:
        order, count = torch.argsort(~mask, dim=1, stable=True), mask.sum(1)
        real = torch.where(mask[:, :, None], x, 0).gather(1, order[:, :, None].expand_as(x))
        document = None if document is None else document.gather(1, order)
    line = torch.cat([tail.to(x.dtype), real], 1)
    if document is not None:
        document = torch.cat([document.new_zeros(batch, taps - 1), document], 1)
    y = _convolve(line, weight, bias, document)
    if mask is not None:
        place = (mask.long().cumsum(1) - 1).clamp(min=0)
        y = torch.where(mask[:, :, None], y.gather(1, place[:, :, None].expand_as(y)), 0)
    return y, _tail(line, document, latest, count, taps).to(tail.dtype)


def _convolve(
    line: Float[Tensor, "batch line channels"],
    weight: Float[Tensor, "channels taps"],
    bias: Float[Tensor, " channels"] | None,
    document: Int[Tensor, "batch line"] | None,
) -> Float[Tensor, "batch tokens channels"]:
    """Every token after the first `taps − 1` of the line."""
    taps, wide = weight.shape[1], torch.promote_types(line.dtype, torch.float32)
    tokens = line.shape[1] - taps + 1
    rows, kernel = line.to(wide), weight.to(wide)
    y = rows[:, taps - 1 :] * kernel[:, -1]
    for column in range(taps - 1):
        earlier = rows[:, column : column + tokens]
        if document is not None:
            same = document[:, column : column + tokens] == document[:, taps - 1 :]
            earlier = torch.where(same[:, :, None], earlier, 0)
        y = torch.addcmul(y, earlier, kernel[:, column])
    if bias is not None:
        y = y + bias.to(wide)
    return y.to(line.dtype)


def _tail(line: Tensor, document: Tensor | None, latest: Tensor | None, count: Tensor, taps: int) -> Tensor:
    """The `taps − 1` tokens of the line before place `count + taps − 1`, those of ended documents as zero."""
    places = count[:, None] + torch.arange(taps - 1, device=line.device)
    kept = line.gather(1, places[:, :, None].expand(-1, -1, line.shape[2]))
    if document is None or latest is None:
        return kept
    return torch.where((document.gather(1, places) == latest)[:, :, None], kept, 0)


def _check(
    x: Tensor, weight: Tensor, bias: Tensor | None, tail: Tensor | None, mask: Tensor | None, resets: Tensor | None
) -> None:
    if x.ndim != 3:
        raise ArgumentError(f"x: got shape {tuple(x.shape)}, expected (batch, tokens, channels).")
    batch, tokens, channels = x.shape
    if weight.ndim != 2 or weight.shape[0] != channels or weight.shape[1] < 1:
        raise ArgumentError(
            f"weight: got shape {tuple(weight.shape)}, expected (channels, taps) = ({channels}, at least 1). "
            "A Conv1d weight of shape (channels, 1, taps) loses its middle axis by .squeeze(1)."
        )
    expected = {
        "bias": (bias, (channels,)),
        "tail": (tail, (batch, weight.shape[1] - 1, channels)),
        "mask": (mask, (batch, tokens)),
        "resets": (resets, (batch, tokens)),
    }
    for name, (got, shape) in expected.items():
        if got is not None and tuple(got.shape) != shape:
            raise ArgumentError(f"{name}: got shape {tuple(got.shape)}, expected {shape}.")
        if name in ("mask", "resets") and got is not None and got.dtype != torch.bool:
            raise ArgumentError(f"{name}: got {got.dtype}, expected bool. Pass `{name}.bool()`.")
