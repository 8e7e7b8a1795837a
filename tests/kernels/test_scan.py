"""The three forms of the causal scan agree, outputs and gradients, however it is cut, padded or packed."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headway.errors import ArgumentError
from headway.kernels.scan import MODES, causal_scan
from headway.kernels.scan_blocks import scan_blocks

TIGHT = {"rtol": 1e-10, "atol": 1e-10}


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def inputs(batch=2, heads=3, tokens=21, dim=5, value_dim=4, seed=0, dtype=torch.float64):
    shapes = [(dim,), (dim,), (value_dim,)]
    return [draw(batch, heads, tokens, *shape, seed=seed + i, dtype=dtype) for i, shape in enumerate(shapes)]


SLOPES = torch.tensor([0.0, 0.3, 1.7])


def chance(share: float, *shape: int, seed: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) < share


def everything(mode: str, block: int, q, k, v, state, **options):
    """Outputs, final state, and all gradients of a loss of both."""
    leaves = [x.clone().requires_grad_() for x in (q, k, v, state)]
    out, final = causal_scan(*leaves[:3], SLOPES, state=leaves[3], scale=0.7, mode=mode, block=block, **options)
    loss = (out * draw(*out.shape, seed=91)).sum() + (final * draw(*final.shape, seed=92)).sum()
    return [out, final, *torch.autograd.grad(loss, leaves)]


@given(
    tokens=st.integers(1, 40),
    block=st.sampled_from([1, 2, 3, 8, 16, 64]),
    real=st.sampled_from([None, 0.0, 0.5, 0.9]),
    opens=st.sampled_from([None, 0.1, 0.6]),
    seed=st.integers(0, 50),
)
@settings(max_examples=60, deadline=None)
def test_three_forms_agree_with_their_gradients(tokens, block, real, opens, seed):
    q, k, v = inputs(tokens=tokens, seed=seed)
    mask = None if real is None else chance(real, 2, tokens, seed=seed)
    resets = None if opens is None else chance(opens, 2, tokens, seed=seed + 1)
    state = draw(2, 3, 5, 4, seed=seed + 7)
    reference = everything("reference", block, q, k, v, state, mask=mask, resets=resets)
    for mode in ("step", "block"):
        for got, expected in zip(
            everything(mode, block, q, k, v, state, mask=mask, resets=resets), reference, strict=True
        ):
            torch.testing.assert_close(got, expected, **TIGHT)


@pytest.mark.parametrize("tile", [8, 16, 32, 1024])
@pytest.mark.parametrize("padded", [False, True])
def test_the_size_of_a_tile_changes_nothing(tile, padded):
    """Tiles of one head, of several heads, and of several batch rows."""
    q, k, v = (x.requires_grad_() for x in inputs(batch=3, tokens=27))
    state = draw(3, 3, 5, 4, seed=8)
    mask = chance(0.8, 3, 27, seed=2) if padded else None
    resets = chance(0.1, 3, 27, seed=3) & mask if padded else None
    if padded:
        q, k, v = (torch.where(mask[:, None, :, None], x, 0) for x in (q, k, v))
    found = []
    for size in (tile, 4096):
        out, final = scan_blocks(q, k, v, SLOPES, state, mask=mask, resets=resets, block=4, tile=size)
        found.append([out, final, *torch.autograd.grad(out.pow(2).sum() + final.sum(), (q, k, v), retain_graph=True)])
    for got, expected in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, **TIGHT)


def test_float32_is_within_a_ten_thousandth():
    exact = everything("reference", 64, *inputs(tokens=300), draw(2, 3, 5, 4, seed=4))
    single = inputs(tokens=300, dtype=torch.float32)
    got = everything("block", 64, *single, draw(2, 3, 5, 4, seed=4, dtype=torch.float32))
    for one, other in zip(got, exact, strict=True):
        assert float((one.double() - other).norm() / other.norm()) < 1e-4


def test_gradients_by_finite_differences():
    q, k, v = (x.requires_grad_() for x in inputs(batch=1, tokens=7, dim=2, value_dim=3))
    state = draw(1, 3, 2, 3, seed=5).requires_grad_()
    mask = torch.tensor([[True, True, False, True, True, True, True]])
    resets = torch.tensor([[False, False, False, False, True, False, False]])
    for options in ({}, {"mask": mask, "resets": resets}):
        assert torch.autograd.gradcheck(
            lambda q, k, v, s, o=options: causal_scan(q, k, v, SLOPES, state=s, block=3, **o), (q, k, v, state)
        )


def test_without_decay_it_is_the_lower_triangle_of_the_products():
    q, k, v = inputs()
    expected = (q @ k.transpose(-1, -2)).tril() @ v
    for mode in MODES:
        for slopes in (None, torch.zeros(3)):
            torch.testing.assert_close(causal_scan(q, k, v, slopes, mode=mode, block=4)[0], expected, **TIGHT)


def test_with_infinite_decay_a_token_reads_itself():
    q, k, v = inputs()
    expected = (q * k).sum(-1, keepdim=True) * v
    for mode in MODES:
        got = causal_scan(q, k, v, torch.full((3,), math.inf), mode=mode, block=4)[0]
        torch.testing.assert_close(got, expected, **TIGHT)


def test_a_written_token_is_read_with_the_decay_of_its_distance():
    key, value = torch.zeros(1, 1, 50, 2), torch.zeros(1, 1, 50, 1)
    key[0, 0, 3, 0], value[0, 0, 3, 0] = 1.0, 5.0
    query = torch.tensor([1.0, 0.0]).expand(1, 1, 50, 2)
    expected = torch.where(torch.arange(50) < 3, 0.0, 5 * torch.exp(-0.1 * (torch.arange(50) - 3.0)))
    for mode in MODES:
        out, state = causal_scan(query, key, value, torch.tensor([0.1]), mode=mode, block=8)
        torch.testing.assert_close(out[0, 0, :, 0], expected)
        torch.testing.assert_close(state[0, 0, 0, 0], expected[-1])


@given(cuts=st.lists(st.integers(0, 25), max_size=3), seed=st.integers(0, 20))
@settings(max_examples=25, deadline=None)
def test_any_split_with_a_carried_state_is_one_call(cuts, seed):
    q, k, v = inputs(tokens=25, seed=seed)
    mask, resets = chance(0.8, 2, 25, seed=seed), chance(0.1, 2, 25, seed=seed + 1)
    whole, end = causal_scan(q, k, v, SLOPES, mask=mask, resets=resets, block=4)
    state, parts = None, []
    for start, stop in itertools.pairwise((0, *sorted(cuts), 25)):
        part = slice(start, stop)
        options = {"mask": mask[:, part], "resets": resets[:, part], "state": state, "block": 4}
        out, state = causal_scan(q[:, :, part], k[:, :, part], v[:, :, part], SLOPES, **options)
        parts.append(out)
    torch.testing.assert_close(torch.cat(parts, 2), whole, **TIGHT)
    torch.testing.assert_close(state, end, **TIGHT)


@pytest.mark.parametrize("mode", MODES)
def test_padding_is_no_step(mode):
    """Interior padding too: the state behind equals that of the real tokens alone, which zeroed values do not give."""
    q, k, v = inputs(tokens=30)
    mask = chance(0.5, 2, 30, seed=5)
    hidden = [torch.where(mask[:, None, :, None], x, torch.nan) for x in (q, k, v)]
    out, state = causal_scan(*hidden, SLOPES, mask=mask, mode=mode, block=8)
    assert not bool(out.transpose(1, 2)[~mask].any())
    for row in range(2):
        alone = [x[row : row + 1, :, mask[row]] for x in (q, k, v)]
        expected, end = causal_scan(*alone, SLOPES, mode="reference")
        torch.testing.assert_close(out[row : row + 1, :, mask[row]], expected, **TIGHT)
        torch.testing.assert_close(state[row : row + 1], end, **TIGHT)


@pytest.mark.parametrize("mode", MODES)
def test_nothing_real_leaves_the_state(mode):
    state = draw(2, 3, 5, 4, seed=3)
    nothing = torch.zeros(2, 21, dtype=torch.bool)
    _, after = causal_scan(*inputs(), SLOPES, state=state, mask=nothing, mode=mode, block=4)
    torch.testing.assert_close(after, state, rtol=0, atol=0)


@pytest.mark.parametrize("mode", MODES)
def test_a_later_token_changes_no_bit_of_an_earlier_row(mode):
    q, k, v = inputs(tokens=40, dtype=torch.float32)
    before = causal_scan(q, k, v, SLOPES, mode=mode, block=8)[0]
    for x in (q, k, v):
        changed = [y.clone() if y is x else y for y in (q, k, v)]
        next(c for c, y in zip(changed, (q, k, v), strict=True) if y is x)[:, :, 19] += 100.0
        after = causal_scan(*changed, SLOPES, mode=mode, block=8)[0]
        assert torch.equal(after[:, :, :19], before[:, :, :19])
        assert not torch.equal(after[:, :, 19], before[:, :, 19])


@pytest.mark.parametrize("mode", MODES)
def test_it_is_linear_in_the_values(mode):
    q, k, v = inputs()
    other = draw(*v.shape, seed=44)
    parts = [causal_scan(q, k, x, SLOPES, mode=mode, block=4)[0] for x in (v, other, 2 * v + 3 * other)]
    torch.testing.assert_close(parts[2], 2 * parts[0] + 3 * parts[1], **TIGHT)


@pytest.mark.parametrize("mode", MODES)
def test_rows_of_a_batch_do_not_meet(mode):
    q, k, v = inputs()
    turned = causal_scan(*(x.flip(0) for x in (q, k, v)), SLOPES, mode=mode, block=4)[0]
    torch.testing.assert_close(turned.flip(0), causal_scan(q, k, v, SLOPES, mode=mode, block=4)[0], **TIGHT)


@pytest.mark.parametrize("mode", MODES)
def test_no_tokens_leave_the_state(mode):
    state = draw(2, 3, 5, 4, seed=3)
    out, after = causal_scan(*inputs(tokens=0), SLOPES, state=state, mode=mode)
    assert out.shape == (2, 3, 0, 4)
    assert torch.equal(after, state)


@pytest.mark.parametrize("mode", MODES)
def test_the_given_state_is_not_changed(mode):
    state = draw(2, 3, 5, 4, seed=3)
    kept = state.clone()
    causal_scan(*inputs(), SLOPES, state=state, mode=mode, block=4)
    assert torch.equal(state, kept)


def test_a_short_tail_leaves_no_row_unwritten(monkeypatch):
    """A kernel of the released code gave back memory it never wrote for lengths below its block."""
    make = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **o: make(*a, **o).fill_(torch.nan))
    for tokens in (2, 5, 63, 65, 130):
        q, k, v = inputs(tokens=tokens)
        for expected, got in zip(causal_scan(q, k, v, mode="reference"), causal_scan(q, k, v), strict=True):
            torch.testing.assert_close(got, expected, **TIGHT)


@pytest.mark.parametrize(("dim", "value_dim"), [(1, 7), (192, 3), (6, 80)])
def test_any_head_size(dim, value_dim):
    q, k, v = inputs(batch=1, tokens=70, dim=dim, value_dim=value_dim)
    expected = causal_scan(q, k, v, SLOPES, mode="reference")[0]
    torch.testing.assert_close(causal_scan(q, k, v, SLOPES)[0], expected, **TIGHT)


def test_heads_behind_tokens_in_memory_are_read_as_they_are():
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs(tokens=1500))
    expected = causal_scan(*(x.contiguous() for x in (q, k, v)), SLOPES)[0]
    torch.testing.assert_close(causal_scan(q, k, v, SLOPES)[0], expected, **TIGHT)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_keeps_a_wide_state(dtype):
    """Without decay the state grows with the length: beyond what float16 can hold, here."""
    ones = torch.ones(1, 1, 70_000, 1, dtype=dtype)
    out, state = causal_scan(ones * 0.001, ones, ones)
    assert out.dtype == dtype
    assert state.dtype == torch.float32
    assert float(state[0, 0, 0, 0]) == 70_000.0
    assert float(out[0, 0, -1, 0]) == pytest.approx(70.0, rel=1e-2)


def test_autocast_does_not_narrow_the_sums():
    q, k, v = (x.requires_grad_() for x in inputs(tokens=40, dtype=torch.float32))
    expected = causal_scan(q, k, v, SLOPES)[0]
    gradients = torch.autograd.grad(expected.sum(), (q, k, v))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = causal_scan(q, k, v, SLOPES)[0]
        found = torch.autograd.grad(out.sum(), (q, k, v))
    assert torch.equal(out, expected)
    assert all(torch.equal(one, other) for one, other in zip(found, gradients, strict=True))


def test_what_is_kept_for_the_backward_pass_grows_with_the_tokens_alone():
    """O(n (d + e)): the blocks' states, n·d·e / B numbers, are recomputed and not kept."""
    kept = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    sizes = []
    for tokens in (2048, 4096):
        kept.clear()
        q, k, v = (x.requires_grad_() for x in inputs(batch=1, heads=3, tokens=tokens, dim=32, value_dim=32))
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            causal_scan(q, k, v, SLOPES, block=16)
        sizes.append(sum(kept.values()) / (3 * tokens * 8))
    assert sizes[0] == pytest.approx(sizes[1], rel=0.05)
    assert sizes[1] < 1.1 * (3 * 32)


