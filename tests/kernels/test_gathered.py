"""Attention over listed keys against the boolean mask, over shapes, lists, masks, heads and places in a sequence."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headway.door import Keys
from headway.errors import ArgumentError
from headway.kernels import gathered
from headway.kernels.dense import dense_attention
from headway.kernels.gathered import gathered_attention, unique_keys


def tensors(seed, batch, kv_heads, groups, queries, keys, value_dim=8):
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(batch, kv_heads * groups, queries, 8, generator=generator)
    key = torch.randn(batch, kv_heads, keys, 8, generator=generator)
    return query, key, torch.randn(batch, kv_heads, keys, value_dim, generator=generator), generator


@given(
    seed=st.integers(0, 1000),
    batch=st.integers(1, 2),
    kv_heads=st.integers(1, 2),
    groups=st.integers(1, 3),
    queries=st.integers(1, 13),
    past=st.integers(0, 6),
    shift=st.sampled_from([0, 0, -2, 3]),
    size=st.sampled_from([None, 1, 3, 4]),
    per=st.sampled_from(["all", "kv", "head"]),
    each=st.booleans(),
    causal=st.booleans(),
    masked=st.sampled_from(["none", "padding", "pairs", "heads"]),
    softcap=st.sampled_from([None, 3.0]),
    learned=st.booleans(),
    value_dim=st.sampled_from([8, 5]),
)
@settings(max_examples=150, deadline=None)
def test_listed_keys_equal_the_mask(
    seed, batch, kv_heads, groups, queries, past, shift, size, per, each, causal, masked, softcap, learned, value_dim
):  # fmt: skip
    """Keys are drawn with repetition, fill stands anywhere, and `each` sequence may have lists of its own."""
    keys, heads = queries + past, kv_heads * groups
    query, key, value, generator = tensors(seed, batch, kv_heads, groups, queries, keys, value_dim)
    lists = 1 if size is None else -(-queries // size)
    shape = (batch if each else 1, {"all": 1, "kv": kv_heads, "head": heads}[per], lists, 5)
    index = torch.randint(0, keys, shape, generator=generator)
    valid = torch.rand(shape, generator=generator) > 0.3
    mask = None
    if masked != "none":
        sizes = {"padding": (batch, 1, 1, keys), "pairs": (1, 1, queries, keys), "heads": (batch, heads, queries, keys)}
        mask = torch.rand(sizes[masked], generator=generator) > 0.3
    common = {
        "causal": causal, "softcap": softcap, "offset": past + shift if shift else None,
        "sinks": torch.randn(heads, generator=generator) if learned else None,
    }  # fmt: skip
    chosen = Keys(index, valid, size).to_bool(queries, keys)
    chosen = chosen if chosen.shape[1] in (1, heads) else chosen.repeat_interleave(groups, 1)
    want, want_lse = dense_attention(
        query, key, value, mask=chosen if mask is None else chosen & mask, empty_rows="zero", **common
    )
    got, lse = gathered_attention(query, key, value, index, valid, query_block=size, mask=mask, **common)
    torch.testing.assert_close(got, want, atol=2e-5, rtol=0)
    torch.testing.assert_close(lse, want_lse, atol=2e-5, rtol=0)


def test_work_in_many_steps_is_the_same(monkeypatch):
    """With room for two lists at a time. Lists differ in length, and name keys twice in their middle."""
    monkeypatch.setattr(gathered.torch, "get_num_threads", lambda: 1)
    query, key, value, generator = tensors(0, 2, 2, 2, 40, 40)
    index = torch.randint(0, 40, (2, 4, 10, 12), generator=generator).sort(-1).values
    index[..., 4:6] = index[..., 3:4]
    valid = torch.arange(12) < torch.randint(1, 13, (2, 4, 10, 1), generator=generator)
    whole = gathered_attention(query, key, value, index, valid, query_block=4, causal=True)
    monkeypatch.setattr(gathered, "STEP_BYTES", 1)
    widths = []
    plain = gathered.fused_attention
    monkeypatch.setattr(
        gathered, "fused_attention", lambda q, k, v, **o: widths.append(k.shape[2]) or plain(q, k, v, **o)
    )
    by_steps = gathered_attention(query, key, value, index, valid, query_block=4, causal=True)
    assert len(widths) == 40
    assert min(widths) < max(widths) <= 12
    for got, want in zip(by_steps, whole, strict=True):
        torch.testing.assert_close(got, want, atol=2e-5, rtol=0)


def test_heads_that_read_the_same_keys_share_one_copy(monkeypatch):
    """Six query heads on two key heads: two items, of three heads' rows each, without a mask where nothing hides."""
    query, key, value, _ = tensors(4, 1, 2, 3, 1, 20)
    index = torch.tensor([[0, 4, 5, 19], [2, 3, 11, 12]]).view(1, 2, 1, 4)
    seen = []
    plain = gathered.fused_attention
    monkeypatch.setattr(
        gathered,
        "fused_attention",
        lambda q, k, v, **o: seen.append((q.shape, k.shape, o["mask"])) or plain(q, k, v, **o),
    )
    got, _ = gathered_attention(query, key, value, index, query_block=1)
    assert seen == [((2, 1, 3, 8), (2, 1, 4, 8), None)]
    chosen = torch.zeros(1, 6, 1, 20, dtype=torch.bool).scatter_(3, index.repeat_interleave(3, 1), True)
    torch.testing.assert_close(got, dense_attention(query, key, value, mask=chosen)[0], atol=2e-5, rtol=0)


