"""Keys or values as small integers: codes packed two to a byte where four bits do, and the steps that give them back.

    x̂ = step · code ,   code = round(x / step) in −(2^(bits−1) − 1) … 2^(bits−1) − 1

One step serves a group of tokens: all of it ("tensor"), each channel of each head ("channel"), or one token of one head
("token"); "exact" leaves numbers as they are. A group belongs to one sequence, so that a batch gives what its rows give
alone.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from headway.errors import ArgumentError, unknown

PER = ("tensor", "channel", "token", "exact")
BITS = (4, 8)


class PackedTokens:
    """One tensor of a layer, (batch, heads, tokens, dim), of which the first tokens are codes.

    `group` says which group of its sequence a token belongs to; it is shared by keys and values."""

    def __init__(self, *, bits: int, per: str) -> None:
        if bits not in BITS:
            raise ArgumentError(f"bits: got {bits}, expected 4 or 8.")
        if per not in PER:
            raise unknown("per", per, PER)
        self.bits, self.per = bits, per
        self.clear()

    def clear(self) -> None:
        self.codes: Tensor | None = None
        self.steps: Tensor | None = None
        self.dim = 0

    @property
    def largest(self) -> int:
        return 2 ** (self.bits - 1) - 1

    @property
    def tokens(self) -> int:
        return 0 if self.codes is None else self.codes.shape[2]

    @property
    def bytes(self) -> int:
        return sum(0 if t is None else t.numel() * t.element_size() for t in (self.codes, self.steps))

    def close(
        self,
        x: Float[Tensor, "batch heads tokens dim"],
        counts: Bool[Tensor, "batch tokens"],
        closes: Bool[Tensor, "batch tokens"],
    ) -> Float[Tensor, "batch heads tokens dim"]:
        """Ends a group: x with the tokens that close replaced by what their codes will say. `counts` are those that
        set the step (no padding, no sink). Steps are stored by token ("tensor", "token") or by group ("channel")."""
        if self.per == "exact":
            return x
        size = torch.where(counts[:, None, :, None], x.detach().float().abs(), 0.0)
        over = {"tensor": (1, 2, 3), "channel": (2,), "token": (3,)}[self.per]
        step = size.amax(over, keepdim=True) / self.largest
        if self.per == "channel":
            self.steps = step if self.steps is None else torch.cat([self.steps, step], 2)
        else:
            own = step.expand(-1, -1, x.shape[2], -1)
            if self.steps is None:
                self.steps = own.new_zeros(*own.shape[:2], 0, 1)
            before = self.steps[:, :, self.tokens :]
            before = torch.nn.functional.pad(before, (0, 0, 0, x.shape[2] - before.shape[2]))
            after = torch.where(closes[:, None, :, None], own, before)
            self.steps = torch.cat([self.steps[:, :, : self.tokens], after], 2)
        rounded = _codes(x.float(), step, self.largest) * step
        return torch.where(closes[:, None, :, None], rounded.to(x.dtype), x)

    def pack(self, x: Float[Tensor, "batch heads tokens dim"], group: Int[Tensor, "batch tokens"]) -> None:
        """Moves the next tokens into codes. Their groups must be closed, so that nothing is lost any more."""
        self.dim = x.shape[3]
        start = self.tokens
        if self.per == "exact":
            packed = x
        else:
            step = self._steps_at(start, start + x.shape[2], group)
            codes = _codes(x.float(), step, self.largest).to(torch.int8)
            packed = codes if self.bits == 8 else pack_pairs(codes)
        self.codes = packed if self.codes is None else torch.cat([self.codes, packed], 2)

    def unpack(self, group: Int[Tensor, "batch tokens"], dtype: torch.dtype) -> Float[Tensor, "batch heads tokens dim"]:
        """All packed tokens as numbers. Raises ArgumentError when none is packed."""
        if self.codes is None:
            raise ArgumentError("packed: got no tokens, expected some. Read the exact store alone.")
        if self.per == "exact":
            return self.codes.to(dtype)
        codes = self.codes if self.bits == 8 else unpack_pairs(self.codes, self.dim)
        return (codes.float() * self._steps_at(0, self.tokens, group)).to(dtype)

    def _steps_at(self, start: int, stop: int, group: Int[Tensor, "batch tokens"]) -> Tensor:
        assert self.steps is not None
        if self.per != "channel":
            return self.steps[:, :, start:stop]
        index = group[:, None, start:stop, None].clamp(min=0)
        return self.steps.gather(2, index.expand(-1, self.steps.shape[1], -1, self.steps.shape[3]))

    def select(self, index: Int[Tensor, " rows"]) -> None:
        for name in ("codes", "steps"):
            state = getattr(self, name)
            if state is not None:
                setattr(self, name, state.index_select(0, index.to(state.device, torch.long)))


def pack_pairs(codes: Tensor) -> Tensor:
    """Codes −8 … 7 two to a byte along the last dimension; an odd one has 0 beside it."""
    shifted = torch.nn.functional.pad(codes, (0, codes.shape[-1] % 2)).to(torch.uint8) & 0xF
    return shifted[..., 0::2] | (shifted[..., 1::2] << 4)


def unpack_pairs(packed: Tensor, dim: int) -> Tensor:
    """The codes that `pack_pairs` packed."""
    both = torch.stack([packed & 0xF, packed >> 4], -1).flatten(-2)[..., :dim].to(torch.int8)
    return torch.where(both > 7, both - 16, both)


def _codes(x: Tensor, step: Tensor, largest: int) -> Tensor:
    return torch.where(step > 0, torch.round(x / torch.where(step > 0, step, 1.0)).clamp(-largest, largest), 0.0)
