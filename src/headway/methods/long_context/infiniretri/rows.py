"""The question's rows of attention in the layers that score, and nothing more of the forward than they need.

Rows are taken from q and k at the door, `weights(rows)` of shape (heads, rows, keys), whatever kernel the host runs;
no full map is made anywhere. A forward ends behind the last layer that is read: that layer's observer says so by an
exception, which the door passes through and cleans up after as after any other.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from headway.door.attach import Handle
from headway.door.attach import observe as attach
from headway.door.call import AttentionCall, Site
from headway.door.capture import check_head_indices, pick_heads
from headway.door.evaluating import evaluating
from headway.door.stages import Observer
from headway.errors import ArgumentError, HostError, unknown

#: Query rows whose weights are held at once.
BLOCK = 64


class _EnoughError(Exception):
    """Every layer that scores has been read."""


def scoring_sites(
    sites: Iterable[Site], layer: int | Sequence[int], heads: Sequence[tuple[int, int]] | None, reach: int
) -> dict[str, tuple[int, ...] | None]:
    """The sites that score by name, with the heads to read at each (None: all).

    A site can score when it is causal self-attention that sees at least `reach` tokens back. `layer` counts these,
    negative numbers from the end; `heads` names the host's own layers. Raises HostError when no site can score, and
    ArgumentError for a layer or head that is not there or does not see far enough."""
    mine = [site for site in sites if site.kind == "self"]
    far = [site for site in mine if site.reach == "full" or (site.window is not None and site.window >= reach)]
    if not far:
        raise HostError(
            f"model: got {len(mine)} self-attention layers, none of which sees {reach:,} tokens back; expected a layer "
            "with attention over the whole prompt. Use a smaller window and budget, or another model."
        )
    if heads is not None:
        found: dict[str, tuple[int, ...]] = {}
        for number in sorted({pair[0] for pair in heads}):
            site = _own_layer(number, mine, far)
            found[site.name] = tuple(sorted(head for at, head in heads if at == number))
            check_head_indices(found[site.name], site)
        return dict(found)
    wanted = (layer,) if isinstance(layer, int) else tuple(layer)
    for number in wanted:
        if not -len(far) <= number < len(far):
            raise unknown("layer", number, range(-len(far), len(far)))
    return {far[number].name: None for number in wanted}


class HostRows:
    """`rows(ids, first, last)` gives the attention of query tokens first … last − 1, summed over heads and layers.

    A context manager: the observer stays attached between passes. `passes` and `tokens` count the forwards."""

    def __init__(
        self,
        model: nn.Module,
        *,
        layer: int | Sequence[int] = -1,
        heads: Sequence[tuple[int, int]] | None = None,
        reach: int = 0,
        early_stop: bool = True,
        title: str = "InfiniRetri",
    ) -> None:
        self.model = model
        self.observer = RowObserver(layer=layer, heads=heads, reach=reach, early_stop=early_stop, title=title)
        self.handle: Handle = attach(model, self.observer)
        self.passes = 0
        self.tokens = 0
        options = inspect.signature(model.forward).parameters
        self._inputs: dict[str, Any] = {"use_cache": False} if "use_cache" in options else {}
        if "logits_to_keep" in options:
            self._inputs["logits_to_keep"] = 1

    def __enter__(self) -> HostRows:
        self.handle.attach()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.handle.detach()

    @torch.no_grad()
    def __call__(self, ids: Sequence[int], first: int, last: int) -> Float[Tensor, "rows tokens"]:
        self.observer.expect(first, last)
        device = next(self.model.parameters()).device
        with evaluating(self.model), suppress(_EnoughError):
            self.model(input_ids=torch.tensor([list(ids)], device=device), **self._inputs)
        self.passes += 1
        self.tokens += len(ids)
        return self.observer.result()


class RowObserver(Observer):
    """Rows first … last − 1 of one forward, added up over heads at each layer that scores (`by_site`)."""

    reads_weights = True

    def __init__(
        self,
        *,
        layer: int | Sequence[int],
        heads: Sequence[tuple[int, int]] | None,
        reach: int,
        early_stop: bool,
        title: str,
    ) -> None:
        self._where = (layer, heads, reach)
        self._early_stop = early_stop
        self._title = title
        self.sites: dict[str, tuple[int, ...] | None] = {}
        self.expect(0, 0)

    @property
    def title(self) -> str:
        return self._title

    def prepare(self, sites: Sequence[Site]) -> None:
        self.sites = scoring_sites(sites, *self._where)

    def acts_at(self, site: Site) -> bool:
        return site.name in self.sites

    def expect(self, first: int, last: int) -> None:
        """Before a forward: the rows to take from it."""
        self._rows = (first, last)
        self.by_site: dict[str, Tensor] = {}
        self._left = set(self.sites)

    def observe(self, call: AttentionCall, output: Tensor, lse: Tensor | None = None) -> None:
        first, last = self._rows
        if last == first or call.site.name not in self._left:
            return
        picked = pick_heads(call, self.sites[call.site.name])
        blocks = []
        for start in range(first, last, BLOCK):
            rows = torch.arange(start, min(start + BLOCK, last), device=call.query.device)
            blocks.append(picked.weights(rows)[0].sum(0).cpu())
        self.by_site[call.site.name] = torch.cat(blocks)
        self._left.discard(call.site.name)
        if self._early_stop and not self._left:
            raise _EnoughError

    def result(self) -> Tensor:
        """Raises HostError when a layer that scores did not run in the last forward."""
        if self._left or not self.by_site:
            raise HostError(
                f"model: got a forward in which {', '.join(sorted(self._left)) or 'no layer'} did not attend, expected "
                "every layer that scores to run."
            )
        return torch.stack(list(self.by_site.values())).sum(0)


def _own_layer(number: int, mine: Sequence[Site], far: Sequence[Site]) -> Site:
    named = [site for site in mine if site.layer == number]
    if not named:
        raise unknown("heads", number, sorted({site.layer for site in mine}), fix="Pairs are (layer, head).")
    if named[0] not in far:
        raise ArgumentError(
            f"heads: got layer {number}, which slides over {named[0].window} tokens, expected one that sees the whole "
            f"prompt ({', '.join(str(site.layer) for site in far)})."
        )
    return named[0]
