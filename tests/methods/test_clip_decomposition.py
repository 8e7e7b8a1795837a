"""Parts of an embedding add up to it, in both towers, pruned or not; what does not add up is refused."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

import headway
from headway.errors import ArgumentError, HostError
from headway.methods.diagnosis.clip_ccs import ReconstructionError, decompose, pruned, tiny, tower
from headway.methods.diagnosis.clip_ccs.scoring import gather, last_layers
from headway.tasks.attribute_scenes import make_scenes, phrase_bank


@pytest.fixture(scope="module")
def model():
    made = tiny.untrained(3).eval()
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(len(name)))
            if "norm" in name and name.endswith("weight"):
                parameter.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(len(name)))
    return made


@pytest.fixture(scope="module")
def batch():
    return tiny.pixels(make_scenes(6, seed=0).images)


@pytest.fixture(scope="module")
def texts():
    return tiny.tokens(tiny.tokenizer(), [p.text for p in phrase_bank()[::29]])


def embedding(model, batch):
    with torch.no_grad():
        return model.get_image_features(pixel_values=batch).pooler_output


def test_image_parts_add_up_to_the_unit_embedding(model, batch):
    found = decompose(tower(model), batch)
    assert found.heads.shape == (6, 4, 8, 64)
    assert found.stages.shape == (6, 5, 64)
    want = nn.functional.normalize(embedding(model, batch), dim=-1)
    torch.testing.assert_close(found.total(), want, atol=1e-5, rtol=0)
    assert found.error < 1e-5


def test_text_parts_add_up_at_the_end_token_of_each_text(model, texts):
    found = decompose(tower(model, "text"), texts)
    with torch.no_grad():
        want = nn.functional.normalize(model.get_text_features(**texts).pooler_output, dim=-1)
    torch.testing.assert_close(found.total(), want, atol=1e-5, rtol=0)
    assert len(set(texts["attention_mask"].sum(1).tolist())) > 1


@pytest.mark.parametrize("kind", ["image", "text"])
def test_tokens_of_a_head_add_up_to_it(model, batch, texts, kind):
    given = batch if kind == "image" else texts
    found = decompose(tower(model, kind), given, spatial=True)
    torch.testing.assert_close(found.tokens.sum(3), found.heads, atol=1e-5, rtol=0)


def test_the_sum_holds_after_pruning_too(model, batch):
    gates = {(0, 1): 0.0, (3, 2): 0.5}
    found = decompose(tower(model), batch, gates=gates, spatial=True)
    assert found.error < 1e-5
    torch.testing.assert_close(found.tokens.sum(3), found.heads, atol=1e-5, rtol=0)
    with pruned(tower(model), [(0, 1)]), pruned(tower(model), [(3, 2)], gate=0.5):
        within = decompose(tower(model), batch)
    torch.testing.assert_close(within.heads, found.heads, atol=1e-6, rtol=0)


def test_a_gate_in_the_last_layer_changes_its_own_head_alone(model, batch):
    before, after = decompose(tower(model), batch), decompose(tower(model), batch, gates={(3, 5): 0.0})

    def apart(found):
        """What heads wrote beyond head (0, 0): their shares of the mean and of the bias, which are alike, fall out."""
        return found.heads - found.heads[:, :1, :1]

    def moved(gated, *, head):
        """How far each head moved, but for one factor for each image: the deviation and the length of the embedding."""
        old, new = apart(before), apart(gated)
        others = torch.ones(4, 8, 1)
        others[head] = 0
        factor = (others * old * new).sum((1, 2, 3)) / (others * old * old).sum((1, 2, 3))
        return (new - factor.view(-1, 1, 1, 1) * old).norm(dim=-1).amax(0)

    change = moved(after, head=(3, 5))
    own = change[3, 5].clone()
    change[3, 5] = 0
    assert own > 1e-2
    assert change.max() < 1e-5
    earlier = moved(decompose(tower(model), batch, gates={(2, 5): 0.0}), head=(2, 5))
    assert earlier[3].max() > 1e-4, "a later layer reads what an earlier one wrote"
    earlier[2, 5] = 0
    assert earlier[:3].max() < earlier[3].max()


def test_gate_one_is_bit_identical_and_gate_zero_equals_zeroed_columns(model, batch):
    part, plain = tower(model), embedding(model, batch)
    with pruned(part, [(1, 3)], gate=1.0):
        assert torch.equal(embedding(model, batch), plain)
    with pruned(part, [(1, 3)]):
        gated = embedding(model, batch)
        with pruned(part, [(1, 3)]):
            assert torch.equal(embedding(model, batch), gated)
    weight = part.outputs[1].weight
    kept = weight.detach().clone()
    with torch.no_grad():
        weight[:, 3 * 12 : 4 * 12] = 0
    zeroed = embedding(model, batch)
    with torch.no_grad():
        weight.copy_(kept)
    torch.testing.assert_close(gated, zeroed, atol=1e-5, rtol=0)
    assert torch.equal(embedding(model, batch), plain)


def test_a_half_gate_equals_halved_columns_and_an_error_inside_restores_the_host(model, batch):
    part, plain = tower(model), embedding(model, batch)
    with pruned(part, [(1, 3), (3, 0)], gate=0.5):
        halved = embedding(model, batch)
    assert (halved - plain).abs().max() > 1e-4
    with torch.no_grad():
        for layer, head in ((1, 3), (3, 0)):
            part.outputs[layer].weight[:, head * 12 : (head + 1) * 12] *= 0.5
        by_weights = embedding(model, batch)
        for layer, head in ((1, 3), (3, 0)):
            part.outputs[layer].weight[:, head * 12 : (head + 1) * 12] *= 2
    torch.testing.assert_close(halved, by_weights, atol=1e-5, rtol=0)
    with pytest.raises(KeyboardInterrupt), pruned(part, [(2, 2)]):
        raise KeyboardInterrupt
    assert torch.equal(embedding(model, batch), plain)


def test_text_heads_and_image_heads_are_pruned_apart(model, batch, texts):
    plain = embedding(model, batch)
    with pruned(tower(model, "text"), [(0, 0), (1, 2)]):
        assert torch.equal(embedding(model, batch), plain)
        silent = decompose(tower(model, "text"), texts).heads
    spoken = decompose(tower(model, "text"), texts).heads
    # Behind the gate a head still carries its share of the bias, which moves with the length of the embedding alone.
    assert silent[:, 0, 0].std(0).max() < 0.1 * spoken[:, 0, 0].std(0).max()
    assert silent[:, 0, 1].std(0).max() > 0.5 * spoken[:, 0, 1].std(0).max()


def test_another_epsilon_is_refused_before_any_score(model, batch):
    part, norm = tower(model), tower(model).norm
    forward = norm.forward
    norm.forward = lambda x: nn.functional.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, 0.5)
    try:
        with pytest.raises(ReconstructionError, match="ε or form differs"):
            decompose(part, batch)
    finally:
        norm.forward = forward


def test_a_head_or_layer_that_is_not_there_is_named(model, batch):
    with pytest.raises(ArgumentError, match=r"\(4, 0\), expected layer 0..3 and head 0..7"):
        pruned(tower(model), [(4, 0)])
    with pytest.raises(ArgumentError, match=r"\(0, 8\)"):
        decompose(tower(model), batch, gates={(0, 8): 0.0})
    with pytest.raises(ArgumentError, match="layers: got 9"):
        gather(tower(model), [batch], layers=[9])
    with pytest.raises(ArgumentError, match="heads: got none"):
        pruned(tower(model), [])


def test_a_gate_in_the_text_tower_leaves_pictures_alone(model, batch, texts):
    part, plain = tower(model, "text"), embedding(model, batch)
    with torch.no_grad():
        before = model.get_text_features(**texts).pooler_output
    with pruned(part, [(0, 2)]), torch.no_grad():
        assert torch.equal(embedding(model, batch), plain)
        gated = model.get_text_features(**texts).pooler_output
    assert (gated - before).abs().max() > 1e-4
    weight = part.outputs[0].weight
    kept = weight.detach().clone()
    with torch.no_grad():
        weight[:, 2 * 16 : 3 * 16] = 0
        zeroed = model.get_text_features(**texts).pooler_output
        weight.copy_(kept)
    torch.testing.assert_close(gated, zeroed, atol=1e-5, rtol=0)


def test_pruning_a_whole_layer_warns(model, batch):
    with pytest.warns(UserWarning, match="all 8 heads of layer 2"):
        pruned(tower(model), [(2, head) for head in range(8)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pruned(tower(model), [(2, head) for head in range(7)])


def test_a_pooling_head_has_no_class_token():
    from transformers import SiglipConfig, SiglipModel

    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    siglip = SiglipModel(SiglipConfig(text_config=small, vision_config={**small, "image_size": 16, "patch_size": 8}))
    with pytest.raises(HostError, match=r"no CLS residual stream.*pooled by attention.*Dinov2Model"):
        tower(siglip)
    with pytest.raises(HostError, match="no CLS residual stream"):
        tower(nn.Linear(2, 2))


def test_a_text_without_its_end_token_is_refused(model, texts):
    cut = {name: tensor[:, :3] for name, tensor in texts.items()}
    with pytest.raises(ArgumentError, match="without the end token"):
        decompose(tower(model, "text"), cut)


@pytest.mark.parametrize("name", ["Dinov2", "Dinov2WithRegisters"])
def test_layer_scale_of_dinov2_is_part_of_what_a_head_wrote(name):
    import transformers

    config = getattr(transformers, f"{name}Config")(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=3, mlp_ratio=2, image_size=28, patch_size=14
    )
    host = getattr(transformers, f"{name}Model")(config).eval()
    with torch.no_grad():
        for block in tower(host).first, host.encoder.layer[1]:
            block.layer_scale1.lambda1.uniform_(0.1, 2.0)
            block.layer_scale2.lambda1.uniform_(0.1, 2.0)
    found = decompose(tower(host), torch.randn(3, 3, 28, 28, generator=torch.Generator().manual_seed(0)))
    assert found.error < 1e-5
    assert found.heads.shape == (3, 2, 3, 24)
    with pytest.raises(HostError, match="no text tower"):
        tower(host, "text")


def test_vision_and_text_models_with_projection_are_towers(batch):
    from transformers import CLIPVisionModelWithProjection

    whole = tiny.untrained(1).eval()
    alone = CLIPVisionModelWithProjection(whole.config.vision_config).eval()
    assert decompose(tower(alone), batch).error < 1e-5


def test_gathered_batches_are_kept_in_half_precision_and_not_run_twice(model, batch, tmp_path):
    part = tower(model)
    first = gather(part, batch.split(2), layers=[2, 3], folder=tmp_path)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) == 3
    assert first.heads.dtype == torch.float16
    whole = decompose(part, batch)
    torch.testing.assert_close(first.of((3, 1)), whole.heads[:, 3, 1], atol=2e-4, rtol=1e-3)
    torch.testing.assert_close(first.heads.float().sum((1, 2)) + first.rest, whole.embedding, atol=5e-3, rtol=0)
    written = [path.stat().st_mtime_ns for path in files]
    files[0].write_bytes(b"broken")
    again = gather(part, batch.split(2), layers=[2, 3], folder=tmp_path)
    assert torch.equal(again.heads, first.heads)
    assert [path.stat().st_mtime_ns for path in files[1:]] == written[1:]
    assert last_layers(part) == [0, 1, 2, 3]
    assert last_layers(part, 2) == [2, 3]


def test_a_scope_leaves_the_model_as_it_was(model, batch):
    before = {name: id(module) for name, module in model.named_modules()}
    name = model.config.vision_config._attn_implementation
    with pytest.raises(RuntimeError), pruned(tower(model), [(0, 0)]):
        raise RuntimeError
    assert {n: id(m) for n, m in model.named_modules()} == before
    assert model.config.vision_config._attn_implementation == name
    assert headway.door.inspect(model).refused == ""


def quick_gelu(**changes):
    from transformers import CLIPConfig, CLIPModel

    tower_config = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 3}
    config = CLIPConfig(
        text_config=tower_config | {"vocab_size": 60, "eos_token_id": 59, "bos_token_id": 58, "pad_token_id": 0},
        vision_config=tower_config | {"image_size": 16, "patch_size": 8} | changes,
        projection_dim=16,
    )
    torch.manual_seed(0)
    return CLIPModel(config).eval()


def test_openai_layouts_run_quick_gelu_and_add_up():
    made = quick_gelu()
    assert made.config.vision_config.hidden_act == "quick_gelu"
    pictures = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    assert decompose(tower(made), pictures).error < 1e-5
    other = quick_gelu(hidden_act="gelu")
    other.load_state_dict(made.state_dict())
    gap = (decompose(tower(other), pictures).embedding - decompose(tower(made), pictures).embedding).norm(dim=-1)
    assert float(gap.min()) > 1e-5, "the other activation adds up too, to another embedding"


def test_an_activation_that_the_configuration_does_not_state_is_refused():
    made = quick_gelu()
    made.vision_model.encoder.layers[1].mlp.activation_fn = nn.GELU()
    with pytest.raises(HostError, match=r"layer 1 of the image tower runs GELU.*'quick_gelu'"):
        tower(made)
    tower(made, "text")


def test_openai_weights_without_quick_gelu_are_refused():
    made = quick_gelu(hidden_act="gelu")
    tower(made)
    made.name_or_path = "openai/clip-vit-base-patch16"
    with pytest.raises(HostError, match="trained with quick_gelu"):
        tower(made)
