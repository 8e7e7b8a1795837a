"""TNL, the language model around lightning attention, as fields of `headway.models.HeadwayConfig`.

    x ← x + GLA(SRMSNorm(x)) ,   x ← x + SGLU(SRMSNorm(x)) ,   SGLU(x) = W_o [ (x W_v) ⊙ (x W_u) ]

Embeddings are multiplied by √width, the last norm is a SRMSNorm, and input and output embedding are two matrices, as in
the released models. Weights start from N(0, 0.02²).
"""

from __future__ import annotations

from typing import Any

#: Width of the SGLU over that of the model, as in the small released implementation.
GLU_RATIO = 2


def tnl_fields(*, width: int, preset: str = "tnl", **changes: Any) -> dict[str, Any]:
    """Fields for `HeadwayConfig(**tnl_fields(width=…), layers=…, heads=…, vocab_size=…)`.

    `preset` is one of the mixer's. `changes` are options of the mixer `Lightning`, as decay="linear" or gate="none"."""
    return {
        "width": width,
        "mixer": "lightning",
        "mixer_options": {"preset": preset, **changes},
        "norm": "srms",
        "mlp": "sglu",
        "mlp_width": GLU_RATIO * width,
        "tie": False,
        "embed_scale": True,
        "init_std": 0.02,
    }
