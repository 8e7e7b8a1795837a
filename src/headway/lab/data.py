"""Bytes of a text as training sequences, drawn by number, and held-out ones that every arm is judged on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from headway.errors import ArgumentError
from headway.hosts import Text
from headway.lab.arms import EXTRA_ID, Arm
from headway.statistics import generator_of
from headway.train import Batch, Stream
from headway.train.losses import IGNORE

#: Share of the text, at its end, that no arm is trained on.
HELD_OUT = 0.1
#: Streams of randomness: training data, held-out data.
TRAINING, HELD = 1, 2


@dataclass(frozen=True)
class Split:
    """The bytes to train on and those held out."""

    train: Int[Tensor, " bytes"]
    held_out: Int[Tensor, " bytes"]


def split_bytes(text: Text) -> Split:
    """The text's UTF-8 bytes: its first nine tenths, and the last."""
    ids = torch.frombuffer(bytearray(text.text.encode("utf-8")), dtype=torch.uint8).long()
    border = int(len(ids) * (1 - HELD_OUT))
    return Split(ids[:border], ids[border:])


class ByteSequences(Stream):
    """Sequences of an arm. Batch number `index` depends on the seed and the index alone."""

    def __init__(self, split: Split, arm: Arm, seed: int) -> None:
        self.arm, self.seed = arm, seed
        self.ids = split.train if arm.data is None else split.train[: arm.data]
        wanted = arm.length + 1
        if len(self.ids) < wanted:
            raise ArgumentError(f"text: got {len(self.ids)} bytes to train on, expected at least {wanted}.")

    def batch(self, index: int) -> Batch:
        generator = generator_of(TRAINING, self.seed, index)
        starts = torch.randint(0, len(self.ids) - self.arm.length + 1, (self.arm.batch,), generator=generator)
        ids = self.ids[starts[:, None] + torch.arange(self.arm.length)]
        return labelled(with_first(ids, self.arm, generator), self.arm)


def held_out(split: Split, arm: Arm, count: int, seed: int = 0) -> Int[Tensor, "count length"]:
    """`count` sequences of the held-out part that do not overlap, as the arm reads them: the same text for all arms of
    one length."""
    places = len(split.held_out) // arm.length
    if places < count:
        raise ArgumentError(
            f"text: got {places} held-out sequences of {arm.length} bytes, expected {count}. Give a longer text."
        )
    generator = generator_of(HELD, seed)
    chosen = torch.randperm(places, generator=generator)[:count]
    ids = split.held_out[chosen[:, None] * arm.length + torch.arange(arm.length)]
    return with_first(ids, arm, generator)


def with_first(ids: Int[Tensor, "batch length"], arm: Arm, generator: torch.Generator) -> Int[Tensor, "batch length"]:
    """The sequences with what the arm puts at their front; the length stays, what is pushed out at the end is lost."""
    if arm.first == "random":
        ids = ids.clone()
        ids[:, 0] = torch.randint(0, EXTRA_ID, (len(ids),), generator=generator)
    elif arm.first in ("fixed", "learned"):
        place = arm.place if arm.first == "fixed" else 0
        pushed = torch.cat([ids[:, :place], torch.full_like(ids[:, :1], EXTRA_ID), ids[:, place:-1]], 1)
        share = arm.fraction if arm.first == "fixed" else 1.0
        taken = torch.rand(len(ids), generator=generator) < share
        ids = torch.where(taken[:, None], pushed, ids)
    return ids


def labelled(ids: Int[Tensor, "batch length"], arm: Arm) -> dict[str, Tensor]:
    """A batch whose labels leave out the prefix and the arm's own token."""
    labels = ids.masked_fill(ids == EXTRA_ID, IGNORE)
    if arm.prefix:
        labels[:, : arm.prefix] = IGNORE
    return {"input_ids": ids, "labels": labels}
