"""The stack of blocks that all models here share: mixer and MLP, each with its norm and its residual sum."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional

from headway.door.mixer import State
from headway.kernels.norms import make_norm
from headway.models.config import GATED, _Stack
from headway.models.mixers import build_mixer, reads_grid

#: a of every kind of MLP.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "swiglu": functional.silu,
    "geglu": functional.gelu,
    "reglu": functional.relu,
    "sglu": lambda x: x,
    "gelu": functional.gelu,
    "relu": functional.relu,
    "swish": functional.silu,
}


class MLP(nn.Module):
    """W_o( a(W_g x) ⊙ W_u x ) for gated kinds, W_o a(W_u x) for others. `sglu` has no activation (TNL)."""

    def __init__(self, width: int, inner: int, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.up = nn.Linear(width, inner, bias=False)
        self.gate = nn.Linear(width, inner, bias=False) if kind in GATED else None
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, x: Float[Tensor, "batch tokens width"]) -> Float[Tensor, "batch tokens width"]:
        up = self.up(x)
        activation = ACTIVATIONS[self.kind]
        return self.down(activation(up) if self.gate is None else activation(self.gate(x)) * up)


class Block(nn.Module):
    """x + mixer(norm(x)), then x + mlp(norm(x)); with `norm_place="post"` norm(x + mixer(x)) and the like.

    `prefix` is the number of tokens in front of the patches of an image, of a model that reads both ways."""

    def __init__(self, config: _Stack, layer: int, *, causal: bool, prefix: int = 0) -> None:
        super().__init__()
        name, options = config.mixer_of(layer)
        if not causal:
            options["causal"] = False
            if prefix and reads_grid(name):
                options.setdefault("prefix", prefix)
        self.mixer = build_mixer(name, config.width, config.heads, layer, config.layers, options)
        self.post = config.norm_place == "post"
        self.mixer_norm = make_norm(config.norm, config.width)
        self.mlp = None if config.mlp == "none" else MLP(config.width, config.mlp_width, config.mlp)
        self.mlp_norm = None if self.mlp is None else make_norm(config.norm, config.width)

    def forward(
        self,
        x: Float[Tensor, "batch tokens width"],
        *,
        mask: Bool[Tensor, "batch tokens"] | None = None,
        resets: Bool[Tensor, "batch tokens"] | None = None,
        state: State | None = None,
        mode: str = "block",
        grid: tuple[int, int] | None = None,
    ) -> tuple[Float[Tensor, "batch tokens width"], State | None]:
        given = x if self.post else self.mixer_norm(x)
        mixed, state = self.mixer(given, mask=mask, resets=resets, state=state, mode=mode, grid=grid)
        x = self.mixer_norm(x + mixed) if self.post else x + mixed
        if self.mlp is not None and self.mlp_norm is not None:
            x = self.mlp_norm(x + self.mlp(x)) if self.post else x + self.mlp(self.mlp_norm(x))
        return x, state


def initialise(module: nn.Module, std: float) -> None:
    """N(0, std²) for linear maps and embeddings outside of mixers, which initialise themselves."""
    if isinstance(module, nn.Linear | nn.Embedding):
        with torch.no_grad():
            nn.init.normal_(module.weight, std=std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
