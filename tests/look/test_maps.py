from __future__ import annotations

import base64

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headway.door import AttentionCall, Forward, Site
from headway.errors import ArgumentError, NumericError
from headway.look.maps import MapObserver, cells, choose_heads, head_map, to_bytes
from headway.look.result import HeadMap, HeadMetric


def random_call(queries: int, keys: int | None = None, *, heads=4, kv_heads=2, seed=0, **fields) -> AttentionCall:
    keys = queries if keys is None else keys
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(1, heads, queries, 8, generator=generator) * 3
    key, value = (torch.randn(1, kv_heads, keys, 8, generator=generator) for _ in range(2))
    return AttentionCall.from_tensors(query, key, value, **{"causal": True, **fields})


def biased_call(bias: torch.Tensor, **fields) -> AttentionCall:
    """One head whose logits are `bias`."""
    tokens = bias.shape[0]
    zero = torch.zeros(1, 1, tokens, 2)
    return AttentionCall.from_tensors(zero, zero, zero, bias=bias[None, None], **{"causal": True, **fields})


def picture(item: HeadMap) -> np.ndarray:
    return np.frombuffer(base64.b64decode(item.pixels), np.uint8).reshape(item.side, item.side)


def test_byte_is_the_square_root_of_the_weight():
    assert to_bytes(np.array([0.0, 0.01, 0.25, 1.0, 1.0000001])).tolist() == [0, 26, 128, 255, 255]


def test_a_map_up_to_the_side_is_exact():
    call = random_call(40)
    item = head_map(call, 3, side=64)
    assert (item.side, item.rows, item.columns) == (40, 40, 40)
    assert np.array_equal(picture(item), to_bytes(call.weights()[0, 3].numpy()))
    assert item.windows == [], "nothing is left to zoom into"


@settings(max_examples=40, deadline=None)
@given(
    tokens=st.integers(2, 70),
    side=st.integers(1, 80),
    block=st.integers(1, 80),
    causal=st.booleans(),
    head=st.integers(0, 3),
    seed=st.integers(0, 99),
)
def test_every_pixel_is_the_largest_weight_of_its_cell(tokens, side, block, causal, head, seed):
    call = random_call(tokens, causal=causal, seed=seed)
    item = head_map(call, head, side=side, block=block)
    weights = call.weights()[0, head].numpy()
    assert item.side == min(side, tokens)
    largest = np.zeros((item.side, item.side), dtype=np.float32)
    cell = cells(tokens, item.side)
    np.maximum.at(largest, (cell[:, None], cell[None]), weights)
    assert np.abs(picture(item).astype(int) - to_bytes(largest)).max() <= 1, "block sizes may round the last bit"
    assert (picture(item)[cell[:, None], cell[None]] + 0.51 >= 255 * np.sqrt(weights) - 1e-3).all()


@settings(max_examples=20, deadline=None)
@given(block=st.integers(1, 130), causal=st.booleans())
def test_any_block_size_finds_the_same_details(block, causal):
    call = random_call(128, causal=causal, seed=7)
    whole = head_map(call, 1, side=32, size=16, block=128)
    parts = head_map(call, 1, side=32, size=16, block=block)
    assert [(w.row, w.column) for w in parts.windows] == [(w.row, w.column) for w in whole.windows]
    assert [p[:2] for p in parts.pairs] == [p[:2] for p in whole.pairs]
    assert [k for k, _ in parts.keys] == [k for k, _ in whole.keys]
    assert [m for _, m in parts.keys] == pytest.approx([m for _, m in whole.keys], rel=1e-5)


def test_the_same_call_gives_the_same_map():
    call = random_call(100)
    assert head_map(call, 0, side=20, size=16) == head_map(call, 0, side=20, size=16)


def test_grouped_heads_read_their_own_key_head():
    call = random_call(30, heads=6, kv_heads=2)
    for head in range(6):
        expected = to_bytes(call.weights()[0, head].numpy()).astype(int)
        assert np.abs(picture(head_map(call, head)).astype(int) - expected).max() <= 1
    assert head_map(call, 2).pixels != head_map(call, 3).pixels


