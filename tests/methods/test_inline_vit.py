"""Attention modules of vision transformers exchanged for mixers, and put back."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import headway
from headway.door.stages import Observer
from headway.errors import ArgumentError, HeadwayError, HostError
from headway.hosts.tiny import tiny_host
from headway.methods.layers.inline import InlineMixer, LinearMixer, VisionAttention, replace_attention

SMALL = {
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": 16,
    "patch_size": 4,
}


def host(kind="vit", **changes):
    import transformers

    names = {"vit": "ViT", "deit": "DeiT", "dinov2": "Dinov2", "dinov2_with_registers": "Dinov2WithRegisters"}
    config = getattr(transformers, names[kind] + "Config")(**{**SMALL, **changes})
    torch.manual_seed(0)
    return getattr(transformers, names[kind] + "Model")(config).eval()


def pixels(height=16, width=16, batch=2):
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(0))


def run(model, *images, **options):
    if not images and not options:
        images = (pixels(),)
    with torch.no_grad():
        return model(*images, **options).last_hidden_state


KINDS = ["vit", "deit", "dinov2", "dinov2_with_registers"]


@pytest.mark.parametrize("kind", KINDS)
def test_leaving_puts_everything_back(kind):
    model = host(kind)
    before, names = run(model), [name for name, _ in model.named_modules()]
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with replace_attention(model) as replaced:
        assert len(replaced.modules) == 3
        assert not torch.allclose(run(model), before, atol=1e-4)
    replaced.restore()
    assert torch.equal(run(model), before)
    assert [name for name, _ in model.named_modules()] == names
    assert all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())
    assert not model._forward_pre_hooks


@pytest.mark.parametrize("kind", KINDS)
def test_prefix_tokens_are_those_of_the_model(kind):
    model = host(kind)
    with replace_attention(model) as replaced:
        prefixes = {module.mixer.residual.prefix for module in replaced.modules.values()}
    assert prefixes == {{"vit": 1, "deit": 2, "dinov2": 1, "dinov2_with_registers": 5}[kind]}


def test_mixers_start_from_the_projections_of_the_host_and_do_not_share_them():
    model = host()
    old = model.layers[1].attention
    with replace_attention(model, layers=[1]) as replaced:
        (new,) = replaced.modules.values()
        assert torch.equal(new.mixer.q_proj.weight, old.q_proj.weight)
        assert new.mixer.q_proj.weight is not old.q_proj.weight
        assert isinstance(model.layers[1].attention, VisionAttention)
        assert not isinstance(model.layers[0].attention, VisionAttention)


def test_new_projections_are_drawn_where_asked():
    model = host()
    old = model.layers[0].attention
    with replace_attention(model, layers=[0], copy_weights=False) as replaced:
        (new,) = replaced.modules.values()
        assert not torch.equal(new.mixer.q_proj.weight, old.q_proj.weight)


def test_without_a_residual_a_layer_is_the_explicit_form():
    model = host()
    x = torch.randn(2, 17, 16, generator=torch.Generator().manual_seed(1))
    with replace_attention(model, layers=[0], residual=False) as replaced, torch.no_grad():
        (new,) = replaced.modules.values()
        torch.testing.assert_close(new(x)[0], new.mixer(x, mode="reference")[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [(8, 24), (24, 8)])
def test_images_that_are_not_square_give_their_own_grid(size):
    model = host("dinov2")
    grids = []
    with replace_attention(model) as replaced:
        for module in replaced.modules.values():
            module.mixer.register_forward_pre_hook(lambda _, a, k: grids.append(k["grid"]), with_kwargs=True)
        run(model, pixels(*size))
        run(model, pixel_values=pixels(16, 16))
    assert grids == [(size[0] // 4, size[1] // 4)] * 3 + [(4, 4)] * 3


@pytest.mark.parametrize("mixer", [InlineMixer, LinearMixer])
def test_the_new_modules_train(mixer):
    model = host()
    with replace_attention(model, mixer=mixer) as replaced:
        model(pixels()).last_hidden_state.square().mean().backward()
        assert all(p.grad is not None and bool(torch.isfinite(p.grad).all()) for p in replaced.parameters())


def test_the_mode_dtype_and_a_copy_of_the_model_are_kept():
    model = host("dinov2").double().train()
    with replace_attention(model) as replaced:
        assert all(module.training for module in replaced.modules.values())
        assert {p.dtype for p in replaced.parameters()} == {torch.float64}
        model.eval()
        twin = copy.deepcopy(model)
        wide = pixels(8, 24).double()
        assert torch.equal(run(twin, wide), run(model, wide))


def test_a_replaced_model_passes_the_door():
    class Names(Observer):
        def start(self):
            self.rules = {}

        def observe(self, call, output, lse=None):
            self.rules[call.site.name] = call.weighing

        def result(self):
            return self.rules

    model, names = host(), Names()
    with replace_attention(model, layers=[0, 2]), headway.observe(model, names):
        run(model)
    rules = [rule and rule.name for rule in names.result().values()]
    assert rules == ["subtractive identity", None, "subtractive identity"]


def test_layers_that_are_not_there_are_refused_and_nothing_is_changed():
    model = host()
    before = run(model)
    with pytest.raises(ArgumentError, match=r"layers: got 3, expected 0\.\.2"):
        replace_attention(model, layers=[0, 3])
    assert torch.equal(run(model), before)
    assert not model._forward_pre_hooks


def test_models_of_another_form_are_refused():
    with pytest.raises(HostError, match="expected a vision transformer"):
        replace_attention(nn.Sequential(nn.Linear(2, 2)))
    llama, _ = tiny_host("llama")
    with pytest.raises(HeadwayError, match="vision transformer"):
        replace_attention(llama)


def test_a_prefix_that_nobody_knows_must_be_given():
    model = host()
    model.config.model_type = "other"
    with pytest.raises(ArgumentError, match="prefix: got None for a model of type 'other'"):
        replace_attention(model)
    with replace_attention(model, prefix=1):
        run(model)


def test_a_wrong_prefix_is_told_from_the_number_of_tokens():
    model = host()
    with replace_attention(model, prefix=2), pytest.raises(ArgumentError, match="2 prefix tokens for 17 tokens"):
        run(model)


def test_masks_and_rotations_are_refused():
    model = host()
    x = torch.zeros(1, 17, 16)
    with replace_attention(model, layers=[0], residual=False) as replaced:
        (new,) = replaced.modules.values()
        with pytest.raises(ArgumentError, match="attention_mask: got one"):
            new(x, torch.zeros(1, 1, 17, 17))
        with pytest.raises(HostError, match="rotates"):
            new(x, position_embeddings=(x, x))


@pytest.mark.real
def test_the_embedded_vision_model_runs_with_replaced_layers():
    model, _ = headway.load("vit")
    images = torch.rand(1, 3, 56, 84, generator=torch.Generator().manual_seed(0))
    before = run(model, images)
    with replace_attention(model, layers=[0, 1]) as replaced:
        assert torch.isfinite(run(model, images)).all()
        assert replaced.modules
    assert torch.equal(run(model, images), before)
