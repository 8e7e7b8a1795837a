"""Recipes: one per paper, each a function from a context to claims; found by slug in `headway.evidence.recipes`.

A recipe declares its criteria beside its function, before anything is measured:

    CRITERIA = {"sink-appears": at_least(0.6, requires=at_most(0.1, of="loss"))}

    def run(context: Context) -> list[Claim]: ...

    RECIPE = Recipe(slug="sink-emergence", title="…", run=run, criteria=CRITERIA)

Work that takes long goes into `context.stage(name, function)`, whose result is kept on disk: a run that was interrupted
continues behind its last finished stage.
"""

from __future__ import annotations

import importlib
import json
import pkgutil
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np
import torch
from rich.progress import Progress

from headway.errors import ArgumentError, HeadwayError, unknown
from headway.evidence.claims import Claim, check_name
from headway.evidence.criteria import Criterion
from headway.evidence.data import plain
from headway.files import write_atomically

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

Size = Literal["smoke", "small", "full"]
SIZES: tuple[Size, ...] = ("smoke", "small", "full")
T = TypeVar("T")
_MISSING: Any = object()


class NotRunnableError(HeadwayError):
    """A recipe cannot run at the size asked for on this machine."""


@dataclass(kw_only=True)
class Context:
    """What a recipe is given: the size, the seed, a progress bar, and a folder for everything it keeps."""

    size: Size
    seed: int
    out: Path
    progress: Progress = field(default_factory=lambda: Progress(disable=True))
    stage_seconds: dict[str, float] = field(default_factory=dict)
    reused_stages: list[str] = field(default_factory=list)

    def choose(self, *, smoke: T = _MISSING, small: T = _MISSING, full: T = _MISSING) -> T:
        """The value for the size of this run. A size that is left out raises NotRunnableError when it is run."""
        value = {"smoke": smoke, "small": small, "full": full}[self.size]
        if value is _MISSING:
            given = [s for s, v in zip(SIZES, (smoke, small, full), strict=True) if v is not _MISSING]
            raise NotRunnableError(
                f"size: got {self.size!r}, but this recipe has settings for {', '.join(given) or 'no size'} only. "
                "Run one of these, or write the missing setting."
            )
        return value

    def generator(self, name: str = "") -> np.random.Generator:
        """A numpy generator that depends on the seed and `name` alone, so it does not matter what was drawn before."""
        return np.random.default_rng(self._seed_of(name))

    def torch_generator(self, name: str = "") -> torch.Generator:
        """A torch generator that depends on the seed and `name` alone."""
        return torch.Generator().manual_seed(self._seed_of(name))

    def seeds(self, count: int) -> list[int]:
        """`count` distinct seeds for repeated training, derived from the seed of the run."""
        return [self._seed_of(f"seed {i}") for i in range(count)]

    def track(self, items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
        """Iterates with a bar."""
        yield from self.progress.track(items, total=total, description=description)

    def stage(self, name: str, function: Callable[[], Any]) -> Any:
        """The JSON form of `function()`, kept in `stages/<name>.json`; taken from there when the run is resumed.

        A fresh and a resumed stage return the same data: lists for tuples and arrays, strings for keys, NaN kept.
        Global torch randomness inside depends on the seed and the name alone."""
        check_name("stage", name)
        if name in self.stage_seconds:
            raise ArgumentError(f"stage: got {name!r} twice in one run, expected each name once. Rename one of them.")
        path = self.out / "stages" / f"{name}.json"
        if path.exists():
            stored = json.loads(path.read_text(encoding="utf-8"))
            self.reused_stages.append(name)
        else:
            task = self.progress.add_task(name, total=None)
            start = time.perf_counter()
            with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
                torch.manual_seed(self._seed_of(name))
                result = plain(function(), name=f"stage {name}")
            stored = {"seconds": round(time.perf_counter() - start, 3), "result": result}
            write_atomically(path, json.dumps(stored))
            self.progress.update(task, total=1, completed=1)
        self.stage_seconds[name] = stored["seconds"]
        return stored["result"]

    def save_json(self, data: Any, name: str) -> Path:
        """Writes `data/<name>.json` in the run's folder; NaN and infinity become null."""
        content = plain(data, name=check_name("name", name), finite=True)
        return write_atomically(
            self.out / "data" / f"{name}.json",
            json.dumps(content, ensure_ascii=False, indent=1, allow_nan=False) + "\n",
        )

    def save_plot(self, figure: Figure, name: str, form: Literal["html", "json"] = "html") -> Path:
        """Writes `plots/<name>.html`, a page that needs no network, or `plots/<name>.json` (Plotly's own format)."""
        check_name("name", name)
        if form not in ("html", "json"):
            raise unknown("form", form, ("html", "json"))
        page = figure.to_html(include_plotlyjs=True, div_id=name) if form == "html" else figure.to_json()
        return write_atomically(self.out / "plots" / f"{name}.{form}", page)

    def _seed_of(self, name: str) -> int:
        state = np.random.SeedSequence([self.seed, zlib.crc32(name.encode())]).generate_state(2)
        return int(state[0]) << 31 | int(state[1]) >> 1


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How one paper is tested.

    `run(context)` builds data, baseline and method, measures both, and returns claims. `criteria` gives each claim id
    its criterion; `prove` checks that the claims carry exactly these, and records no run without them.
    `plots(context, claims)` may draw afterwards. `obstacle(size)` says why a size cannot run here, or None."""

    slug: str
    title: str
    run: Callable[[Context], Sequence[Claim]]
    criteria: Mapping[str, Criterion] = field(default_factory=dict)
    plots: Callable[[Context, Sequence[Claim]], None] | None = None
    obstacle: Callable[[str], str | None] | None = None

    def __post_init__(self) -> None:
        check_name("slug", self.slug)

    def check_runnable(self, size: str) -> None:
        """Raises NotRunnableError with the recipe's own reason when `size` cannot run here."""
        if size not in SIZES:
            raise unknown("size", size, SIZES)
        reason = self.obstacle(size) if self.obstacle else None
        if reason:
            raise NotRunnableError(f"size: recipe {self.slug!r} cannot run at {size!r} here: {reason}")


def recipes() -> tuple[str, ...]:
    """The slugs of all recipes, without importing them."""
    package = importlib.import_module("headway.evidence.recipes")
    names = (info.name for info in pkgutil.iter_modules(package.__path__))
    return tuple(sorted(name.replace("_", "-") for name in names if not name.startswith("_")))


def load_recipe(slug: str) -> Recipe:
    """The recipe of a slug. Raises ArgumentError, with the nearest match, when there is none."""
    if slug not in recipes():
        raise unknown("recipe", slug, recipes(), fix="`headway papers` lists what is implemented.")
    module = importlib.import_module(f"headway.evidence.recipes.{slug.replace('-', '_')}")
    recipe = getattr(module, "RECIPE", None)
    if not isinstance(recipe, Recipe) or recipe.slug != slug:
        got = recipe.slug if isinstance(recipe, Recipe) else type(recipe).__name__
        raise ArgumentError(f"RECIPE in {module.__name__}: got {got!r}, expected a Recipe with the slug {slug!r}.")
    return recipe