def test_lists_in_order_are_left_as_they_are():
    index = torch.tensor([[[[1, 4, 9, 7, 7]]]])
    valid = torch.tensor([[[[True, True, True, False, False]]]])
    ordered, real = unique_keys(index, valid, 10)
    assert ordered[real].tolist() == [1, 4, 9]
    assert torch.equal(real, valid)
    for broken in ([1, 4, 4, 9], [4, 1, 9, 9]):
        ordered, real = unique_keys(torch.tensor(broken).view(1, 1, 1, -1), None, 10)
        assert ordered[real].tolist() == [1, 4, 9]


def test_keys_that_no_list_names_are_never_read():
    query, key, value, _ = tensors(1, 1, 2, 2, 12, 30)
    index = torch.tensor([0, 3, 3, 17, 29]).expand(1, 1, 3, 5)
    clean = gathered_attention(query, key, value, index, query_block=4)
    others = [place for place in range(30) if place not in (0, 3, 17, 29)]
    key[:, :, others] = value[:, :, others] = torch.nan
    for got, want in zip(gathered_attention(query, key, value, index, query_block=4), clean, strict=True):
        assert torch.equal(got, want)


def test_a_key_that_is_listed_twice_counts_once():
    query, key, value, _ = tensors(2, 1, 1, 1, 1, 6)
    twice, once = (
        gathered_attention(query, key, value, torch.tensor(i).view(1, 1, 1, -1)) for i in ([4, 1, 4, 4], [1, 4])
    )
    torch.testing.assert_close(twice, once)
    index, valid = unique_keys(torch.tensor([[[[4, 1, 4, 4]]]]), None, 6)
    assert sorted(index[valid].tolist()) == [1, 4]


def test_gradients_are_those_of_finite_differences():
    query, key, value, generator = tensors(3, 1, 2, 2, 5, 6)
    index = torch.randint(0, 6, (1, 4, 3, 4), generator=generator)
    index[..., 0] = 0
    parts = [x[..., :3].double().clone().requires_grad_() for x in (query, key, value)]
    assert torch.autograd.gradcheck(
        lambda *given: gathered_attention(*given, index, query_block=2, causal=True)[0], parts
    )


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_gradients_agree_with_the_reference(learned, softcap):
    query, key, value, generator = tensors(6, 1, 2, 2, 13, 13)
    index = torch.randint(0, 13, (1, 4, 4, 5), generator=generator)
    index[..., 0] = 0
    sinks = torch.randn(4, generator=generator)
    mask = Keys(index, None, 4).to_bool(13, 13)
    grads = []
    for listed in (True, False):
        leaves = [x.clone().requires_grad_() for x in (query, key, value, sinks)]
        options = {"softcap": softcap, "sinks": leaves[3] if learned else None, "causal": True}
        if listed:
            out, _ = gathered_attention(*leaves[:3], index, query_block=4, **options)
        else:
            out, _ = dense_attention(*leaves[:3], mask=mask, **options)
        out.square().sum().backward()
        grads.append([x.grad for x in leaves[: 4 if learned else 3]])
    for got, want in zip(*grads, strict=True):
        torch.testing.assert_close(got, want, atol=2e-4, rtol=0)


def test_bfloat16_stays_near_float32():
    query, key, value, generator = tensors(4, 1, 2, 2, 16, 64)
    index = torch.randint(0, 64, (1, 2, 4, 20), generator=generator)
    want, _ = gathered_attention(query, key, value, index, query_block=4)
    got, lse = gathered_attention(*(x.bfloat16() for x in (query, key, value)), index, query_block=4)
    assert (got.dtype, lse.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(got.float(), want, atol=0.03, rtol=0)


@pytest.mark.parametrize("shape", [(3, 1, 1, 4), (1, 3, 1, 4), (1, 1, 1, 0)])
def test_lists_for_other_heads_or_sequences_or_of_nothing_are_named(shape):
    query, key, value, _ = tensors(5, 2, 2, 2, 3, 8)
    with pytest.raises(ArgumentError, match=r"index: got shape .* one of \(1, 2, 4\)"):
        gathered_attention(query, key, value, torch.zeros(shape, dtype=torch.long))
