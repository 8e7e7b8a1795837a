"""Tiny random hosts: one small model with random weights for every architecture that transformers can build.

    config = the architecture's own config, shrunk;   model = its class on that config;   weights = seeded noise

A config is shrunk by the names of its fields, and its per-layer lists are cut to one layer of each distinct kind; the
sizes and the exceptions stand in `tiny_fields`. Nothing is downloaded. Weights are scaled by fan-in, those of attention
by `ATTENTION_GAIN` more, so that attention logits spread over several units and a lost mask, window, scale, bias, soft
cap or sink changes the output.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from headway.errors import HostError, unknown
from headway.hosts.tiny_fields import EXCEPTIONS, FIRST_TOKEN, HEADS, OTHERS, RULES, SPECIAL, UNBUILDABLE

BATCH = 2
TOKENS = 24
#: Query and key projections with this gain give logits with a standard deviation of about gain².
ATTENTION_GAIN = 1.5
#: Small beside what a layer adds, also where a host multiplies its embeddings by √width.
EMBEDDING_SPREAD = 0.25
#: Share of unit noise that is added to vectors (biases, norms), which keeps their meaning and hides no dropped one.
VECTOR_NOISE = 0.2
#: Enough for one layer of each kind that an architecture of transformers 5.23 mixes.
MOST_LAYERS = 5


def architectures() -> tuple[str, ...]:
    """The model type of every causal language model that the installed transformers lists, in its own order."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def other_architectures() -> tuple[str, ...]:
    """Class names of encoders, vision models, text-image models and encoder-decoders that `tiny_host` builds too."""
    return tuple(OTHERS)


def tiny_host(architecture: str, *, seed: int = 0, **overrides: Any) -> tuple[nn.Module, dict[str, Any]]:
    """A tiny float32 model in eval mode with random weights, and the keyword arguments of one forward.

    `architecture` is one of `architectures()` or `other_architectures()`; `overrides` are config fields, and
    `attn_implementation`. The same seed gives the same weights; the global random state is left alone. Raises
    ArgumentError for an unknown architecture and HostError, with the reason, for one that cannot be built here."""
    model_class, config_class, exceptions = _classes(architecture)
    if architecture in UNBUILDABLE:
        raise HostError(
            f"architecture: got {architecture!r}, expected one that can be built; {UNBUILDABLE[architecture]}. Use the "
            "model that it assists."
        )
    implementation = overrides.pop("attn_implementation", None)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            config = tiny_config(config_class, exceptions | overrides, decoder=architecture not in OTHERS)
            model = model_class._from_config(config, attn_implementation=implementation)
    except Exception as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise HostError(
            f"architecture: got {architecture!r}, expected one that can be built here, with overrides it accepts; "
            f"{type(error).__name__}: {reason}. Install the package it names, or correct the overrides."
        ) from error
    generator = torch.Generator().manual_seed(seed)
    randomise(model, generator)
    return model.eval(), example_of(model, generator)


def tiny_config(config_class: Any, given: Mapping[str, Any], *, decoder: bool = True) -> Any:
    """The config of a class with its fields shrunk by `RULES` and `given` put on top; "a.b" enters a nested config."""
    from transformers import PreTrainedConfig

    default = config_class()
    own = {_field_name(default, k): v for k, v in given.items() if "." not in k}
    kept, cut = _kept_layers(default)
    wanted = own.get(_field_name(default, "num_hidden_layers"), len(kept))
    kept = [kept[i % len(kept)] for i in range(wanted)]
    values: dict[str, Any] = {}
    for field in dataclasses.fields(default):
        name, value = field.name, _stored(default, field.name)
        if name in own:
            continue
        if isinstance(value, PreTrainedConfig):
            inner = {k.removeprefix(f"{name}."): v for k, v in given.items() if k.startswith(f"{name}.")}
            values[name] = tiny_config(type(value), inner, decoder=decoder)
        elif name in cut:
            values[name] = [value[i] for i in kept]
        elif name == "is_decoder":
            values[name] = decoder
        elif name == _field_name(default, "num_hidden_layers"):
            values[name] = len(kept)
        elif (type(value) is int and field.default is not None) or name.endswith("_token_id"):
            tiny = _tiny_number(name, value, default)
            values |= {} if tiny is None else {name: tiny}
    return config_class(**values | own)


def randomise(model: nn.Module, generator: torch.Generator) -> None:
    """Seeded weights. Matrices get unit variance over their inputs, times `ATTENTION_GAIN` inside attention; embeddings
    `EMBEDDING_SPREAD`; sinks unit noise. Other vectors, and a recurrence's parameters, keep their values plus noise."""
    seen: set[int] = set()
    with torch.no_grad():
        for path, module in model.named_modules():
            for name, parameter in module.named_parameters(recurse=False):
                if id(parameter) in seen or not parameter.is_floating_point():
                    continue
                seen.add(id(parameter))
                noise = torch.randn(parameter.shape, generator=generator)
                if parameter.ndim == 1 and "sink" in name:
                    parameter.copy_(noise)
                elif isinstance(module, nn.Embedding):
                    parameter.copy_(EMBEDDING_SPREAD * noise)
                elif parameter.ndim < 2 or _RECURRENCE.search(f"{path}.{name}"):
                    parameter.add_(VECTOR_NOISE * noise)
                else:
                    inputs = parameter[0].numel() if _is_convolution(module) else parameter.shape[-1]
                    gain = ATTENTION_GAIN if _ATTENTION.search(path) else 1.0
                    parameter.copy_(gain * noise / math.sqrt(max(inputs, 1)))


