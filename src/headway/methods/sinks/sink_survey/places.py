"""Which keys of a call are meant by positions that a user counts from the first real token of each sequence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from headway.door.caches import first_tokens
from headway.door.call import AttentionCall, Site
from headway.door.capture import check_head_indices
from headway.errors import ArgumentError, HostError, unknown

Head = tuple[int, int]
#: Positions from the first real token, or a mask (batch, tokens) over all columns of the sequence.
Places = Sequence[int] | Bool[Tensor, "#batch tokens"]
#: What hosts call the projection of an output gate, in their attention module.
GATE_PROJECTIONS = ("gate_proj", "g_proj", "q_gate_proj")


def first_of(call: AttentionCall) -> Int[Tensor, " batch"]:
    """The position of each sequence's first real token."""
    padding = call.forward.padding
    if padding is None or padding.shape[0] != call.query.shape[0]:
        return torch.zeros(call.query.shape[0], dtype=torch.long, device=call.query.device)
    return first_tokens(padding).to(call.query.device)


def sink_free(call: AttentionCall) -> str | None:
    """What a host has in place of an attention sink, so that its first tokens are no more than others; None for a host
    that has nothing. A gate on the output of attention is found by its projection: one of its own, or a query
    projection of twice the size."""
    if call.sinks is not None:
        return "learned sinks"
    module = call.module
    if module is None:
        return None
    query = getattr(module, "q_proj", None)
    doubled = isinstance(query, nn.Linear) and query.out_features == 2 * call.site.heads * call.site.head_dim
    own = any(isinstance(getattr(module, name, None), nn.Module) for name in GATE_PROJECTIONS)
    return "a gate on the output of attention" if doubled or own else None


def marked_keys(call: AttentionCall, places: Places, name: str) -> Bool[Tensor, "batch 1 1 keys"]:
    """Which keys of the call are named."""
    columns = call.key_positions
    if isinstance(places, Tensor):
        if places.ndim != 2 or places.dtype != torch.bool or places.shape[0] not in (1, call.query.shape[0]):
            raise ArgumentError(
                f"{name}: got {places.dtype} of shape {tuple(places.shape)}, expected positions or a bool mask (batch, "
                f"tokens) for {call.query.shape[0]} sequences."
            )
        inside = columns < places.shape[1]
        picked = places.to(columns.device)[:, columns.clamp(max=places.shape[1] - 1)] & inside
        return picked.expand(call.query.shape[0], -1)[:, None, None]
    named = torch.tensor(list(places), dtype=torch.long, device=columns.device)
    return torch.isin(columns - first_of(call)[:, None], named)[:, None, None]


def require_softmax(call: AttentionCall, title: str) -> None:
    """Raises HostError for a call whose weights are no softmax."""
    if call.weighing is not None:
        raise HostError(
            f"{title} at {call.site.name}: got weights by {call.weighing.name}, expected a softmax: the rule moves "
            "shares of one. Name other sites, or use a host with softmax attention."
        )


def heads_in(call: AttentionCall, heads: Sequence[int]) -> tuple[list[int], list[int]]:
    """Where a site's heads stand among those of a call that may hold some of them, and which of the heads they are."""
    if call.of_heads is None:
        return list(heads), list(range(len(heads)))
    order = {head: place for place, head in enumerate(call.of_heads.tolist())}
    here = [which for which, head in enumerate(heads) if head in order]
    return [order[heads[which]] for which in here], here


def check_heads_of(pairs: Sequence[Head], sites: Sequence[Site]) -> None:
    """Raises ArgumentError for a (layer, head) pair that no self-attention site has."""
    known = {site.layer: site for site in sites if site.kind != "cross"}
    for layer, head in pairs:
        if sites and layer not in known:
            raise unknown("layer", layer, sorted(known))
        if sites:
            check_head_indices([head], known[layer])


def check_layers_of(layers: Mapping[int, object] | Sequence[int], sites: Sequence[Site]) -> None:
    """Raises ArgumentError for a layer that no site has."""
    known = sorted({site.layer for site in sites})
    for layer in layers:
        if sites and layer not in known:
            raise unknown("layer", layer, known)
