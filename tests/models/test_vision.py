from __future__ import annotations

import pytest
import torch
from transformers import AutoModel, AutoModelForImageClassification

import headway
from headway.errors import ArgumentError
from headway.models import HeadwayViT, HeadwayViTConfig


def vit(mixer: str, **options: object) -> HeadwayViT:
    torch.manual_seed(0)
    fields = {"image_size": 8, "patch_size": 2, "width": 32, "layers": 2, "heads": 4, **options}
    return HeadwayViT(HeadwayViTConfig(mixer=mixer, **fields)).eval()


def images(seed: int = 0, **shape: int) -> torch.Tensor:
    height, width = shape.get("height", 8), shape.get("width", 8)
    return torch.randn(3, 1, height, width, generator=torch.Generator().manual_seed(seed))


BOTH_WAYS = ["softmax", "inline", "linear"]


@pytest.mark.parametrize("mixer", BOTH_WAYS)
@pytest.mark.parametrize("cls_token", [False, True])
@torch.no_grad()
def test_every_patch_reaches_the_class(mixer, cls_token):
    model = vit(mixer, cls_token=cls_token)
    before = model(images()).logits
    assert before.shape == (3, 10)
    for row, column in ((0, 0), (7, 7)):
        other = images()
        other[:, :, row, column] += 3.0
        assert not torch.allclose(model(other).logits, before)


@pytest.mark.parametrize("mixer", BOTH_WAYS)
@torch.no_grad()
def test_saved_and_loaded_it_is_the_same(mixer, tmp_path):
    model = vit(mixer)
    model.save_pretrained(tmp_path)
    again = AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(again(images()).logits, model(images()).logits, rtol=1e-6, atol=1e-6)
    assert type(AutoModel.from_pretrained(tmp_path)) is HeadwayViT


@pytest.mark.parametrize("mixer", BOTH_WAYS)
@torch.no_grad()
def test_the_door_sees_attention_both_ways(mixer):
    model = vit(mixer)
    with headway.capture(model, what=("weights", "value", "head_output")) as captured:
        model(images())
    for site in captured.result():
        call = captured.result().calls(site)[0]
        torch.testing.assert_close(call["weights"] @ call["value"], call["head_output"], rtol=1e-3, atol=1e-5)
        assert bool(call["weights"].triu(1).any())


@torch.no_grad()
def test_images_need_not_be_square():
    assert vit("inline", image_size=(8, 12))(images(width=12)).logits.shape == (3, 10)


def test_patches_cover_the_image():
    with pytest.raises(ArgumentError, match="patch_size"):
        vit("softmax", image_size=9)


def test_labels_give_a_loss_that_reaches_every_parameter():
    model = vit("inline")
    model(images(), labels=torch.tensor([1, 2, 3])).loss.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


@torch.no_grad()
def test_attentions_of_an_image_are_what_the_door_reads():
    model = vit("softmax", cls_token=True)
    found = model(images(), output_attentions=True)
    assert torch.allclose(found.logits, model(images()).logits, atol=1e-5)
    assert [weights.shape for weights in found.attentions] == [(3, 4, 17, 17)] * 2
    torch.testing.assert_close(found.attentions[0].sum(-1), torch.ones(3, 4, 17))
    assert bool(found.attentions[0].triu(1).any())
