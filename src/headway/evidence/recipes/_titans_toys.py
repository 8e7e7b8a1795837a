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

CHUNK, WINDOW, SEGMENT = 8, 3, 4
#: Kinds of noise, so many that few come twice in a chunk.
NOISE = 8
#: A bound on θ by momentum alone: keys do not repeat within a chunk of these toys.
MEMORY = {"chunk": CHUNK, "expansion": 2.0, "stability": "momentum"}
BESIDE = {"window": WINDOW, "persistent": 1}
IN_FRONT = {"segment": SEGMENT, "chunk": SEGMENT, "persistent": 1, "memory_tokens": 4, "join": "add"}
LINEAR = {"depth": 1}
#: Mixer and options of each arm. `window` is what the claims compare with, `attention` shows that it can be learned.
ARMS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "attention": ("softmax", {}),
    "window": ("softmax", {"window": WINDOW}),
    "lmm": ("titans_lmm", MEMORY),
    "mac": ("titans_mac", {**MEMORY, **IN_FRONT}),
    "mag": ("titans_mag", {**MEMORY, **BESIDE, "join": "add"}),
    "mal": ("titans_mal", {**MEMORY, **BESIDE}),
    "linear lmm": ("titans_lmm", {**MEMORY, **LINEAR}),
    "linear mac": ("titans_mac", {**MEMORY, **IN_FRONT, **LINEAR}),
    "linear mag": ("titans_mag", {**MEMORY, **BESIDE, "join": "add", **LINEAR}),
    "linear mal": ("titans_mal", {**MEMORY, **BESIDE, **LINEAR}),
    "no persistent mag": ("titans_mag", {**MEMORY, **BESIDE, "persistent": 0, "join": "add"}),
    "no momentum": ("titans_lmm", {**MEMORY, "momentum": False}),
    "no forgetting": ("titans_lmm", {**MEMORY, "forgetting": False}),
    "no convolution": ("titans_lmm", {**MEMORY, "conv": 1}),
}
#: What each arm is trained on: the plain toy, and two that ablations need. "rebound" binds every key twice. "split" has
#: keys and values as tokens of their own, which is harder: on the plain toy a memory alone is at the ceiling.
RUNS: Sequence[tuple[str, str]] = (
    *((arm, "plain") for arm in ("attention", "window", "lmm", "mac", "mag", "mal", "linear lmm", "linear mac")),
    *((arm, "plain") for arm in ("linear mag", "linear mal", "no persistent mag")),
    *((arm, "rebound") for arm in ("lmm", "no forgetting")),
    *((arm, "split") for arm in ("lmm", "linear lmm", "no momentum", "no convolution")),
)
#: Arms with attention, alone or beside a memory, learn the toy more slowly than a memory alone: they get so many times
#: the steps, all of them alike.
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
    layers: int = 1
    held_out: int = 8
    learning_rate: float = 3e-3


@dataclass(kw_only=True)
class Bound(Recall):
    """Recall in which a key and its value are one token, so that no arm must learn first to look at the token before,
    in which answers are not shown, so that none can be had by elimination, and in which questions stand `apart` tokens
    from each other, so that a window or a segment of no more sees one of them.

    again: every key is bound twice, to two values, before it is asked for; the newer one is right.
    split: a key and its value are two tokens, the value behind the key."""

    name: ClassVar[str] = "bound"

    apart: int = 1
    again: bool = False
    split: bool = False

    @property
    def vocabulary(self) -> int:
        return super().vocabulary + self.keys * self.values

    @property
    def bindings(self) -> int:
        return self.pairs * (1 + self.again)

    @property
    def length(self) -> int:
        return self.bindings * (1 + self.split) + int(self.gap or 0) + (self.asked - 1) * self.apart + 2

    @property
    def chance(self) -> float:
        """A guess among the values of a row."""
        return 1 / self.bindings

    def draw(self, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Bindings (the older ones first), noise, and the keys that are asked for, with noise between them; the answer
        to each is what comes behind it in the labels, not in the text."""
        ids = random.integers(0, self.noise, (self.rows, self.length))
        labels = np.full_like(ids, IGNORE)
        places = self.length - 2 - self.apart * np.arange(self.asked)[::-1]
        for row in range(self.rows):
            values = random.permutation(self.values)[: self.bindings]
            keys = np.concatenate([random.permutation(self.keys)[: self.pairs]] * (1 + self.again))
            stated = [self.noise + keys, self.noise + self.keys + values]
            one = [self.noise + self.keys + self.values + keys * self.values + values]
            written = np.stack(stated if self.split else one, 1).ravel()
            ids[row, : len(written)] = written
            asked = self.bindings - 1 - random.permutation(self.pairs)[: self.asked]
            ids[row, places] = self.noise + keys[asked]
            labels[row, places + 1] = self.noise + self.keys + values[asked]
        return ids, labels


def task_of(setting: Setting, seed: int, *, gap: int | None = None, kind: str = "plain") -> Bound:
    """The stream of one seed. Every row binds the same keys to the same values in another order and asks for all, so
    that nothing but the pairing helps. Where keys are bound twice there are twice as many values."""
    rebound = kind == "rebound"
    return Bound(
        rows=setting.rows,
        seed=seed,
        pairs=setting.pairs,
        keys=setting.pairs,
        values=setting.pairs * (1 + rebound),
        noise=NOISE,
        gap=setting.gap if gap is None else gap,
        apart=SEGMENT,
        again=rebound,
        split=kind == "split",
    )


def trained(arm: str, kind: str, setting: Setting, seed: int) -> dict[str, Any]:
    """Accuracy of one arm after training: at the gap of the training, and on the plain toy at its multiples."""
    task = task_of(setting, seed, kind=kind)
    mixer, options = ARMS[arm]
    torch.manual_seed(seed % 2**31)
    config = HeadwayConfig(
        vocab_size=task.vocabulary,
        width=setting.width,
        layers=setting.layers,
        heads=2,
        mixer=mixer,
        mixer_options=dict(options),
        mlp_width=2 * setting.width,
    )
    model = HeadwayForCausalLM(config)
    steps = setting.steps * (1 if mixer == "titans_lmm" else ATTENTION_STEPS)
    run = train(
        model,
        task,
        steps=steps,
        learning_rate=setting.learning_rate,
        weight_decay=0.01,
        warmup=steps // 20,
        # Arms leave a plateau when they do: a rate that has fallen by then would leave them on their way.
        schedule="wsd",
        seed=seed % 2**31,
    )
    gaps = GAPS if kind == "plain" else GAPS[:1]
    held = {
        str(times): score(model, task_of(setting, seed, gap=times * setting.gap, kind=kind).held_out(setting.held_out))[
            "accuracy"
        ]
        for times in gaps
    }
    return {"accuracy": held["1"], "by gap": held, "loss": run.loss, "chance": task.chance}


def train_all(setting: Setting, seed: int, *, workers: int = 1) -> dict[str, dict[str, Any]]:
    """All arms of one seed by toy, where it is not the plain one, and arm; with so many processes."""
    names = [arm if kind == "plain" else f"{kind} {arm}" for arm, kind in RUNS]
    calls = [(arm, kind, setting, seed) for arm, kind in RUNS]
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
