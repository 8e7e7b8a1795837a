"""Do receiver heads matter: the loss with their output gated, beside as many other heads of the same layers.

The gate stands at the input of the output projection, which is where heads are. (Zeroing a slice of that projection's
output, as the released hook does, removes coordinates of the residual stream.) A factor above 1 amplifies.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor, nn

from headway.door import HeadGate, use
from headway.door.evaluating import evaluating
from headway.statistics import Null, against_null, matched_controls

Head = tuple[int, int]


@dataclass(frozen=True)
class Ablation:
    """Losses in nats per token: untouched, with the heads gated, and with each control set; `null` places the rise."""

    plain: float
    gated: float
    controls: tuple[float, ...]
    null: Null

    @property
    def rise(self) -> float:
        return self.gated - self.plain


def ablate(
    model: nn.Module,
    ids: Int[Tensor, "1 tokens"],
    heads: Sequence[Head],
    *,
    shape: tuple[int, int],
    factor: float = 0.0,
    first: int = 1,
    draws: int = 10,
    generator: np.random.Generator | int = 0,
    layers: Sequence[int] | None = None,
) -> Ablation:
    """The loss of tokens from `first` on with the output of `heads` times `factor`, and with `draws` sets of other
    heads of the same layers. `shape` is the (layers, heads) of scores, `layers` the layer number of each of its rows
    (by default the row itself); `heads` name rows."""
    numbers = range(shape[0]) if layers is None else layers

    def loss(some: Sequence[Head]) -> float:
        return gated_loss(model, ids, [(numbers[row], head) for row, head in some], factor=factor, first=first)

    with evaluating(model):
        plain = gated_loss(model, ids, (), first=first)
        gated = loss(heads)
        sets = matched_controls(heads, shape, np.random.default_rng(generator), draws=draws)
        others = [loss(chosen) for chosen in sets]
    return Ablation(plain, gated, tuple(others), against_null(gated - plain, [o - plain for o in others]))


@torch.no_grad()
def gated_loss(
    model: nn.Module, ids: Int[Tensor, "1 tokens"], heads: Sequence[Head], *, factor: float = 0.0, first: int = 1
) -> float:
    """Mean loss of tokens `first` … of the text with those heads times `factor`."""
    stages = (HeadGate(gates=dict.fromkeys(heads, factor)),) if heads else ()
    with use(model, *stages):
        logits = model(input_ids=ids, use_cache=False).logits[0, first - 1 : -1]
    return float(nn.functional.cross_entropy(logits.float(), ids[0, first:]))
