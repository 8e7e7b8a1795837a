"""The tiny CLIP: its loss, its seed, its gate, and its place in the cache."""

from __future__ import annotations

import pytest
import torch

import headway
from headway.errors import HostError
from headway.methods.diagnosis.clip_ccs import attribute_clip, describe, embed_bank, gather, score, tiny, tower
from headway.tasks.attribute_scenes import CONCEPTS, make_scenes, phrase_bank, vocabulary


def test_the_loss_is_cross_entropy_where_each_picture_has_one_text():
    logits = torch.randn(5, 5, generator=torch.Generator().manual_seed(0))
    wanted = torch.arange(5)
    both = torch.nn.functional.cross_entropy(logits, wanted) + torch.nn.functional.cross_entropy(logits.T, wanted)
    torch.testing.assert_close(tiny.contrastive_loss(logits, torch.eye(5, dtype=torch.bool)), both / 2)


def test_texts_that_are_true_of_the_same_pictures_share_the_target():
    true = torch.tensor([[True, True, False], [False, False, True]])
    best = torch.where(true, 40.0, -40.0)
    logits = best + torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    floor = tiny.contrastive_loss(logits, true)
    assert float(floor) == pytest.approx(torch.tensor(2.0).log().item() / 4, abs=1e-5)
    assert tiny.contrastive_loss(logits + torch.tensor([[3.0, -3.0, 0.0], [0.0, 0.0, 0.0]]), true) > floor


def test_a_seed_gives_the_same_weights_and_leaves_torch_alone():
    state = torch.get_rng_state()
    one, two, other = tiny.untrained(1), tiny.untrained(1), tiny.untrained(2)
    assert torch.equal(torch.get_rng_state(), state)
    named = dict(two.named_parameters())
    assert all(torch.equal(weight, named[name]) for name, weight in one.named_parameters())
    assert not torch.equal(one.visual_projection.weight, other.visual_projection.weight)


def test_a_step_trains_both_towers():
    model = tiny.untrained(0)
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    steps = []
    course = tiny.train(model, seed=0, steps=2, progress=lambda done, total: steps.append((done, total)))
    assert steps == [(1, 2), (2, 2)]
    assert len(course) == 2
    assert not model.training
    changed = {name.split(".")[0] for name, weight in model.named_parameters() if not torch.equal(weight, before[name])}
    assert {"vision_model", "text_model", "visual_projection", "text_projection"} <= changed


def test_every_word_has_a_token_and_texts_end():
    reader = tiny.tokenizer()
    made = tiny.tokens(reader, [" ".join(vocabulary()[:6]), "a circle"])
    assert reader.unk_token_id not in made["input_ids"].flatten().tolist()
    assert made["attention_mask"].sum(1).tolist() == [8, 4]
    assert tiny.tokens(reader, ["a zebra"])["input_ids"].tolist()[0][2] == reader.unk_token_id


@pytest.fixture
def quick(monkeypatch, tmp_path):
    """A cache of its own, and trainings that are counted and cost nothing."""
    monkeypatch.setenv("HEADWAY_CACHE", str(tmp_path))
    seeds = []
    monkeypatch.setattr(tiny, "train", lambda model, *, seed, progress: seeds.append(seed) or [])
    monkeypatch.setattr(tiny, "zero_shot", lambda model, scenes: dict.fromkeys(CONCEPTS, 0.95))
    return seeds


def test_it_is_trained_once_and_then_read_from_the_cache(quick):
    model, reader = attribute_clip()
    again, _ = attribute_clip()
    assert quick == [0]
    pixels = tiny.pixels(make_scenes(2, seed=0).images)
    with torch.no_grad():
        assert torch.equal(tower(model).embed(pixels), tower(again).embed(pixels))
    assert (
        tiny.tokens(reader, ["a circle"])["input_ids"].tolist()
        == tiny.tokens(tiny.tokenizer(), ["a circle"])["input_ids"].tolist()
    )
    attribute_clip(seed=3)
    assert quick == [0, 3]


def test_it_is_a_folder_like_any_other_clip(quick, tmp_path):
    pytest.importorskip("PIL")
    model, _ = attribute_clip()
    folder = next((tmp_path / "hosts").glob("attribute-clip-*"))
    loaded, processor = headway.load(folder)
    assert type(loaded) is type(model)
    picture = make_scenes(1, seed=0).images
    made = processor.image_processor(
        [picture[0].permute(1, 2, 0).mul(255).round().byte().numpy()], return_tensors="pt"
    )["pixel_values"]
    torch.testing.assert_close(torch.as_tensor(made), tiny.pixels(picture), atol=0.02, rtol=0)


def test_one_that_has_not_learned_is_refused_and_not_kept(quick, monkeypatch, tmp_path):
    monkeypatch.setattr(tiny, "zero_shot", lambda model, scenes: dict.fromkeys(CONCEPTS, 0.4))
    with pytest.raises(HostError, match=r"accuracy of 0\.40.*expected 0\.8 or more.*another seed"):
        attribute_clip()
    assert not list((tmp_path / "hosts").glob("attribute-clip-*"))


def test_heads_are_described_and_scored_by_the_concepts_of_their_bank():
    model = tiny.untrained(0).eval()
    reader = tiny.tokenizer()
    known = {phrase.text: phrase.concept for phrase in phrase_bank()}
    bank = embed_bank(tower(model, "text"), lambda t: tiny.tokens(reader, t), list(known), concepts=known)
    assert len(bank) == len(known)
    part = tower(model)
    found = gather(part, [tiny.pixels(make_scenes(20, seed=0).images)], layers=[3])
    heads = score(describe(part, found, bank, texts=3), bank, texts=3)
    assert [h.place for h in heads] == [(3, head) for head in range(8)]
    for head in heads:
        assert head.score == sum(known[text] == head.concept for text in head.texts)
        assert 1 <= head.score <= 3
        assert head.abstentions == 0
        assert 0 <= head.explained <= 1
    assert all("cut to" in note for head in heads for note in head.notes)
