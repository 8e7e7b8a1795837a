"""Parts of an attention operation: one sequence, one head, the first rows."""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Int
from torch import Tensor

from headway.door.call import AttentionCall
from headway.kernels.weighing import part_of


def narrow(call: AttentionCall, index: int, head: int | None = None) -> AttentionCall:
    """The part of a call that belongs to one sequence, and to one of its heads where one is named."""

    def part(x: Tensor | None, at: int | None) -> Tensor | None:
        if x is None:
            return None
        x = x[index : index + 1] if x.shape[0] > 1 else x
        return x if at is None or x.shape[1] == 1 else x[:, at : at + 1]

    kv_head = None if head is None else head // call.groups
    forward = call.forward
    if head is None and forward.padding is not None:
        forward = replace(forward, padding=part(forward.padding, None), positions=part(forward.positions, None))
    return call.replace(
        query=part(call.query, head),
        key=part(call.key, kv_head),
        value=part(call.value, kv_head),
        mask=part(call.mask, head),
        bias=part(call.bias, head),
        sinks=call.sinks if call.sinks is None or head is None else call.sinks[head : head + 1],
        weighing=part_of(
            call.weighing, None if head is None else [head], call.heads, entry=index, batch=call.query.shape[0]
        ),
        forward=forward,
    )


def up_to(call: AttentionCall, stop: int) -> AttentionCall:
    """The first `stop` query rows of a causal call with the keys that they can see; other calls as they are."""
    if not call.causal or stop == call.queries:
        return call
    keys = stop + call.offset

    def part(x: Tensor | None) -> Tensor | None:
        return None if x is None else (x[:, :, :stop] if x.shape[2] > 1 else x)[..., :keys]

    return call.replace(
        query=call.query[:, :, :stop],
        key=call.key[:, :, :keys],
        value=call.value[:, :, :keys],
        mask=part(call.mask),
        bias=part(call.bias),
    )


def positions_of(call: AttentionCall) -> tuple[Int[Tensor, " queries"], Int[Tensor, " keys"]]:
    """Positions of queries and keys; keys before this call are taken to precede it without a gap."""
    given = call.forward.positions
    if given is None or given.shape[-1] != call.queries:
        every = torch.arange(call.keys, device=call.query.device)
        return every[call.offset :], every
    of_queries = given.reshape(-1, call.queries)[0].to(call.query.device)
    if call.queries == call.keys:
        return of_queries, of_queries
    before = of_queries[0] - torch.arange(call.offset, 0, -1, device=call.query.device)
    return of_queries, torch.cat([before, of_queries])
