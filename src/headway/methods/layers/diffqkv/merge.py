"""Merging heads so that as little as possible changes: the shared head that serves a group best on given hidden states.

A mean of heads throws most of them away, as nothing made them alike. But heads can be turned towards each other first,
where a host's function allows it. For the values, by any matrix B_h between a value head and W_O:

    v_h ≈ B_h v ,   W_O' = W_O B_h          the best v is a truncated singular value decomposition of the stacked heads

For the keys only what commutes with rotation: a complex number per rotated pair m, moved into the query,

    k_h,m ≈ a_h,m c_m ,   q'_m = ā_h,m q_m          the best c is the first singular vector of the pair over the heads

Both are best in ‖(W − W') x‖ over the hidden states x that were seen, through their second moments. This is ours;
the paper says nothing about checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Complex, Float, Int
from torch import Tensor, nn

from headway.errors import ArgumentError, HostError

#: Added to second moments, as a share of their mean diagonal, so that unseen directions do not count as free.
RIDGE = 1e-3


@torch.no_grad()
def second_moments(
    model: Any, modules: list[Any], ids: Int[Tensor, "rows tokens"]
) -> dict[int, Float[Tensor, "inputs inputs"]]:
    """E[x̂ x̂ᵀ] of the inputs of each module's projections, x̂ with a 1 behind it, by layer, in float64."""
    if ids.ndim != 2 or ids.shape[1] < 2 or ids.is_floating_point():
        raise ArgumentError(
            f"calibration: got {ids.dtype} of shape {tuple(ids.shape)}, expected token ids (rows, tokens) of a text."
        )
    found: dict[int, Tensor] = {}

    def reader(layer: int) -> Callable[..., None]:
        def read(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0].flatten(0, -2).double().cpu()
            x = torch.cat([x, torch.ones(x.shape[0], 1, dtype=torch.float64)], 1)
            found[layer] = x.T @ x / x.shape[0]

        return read

    hooks = [module.k_proj.register_forward_pre_hook(reader(module.layer_idx)) for module in modules]
    try:
        model(input_ids=ids.to(model.device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return found


@torch.no_grad()
def merge_keys(module: Any, into: int, moment: Float[Tensor, "inputs inputs"]) -> nn.Linear:
    """A projection to `into` key heads; the queries of the module are turned to fit it."""
    if any(hasattr(module, name) for name in ("q_norm", "k_norm")):
        raise HostError(
            f"calibration: got a host with norms on its queries or keys ({type(module).__name__}), expected none: they "
            "stand between projection and rotation. Leave calibration out, or merge values alone."
        )
    weight, root = _weighed(module.k_proj, moment)
    groups = _pairs(_grouped(weight, module.head_dim, into))
    shared, factors = [], []
    for group in groups.unbind(0):
        left, sizes, right = torch.linalg.svd(group.permute(2, 0, 1) @ root.to(group.dtype), full_matrices=False)
        count = group.shape[0] ** 0.5
        factors.append(left[:, :, 0].T * count)
        shared.append(sizes[:, :1] / count * right[:, 0])
    _turn_queries(module.q_proj, torch.cat(factors), module.head_dim)
    flat = torch.stack(shared)
    rows = torch.cat([flat.real, flat.imag], 1).flatten(0, 1)
    return _projection(module.k_proj, _unweigh(rows, root))


@torch.no_grad()
def merge_values(module: Any, into: int, moment: Float[Tensor, "inputs inputs"]) -> nn.Linear:
    """A projection to `into` value heads; the output projection of the module is changed to fit it."""
    weight, root = _weighed(module.v_proj, moment)
    dim = module.head_dim
    heads = weight.shape[0] // dim
    rows, back = [], []
    for group in _grouped(weight, dim, into).unbind(0):
        left, sizes, right = torch.linalg.svd(group.flatten(0, 1) @ root, full_matrices=False)
        rows.append(right[:dim])
        back.append((left[:, :dim] * sizes[:dim]).unflatten(0, (heads // into, dim)))
    query_heads = module.o_proj.in_features // dim
    per_query = torch.cat(back).repeat_interleave(query_heads // heads, 0)
    output = module.o_proj.weight
    split = output.double().cpu().unflatten(1, (query_heads, dim))
    output.copy_(torch.einsum("ohd,hde->ohe", split, per_query).flatten(1))
    return _projection(module.v_proj, _unweigh(torch.cat(rows), root))


def _weighed(projection: nn.Linear, moment: Tensor) -> tuple[Tensor, Tensor]:
    """The weight, its bias behind it where there is one, and a root L of the second moments, L Lᵀ."""
    weight = projection.weight.double().cpu()
    if projection.bias is None:
        moment = moment[:-1, :-1]
    else:
        weight = torch.cat([weight, projection.bias.double().cpu()[:, None]], 1)
    ridge = RIDGE * moment.diagonal().mean() * torch.eye(moment.shape[0], dtype=moment.dtype)
    return weight, torch.linalg.cholesky(moment + ridge)


def _unweigh(rows: Tensor, root: Tensor) -> Tensor:
    """rows L⁻¹."""
    return torch.linalg.solve_triangular(root, rows, upper=False, left=False)


def _grouped(weight: Tensor, dim: int, into: int) -> Float[Tensor, "into group dim inputs"]:
    heads = weight.shape[0] // dim
    if into < 1 or heads % into:
        raise ArgumentError(f"heads: got {into}, expected a divisor of {heads}, the heads that there are.")
    return weight.unflatten(0, (into, heads // into, dim))


def _pairs(weight: Float[Tensor, "*any dim inputs"]) -> Complex[Tensor, "*any inputs pairs"]:
    """The rotated pairs as complex numbers: dimension m with m + dim/2, as Llama has them."""
    half = weight.shape[-2] // 2
    return torch.complex(weight[..., :half, :], weight[..., half:, :]).transpose(-1, -2)


def _turn_queries(projection: nn.Linear, factors: Complex[Tensor, "key_heads pairs"], dim: int) -> None:
    """q_m ← ā_m q_m for every query head, with the factor of the key head it read."""
    heads = projection.out_features // dim
    factor = factors.repeat_interleave(heads // factors.shape[0], 0).conj()
    for held in (projection.weight, projection.bias):
        if held is None:
            continue
        parts = _pairs(held.double().cpu().view(heads, dim, -1)) * factor[:, None]
        held.copy_(torch.cat([parts.real, parts.imag], -1).transpose(1, 2).reshape(held.shape))


def _projection(like: nn.Linear, rows: Tensor) -> nn.Linear:
    """A linear map with the given rows, the last column of which is the bias where `like` has one."""
    weight = rows if like.bias is None else rows[:, :-1]
    made = nn.Linear(
        like.in_features, rows.shape[0], bias=like.bias is not None, device=like.weight.device, dtype=like.weight.dtype
    )
    made.weight.copy_(weight)
    if like.bias is not None:
        made.bias.copy_(rows[:, -1])
    return made.requires_grad_(like.weight.requires_grad)
