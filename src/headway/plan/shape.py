"""The sizes of a model that a cost depends on, taken from its config without its weights.

The model is built on PyTorch's `meta` device, which holds shapes and no numbers, and reads three tokens there: so
weights are counted as they are, and the keys and values that each layer stores have the shapes that the host itself
gives them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from headway.errors import ArgumentError, HostError, unknown

FOLDER = Path(__file__).parent / "shapes"
#: Config fields that say how many experts a layer has, and how many of them a token takes.
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
TAKEN = ("num_experts_per_tok", "num_experts_per_token", "moe_k", "top_k_experts", "moe_topk")


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One attention layer: what it stores per token, and how far it sees (None: everything). A layer that `borrows`
    reads the keys of an earlier layer and stores none."""

    heads: int
    kv_heads: int
    key_dim: int
    value_dim: int
    window: int | None = None
    borrows: bool = False

    @property
    def entry(self) -> int:
        """Numbers of one stored entry: a key and a value of one KV head."""
        return self.key_dim + self.value_dim

    def pairs(self, tokens: int) -> int:
        """Query-key pairs of one head that a causal prompt sees."""
        return visible_pairs(tokens, self.window)

    def seen(self, tokens: int) -> int:
        """Keys that one query sees after `tokens` of context, its own key included."""
        return min(tokens + 1, self.window or tokens + 1)

    def kept(self, tokens: int) -> int:
        """Tokens that the host's own cache holds after `tokens`: a sliding layer keeps one less than its window."""
        return tokens if self.window is None else min(tokens, self.window - 1)


def visible_pairs(tokens: int, window: int | None) -> int:
    """Σ_i min(i, window) for i = 1 … tokens."""
    reach = tokens if window is None else min(window, tokens)
    return reach * (reach + 1) // 2 + (tokens - reach) * reach


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """A model's sizes. Weights are counted in numbers: `parameters` all of them, `dense_weights` those that every token
    multiplies, `expert_weights` those of all experts together, `output_weights` those of the output layer."""

    name: str
    architecture: str
    layers: tuple[Layer, ...]
    hidden: int
    parameters: int
    dense_weights: int
    expert_weights: int
    output_weights: int
    experts: int = 1
    experts_per_token: int = 1
    positions: int | None = None

    @property
    def active_weights(self) -> float:
        """Weights that one token multiplies, the output layer left out."""
        return self.dense_weights + self.expert_weights * self.experts_per_token / self.experts

    def weights_read(self, rows: int) -> float:
        """Weights that a step over `rows` tokens has to read: each expert with the chance that some token takes it."""
        missed = (1 - self.experts_per_token / self.experts) ** rows
        return self.dense_weights + self.output_weights + self.expert_weights * (1 - missed)


def shape_names() -> list[str]:
    """The models whose published sizes come with Headway."""
    return sorted(path.stem for path in FOLDER.glob("*.json"))


def shape_of(config: Any, name: str = "", *, model: nn.Module | None = None) -> ModelShape:
    """The sizes of a causal language model, from its transformers config. No weights are made or read. `model` is its
    `meta_model` where there is one already.

    Raises HostError for a config that no causal language model has, or one whose layers keep something else than keys
    and values."""
    return _measure(config, meta_model(config) if model is None else model, name)


def meta_model(config: Any) -> nn.Module:
    """The model of a config with shapes and no numbers."""
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise HostError(
            f"model: got a config of {getattr(config, 'model_type', type(config).__name__)!r} that builds no causal "
            f"language model ({type(error).__name__}: {reason}); expected one such as llama's. Plan a text decoder."
        ) from error
    return model.eval()


def config_of(name: str) -> Any:
    """The config behind a name: a built-in shape, a folder or file with a config, or a hub id.

    Raises ArgumentError or HostError, naming what is missing."""
    built_in = FOLDER / f"{name}.json"
    path = Path(name).expanduser()
    if "/" not in name and built_in.is_file():
        return config_from(json.loads(built_in.read_text(encoding="utf-8")), name)
    if path.is_dir():
        path = path / "config.json"
        if not path.is_file():
            raise HostError(f"model {name!r}: is a folder without config.json; give one written by save_pretrained")
    if path.is_file():
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise HostError(f"model {name!r}: {path.name} is not JSON ({error}); give a transformers config") from error
        return config_from(values, name)
    if name.startswith((".", "/", "~")):
        raise HostError(f"model {name!r}: no such folder or file; give one with a config.json, or a built-in name")
    if "/" in name:
        return _hub_config(name)
    raise unknown("model", name, shape_names(), fix="Or give a folder, a hub id owner/name, or sizes such as --layers.")


def config_from(values: Any, name: str) -> Any:
    """A transformers config from the fields of its JSON."""
    from transformers import CONFIG_MAPPING

    kind = values.get("model_type") if isinstance(values, Mapping) else None
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        raise HostError(
            f"model {name!r}: got model_type {kind!r}, expected one that transformers knows, such as 'llama'. Add it "
            "to the config."
        )
    try:
        return CONFIG_MAPPING[kind](**{k: v for k, v in values.items() if k != "model_type"})
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise HostError(f"model {name!r}: {kind} does not take this config ({reason}); correct its fields") from error