def test_a_call_with_mask_bias_softcap_and_learned_sinks_per_head_maps_its_own_head():
    tokens = 24
    generator = torch.Generator().manual_seed(2)
    call = random_call(
        tokens,
        mask=torch.rand(1, 4, tokens, tokens, generator=generator) > 0.3,
        bias=torch.randn(1, 4, tokens, tokens, generator=generator),
        softcap=5.0,
        sinks=torch.randn(4, generator=generator),
    )
    for head in range(4):
        expected = to_bytes(call.weights()[0, head].numpy()).astype(int)
        assert np.abs(picture(head_map(call, head)).astype(int) - expected).max() <= 1


def test_planted_pairs_come_first_and_sink_and_diagonal_never():
    tokens = 60
    bias = torch.zeros(tokens, tokens)
    bias[:, 0] = 4.0
    bias.fill_diagonal_(5.0)
    bias[50, 20], bias[40, 7] = 12.0, 9.0
    item = head_map(biased_call(bias), 0, pairs=5, band=8)
    assert [p[:2] for p in item.pairs[:2]] == [(50, 20), (40, 7)]
    assert len(item.pairs) == 5
    assert all(key != 0 and query - key >= 8 for query, key, _ in item.pairs)
    weights = biased_call(bias).weights()[0, 0]
    assert item.pairs[0][2] == pytest.approx(weights[50, 20].item(), rel=1e-6)


def test_given_sinks_replace_the_first_token():
    bias = torch.zeros(30, 30)
    bias[:, 3] = 6.0
    call = biased_call(bias)
    assert {key for _, key, _ in head_map(call, 0, pairs=4).pairs} == {3}
    assert 3 not in {key for _, key, _ in head_map(call, 0, pairs=4, sinks=[3]).pairs}


@settings(max_examples=15, deadline=None)
@given(block=st.integers(1, 40))
def test_equal_pairs_come_in_reading_order(block):
    item = head_map(biased_call(torch.zeros(40, 40)), 0, pairs=6, band=3, block=block)
    assert [p[:2] for p in item.pairs] == [(4, 1), (5, 1), (5, 2), (6, 1), (6, 2), (6, 3)]


def test_a_head_that_reads_only_sink_and_diagonal_has_no_pairs():
    bias = torch.full((300, 300), -torch.inf)
    bias[:, 0] = 0.0
    bias.fill_diagonal_(0.0)
    item = head_map(biased_call(bias), 0, side=64)
    assert item.pairs == []
    assert item.keys[0] == (0, pytest.approx((1 + 0.5 * 299) / 300))


def test_a_head_without_a_special_place_shows_the_middle_of_its_diagonal():
    call = biased_call(torch.zeros(300, 300))
    (window,) = head_map(call, 0, side=64).windows
    assert (window.row, window.column) == (118, 118)
    assert head_map(call, 0, side=64, windows=0).windows == []


def test_the_first_window_holds_the_planted_blob_at_full_resolution():
    tokens = 400
    bias = torch.zeros(tokens, tokens)
    bias[300:330, 120:150] = 8.0
    call = biased_call(bias)
    item = head_map(call, 0, side=50, size=64, windows=3)
    first = item.windows[0]
    assert first.row <= 300
    assert first.row + 64 >= 330
    assert first.column <= 120
    assert first.column + 64 >= 150
    for window in item.windows:
        shown = np.frombuffer(base64.b64decode(window.pixels), np.uint8).reshape(window.size, window.size)
        rows, columns = slice(window.row, window.row + 64), slice(window.column, window.column + 64)
        assert np.array_equal(shown, to_bytes(call.weights()[0, 0, rows, columns].numpy()))


