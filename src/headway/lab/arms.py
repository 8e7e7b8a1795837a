"""Arms: what is trained, read from one YAML file.

    about: What the experiment asks.
    seeds: [0, 1]
    base: {steps: 2000, weight_decay: 0.1}          # settings of all arms
    arms:                                           # the first one is what the others are compared with
      - {name: softmax}
      - {name: softpick, normalizer: softpick}
    grid: {weight_decay: [0.0, 0.5]}                # each arm once for every combination

Every setting has a default, those of arXiv 2410.10781 scaled down; an unknown name is an error with the nearest one.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from importlib.resources import files
from pathlib import Path
from typing import Any

from headway.errors import ArgumentError, unknown
from headway.train.optimizers import OPTIMIZERS
from headway.train.schedules import SCHEDULES

TERMS = ("decorrelation", "tail", "head-balance")
FIRST = ("natural", "random", "fixed", "learned")
#: The id behind the bytes: a fixed token, or a learned sink token.
EXTRA_ID = 256
VOCABULARY = 257
_PARTS = ("about", "seeds", "base", "arms", "grid")
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)")


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One kind of model and training. Texts are bytes; losses are nats per byte.

    Attention: normalizer and gate with their options, position, window (tokens that a row sees), prefix (first tokens
    that see each other; the loss counts behind them). Model: width, layers, heads, kv_heads, mlp, norm, norm_place,
    embed_projection (a square map behind the embedding and one before the output).
    Data: length of a sequence, data (bytes of text to train on, None for all), first: what stands at the front,
    "natural" text, "random" (one random byte), "fixed" (a token of its own at `place`, in a share `fraction` of the
    sequences) or "learned" (a sink token in front of every sequence). Training: steps, batch, learning_rate,
    weight_decay, warmup, schedule, clip, optimizer (adamw, orthoadam, muon), terms (weights of further loss terms:
    decorrelation, tail, head-balance). `group` is a heading of the table."""

    name: str = ""
    group: str = ""
    normalizer: str = "softmax"
    normalizer_options: Mapping[str, Any] = field(default_factory=dict)
    gate: str | None = None
    gate_options: Mapping[str, Any] = field(default_factory=dict)
    position: str = "rope"
    window: int | None = None
    prefix: int = 0
    width: int = 128
    layers: int = 4
    heads: int = 4
    kv_heads: int | None = None
    mlp: str = "swiglu"
    norm: str = "rms"
    norm_place: str = "pre"
    embed_projection: bool = False
    length: int = 128
    data: int | None = None
    first: str = "natural"
    place: int = 0
    fraction: float = 1.0
    steps: int = 5000
    batch: int = 16
    learning_rate: float = 1e-3
    weight_decay: float = 0.1
    warmup: int = 100
    schedule: str = "constant"
    clip: float | None = 1.0
    optimizer: str = "adamw"
    terms: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("width", "layers", "heads", "length", "steps", "batch"):
            if getattr(self, name) < 1:
                raise ArgumentError(f"{name} of arm {self.name!r}: got {getattr(self, name)}, expected at least 1.")
        if self.optimizer not in OPTIMIZERS:
            raise unknown(f"optimizer of arm {self.name!r}", self.optimizer, OPTIMIZERS)
        if self.schedule not in SCHEDULES:
            raise unknown(f"schedule of arm {self.name!r}", self.schedule, SCHEDULES)
        for term in self.terms:
            if term not in TERMS:
                raise unknown(f"terms of arm {self.name!r}", term, TERMS)
        if self.length < 8:
            raise ArgumentError(f"length of arm {self.name!r}: got {self.length}, expected at least 8 tokens.")
        if self.first not in FIRST:
            raise unknown(f"first of arm {self.name!r}", self.first, FIRST)
        if not 0 <= self.place < self.length or not 0 < self.fraction <= 1:
            raise ArgumentError(
                f"place, fraction of arm {self.name!r}: got {self.place}, {self.fraction}; expected a place in the "
                f"{self.length} tokens and a share in (0, 1]."
            )
        if not 0 <= self.prefix < self.length - 1:
            raise ArgumentError(f"prefix of arm {self.name!r}: got {self.prefix}, expected 0..{self.length - 2}.")
        if self.data is not None and self.data < 2 * self.length:
            raise ArgumentError(
                f"data of arm {self.name!r}: got {self.data} bytes, expected at least two sequences of {self.length}."
            )
        if self.learning_rate <= 0 or self.weight_decay < 0 or self.warmup < 0:
            raise ArgumentError(
                f"learning_rate, weight_decay, warmup of arm {self.name!r}: got {self.learning_rate}, "
                f"{self.weight_decay}, {self.warmup}; expected a rate above 0 and the others at least 0."
            )

    def settings(self) -> dict[str, Any]:
        """What the numbers of the arm depend on: everything but its names."""
        return {k: v for k, v in asdict(self).items() if k not in ("name", "group")}

    def changes(self) -> dict[str, Any]:
        """The settings that differ from the defaults."""
        plain = Arm().settings()
        return {k: v for k, v in self.settings().items() if v != plain[k]}

    def key(self, seed: int) -> str:
        """A file name for the arm at one seed, from its settings alone."""
        text = json.dumps({"seed": seed, **self.settings()}, sort_keys=True, default=str)
        words = re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")[:48]
        return f"{words or 'arm'}-{seed}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """Arms under one question, each trained with every seed. The first arm is the baseline."""

    name: str
    arms: tuple[Arm, ...]
    seeds: tuple[int, ...] = (0,)
    about: str = ""

    def __post_init__(self) -> None:
        names = [arm.name for arm in self.arms]
        twice = sorted({name for name in names if names.count(name) > 1})
        if not names or twice or not all(names):
            raise ArgumentError(f"arms: got {twice or names}, expected at least one arm, each with a name of its own.")
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise ArgumentError(f"seeds: got {list(self.seeds)}, expected at least one, each once.")

    @property
    def baseline(self) -> Arm:
        return self.arms[0]


def shipped_experiments() -> dict[str, str]:
    """The names of the experiments that come with Headway, and what each asks."""
    folder = files("headway.lab").joinpath("arms")
    names = sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))
    return {name: load_experiment(name).about for name in names}


def load_experiment(source: str | Path) -> Experiment:
    """The experiment in a YAML file, or one that is shipped, by its name. Raises ArgumentError with the key that is
    wrong."""
    path = Path(source)
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise ArgumentError(f"arms: got {source}, which is no file; expected a YAML file, or one of {_shipped()}.")
        return parse_experiment(path.read_text(encoding="utf-8"), name=path.stem)
    inside = files("headway.lab").joinpath("arms", f"{source}.yaml")
    if not inside.is_file():
        raise unknown("arms", source, _shipped(), fix="A file of your own ends in .yaml.")
    return parse_experiment(inside.read_text(encoding="utf-8"), name=str(source))


def parse_experiment(text: str, *, name: str) -> Experiment:
    """The experiment that a YAML text describes."""
    import yaml

    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ArgumentError(f"arms: got a text that is no YAML ({' '.join(str(error).split())}).") from None
    if not isinstance(data, dict):
        raise ArgumentError(f"arms: got {type(data).__name__}, expected a mapping with {', '.join(_PARTS)}.")
    for key in data:
        if key not in _PARTS:
            raise unknown("arms", key, _PARTS)
    base, grid = _mapping(data, "base"), _mapping(data, "grid")
    given = data.get("arms") or [{"name": "softmax"}]
    if not isinstance(given, list) or not all(isinstance(arm, dict) for arm in given):
        raise ArgumentError("arms: got something else than a list of mappings, expected `- name: …` for each arm.")
    arms = []
    for arm in given:
        for combination in itertools.product(*(_values(key, values) for key, values in grid.items())):
            point = dict(zip(grid, combination, strict=True))
            title = ", ".join([str(arm.get("name", "")), *(f"{k} {v}" for k, v in point.items())]).strip(", ")
            arms.append(_arm({**base, **arm, **point, "name": title}))
    seeds = data.get("seeds", [0])
    if not isinstance(seeds, list) or not all(isinstance(s, int) and not isinstance(s, bool) for s in seeds):
        raise ArgumentError(f"seeds: got {seeds!r}, expected a list of whole numbers.")
    return Experiment(name=name, about=str(data.get("about", "")).strip(), arms=tuple(arms), seeds=tuple(seeds))


def _arm(settings: dict[str, Any]) -> Arm:
    known = {f.name: f for f in fields(Arm)}
    for key, value in settings.items():
        if key not in known:
            raise unknown(f"setting of arm {settings['name']!r}", key, known)
        settings[key] = _typed(key, value, str(known[key].type), settings["name"])
    return Arm(**settings)


def _typed(key: str, value: Any, kind: str, name: str) -> Any:
    """The value as the setting needs it. YAML reads 1e-3 as text."""
    if isinstance(value, str) and "float" in kind and _NUMBER.fullmatch(value):
        value = float(value)
    if value is None and "None" in kind:
        return None
    if "Mapping" in kind:
        fits = isinstance(value, dict) and (
            "float" not in kind or all(isinstance(v, int | float) for v in value.values())
        )
    elif "float" in kind:
        fits = isinstance(value, int | float) and not isinstance(value, bool)
        value = float(value) if fits else value
    elif kind == "bool":
        fits = isinstance(value, bool)
    elif "int" in kind:
        fits = isinstance(value, int) and not isinstance(value, bool)
    else:
        fits = isinstance(value, str)
    if not fits:
        raise ArgumentError(
            f"{key} of arm {name!r}: got {value!r}, expected {re.sub(r'Mapping.*', 'a mapping', kind)}."
        )
    return value


def _mapping(data: dict[str, Any], key: str) -> dict[str, Any]:
    value = data.get(key) or {}
    if not isinstance(value, dict):
        raise ArgumentError(f"{key}: got {type(value).__name__}, expected a mapping of settings.")
    return value


def _values(key: str, values: Any) -> list[Any]:
    if not isinstance(values, list) or not values:
        raise ArgumentError(f"grid: got {values!r} for {key}, expected a list of values.")
    return values


def _shipped() -> list[str]:
    folder = files("headway.lab").joinpath("arms")
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))
