"""How what attention says and what the memory says become one."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from headway.errors import unknown

JOINS = ("gate", "add")
EPSILON = 1e-6
#: The gate of ⊗ starts half open to a little more, so that attention gets through before the memory has learned.
GATE_BIAS = 1.0


class Join(nn.Module):
    """norm(y) ⊙ σ(norm(m) + bias), or norm(y) + norm(m). The norms have learned weights of their own."""

    def __init__(self, width: int, kind: str) -> None:
        super().__init__()
        if kind not in JOINS:
            raise unknown("join", kind, JOINS)
        self.kind = kind
        self.attention_norm, self.memory_norm = (nn.RMSNorm(width, eps=EPSILON) for _ in range(2))
        self.bias = nn.Parameter(torch.full((width,), GATE_BIAS)) if kind == "gate" else None

    def forward(
        self, attention: Float[Tensor, "batch tokens width"], memory: Float[Tensor, "batch tokens width"]
    ) -> Float[Tensor, "batch tokens width"]:
        said = self.memory_norm(memory)
        joined = self.attention_norm(attention)
        return joined + said if self.bias is None else joined * torch.sigmoid(said + self.bias)
