"""What tells softmax and linear attention apart: whether rows know their query, and how much they read nearby.

    injective    ⇔  the centred features φ(k_j) − mean φ(k) have rank dim      (then N ≥ dim + 1 keys)
    confusion        pairs of queries with ‖q − p‖ > apart and ‖w(q) − w(p)‖ < alike
    locality         Σ_{j near i} w_ij beside the share that uniform attention gives to those keys
    masking          the damage of zeroing the weights of near tokens, beside that of as many others

The first holds for the subtractive rule with any injective φ, and for the softmax with φ the identity. The paper gives
no thresholds for the second; those here are relative to the queries' own length and to rows that sum to one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from headway.door.call import AttentionCall
from headway.door.stages import Editor, Observer
from headway.errors import ArgumentError, unknown
from headway.kernels.feature_rules import feature_map

#: Rows that one look takes from a call: pairs grow with their square.
MOST_ROWS = 512


@dataclass(frozen=True)
class Injectivity:
    """Per head: the rank of the centred key features, and the directions in which no query is told from another
    (orthonormal rows; those that count are marked in `blind`)."""

    rank: Int[Tensor, "batch heads"]
    directions: Float[Tensor, "batch heads dim dim"]
    blind: Bool[Tensor, "batch heads dim"]

    @property
    def injective(self) -> Bool[Tensor, "batch heads"]:
        return ~self.blind.any(-1)


def injectivity(
    key: Float[Tensor, "batch heads keys dim"], *, feature: str = "identity", tolerance: float = 1e-5
) -> Injectivity:
    """Whether two different feature vectors of queries can get the same row. A direction counts as blind when the
    spread of the keys along it is below `tolerance` times the largest."""
    centred = feature_map(key, feature)
    centred = centred - centred.mean(2, keepdim=True)
    spread, directions = torch.linalg.eigh(centred.double().transpose(-1, -2) @ centred.double())
    largest = spread.amax(-1, keepdim=True)
    blind = (spread <= largest * tolerance**2) | (largest == 0)
    return Injectivity((~blind).sum(-1), directions.transpose(-1, -2), blind)


def same_row_query(
    query: Float[Tensor, "batch heads queries dim"], key: Float[Tensor, "batch heads keys dim"], *, length: float = 1.0
) -> Float[Tensor, "batch heads queries dim"]:
    """Other queries, `length` away, that get the same rows (φ the identity). Raises ArgumentError where there are
    none."""
    found = injectivity(key)
    if bool(found.injective.any()):
        heads = found.injective.nonzero().tolist()
        raise ArgumentError(
            f"key: got keys that tell all queries apart, at (batch, head) {heads[:4]}, expected fewer than dim + 1 = "
            f"{key.shape[3] + 1} independent ones. Take fewer keys."
        )
    first = found.blind.long().argmax(-1)
    direction = found.directions.gather(2, first[..., None, None].expand(-1, -1, 1, key.shape[3]))
    return query + length * direction.to(query.dtype)


def confusion_count(
    query: Float[Tensor, "batch heads queries dim"],
    weights: Float[Tensor, "batch heads queries keys"],
    *,
    apart: float = 0.5,
    alike: float = 1e-3,
) -> tuple[Int[Tensor, "batch heads"], Int[Tensor, "batch heads"]]:
    """Pairs of unlike queries that get the same row, and pairs of unlike queries.

    Unlike: further than `apart` times the root-mean-square length of the head's queries. The same row: Euclidean
    distance below `alike`."""
    if not (apart >= 0 and alike > 0):
        raise ArgumentError(f"apart, alike: got {apart} and {alike}, expected apart ≥ 0 and alike > 0.")
    query, weights = query.double(), weights.double()
    length = query.square().sum(-1).mean(-1).sqrt()[..., None, None]
    exact = "donot_use_mm_for_euclid_dist"
    unlike = torch.cdist(query, query, compute_mode=exact) > apart * length
    unlike = unlike & torch.ones_like(unlike[0, 0]).triu(1)
    same = torch.cdist(weights, weights, compute_mode=exact) < alike
    return (unlike & same).sum((-1, -2)), unlike.sum((-1, -2))


def neighbourhood(
    grid: tuple[int, int], *, window: int = 3, prefix: int = 0, device: torch.device | str | None = None
) -> Bool[Tensor, "tokens tokens"]:
    """Which patches stand in the window × window square around each patch, itself among them. Prefix tokens are near
    nothing."""
    height, width = grid
    if window < 1 or window % 2 == 0:
        raise ArgumentError(f"window: got {window}, expected an odd side such as 3.")
    if height < 1 or width < 1 or prefix < 0:
        raise ArgumentError(f"grid, prefix: got {grid} and {prefix}, expected positive sides and prefix ≥ 0.")
    down, right = (x.flatten() for x in torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij"))
    reach = window // 2
    near = ((down[:, None] - down).abs() <= reach) & ((right[:, None] - right).abs() <= reach)
    return torch.nn.functional.pad(near, (prefix, 0, prefix, 0)).to(device)


def locality_mass(
    weights: Float[Tensor, "batch heads rows tokens"],
    near: Bool[Tensor, "rows tokens"],
) -> tuple[Float[Tensor, "batch heads rows"], Float[Tensor, " rows"]]:
    """What each row gives to the keys near it, and what uniform attention would give them. Signed weights count with
    their sign."""
    if near.shape != weights.shape[2:]:
        raise ArgumentError(f"near: got shape {tuple(near.shape)}, expected {tuple(weights.shape[2:])}: rows, tokens.")
    return (weights * near).sum(-1), near.float().mean(-1)


class LocalityObserver(Observer):
    """Per layer and head: the mean mass that patches give to the window around them, and its ratio to the uniform
    share. Over all images seen; for self-attention over one grid with `prefix` tokens in front."""

    reads_weights = True

    def __init__(self, grid: tuple[int, int], *, prefix: int = 0, window: int = 3, block: int = MOST_ROWS) -> None:
        self.near, self.prefix, self.block = neighbourhood(grid, window=window, prefix=prefix), prefix, block

    def start(self) -> None:
        self._mass: dict[str, list[np.ndarray]] = {}

    def observe(self, call: AttentionCall, output: Tensor, lse: Tensor | None = None) -> None:
        _check_grid(call, self.near)
        near = self.near.to(call.query.device)
        total = torch.zeros(call.query.shape[:2], device=call.query.device)
        for start in range(self.prefix, call.queries, self.block):
            rows = torch.arange(start, min(start + self.block, call.queries), device=call.query.device)
            total = total + locality_mass(call.weights(rows), near[rows])[0].sum(-1)
        patches = call.queries - self.prefix
        self._mass.setdefault(call.site.name, []).append((total / patches).double().cpu().numpy())

    def result(self) -> dict[str, dict[str, Any]]:
        """By site: "mass" per head, "uniform", and "ratio" of the two per head."""
        uniform = float(self.near[self.prefix :].double().mean())
        found = {}
        for site, parts in self._mass.items():
            mass = np.concatenate(parts).mean(0)
            found[site] = {"mass": mass, "uniform": uniform, "ratio": mass / uniform}
        return found


class ConfusionObserver(Observer):
    """Per layer: pairs of unlike queries with the same row, by `confusion_count`, over the images seen. Of calls with
    more than `rows` queries, evenly spaced ones are taken. For attention that sees everything: behind a causal or a
    padding mask rows differ for other reasons."""

    reads_weights = True

    def __init__(self, *, apart: float = 0.5, alike: float = 1e-3, rows: int = MOST_ROWS) -> None:
        self.apart, self.alike, self.rows = apart, alike, rows

    def start(self) -> None:
        self._counts: dict[str, np.ndarray] = {}

    def observe(self, call: AttentionCall, output: Tensor, lse: Tensor | None = None) -> None:
        if call.causal:
            raise ArgumentError(
                f"call at {call.site.name}: got causal attention, expected rows that all see the same keys. Observe a "
                "bidirectional model."
            )
        spaced = torch.linspace(0, call.queries - 1, min(self.rows, call.queries), device=call.query.device)
        rows = spaced.round().long().unique()
        counts = confusion_count(call.query[:, :, rows], call.weights(rows), apart=self.apart, alike=self.alike)
        both = np.array([int(c.sum()) for c in counts])
        self._counts[call.site.name] = self._counts.get(call.site.name, np.zeros(2, dtype=int)) + both

    def result(self) -> dict[str, dict[str, Any]]:
        """By site: "confused" and "unlike" pairs, and the "share" of the first in the second."""
        return {
            site: {"confused": int(c[0]), "unlike": int(c[1]), "share": c[0] / max(int(c[1]), 1)}
            for site, c in self._counts.items()
        }


@dataclass(frozen=True, kw_only=True)
class MaskTokens(Editor):
    """Zeroes the weights that patches give to the window around them ("local"), or to as many patches elsewhere
    ("random", drawn once per layer and row from `seed`).

    renormalise: share what was taken among the rest of the row, so that rows still sum to what they did."""

    grid: tuple[int, int]
    kind: str = "local"
    window: int = 3
    prefix: int = 0
    renormalise: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.kind not in ("local", "random"):
            raise unknown("kind", self.kind, ("local", "random"))

    def edit_weights(
        self,
        call: AttentionCall,
        weights: Float[Tensor, "batch heads rows keys"],
        rows: Int[Tensor, " rows"],
    ) -> Float[Tensor, "batch heads rows keys"]:
        known = call.forward.scratch
        if (self, call.site.layer) not in known:
            known[self, call.site.layer] = self.masked(call.site.layer).to(weights.device)
        gone = known[self, call.site.layer]
        _check_grid(call, gone)
        gone = gone[rows.to(weights.device)]
        kept = weights.masked_fill(gone, 0.0)
        if not self.renormalise:
            return kept
        left = kept.sum(-1, keepdim=True)
        return torch.where(left.abs() > 1e-6, kept * (weights.sum(-1, keepdim=True) / left), kept)

    def masked(self, layer: int) -> Bool[Tensor, "tokens tokens"]:
        """The weights that are zeroed at a layer."""
        near = neighbourhood(self.grid, window=self.window, prefix=self.prefix)
        if self.kind == "local":
            return near
        generator = torch.Generator().manual_seed(self.seed * 1009 + layer)
        lots = torch.rand(near.shape, generator=generator).masked_fill(near, torch.inf)
        lots[:, : self.prefix] = torch.inf
        count = near.sum(-1, keepdim=True)
        if int(count.max()) * 2 > near.shape[1] - self.prefix:
            raise ArgumentError(
                f"window: got {self.window} on a grid of {self.grid}, expected that as many patches are elsewhere. "
                "Take a smaller window."
            )
        order = lots.argsort(-1).argsort(-1)
        return order < count


def _check_grid(call: AttentionCall, near: Tensor) -> None:
    tokens = near.shape[0]
    if call.queries != tokens or call.keys != tokens:
        raise ArgumentError(
            f"grid: got {tokens} patches and prefix tokens, but {call.site.name} has {call.queries} queries and "
            f"{call.keys} keys. Give the grid of this input, and every token in front of it as `prefix`."
        )
