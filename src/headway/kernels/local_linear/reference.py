"""Local linear attention as the paper writes it, with every matrix in full: what the fast forms are held against.

    w_ij = exp(s q_i·k_j − max_j) ,  z_ij = k_j − q_i ,  ω = Σ w ,  μ = Σ w z ,  Σ = Σ w z zᵀ + λ ω I
    ρ = Σ⁻¹ μ ,   δ = ω − μ·ρ ,   P_ij = w_ij (1 − z_ij·ρ_i) / δ_i

Takes O(n² d + n d²) memory.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def reference_weights(
    query: Float[Tensor, "batch heads queries dim"],
    key: Float[Tensor, "batch kv_heads keys dim"],
    *,
    ridge: Float[Tensor, "#batch #heads #queries"],
    scale: float | Float[Tensor, "#batch #heads #queries"],
    visible: Bool[Tensor, "#batch #heads queries keys"],
    detach_ridge_weight: bool = False,
) -> Float[Tensor, "batch heads queries keys"]:
    """P, differentiable by autograd. Rows that see nothing are zero."""
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    steep = scale[..., None] if isinstance(scale, Tensor) else scale
    logits = (steep * query @ key.transpose(-1, -2)).masked_fill(~visible, -torch.inf)
    top = logits.detach().amax(-1, keepdim=True)
    w = torch.exp(logits - torch.where(top.isfinite(), top, 0.0))
    z = key[:, :, None] - query[:, :, :, None]
    total = w.sum(-1)
    mean = (w[..., None, :] @ z).squeeze(-2)
    size = total.detach() if detach_ridge_weight else total
    penalty = torch.where(total > 0, ridge * size, 1.0)
    moments = (w[..., None] * z).transpose(-1, -2) @ z + torch.diag_embed(
        penalty[..., None].expand(*penalty.shape, query.shape[-1])
    )
    factor = torch.linalg.cholesky(moments)
    slope = torch.cholesky_solve(mean[..., None], factor).squeeze(-1)
    spread = total - (mean * slope).sum(-1)
    spread = torch.where(total > 0, spread, 1.0)
    return w * (1 - (z @ slope[..., None]).squeeze(-1)) / spread[..., None]
