"""Dense attention: by its formula, in any blocks, in the precision that came."""

from __future__ import annotations

import pytest
import torch

from headway.door import AttentionCall
from headway.errors import EmptyRowError
from headway.kernels.dense import attention_logits, dense_attention, normalise


def parts(*, heads: int = 4, kv_heads: int = 2, queries: int = 5, keys: int = 9, dtype: torch.dtype = torch.float64):
    generator = torch.Generator().manual_seed(0)
    shapes = ((heads, queries), (kv_heads, keys), (kv_heads, keys))
    return tuple(torch.randn(2, h, n, 8, dtype=dtype, generator=generator) for h, n in shapes)


def by_formula(query, key, value, *, scale=8**-0.5, softcap=None, sinks=None):
    """Row by row, in float64: cap, exponentials, the sink in the denominator."""
    out = torch.zeros_like(query)
    offset = key.shape[2] - query.shape[2]
    for head in range(query.shape[1]):
        k, v = key[:, head // 2], value[:, head // 2]
        for i in range(query.shape[2]):
            scores = scale * (k[:, : i + offset + 1] @ query[:, head, i, :, None])[..., 0]
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            weights = scores.exp()
            total = weights.sum(-1, keepdim=True) + (0 if sinks is None else sinks[head].exp())
            out[:, head, i] = ((weights / total)[:, None] @ v[:, : i + offset + 1])[:, 0]
    return out


@pytest.mark.parametrize("options", [{}, {"softcap": 0.7}, {"sinks": torch.tensor([0.3, -1.0, 2.0, 0.0])}])
@pytest.mark.parametrize("block", [1, 3, 128])
def test_it_is_its_formula_in_float64(options, block):
    """1e-12 leaves no room for a step in float32."""
    query, key, value = parts()
    found, lse = dense_attention(query, key, value, causal=True, block=block, **options)
    doubled = {name: x.double() if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    assert found.dtype == lse.dtype == torch.float64
    torch.testing.assert_close(found, by_formula(query, key, value, **doubled), rtol=0, atol=1e-12)


def test_float64_stays_float64_and_half_precision_is_raised():
    query, key, _ = parts()
    bias = torch.randn(1, 1, 5, 9, dtype=torch.float64)
    logits = attention_logits(query, key, scale=1.0, bias=bias)
    assert logits.dtype == torch.float64
    torch.testing.assert_close(logits, query @ key.repeat_interleave(2, 1).mT + bias, rtol=0, atol=1e-12)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert attention_logits(query.to(dtype), key.to(dtype), scale=1.0, bias=bias).dtype == torch.float32


def test_a_call_of_a_float64_host_is_weighed_in_float64():
    query, key, value = parts()
    weights = AttentionCall.from_tensors(query, key, value, causal=True).weights()
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 5, dtype=torch.float64), rtol=0, atol=1e-14)
    out = weights @ value.repeat_interleave(2, 1)
    torch.testing.assert_close(out, by_formula(query, key, value), rtol=0, atol=1e-12)


def test_gradients_are_those_of_finite_differences():
    leaves = [part[:1, :2].clone().requires_grad_() for part in parts(queries=3, keys=4)]
    assert torch.autograd.gradcheck(lambda q, k, v: dense_attention(q, k, v, causal=True)[0], leaves)


def test_a_row_without_a_key_raises_or_is_zero():
    query, key, value = parts()
    mask = torch.ones(1, 1, 5, 9, dtype=torch.bool)
    mask[..., 2, :] = False
    with pytest.raises(EmptyRowError, match="no visible key"):
        dense_attention(query, key, value, mask=mask)
    found, lse = dense_attention(query, key, value, mask=mask, empty_rows="zero")
    assert not found[:, :, 2].any()
    assert bool((lse[:, :, 2] == -torch.inf).all())
    assert found[:, :, 1].any()


def test_normalising_nothing_gives_zeros():
    weights, lse = normalise(torch.full((1, 1, 1, 3), -torch.inf))
    assert not weights.any()
    assert float(lse) == -torch.inf
