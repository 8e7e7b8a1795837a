"""Products of tiles with many rows of keys, for kernels that bring their own derivatives.

    inner(a, b)_ij = a_i·b_j ,   outer(w, c)_i = Σ_j w_ij c_j ,   sandwich(a, b, w, c)_i = Σ_j w_ij (a_i·b_j) c_j

On a CPU PyTorch gives float32 products to MKL, which does not use AVX-512 on every processor that has it. oneDNN, which
PyTorch carries for its compiler, does; a factor of two was seen on an AMD Zen 5. It is taken where it can be: AVX-512,
one contiguous float32 matrix, outside of autograd, large enough; several such are taken one by one. Everything else
goes the usual way, which was faster by 1.4 on an AMD processor with AVX2 alone. Both give the same numbers up to
rounding.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

#: Multiplications below which the call itself costs more than a faster product saves.
WORTH = 2**19
#: Rows below which a product is bound by reading its larger side, and nothing is gained.
ROWS = 16


def inner(
    a: Float[Tensor, "systems rows dim"], b: Float[Tensor, "systems keys dim"]
) -> Float[Tensor, "systems rows keys"]:
    """a_i·b_j for all pairs."""
    if _one_dnn(a, b):
        return _linear()(a[0], b[0], None, "none", [], "")[None]
    return torch.bmm(a, b.transpose(1, 2))


def outer(
    weights: Float[Tensor, "systems rows keys"], c: Float[Tensor, "systems keys dim"]
) -> Float[Tensor, "systems rows dim"]:
    """Σ_j w_ij c_j."""
    split = pieces(weights, c)
    if len(split) > 1:
        return torch.cat([outer(weights[some], c[some]) for some in split])
    if _one_dnn(weights, c):
        return _linear()(weights[0], c[0].T, None, "none", [], "")[None]
    return torch.bmm(weights, c)


def sandwich(
    a: Float[Tensor, "systems rows dim"],
    b: Float[Tensor, "systems keys dim"],
    weights: Float[Tensor, "systems rows keys"],
    c: Float[Tensor, "systems keys value_dim"],
) -> Float[Tensor, "systems rows value_dim"]:
    """Σ_j w_ij (a_i·b_j) c_j. Of large systems only one has its products a_i·b_j in memory at a time."""
    made = [outer(inner(a[some], b[some]).mul_(weights[some]), c[some]) for some in pieces(a, b)]
    return made[0] if len(made) == 1 else torch.cat(made)


def pieces(a: Float[Tensor, "systems rows dim"], b: Tensor) -> list[slice]:
    """One by one where oneDNN takes each system, all together otherwise. `b` has systems first."""
    systems = a.shape[0]
    if systems > 1 and _one_dnn(a[:1], b[:1]):
        return [slice(system, system + 1) for system in range(systems)]
    return [slice(0, systems)]


def _one_dnn(a: Tensor, b: Tensor) -> bool:
    """Whether oneDNN does this product well. It is very slow on matrices cut out of wider ones."""
    return (
        a.shape[0] == 1
        and a.dtype == b.dtype == torch.float32
        and a.device.type == "cpu"
        and a.shape[1] >= ROWS
        and a.shape[1] * b.shape[1] * b.shape[2] >= WORTH
        and a[0].is_contiguous()
        and b[0].is_contiguous()
        and not (torch.is_grad_enabled() and (a.requires_grad or b.requires_grad))
        and _wide()
    )


@cache
def _wide() -> bool:
    """Whether there is oneDNN, and an instruction set that it uses and MKL may not."""
    wide = torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    return wide and torch.backends.mkldnn.is_available() and _linear() is not None


def _linear() -> Any:
    """oneDNN's x Wᵀ; None where this PyTorch does not have it."""
    return getattr(torch.ops.mkldnn, "_linear_pointwise", None)
