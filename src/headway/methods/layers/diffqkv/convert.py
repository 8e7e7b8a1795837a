"""A grouped-query checkpoint as DiffQKV: key heads (and value heads, if asked) become the means of neighbouring heads.

    W_K' [head h] = mean of W_K [heads h·g … h·g + g − 1] ,   g = heads before / heads after

The forward of the host stays its own: its projections get new sizes, and its attention function becomes one that takes
unequal heads. Rotation and the cache work as before, as both take whatever head count the projections give. A mean of
heads is where further training starts, as in the conversion to grouped queries (arXiv 2305.13245); it is no model that
answers as before, and how far it is off is for the caller to measure.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from headway.door.adapter import uses_registry
from headway.door.rotary import host_frequencies
from headway.errors import ArgumentError, HostError
from headway.kernels.unequal import check_head_counts, safe_softmax, unequal_attention
from headway.methods.layers.diffqkv.heads import HeadLayout
from headway.methods.layers.diffqkv.merge import merge_keys, merge_values, second_moments
from headway.methods.layers.diffqkv.query import AugmentedQuery
from headway.methods.layers.diffqkv.static import refuse_equal_heads

#: The name of the attention function for unequal heads in transformers' registry.
IMPLEMENTATION = "headway_diffqkv"
#: Attention keywords of hosts that this function cannot honour.
UNSUPPORTED = ("softcap", "s_aux", "position_bias")


def convert(
    model: nn.Module,
    *,
    key_heads: int | None = None,
    value_heads: int | None = None,
    aug_dim: int = 0,
    layers: Sequence[int] | None = None,
    calibration: Int[Tensor, "rows tokens"] | None = None,
) -> Any:
    """A copy of a transformers model whose self-attention has `key_heads` key and `value_heads` value heads.

    None keeps a count. `aug_dim` adds an augmented query with a residual that starts at zero, so that it changes
    nothing before training. `layers` names those to convert, all by default. With `calibration`, token ids of some
    text, heads are merged to serve its hidden states best (see `merge`) in place of taking means, which is closer to
    what was there. The copy generates, passes the door and is saved by `save_pretrained`; `load_converted` reads it
    back. Raises HostError for hosts whose attention has other projections, and ArgumentError for counts that do not
    divide."""
    converted: Any = copy.deepcopy(model)
    found = list(attention_modules(converted))
    if not found:
        raise HostError(
            f"model: got {type(model).__name__}, expected a transformers model whose attention has q_proj, k_proj, "
            "v_proj and o_proj and asks the attention registry, as Llama, Mistral and Qwen do."
        )
    known = [module.layer_idx for module in found]
    chosen = known if layers is None else list(layers)
    for layer in chosen:
        if layer not in known:
            raise ArgumentError(f"layers: got {layer}, expected some of {known}.")
    changing = [module for module in found if module.layer_idx in chosen]
    moments: dict[int, Tensor] = {}
    if calibration is not None:
        _require_half_pairs(converted)
        moments = second_moments(converted, changing, calibration)
    for module in changing:
        _convert_module(module, key_heads, value_heads, aug_dim, moments.get(module.layer_idx))
    _use_unequal_attention(converted)
    converted.config.diffqkv = {
        "key_heads": key_heads,
        "value_heads": value_heads,
        "aug_dim": aug_dim,
        "layers": None if layers is None else chosen,
    }
    return converted


def load_converted(folder: str | Path, *, dtype: torch.dtype = torch.float32) -> Any:
    """A converted model from where its `save_pretrained` wrote it."""
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise HostError(f"folder: got {str(folder)!r}, which has no config.json. Save a converted model there first.")
    config = AutoConfig.from_pretrained(folder)
    how = getattr(config, "diffqkv", None)
    if how is None:
        raise HostError(f"folder: got {str(folder)!r}, which holds no converted model. Use headway.load.")
    converted = convert(AutoModelForCausalLM.from_config(config, dtype=dtype), **how)
    weights: dict[str, Tensor] = {}
    index = folder / "model.safetensors.index.json"
    names = {"model.safetensors"}
    if index.is_file():
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    for name in sorted(names):
        weights |= load_file(folder / name)
    missing, extra = converted.load_state_dict(weights, strict=False)
    tied = set(getattr(converted, "_tied_weights_keys", None) or ())
    if extra or set(missing) - tied:
        raise HostError(
            f"folder: got other weights than the config asks for: {sorted((set(missing) - tied) | set(extra))}."
        )
    converted.tie_weights()
    return converted.eval()


def pool_heads(weight: Float[Tensor, rows * width], dim: int, into: int) -> Float[Tensor, fewer * width]:
    """The rows of `into` heads of size `dim`, each the mean of as many neighbouring heads of the weight (or bias)."""
    heads = weight.shape[0] // dim
    if weight.shape[0] % dim or into < 1 or heads % into:
        raise ArgumentError(
            f"heads: got {into} for a weight of {weight.shape[0]} rows in heads of {dim}, expected a divisor of "
            f"{heads}. A mean needs as many heads in each group."
        )
    return weight.unflatten(0, (into, heads // into, dim)).mean(1).flatten(0, 1)


def attention_modules(model: nn.Module) -> Iterator[Any]:
    """The self-attention modules that can be converted."""
    for module in model.modules():
        projections = [getattr(module, name, None) for name in ("q_proj", "k_proj", "v_proj", "o_proj")]
        alike = all(isinstance(p, nn.Linear) for p in projections) and hasattr(module, "layer_idx")
        if alike and uses_registry(module) and isinstance(getattr(module, "head_dim", None), int):
            yield module


def layout_of(module: Any) -> HeadLayout:
    """Head counts and sizes of an attention module of a host, before or after conversion."""
    dim = module.head_dim
    query_heads, rest = divmod(module.o_proj.in_features, dim)
    given = module.q_proj[0] if isinstance(module.q_proj, nn.Sequential) else module.q_proj
    if rest or given.out_features != query_heads * dim:
        raise HostError(
            f"q_proj of {type(module).__name__}: got {given.out_features} outputs, expected "
            f"{module.o_proj.in_features}, the inputs of o_proj. Its queries carry more than queries."
        )
    return HeadLayout(
        query_heads=query_heads,
        key_heads=module.k_proj.out_features // dim,
        value_heads=module.v_proj.out_features // dim,
        query_dim=dim,
        key_dim=dim,
        value_dim=dim,
    )


def diffqkv_attention(
    module: nn.Module,
    query: Float[Tensor, "batch heads queries dim"],
    key: Float[Tensor, "batch key_heads keys dim"],
    value: Float[Tensor, "batch value_heads keys dim"],
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **keywords: Any,
) -> tuple[Float[Tensor, "batch queries heads dim"], Tensor | None]:
    """An attention function as hosts call it, for unequal heads. Weights (batch, heads, queries, keys) come with
    `output_attentions=True`."""
    for name in UNSUPPORTED:
        if keywords.get(name) is not None:
            raise ArgumentError(
                f"{name} at {type(module).__name__}: got one, expected none: attention with unequal heads supports "
                "masks, sliding windows and a scale. Convert another host."
            )
    if dropout:
        raise ArgumentError(f"dropout: got {dropout}, expected 0. Set attention_dropout=0 in the config of the host.")
    if attention_mask is not None and attention_mask.dtype != torch.bool:
        raise ArgumentError(f"attention_mask: got {attention_mask.dtype}, expected bool, True where a key is visible.")
    asked = getattr(module, "is_causal", True) if is_causal is None else is_causal
    causal = bool(asked) and attention_mask is None and query.shape[2] > 1
    if causal and key.shape[2] > query.shape[2]:
        # An empty static cache: only as many of its slots are filled as there are queries.
        key, value = key[:, :, : query.shape[2]], value[:, :, : query.shape[2]]
    visible = None if attention_mask is None else attention_mask[..., : key.shape[2]]
    output = unequal_attention(query, key, value, scale=scaling, causal=causal, visible=visible)
    weights = None
    if keywords.get("output_attentions"):
        weights = _weights(query, key, scaling, causal, visible).to(query.dtype)
    return output.transpose(1, 2).contiguous(), weights


def _weights(query: Tensor, key: Tensor, scale: float | None, causal: bool, visible: Tensor | None) -> Tensor:
    from headway.kernels.dense import grouped_scores

    seen = visible
    if causal:
        seen = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()[None, None]
    return safe_softmax(grouped_scores(query, key) * (query.shape[3] ** -0.5 if scale is None else scale), seen)


@torch.no_grad()
def _convert_module(
    module: Any, key_heads: int | None, value_heads: int | None, aug_dim: int, moment: Tensor | None
) -> None:
    layout = layout_of(module)
    keys = layout.key_heads if key_heads is None else key_heads
    values = layout.value_heads if value_heads is None else value_heads
    check_head_counts(layout.query_heads, keys, values)
    if keys != layout.key_heads:
        pooled = _pooled(module.k_proj, layout.key_dim, keys)
        module.k_proj = pooled if moment is None else merge_keys(module, keys, moment)
    if values != layout.value_heads:
        pooled = _pooled(module.v_proj, layout.value_dim, values)
        module.v_proj = pooled if moment is None else merge_values(module, values, moment)
    module.num_key_value_groups = layout.query_heads // keys
    module.num_key_heads, module.num_value_heads = keys, values
    if aug_dim:
        size = layout.query_heads * layout.query_dim
        augment = AugmentedQuery(size, aug_dim, residual=True).to(module.q_proj.weight)
        augment.start_as_identity()
        module.q_proj = nn.Sequential(module.q_proj, augment)
    if keys != values:
        module.register_forward_pre_hook(_refuse_backends, with_kwargs=True)


def _require_half_pairs(model: Any) -> None:
    """Raises HostError where rotation does not turn dimension m with m + dim/2 for all of a head."""
    frequencies, layout = host_frequencies(model)
    dims = {module.head_dim for module in attention_modules(model)}
    if layout != "half" or frequencies is None or {2 * frequencies.numel()} != dims:
        turned = 0 if frequencies is None else 2 * frequencies.numel()
        raise HostError(
            f"calibration: got a host with {layout} rotation of {turned} of {sorted(dims)} dimensions, expected whole "
            "heads in halves. Leave calibration out."
        )


def _refuse_backends(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raises, naming what works, for attention functions and caches that want as many key as value heads."""
    name = module.config._attn_implementation
    if name != IMPLEMENTATION:
        raise ArgumentError(
            f"attn_implementation: got {str(name)!r}, which wants as many key as value heads, for a layer with "
            f"{module.num_key_heads} and {module.num_value_heads}. Supported is {IMPLEMENTATION!r}."
        )
    refuse_equal_heads(module, args, kwargs)


def _pooled(projection: nn.Linear, dim: int, into: int) -> nn.Linear:
    weight = pool_heads(projection.weight, dim, into)
    pooled = nn.Linear(
        projection.in_features,
        weight.shape[0],
        bias=projection.bias is not None,
        device=weight.device,
        dtype=weight.dtype,
    )
    pooled.weight.copy_(weight)
    if projection.bias is not None:
        pooled.bias.copy_(pool_heads(projection.bias, dim, into))
    pooled.requires_grad_(projection.weight.requires_grad)
    return pooled


def _use_unequal_attention(model: Any) -> None:
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

    if IMPLEMENTATION not in ALL_ATTENTION_FUNCTIONS:
        AttentionInterface.register(IMPLEMENTATION, diffqkv_attention)
        AttentionMaskInterface.register(IMPLEMENTATION, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    model.set_attn_implementation(IMPLEMENTATION)
