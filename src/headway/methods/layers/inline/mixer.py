"""The mixers `inline` and `linear`: projections around attention through features, with or without the local residual.

y = W_o ( [ o_1 … o_H ] + r )        o: `kernels.inline`, r: `LocalResidual` on the grid of patches
"""

from __future__ import annotations

import logging
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from headway.door.mixer import Mixer, State, check_inputs, document_positions, register_mixer, segment_ids
from headway.door.own import Attend
from headway.errors import ArgumentError
from headway.kernels.feature_rules import Rule
from headway.kernels.inline import causal_feature_attention, empty_sums, feature_attention
from headway.kernels.scan_blocks import BLOCK
from headway.methods.layers.inline.residual import LocalResidual

log = logging.getLogger(__name__)


class FeatureMixer(Mixer):
    """What `inline` and `linear` share. Use one of them.

    feature: φ, a name of `kernels.feature_rules.FEATURES`. scale: s, head dimension ** -0.5 where None.
    residual: add the local residual; needs `causal=False` and a grid at every call. None: the class's default.
    prefix: class, distillation and register tokens in front of the patches; they get no residual.
    kernel_per: whether the residual's kernels are of each "channel" (the released code) or "head" (the paper).
    qk_norm: root-mean-square norm of query and key per head, for runs whose queries grow (off in the paper).
    bias: biases on the projections. block: tokens per block of the causal form.

    A packed row (`resets`) of a mixer that reads both ways is worked through document by document."""

    normaliser: ClassVar[str] = "subtractive"
    default_feature: ClassVar[str] = "identity"
    default_residual: ClassVar[bool] = True

    def __init__(
        self,
        width: int,
        *,
        heads: int,
        layer: int = 0,
        layers: int = 1,
        causal: bool = True,
        feature: str | None = None,
        scale: float | None = None,
        residual: bool | None = None,
        prefix: int = 0,
        kernel_per: str = "channel",
        qk_norm: bool = False,
        bias: bool = True,
        block: int = BLOCK,
    ) -> None:
        super().__init__(width, heads=heads, layer=layer, layers=layers, causal=causal)
        if causal and residual:
            raise ArgumentError(
                "residual: got True with causal=True, expected False: the residual reads the whole image. Set one of "
                "them to False."
            )
        self.head_dim, self.block = width // heads, block
        self.rule = Rule(normaliser=self.normaliser, feature=feature or self.default_feature, scale=scale)
        wanted = self.default_residual if residual is None else residual
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(width, width, bias=bias) for _ in range(4))
        self.q_norm, self.k_norm = (nn.RMSNorm(self.head_dim) if qk_norm else nn.Identity() for _ in range(2))
        self.residual: LocalResidual | None = None
        if wanted and not causal:
            self.residual = LocalResidual(width, heads=heads, prefix=prefix, kernel_per=kernel_per)
        self.attend = Attend(layer=layer, scale=self.rule.scale_for(self.head_dim), causal=causal, weighing=self.rule)

    @classmethod
    def example(cls, **changes: Any) -> FeatureMixer:
        """Without the residual, which needs a grid at every call."""
        return cls(**{"width": 16, "heads": 2, "residual": False, "block": 4, **changes})

    def init_state(
        self, batch: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> State:
        wide = torch.promote_types(dtype or torch.get_default_dtype(), torch.float32)
        sums = empty_sums(batch, self.heads, self.head_dim, self.head_dim, device=device, dtype=wide)
        return State({"sums": sums}, torch.zeros(batch, dtype=torch.long, device=device))

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
        x = check_inputs(self, x, mask, resets, state, mode)
        if x.shape[1] == 0:
            return x, state
        query, key, value = (
            project(x).unflatten(-1, (self.heads, self.head_dim)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        query, key = self.q_norm(query), self.k_norm(key)
        if self.causal:
            output, state = self._causal(query, key, value, mask, resets, state, mode)
        else:
            output = self._both_ways(query, key, value, mask, resets, mode)
        output = output.transpose(1, 2).flatten(2)
        if self.residual is not None:
            if resets is not None:
                raise ArgumentError(
                    "resets: got packed documents for a mixer with a local residual, expected None: one row is one "
                    "image. Give images as rows of a batch."
                )
            values = value.transpose(1, 2).flatten(2)
            output = output + self.residual(x, values, grid, mask=mask, mode=mode)
        output = self.o_proj(output)
        return (output if mask is None else torch.where(mask[..., None], output, 0.0)), state

    def _causal(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        resets: Tensor | None,
        state: State | None,
        mode: str,
    ) -> tuple[Tensor, State | None]:
        """A call that continues a text does not pass the door: its keys are sums by now and have no weights."""
        output, sums = causal_feature_attention(
            query,
            key,
            value,
            rule=self.rule,
            mask=mask,
            resets=resets,
            sums=None if state is None else state.tensors["sums"],
            block=self.block,
            mode=mode,
        )
        if state is not None and bool(state.seen.any()):
            self.attend.skip()
        else:
            output = self.attend(query, key, value, native=lambda: output, visible=_visible(mask, resets, query, True))
        if state is None:
            return output, None
        _, seen = document_positions((query.shape[0], query.shape[2]), mask, resets, state.seen, query.device)
        return output, State({"sums": sums}, seen)

    def _both_ways(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, resets: Tensor | None, mode: str
    ) -> Tensor:
        if query.shape[2] <= self.head_dim:
            log.debug(
                "%d tokens, head dimension %d: rows cannot tell all queries apart.", query.shape[2], self.head_dim
            )

        def native() -> Tensor:
            if resets is None:
                output = feature_attention(query, key, value, rule=self.rule, mask=mask, mode=mode)
            else:
                output = _document_by_document(query, key, value, self.rule, mask, resets, mode)
            return output if mask is None else torch.where(mask[:, None, :, None], output, 0.0)

        return self.attend(query, key, value, native=native, visible=_visible(mask, resets, query, False))


@register_mixer
class InlineMixer(FeatureMixer):
    """InLine attention: injective for any φ, identity by default; with the local residual where it reads both ways."""

    slug = "inline"
    reads_grid = True


@register_mixer
class LinearMixer(FeatureMixer):
    """Ordinary linear attention, the baseline: divisive, φ = relu, kept finite by a small ε; no local residual."""

    slug = "linear"
    normaliser = "divisive"
    default_feature = "relu"
    default_residual = False


def _visible(
    mask: Tensor | None, resets: Tensor | None, query: Tensor, causal: bool
) -> Bool[Tensor, "#batch 1 tokens tokens"] | None:
    """Which tokens see which, for observers; masked ones see nothing. None where no mask is needed to say it."""
    if mask is None and resets is None:
        return None
    tokens, device = query.shape[2], query.device
    seen = torch.ones(1, 1, tokens, tokens, dtype=torch.bool, device=device)
    seen = seen.tril() if causal else seen
    if mask is not None:
        seen = seen & mask[:, None, None, :] & mask[:, None, :, None]
    if resets is not None:
        document = segment_ids(resets, mask)
        seen = seen & (document[:, None, :, None] == document[:, None, None, :])
    return seen


def _document_by_document(
    query: Tensor, key: Tensor, value: Tensor, rule: Rule, mask: Tensor | None, resets: Tensor, mode: str
) -> Tensor:
    rows = []
    for row, numbers in enumerate(segment_ids(resets, mask)):
        lengths = torch.unique_consecutive(numbers, return_counts=True)[1].tolist()
        pieces = zip(*(x[row : row + 1].split(lengths, 2) for x in (query, key, value)), strict=True)
        masks = [None] * len(lengths) if mask is None else mask[row : row + 1].split(lengths, 1)
        rows.append(
            torch.cat(
                [feature_attention(*x, rule=rule, mask=m, mode=mode) for x, m in zip(pieces, masks, strict=True)], 2
            )
        )
    return torch.cat(rows)
