"""Scenes of which everything is known: small pictures of coloured shapes, captions that are true of them, and a bank of
phrases each of which speaks of one attribute.

    scene = colour × shape × position × texture × count          a caption names some of the five attributes

A scene shows one to three copies of a shape beside one edge of a 32 × 32 picture on a noisy dark ground. Words have
synonyms, so a phrase of the bank can be judged exactly: `Phrase.concept` is the attribute it speaks of. An object fills
one cell of a 4 × 4 grid, 8 pixels wide, so a model of patches of that size sees each object whole.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from headway.errors import ArgumentError, unknown

SIDE = 32
#: concept -> value -> words for it; the first word names the value.
WORDS: dict[str, dict[str, tuple[str, ...]]] = {
    "colour": {
        "red": ("red", "crimson", "scarlet"),
        "green": ("green", "emerald", "lime"),
        "blue": ("blue", "navy", "azure"),
        "yellow": ("yellow", "golden", "amber"),
        "magenta": ("magenta", "pink", "fuchsia"),
        "cyan": ("cyan", "teal", "turquoise"),
    },
    "shape": {
        "circle": ("circle", "disc", "ball"),
        "square": ("square", "box", "block"),
        "triangle": ("triangle", "wedge", "pyramid"),
        "cross": ("cross", "plus", "crossing"),
    },
    "position": {
        "left": ("left", "west", "leftmost"),
        "right": ("right", "east", "rightmost"),
        "top": ("top", "upper", "north"),
        "bottom": ("bottom", "lower", "south"),
    },
    "texture": {
        "solid": ("solid", "plain", "filled"),
        "striped": ("striped", "lined", "banded"),
        "checkered": ("checkered", "chequered", "tiled"),
    },
    "count": {
        "one": ("one", "single", "lone"),
        "two": ("two", "double", "twin"),
        "three": ("three", "triple", "threefold"),
    },
}
TEMPLATES: dict[str, tuple[str, ...]] = {
    "colour": ("a {} thing", "something {}", "the colour {}", "painted in {}", "{} paint", "a picture in {}"),
    "shape": ("a {}", "the shape of a {}", "drawn as a {}", "a picture of a {}", "the outline of a {}", "some {}"),
    "position": ("at the {}", "on the {} side", "in the {} part", "near the {} edge", "toward the {}", "placed {}"),
    "texture": ("a {} surface", "a {} pattern", "with {} texture", "the {} kind", "{} fabric", "{} material"),
    "count": ("{} of them", "{} things", "a group of {}", "{} in number", "{} objects", "counted as {}"),
}
CONCEPTS = tuple(WORDS)
#: Prompts of zero-shot queries use the naming word of a value in every template.
FULL = ("a photo of", "a picture with", "there is", "we see")
RGB = {
    "red": (0.90, 0.10, 0.10),
    "green": (0.10, 0.75, 0.10),
    "blue": (0.10, 0.20, 0.95),
    "yellow": (0.92, 0.88, 0.10),
    "magenta": (0.90, 0.15, 0.85),
    "cyan": (0.10, 0.85, 0.90),
}
#: Distance of the objects' axis from the picture's edge, the three places along it, and how far the middle one moves in
#: half of the scenes.
INSET, PLACES, MOVED = 3.5, (3.5, 11.5, 27.5), 8.0
RADIUS = (3.5, 4.0)
#: Brightness of the ground, and the share of paint between the stripes or tiles of a texture.
GROUND, GAP = (0.02, 0.12), 0.15
#: Pixels by which an object may stand off its place.
JITTER = 0.5


@dataclass(frozen=True)
class Phrase:
    """A text of the bank: what it says, the attribute it speaks of, and the value."""

    text: str
    concept: str
    value: str


@dataclass(frozen=True)
class Scenes:
    """Pictures in [0, 1] and, by concept, the index of each picture's value in `values(concept)`."""

    images: Float[Tensor, "scenes 3 side side"]
    labels: Int[Tensor, "scenes concepts"]

    def __len__(self) -> int:
        return self.images.shape[0]

    def of(self, concept: str) -> Int[Tensor, " scenes"]:
        return self.labels[:, _index(concept)]


@dataclass(frozen=True)
class Captions:
    """Texts and what each requires: the value of each concept, −1 for one that it does not name."""

    texts: tuple[str, ...]
    required: Int[Tensor, "texts concepts"]

    def true_of(self, labels: Int[Tensor, "scenes concepts"]) -> Bool[Tensor, "scenes texts"]:
        """Which captions are true of which scenes."""
        return ((labels[:, None] == self.required[None]) | (self.required[None] < 0)).all(-1)


