"""The stage: calibrates chosen heads while a host runs, in prefill, in chunks and in cached decoding."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from headway.door.call import AttentionCall, Site
from headway.door.capture import check_head_indices
from headway.door.rotary import OTHER_TOWERS
from headway.door.row_memory import remembered
from headway.door.stages import Editor
from headway.errors import ArgumentError, ConflictError, check_whole, unknown
from headway.kernels.dense import DEFAULT_BLOCK
from headway.methods.sinks.act.calibration import BETA, check_beta, redistribute
from headway.methods.sinks.act.detection import (
    ALPHA,
    LEAST_ROWS,
    TAU,
    check_threshold,
    find_sinks,
    first_seen,
    received_mass,
    without_first_flagged,
)

Head = tuple[int, int]
SCOPES = ("prompt", "causal")
INITIAL = ("first_token", "first_flagged", "none")
#: Key positions counted from a row's first token, or a mask (batch, tokens) over all columns.
Places = Sequence[int] | Bool[Tensor, "#batch tokens"]


@dataclass(frozen=True, kw_only=True, eq=False)
class ACT(Editor):
    """Attention calibration: `headway.use(model, ACT(heads=[(5, 3), (9, 0)]))`.

    heads: the (layer, query head) pairs to calibrate. beta: factor on sinks in [0, 1]; 1 leaves attention as it is.
    threshold, tau, alpha, least_rows: what counts as a sink, see `find_sinks`. scope: "prompt" takes the sinks of a
    prompt from all its rows, which looks ahead inside the prompt (the paper's); "causal" lets row i use rows up to i,
    so that prefill equals decoding token by token. initial: the sink that is spared: "first_token", "first_flagged"
    (the released rule) or "none". protect: keys that are never scaled down. candidates: the only keys that may be. Both
    are positions or a mask, so a key may be a word or a piece of a picture.

    In the prompt scope a prompt's sinks stay while tokens are generated, and new keys join by their running mean; a
    prompt read in chunks takes the sinks of each chunk from the rows so far. Weights are read as q and k give them.
    Towers that read pictures or sound are left alone; their tokens are keys of the language model like any others.
    Raises ArgumentError for numbers that cannot be, for heads that the host does not have, and for a scope over two
    stacks of layers, whose numbers would mean both."""

    heads: Sequence[Head]
    beta: float = BETA
    threshold: str = "absolute"
    tau: float = TAU
    alpha: float = ALPHA
    least_rows: int = LEAST_ROWS
    scope: str = "prompt"
    initial: str = "first_token"
    protect: Places = ()
    candidates: Places | None = None

    reads_parts = frozenset({"decode"})

    def __post_init__(self) -> None:
        check_beta(self.beta)
        check_threshold(self.threshold, self.tau, self.alpha)
        if self.scope not in SCOPES:
            raise unknown("scope", self.scope, SCOPES)
        if self.initial not in INITIAL:
            raise unknown("initial", self.initial, INITIAL)
        check_whole("least_rows", self.least_rows, 1)
        object.__setattr__(self, "heads", tuple(sorted({_checked_pair(pair) for pair in _listed(self.heads)})))
        for name in ("protect", "candidates"):
            object.__setattr__(self, name, _checked_places(name, getattr(self, name)))

    def __deepcopy__(self, memo: dict[int, Any]) -> ACT:
        """Itself: a copied cache keeps what this stage learned."""
        return self

    def acts_at(self, site: Site) -> bool:
        return self.beta < 1 and bool(self.heads_at(site))

    def heads_at(self, site: Site) -> list[int]:
        if site.kind == "cross" or in_tower(site.name):
            return []
        return [head for layer, head in self.heads if layer == site.layer]

    def prepare(self, sites: Sequence[Site]) -> None:
        own = [site for site in sites if site.kind != "cross" and not in_tower(site.name)]
        check_one_stack([site.name for site in own])
        known = {site.layer: site for site in own}
        for layer, head in self.heads:
            if sites and layer not in known:
                raise unknown("layer", layer, _known_layers(known))
            if sites:
                check_head_indices([head], known[layer])

    def edit_weights(
        self,
        call: AttentionCall,
        weights: Float[Tensor, "batch heads rows keys"],
        rows: Int[Tensor, " rows"],
    ) -> Float[Tensor, "batch heads rows keys"]:
        at, which = self._places(call)
        if not at:
            return weights
        tally = _Tally(self, call, at, which)
        own = weights[:, at]
        with torch.no_grad():
            sinks = tally.of_prompt(rows) if self.scope == "prompt" else tally.causal(own, rows)
        return weights.index_copy(1, torch.tensor(at, device=weights.device), redistribute(own, sinks, beta=self.beta))

    def _places(self, call: AttentionCall) -> tuple[list[int], list[int]]:
        """Where this stage's heads stand among the heads of the call, and which of the stage's heads at the site they
        are: a cache policy's call may hold some of them."""
        heads = self.heads_at(call.site)
        if call.of_heads is None:
            return heads, list(range(len(heads)))
        order = {head: place for place, head in enumerate(call.of_heads.tolist())}
        here = [which for which, head in enumerate(heads) if head in order]
        return [order[heads[which]] for which in here], here

    def allowed(self, first: Int[Tensor, "batch heads"], keys: int) -> Bool[Tensor, "batch heads keys"]:
        """Columns 0 … keys − 1 that may be scaled down, given the first token of each row."""
        column = torch.arange(keys, device=first.device) - first[..., None]
        free = torch.ones_like(column, dtype=torch.bool)
        if self.initial == "first_token":
            free = column != 0
        if self.candidates is not None:
            free = free & _marked(self.candidates, column, "candidates")
        return free & ~_marked(self.protect, column, "protect")


class _Tally:
    """What each key of a request has received so far at one site, and the sinks that follow from it.

    The values live with the request: `mass` and `count` (batch, heads, columns) over absolute columns and all of the
    stage's heads at the site, and in the prompt scope `fixed`, the sinks of the prompt. `at` are the places of some of
    these heads in the call, `which` their numbers."""

    def __init__(self, act: ACT, call: AttentionCall, at: list[int], which: list[int]) -> None:
        self.act, self.call, self.at, self.which = act, call, at, which
        owner = (act, call.site.name)
        self.kept: dict[str, Any] = remembered(call.forward, owner)
        self.columns = _columns(call, at)
        self.stop = int(self.columns.max()) + 1
        self.start = call.first_key + call.offset if call.key_at is None else self.stop - call.queries
        mark = ("this forward", *owner, *which)
        fresh = mark not in call.forward.scratch
        self.flags: dict[str, Tensor] = call.forward.scratch.setdefault(mark, {})
        if fresh:
            self._begin()

    def _begin(self) -> None:
        if "mass" not in self.kept:
            if self.start > 0 and self.call.forward.cache is not None:
                raise ConflictError(
                    f"ACT at {self.call.site.name}: got a cache with {self.start} tokens that ACT has not seen, "
                    "expected the statistics of the prompt. Start the request inside the scope."
                )
            heads = len(self.act.heads_at(self.call.site))
            self._grow(torch.zeros(self.call.query.shape[0], heads, 0, device=self.call.query.device))
            return
        self._grow(self.kept["mass"])

    def _grow(self, like: Tensor) -> None:
        """Room for the columns of this call."""
        for name in ("mass", "count"):
            old = self.kept.get(name, like)
            self.kept[name] = torch.nn.functional.pad(old, (0, max(self.stop - old.shape[-1], 0)))

    def of_prompt(self, rows: Int[Tensor, " rows"]) -> Bool[Tensor, "batch heads 1 keys"]:
        """One set of sinks for all rows of this forward."""
        if "sinks" not in self.flags:
            self._add_all()
            found = self._sinks(*self._own())
            if self.call.queries == 1 and "fixed" in self.kept:
                fixed = self.kept["fixed"][:, self.which]
                found[..., : fixed.shape[-1]] = fixed
            else:
                every = torch.zeros(*self.kept["mass"].shape, dtype=torch.bool, device=found.device)
                every[:, self.which] = found
                self.kept["fixed"] = every
            self.flags["sinks"] = found.gather(-1, self.columns.expand(*found.shape[:2], -1))[:, :, None]
        return self.flags["sinks"]

    def _own(self) -> tuple[Tensor, Tensor]:
        """Mass and count of the heads that this call holds, copied."""
        return self.kept["mass"][:, self.which], self.kept["count"][:, self.which]

    def _keep(self, mass: Tensor, count: Tensor) -> None:
        self.kept["mass"][:, self.which] = mass
        self.kept["count"][:, self.which] = count

    def causal(
        self, weights: Float[Tensor, "batch heads rows keys"], rows: Int[Tensor, " rows"]
    ) -> Bool[Tensor, "batch heads rows keys"]:
        """The sinks of each row from the rows up to it."""
        seen = self._seen(rows).to(weights.dtype)
        columns = self.columns[:, :, None].expand(*weights.shape)
        mass, count = (old[:, :, None].expand(-1, -1, rows.numel(), -1).clone() for old in self._own())
        mass.scatter_add_(-1, columns, (weights.float() * (seen > 0)).cumsum(2))
        count.scatter_add_(-1, columns, seen.float().cumsum(2))
        self._keep(mass[:, :, -1], count[:, :, -1])
        return self._sinks(mass, count).gather(-1, columns)

    def _add_all(self) -> None:
        """Adds what the rows of this forward give, block by block."""
        mass, count = self._own()
        columns = self.columns.expand(*mass.shape[:2], -1)
        for start in range(0, self.call.queries, DEFAULT_BLOCK):
            rows = torch.arange(start, min(start + DEFAULT_BLOCK, self.call.queries), device=mass.device)
            given, seen = received_mass(self.call.weights(rows)[:, self.at], self._seen(rows), self._real(rows))
            mass.scatter_add_(-1, columns, given.to(mass.dtype))
            count.scatter_add_(-1, columns, seen.to(count.dtype))
        self._keep(mass, count)

    def _seen(self, rows: Int[Tensor, " rows"]) -> Bool[Tensor, "batch heads rows keys"]:
        """Which keys the rows of this stage's heads can see; nothing for rows of padding."""
        seen = self.call.visible(rows)
        seen = seen[:, self.at] if seen.shape[1] > 1 else seen.expand(-1, len(self.at), -1, -1)
        seen = seen.expand(self.call.query.shape[0], -1, -1, -1)
        real = self._real(rows)
        return seen if real is None else seen & real[:, None, :, None]

    def _real(self, rows: Int[Tensor, " rows"]) -> Bool[Tensor, "batch rows"] | None:
        padded = self.call.padded_rows() if self.call.key_at is None else None
        return None if padded is None else ~padded[:, rows].to(rows.device)

    def _sinks(self, mass: Tensor, count: Tensor) -> Tensor:
        """Sinks over all columns; `mass` and `count` are (batch, heads, keys) or (batch, heads, rows, keys)."""
        act = self.act
        whole = count if count.ndim == 3 else count[:, :, -1]
        allowed = act.allowed(first_seen(whole), count.shape[-1])
        found = find_sinks(
            mass, count, threshold=act.threshold, tau=act.tau, alpha=act.alpha, least_rows=act.least_rows,
            allowed=allowed if count.ndim == 3 else allowed[:, :, None],
        )  # fmt: skip
        return without_first_flagged(found) if act.initial == "first_flagged" else found


def _listed(heads: Any) -> list[Any]:
    return list(heads) if isinstance(heads, Iterable) else [heads]


def _checked_pair(pair: Any) -> Head:
    try:
        layer, head = pair
    except (TypeError, ValueError):
        raise ArgumentError(
            f"heads: got {pair!r} among them, expected (layer, head) pairs. Pass heads=[(5, 3)], say."
        ) from None
    check_whole("layer", layer, 0)
    check_whole("head", head, 0)
    return int(layer), int(head)


def _checked_places(name: str, places: Any) -> Any:
    """Positions as a tuple; a mask, whose shape is that of a forward, as it is."""
    if places is None or isinstance(places, Tensor):
        return places
    if not isinstance(places, Iterable) or isinstance(places, str):
        raise ArgumentError(
            f"{name}: got {places!r}, expected positions counted from a row's first token, or a bool mask (batch, "
            f"tokens). Pass {name}=(5, 9), say."
        )
    found = tuple(places)
    for place in found:
        check_whole(name, place, 0)
    return found


def _known_layers(layers: Iterable[int]) -> Sequence[int]:
    """The layers in order: a range where none is left out, so that an error tells its ends alone."""
    found = sorted(layers)
    every = range(found[0], found[-1] + 1)
    return every if len(every) == len(found) else found


def in_tower(name: str) -> bool:
    """Whether a site belongs to the part of a host that reads pictures or sound."""
    return any(word in name for word in OTHER_TOWERS)


def check_one_stack(names: Sequence[str]) -> None:
    """ArgumentError where (layer, head) would name several places: sites of more than one stack of layers."""
    stacks = list(dict.fromkeys(_stack(name) for name in names))
    if len(stacks) > 1:
        raise ArgumentError(
            f"sites: got self-attention in {' and '.join(stacks)}, each with layers from 0, expected one of them. "
            f"Narrow the scope: headway.use(model, ACT(…), sites=['{stacks[-1]}*'])."
        )


def _stack(name: str) -> str:
    """The module path in front of the layer number."""
    parts = name.split(".")
    return ".".join(parts[: next((i for i, part in enumerate(parts) if part.isdigit()), len(parts))])


def _columns(call: AttentionCall, at: list[int]) -> Int[Tensor, "#batch #heads keys"]:
    """The column in the sequence of each key that the heads at these places read."""
    if call.key_at is None:
        return call.key_positions[None, None]
    if call.key_at.shape[1] == 1:
        return call.key_at
    return call.key_at[:, torch.tensor(at, device=call.key_at.device) // call.groups]


def _marked(places: Places, column: Int[Tensor, "batch heads keys"], name: str) -> Bool[Tensor, "batch heads keys"]:
    """Which columns are named, by their position from the first token or by a mask over columns."""
    if isinstance(places, Tensor):
        if places.ndim != 2 or places.dtype != torch.bool or places.shape[0] not in (1, column.shape[0]):
            raise ArgumentError(
                f"{name}: got {places.dtype} of shape {tuple(places.shape)}, expected positions or a bool mask (batch, "
                f"tokens) for {column.shape[0]} sequences."
            )
        extra = column.shape[-1] - places.shape[1]
        mask = torch.nn.functional.pad(places.to(column.device), (0, max(extra, 0)))[:, : column.shape[-1]]
        return mask[:, None].expand_as(column)
    return torch.isin(column, torch.tensor(list(places), dtype=torch.long, device=column.device))
