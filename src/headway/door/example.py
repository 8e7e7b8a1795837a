"""A small input that a host can be tried on: enough to see which of its modules attend, and how."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from headway.errors import InterceptionError

#: Tokens of the example: longer than a test of causality needs, short enough to cost nothing.
EXAMPLE_TOKENS = 12


def example_inputs(model: nn.Module) -> dict[str, Any]:
    """Keyword arguments for one forward of `model`, made from its config: token ids, pixels, or audio features.

    Raises InterceptionError when the config does not say what the model reads."""
    config = getattr(model, "config", None)
    if config is None:
        raise InterceptionError(
            f"model: got {type(model).__name__} without a config, so no example input can be made. Pass example={{…}} "
            "with the keyword arguments of one forward."
        )
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    parameters = inspect.signature(type(model).forward).parameters
    main = getattr(model, "main_input_name", "input_ids")
    inputs: dict[str, Any] = {}
    if "input_ids" in parameters and main in ("input_ids", "pixel_values"):
        inputs["input_ids"] = _tokens(config, device)
    if "pixel_values" in parameters and (main == "pixel_values" or _field(config, "vision_config", None) is not None):
        pixels = _pixels(config, dtype, device)
        if pixels is not None and (main == "pixel_values" or "input_ids" not in inputs or _is_dual(model)):
            inputs["pixel_values"] = pixels
    if "input_features" in parameters and _field(config, "num_mel_bins", None):
        frames = 2 * int(_field(config, "max_source_positions", 1500))
        inputs["input_features"] = torch.zeros(1, int(config.num_mel_bins), frames, dtype=dtype, device=device)
        inputs.pop("input_ids", None)
    if main == "numbers":
        count = EXAMPLE_TOKENS * int(config.inputs)
        inputs["numbers"] = torch.linspace(-1, 1, count, dtype=dtype, device=device).sin().view(1, EXAMPLE_TOKENS, -1)
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in parameters:
        inputs["decoder_input_ids"] = _tokens(config, device)
    if "use_cache" in parameters:
        inputs["use_cache"] = False
    if not set(inputs) - {"use_cache"}:
        raise InterceptionError(
            f"model: got {type(model).__name__} with main input {main!r}, for which no example can be made. Pass "
            "example={…} with the keyword arguments of one forward."
        )
    return inputs


def _field(config: Any, name: str, default: Any) -> Any:
    for holder in (config, getattr(config, "text_config", None), getattr(config, "vision_config", None)):
        value = getattr(holder, name, None)
        if value is not None:
            return value
    return default


def _is_dual(model: nn.Module) -> bool:
    return hasattr(model, "text_model") and hasattr(model, "vision_model")


def _tokens(config: Any, device: torch.device) -> torch.Tensor:
    vocabulary = int(_field(config, "vocab_size", 100))
    longest = int(_field(config, "max_position_embeddings", EXAMPLE_TOKENS))
    count = min(EXAMPLE_TOKENS, max(longest, 1))
    ids = (torch.arange(count, device=device) * 37 + 11) % max(vocabulary - 10, 1) + min(5, vocabulary // 2)
    return ids[None]


def _pixels(config: Any, dtype: torch.dtype, device: torch.device) -> torch.Tensor | None:
    size = _field(config, "image_size", None)
    if size is None:
        return None
    height, width = (size, size) if isinstance(size, int) else tuple(size)[:2]
    patch = _field(config, "patch_size", None)
    if isinstance(patch, int) and isinstance(size, int) and size > 16 * patch and not _fixed_size(config):
        height = width = 4 * patch
    channels = int(_field(config, "num_channels", 3))
    line = torch.linspace(-1, 1, channels * height * width, device=device)
    return torch.sin(40 * line).view(1, channels, height, width).to(dtype)


def _fixed_size(config: Any) -> bool:
    """Hosts that interpolate their position grid accept a smaller picture; others need the size of their config."""
    return not str(getattr(config, "model_type", "")).startswith("dinov2")
