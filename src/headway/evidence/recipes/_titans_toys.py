"""Toys for Titans: recall beyond a window, keys that are bound again, and what chunk size does to a stream.

The first two are trained from scratch: an untrained memory shows nothing of what is claimed. The third needs no outer
training, since it asks how gradient descent within a sequence behaves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from headway.errors import NumericError
from headway.evidence.parallel import side_by_side
from headway.kernels.deep_memory import Gates, deep_memory
from headway.kernels.memory_net import MemoryNet
from headway.models import HeadwayConfig, HeadwayForCausalLM
from headway.train import train
from headway.train.generated import Recall, score
from headway.train.losses import IGNORE

CHUNK, WINDOW = 8, 6
#: A bound on θ by momentum alone: keys do not repeat within a chunk of these toys.
MEMORY = {"chunk": CHUNK, "expansion": 2.0, "stability": "momentum"}
BESIDE = {"window": WINDOW, "persistent": 2}
#: Mixer and options of each arm. `window` is what the claims compare with, `attention` shows that it can be learned.
ARMS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "attention": ("softmax", {}),
    "window": ("softmax", {"window": WINDOW}),
    "lmm": ("titans_lmm", MEMORY),
    "mac": ("titans_mac", {**MEMORY, "segment": CHUNK, "persistent": 2, "memory_tokens": 4, "join": "add"}),
    "mag": ("titans_mag", {**MEMORY, **BESIDE, "join": "add"}),
    "mal": ("titans_mal", {**MEMORY, **BESIDE}),
    "linear": ("titans_lmm", {**MEMORY, "depth": 1}),
    "no-momentum": ("titans_lmm", {**MEMORY, "momentum": False}),
    "no-forgetting": ("titans_lmm", {**MEMORY, "forgetting": False}),
}
#: Arms with attention, alone or beside a memory, learn the toy more slowly than a memory alone: they get so many times
#: the steps, all of them alike.
WITH_ATTENTION = ("attention", "window", "mac", "mag", "mal")
ATTENTION_STEPS = 2
VARIANTS = ("lmm", "mac", "mag", "mal")
#: The gap of the toy is asked for again at these multiples of the one trained.
GAPS = (1, 2, 4, 8)


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Size of the toy and of its training."""

    width: int
    steps: int
    rows: int
    pairs: int
    gap: int
    seeds: int
    held_out: int = 8
    learning_rate: float = 3e-3


