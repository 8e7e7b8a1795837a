"""One run of a recipe: measure, judge, write, and on request record.

runs/<slug>/<UTC time>/run.json       what was asked for, written first, read by --resume
runs/<slug>/<UTC time>/stages/*.json  finished stages
runs/<slug>/<UTC time>/result.json    the claims and where they were measured
evidence/<slug>.json                  the same result, recorded
"""

from __future__ import annotations

import hashlib
import json
import re
import socket
import sys
import tempfile
import time
import tomllib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from headway.errors import ArgumentError, unknown
from headway.evidence.claims import Claim, EditedRecordError, check_name
from headway.evidence.criteria import Verdict
from headway.evidence.environment import environment
from headway.evidence.recipe import SIZES, Context, Recipe, Size, load_recipe
from headway.evidence.sources import source_digest
from headway.files import write_atomically

FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Run:
    """The result of one run: its claims and all that they depend on. `seconds` include the stages that were resumed.
    `planned` says that the criteria were declared with the recipe, before the run."""

    slug: str
    title: str
    size: Size
    seed: int
    started: str
    seconds: float
    stages: Mapping[str, float]
    reused_stages: tuple[str, ...]
    planned: bool
    environment: Mapping[str, Any]
    claims: tuple[Claim, ...]
    folder: Path | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        check_name("slug", self.slug)
        if self.size not in SIZES:
            raise unknown("size", self.size, SIZES)

    @property
    def counts(self) -> dict[Verdict, int]:
        """How many claims hold, fail and are inconclusive."""
        counted = Counter(claim.verdict for claim in self.claims)
        return {verdict: counted[verdict] for verdict in Verdict}

    @property
    def command(self) -> str:
        """The command that measures this again."""
        return f"headway prove {self.slug} --size {self.size} --seed {self.seed}"

    def to_json(self) -> str:
        """JSON text with a digest of its own content, so that an edit by hand is noticed."""
        content = {
            "format": FORMAT,
            "slug": self.slug,
            "title": self.title,
            "size": self.size,
            "seed": self.seed,
            "started": self.started,
            "seconds": self.seconds,
            "stages": dict(self.stages),
            "reused_stages": list(self.reused_stages),
            "planned": self.planned,
            "environment": dict(self.environment),
            "claims": [claim.to_dict() for claim in self.claims],
        }
        content["digest"] = _digest(content)
        return json.dumps(content, ensure_ascii=False, indent=1, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str, *, name: str = "text") -> Run:
        """The run that `to_json` wrote, every claim judged again. Raises EditedRecordError when a verdict or any other
        content was changed, and ArgumentError (naming `name`) when the text is something else."""
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise ArgumentError(f"{name}: got invalid JSON ({error}), expected a result of `headway prove`.") from None
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            got = data.get("format") if isinstance(data, dict) else type(data).__name__
            raise ArgumentError(
                f"{name}: got format {got!r}, expected {FORMAT}. Run `headway prove` with this version."
            )
        digest = data.pop("digest", None)
        given = {key: value for key, value in data.items() if key != "format"}
        try:
            given["claims"] = tuple(Claim.from_dict(claim) for claim in given["claims"])
            given["reused_stages"] = tuple(given["reused_stages"])
            run = cls(**given)
        except (KeyError, TypeError) as error:
            raise ArgumentError(f"{name}: got other fields than `headway prove` writes ({error}).") from None
        if digest != _digest(data):
            raise EditedRecordError(
                f"{name}: the content does not match its digest, so it was edited by hand. Run `{run.command}` again."
            )
        return run