def values(concept: str) -> tuple[str, ...]:
    """The values of an attribute in the order of their labels."""
    return tuple(WORDS[CONCEPTS[_index(concept)]])


@lru_cache(maxsize=1)
def phrase_bank() -> tuple[Phrase, ...]:
    """Every word of every value in every template of its concept: 360 phrases, each of one known concept."""
    return tuple(
        Phrase(template.format(word), concept, value)
        for concept in CONCEPTS
        for value, words in WORDS[concept].items()
        for word in words
        for template in TEMPLATES[concept]
    )


def prompts(concept: str) -> dict[str, list[str]]:
    """Zero-shot prompts by value: its naming word in every template, to be averaged."""
    return {value: [t.format(value) for t in TEMPLATES[concept]] for value in values(concept)}


def vocabulary() -> list[str]:
    """Every word that a caption can hold, sorted."""
    texts = [p.text for p in phrase_bank()] + list(FULL) + ["at the"]
    return sorted({word for text in texts for word in text.split()})


def draw_labels(
    count: int,
    generator: torch.Generator,
    *,
    correlation: tuple[str, str, float] | None = None,
) -> Int[Tensor, "scenes concepts"]:
    """Independent uniform values; with `correlation` (shape, colour, share) that share of the shape has the colour.

    ("circle", "red", 0.95) makes 95 % of the circles red and leaves the other shapes as they are."""
    if count < 1:
        raise ArgumentError(f"count: got {count}, expected at least one scene.")
    labels = torch.stack([torch.randint(len(WORDS[c]), (count,), generator=generator) for c in CONCEPTS], 1)
    if correlation is not None:
        shape, colour, share = correlation
        if shape not in values("shape") or colour not in values("colour") or not 0 <= share <= 1:
            raise ArgumentError(
                f"correlation: got {correlation!r}, expected (shape, colour, share in [0, 1]), a shape of "
                f"{', '.join(values('shape'))} and a colour of {', '.join(values('colour'))}."
            )
        paired = labels[:, 1] == values("shape").index(shape)
        favoured = values("colour").index(colour)
        others = torch.tensor([i for i in range(len(values("colour"))) if i != favoured])
        rest = others[torch.randint(len(others), (count,), generator=generator)]
        chosen = torch.where(torch.rand(count, generator=generator) < share, torch.tensor(favoured), rest)
        labels[:, 0] = torch.where(paired, chosen, labels[:, 0])
    return labels


def draw_scenes(labels: Int[Tensor, "scenes concepts"], generator: torch.Generator) -> Scenes:
    """Pictures for given labels; size, shade, exact place and noise are random."""
    if labels.ndim != 2 or labels.shape[1] != len(CONCEPTS):
        raise ArgumentError(f"labels: got shape {tuple(labels.shape)}, expected (scenes, {len(CONCEPTS)}).")
    for column, concept in enumerate(CONCEPTS):
        if bool(((labels[:, column] < 0) | (labels[:, column] >= len(WORDS[concept]))).any()):
            raise ArgumentError(f"labels: got a {concept} outside 0..{len(WORDS[concept]) - 1}.")
    scenes = labels.shape[0]
    shown = _shown(labels[:, 4] + 1)
    rows, columns = _centres(labels[:, 2], generator)
    inside = _figures(labels[:, 1], rows, columns, generator)
    ink = GAP + (1 - GAP) * _ink(labels[:, 3], rows, columns).float()
    mask = (inside & shown[:, :, None, None]).float().mul(ink).amax(1)[:, None]
    palette = torch.tensor([RGB[c] for c in values("colour")])
    paint = palette[labels[:, 0]] + 0.06 * torch.randn(scenes, 3, generator=generator)
    ground = GROUND[0] + (GROUND[1] - GROUND[0]) * torch.rand(scenes, 1, 1, 1, generator=generator)
    image = mask * paint[:, :, None, None] + (1 - mask) * ground
    image = image + 0.03 * torch.randn(scenes, 3, SIDE, SIDE, generator=generator)
    return Scenes(image.clamp(0, 1), labels)


def make_scenes(count: int, *, seed: int, correlation: tuple[str, str, float] | None = None) -> Scenes:
    """`count` scenes from a seed."""
    generator = torch.Generator().manual_seed(seed)
    return draw_scenes(draw_labels(count, generator, correlation=correlation), generator)