def config_from_sizes(
    *,
    layers: int | None,
    hidden: int | None,
    heads: int | None,
    kv_heads: int | None = None,
    head_dim: int | None = None,
    intermediate: int | None = None,
    vocabulary: int | None = None,
) -> Any:
    """A Llama-like config of the sizes given: gated MLP, no biases, separate output layer.

    `kv_heads` defaults to `heads`, `head_dim` to hidden / heads, `intermediate` to 8/3 of hidden in multiples of 256,
    `vocabulary` to 128,256."""
    from transformers import LlamaConfig

    needed = {"layers": layers, "hidden": hidden, "heads": heads}
    absent = [f"--{name}" for name, value in needed.items() if value is None]
    if layers is None or hidden is None or heads is None:
        raise ArgumentError(f"sizes: got no {', '.join(absent)}; expected --layers, --hidden and --heads together.")
    optional = {
        "kv_heads": kv_heads, "head_dim": head_dim, "intermediate": intermediate, "vocabulary": vocabulary,
    }  # fmt: skip
    for name, value in (needed | optional).items():
        if value is not None and value < 1:
            raise ArgumentError(f"{name}: got {value}, expected at least 1.")
    groups = kv_heads or heads
    if heads % groups:
        raise ArgumentError(f"kv_heads: got {groups} for {heads} heads, expected a divisor of {heads}.")
    if head_dim is None and hidden % heads:
        raise ArgumentError(f"hidden: got {hidden} for {heads} heads, expected a multiple, or give --head-dim.")
    return LlamaConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        head_dim=head_dim or hidden // heads,
        intermediate_size=intermediate or -(-8 * hidden // 3 // 256) * 256,
        vocab_size=vocabulary or 128_256,
        max_position_embeddings=1 << 30,
        tie_word_embeddings=False,
    )


def _hub_config(name: str) -> Any:
    from transformers import AutoConfig

    from headway.hosts import hub

    offline = not hub.reachable(hub.hub_address())
    try:
        return AutoConfig.from_pretrained(name, local_files_only=offline)
    except Exception as error:
        raise hub.explain(error, name, offline=offline, local=False) from error


def _measure(config: Any, model: nn.Module, name: str) -> ModelShape:
    text = config.get_text_config(decoder=True)
    experts = next((getattr(text, n) for n in EXPERTS if isinstance(getattr(text, n, None), int)), 1) or 1
    taken = next((getattr(text, n) for n in TAKEN if isinstance(getattr(text, n, None), int)), experts)
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    output: Any = model.get_output_embeddings()  # type: ignore[operator]
    last = None if output is None else output.weight
    dense = routed = total = 0
    for parameter in model.parameters():
        total += parameter.numel()
        if parameter is last or id(parameter) in tables or parameter.ndim < 2:
            continue
        if parameter.ndim == 3 and experts > 1 and parameter.shape[0] == experts:
            routed += parameter.numel()
        else:
            dense += parameter.numel()
    return ModelShape(
        name=name or str(config.model_type),
        architecture=str(config.model_type),
        layers=_layers(config, model, text),
        hidden=text.hidden_size,
        parameters=total,
        dense_weights=dense,
        expert_weights=routed,
        output_weights=0 if last is None else last.numel(),
        experts=experts,
        experts_per_token=min(taken, experts),
        positions=getattr(text, "max_position_embeddings", None),
    )


def _layers(config: Any, model: nn.Module, text: Any) -> tuple[Layer, ...]:
    """What each layer's cache holds after the model read three tokens on the meta device."""
    from transformers import DynamicCache

    kind = config.model_type
    if getattr(text, "kv_lora_rank", None):
        raise HostError(
            f"model: a {kind} keeps latents in place of keys (multi-head latent attention), which is not modelled; "
            "expected keys and values per head. Plan another model."
        )
    cache = DynamicCache(config=config)
    ids = torch.zeros(1, 3, dtype=torch.long, device="meta")
    try:
        with torch.no_grad():
            model(input_ids=ids, past_key_values=cache, use_cache=True)
    except Exception as error:
        reason = " ".join(str(error).split())[:160]
        raise HostError(
            f"model: a {kind} cannot be read without weights ({type(error).__name__}: {reason}), expected plain "
            "attention layers. Give its sizes with --layers, --hidden, --heads and --kv-heads."
        ) from error
    found: list[Layer] = []
    for index, layer in enumerate(cache.layers):
        name = type(layer).__name__
        if name == "DummyLayer":
            found.append(_borrowed(found, getattr(text, "layer_types", None), index))
            continue
        key, value = getattr(layer, "keys", None), getattr(layer, "values", None)
        if "LinearAttention" in name or not isinstance(key, torch.Tensor) or not isinstance(value, torch.Tensor):
            raise HostError(
                f"model: layer {index} of a {kind} keeps a state ({name}), expected keys and values. A plan covers "
                "attention; models with recurrent layers are not modelled."
            )
        found.append(
            Layer(
                heads=text.num_attention_heads,
                kv_heads=key.shape[1],
                key_dim=key.shape[3],
                value_dim=value.shape[3],
                window=getattr(layer, "sliding_window", None),
            )
        )
    return tuple(found)


def _borrowed(before: list[Layer], kinds: Any, index: int) -> Layer:
    """A layer that reads the keys of the last layer of its own kind."""
    same = [layer for at, layer in enumerate(before) if kinds is None or kinds[at] == kinds[index]]
    return replace((same or before)[-1], borrows=True)