def example_of(model: nn.Module, generator: torch.Generator) -> dict[str, Any]:
    """Keyword arguments of one forward of a tiny host: two rows of tokens, pictures or sound, without padding."""
    config: Any = model.config
    names = inspect.signature(type(model).forward).parameters
    main = getattr(model, "main_input_name", "input_ids")
    inputs: dict[str, Any] = {"use_cache": False} if "use_cache" in names else {}
    if main == "pixel_values" or ("pixel_values" in names and type(model).__name__ in OTHERS):
        size = config.image_size if hasattr(config, "image_size") else config.vision_config.image_size
        inputs["pixel_values"] = torch.randn(BATCH, 3, size, size, generator=generator)
    if main == "input_features":
        frames = 2 * config.max_source_positions
        inputs["input_features"] = torch.randn(BATCH, config.num_mel_bins, frames, generator=generator)
    elif main != "pixel_values":
        codebooks = config.num_codebooks if config.model_type.startswith("musicgen") else 1
        inputs["input_ids"] = _tokens(BATCH * codebooks, TOKENS, generator)
    if config.is_encoder_decoder and "decoder_input_ids" in names:
        inputs["decoder_input_ids"] = _tokens(BATCH, TOKENS // 2, generator)
    return inputs


_ATTENTION = re.compile(r"att|mixer", re.IGNORECASE)
_RECURRENCE = re.compile(r"A_log|dt_|\.D$|decay|time_|ssm|r_?lru|recurrent", re.IGNORECASE)


def _classes(architecture: str) -> tuple[Any, Any, dict[str, Any]]:
    """Model class, config class and exceptions; a class that reads only a nested config gets that config's class."""
    import transformers
    from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING

    model_class: Any
    if architecture in OTHERS:
        model_class = getattr(transformers, architecture)
        return model_class, model_class.config_class, OTHERS[architecture]
    if architecture not in architectures():
        raise unknown("architecture", architecture, (*architectures(), *OTHERS))
    config_class: Any = CONFIG_MAPPING[architecture]
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING[config_class]
    if model_class.config_class in config_class.sub_configs.values():
        config_class = model_class.config_class
    return model_class, config_class, EXCEPTIONS.get(architecture, {})


def _kept_layers(default: Any) -> tuple[list[int], set[str]]:
    """Which layers a tiny config keeps, one of each distinct kind in order (two where all are alike), and the names of
    the per-layer lists to cut."""
    count = _stored(default, "num_hidden_layers")
    values = {f.name: _stored(default, f.name) for f in dataclasses.fields(default)}
    lists = {n: v for n, v in values.items() if isinstance(v, list | tuple) and len(v) == count and not _is_index(v)}
    kinds: dict[tuple[str, ...], int] = {}
    for layer in range(count if lists else 0):
        kinds.setdefault(tuple(str(v[layer]) for v in lists.values()), layer)
    kept = list(kinds.values())[:MOST_LAYERS]
    return (kept if len(kept) > 1 else [0, 1]), set(lists)


def _is_index(values: Any) -> bool:
    """Whether a list names layers by number rather than says something of each layer."""
    return len(values) > 2 and list(values) == sorted({v for v in values if type(v) is int})


def _stored(config: Any, name: str) -> Any:
    """The value of a field as it is kept, under another name where the architecture has one for it."""
    return vars(config).get(config.attribute_map.get(name, name))


def _field_name(config: Any, name: str) -> str:
    """The field that takes a value in the constructor, whatever the architecture calls it."""
    stored = config.attribute_map.get(name, name)
    names = (f.name for f in dataclasses.fields(config))
    return next((n for n in names if config.attribute_map.get(n, n) == stored), name)


def _tiny_number(name: str, value: int | None, default: Any) -> int | None:
    """The tiny value of an integer field, None to leave it to the config. Equal head counts stay equal."""
    if value is None:
        return None
    number = next((tiny for pattern, tiny in RULES if re.fullmatch(pattern, name)), None)
    if number is None:
        return None
    if name == "num_key_value_heads" and value == _stored(default, "num_attention_heads"):
        return HEADS
    return number if name.endswith("_token_id") else min(number, value)


def _is_convolution(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)


def _tokens(rows: int, columns: int, generator: torch.Generator) -> Int[Tensor, "rows columns"]:
    return torch.randint(FIRST_TOKEN, SPECIAL, (rows, columns), generator=generator)
