"""Block-sparse attention: every form against the boolean mask, over shapes, masks, heads and padding."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headway.errors import ArgumentError
from headway.kernels.block_sparse import Band, block_sparse_attention
from headway.kernels.dense import dense_attention


def _tensors(seed, batch, kv_heads, groups, queries, keys, dim=8, value_dim=8):
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(batch, kv_heads * groups, queries, dim, generator=generator)
    key = torch.randn(batch, kv_heads, keys, dim, generator=generator)
    return query, key, torch.randn(batch, kv_heads, keys, value_dim, generator=generator), generator


CASES = {
    "seed": st.integers(0, 1000),
    "batch": st.integers(1, 2),
    "kv_heads": st.integers(1, 2),
    "groups": st.integers(1, 3),
    "queries": st.integers(1, 21),
    "past": st.integers(0, 9),
    "shift": st.sampled_from([0, 0, -2, 3]),
    "query_block": st.sampled_from([1, 3, 4, 8]),
    "key_block": st.sampled_from([2, 4, 5]),
    "causal": st.booleans(),
    "per": st.sampled_from(["all", "kv", "head"]),
    "masked": st.sampled_from(["none", "padding", "pairs", "heads"]),
    "band": st.sampled_from([None, Band(1, 3), Band(0, 7), Band(5, 1)]),
    "softcap": st.sampled_from([None, 2.0]),
    "learned": st.booleans(),
    "value_dim": st.sampled_from([8, 4]),
}


def _case(
    seed, batch, kv_heads, groups, queries, past, shift, query_block, key_block, causal, per, masked, band, softcap,
    learned, value_dim,
):  # fmt: skip
    keys = queries + past
    query, key, value, generator = _tensors(seed, batch, kv_heads, groups, queries, keys, value_dim=value_dim)
    heads = {"all": 1, "kv": kv_heads, "head": kv_heads * groups}[per]
    shape = (batch, heads, -(-queries // query_block), -(-keys // key_block))
    blocks = torch.rand(shape, generator=generator) > 0.5
    mask = None
    if masked != "none":
        sizes = {
            "padding": (batch, 1, 1, keys),
            "pairs": (1, 1, queries, keys),
            "heads": (batch, kv_heads * groups, queries, keys),
        }
        mask = torch.rand(sizes[masked], generator=generator) > 0.3
    options = {
        "query_block": query_block, "key_block": key_block, "causal": causal, "mask": mask, "band": band,
        "softcap": softcap, "sinks": torch.randn(kv_heads * groups, generator=generator) if learned else None,
        "offset": past + shift if shift else None,
    }  # fmt: skip
    return (query, key, value, blocks), options


@given(**CASES)
@settings(max_examples=150, deadline=None)
def test_gather_equals_masked(**case):
    tensors, options = _case(**case)
    want, want_lse = block_sparse_attention(*tensors, form="masked", **options)
    got, got_lse = block_sparse_attention(*tensors, form="gather", **options)
    torch.testing.assert_close(got, want, atol=2e-5, rtol=0)
    torch.testing.assert_close(got_lse, want_lse, atol=2e-5, rtol=0)


@given(**CASES | {"queries": st.integers(2, 12)})
@settings(max_examples=12, deadline=None)
def test_flex_equals_masked(**case):
    tensors, options = _case(**case)
    want, want_lse = block_sparse_attention(*tensors, form="masked", **options)
    got, got_lse = block_sparse_attention(*tensors, form="flex", **options)
    torch.testing.assert_close(got, want, atol=2e-5, rtol=0)
    torch.testing.assert_close(got_lse, want_lse, atol=2e-5, rtol=0)


@pytest.mark.parametrize("length", [32, 37])
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("per_head", [True, False])
def test_the_causal_diagonal_takes_one_pass(length, groups, per_head, monkeypatch):
    from headway.kernels import block_sparse

    query, key, value, generator = _tensors(1, 2, 2, groups, length, length)
    count = -(-length // 8)
    blocks = torch.rand(2, 2 * groups if per_head else 2, count, count, generator=generator) > 0.5
    blocks |= torch.eye(count, dtype=torch.bool)
    ran = []
    plain = block_sparse._Tiles.with_diagonal
    monkeypatch.setattr(
        block_sparse._Tiles, "with_diagonal", lambda tiles, chosen: ran.append(1) or plain(tiles, chosen)
    )
    options = {"query_block": 8, "key_block": 8, "causal": True}
    got, lse = block_sparse_attention(query, key, value, blocks, form="gather", **options)
    want, want_lse = block_sparse_attention(query, key, value, blocks, form="masked", **options)
    torch.testing.assert_close(got, want, atol=2e-5, rtol=0)
    torch.testing.assert_close(lse, want_lse, atol=2e-5, rtol=0)
    assert ran == [1]


@pytest.mark.parametrize("length", [32, 37])
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("per", ["all", "kv", "head"])
@pytest.mark.parametrize("band", [None, Band(8, 64)])
def test_the_causal_diagonal_runs_apart_where_much_is_selected(length, groups, per, band, monkeypatch):
    """As at 8,192 tokens: one causal batch of diagonal blocks, and the whole blocks merged into it without a mask."""
    from headway.kernels import block_sparse

    query, key, value, generator = _tensors(13, 2, 2, groups, length, length)
    count = -(-length // 8)
    heads = {"all": 1, "kv": 2, "head": 2 * groups}[per]
    blocks = torch.rand(2, heads, count, count, generator=generator) > 0.5
    blocks |= torch.eye(count, dtype=torch.bool)
    ran = []
    for name in ("diagonal", "with_diagonal", "add"):
        plain = getattr(block_sparse._Tiles, name)

        def spy(tiles, *args, plain=plain, name=name, **options):
            ran.append((name, options.get("masked")))
            return plain(tiles, *args, **options)

        monkeypatch.setattr(block_sparse._Tiles, name, spy)
    monkeypatch.setattr(block_sparse, "DIAGONAL_APART_KEYS", 0)
    options = {"query_block": 8, "key_block": 8, "causal": True, "band": band}
    got, lse = block_sparse_attention(query, key, value, blocks, form="gather", **options)
    want, want_lse = block_sparse_attention(query, key, value, blocks, form="masked", **options)
    torch.testing.assert_close(got, want, atol=2e-5, rtol=0)
    torch.testing.assert_close(lse, want_lse, atol=2e-5, rtol=0)
    assert ran == [("diagonal", None), ("add", False)]


def test_all_blocks_are_dense_attention():
    query, key, value, _ = _tensors(2, 2, 2, 2, 19, 23)
    blocks = torch.ones(1, 1, 5, 6, dtype=torch.bool)
    got, lse = block_sparse_attention(query, key, value, blocks, query_block=4, key_block=4, causal=True)
    want, want_lse = dense_attention(query, key, value, causal=True)
    torch.testing.assert_close(got, want, atol=2e-5, rtol=0)
    torch.testing.assert_close(lse, want_lse, atol=2e-5, rtol=0)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("learned", [False, True])
def test_gradients_agree_with_the_reference(softcap, learned):
    query, key, value, generator = _tensors(3, 1, 2, 2, 13, 13)
    sinks = torch.randn(4, generator=generator) if learned else None
    blocks = (torch.rand(1, 4, 4, 4, generator=generator) > 0.5) | torch.eye(4, dtype=torch.bool)
    grads = {}
    for form in ("masked", "gather"):
        leaves = [x.clone().requires_grad_() for x in (query, key, value, *([sinks] if learned else []))]
        options = {"softcap": softcap, "sinks": leaves[3] if learned else None, "causal": True, "form": form}
        out, _ = block_sparse_attention(*leaves[:3], blocks, query_block=4, key_block=4, **options)
        out.square().sum().backward()
        grads[form] = [x.grad for x in leaves]
    for got, want in zip(grads["gather"], grads["masked"], strict=True):
        torch.testing.assert_close(got, want, atol=2e-4, rtol=0)


def test_gradients_are_those_of_finite_differences():
    """Ragged blocks, a choice of each head, shared keys, float64."""
    query, key, value, generator = _tensors(8, 1, 2, 2, 7, 7, dim=3, value_dim=3)
    blocks = (torch.rand(1, 4, 3, 3, generator=generator) > 0.5) | torch.eye(3, dtype=torch.bool)

    def run(*tensors):
        return block_sparse_attention(*tensors, blocks, query_block=3, key_block=3, causal=True, form="gather")[0]

    assert torch.autograd.gradcheck(run, [x.double().requires_grad_() for x in (query, key, value)])


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("diagonal", [False, True])
def test_work_in_many_steps_is_the_same(learned, masked, diagonal, monkeypatch):
    """With room for two items at a time, whatever their number."""
    from headway.kernels import block_sparse

    monkeypatch.setattr(block_sparse.torch, "get_num_threads", lambda: 1)
    query, key, value, generator = _tensors(9, 2, 2, 3, 50, 50)
    blocks = (torch.rand(2, 2, 7, 7, generator=generator) > 0.4) | (torch.eye(7, dtype=torch.bool) & diagonal)
    options = {
        "query_block": 8, "key_block": 8, "causal": True,
        "sinks": torch.randn(6, generator=generator) if learned else None,
        "mask": torch.rand(2, 1, 1, 50, generator=generator) > 0.2 if masked else None,
    }  # fmt: skip
    whole = block_sparse_attention(query, key, value, blocks, form="gather", **options)
    monkeypatch.setattr(block_sparse, "STEP_BYTES", 1)
    steps = []
    plain = block_sparse._Tiles._gathered
    monkeypatch.setattr(block_sparse._Tiles, "_gathered", lambda *args: steps.append(1) or plain(*args))
    by_steps = block_sparse_attention(query, key, value, blocks, form="gather", **options)
    assert len(steps) > 10
    for got, want in zip(by_steps, whole, strict=True):
        torch.testing.assert_close(got, want, atol=2e-5, rtol=0)


def test_blocks_that_no_row_selects_are_never_read():
    """Poisoned, they would show: a mask over dense work would read them."""
    query, key, value, _ = _tensors(10, 1, 2, 2, 61, 61)
    blocks = torch.eye(8, dtype=torch.bool)[None, None].clone()
    blocks[..., 0] = True
    blocks[:, :, 6:, 3] = True
    blocks[:, :, 2] = blocks[:, :, 4] = torch.arange(8) == 0
    options = {"query_block": 8, "key_block": 8, "causal": True, "form": "gather"}
    clean = block_sparse_attention(query, key, value, blocks, **options)
    for x in (key, value):
        x[:, :, 16:24] = x[:, :, 32:40] = torch.nan
    for got, want in zip(block_sparse_attention(query, key, value, blocks, **options), clean, strict=True):
        assert torch.equal(got, want)


def test_keys_of_grouped_heads_are_never_repeated(monkeypatch):
    from headway.kernels.gathered import gathered_attention

    repeated = []
    plain = torch.Tensor.repeat_interleave

    def spy(x, *args, **kwargs):
        repeated.append(x.is_floating_point())
        return plain(x, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "repeat_interleave", spy)
    query, key, value, generator = _tensors(11, 1, 2, 3, 32, 32)
    for heads in (1, 2, 6):
        blocks = (torch.rand(1, heads, 4, 4, generator=generator) > 0.5) | torch.eye(4, dtype=torch.bool)
        for form in ("masked", "gather"):
            block_sparse_attention(query, key, value, blocks, query_block=8, key_block=8, causal=True, form=form)
        index = torch.randint(0, 32, (1, heads, 4, 6), generator=generator)
        gathered_attention(query, key, value, index, query_block=8)
    assert repeated
    assert not any(repeated)


def test_the_form_on_a_cpu_is_the_gathered_one():
    query, key, value, generator = _tensors(12, 1, 2, 2, 32, 32)
    blocks = (torch.rand(1, 4, 4, 4, generator=generator) > 0.5) | torch.eye(4, dtype=torch.bool)
    options = {"query_block": 8, "key_block": 8, "causal": True}
    auto, gather = (block_sparse_attention(query, key, value, blocks, form=f, **options) for f in ("auto", "gather"))
    assert torch.equal(auto[0], gather[0])


def test_bfloat16_stays_near_float32():
    query, key, value, generator = _tensors(4, 1, 2, 2, 32, 32)
    blocks = (torch.rand(1, 4, 4, 4, generator=generator) > 0.4) | torch.eye(4, dtype=torch.bool)
    options = {"query_block": 8, "key_block": 8, "causal": True}
    want, _ = block_sparse_attention(query, key, value, blocks, form="masked", **options)
    got, lse = block_sparse_attention(*(x.bfloat16() for x in (query, key, value)), blocks, form="gather", **options)
    assert got.dtype == torch.bfloat16
    assert lse.dtype == torch.float32
    torch.testing.assert_close(got.float(), want, atol=0.03, rtol=0)


def test_rows_without_a_block_give_zeros():
    query, key, value, _ = _tensors(5, 1, 1, 1, 8, 8)
    blocks = torch.tensor([[[[True, False], [False, False]]]])
    for form in ("masked", "gather"):
        out, lse = block_sparse_attention(query, key, value, blocks, query_block=4, key_block=4, form=form)
        assert bool((out[:, :, 4:] == 0).all())
        assert bool((lse[:, :, 4:] == -torch.inf).all())
        assert bool((out[:, :, :4] != 0).any())


def test_heads_share_keys_without_copies_of_them():
    """Grouped heads that select alike gather their keys once: a third of the copies of heads that do not."""
    from headway.kernels import block_sparse

    copied = []
    plain = block_sparse._Tiles._copy

    def count(self, which, x, index):
        copied.append(index.numel())
        return plain(self, which, x, index)

    query, key, value, generator = _tensors(6, 1, 2, 3, 64, 64)
    blocks = (torch.rand(1, 2, 8, 8, generator=generator) > 0.5) | torch.eye(8, dtype=torch.bool)
    totals = {}
    for name, chosen in (("shared", blocks), ("per head", blocks.repeat_interleave(3, 1))):
        copied.clear()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(block_sparse._Tiles, "_copy", count)
            block_sparse_attention(query, key, value, chosen, query_block=8, key_block=8, causal=True, form="gather")
        totals[name] = sum(copied)
    assert totals["per head"] == 3 * totals["shared"] > 0


def test_bad_arguments_are_named():
    query, key, value, _ = _tensors(7, 1, 1, 1, 8, 8)
    blocks = torch.ones(1, 1, 2, 2, dtype=torch.bool)
    with pytest.raises(ArgumentError, match="form"):
        block_sparse_attention(query, key, value, blocks, query_block=4, key_block=4, form="fast")
    with pytest.raises(ArgumentError, match=r"blocks: got torch.bool of shape \(1, 1, 2, 2\)"):
        block_sparse_attention(query, key, value, blocks, query_block=4, key_block=8)
    with pytest.raises(ArgumentError, match="at least 1 token"):
        block_sparse_attention(query, key, value, blocks, query_block=0, key_block=4)
