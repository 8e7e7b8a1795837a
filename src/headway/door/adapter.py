"""The transformers adapter: makes an `AttentionCall` of what a host hands to its attention function.

A host reaches its attention function through `AttentionInterface`, by the name in its config. While a door is open,
that name is a `DoorName`: it equals the host's own name wherever the host compares it, and finds the door's function
where the host looks a function up. So the host's own branches, masks and casts stay what they were, and leaving puts
the name back.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from headway.door.call import AttentionCall, Forward, Site
from headway.errors import InterceptionError

PREFIX = "headway:"
#: An additive mask below this share of the lowest number of its type hides a key; hosts write the lowest number itself.
HIDDEN_SHARE = 0.25

#: Keywords that only describe the call to other kernels, or that `normal_form` reads.
KNOWN_KEYWORDS = frozenset(
    {
        "scaling", "scale", "softmax_scale", "is_causal", "softcap", "s_aux", "sliding_window", "position_bias",
        "dropout", "position_ids", "cache_position", "output_attentions", "output_hidden_states", "use_cache",
        "weighing", "native", "front", "piece", "return_dict", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q",
        "max_length_k", "num_items_in_batch",
    }
)  # fmt: skip

AttentionFunction = Callable[..., tuple[Tensor, Tensor | None]]


class DoorName(str):
    """The name of an attention implementation while a door is open."""

    __slots__ = ()

    def __hash__(self) -> int:
        return hash(PREFIX + str.__str__(self))

    def __eq__(self, other: object) -> bool:
        return str.__eq__(self, other) is True or other == PREFIX + str.__str__(self)

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __reduce__(self) -> tuple[Any, ...]:
        return str, (str.__str__(self),)


def attention_function(module: nn.Module) -> AttentionFunction | None:
    """The `forward` of a module's class without its decorators."""
    forward = type(module).__dict__.get("forward") or getattr(type(module), "forward", None)
    return None if forward is None else inspect.unwrap(forward)


def uses_registry(module: nn.Module) -> bool:
    """Whether a module's forward asks the attention registry for its function."""
    forward = attention_function(module)
    code = getattr(forward, "__code__", None)
    return code is not None and bool({"ALL_ATTENTION_FUNCTIONS", "get_interface"} & set(code.co_names))


def native_function(module: nn.Module, name: str) -> AttentionFunction:
    """The attention function that the host itself would call for an implementation name."""
    forward = attention_function(module)
    names = getattr(getattr(forward, "__code__", None), "co_names", ())
    spaces = [getattr(forward, "__globals__", {}), vars(sys.modules[type(module).__module__])]
    for space in spaces:
        registry = space.get("ALL_ATTENTION_FUNCTIONS")
        if registry is not None and name in registry:
            return registry[name]
        for candidate in (*(n for n in names if n.startswith("eager")), "eager_attention_forward"):
            if name == "eager" and callable(space.get(candidate)):
                return space[candidate]
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if name in ALL_ATTENTION_FUNCTIONS:
        return ALL_ATTENTION_FUNCTIONS[name]
    raise InterceptionError(
        f"attention implementation: got {name!r} at {type(module).__name__}, whose own function cannot be found. Load "
        "the model with attn_implementation='sdpa'."
    )