def prove(
    recipe: str | Recipe,
    *,
    size: Size | None = None,
    seed: int | None = None,
    record: bool = False,
    out: str | Path | None = None,
    resume: str | Path | None = None,
    show_progress: bool = True,
) -> Run:
    """Runs a recipe (a slug, or a Recipe) and writes `<out>/<slug>/<UTC time>/result.json`; `out` is `runs` by default.

    `size` is "smoke", "small" (default) or "full"; `seed` defaults to 0. `resume` continues an interrupted run: its
    folder, or that folder's name; size and seed are then those of the run. `record` also stores the result as
    `evidence/<slug>.json` in the project (never a smoke run, never a run whose criteria the recipe does not declare).

    Raises ArgumentError for unknown names and for claims that differ from the recipe's criteria, NotRunnableError when
    the size cannot run here. An interrupt keeps all finished stages; the exception carries the command to resume."""
    recipe = load_recipe(recipe) if isinstance(recipe, str) else recipe
    base = Path("runs" if out is None else out) / recipe.slug
    folder, plan = _continue(recipe, base, resume, size, seed) if resume else _plan(recipe, size, seed)
    recipe.check_runnable(plan["size"])
    root = None
    if record:
        _check_recordable(recipe.slug, plan["size"], bool(recipe.criteria))
        root = project_root()
    folder = folder or _new_folder(base, plan)
    with _resumable(recipe.slug, folder), _progress(show_progress) as progress:
        context = Context(size=plan["size"], seed=plan["seed"], out=folder, progress=progress)
        begin = time.perf_counter()
        claims = _checked(recipe, recipe.run(context))
        reused = sum(context.stage_seconds[name] for name in context.reused_stages)
        run = Run(
            slug=recipe.slug,
            title=recipe.title,
            size=plan["size"],
            seed=plan["seed"],
            started=plan["started"],
            seconds=round(time.perf_counter() - begin + reused, 3),
            stages=context.stage_seconds,
            reused_stages=tuple(context.reused_stages),
            planned=bool(recipe.criteria),
            environment=environment(),
            claims=claims,
            folder=folder,
        )
        write_atomically(folder / "result.json", run.to_json())
        if recipe.plots:
            recipe.plots(context, claims)
    if root is not None:
        record_run(run, root)
    return run


def record_run(run: Run, root: str | Path) -> Path:
    """Stores a run as `evidence/<slug>.json` under `root`. Refuses smoke runs, runs without declared criteria, and
    content that names this machine, its user or its folders."""
    _check_recordable(run.slug, run.size, run.planned)
    text = run.to_json()
    private = next((word for word in _private_words() if re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text)), None)
    if private:
        raise ArgumentError(
            f"record: the result of {run.slug!r} holds {private!r}, which names this machine or its folders. "
            "Keep it out of the claim's texts and details."
        )
    return write_atomically(Path(root) / "evidence" / f"{run.slug}.json", text)


def project_root(start: str | Path | None = None) -> Path:
    """The project that evidence is recorded in: the nearest folder from `start` (default: the current folder) upward
    that holds `evidence/` or Headway's own pyproject.toml, no higher than the top of the git checkout. Raises
    ArgumentError when there is none."""
    start = Path(start or ".").resolve()
    for folder in (start, *start.parents):
        if (folder / "evidence").is_dir() or _is_headway(folder / "pyproject.toml"):
            return folder
        if (folder / ".git").exists():
            break
    raise ArgumentError(
        "record: got a current folder that is in no project, expected a checkout of Headway or a folder with "
        "`evidence/` in it. Change into the checkout, or make the folder."
    )


def _plan(recipe: Recipe, size: Size | None, seed: int | None) -> tuple[None, dict[str, Any]]:
    seed = 0 if seed is None else seed
    if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
        raise ArgumentError(f"seed: got {seed!r}, expected a whole number, 0 or more.")
    return None, {
        "format": FORMAT,
        "slug": recipe.slug,
        "size": size or "small",
        "seed": seed,
        "started": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "recipe_sha256": source_digest(recipe.run),
    }


def _continue(
    recipe: Recipe, base: Path, resume: str | Path, size: Size | None, seed: int | None
) -> tuple[Path, dict[str, Any]]:
    folder = next((f for f in (Path(resume), base / resume) if (f / "run.json").is_file()), None)
    if folder is None:
        known = sorted(path.parent.name for path in base.glob("*/run.json"))
        raise unknown("resume", str(resume), known or ["(no runs yet)"], fix="Give the folder of the run, or its name.")
    plan = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    asked = {"slug": recipe.slug, "size": size or plan["size"], "seed": plan["seed"] if seed is None else seed}
    for name, value in asked.items():
        if plan[name] != value:
            raise ArgumentError(f"{name}: got {value!r}, but the run to resume has {plan[name]!r}. Leave it out.")
    if plan["recipe_sha256"] != source_digest(recipe.run):
        raise ArgumentError(
            f"resume: recipe {recipe.slug!r} has changed since the run began, so its finished stages may be of another "
            "kind. Start a new run."
        )
    return folder, plan


