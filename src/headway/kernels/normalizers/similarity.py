"""Weights by a kernel in place of the exponential: w_ij = φ(q_i)·φ(k_j)/√d, plain or divided by the size of the row.

    identity   φ(x) = x            Z_i = 1   or   max(|Σ_j w_ij|, 1)
    elu        φ(x) = elu(x) + 1   Z_i = 1   or   Σ_j w_ij
    mlp        φ(x) = W₂ relu(W₁x) Z_i = 1   or   max(|Σ_j w_ij|, 1)

Variants of arXiv 2410.10781, applied after rotary embedding; hidden keys are multiplied by zero, not set to −∞. They
are linear attention: `recurrent_kernel_attention` computes the causal form from a running sum of φ(k)vᵀ.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import elu

from headway.errors import unknown
from headway.kernels.dense import check_heads, grouped_scores
from headway.kernels.normalizers.softmax_family import wide

KERNELS = ("identity", "elu", "mlp")
#: Below this absolute sum a signed row is not divided.
SMALLEST_SUM = 1.0


def features(
    x: Float[Tensor, "batch heads tokens dim"],
    kernel: str,
    maps: tuple[Float[Tensor, "dim dim"], Float[Tensor, "dim dim"]] | None = None,
) -> Float[Tensor, "batch heads tokens dim"]:
    """φ(x); `maps` are W₁ and W₂ of the MLP kernel, x·W₁ᵀ first."""
    if kernel == "identity":
        return x
    if kernel == "elu":
        return elu(x) + 1
    if kernel != "mlp" or maps is None:
        raise unknown("kernel", kernel, KERNELS, fix="The MLP kernel needs its two matrices in `maps`.")
    first, second = (m.to(x.dtype) for m in maps)
    return (x @ first.T).relu() @ second.T


def kernel_weights(
    query: Float[Tensor, "batch heads rows dim"],
    key: Float[Tensor, "batch kv_heads keys dim"],
    visible: Bool[Tensor, "#batch #heads rows keys"],
    *,
    kernel: str,
    normalise: bool = False,
    maps: tuple[Tensor, Tensor] | None = None,
    scale: float | None = None,
) -> Float[Tensor, "batch heads rows keys"]:
    """φ(q)·φ(k)·scale at visible keys (scale 1/√dim by default), divided by Z of the row if `normalise`."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    scores = grouped_scores(features(wide(query), kernel, maps), features(wide(key), kernel, maps)) * scale
    return (
        divided(torch.where(visible, scores, 0.0), signed=kernel != "elu")
        if normalise
        else torch.where(visible, scores, 0.0)
    )


def divided(weights: Float[Tensor, "batch heads rows keys"], *, signed: bool) -> Float[Tensor, "batch heads rows keys"]:
    """Weights over their sum; signed ones over max(|sum|, 1), which cannot come near zero."""
    total = weights.sum(-1, keepdim=True)
    if signed:
        return weights / total.abs().clamp(min=SMALLEST_SUM)
    return weights / torch.where(total > 0, total, 1.0)


def recurrent_kernel_attention(
    query: Float[Tensor, "batch heads tokens dim"],
    key: Float[Tensor, "batch kv_heads tokens dim"],
    value: Float[Tensor, "batch kv_heads tokens value_dim"],
    *,
    kernel: str,
    normalise: bool = False,
    maps: tuple[Tensor, Tensor] | None = None,
    scale: float | None = None,
) -> Float[Tensor, "batch heads tokens value_dim"]:
    """The same causal attention from S_t = Σ_{j≤t} φ(k_j)v_jᵀ and z_t = Σ_{j≤t} φ(k_j), token by token: memory is
    dim × value_dim a head, whatever the length."""
    groups = check_heads(query, key)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    rows, columns = features(wide(query), kernel, maps) * scale, features(wide(key), kernel, maps)
    columns, values = (t.repeat_interleave(groups, 1) for t in (columns, wide(value)))
    memory = values.new_zeros(*columns.shape[:2], columns.shape[3], values.shape[3])
    sums = columns.new_zeros(*columns.shape[:2], columns.shape[3])
    outputs = []
    for t in range(query.shape[2]):
        memory = memory + columns[:, :, t, :, None] * values[:, :, t, None, :]
        sums = sums + columns[:, :, t]
        output = torch.einsum("bhd,bhde->bhe", rows[:, :, t], memory)
        if normalise:
            total = (rows[:, :, t] * sums).sum(-1, keepdim=True)
            signed = total.abs().clamp(min=SMALLEST_SUM)
            output = output / (signed if kernel != "elu" else torch.where(total > 0, total, 1.0))
        outputs.append(output)
    return torch.stack(outputs, 2).to(value.dtype) if outputs else value.new_zeros(*query.shape[:3], value.shape[3])
