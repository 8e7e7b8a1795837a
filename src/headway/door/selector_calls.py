"""Calls that a selector cannot choose keys of, refused by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from headway.door.call import AttentionCall
from headway.errors import ArgumentError, ConflictError

#: What turns assisted decoding on, beside an assistant model: settings of `generate`.
DRAFT_SETTINGS = ("prompt_lookup_num_tokens", "use_mtp")


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


def refuse_drafts(title: str, model: nn.Module, generate: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The host's `generate` for a selector that looks ahead and a cache policy that evicts by forwards; raises
    ConflictError for assisted decoding.

    Drafted tokens come in one forward with the prompt and with tokens before them, so that a stage whose choice depends
    on what comes later would read or keep other keys than without them, and the text would be another one."""
    config = kwargs.get("generation_config") or (args[1] if len(args) > 1 else None) or model.generation_config
    drafts = kwargs.get("assistant_model") is not None
    for name in DRAFT_SETTINGS:
        drafts |= bool(kwargs.get(name, getattr(config, name, None)))
    if drafts:
        raise ConflictError(
            f"generate: got assisted decoding beside {title}, whose choice of keys depends on the tokens that come "
            "later in a forward; drafts would change the text. Generate without assisted decoding."
        )
    return generate(*args, **kwargs)
