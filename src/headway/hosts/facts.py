"""What a report says of a model and of the libraries it ran on."""

from __future__ import annotations

from typing import Any

from torch import nn


def model_facts(model: nn.Module, name: str | None = None) -> dict[str, Any]:
    """Name, class, layers, heads, key heads, dtype and number of parameters; None where the model does not
    tell."""
    host: Any = model
    config: Any = getattr(host, "config", None)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    heads = getattr(config, "num_attention_heads", None)
    first = next(model.parameters(), None)
    return {
        "name": name or getattr(model, "name_or_path", "") or type(model).__name__,
        "class": type(model).__name__,
        "layers": getattr(config, "num_hidden_layers", None),
        "heads": heads,
        "kv_heads": getattr(config, "num_key_value_heads", None) or heads,
        "dtype": None if first is None else str(first.dtype).removeprefix("torch."),
        "parameters": sum(p.numel() for p in model.parameters()),
    }


def versions() -> dict[str, str]:
    """The versions of Headway and of the libraries that decide its numbers."""
    import torch
    import transformers

    import headway

    return {"headway": headway.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