@settings(max_examples=25, deadline=None)
@given(tokens=st.integers(33, 150), size=st.integers(1, 40), count=st.integers(0, 6), seed=st.integers(0, 20))
def test_windows_lie_inside_and_never_overlap(tokens, size, count, seed):
    item = head_map(random_call(tokens, seed=seed), 0, side=32, size=size, windows=count)
    assert len(item.windows) <= count
    for i, a in enumerate(item.windows):
        assert 0 <= a.row <= tokens - a.size
        assert 0 <= a.column <= tokens - a.size
        for b in item.windows[:i]:
            assert abs(a.row - b.row) >= a.size or abs(a.column - b.column) >= a.size


def test_the_strongest_key_is_the_planted_one_and_late_keys_do_not_win_by_few_readers():
    tokens = 120
    bias = torch.zeros(tokens, tokens)
    bias[:, 30] = 5.0
    bias[:, 118] = 20.0
    item = head_map(biased_call(bias), 0, keys=3)
    weights = biased_call(bias).weights()[0, 0]
    assert item.keys[0][0] == 30
    assert item.keys[0][1] == pytest.approx(weights[30:, 30].mean().item(), rel=1e-5)
    assert 118 not in {k for k, _ in item.keys}, "two queries see it"


def test_left_padding_shows_nothing_and_moves_the_sink():
    pad, tokens = 6, 36
    real = (torch.arange(tokens) >= pad)[None]
    bias = torch.zeros(tokens, tokens)
    bias[:, pad] = 9.0
    call = biased_call(bias, mask=real[:, None, None].expand(1, 1, tokens, -1), forward=Forward(padding=real))
    item = head_map(call, 0)
    assert picture(item)[:pad].max() == 0
    assert picture(item)[:, :pad].max() == 0
    assert pad not in {key for _, key, _ in item.pairs}
    assert item.keys[0][0] == pad


def test_right_padding_changes_no_pair_and_no_key():
    plain, tokens, pad = random_call(40, seed=3), 40, 9
    real = (torch.arange(tokens) < tokens - pad)[None]
    padded = plain.replace(mask=real[:, None, None].expand(1, 1, tokens, -1), forward=Forward(padding=real))
    short = plain.replace(
        **{name: getattr(plain, name)[:, :, : tokens - pad] for name in ("query", "key", "value")}, forward=Forward()
    )
    whole, cut = head_map(padded, 2), head_map(short, 2)
    assert [p[:2] for p in whole.pairs] == [p[:2] for p in cut.pairs]
    shares = dict(cut.keys)
    common = [(key, share) for key, share in whole.keys if key in shares]
    assert len(common) > 5
    assert [share for _, share in common] == pytest.approx([shares[key] for key, _ in common], rel=1e-5)


def test_rows_of_a_later_chunk_keep_their_token_positions():
    bias = torch.zeros(64, 64)
    bias[60, 20] = 10.0
    whole = biased_call(bias)
    chunk = whole.replace(query=whole.query[:, :, 48:], bias=whole.bias[:, :, 48:])
    item = head_map(chunk, 0)
    assert item.pairs[0][:2] == (60, 20)
    assert (item.rows, item.columns, item.side) == (16, 64, 64)
    assert np.array_equal(picture(item)[::4], to_bytes(chunk.weights()[0, 0].numpy()))


def test_cross_attention_has_no_diagonal():
    call = random_call(20, 50, causal=False)
    cross = call.replace(site=Site(name="c", layer=0, kind="cross", heads=4, kv_heads=2, head_dim=8))
    weights = cross.weights()[0, 0]
    weights[:, 0] = 0
    best = divmod(int(weights.argmax()), 50)
    item = head_map(cross, 0)
    assert item.pairs[0][:2] == best
    assert item.pairs[0][2] == pytest.approx(weights.max().item())


def test_the_chosen_batch_entry_is_mapped():
    one, other = random_call(20, seed=1), random_call(20, seed=2)
    both = one.replace(**{n: torch.cat([getattr(one, n), getattr(other, n)]) for n in ("query", "key", "value")})
    expected = to_bytes(other.weights()[0, 2].numpy()).astype(int)
    assert np.abs(picture(head_map(both, 2, batch=1)).astype(int) - expected).max() <= 1


