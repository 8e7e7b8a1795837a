"""Scenes are what their labels say, captions are true, and every phrase of the bank speaks of one concept."""

from __future__ import annotations

import pytest
import torch

from headway.errors import ArgumentError
from headway.tasks.attribute_scenes import (
    CONCEPTS,
    RGB,
    WORDS,
    concept_of,
    draw_captions,
    draw_labels,
    draw_scenes,
    make_scenes,
    phrase_bank,
    prompts,
    values,
    vocabulary,
)


def labelled(**given):
    row = [values(concept).index(given[concept]) if concept in given else 0 for concept in CONCEPTS]
    return torch.tensor([row])


def ink(image):
    """Where a picture is painted: far from grey."""
    return (image.max(0).values - image.min(0).values) > 0.35


def test_the_bank_knows_the_concept_of_every_phrase():
    bank = phrase_bank()
    assert 300 <= len(bank) <= 600
    texts = [p.text for p in bank]
    assert len(set(texts)) == len(texts)
    assert concept_of(texts)["something crimson"] == "colour"
    with pytest.raises(ArgumentError, match="texts"):
        concept_of(["an elephant"])


def test_a_word_belongs_to_one_value():
    words = [word for group in WORDS.values() for synonyms in group.values() for word in synonyms]
    assert len(set(words)) == len(words)


def test_every_caption_can_be_read():
    known = set(vocabulary())
    labels = make_scenes(200, seed=1).labels
    captions = draw_captions(labels, torch.Generator().manual_seed(2))
    assert all(set(text.split()) <= known for text in captions.texts)
    assert all(len(text.split()) <= 14 for text in captions.texts)


def test_a_caption_is_true_of_its_scene_and_of_all_that_agree():
    labels = make_scenes(100, seed=3).labels
    captions = draw_captions(labels, torch.Generator().manual_seed(4))
    true = captions.true_of(labels)
    assert bool(true.diagonal().all())
    for scene, text in [(0, 1), (5, 9), (40, 2)]:
        agrees = all(
            v in (-1, w) for v, w in zip(captions.required[text].tolist(), labels[scene].tolist(), strict=True)
        )
        assert bool(true[scene, text]) == agrees
    words = {w: (c, v) for c, group in WORDS.items() for v, synonyms in group.items() for w in synonyms}
    for text, required in zip(captions.texts, captions.required.tolist(), strict=True):
        said = {words[w] for w in text.split() if w in words}
        assert said == {(c, values(c)[v]) for c, v in zip(CONCEPTS, required, strict=True) if v >= 0}


@pytest.mark.parametrize("colour", list(RGB))
def test_the_colour_is_seen(colour):
    image = draw_scenes(labelled(colour=colour, shape="square"), torch.Generator().manual_seed(0)).images[0]
    mean = image[:, ink(image)].mean(1)
    nearest = min(RGB, key=lambda name: float((mean - torch.tensor(RGB[name])).norm()))
    assert nearest == colour


@pytest.mark.parametrize(
    ("place", "axis", "low"), [("left", 1, True), ("right", 1, False), ("top", 0, True), ("bottom", 0, False)]
)
def test_the_position_is_seen(place, axis, low):
    image = draw_scenes(labelled(position=place, count="three"), torch.Generator().manual_seed(1)).images[0]
    at = ink(image).nonzero()[:, axis].float().mean()
    assert (at < 12) if low else (at > 19)


def test_count_and_texture_change_how_much_is_painted():
    def painted(**given):
        return int(
            ink(draw_scenes(labelled(shape="square", **given), torch.Generator().manual_seed(2)).images[0]).sum()
        )

    one, three = painted(count="one"), painted(count="three")
    assert three == pytest.approx(3 * one, rel=0.25)
    assert painted(texture="striped") < 0.75 * one


def test_a_planted_correlation_binds_one_shape_alone():
    labels = draw_labels(6000, torch.Generator().manual_seed(5), correlation=("circle", "red", 0.95))
    red, circle = labels[:, 0] == 0, labels[:, 1] == 0
    assert float(red[circle].float().mean()) == pytest.approx(0.95, abs=0.02)
    assert float(red[~circle].float().mean()) == pytest.approx(1 / 6, abs=0.02)


def test_a_seed_gives_the_same_scenes():
    one, two = make_scenes(5, seed=7), make_scenes(5, seed=7)
    assert torch.equal(one.images, two.images)
    assert torch.equal(one.labels, two.labels)
    assert not torch.equal(one.images, make_scenes(5, seed=8).images)


def test_prompts_name_their_value():
    assert all("red" in text for text in prompts("colour")["red"])
    assert list(prompts("count")) == ["one", "two", "three"]


def test_bad_arguments_are_refused():
    with pytest.raises(ArgumentError, match="count: got 0"):
        make_scenes(0, seed=0)
    with pytest.raises(ArgumentError, match="correlation"):
        make_scenes(3, seed=0, correlation=("circle", "mauve", 0.9))
    with pytest.raises(ArgumentError, match="concept"):
        values("smell")
    with pytest.raises(ArgumentError, match="a colour outside"):
        draw_scenes(torch.tensor([[9, 0, 0, 0, 0]]), torch.Generator())
    with pytest.raises(ArgumentError, match="labels: got shape"):
        draw_scenes(torch.zeros(3, 4, dtype=torch.long), torch.Generator())