def draw_captions(
    labels: Int[Tensor, "scenes concepts"], generator: torch.Generator, *, single: float = 0.6, kept: float = 0.6
) -> Captions:
    """One true caption per scene: a phrase of the bank with the share `single`, else a sentence that names each
    attribute with probability `kept`."""
    count, size = labels.shape
    texts, required = [], torch.full((count, size), -1)
    words = torch.randint(3, (count, size), generator=generator).tolist()
    forms = torch.randint(6, (count,), generator=generator).tolist()
    focus = torch.randint(size, (count,), generator=generator).tolist()
    alone = (torch.rand(count, generator=generator) < single).tolist()
    named = (torch.rand(count, size, generator=generator) < kept).tolist()
    for i, row in enumerate(labels.tolist()):
        said = [WORDS[c][values(c)[v]][w] for c, v, w in zip(CONCEPTS, row, words[i], strict=True)]
        use = [column == focus[i] or (named[i][column] and not alone[i]) for column in range(size)]
        required[i] = torch.where(torch.tensor(use), labels[i], -1)
        if alone[i]:
            texts.append(TEMPLATES[CONCEPTS[focus[i]]][forms[i]].format(said[focus[i]]))
        else:
            colour, shape, position, texture, number = (w if u else "" for w, u in zip(said, use, strict=True))
            place = f"at the {position}" if position else ""
            texts.append(" ".join(f"{FULL[forms[i] % 4]} {number} {texture} {colour} {shape} {place}".split()))
    return Captions(tuple(texts), required)


def concept_of(texts: Sequence[str]) -> Mapping[str, str]:
    """The concept of each phrase of the bank. Raises ArgumentError for a text that is not in it."""
    known = {phrase.text: phrase.concept for phrase in phrase_bank()}
    for text in texts:
        if text not in known:
            raise unknown("texts", text, known)
    return {text: known[text] for text in texts}


def _index(concept: str) -> int:
    if concept not in WORDS:
        raise unknown("concept", concept, CONCEPTS)
    return CONCEPTS.index(concept)


def _shown(count: Int[Tensor, " scenes"]) -> Bool[Tensor, "scenes places"]:
    """Which of the three places hold an object: the middle one, the outer two, or all. A single object in a corner
    would belong to two edges."""
    return torch.tensor([[False, True, False], [True, False, True], [True, True, True]])[count - 1]


def _centres(
    position: Int[Tensor, " scenes"], generator: torch.Generator
) -> tuple[Float[Tensor, "scenes places 1 1"], Float[Tensor, "scenes places 1 1"]]:
    scenes = position.numel()
    jitter = 2 * JITTER * torch.rand(scenes, len(PLACES), 2, generator=generator) - JITTER
    along = torch.tensor(PLACES)[None] + jitter[..., 0]
    along[:, 1] += MOVED * torch.randint(2, (scenes,), generator=generator)
    near = (position % 2 == 0).float()[:, None]
    across = near * INSET + (1 - near) * (SIDE - 1 - INSET) + jitter[..., 1]
    vertical = (position >= 2)[:, None]
    rows, columns = torch.where(vertical, across, along), torch.where(vertical, along, across)
    return rows[..., None, None], columns[..., None, None]


def _figures(shape: Int[Tensor, " scenes"], rows: Tensor, columns: Tensor, generator: torch.Generator) -> Tensor:
    """(scenes, places, side, side): inside the outline."""
    line = torch.arange(SIDE, dtype=torch.float32)
    y, x = line[None, None, :, None] - rows, line[None, None, None] - columns
    low, high = RADIUS
    radius = low + (high - low) * torch.rand(shape.numel(), 1, 1, 1, generator=generator)
    circle = x**2 + y**2 <= radius**2
    square = (x.abs() <= 0.85 * radius) & (y.abs() <= 0.85 * radius)
    triangle = (y.abs() <= radius) & (x.abs() <= (y + radius) / math.sqrt(3.2))
    cross = ((x.abs() <= 0.32 * radius) | (y.abs() <= 0.32 * radius)) & (x.abs() <= radius) & (y.abs() <= radius)
    kinds = torch.stack([circle, square, triangle, cross], 1)
    return kinds[torch.arange(shape.numel()), shape]


def _ink(texture: Int[Tensor, " scenes"], rows: Tensor, columns: Tensor) -> Tensor:
    """(scenes, places, side, side): where the texture paints. Stripes and tiles are two pixels wide."""
    line = torch.arange(SIDE)
    y = (line[None, None, :, None] - rows.round().long()) // 2 % 2
    x = (line[None, None, None] - columns.round().long()) // 2 % 2
    kind = texture[:, None, None, None]
    return (kind == 0) | ((kind == 1) & (y == 0)) | ((kind == 2) & ((x + y) % 2 == 0))
