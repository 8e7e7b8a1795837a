"""Calls that a selector cannot choose keys of, refused by name."""

from __future__ import annotations

from headway.door.call import AttentionCall
from headway.errors import ArgumentError


def require_one_way(call: AttentionCall, title: str) -> None:
    """Raises ArgumentError for a prompt whose rows see later keys, as those of an encoder do."""
    if call.queries == call.keys > 1 and not call.causal:
        raise ArgumentError(
            f"{title} at {call.site.name}: got attention that looks both ways, expected a causal host. Name the sites "
            "of the decoder with sites=."
        )


def require_no_bias(call: AttentionCall, title: str) -> None:
    """Raises ArgumentError for a host whose logits are more than what pooled queries and keys can estimate."""
    if call.bias is not None:
        raise ArgumentError(
            f"{title} at {call.site.name}: got a host that adds a position bias to its logits, expected one without: "
            "pooled queries and keys cannot see it. Choose a host with rotary or learned positions."
        )
