"""What the InLine recipe trains: small classifiers that differ in their mixer alone, and a set that needs edges."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from headway.evidence.recipe import Context
from headway.methods.layers.inline import ConfusionObserver
from headway.models import HeadwayViT, HeadwayViTConfig
from headway.train import Run, train
from headway.train.images import Images, ImageStream, accuracy, load_images

#: Mixer and its options, by the name of the arm.
ARMS: dict[str, tuple[str, dict[str, Any]]] = {
    "softmax": ("softmax", {"position": "none"}),
    "linear": ("linear", {}),
    "linear + local": ("linear", {"residual": True}),
    "inline": ("inline", {"residual": False}),
    "inline + local": ("inline", {"residual": True}),
    "inline relu": ("inline", {"residual": False, "feature": "relu"}),
}
LEARNING_RATE, BATCH = 3e-3, 32
#: Images over which confused pairs are counted.
COUNTED = 32


def classifier(arm: str, images: Images, *, seed: int, patch: int, width: int, layers: int) -> HeadwayViT:
    """A plain pre-norm classifier with learned places and the mean over patches; 4 heads."""
    mixer, options = ARMS[arm]
    torch.manual_seed(seed)
    return HeadwayViT(
        HeadwayViTConfig(
            image_size=(images.pixels.shape[2], images.pixels.shape[3]),
            patch_size=patch,
            num_channels=images.pixels.shape[1],
            classes=images.classes,
            width=width,
            layers=layers,
            heads=4,
            mixer=mixer,
            mixer_options=options,
            norm="layer",
            mlp="gelu",
        )
    )


def trained(
    arm: str,
    images: Images,
    seed: int,
    *,
    patch: int,
    width: int,
    layers: int,
    steps: int,
    looks: Sequence[int] = (),
    confusion: bool = False,
) -> dict[str, Any]:
    """The held-out accuracy of one run after `steps` steps, and after each of `looks`. The rate is constant, so that a
    look is what a run of that length would have ended with. Runs with one seed share split, batches and first patch
    weights."""
    kept, held = images.split(seed=seed)
    model = classifier(arm, images, seed=seed, patch=patch, width=width, layers=layers)
    seen: dict[str, float] = {}

    def look(run: Run) -> None:
        if run.step in looks:
            seen[str(run.step)] = accuracy(run.model, held)

    result = train(
        model,
        ImageStream(kept, min(BATCH, len(kept)), seed=seed),
        steps=steps,
        learning_rate=LEARNING_RATE,
        weight_decay=0.05,
        schedule="constant",
        warmup=min(20, steps - 1),
        callbacks=[look],
        seed=seed,
    )
    found = {
        "accuracy": accuracy(model, held),
        "training": accuracy(model, kept),
        "loss": result.loss,
        "looks": {**seen, str(steps): accuracy(model, held)},
    }
    return {**found, "confusion": confused(model, held.pixels[:COUNTED])} if confusion else found


def confused(model: HeadwayViT, pixels: Tensor) -> dict[str, int]:
    """Pairs of unlike queries, and how many of them get the same row, over layers and images."""
    from headway.door import observe

    observer = ConfusionObserver()
    with observe(model.eval(), observer, example={"pixel_values": pixels[:1]}), torch.no_grad():
        model(pixel_values=pixels)
    sites = observer.result().values()
    return {name: sum(site[name] for site in sites) for name in ("confused", "unlike")}


def image_set(context: Context, name: str) -> Images:
    """The named set; at smoke size made ones, which need no package."""
    if context.size == "smoke":
        return edges(200, context.torch_generator(f"{name} images"), grid=(8, 8) if name == "digits" else (12, 12))
    return load_images(name)


#: Four patterns of three bright pixels in a square of nine: the same brightness, other neighbours.
PATTERNS = {
    "row": ((1, 0), (1, 1), (1, 2)),
    "column": ((0, 1), (1, 1), (2, 1)),
    "down": ((0, 0), (1, 1), (2, 2)),
    "up": ((2, 0), (1, 1), (0, 2)),
}


def edges(count: int, generator: torch.Generator, *, grid: tuple[int, int] = (6, 10), scattered: int = 3) -> Images:
    """Images with one pattern of PATTERNS somewhere among `scattered` lone bright pixels; the class is the pattern.

    Every image has equally many bright pixels, and the pattern may stand anywhere, so only who stands beside whom
    tells. Pixels have mean 0 and a standard deviation near 1: beside places of the same size as a faint pixel, a
    classifier would first have to find the pixels."""
    height, width = grid
    labels = torch.randint(0, len(PATTERNS), (count,), generator=generator)
    pixels = torch.zeros(count, 1, height, width)
    shapes = [torch.tensor(shape) for shape in PATTERNS.values()]
    for image, label in enumerate(labels.tolist()):
        down = int(torch.randint(0, height - 2, (1,), generator=generator))
        right = int(torch.randint(0, width - 2, (1,), generator=generator))
        free = torch.ones(height, width, dtype=torch.bool)
        free[max(down - 1, 0) : down + 4, max(right - 1, 0) : right + 4] = False
        places = free.nonzero()
        lone = places[torch.randperm(len(places), generator=generator)[:scattered]]
        bright = torch.cat([shapes[label] + torch.tensor([down, right]), lone])
        pixels[image, 0, bright[:, 0], bright[:, 1]] = 1.0
    pixels = (pixels - pixels.mean()) / pixels.std()
    return Images(name="edges", source="made", pixels=pixels, labels=labels, classes=len(PATTERNS))
