"""Drift and focal heads: nothing without a change, a planted head first, layers by cover, controls of equal number."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial.distance import jensenshannon

from headway.door import Editor, capture, use
from headway.errors import ArgumentError
from headway.hosts.tiny import tiny_host
from headway.methods.diagnosis import diagnose_localize_align as dla

LENGTH, ROWS = 12, (-3, -2, -1)


@pytest.fixture(scope="module")
def model():
    # Two query heads share each key-value head.
    return tiny_host("llama", num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2)[0].eval()


def pair(changed=(6,), seed=0, **names):
    ids = torch.randint(5, 60, (LENGTH,), generator=torch.Generator().manual_seed(seed))
    other = ids.clone()
    for place in changed:
        other[place] = 61
    spans = {"system": ((1, 4), (1, 4)), "other": ((5, 8), (5, 8))}
    return dla.MatchedPair(neutral=ids, conflict=other, rows=ROWS, spans=spans, **names)


@dataclass(frozen=True, kw_only=True, eq=False)
class Planted(Editor):
    """One head looks at the clause alone wherever the sequence is the one in conflict (row 1 of the batch)."""

    layer: int
    head: int

    def acts_at(self, site):
        return site.layer == self.layer

    def edit_call(self, call):
        bias = torch.zeros(call.query.shape[0], call.heads, 1, call.keys)
        bias[-1, self.head, 0, 5:8] = 30.0
        return call.replace(bias=bias if call.bias is None else call.bias + bias)


def test_identical_inputs_do_not_drift(model):
    found = dla.attention_drift(model, [pair(changed=())])
    for part in ("magnitude", "direction", "distribution"):
        assert (found.part(part) == 0).all()
    assert (found.scores() == 0).all()


def test_shapes_name_query_heads_and_layers(model):
    found = dla.attention_drift(model, [pair(), pair(seed=1)])
    assert found.direction.shape == (2, 3, 4)
    assert found.layers == (0, 1, 2)
    assert found.of([1]).direction.shape == (1, 3, 4)


def test_parts_are_those_of_whole_attention_maps(model):
    one = pair()
    found = dla.attention_drift(model, [one])
    eager = tiny_host("llama", num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2)[0].eval()
    eager.set_attn_implementation("eager")
    rows, values = [], []
    for ids in (one.neutral, one.conflict):
        kept = {}
        hooks = [
            layer.self_attn.o_proj.register_forward_pre_hook(lambda m, a, i=i, kept=kept: kept.update({i: a[0]}))
            for i, layer in enumerate(eager.model.layers)
        ]
        with torch.no_grad():
            maps = eager(input_ids=ids[None], output_attentions=True).attentions
        for hook in hooks:
            hook.remove()
        rows.append(torch.stack([m[0, :, -3:].mean(1) for m in maps]))
        values.append(torch.stack([kept[i][0, -3:].unflatten(-1, (4, -1)).mean(0) for i in range(3)]))
    for layer, head in np.ndindex(3, 4):
        before, after = (side[layer, head].double() for side in values)
        cosine = float(torch.nn.functional.cosine_similarity(before, after, 0))
        assert found.direction[0, layer, head] == pytest.approx(1 - cosine, abs=1e-5)
        change = float((after.norm() - before.norm()).abs() / before.norm())
        assert found.magnitude[0, layer, head] == pytest.approx(change, abs=1e-4)
        a, b = (side[layer, head, 1:].numpy() for side in rows)
        assert found.distribution[0, layer, head] == pytest.approx(jensenshannon(a, b, base=2) ** 2, abs=1e-5)


@pytest.mark.parametrize(("layer", "head"), [(0, 3), (1, 1), (2, 0)])
def test_a_head_that_turns_to_the_clause_in_conflict_ranks_first(model, layer, head):
    pairs = [pair(seed=seed) for seed in range(3)]
    with use(model, Planted(layer=layer, head=head)):
        found = dla.attention_drift(model, pairs)
    where = np.unravel_index(int(found.distribution.mean(0).argmax()), (3, 4))
    assert where == (layer, head)
    # Layers behind it move too; among its own layer it is first by the whole score.
    assert int(found.scores()[layer].argmax()) == head
    assert dla.focal_heads(found.scores(), share=0.1) == [(layer, head)]


def padding(ids, side, width):
    """A sequence with `width` tokens of padding on one side, and its mask."""
    pad, real = torch.zeros(width, dtype=torch.long), torch.ones(ids.numel(), dtype=torch.bool)
    parts = [(pad, pad.bool()), (ids, real)] if side == "left" else [(ids, real), (pad, pad.bool())]
    return tuple(torch.cat(part) for part in zip(*parts, strict=True))


def read_padded(model, ids, mask):
    """Mean rows over the real keys, and mean outputs, of a forward that is given the padding and its mask."""
    places = mask.nonzero()[:, 0]
    positions = (mask.long().cumsum(0) - 1).clamp(min=0)
    with torch.no_grad(), capture(model, what=("weights", "head_output"), rows=places[list(ROWS)]) as reading:
        model(input_ids=ids[None], attention_mask=mask.long()[None], position_ids=positions[None], use_cache=False)
    found = reading.result()
    weights = found.stack("weights")[:, 0].mean(2)
    assert float(weights[..., ~mask].abs().max()) < 1e-6, "padding is not looked at"
    return weights[..., mask], found.stack("head_output")[:, 0].mean(2)


@pytest.mark.parametrize("sides", [("left", "left"), ("right", "right"), ("left", "right")])
def test_a_padded_pair_has_the_drift_of_the_bare_one(model, sides):
    one = pair()
    given = [
        padding(ids, side, width) for ids, side, width in zip((one.neutral, one.conflict), sides, (4, 7), strict=True)
    ]
    bare = [dla.unpadded(ids, mask) for ids, mask in given]
    assert all(ids.numel() > LENGTH for ids, _ in given)
    found = dla.attention_drift(model, [replace(one, neutral=bare[0], conflict=bare[1])])
    assert found.scores().max() > 0
    (rows, outputs), (other_rows, other_outputs) = (read_padded(model, ids, mask) for ids, mask in given)
    padded = dla.head_drift(rows, other_rows, outputs, other_outputs)
    for part, values in zip(("magnitude", "direction", "distribution"), padded, strict=True):
        np.testing.assert_allclose(values, found.part(part)[0], atol=1e-5)


def test_padding_on_the_right_behind_the_rows_does_not_count(model):
    one, width = pair(), 5
    sides = [padding(ids, "right", width)[0] for ids in (one.neutral, one.conflict)]
    longer = replace(one, neutral=sides[0], conflict=sides[1], rows=tuple(row - width for row in ROWS))
    found, plain = dla.attention_drift(model, [longer]), dla.attention_drift(model, [one])
    for part in ("magnitude", "direction", "distribution"):
        np.testing.assert_allclose(found.part(part), plain.part(part), atol=1e-5)
    # Taken from the end of the padding the rows would be other tokens.
    assert not np.allclose(
        dla.attention_drift(model, [replace(longer, rows=ROWS)]).direction, plain.direction, atol=1e-3
    )


@pytest.mark.parametrize("mask", [[1, 0, 1], [0, 0, 0]])
def test_masks_with_gaps_are_refused(mask):
    with pytest.raises(ArgumentError, match="one block"):
        dla.unpadded(torch.arange(3), torch.tensor(mask).bool())


rows = st.lists(st.floats(0, 1), min_size=5, max_size=5).filter(lambda values: sum(values[1:]) > 1e-3)


@given(rows, rows)
def test_reshaping_is_symmetric_and_between_0_and_1(first, second):
    a, b = (torch.tensor([values]) for values in (first, second))
    found = dla.jensen_shannon(a, b)
    assert 0 <= found[0] <= 1
    assert found[0] == pytest.approx(dla.jensen_shannon(b, a)[0], abs=1e-12)
    assert dla.jensen_shannon(a, a)[0] == 0


numbers = st.one_of(st.just(0.0), st.floats(-1e6, 1e6), st.floats(-1e-12, 1e-12))
outputs = st.lists(numbers, min_size=4, max_size=4)


@given(outputs, outputs, st.floats(0.1, 10))
def test_the_turn_of_outputs_is_between_0_and_2_and_no_matter_of_length(first, second, factor):
    even = torch.full((1, 1, 3), 1 / 3)

    def turn(before, after):
        return float(dla.head_drift(even, even, before, after)[1][0, 0])

    a, b = (torch.tensor([[values]], dtype=torch.float64) for values in (first, second))
    assert 0 <= turn(a, b) <= 2
    assert turn(a, b) == pytest.approx(turn(b, a), abs=1e-9)
    assert turn(a, a) == 0
    if min(a.norm(), b.norm()) > 1e-3:
        assert turn(a, factor * b) == pytest.approx(turn(a, b), abs=1e-9)
        assert turn(a, -b) == pytest.approx(2 - turn(a, b), abs=1e-9)


def test_disjoint_rows_are_one_bit_apart_and_the_first_key_is_left_out():
    a, b = torch.tensor([[0.9, 0.1, 0.0]]), torch.tensor([[0.9, 0.0, 0.1]])
    assert dla.jensen_shannon(a, b)[0] == pytest.approx(1)
    assert dla.jensen_shannon(a, b, drop_first=False)[0] == pytest.approx(0.1)
    sink = torch.tensor([[1.0, 0.0, 0.0]])
    assert dla.jensen_shannon(sink, sink)[0] == 0


def test_opposite_outputs_turn_by_two_and_silent_ones_do_not():
    even, out = torch.full((1, 3, 4), 0.25), torch.randn(1, 3, 5, generator=torch.Generator().manual_seed(0))
    out[0, 2] = 0
    after = out * torch.tensor([-1.0, 3.0, 1.0])[:, None]
    magnitude, direction, _ = dla.head_drift(even, even, out, after)
    assert direction[0].tolist() == pytest.approx([2, 0, 0], abs=1e-9)
    assert magnitude[0].tolist() == pytest.approx([0, 2, 0], abs=1e-4)


def test_pairs_of_unequal_length_name_both_or_go_by_spans(model):
    one = pair()
    longer = torch.cat([one.conflict[:6], torch.tensor([61]), one.conflict[6:]])
    uneven = replace(one, conflict=longer, name="first", spans={"system": ((1, 4), (1, 4)), "other": ((5, 8), (5, 9))})
    with pytest.raises(ArgumentError, match=r"'first'.*12 and 13 tokens"):
        dla.attention_drift(model, [uneven])
    found = dla.attention_drift(model, [uneven], by="spans")
    assert np.isfinite(found.scores()).all()
    assert (found.distribution <= 1).all()
    same = dla.attention_drift(model, [pair(changed=())], by="spans")
    assert (same.scores() == 0).all()
    with pytest.raises(ArgumentError, match="12 and 13 keys"):
        dla.head_drift(torch.ones(1, 1, 12), torch.ones(1, 1, 13), torch.ones(1, 1, 2), torch.ones(1, 1, 2))


@pytest.mark.parametrize(
    ("changes", "options", "words"),
    [
        ({"rows": ()}, {}, "rows"),
        ({"rows": (0,)}, {}, "rows"),
        ({"rows": (-13,)}, {}, "−1"),
        ({"spans": {}}, {"by": "spans"}, "at least one"),
        ({"spans": {"system": ((3, 3), (1, 2))}}, {}, r"\[3, 3\)"),
        ({"spans": {"system": ((1, 2), (1, 20))}}, {}, r"\[1, 20\)"),
        ({}, {"by": "tokens"}, "by"),
    ],
)
def test_pairs_that_cannot_be_compared_are_refused(model, changes, options, words):
    with pytest.raises(ArgumentError, match=words):
        dla.attention_drift(model, [replace(pair(), **changes)], **options)


def test_no_pairs_are_refused(model):
    with pytest.raises(ArgumentError, match="none"):
        dla.attention_drift(model, [])


def made(direction):
    values = np.array(direction, dtype=float)
    return dla.Drift(values, values, values, tuple(range(values.shape[1])))


def test_scores_are_weighted_by_what_each_pair_lost():
    drift = made([[[0, 1, 2]], [[2, 1, 0]]])
    assert drift.scores().tolist() == [[0.5, 0.5, 0.5]]
    weights = dla.condition_weights([4.0, 3.0], [2.0, 3.5])
    assert weights == [1.0, 0.0]
    assert drift.scores(weights).tolist() == [[0, 0.5, 1]]
    assert dla.condition_weights([3.0], [4.0]) is None
    with pytest.raises(ArgumentError, match="pairs"):
        dla.condition_weights([1.0], [1.0, 2.0])
    for bad in ([1.0], [0.0, 0.0], [-1.0, 2.0], [float("nan"), 1.0]):
        with pytest.raises(ArgumentError, match="weights"):
            drift.scores(bad)


def test_focal_heads_are_the_top_share_with_ties_to_the_earlier():
    scores = np.zeros((4, 5))
    scores[2, 3], scores[1, 1] = 2, 1
    assert dla.focal_heads(scores, share=0.1) == [(1, 1), (2, 3)]
    assert dla.focal_heads(np.ones((4, 5)), share=0.1) == [(0, 0), (0, 1)]
    assert dla.focal_heads(scores, share=0.001) == [(2, 3)]
    for share in (0.0, 0.3, -1.0):
        with pytest.raises(ArgumentError, match="share"):
            dla.focal_heads(scores, share=share)
    with pytest.raises(ArgumentError, match="finite"):
        dla.focal_heads(np.full((2, 2), np.nan))


def test_focal_layers_are_the_fewest_that_hold_the_cover_or_the_best_window():
    scores = np.zeros((6, 4))
    heads = [(1, 0), (1, 1), (2, 0), (4, 0), (4, 1), (4, 2)]
    for layer, head in heads:
        scores[layer, head] = 1.0
    assert dla.focal_layers(scores, heads) == [4]
    assert dla.focal_layers(scores, heads, cover=0.51) == [1, 4]
    assert dla.focal_layers(scores, heads, cover=1.0) == [1, 2, 4]
    assert dla.focal_layers(scores, heads, window=2) == [1, 2]
    assert dla.focal_layers(np.zeros((3, 2)), [(1, 0)]) == [0]
    for options in ({"cover": 0}, {"cover": 1.5}, {"window": 0}, {"window": 7}):
        with pytest.raises(ArgumentError, match=next(iter(options))):
            dla.focal_layers(scores, heads, **options)
    with pytest.raises(ArgumentError, match="none"):
        dla.focal_layers(scores, [])


def test_control_layers_are_as_many_and_elsewhere():
    scores = np.arange(12.0).reshape(6, 2)
    assert dla.inverse_layers(scores, 2) == [0, 1]
    draw = np.random.default_rng(0)
    for _ in range(20):
        found = dla.random_layers(6, 3, generator=draw, avoid=[1, 2])
        assert len(found) == 3
        assert not {1, 2} & set(found)
    assert len(dla.random_layers(6, 5, generator=draw, avoid=[1, 2])) == 5
    with pytest.raises(ArgumentError, match="count"):
        dla.inverse_layers(scores, 7)


def test_concentration_counts_the_middle_third_beside_chance():
    assert dla.middle_third(30) == list(range(10, 20))
    assert dla.middle_third(6) == [2, 3]
    found = dla.concentration([(2, 0), (3, 1), (3, 0)], (6, 4))
    assert found.share == 1
    assert found.expected == pytest.approx(1 / 3)
    assert found.p_value == pytest.approx(8 * 7 * 6 / (24 * 23 * 22))
    assert dla.concentration([(0, 0)], (6, 4)).p_value == pytest.approx(1)


@pytest.fixture
def decided():
    """A model in which head 2 of layer 1 writes twenty times as much as it did."""
    made = tiny_host("llama", num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2)[0].eval()
    weight = made.model.layers[1].self_attn.o_proj.weight
    size = weight.shape[1] // 4
    with torch.no_grad():
        weight[:, 2 * size : 3 * size] *= 20
    return made


def gated(model, heads, **options):
    ids = torch.stack([pair(seed=seed).neutral for seed in range(4)])

    def measure():
        with torch.no_grad():
            logits = model(input_ids=ids).logits[:, -1]
        return (logits[:, 7] - logits[:, 11]).tolist()

    return dla.gate_effect(model, heads, measure, shape=(3, 4), generator=np.random.default_rng(0), **options)


def test_silencing_a_head_that_decides_moves_more_than_its_controls(decided):
    seen = []
    found = gated(decided, [(1, 2)], draws=8, progress=lambda done, total: seen.append((done, total)))
    assert len(found.by_control) == 8
    assert found.focal.value > 3 * max(found.by_control) > 0
    assert found.ratio > 3
    assert found.ratio == pytest.approx(found.focal.value / np.mean(found.by_control))
    assert seen[-1] == (9, 9)
    assert gated(decided, [(1, 2)], draws=3, gate=1.0).focal.value == pytest.approx(0, abs=1e-6)


def test_a_model_that_is_being_trained_is_read_without_dropout():
    host = tiny_host("gpt2", num_hidden_layers=2)[0].train()
    assert host.config.attn_pdrop > 0
    found = dla.attention_drift(host, [pair(changed=())])
    assert (found.scores() == 0).all()
    assert host.training
    assert host.transformer.h[0].mlp.dropout.training
