"""Slopes: how fast each head of a decaying mixer, or of ALiBi, forgets.

    weight of a token at distance δ  ∝  exp(−s_h δ) ,   λ_h = exp(−s_h) ∈ (0, 1] ,   s_h = base_h · temperature_l

Two families of bases over heads h = 0..H−1:

    alibi    2^(−8(h+1)/H)                              geometric; every head forgets
    linear   8h/H                                       linear; head 0 never forgets

For an H that is no power of two ALiBi takes the slopes of the next lower power P, then every second slope of 2P. The
temperature lets low layers forget faster:

    released   1 − l/(L−1) + 10⁻⁵       the last layer hardly forgets; with a single layer 1
    paper      1 − l/L
    none       1

ALiBi: arXiv 2108.12409. Temperature: TransNormerLLM, arXiv 2307.14995 and 2405.17381, whose text has the linear slopes
and the paper temperature, whose released models have ALiBi's slopes and the other one.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from headway.errors import ArgumentError, unknown

FAMILIES = ("alibi", "linear", "none")
TEMPERATURES = ("released", "paper", "none")
#: What the last layer of a released model still forgets.
FLOOR = 1e-5


def head_slopes(
    heads: int, *, family: str = "alibi", layer: int = 0, layers: int = 1, temperature: str | None = None
) -> Float[Tensor, " heads"]:
    """The slopes of the heads of one layer in float32, all ≥ 0. `family="none"` gives zeros: no forgetting.

    `temperature=None` is the one that goes with the family: "released" for alibi, "paper" for linear."""
    if heads < 1:
        raise ArgumentError(f"heads: got {heads}, expected at least 1.")
    if family not in FAMILIES:
        raise unknown("family", family, FAMILIES)
    bases = {"alibi": alibi_slopes, "linear": linear_slopes, "none": lambda count: torch.zeros(count)}
    if temperature is None:
        temperature = {"alibi": "released", "linear": "paper", "none": "none"}[family]
    return bases[family](heads) * layer_temperature(layer, layers, temperature)


def alibi_slopes(heads: int) -> Float[Tensor, " heads"]:
    """ALiBi's slopes, steepest first up to the largest power of two."""
    power = 2 ** math.floor(math.log2(heads))
    slopes = _geometric(power)
    if power < heads:
        slopes = torch.cat([slopes, _geometric(2 * power)[::2][: heads - power]])
    return slopes


def linear_slopes(heads: int) -> Float[Tensor, " heads"]:
    """8h/H: head 0 keeps everything, the last head nothing beyond a token or two."""
    return 8 * torch.arange(heads) / heads


def layer_temperature(layer: int, layers: int, kind: str = "released") -> float:
    """The factor on the slopes of layer `layer` (from 0) of `layers`."""
    if not 0 <= layer < layers:
        raise ArgumentError(f"layer: got {layer} of {layers} layers, expected 0..{layers - 1}.")
    if kind not in TEMPERATURES:
        raise unknown("temperature", kind, TEMPERATURES)
    if kind == "none" or layers == 1:
        return 1.0
    return 1 - layer / (layers - 1) + FLOOR if kind == "released" else 1 - layer / layers


def _geometric(heads: int) -> Tensor:
    return torch.tensor([2.0 ** (-8 * (head + 1) / heads) for head in range(heads)])