def _new_folder(base: Path, plan: dict[str, Any]) -> Path:
    stamp = plan["started"].replace("-", "").replace(":", "")
    base.mkdir(parents=True, exist_ok=True)
    for attempt in range(1, 1000):
        folder = base / (stamp if attempt == 1 else f"{stamp}-{attempt}")
        try:
            folder.mkdir()
        except FileExistsError:
            continue
        write_atomically(folder / "run.json", json.dumps(plan, indent=1) + "\n")
        return folder
    raise ArgumentError(f"out: got 999 runs of one second in {base}, expected fewer. Use another folder.")


def _checked(recipe: Recipe, returned: Sequence[Claim]) -> tuple[Claim, ...]:
    """The claims, when they are what the recipe promised: distinct, at least one, each with its declared criterion."""
    claims = tuple(returned)
    for item in claims:
        if not isinstance(item, Claim):
            raise ArgumentError(
                f"recipe {recipe.slug!r}: got {type(item).__name__} in its result, expected claims only."
            )
    ids = [claim.id for claim in claims]
    if not claims or len(set(ids)) != len(ids):
        raise ArgumentError(f"recipe {recipe.slug!r}: got claims {ids}, expected one or more with distinct ids.")
    if recipe.criteria:
        if set(ids) != set(recipe.criteria):
            raise ArgumentError(
                f"recipe {recipe.slug!r}: got claims {sorted(ids)}, its criteria declare {sorted(recipe.criteria)}. "
                "A claim that could not be measured is returned with Measurement(nan), which is inconclusive."
            )
        for claim in claims:
            if claim.criterion != recipe.criteria[claim.id]:
                raise ArgumentError(
                    f"claim {claim.id!r}: got the criterion {claim.criterion.text!r}, the recipe declares "
                    f"{recipe.criteria[claim.id].text!r}. A criterion is written before the run; use the declared one."
                )
    return claims


def _check_recordable(slug: str, size: str, planned: bool) -> None:
    if size == "smoke":
        raise ArgumentError("record: got a smoke run, which only tests that a recipe works. Use --size small or full.")
    if not planned:
        raise ArgumentError(
            f"record: recipe {slug!r} declares no criteria, so nothing shows that they were written before the run. "
            "Give its Recipe criteria={claim id: criterion}."
        )


@contextmanager
def _resumable(slug: str, folder: Path) -> Iterator[None]:
    try:
        yield
    except BaseException as error:
        if any((folder / "stages").glob("*.json")):
            error.add_note(f"Finished stages are kept. Continue with: headway prove {slug} --resume {folder}")
        raise


@contextmanager
def _progress(show: bool) -> Iterator[Progress]:
    console = Console(stderr=True)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not (show and console.is_terminal)) as progress:
        yield progress


def _digest(content: Mapping[str, Any]) -> str:
    canonical = json.dumps(content, sort_keys=True, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def _private_words() -> list[str]:
    """Folders and names that a recorded file must not hold, as they would stand in JSON.

    Short ones, and host names that are ordinary words, are left out: they would match innocent text."""
    places = [
        Path.home(),
        Path.cwd(),
        Path(sys.prefix),
        Path(tempfile.gettempdir()),
        Path(__file__).resolve().parents[3],
    ]
    words = [str(place) for place in places if len(str(place)) > 3]
    host = socket.gethostname()
    if len(host) > 3 and not host.isalpha():
        words.append(host)
    return [json.dumps(word, ensure_ascii=False)[1:-1] for word in words]


def _is_headway(path: Path) -> bool:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8")).get("project", {}).get("name") == "headway"
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError):
        return False
