"""Injectivity with constructed counter-examples, confusion and locality on planted weights, masking at the door."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import headway
from headway.door.call import AttentionCall
from headway.errors import ArgumentError
from headway.kernels.feature_rules import INLINE, Rule, feature_weights
from headway.methods.layers.inline import (
    ConfusionObserver,
    LocalityObserver,
    MaskTokens,
    confusion_count,
    injectivity,
    locality_mass,
    neighbourhood,
    same_row_query,
)

DIM = 4


def draw(tokens, seed=0, heads=2):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, heads, tokens, DIM, dtype=torch.float64, generator=generator)


@pytest.mark.parametrize(("tokens", "rank"), [(1, 0), (3, 2), (DIM, DIM - 1), (DIM + 1, DIM), (40, DIM)])
def test_rows_tell_queries_apart_from_dim_and_one_keys_on(tokens, rank):
    found = injectivity(draw(tokens))
    assert found.rank.tolist() == [[rank, rank]]
    assert found.injective.tolist() == [[rank == DIM] * 2]


@pytest.mark.parametrize("softmax", [False, True])
def test_with_too_few_keys_other_queries_get_the_same_rows(softmax):
    key, query = draw(DIM), draw(7, seed=1)
    other = same_row_query(query, key, length=3.0)
    assert torch.allclose((other - query).norm(dim=-1), torch.full((1, 2, 7), 3.0, dtype=torch.float64))
    rows = [
        (q @ key.transpose(-1, -2)).softmax(-1) if softmax else feature_weights(q, key, rule=INLINE)
        for q in (query, other)
    ]
    torch.testing.assert_close(rows[0], rows[1], rtol=0, atol=1e-12)


def test_the_blind_direction_is_the_one_that_was_planted():
    key = draw(30)
    key[..., 2] = 5.0
    found = injectivity(key)
    assert found.rank.tolist() == [[DIM - 1] * 2]
    blind = found.directions[found.blind]
    assert torch.allclose(blind.abs(), torch.eye(DIM, dtype=torch.float64)[2].expand(2, DIM), atol=1e-6)


def test_a_feature_map_can_hide_what_the_keys_tell():
    key = draw(30)
    key[..., 1] = -key[..., 1].abs()
    assert bool(injectivity(key).injective.all())
    assert not bool(injectivity(key, feature="relu").injective.any())


def test_there_is_no_other_query_where_rows_tell_all_apart():
    with pytest.raises(ArgumentError, match="tell all queries apart"):
        same_row_query(draw(3), draw(20))


def test_confused_pairs_are_those_that_were_planted():
    query = torch.zeros(1, 1, 4, 2)
    query[0, 0] = torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 1.0], [0.0, 1.001]])
    weights = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.2, 0.8], [0.2, 0.8]])[None, None]
    confused, unlike = confusion_count(query, weights, apart=0.5)
    # All pairs but (2, 3) are unlike; of these only (0, 1) share a row.
    assert confused.tolist() == [[1]]
    assert unlike.tolist() == [[5]]


def test_scaling_all_queries_changes_no_count():
    query, key = draw(40, seed=1), draw(40)
    weights = feature_weights(query, key)
    assert torch.equal(confusion_count(query, weights)[1], confusion_count(7 * query, weights)[1])


def test_division_confuses_queries_on_a_ray_and_subtraction_does_not():
    direction = draw(1, seed=1).abs()
    query, key = direction * torch.linspace(0.2, 4, 30, dtype=torch.float64)[:, None], draw(40).abs()
    counts = {}
    for rule in (INLINE, Rule(normaliser="divisive", feature="relu")):
        confused, unlike = confusion_count(query, feature_weights(query, key, rule=rule), apart=0.5)
        counts[rule.normaliser] = float(confused.sum() / unlike.sum())
    assert counts["divisive"] == 1
    assert counts["subtractive"] == 0


@pytest.mark.parametrize("bad", [{"apart": -1.0}, {"alike": 0.0}])
def test_thresholds_that_cannot_be_are_refused(bad):
    with pytest.raises(ArgumentError, match="apart, alike"):
        confusion_count(draw(3), draw(3), **bad)


def test_a_neighbourhood_is_the_square_around_a_patch_within_the_grid():
    near = neighbourhood((3, 5), prefix=2)
    assert near.shape == (17, 17)
    assert not near[:2].any()
    assert not near[:, :2].any()
    corner, middle = near[2, 2:].view(3, 5), near[2 + 7, 2:].view(3, 5)
    assert corner.nonzero().tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]
    assert middle[:, 1:4].all()
    assert int(middle.sum()) == 9
    assert int(neighbourhood((3, 5), window=1).sum()) == 15
    assert torch.equal(near, near.T)


@pytest.mark.parametrize(("grid", "window"), [((3, 5), 2), ((3, 5), 0), ((0, 5), 3)])
def test_neighbourhoods_that_cannot_be_are_refused(grid, window):
    with pytest.raises(ArgumentError, match=r"window|grid"):
        neighbourhood(grid, window=window)


def test_uniform_weights_have_the_uniform_share_nearby():
    near = neighbourhood((4, 6))
    mass, uniform = locality_mass(torch.full((1, 2, 24, 24), 1 / 24), near)
    torch.testing.assert_close(mass[0, 0], uniform)
    with pytest.raises(ArgumentError, match="near: got shape"):
        locality_mass(torch.zeros(1, 2, 23, 24), near)


def planted(grid=(4, 6), prefix=1, sharp=50.0):
    """A call whose patches read themselves alone, and whose prefix token reads evenly."""
    count = grid[0] * grid[1] + prefix
    key = torch.eye(count)[None, None]
    query = sharp * key.clone()
    query[..., :prefix, :] = 0
    return AttentionCall.from_tensors(query, key, key, scale=1.0)


def test_the_locality_observer_leaves_out_the_prefix():
    observer = LocalityObserver((4, 6), prefix=1, block=7)
    observer.start()
    observer.observe(planted(), torch.zeros(1))
    found = observer.result()["layers.0"]
    np.testing.assert_allclose(found["mass"], 1.0, rtol=1e-5)
    expected = float(neighbourhood((4, 6)).sum()) / 24 / 25
    assert found["uniform"] == pytest.approx(expected)
    assert found["ratio"][0] == pytest.approx(1 / expected, rel=1e-5)


def test_a_grid_that_is_not_that_of_the_input_is_refused():
    observer = LocalityObserver((4, 6), prefix=0)
    observer.start()
    with pytest.raises(ArgumentError, match=r"24 patches and prefix tokens, but layers\.0 has 25"):
        observer.observe(planted(), torch.zeros(1))


def test_the_confusion_observer_counts_over_calls_and_refuses_causal_ones():
    observer = ConfusionObserver(rows=10)
    observer.start()
    call = planted()
    for _ in range(2):
        observer.observe(call, torch.zeros(1))
    found = observer.result()["layers.0"]
    assert found == {"confused": 0, "unlike": 2 * 45, "share": 0.0}
    with pytest.raises(ArgumentError, match="causal"):
        observer.observe(call.replace(causal=True), torch.zeros(1))


def test_masking_takes_the_window_and_leaves_the_rest():
    call = planted(sharp=1.0)
    weights, rows = call.weights(), torch.arange(3, 12)
    kept = MaskTokens(grid=(4, 6), prefix=1).edit_weights(call, weights[:, :, rows], rows)
    near = neighbourhood((4, 6), prefix=1)[rows]
    assert not kept[:, :, near].any()
    assert torch.equal(kept[:, :, ~near], weights[:, :, rows][:, :, ~near])
    whole = MaskTokens(grid=(4, 6), prefix=1, renormalise=True).edit_weights(call, weights[:, :, rows], rows)
    torch.testing.assert_close(whole.sum(-1), torch.ones(1, 1, 9))
    assert not whole[:, :, near].any()


def test_random_masking_takes_as_many_patches_elsewhere():
    local, random = (MaskTokens(grid=(6, 8), kind=kind, prefix=1) for kind in ("local", "random"))
    near, far = local.masked(3), random.masked(3)
    assert torch.equal(near.sum(-1), far.sum(-1))
    assert not (near & far).any()
    assert not far[:1].any()
    assert not far[:, :1].any()
    assert torch.equal(far, random.masked(3))
    assert not torch.equal(far, random.masked(4))
    assert not torch.equal(far, MaskTokens(grid=(6, 8), kind="random", prefix=1, seed=1).masked(3))


def test_masks_that_cannot_be_are_refused():
    with pytest.raises(ArgumentError, match="kind: got 'near'"):
        MaskTokens(grid=(4, 6), kind="near")
    with pytest.raises(ArgumentError, match="as many patches are elsewhere"):
        MaskTokens(grid=(3, 3), kind="random").masked(0)
    with pytest.raises(ArgumentError, match="grid: got 25"):
        MaskTokens(grid=(5, 5)).edit_weights(planted(prefix=0), torch.zeros(1, 1, 24, 24), torch.arange(24))


@pytest.fixture(scope="module")
def model():
    from transformers import ViTConfig, ViTModel

    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=24, patch_size=4
    )
    return ViTModel(config, add_pooling_layer=False).eval()


def test_a_host_runs_with_masked_tokens_and_as_before_without(model):
    pixels = torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        plain = model(pixels).last_hidden_state
        with headway.use(model, MaskTokens(grid=(6, 6), prefix=1)):
            masked = model(pixels).last_hidden_state
        again = model(pixels).last_hidden_state
    assert torch.equal(plain, again)
    assert not torch.allclose(plain, masked, atol=1e-4)


def test_both_observers_read_every_layer_of_a_host(model):
    locality, confusion = LocalityObserver((6, 6), prefix=1), ConfusionObserver()
    pixels = torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    with headway.observe(model, locality, confusion), torch.no_grad():
        model(pixels)
    assert len(locality.result()) == len(confusion.result()) == 2
    for found in locality.result().values():
        assert found["mass"].shape == (2,)
        assert np.all((found["mass"] > 0) & (found["mass"] < 1))


@pytest.mark.real
def test_a_trained_vision_model_reads_nearby_more_than_evenly():
    host, _ = headway.load("vit")
    locality = LocalityObserver((8, 8), prefix=1)
    pixels = torch.rand(1, 3, 112, 112, generator=torch.Generator().manual_seed(0))
    with headway.observe(host, locality), torch.no_grad():
        host(pixel_values=pixels)
    ratios = np.concatenate([found["ratio"] for found in locality.result().values()])
    assert ratios.shape == (72,)
    assert ratios.mean() > 1