class TestBadInput:
    def run(self, **changes):
        q, k, v = inputs()
        arguments = {"query": q, "key": k, "value": v, "slopes": SLOPES} | changes
        return causal_scan(**arguments)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"slopes": torch.tensor([0.1, -0.2, 0.3])}, "slopes: got -0.2.*the decay would exceed 1"),
            ({"slopes": torch.tensor([0.1, math.nan, 0.3])}, "slopes: got nan"),
            ({"slopes": torch.ones(2)}, r"slopes: got shape \(2,\)"),
            ({"slopes": torch.ones(3, requires_grad=True)}, "slopes: .*requires a gradient"),
            ({"query": torch.zeros(2, 3, 21)}, "query, key: got shapes"),
            ({"key": torch.zeros(2, 3, 21, 4)}, "query, key: got shapes"),
            ({"value": torch.zeros(2, 3, 20, 4)}, "value: got shape"),
            ({"state": torch.zeros(2, 3, 4, 5)}, "state: got shape"),
            ({"mask": torch.ones(2, 1, 21, 21, dtype=torch.bool)}, "mask: got bool.*4-D"),
            ({"mask": torch.ones(2, 21)}, "mask: got float32"),
            ({"resets": torch.ones(2, 20, dtype=torch.bool)}, "resets: got"),
            ({"mode": "parallel"}, "mode: got"),
            ({"block": 0}, "block: got 0"),
        ],
    )
    def test_the_message_names_the_argument(self, changes, message):
        with pytest.raises(ArgumentError, match=message):
            self.run(**changes)

    def test_slopes_of_three_dimensions_are_taken(self):
        assert torch.equal(self.run(slopes=SLOPES[:, None, None])[0], self.run()[0])