def register(name: str, function: AttentionFunction) -> None:
    """Makes `function` the one that a `DoorName(name)` finds, with the host's own masks."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
    from transformers.modeling_utils import AttentionInterface

    AttentionInterface.register(PREFIX + name, function)
    if name in ALL_MASK_ATTENTION_FUNCTIONS:
        AttentionMaskInterface.register(PREFIX + name, ALL_MASK_ATTENTION_FUNCTIONS[name])


def configs(model: nn.Module) -> Iterator[Any]:
    """Every distinct config object that a submodule may read its implementation name from."""
    seen: set[int] = set()
    for module in model.modules():
        config = getattr(module, "config", None)
        if config is None or id(config) in seen or not hasattr(config, "_attn_implementation_internal"):
            continue
        seen.add(id(config))
        yield config


def normal_form(
    site: Site,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    implementation: str,
    forward: Forward,
    hidden: Tensor | None = None,
    **keywords: Any,
) -> AttentionCall:
    """The `AttentionCall` for what a host handed to its attention function."""
    if attention_mask is not None and not isinstance(attention_mask, Tensor):
        raise InterceptionError(
            f"attention_mask at {site.name}: got {type(attention_mask).__name__}, expected a tensor or None. Load the "
            "model with attn_implementation='sdpa'."
        )
    causal = False
    if attention_mask is None and implementation != "eager":
        asked = keywords.get("is_causal")
        causal = bool(getattr(module, "is_causal", True) if asked is None else asked) and query.shape[2] > 1
        if causal and key.shape[2] > query.shape[2]:
            key, value = key[:, :, : query.shape[2]], value[:, :, : query.shape[2]]
    mask, bias = _split_mask(attention_mask, query, key, forward)
    if mask is not None and not causal and query.shape[2] == key.shape[2] > 1:
        causal = _hides_future(mask, forward)
    position_bias = keywords.get("position_bias")
    if position_bias is not None:
        position_bias = position_bias[..., : key.shape[2]]
        bias = position_bias if bias is None else bias + position_bias
    scale = next((keywords[k] for k in ("scaling", "scale", "softmax_scale") if keywords.get(k) is not None), None)
    if scale is None:
        scale = query.shape[-1] ** -0.5 if implementation != "eager" else getattr(module, "scaling", None)
    return AttentionCall(
        site=site,
        query=query,
        key=key,
        value=value,
        scale=float(scale) if scale is not None else query.shape[-1] ** -0.5,
        causal=causal,
        mask=mask,
        bias=bias,
        softcap=keywords.get("softcap"),
        sinks=keywords.get("s_aux"),
        dropout=float(keywords.get("dropout") or 0.0),
        hidden=hidden,
        module=module,
        front=keywords.get("front") or 0,
        piece=keywords.get("piece"),
        weighing=keywords.get("weighing"),
        forward=forward,
    )


def _split_mask(
    attention_mask: Tensor | None, query: Tensor, key: Tensor, forward: Forward
) -> tuple[Tensor | None, Tensor | None]:
    """A host's mask as (visible, bias); worked out once per forward for a mask that layers share."""
    if attention_mask is None:
        return None, None
    keys = key.shape[2]
    token = ("mask", id(attention_mask), keys)
    if token not in forward.scratch:
        forward.scratch[token] = (attention_mask, *_split(attention_mask, keys))
    return forward.scratch[token][1:]


def _split(attention_mask: Tensor, keys: int) -> tuple[Tensor | None, Tensor | None]:
    mask = attention_mask
    if mask.ndim == 2:
        mask = mask[:, None, None].bool()
    elif mask.ndim == 3:
        mask = mask[:, None]
    mask = mask[..., :keys]
    if mask.dtype == torch.bool:
        return mask, None
    if not mask.is_floating_point():
        return mask.bool(), None
    visible = mask > torch.finfo(mask.dtype).min * HIDDEN_SHARE
    bias = mask.masked_fill(~visible, 0.0)
    return (None if bool(visible.all()) else visible), (bias if bool(bias.any()) else None)


def _hides_future(mask: Tensor, forward: Forward) -> bool:
    """Whether no row of a square mask sees a later key; worked out once per forward and mask."""
    token = ("causal", id(mask))
    if token not in forward.scratch:
        size = mask.shape[-1]
        future = torch.ones(size, size, dtype=torch.bool, device=mask.device).triu(1)
        forward.scratch[token] = mask.shape[2] == size and not bool((mask & future).any())
    return forward.scratch[token]


def site_of(module: nn.Module, name: str, order: int, query: Tensor, key: Tensor, keywords: dict[str, Any]) -> Site:
    """What can be said of an attention module from its attributes and the tensors of a call."""
    index = getattr(module, "layer_idx", None)
    window = keywords.get("sliding_window") or getattr(module, "sliding_window", None)
    window = window if isinstance(window, int) and not isinstance(window, bool) else None
    reach = "sliding" if window else "full"
    kinds = getattr(getattr(module, "config", None), "layer_types", None)
    if isinstance(kinds, list | tuple) and isinstance(index, int):
        with suppress(IndexError):
            reach = "chunked" if "chunk" in str(kinds[index]) else reach
    return Site(
        name=name,
        layer=index if isinstance(index, int) else order,
        reach=reach,
        heads=query.shape[1],
        kv_heads=key.shape[1],
        head_dim=getattr(module, "text_dim", None) or query.shape[3],
        window=window,
        module_class=type(module).__name__,
    )
