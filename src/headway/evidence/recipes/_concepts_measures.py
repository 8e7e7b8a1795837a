"""What the CLIP recipe measures on one trained model, as plain data."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from headway.evidence.recipes import _concepts_planted as planted
from headway.methods.diagnosis.clip_ccs import (
    HeadConcept,
    TextBank,
    Tower,
    by_class,
    class_vectors,
    completeness,
    concentrated_ratio,
    decompose,
    describe,
    embed,
    embed_bank,
    equal_count,
    gather,
    groups_of,
    histogram,
    last_layers,
    layer_matched,
    of_concept,
    pruned,
    right,
    score,
    skew,
    tiny,
    tower,
)
from headway.methods.diagnosis.clip_ccs.scoring import Contributions
from headway.tasks.attribute_scenes import (
    CONCEPTS,
    TEMPLATES,
    Scenes,
    make_scenes,
    phrase_bank,
    values,
)

#: The planted correlation: this share of the circles is red in training.
PLANTED = ("circle", "red", 0.95)
#: Texts that describe a head. The paper takes five; attributes of four values span three directions beside their mean.
TEXTS = 3
#: The layer and head that planted directions are written by.
PLACE = (3, 0)
#: Concepts that heads of the last layer are made to write of, one each, and the rate of the training behind it: half of
#: the model's own.
OWNED, TUNING_RATE = ("colour", "position"), tiny.RATE / 2
Head = tuple[int, int]


def trained(seed: int, steps: int, *, correlation: tuple[str, str, float] | None = None) -> Any:
    model = tiny.untrained(seed % 2**31)
    tiny.train(model, seed=seed % 2**31, steps=steps, correlation=correlation)
    return model


def bank_of(model: Any) -> TextBank:
    reader = tiny.tokenizer()
    known = {phrase.text: phrase.concept for phrase in phrase_bank()}
    return embed_bank(tower(model, "text"), lambda t: tiny.tokens(reader, t), list(known), concepts=known)


class Silencing:
    """Zero-shot answers of a model on one set of scenes, with all heads and with some silenced."""

    def __init__(self, model: Any, scenes: Scenes) -> None:
        self.part: Tower = tower(model)
        self.scenes = scenes
        self.batches = tiny.pixels(scenes.images).split(100)
        self.vectors = {concept: tiny.vectors(model, concept) for concept in CONCEPTS}
        self.before = self.hits(self.embeddings([]))

    def embeddings(self, heads: Sequence[Head]) -> Tensor:
        if not heads:
            return embed(self.part, self.batches)
        with pruned(self.part, heads):
            return embed(self.part, self.batches)

    def hits(self, embeddings: Tensor) -> dict[str, Tensor]:
        """By attribute which scenes are answered rightly."""
        return {c: right(embeddings, self.vectors[c], self.scenes.of(c)).float() for c in CONCEPTS}

    def lost(self, heads: Sequence[Head]) -> dict[str, Tensor]:
        """By attribute and scene: 1 for an answer that is lost, −1 for one that is won."""
        after = self.hits(self.embeddings(heads))
        return {concept: self.before[concept] - after[concept] for concept in CONCEPTS}

    def drop(self, heads: Sequence[Head]) -> float:
        """The mean drop in accuracy over the attributes."""
        return float(np.mean([float(lost.mean()) for lost in self.lost(heads).values()]))

    def drops(self, pairs: Sequence[tuple[Sequence[Head], Sequence[Head]]]) -> list[list[float]]:
        return [[self.drop(first), self.drop(second)] for first, second in pairs]


def scored_heads(model: Any, bank: TextBank, scenes: Scenes, *, texts: int = TEXTS) -> list[HeadConcept]:
    part = tower(model)
    found = gather(part, tiny.pixels(scenes.images).split(100))
    return score(describe(part, found, bank, texts=texts), bank, texts=texts)


def silenced(model: Any, bank: TextBank, count: int, draws: int, seed: int) -> dict[str, Any]:
    """Scores of all heads; the drops by high heads and as many others of the same layers; and by scene the colour
    answers minus the shape answers that colour heads cost. Heads are scored on other scenes than they are silenced
    on."""
    heads = scored_heads(model, bank, make_scenes(count, seed=seed))
    silencing = Silencing(model, make_scenes(count, seed=seed + 1))
    generator = torch.Generator().manual_seed(seed)
    classes = by_class(heads)
    rest = [h.place for h in heads if h.kind != "high"]
    pairs = _pairs(classes["high"], rest, generator, draws)
    colour = of_concept(heads, "colour")
    lost = silencing.lost(colour) if colour else {}
    return {
        "accuracy": {concept: float(hits.mean()) for concept, hits in silencing.before.items()},
        "classes": {kind: len(places) for kind, places in classes.items()},
        "shares": histogram(heads),
        "concentrated": concentrated_ratio(heads),
        "heads": [[h.layer, h.head, h.concept, h.score] for h in heads],
        "high": silencing.drops(pairs),
        "matched": len(pairs[0][0]) if pairs else 0,
        "all high": silencing.drop(classes["high"]),
        "colour heads": colour,
        "interaction": (lost["colour"] - lost["shape"]).tolist() if lost else [],
    }


def specialised(model: Any, bank: TextBank, steps: int, count: int, draws: int, seed: int) -> dict[str, Any]:
    """The same questions of a model some heads of whose last layer were made to write of one concept each, and which
    was trained on so: scores by the paper's five texts, the drops by high heads and as many others of the layer, and as
    many low heads; and by planted head the drop of its own concept beside the mean of the other four."""
    layer = PLACE[0]
    built = planted.specialised(model, bank, OWNED, layer=layer, steps=steps, rate=TUNING_RATE, seed=seed)
    own = planted.same_bank(built, bank)
    heads = scored_heads(built, own, make_scenes(count, seed=seed), texts=5)
    silencing = Silencing(built, make_scenes(count, seed=seed + 1))
    classes = by_class(heads)
    high, rest = classes["high"], [h.place for h in heads if h.kind != "high"]
    generator, against = torch.Generator().manual_seed(seed), []
    pairs = _pairs(high, rest, generator, draws)
    if high and classes["low"]:
        against = [equal_count(high, classes["low"], generator) for _ in range(draws)]
    by_place = {h.place: h for h in heads}
    places = [(layer, number) for number in range(len(OWNED))]
    lost = [{c: float(v.mean()) for c, v in silencing.lost([place]).items()} for place in places]
    return {
        "accuracy": {concept: float(hits.mean()) for concept, hits in silencing.before.items()},
        "heads": [[h.layer, h.head, h.concept, h.score] for h in heads],
        "planted high": [
            by_place[p].kind == "high" and by_place[p].concept == c for p, c in zip(places, OWNED, strict=True)
        ],
        "high": high,
        "low": classes["low"],
        "drops": silencing.drops(pairs),
        "against": silencing.drops(against),
        "own": [row[c] for row, c in zip(lost, OWNED, strict=True)],
        "other": [float(np.mean([row[o] for o in CONCEPTS if o != c])) for row, c in zip(lost, OWNED, strict=True)],
    }


def planted_scores(model: Any, bank: TextBank, mixtures: int, count: int, seed: int) -> dict[str, list[int]]:
    """Scores of a head that writes colour alone, and of heads that write mixtures of every concept."""
    batches = tiny.pixels(make_scenes(count, seed=seed).images).split(100)
    colour = planted.writing(model, PLACE, planted.concept_directions(bank, "colour"))
    generator = torch.Generator().manual_seed(seed % 2**31)
    mixed = [
        planted.writing(model, PLACE, planted.mixed_directions(bank, CONCEPTS, generator)) for _ in range(mixtures)
    ]
    row = planted.scored(colour, PLACE, batches, bank)
    return {
        "colour": [row.score if row.concept == "colour" else 0],
        "mixtures": [planted.scored(built, PLACE, batches, bank).score for built in mixed],
    }


def kept_by_texts(model: Any, bank: TextBank, texts: int, count: int, seed: int) -> dict[str, float]:
    """Mean accuracy of whole embeddings, and of ones in which every head is replaced by what its texts explain."""
    made = make_scenes(count, seed=seed)
    part = tower(model)
    parts = [decompose(part, batch) for batch in tiny.pixels(made.images).split(100)]
    heads, stages = torch.cat([p.heads for p in parts]), torch.cat([p.stages for p in parts])
    whole = torch.cat([p.embedding for p in parts])
    found = Contributions(tuple(last_layers(part)), heads, stages.sum(1), whole, max(p.error for p in parts))
    spans = describe(part, found, bank, texts=texts)
    embeddings = {
        "whole": whole,
        "texts": completeness(heads, stages, {place: span.reconstruction for place, span in spans.items()}),
        "means": completeness(heads, stages, {}),
    }
    return {name: _mean_accuracy(model, e, made) for name, e in embeddings.items()}


def _mean_accuracy(model: Any, embeddings: Tensor, made: Any) -> float:
    unit = torch.nn.functional.normalize(embeddings, dim=-1)
    return float(np.mean([right(unit, tiny.vectors(model, c), made.of(c)).float().mean().item() for c in CONCEPTS]))


def biased(model: Any, bank: TextBank, count: int, draws: int, seed: int) -> dict[str, Any]:
    """What silencing the colour heads of a model with a planted correlation does to the retrieval of circles from
    balanced scenes: by prompt the skew towards red before and after, by draw at equal count that of colour heads and of
    others of the same layers, and the accuracies."""
    heads = scored_heads(model, bank, make_scenes(count, seed=seed))
    colour = of_concept(heads, "colour")
    silencing = Silencing(model, make_scenes(count, seed=seed + 1))
    groups = groups_of([values("colour")[int(i)] for i in silencing.scenes.of("colour")])
    top = max(count // 20, 2)
    reader = tiny.tokenizer()
    asked = {t.format("circle"): tiny.tokens(reader, [t.format("circle")]) for t in TEMPLATES["shape"]}
    vectors = class_vectors(tower(model, "text"), asked)

    def skews(chosen: Sequence[Head]) -> list[float]:
        embeddings = silencing.embeddings(chosen)
        return [skew((embeddings @ vector).topk(top).indices, groups).by_group["red"] for vector in vectors]

    rest = [h.place for h in heads if h.place not in colour]
    pairs = _pairs(colour, rest, torch.Generator().manual_seed(seed), draws)
    left = silencing.lost(colour) if colour else {}
    return {
        "heads": colour,
        "accuracy": {concept: float(hits.mean()) for concept, hits in silencing.before.items()},
        "before": skews([]),
        "after": skews(colour) if colour else [],
        "draws": [[skews(side) for side in pair] for pair in pairs],
        "matched": len(pairs[0][0]) if pairs else 0,
        "cost": {concept: float(lost.mean()) for concept, lost in left.items()},
        "top": top,
    }


def _pairs(heads: Sequence[Head], others: Sequence[Head], generator: torch.Generator, draws: int) -> list[Any]:
    if not {layer for layer, _ in heads} & {layer for layer, _ in others}:
        return []
    return layer_matched(heads, others, generator, draws=draws)


def reconstructions(model: Any, count: int, seed: int) -> dict[str, float]:
    """The largest distance of the sum of all parts from the embedding: both towers, and the image tower pruned."""
    images = tiny.pixels(make_scenes(count, seed=seed).images)
    texts = tiny.tokens(tiny.tokenizer(), [phrase.text for phrase in phrase_bank()])
    gated = {(0, 1): 0.0, (2, 3): 0.5, (3, 0): 0.0}
    return {
        "image": decompose(tower(model), images).error,
        "text": decompose(tower(model, "text"), texts).error,
        "pruned": decompose(tower(model), images, gates=gated).error,
    }


def real_vision(stand_in: bool) -> float:
    """The same on the embedded DINOv2 encoder with photographs; NaN where it is not installed. `stand_in` takes random
    weights and numbers in its place."""
    from sklearn.datasets import load_sample_images
    from transformers import Dinov2Config, Dinov2Model

    from headway.errors import HeadwayError
    from headway.hosts import load

    if stand_in:
        config = Dinov2Config(hidden_size=24, num_hidden_layers=2, num_attention_heads=3, image_size=28, patch_size=14)
        small: Any = Dinov2Model(config).eval()
        return decompose(tower(small), torch.rand(2, 3, 28, 28)).error
    try:
        model, processor = load("vit")
    except HeadwayError:
        return math.nan
    pixels = processor(list(load_sample_images().images), return_tensors="pt")["pixel_values"]
    return decompose(tower(model), pixels).error
