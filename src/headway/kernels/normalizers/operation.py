"""Attention with any weights: one operation as a record, its explicit form in blocks of rows, and its fused forms.

    explicit   w = weighing(scale·q·k + bias) ,   o_i = Σ_j w_ij v_j          any rule
    fused      softmax over the keys and one extra column                     wherever the algebra allows

The explicit form holds block × keys weights at a time, and all of them where a gradient is wanted.

The extra column is a key of its own: with a value of zero it takes mass from the row (softmax+1, a learned denominator,
a key slot). A logit that depends on the head alone is written into one more feature, b/scale at the query and 1 at the
extra key. Where the mass of the row is asked for, values get one more column of ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from headway.kernels.dense import check_heads, grouped_scores, grouped_values
from headway.kernels.normalizers.softmax_family import softmax_weights, wide
from headway.kernels.streaming import streaming_attention
from headway.kernels.weighing import Weighing

#: Query rows per block of the explicit form.
ROWS = 128


@dataclass(frozen=True, kw_only=True)
class Operation:
    """One attention operation. `visible=None` means that row i sees keys up to i (`causal`, as many keys as rows), or
    that every row sees every key. `window` is the number of keys a causal row sees at most, said only where `visible`
    is None. `value_mean` is the mean of the values that each row sees, where the caller keeps a running sum."""

    query: Float[Tensor, "batch heads queries dim"]
    key: Float[Tensor, "batch kv_heads keys dim"]
    value: Float[Tensor, "batch kv_heads keys value_dim"]
    scale: float
    causal: bool = False
    visible: Bool[Tensor, "#batch #heads queries keys"] | None = None
    bias: Float[Tensor, "#batch #heads queries keys"] | None = None
    window: int | None = None
    value_mean: Float[Tensor, "batch kv_heads queries value_dim"] | None = None

    @property
    def offset(self) -> int:
        """The key index of row 0."""
        return self.key.shape[2] - self.query.shape[2]

    def seen(
        self, start: int = 0, stop: int | None = None, columns: slice = slice(None)
    ) -> Bool[Tensor, "#batch #heads rows keys"]:
        """Which keys the rows start … stop−1 see, of those in `columns`."""
        stop = self.query.shape[2] if stop is None else stop
        if self.visible is not None:
            return self.visible[:, :, start:stop, columns]
        places = torch.arange(self.key.shape[2], device=self.query.device)[columns]
        rows = torch.arange(start, stop, device=self.query.device)[:, None] + self.offset
        seen = places <= rows if self.causal else torch.ones_like(places <= rows)
        if self.window is not None:
            seen = seen & (rows - places < self.window)
        return seen[None, None]

    def logits(
        self, start: int = 0, stop: int | None = None, columns: slice = slice(None)
    ) -> Float[Tensor, "batch heads rows keys"]:
        """scale·q·k + bias of these rows in float32 or better, hidden keys included."""
        rows = slice(start, self.query.shape[2] if stop is None else stop)
        scores = grouped_scores(wide(self.query[:, :, rows]), wide(self.key[:, :, columns])) * self.scale
        return scores if self.bias is None else scores + self.bias[:, :, rows, columns].to(scores.dtype)

    def columns(self, start: int, stop: int) -> slice:
        """The keys outside of which the rows start … stop−1 see nothing."""
        if self.visible is not None or not self.causal:
            return slice(0, self.key.shape[2])
        low = 0 if self.window is None else max(start + self.offset + 1 - self.window, 0)
        return slice(low, stop + self.offset)


def softmax_weighing(
    logits: Tensor, visible: Tensor, *, positions: Tensor, query: Tensor, key: Tensor
) -> Float[Tensor, "batch heads rows keys"]:
    """The softmax as a weighing."""
    return softmax_weights(logits, visible)


def explicit_attention(
    call: Operation, weighing: Weighing | None = None, *, block: int = ROWS
) -> tuple[Float[Tensor, "batch heads queries value_dim"], Float[Tensor, "batch heads queries"]]:
    """Σ_j w_ij v_j and Σ_j w_ij from explicit weights, `block` rows at a time (0: all at once). None is softmax."""
    weigh = softmax_weighing if weighing is None else weighing
    queries = call.query.shape[2]
    outputs, masses = [], []
    for start in range(0, queries, block or max(queries, 1)):
        stop = min(start + (block or queries), queries)
        near = call.columns(start, stop)
        weights = weigh(
            call.logits(start, stop, near),
            call.seen(start, stop, near),
            positions=torch.arange(start, stop, device=call.query.device) + call.offset,
            query=call.query[:, :, start:stop],
            key=call.key[:, :, near],
        )
        outputs.append(grouped_values(weights, wide(call.value[:, :, near])))
        masses.append(weights.sum(-1))
    return torch.cat(outputs, 2).to(call.value.dtype), torch.cat(masses, 2)


def fused_softmax(call: Operation) -> Float[Tensor, "batch heads queries value_dim"]:
    """Softmax attention by the platform's kernel. A row that sees nothing gives finite numbers of no meaning."""
    if call.window is not None:
        return streaming_attention(call.query, call.key, call.value, sinks=0, reach=call.window - 1, scale=call.scale)
    return _sdpa(call.query, call.key, call.value, call.scale, call.causal, _mask(call))


