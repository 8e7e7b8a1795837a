"""The sizes of the published models, as fields of `headway.models.HeadwayConfig`.

    HeadwayForCausalLM(HeadwayConfig(**sigma_fields("sigma-1.5b")))

From the paper's model table: Llama-like blocks (pre-norm RMSNorm, SwiGLU), vocabulary of Llama 3. Whether the
embeddings are tied is not stated there; `tie` is left at the default of the config. "study" is the model of its
ablations before DiffQKV (16 key and 16 value heads, no augmentation).
"""

from __future__ import annotations

import copy
from typing import Any

from headway.errors import unknown

SIGMA_PRESETS: dict[str, dict[str, Any]] = {
    "sigma-1.5b": {
        "vocab_size": 128_256,
        "width": 2048,
        "layers": 26,
        "heads": 32,
        "mlp": "swiglu",
        "mlp_width": 6144,
        "norm": "rms",
        "mixer": "diffqkv",
        "mixer_options": {"key_heads": 4, "value_heads": 16, "aug_dim": 3072, "rope_base": 50_000.0},
    },
    "sigma-10b": {
        "vocab_size": 128_256,
        "width": 4096,
        "layers": 32,
        "heads": 32,
        "mlp": "swiglu",
        "mlp_width": 14_336,
        "norm": "rms",
        "mixer": "diffqkv",
        "mixer_options": {"key_heads": 4, "value_heads": 16, "aug_dim": 6144, "rope_base": 500_000.0},
    },
    "study": {
        "vocab_size": 128_256,
        "width": 2048,
        "layers": 22,
        "heads": 32,
        "mlp": "swiglu",
        "mlp_width": 5632,
        "norm": "rms",
        "mixer": "diffqkv",
        "mixer_options": {"key_heads": 16, "value_heads": 16, "aug_dim": 0, "rope_base": 50_000.0},
    },
}


def sigma_fields(name: str, **changes: Any) -> dict[str, Any]:
    """The fields of a published model, some of them replaced: `sigma_fields("sigma-1.5b", layers=2, vocab_size=512)`.

    `mixer_options` given here are merged with those of the preset."""
    if name not in SIGMA_PRESETS:
        raise unknown("name", name, SIGMA_PRESETS)
    fields = copy.deepcopy(SIGMA_PRESETS[name])
    fields["mixer_options"] |= changes.pop("mixer_options", {})
    return fields | changes