def test_impossible_requests_name_what_was_expected():
    call = random_call(10)
    with pytest.raises(ArgumentError, match=r"head: got 4 .* expected 0\.\.3"):
        head_map(call, 4)
    with pytest.raises(ArgumentError, match="batch"):
        head_map(call, 0, batch=1)
    with pytest.raises(ArgumentError, match="side: got 0"):
        head_map(call, 0, side=0)
    with pytest.raises(ArgumentError, match="windows: got -1"):
        head_map(call, 0, windows=-1)
    with pytest.raises(NumericError, match="NaN"):
        head_map(call.replace(key=call.key * torch.nan), 0)


# The observer


@pytest.fixture(scope="module")
def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=100,
        initializer_range=0.5,
    )
    return LlamaForCausalLM(config).eval()


def test_observer_maps_the_chosen_heads_of_a_real_forward_in_their_order(llama):
    from headway.door import observe

    ids = torch.arange(48)[None]
    observer = MapObserver(heads=[(2, 1), (0, 3), (2, 1)], options={"pairs": 4})
    with torch.no_grad(), observe(llama, observer):
        llama(ids)
    maps = observer.result()
    llama.set_attn_implementation("eager")
    with torch.no_grad():
        weights = llama(ids, output_attentions=True).attentions
    llama.set_attn_implementation("sdpa")
    assert [(m.layer, m.head) for m in maps] == [(2, 1), (0, 3)]
    for item in maps:
        expected = to_bytes(weights[item.layer][0, item.head].numpy()).astype(int)
        assert np.abs(picture(item).astype(int) - expected).max() <= 1
        assert len(item.pairs) == 4


def test_observer_refuses_missing_layers_heads_and_second_forwards():
    call = random_call(10)
    observer = MapObserver(heads=[(0, 0), (9, 0)])
    observer.start()
    observer.observe(call, call.value)
    with pytest.raises(ArgumentError, match="layer: got 9"):
        observer.result()
    with pytest.raises(ArgumentError, match="expected one forward"):
        observer.observe(call, call.value)
    with pytest.raises(ArgumentError, match="got none"):
        MapObserver(heads=[])
    wrong = MapObserver(heads=[(0, 8)])
    with pytest.raises(ArgumentError, match="head: got 8"):
        wrong.observe(call, call.value)
    assert not observer.acts_at(Site(name="x", layer=0, kind="cross"))
    assert not observer.acts_at(Site(name="x", layer=4))


# The choice of heads


def metric(name: str, values: list[list[float]]) -> HeadMetric:
    return HeadMetric(name, name, "roles", "share", "", values)


def test_each_role_gives_its_best_head_and_none_twice():
    metrics = [
        metric("streaming", [[0.9, 0.8], [0.1, 0.7]]),
        metric("retrieval", [[0.0, 0.9], [0.2, 0.1]]),
        metric("induction", [[0.1, 0.8], [0.3, 0.0]]),
        metric("something_else", [[9.0, 0.0], [0.0, 0.0]]),
    ]
    assert choose_heads(metrics) == {(0, 1): "retrieval", (1, 0): "induction", (1, 1): "streaming"}


def test_the_choice_is_limited_and_skips_what_is_unknown():
    nan = float("nan")
    metrics = [
        metric("retrieval", [[nan, 0.5, 0.5, 0.1]]),
        metric("induction", [[0.2, 0.2, 0.2, 0.2]]),
        metric("receiver", [[nan, nan, nan, nan]]),
        metric("sink_mass", [[0.1, 0.2, 0.3, nan]]),
    ]
    assert choose_heads(metrics) == {(0, 1): "retrieval", (0, 2): "sink_mass"}
    assert list(choose_heads(metrics, per_role=3)) == [(0, 1), (0, 2), (0, 3), (0, 0)]
    assert list(choose_heads(metrics, per_role=3, limit=2)) == [(0, 1), (0, 2)]
    assert choose_heads([]) == {}
    with pytest.raises(ArgumentError, match="limit"):
        choose_heads(metrics, limit=0)