def fused_with_column(
    call: Operation,
    *,
    logit: Float[Tensor, " heads"] | None = None,
    key: Float[Tensor, "kv_heads dim"] | None = None,
    mass: bool = False,
) -> tuple[Float[Tensor, "batch heads queries value_dim"], Float[Tensor, "batch heads queries"] | None]:
    """Softmax with one extra column whose logit is `logit` of the head, or scale·q·`key`, and whose value is zero.

    With `mass` also the sum of the weights on real keys. Every row sees the column, so none is empty."""
    check_heads(call.query, call.key)
    query, keys, values = call.query, call.key, call.value
    batch, kv_heads, _, dim = keys.shape
    slot = keys.new_zeros(kv_heads, dim) if key is None else key.to(keys.dtype)
    keys = torch.cat([slot[None, :, None].expand(batch, -1, -1, -1), keys], 2)
    values = pad(values, (0, 0, 1, 0))
    if logit is not None or mass:
        feature = query.new_zeros(query.shape[1]) if logit is None else (logit / call.scale).to(query.dtype)
        query = torch.cat([query, feature[None, :, None, None].expand(batch, -1, query.shape[2], 1)], -1)
        keys = torch.cat([keys, _indicator(keys, at_slot=True)], -1)
        values = torch.cat([values, _indicator(values, at_slot=False)], -1)
    hidden = _mask(call)
    if hidden is not None:
        hidden = pad(hidden, (1, 0), value=True) if hidden.dtype == torch.bool else pad(hidden, (1, 0))
        output = _sdpa(query, keys, values, call.scale, False, hidden)
    elif call.causal:
        output = _sdpa(pad(query, (0, 0, 1, 0)), keys, values, call.scale, True, None)[:, :, 1:]
    else:
        output = _sdpa(query, keys, values, call.scale, False, None)
    if logit is None and not mass:
        return output, None
    return output[..., :-1], output[..., -1] if mass else None


def visible_count(call: Operation) -> Float[Tensor, "#batch #heads queries 1"]:
    """How many keys each row sees."""
    queries, keys = call.query.shape[2], call.key.shape[2]
    if call.visible is not None:
        return call.visible.sum(-1, keepdim=True).float()
    count = torch.full((queries,), float(keys), device=call.query.device)
    if call.causal:
        count = torch.arange(1, queries + 1, device=call.query.device).float() + call.offset
    return count.clamp(max=call.window or keys)[None, None, :, None]


def visible_mean(call: Operation) -> Float[Tensor, "batch kv_heads queries value_dim"]:
    """The mean of the values that each row sees, in float32 or better; zeros for a row that sees nothing.

    Running sums where `visible` is not given, so O(keys); else one product with the mask."""
    if call.value_mean is not None:
        return call.value_mean
    values = wide(call.value)
    if call.visible is not None:
        seen = call.visible.to(values.dtype)
        return (seen @ values) / seen.sum(-1, keepdim=True).clamp(min=1)
    if not call.causal:
        return values.mean(2, keepdim=True).expand(-1, -1, call.query.shape[2], -1)
    sums = values.cumsum(2)
    if call.window is not None:
        sums = sums - pad(sums, (0, 0, call.window, 0))[:, :, : values.shape[2]]
    return sums / visible_count(call).to(values.dtype)


def _indicator(x: Tensor, *, at_slot: bool) -> Tensor:
    """One more feature that is 1 at the extra key and 0 elsewhere, or the other way round."""
    column = x.new_zeros(*x.shape[:3], 1) if at_slot else x.new_ones(*x.shape[:3], 1)
    column[:, :, 0] = 1.0 if at_slot else 0.0
    return column


def _mask(call: Operation) -> Tensor | None:
    """The mask of the kernel: boolean, or the bias with −∞ at hidden keys. None where `causal` says it all."""
    if call.visible is None and call.bias is None and call.window is None:
        return None
    seen = call.seen()
    seen = seen | ~seen.any(-1, keepdim=True)
    if call.bias is None:
        return seen
    return call.bias.masked_fill(~seen, -torch.inf)


def _sdpa(query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool, mask: Tensor | None) -> Tensor:
    """The platform's kernel. Half precision with a bias runs in float32: a rounded bias would be another one."""
    dtype = value.dtype
    if mask is not None and mask.dtype != torch.bool:
        work = torch.promote_types(query.dtype, torch.float32)
        query, key, value, mask = query.to(work), key.to(work), value.to(work), mask.to(work)
    grouped = query.shape[1] != key.shape[1]
    output = scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=causal and mask is None, scale=scale, enable_gqa=grouped
    )
    return output.to(dtype)