@dataclass(kw_only=True)
class Bound(Recall):
    """Recall in which a key and its value are one token, so that no arm must learn first to look at the token before,
    and in which answers are not shown, so that none can be had by elimination.

    again: every key is bound twice, to two values, before it is asked for; the newer one is right."""

    name: ClassVar[str] = "bound"

    again: bool = False

    @property
    def vocabulary(self) -> int:
        return super().vocabulary + self.keys * self.values

    @property
    def length(self) -> int:
        return self.pairs * (1 + self.again) + int(self.gap or 0) + self.asked + 1

    @property
    def chance(self) -> float:
        """A guess among the values of a row."""
        return 1 / (self.pairs * (1 + self.again))

    def draw(self, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Bindings (the older ones first), noise, and the keys that are asked for in a row; the answer to each is what
        comes behind it in the labels, not in the text."""
        ids = random.integers(0, self.noise, (self.rows, self.length))
        labels = np.full_like(ids, IGNORE)
        bound = self.pairs * (1 + self.again)
        for row in range(self.rows):
            values = random.permutation(self.values)[:bound]
            keys = np.concatenate([random.permutation(self.keys)[: self.pairs]] * (1 + self.again))
            ids[row, :bound] = self.noise + self.keys + self.values + keys * self.values + values
            asked = bound - 1 - random.permutation(self.pairs)[: self.asked]
            ids[row, -self.asked - 1 : -1] = self.noise + keys[asked]
            labels[row, -self.asked :] = self.noise + self.keys + values[asked]
        return ids, labels


def task_of(setting: Setting, seed: int, *, gap: int | None = None, rebound: bool = False) -> Recall:
    """The stream of one seed. Every row binds the same keys to the same values in another order and asks for all, so
    that nothing but the pairing helps. Where keys are bound twice there are twice as many values."""
    gap = setting.gap if gap is None else gap
    values = 2 * setting.pairs if rebound else setting.pairs
    sizes = {"pairs": setting.pairs, "keys": setting.pairs, "values": values, "noise": 4}
    return Bound(rows=setting.rows, seed=seed, gap=gap, again=rebound, **sizes)


def trained(arm: str, setting: Setting, seed: int, rebound: bool = False) -> dict[str, Any]:
    """Accuracy of one arm after training: at the gap of the training, and at its multiples."""
    task = task_of(setting, seed, rebound=rebound)
    mixer, options = ARMS[arm]
    torch.manual_seed(seed % 2**31)
    config = HeadwayConfig(
        vocab_size=task.vocabulary,
        width=setting.width,
        layers=2,
        heads=2,
        mixer=mixer,
        mixer_options=dict(options),
        mlp_width=2 * setting.width,
    )
    model = HeadwayForCausalLM(config)
    steps = setting.steps * (ATTENTION_STEPS if arm in WITH_ATTENTION else 1)
    run = train(
        model,
        task,
        steps=steps,
        learning_rate=setting.learning_rate,
        weight_decay=0.01,
        warmup=steps // 20,
        seed=seed % 2**31,
    )
    gaps = GAPS if not rebound else GAPS[:1]
    held = {
        str(times): score(
            model, task_of(setting, seed, gap=times * setting.gap, rebound=rebound).held_out(setting.held_out)
        )["accuracy"]
        for times in gaps
    }
    return {"accuracy": held["1"], "by gap": held, "loss": run.loss, "chance": task.chance}


def train_all(
    arms: Sequence[tuple[str, bool]], setting: Setting, seed: int, *, workers: int = 1
) -> dict[str, dict[str, Any]]:
    """All arms of one seed, (name, keys are bound again), with so many processes."""
    names = [f"rebound {arm}" if again else arm for arm, again in arms]
    calls = [(arm, setting, seed, again) for arm, again in arms]
    return dict(zip(names, side_by_side(trained, calls, workers=workers), strict=True))


def stream_losses(sizes: tuple[int, ...], *, streams: int, tokens: int, generator: torch.Generator) -> dict[str, Any]:
    """Mean loss per stream and chunk size of a one-layer memory that learns a fixed linear map from unit keys, and the
    largest loss over the first: of bounded and of constant step sizes where one key comes over and over ("bounded",
    "constant"), and of bounded ones on the random keys, with the same momentum at every token ("random") and with one
    drawn from (0, 1) for each ("varying")."""
    dim = 16
    truth = torch.randn(streams, 1, dim, dim, generator=generator) / dim**0.5
    key = normalize(torch.randn(streams, 1, tokens, dim, generator=generator), dim=-1)
    value = key @ truth
    net = MemoryNet((torch.zeros(1, dim, dim),))
    # The same small steps for every chunk size, so that only the age of the weights differs.
    by_size = {}
    for size in sizes:
        found = deep_memory(key, key, value, _gates(key, 0.1, 0.0), net, chunk=size, inspect=True)
        assert found.loss is not None
        by_size[str(size)] = found.loss.mean((1, 2)).tolist()
    ones = torch.ones(streams, 1, tokens, dim)
    same = normalize(ones, dim=-1)
    worst = {
        rule: {str(size): _largest(same, ones, net, size, theta(size)) for size in sizes}
        for rule, theta in {
            "bounded": lambda size: _gates(same, (1 - ETA) / size, ETA),
            "constant": lambda size: _gates(same, CONSTANT_THETA, ETA),
        }.items()
    }
    eta = torch.rand(key.shape[:3], generator=generator)
    for rule, momentum in {"random": torch.full_like(eta, ETA), "varying": eta}.items():
        worst[rule] = {
            str(size): _largest(key, value, net, size, Gates((1 - momentum) / size, momentum, torch.zeros_like(eta)))
            for size in sizes
        }
    return {"mean loss": by_size, "largest loss over the first": worst}


#: The momentum and the constant step size that are fine for small chunks and diverge for large ones.
ETA, CONSTANT_THETA = 0.8, 0.03


def _gates(like: Tensor, theta: float, eta: float) -> Gates:
    ones = torch.ones(like.shape[:3])
    return Gates(theta * ones, eta * ones, 0.0 * ones)


def _largest(key: Tensor, value: Tensor, net: MemoryNet, size: int, gates: Gates) -> float:
    """The largest loss over the mean one of first tokens; infinite where the memory blows up."""
    try:
        found = deep_memory(key, key, value, gates, net, chunk=size, inspect=True)
    except NumericError:
        return float("inf")
    assert found.loss is not None
    return float(found.loss.max() / found.loss[..., 0].mean())
