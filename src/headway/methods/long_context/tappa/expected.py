"""Expected Attention, the policy that TAPPA is compared with: keys ranked by what queries to come should give them.

    q ~ N(μ, Σ) before RoPE ,   R̄ = mean_{j = 1…n} R(t + j) ,   k̄_i = R̄ᵀ k_i
    a_i = softmax_i( μᵀk̄_i / √d + k̄_iᵀ Σ k̄_i / 2d ) ,   score_i = (a_i + ε) ‖v_i‖

μ and Σ are those of a head's queries of the prompt without its first tokens (attention sinks, which always stay), R(t)
the rotation of position t, and the exponent the logarithm of the mean of exp(qᵀk/√d) over such queries. The paper
weighs by ‖W_o v_i‖; the released code, and this one, by ‖v_i‖, with ε = 0.01 in its benchmark. Every layer has the same
budget, so that it differs from `TappaEviction` in how tokens and budgets are chosen and in nothing else. Paper:
Expected Attention, arXiv 2510.00636.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from headway.door.call import AttentionCall
from headway.errors import ArgumentError, check_whole, is_number
from headway.kernels.rope import Layout, as_pairs, check_frequencies, unrotate
from headway.methods.long_context.tappa.eviction import TappaEviction
from headway.methods.long_context.tappa.similarity import Stage
from headway.methods.long_context.tappa.store import TappaLayer

#: First tokens that stay and do not count in the statistics of queries, and positions ahead, of the released code.
SINKS, FUTURE, EPSILON = 4, 512, 0.01


def mean_rotation(
    positions: Int[Tensor, " positions"],
    frequencies: Float[Tensor, " pairs"],
    dim: int,
    layout: Layout = "half",
) -> Float[Tensor, "dim dim"]:
    """R̄, the mean of the rotations of some positions; dimensions beyond the rotated pairs are left as they are."""
    pairs = check_frequencies(frequencies).numel()
    angle = positions.double()[:, None] * frequencies.double()
    cosine, sine = angle.cos().mean(0), angle.sin().mean(0)
    turn = torch.stack([torch.stack([cosine, -sine], -1), torch.stack([sine, cosine], -1)], -2)
    basis = as_pairs(torch.eye(dim, dtype=torch.float64, device=angle.device), pairs, layout)
    still = torch.eye(dim, dtype=torch.float64, device=angle.device) - torch.einsum("apx,bpx->ab", basis, basis)
    return torch.einsum("apx,pxy,bpy->ab", basis, turn, basis) + still


def expected_scores(
    query: Float[Tensor, "batch heads tokens dim"],
    key: Float[Tensor, "batch kv_heads keys dim"],
    value: Float[Tensor, "batch kv_heads keys value_dim"],
    rotation: Float[Tensor, "dim dim"],
    *,
    scale: float,
    counted: Bool[Tensor, "batch tokens"],
    visible: Bool[Tensor, "batch kv_heads keys"],
    epsilon: float = EPSILON,
) -> Float[Tensor, "batch kv_heads keys"]:
    """(a_i + ε) ‖v_i‖ of every key, a mean over the query heads of its KV head; 0 where a key is not `visible`.

    `query` is before RoPE, `key` after it; `counted` names the queries of the statistics and `rotation` is R̄. Raises
    ArgumentError for a row of a batch without a query that counts."""
    share = counted[:, None, :, None].to(query.dtype)
    number = share.sum(2, keepdim=True)
    if bool((number < 1).any()):
        raise ArgumentError("counted: got a sequence without queries, expected at least one. Leave fewer tokens out.")
    mean = (query * share).sum(2, keepdim=True) / number
    centred = (query - mean) * share
    spread = centred.transpose(2, 3) @ centred / number
    groups = query.shape[1] // key.shape[1]
    turned = (key @ rotation.to(key)).repeat_interleave(groups, 1)
    logits = scale * (turned @ mean.transpose(2, 3))[..., 0]
    logits = logits + scale**2 / 2 * ((turned @ spread) * turned).sum(-1)
    seen = visible.repeat_interleave(groups, 1)
    weights = logits.masked_fill(~seen, -torch.inf).softmax(-1).unflatten(1, (-1, groups)).mean(2)
    return ((weights + epsilon) * value.norm(dim=-1)).masked_fill(~visible, 0.0)


@dataclass(frozen=True, kw_only=True, eq=False)
class ExpectedAttention(TappaEviction):
    """Expected Attention at a budget of keys per layer: `headway.use(model, ExpectedAttention(budget=512))`.

    budget, window and slack are those of `TappaEviction`, so both hold the same bytes; future: positions ahead
    whose rotations are averaged; sinks: first tokens that stay, as far as the budget goes; epsilon: see the module.
    A prompt is ranked by its own queries; what decoding adds leaves as under `TappaEviction`. Hosts without RoPE
    are refused with HostError."""

    preference: str = "uniform"
    stage: Stage = "pre_rope"
    future: int = FUTURE
    sinks: int = SINKS
    epsilon: float = EPSILON

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole("future", self.future, 1)
        check_whole("sinks", self.sinks, 0)
        if not (is_number(self.epsilon) and self.epsilon >= 0):
            raise ArgumentError(f"epsilon: got {self.epsilon!r}, expected a number of at least 0.")
        if self.stage != "pre_rope":
            raise ArgumentError(f"stage: got {self.stage!r}, expected 'pre_rope': queries are modelled before RoPE.")

    def prompt_scores(
        self,
        call: AttentionCall,
        layer: TappaLayer,
        weights: Sequence[Tensor],
        rotary: tuple[Tensor | None, Layout],
    ) -> list[Tensor]:
        frequencies, layout = rotary
        rows = call.query_positions
        query = unrotate(call.query, rows, check_frequencies(frequencies), layout)
        ahead = torch.arange(layer.seen, layer.seen + self.future, device=rows.device)
        rotation = mean_rotation(ahead, check_frequencies(frequencies).to(rows.device), query.shape[3], layout)
        rank = _places(call, rows)
        found = []
        for number, store in enumerate(layer.parts):
            heads = [h * call.groups + g for h in layer.heads_of(number) for g in range(call.groups)]
            real = self._real(call, layer, number)
            scores = expected_scores(
                query[:, heads],
                store.key,
                store.value,
                rotation,
                scale=call.scale,
                counted=rank >= rank.amax(-1, keepdim=True).clamp(max=self.sinks),
                visible=real,
                epsilon=self.epsilon,
            )
            first = _places(call, store.positions.clamp(min=0)) < self.sinks
            # Above every other past key and below the window, which a budget of fewer keys than sinks must not cost.
            found.append(scores.masked_fill(real & first, torch.finfo(scores.dtype).max))
        return found


def _places(call: AttentionCall, positions: Int[Tensor, "... tokens"]) -> Int[Tensor, "batch *heads tokens"]:
    """Where tokens stand in their own sequence, pads before them not counted; negative for pads."""
    padding = call.forward.padding
    if padding is None:
        return positions if positions.ndim > 1 else positions.expand(call.query.shape[0], -1)
    known = padding.to(positions.device)
    place = torch.where(known.bool(), known.long().cumsum(1) - 1, -1)
    if positions.ndim == 1:
        return place[:, positions]
    return place[:, None].expand(-1, positions.shape[1], -1).gather(2, positions)
