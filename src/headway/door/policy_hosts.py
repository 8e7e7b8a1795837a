"""Which hosts a cache policy can serve: decoders whose every layer files its own keys and values once."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import DynamicCache

from headway.door.call import AttentionCall
from headway.door.mixer import Mixer
from headway.errors import ArgumentError, HostError

#: Layers of a host's own cache that hold keys and values and nothing else.
PLAIN_LAYERS = frozenset({"DynamicLayer", "DynamicSlidingWindowLayer"})


def text_config(model: nn.Module) -> Any:
    """The config of a host's language model."""
    config: Any = model.config
    return getattr(config, "text_config", None) or config


def require_plain_decoder(model: nn.Module) -> None:
    """Raises HostError for a host whose cache is more than one list of keys and values per layer: encoder-decoders,
    layers that share their keys, layers with a recurrent state."""
    config, name = text_config(model), type(model).__name__
    if any(isinstance(module, Mixer) for module in model.modules()):
        raise HostError(
            f"{name}: got a model of mixers, which keep states of their own; expected a host whose cache holds keys "
            "and values. The mixer softmax has an option `window`."
        )
    if getattr(model.config, "is_encoder_decoder", False):
        raise HostError(f"{name}: got an encoder-decoder, expected a decoder: it keeps a second cache, of its encoder.")
    if getattr(config, "num_kv_shared_layers", 0):
        raise HostError(f"{name}: got layers that share keys and values, expected each layer to have its own.")
    kinds = {str(kind) for kind in getattr(config, "layer_types", None) or []}
    others = sorted(kind for kind in kinds if "attention" not in kind or "linear" in kind)
    if others:
        raise HostError(f"{name}: got layers of type {', '.join(others)}, expected attention in every layer.")
    own = {type(layer).__name__ for layer in DynamicCache(config=config).layers}
    others = sorted(own - PLAIN_LAYERS)
    if others:
        raise HostError(
            f"{name}: got a host whose cache has layers of its own kind ({', '.join(others)}), expected keys and "
            "values alone."
        )


def require_one_sequence_per_row(position_ids: Any, attention_mask: Any) -> None:
    """Raises ArgumentError for positions that start again within a row: packed sequences, which see each other in a
    policy's cache. The same for a token behind padding that stands behind tokens, as when a batch that was padded on
    the right goes on: policies count a row's last tokens by columns, so pads would take their places."""
    if isinstance(attention_mask, Tensor) and attention_mask.ndim == 2 and not bool(attention_mask.all()):
        real = attention_mask.bool()
        starts = real & ~pad(real, (1, -1))
        again = starts & (starts.cumsum(1) > 1)
        if bool(again.any()):
            row, column = again.nonzero()[0].tolist()
            raise ArgumentError(
                f"attention_mask: got a token at column {column} of row {row} behind padding that stands behind "
                "tokens, expected padding in front of a row's tokens alone, or behind them all. Pad on the left."
            )
    if not isinstance(position_ids, Tensor) or position_ids.ndim != 2 or position_ids.shape[1] < 2:
        return
    back = position_ids.diff(dim=1) < 0
    if isinstance(attention_mask, Tensor):
        # Hosts number padding as they like, so only steps between tokens count.
        real = attention_mask[:, -position_ids.shape[1] :].bool().to(back.device)
        back = back & real[:, 1:] & real[:, :-1]
    if bool(back.any()):
        at = int(back.any(0).nonzero()[0, 0]) + 1
        raise ArgumentError(
            f"position_ids: got positions that start again at column {at}, as in packed sequences, expected one "
            "sequence per row. Give each a row of its own, padded on the left."
        )


def require_plain_positions(call: AttentionCall) -> None:
    """Raises HostError for a call whose logits depend on more than query, key and how far a layer sees, or whose rows
    see the future."""
    if call.bias is not None:
        raise HostError(
            f"{call.site.name}: got a position bias (ALiBi or relative), expected positions that are part of the keys, "
            "such as rotary ones."
        )
    if call.site.reach == "chunked":
        raise HostError(f"{call.site.name}: got a layer that reads in chunks, expected one that reads all or a window.")
    if call.queries == call.keys > 1 and not call.causal:
        raise HostError(
            f"{call.site.name}: got attention that sees the future, as in an encoder, expected causal attention. What "
            "a policy has dropped could not be read from both sides."
        )
