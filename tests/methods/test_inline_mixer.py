"""The mixers `inline` and `linear` and the local residual: grids, prefix tokens, masks, the door, and blocks."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

from headway.door import observe
from headway.door.stages import Observer
from headway.errors import ArgumentError
from headway.kernels.feature_rules import FEATURES, NON_NEGATIVE, feature_weights
from headway.methods.layers.inline import InlineBlock, InlineMixer, LinearMixer, LocalResidual, local_residual
from headway.methods.layers.inline.block import in_windows
from headway.methods.layers.inline.residual import check_grid

CLOSE = {"rtol": 1e-9, "atol": 1e-9}
GRID = (3, 5)


def mixer(cls=InlineMixer, seed=0, width=8, heads=2, **options):
    torch.manual_seed(seed)
    return cls(width, heads=heads, **{"causal": False, **options}).double().eval()


def tokens(count=15, batch=2, width=8, seed=1):
    return torch.randn(batch, count, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_the_residual_is_a_convolution_of_each_sample_with_its_own_kernel():
    generator = torch.Generator().manual_seed(0)
    value, kernel = (torch.randn(2, 4, *size, dtype=torch.float64, generator=generator) for size in ((3, 5), (3, 3)))
    torch.testing.assert_close(local_residual(value, kernel), local_residual(value, kernel, mode="reference"), **CLOSE)
    alone = nn.functional.conv2d(value[1:, 2:3], kernel[1:2, 2:3], padding=1)
    torch.testing.assert_close(local_residual(value, kernel)[1:, 2:3], alone, **CLOSE)


def test_the_middle_of_the_kernel_is_the_token_and_its_corner_the_neighbour_up_left():
    value = torch.arange(15.0).view(1, 1, 3, 5)
    middle, corner = torch.zeros(2, 1, 1, 3, 3)
    middle[..., 1, 1] = 1
    corner[..., 0, 0] = 1
    assert torch.equal(local_residual(value, middle), value)
    moved = local_residual(value, corner)[0, 0]
    assert torch.equal(moved[1:, 1:], value[0, 0, :-1, :-1])
    assert not moved[0].any()
    assert not moved[:, 0].any()


def test_kernels_depend_on_the_image_and_a_head_on_its_own_channels():
    residual = LocalResidual(8, heads=2).double()
    x = tokens()
    other = x.clone()
    other[0, :, 5] += 3
    before, after = residual.kernels(x), residual.kernels(other)
    assert torch.equal(before[1], after[1])
    torch.testing.assert_close(before[0, :4], after[0, :4], **CLOSE)
    assert bool((before[0, 4:] != after[0, 4:]).any((-1, -2)).all())


def test_channels_of_a_head_share_the_kernel_of_the_paper():
    mix = mixer(kernel_per="head")
    kernels = mix.residual.kernels(tokens())
    assert torch.equal(kernels[:, :1].expand(-1, 4, -1, -1), kernels[:, :4])
    assert torch.equal(kernels[:, 4:5].expand(-1, 4, -1, -1), kernels[:, 4:])
    assert not torch.allclose(kernels[:, 0], kernels[:, 4])
    torch.testing.assert_close(mix(tokens(), grid=GRID)[0], mix(tokens(), grid=GRID, mode="reference")[0], **CLOSE)


def test_gradients_of_the_residual_are_those_of_finite_differences():
    residual = LocalResidual(4, heads=2).double()
    x, value = (tokens(6, batch=1, width=4, seed=s).requires_grad_() for s in (1, 2))
    assert torch.autograd.gradcheck(lambda x, v: residual(x, v, (2, 3)), (x, value))


@pytest.mark.parametrize("cls", [InlineMixer, LinearMixer])
def test_forms_agree_on_a_grid_that_is_not_square(cls):
    mix = mixer(cls, residual=True)
    x = tokens()
    torch.testing.assert_close(mix(x, grid=GRID)[0], mix(x, grid=GRID, mode="reference")[0], **CLOSE)


def test_height_and_width_are_not_the_same():
    mix = mixer()
    assert not torch.allclose(mix(tokens(), grid=(3, 5))[0], mix(tokens(), grid=(5, 3))[0])


def test_attention_alone_does_not_know_the_order_and_the_residual_does():
    order = torch.randperm(15, generator=torch.Generator().manual_seed(3))
    plain, local = mixer(residual=False), mixer()
    x = tokens()
    torch.testing.assert_close(plain(x[:, order])[0], plain(x)[0][:, order], **CLOSE)
    assert not torch.allclose(local(x[:, order], grid=GRID)[0], local(x, grid=GRID)[0][:, order])


def test_without_residual_the_output_is_projected_attention():
    mix = mixer(residual=False)
    x = tokens()
    query, key, value = (p(x).unflatten(-1, (2, 4)).transpose(1, 2) for p in (mix.q_proj, mix.k_proj, mix.v_proj))
    expected = mix.o_proj((feature_weights(query, key) @ value).transpose(1, 2).flatten(2))
    torch.testing.assert_close(mix(x)[0], expected, **CLOSE)


def test_prefix_tokens_take_part_in_attention_and_get_no_residual():
    mix = mixer(prefix=2)
    x = tokens(17)
    plain = mixer(residual=False)
    plain.load_state_dict({k: v for k, v in mix.state_dict().items() if not k.startswith("residual")})
    with_residual, without = mix(x, grid=GRID)[0], plain(x)[0]
    torch.testing.assert_close(with_residual[:, :2], without[:, :2], **CLOSE)
    assert not torch.allclose(with_residual[:, 2:], without[:, 2:])
    changed = x.clone()
    changed[:, 0] += 1
    assert not torch.allclose(mix(changed, grid=GRID)[0][:, 2:], with_residual[:, 2:])


@pytest.mark.parametrize("prefix", [0, 2])
def test_masked_patches_have_no_influence_with_a_residual(prefix):
    mix = mixer(prefix=prefix)
    x = tokens(15 + prefix)
    mask = torch.ones(2, 15 + prefix, dtype=torch.bool)
    mask[0, [3, 7, 14]] = False
    poisoned = torch.where(mask[..., None], x, torch.nan)
    other = torch.where(mask[..., None], x, 5.0)
    y = mix(poisoned, mask=mask, grid=GRID)[0]
    torch.testing.assert_close(y, mix(other, mask=mask, grid=GRID)[0], **CLOSE)
    torch.testing.assert_close(y, mix(other, mask=mask, grid=GRID, mode="reference")[0], **CLOSE)
    assert not y[~mask].any()
    torch.testing.assert_close(y[1:], mix(x[1:], grid=GRID)[0], **CLOSE)


@pytest.mark.parametrize("mode", ["block", "reference"])
@pytest.mark.parametrize("cls", [InlineMixer, LinearMixer])
def test_packed_rows_are_separate_documents_both_ways(cls, mode):
    mix = mixer(cls, residual=False)
    x = tokens()
    resets = torch.zeros(2, 15, dtype=torch.bool)
    resets[0, [0, 4, 5]] = True
    resets[1, 9] = True
    mask = torch.ones(2, 15, dtype=torch.bool)
    mask[0, 7] = False
    y = mix(x, resets=resets, mask=mask, mode=mode)[0]
    kept = torch.tensor([i for i in range(5, 15) if i != 7])
    for row, index in ((0, torch.arange(4)), (0, torch.tensor([4])), (0, kept), (1, torch.arange(9, 15))):
        torch.testing.assert_close(y[row, index][None], mix(x[row, index][None])[0], **CLOSE)


def test_a_single_patch_is_its_own_value():
    mix = mixer(residual=False)
    x = tokens(1)
    torch.testing.assert_close(mix(x)[0], mix.o_proj(mix.v_proj(x)), **CLOSE)


def test_no_tokens_give_none():
    assert mixer()(tokens(0), grid=(0, 0))[0].shape == (2, 0, 8)


@pytest.mark.parametrize("feature", FEATURES)
def test_every_feature_map_trains_in_the_subtractive_mixer(feature):
    mix = mixer(feature=feature)
    mix(tokens(), grid=GRID)[0].square().mean().backward()
    gradients = [p.grad for p in mix.parameters()]
    assert all(g is not None and bool(torch.isfinite(g).all()) for g in gradients)
    assert all(bool(g.any()) for g in (mix.q_proj.weight.grad, mix.residual.second.weight.grad))


@pytest.mark.parametrize("feature", NON_NEGATIVE)
def test_ordinary_linear_attention_never_gives_nan(feature):
    mix = mixer(LinearMixer, feature=feature).float()
    with torch.no_grad():
        mix.q_proj.weight.zero_()
        mix.q_proj.bias.fill_(-1e4)
    for size in (1e-8, 1.0, 1e6):
        x = (size * tokens()).float().requires_grad_()
        y = mix(x)[0]
        y.sum().backward()
        assert torch.isfinite(y).all()
        assert torch.isfinite(x.grad).all()


def test_query_key_norm_bounds_the_weights():
    found = []
    for qk_norm in (False, True):
        model, seen = Holder(mixer(residual=False, qk_norm=qk_norm).float()), _Seen()
        with observe(model, seen, selftest=False), torch.no_grad():
            model(100 * tokens().float())
        found.append(float(seen.result()[0][0].weights().abs().max()))
    assert found[1] < 1 < 10 < found[0]


class Holder(nn.Module):
    """A model around one mixer."""

    def __init__(self, mix, grid=None):
        super().__init__()
        self.mix, self.grid = mix, grid

    def forward(self, x, **options):
        return self.mix(x, grid=self.grid, **options)[0]


@pytest.mark.parametrize(
    ("grid", "prefix", "message"),
    [
        ((4, 4), 0, r"4 × 4 = 16 patches and 0 prefix tokens for 15 tokens"),
        ((3, 5), 1, "1 prefix tokens for 15 tokens"),
        ((-3, -5), 0, "expected as many"),
        (None, 0, r"grid: got None for 15 tokens"),
    ],
)
def test_a_grid_that_does_not_fit_is_refused_with_its_numbers(grid, prefix, message):
    with pytest.raises(ArgumentError, match=message):
        mixer(prefix=prefix)(tokens(), grid=grid)


def test_a_missing_grid_of_a_square_is_named_and_not_guessed():
    with pytest.raises(ArgumentError, match="4 × 4 would fit"):
        check_grid(None, 17, 1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: InlineMixer(8, heads=2, residual=True), "residual: got True with causal=True"),
        (lambda: InlineMixer(8, heads=2, feature="softmax"), "feature: got 'softmax'"),
        (lambda: LinearMixer(8, heads=2, feature="identity"), "cross zero"),
        (lambda: InlineMixer(9, heads=2), "width, heads"),
        (lambda: InlineMixer(8, heads=2, causal=False, prefix=-1), "prefix: got -1"),
        (lambda: LocalResidual(9, heads=2), "width, heads"),
        (lambda: LocalResidual(8, heads=2, kernel_per="patch"), "kernel_per: got 'patch'"),
        (lambda: local_residual(torch.zeros(1, 2, 3, 3), torch.zeros(1, 2, 3, 4)), "kernel: got shape"),
        (lambda: local_residual(torch.zeros(1, 2, 3, 3), torch.zeros(1, 2, 3, 3), mode="fast"), "mode: got 'fast'"),
    ],
)
def test_what_cannot_be_built_is_refused(make, message):
    with pytest.raises(ArgumentError, match=message):
        make()


def test_packed_images_with_a_residual_are_refused():
    resets = torch.zeros(2, 15, dtype=torch.bool)
    with pytest.raises(ArgumentError, match="one row is one image"):
        mixer()(tokens(), grid=GRID, resets=resets)


def test_too_few_tokens_for_distinct_rows_are_only_noted(caplog):
    with caplog.at_level(logging.DEBUG, logger="headway.methods.layers.inline.mixer"):
        mixer(residual=False)(tokens(4))
        assert "cannot tell all queries apart" in caplog.text
        caplog.clear()
        mixer(residual=False)(tokens(5))
        assert not caplog.text


class _Seen(Observer):
    def start(self):
        self.calls = []

    def observe(self, call, output, lse=None):
        self.calls.append((call, call.weights() @ call.value, output))

    def result(self):
        return self.calls


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("cls", [InlineMixer, LinearMixer])
@pytest.mark.parametrize("masked", [False, True])
def test_observers_at_the_door_meet_the_weights_that_make_the_output(cls, causal, masked):
    model = Holder(mixer(cls, causal=causal, residual=False).float())
    x = tokens().float()
    mask = torch.ones(2, 15, dtype=torch.bool)
    mask[0, :3] = False
    options = {"mask": mask} if masked else {}
    plain, seen = model(x, **options), _Seen()
    with observe(model, seen, selftest=False):
        watched = model(x, **options)
    assert torch.equal(plain, watched)
    ((call, made, output),) = seen.result()
    assert call.weighing is model.mix.rule
    torch.testing.assert_close(made, output, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("window", [None, 2])
def test_a_block_is_two_residual_sums(window):
    block = InlineBlock(8, heads=2, window=window).double().eval()
    x = tokens(24)
    y = block.norm1(x)
    mixed = block.mixer(y, grid=(4, 6))[0] if window is None else in_windows(block.mixer, y, (4, 6), 2)
    middle = x + mixed
    torch.testing.assert_close(block(x, grid=(4, 6)), middle + block.mlp(block.norm2(middle)), **CLOSE)


def test_windows_are_worked_through_by_themselves():
    mix = mixer()
    x = tokens(24)
    y = in_windows(mix, x, (4, 6), 2)
    corner = torch.tensor([2, 3, 8, 9])
    torch.testing.assert_close(y[:, corner], mix(x[:, corner], grid=(2, 2))[0], **CLOSE)
    one = in_windows(mix, tokens(16), (4, 4), 4)
    torch.testing.assert_close(one, mix(tokens(16), grid=(4, 4))[0], **CLOSE)


def test_dropped_branches_leave_some_samples_as_they_are_and_only_in_training():
    torch.manual_seed(0)
    block = InlineBlock(8, heads=2, drop_path=0.5, residual=False).double()
    x = tokens(6, batch=64)
    same = (block(x) == x).all((1, 2))
    assert 4 < int(same.sum()) < 30
    assert torch.equal(block.eval()(x), block(x))


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (lambda: InlineBlock(8, heads=2, drop_path=1.0), "drop_path"),
        (lambda: InlineBlock(8, heads=2, window=2, prefix=1), "window: got 2 with prefix=1"),
        (lambda: InlineBlock(8, heads=2, window=2).double()(tokens(15), grid=(3, 5)), "both multiples of the side"),
        (lambda: InlineBlock(8, heads=2, window=2).double()(tokens(16)), "grid: got None"),
    ],
)
def test_blocks_that_cannot_be_are_refused(run, message):
    with pytest.raises(ArgumentError, match=message):
        run()
