"""Token mixers: the layers that can stand where attention stands in a model, under one contract.

A mixer maps (batch, tokens, width) to the same shape and carries a `State` from call to call. What is padding and where
a document begins is part of the operation:

- a masked step is the identity on the state and gives a row of zeros, wherever it stands;
- a reset empties the state before its token is read, so that packed documents equal separate ones;
- any split of a sequence with carried state equals one call, and equals token by token.

`register_mixer` makes a class known by its slug. `tests/contracts` holds every registered mixer to this.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from headway.errors import ArgumentError, unknown

MODES = ("block", "reference", "step")

_MIXERS: dict[str, type[Mixer]] = {}
_Class = TypeVar("_Class", bound="type[Mixer]")


@dataclass(frozen=True)
class State:
    """What a mixer knows of the past of each row of a batch. Every tensor has the batch first. `seen` is how many real
    tokens of the present document were read."""

    tensors: dict[str, Tensor]
    seen: Int[Tensor, " batch"]
    #: Where a mixer that adds to its tensors has room behind them; only the state that was made last may use it.
    room: Any = field(default=None, compare=False, repr=False)

    @property
    def batch(self) -> int:
        return self.seen.shape[0]

    @property
    def bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (*self.tensors.values(), self.seen))

    def reorder(self, index: Int[Tensor, " rows"]) -> State:
        """Rows in the order of `index`, as beam search asks for."""
        return self._each(lambda t: t.index_select(0, index.to(t.device)))

    def repeat(self, times: int) -> State:
        """Each row `times` times, one behind the other."""
        return self._each(lambda t: t.repeat_interleave(times, 0))

    def detach(self) -> State:
        """Cut off from the graph: gradients do not flow into what came before."""
        return self._each(lambda t: t.detach())

    def clone(self) -> State:
        return self._each(lambda t: t.clone())

    def to(self, device: torch.device | str) -> State:
        return self._each(lambda t: t.to(device))

    def replace(self, seen: Tensor | None = None, **tensors: Tensor) -> State:
        """A new state in which some tensors are others. Room behind the old ones stays while they do."""
        room = None if self.tensors.keys() & tensors else self.room
        return State({**self.tensors, **tensors}, self.seen if seen is None else seen, room)

    def _each(self, change: Callable[[Tensor], Tensor]) -> State:
        return State({name: change(t) for name, t in self.tensors.items()}, change(self.seen))


class Mixer(nn.Module):
    """Base of token mixers. A subclass sets `slug` and overrides `init_state` and `forward`.

    `causal` is an attribute of the instance, as some mixers read both ways; `can_crop` tells whether tokens can be
    taken back from the state, `constant_state` whether its bytes are the same at any length, `reads_grid` whether it
    uses the places of patches in an image (and then has an option `prefix`, the tokens in front of them)."""

    slug: ClassVar[str] = ""
    can_crop: ClassVar[bool] = False
    constant_state: ClassVar[bool] = True
    reads_grid: ClassVar[bool] = False

    def __init__(self, width: int, *, heads: int, layer: int = 0, layers: int = 1, causal: bool = True) -> None:
        super().__init__()
        if width < 1 or heads < 1 or width % heads:
            raise ArgumentError(
                f"width, heads: got {width} and {heads}, expected a width that the heads divide. Change one of them."
            )
        if not 0 <= layer < layers:
            raise ArgumentError(f"layer: got {layer} of {layers} layers, expected 0..{layers - 1}.")
        self.width, self.heads, self.layer, self.layers, self.causal = width, heads, layer, layers, causal

    def init_state(
        self, batch: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> State:
        """The state before the first token. `dtype` is that of the inputs."""
        raise NotImplementedError

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
        """Mixed tokens, and the state behind the last of them where a state was given.

        `mask` is True at real tokens, `resets` at the first token of a document. `mode` is "block" (fast), "reference"
        (readable) or "step" (token by token). `grid` is (height, width) of the patches of an image."""
        raise NotImplementedError

    def crop(self, state: State, tokens: int) -> State:
        """The state with the last `tokens` tokens taken back. Raises ArgumentError for mixers that cannot."""
        raise ArgumentError(
            f"tokens: got a request to take back {tokens} tokens of {self.slug}, whose state cannot be unlearned. "
            "Keep a copy of the state, or generate without assisted decoding."
        )

    @classmethod
    def option_names(cls) -> list[str]:
        """The constructor options beside width, heads, layer and layers."""
        return [name for name in inspect.signature(cls).parameters if name not in ("width", "heads", "layer", "layers")]

    @classmethod
    def example(cls, **changes: Any) -> Mixer:
        """A small instance for the contract tests."""
        return cls(**{"width": 16, "heads": 2, **changes})


def register_mixer(cls: _Class) -> _Class:
    """Makes a mixer class known by its slug."""
    if not cls.slug:
        raise ArgumentError(f"slug: got none on {cls.__name__}, expected the name of the mixer. Set it on the class.")
    known = _MIXERS.get(cls.slug)
    if known is not None and f"{known.__module__}.{known.__name__}" != f"{cls.__module__}.{cls.__name__}":
        raise ArgumentError(f"slug: got {cls.slug!r} for {cls.__name__}, which is {known.__name__} already. Rename it.")
    _MIXERS[cls.slug] = cls
    return cls


def registered_mixers() -> dict[str, type[Mixer]]:
    """The mixers that were imported so far, by slug. `headway.models.mixers()` imports all of them first."""
    return dict(sorted(_MIXERS.items()))


def registered_mixer(slug: str) -> type[Mixer]:
    """Raises UnknownNameError with the nearest name for one that is not registered."""
    if slug not in _MIXERS:
        raise unknown("mixer", slug, sorted(_MIXERS))
    return _MIXERS[slug]


def check_inputs(
    mixer: Mixer,
    x: Tensor,
    mask: Tensor | None,
    resets: Tensor | None,
    state: State | None,
    mode: str,
) -> Float[Tensor, "batch tokens width"]:
    """x with zeros at masked tokens, so that nothing of them is left. Raises ArgumentError for wrong shapes."""
    if mode not in MODES:
        raise unknown("mode", mode, MODES)
    if x.ndim != 3 or x.shape[2] != mixer.width:
        raise ArgumentError(f"x: got shape {tuple(x.shape)}, expected (batch, tokens, {mixer.width}).")
    for name, tensor in (("mask", mask), ("resets", resets)):
        if tensor is None:
            continue
        if tensor.shape != x.shape[:2] or tensor.dtype != torch.bool:
            raise ArgumentError(
                f"{name}: got {str(tensor.dtype).removeprefix('torch.')} of shape {tuple(tensor.shape)}, expected bool "
                f"of shape {tuple(x.shape[:2])}: one entry per token of this call. Convert a 4-D mask, or one over all "
                "tokens so far, to that."
            )
    if state is not None and state.batch != x.shape[0]:
        raise ArgumentError(
            f"state: got one of {state.batch} rows, expected {x.shape[0]} as in x. Reorder or repeat it."
        )
    if not mixer.causal and (state is not None or mode == "step"):
        raise ArgumentError(
            f"state: got a state or mode 'step' for {mixer.slug} with causal=False, expected neither: a mixer that "
            "reads both ways needs all tokens at once."
        )
    return x if mask is None else torch.where(mask[..., None], x, 0.0)


def document_positions(
    tokens: Int[Tensor, "batch tokens"] | tuple[int, int],
    mask: Bool[Tensor, "batch tokens"] | None,
    resets: Bool[Tensor, "batch tokens"] | None,
    seen: Int[Tensor, " batch"] | None,
    device: torch.device | str | None = None,
) -> tuple[Int[Tensor, "batch tokens"], Int[Tensor, " batch"]]:
    """The position of each token in its document, counted over real tokens, and how many the last document has.

    `tokens` is (batch, tokens), or any tensor of which the first two dimensions are. `seen` is what came before this
    call. Resets at masked tokens are ignored; a masked token has the position of the real one before it."""
    if isinstance(tokens, tuple):
        batch, count = tokens
    else:
        batch, count = tokens.shape[:2]
        device = tokens.device
    before = torch.zeros(batch, dtype=torch.long, device=device) if seen is None else seen.to(torch.long)
    if count == 0:
        return torch.zeros(batch, 0, dtype=torch.long, device=device), before
    real = torch.ones(batch, count, dtype=torch.long, device=device) if mask is None else mask.long()
    read = real.cumsum(1)
    start = -before[:, None].expand(batch, count)
    if resets is not None:
        opens = resets if mask is None else resets & mask
        start = torch.where(opens, read - real, start).cummax(1).values
    return (read - start - 1).clamp(min=0), read[:, -1] - start[:, -1]


def segment_ids(
    resets: Bool[Tensor, "batch tokens"], mask: Bool[Tensor, "batch tokens"] | None = None
) -> Int[Tensor, "batch tokens"]:
    """The number of the document of each token within this call: 0 for what continues the document before it."""
    opens = resets if mask is None else resets & mask
    return opens.long().cumsum(1)


def steps(
    x: Float[Tensor, "batch tokens width"],
    mask: Bool[Tensor, "batch tokens"] | None,
    resets: Bool[Tensor, "batch tokens"] | None,
) -> Iterator[tuple[Tensor, Tensor | None, Tensor | None]]:
    """One token after the other, each as a call of length one."""
    for index in range(x.shape[1]):
        part = slice(index, index + 1)
        yield x[:, part], None if mask is None else mask[:, part], None if resets is None else resets[:, part]
