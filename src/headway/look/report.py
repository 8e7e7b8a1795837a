"""The report of `headway look`: one HTML file that needs nothing but a browser.

The page is a template with its own style sheet and scripts, all in `templates/`. The numbers travel as JSON in an inert
script element in which `<`, `>` and `&` are written as escapes, so no token can end the element; the scripts put text
on the page as text nodes only. Plotly's bundle is carried once, gzipped, and unpacked by the browser. A content
security policy names the hashes of the two scripts that may run and forbids every request: a token that did get into
the page as markup could neither run nor call home.

Received mass spans many decades, so it is packed as 16-bit codes on a log scale (see `pack_log`)."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import math
import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float
from markupsafe import Markup, escape

from headway.errors import ArgumentError
from headway.look.result import FAMILIES, HeadMap, HeadMetric, Look

if TYPE_CHECKING:
    from jinja2 import Environment

SIGNIFICANT_DIGITS = 4
TEXT_SHOWN = 160
VERSIONS = ("headway", "torch", "transformers")
SCRIPTS = (
    "base.js",
    "colour.js",
    "plots.js",
    "facts.js",
    "heads.js",
    "layers.js",
    "tokens.js",
    "secondary.js",
    "patterns.js",
    "inspector.js",
    "main.js",
)
FAMILY_TITLES = {"sinks": "Sinks", "secondary": "Secondary sinks", "patterns": "Patterns", "roles": "Roles"}
LOG_CODES = 65533
LOG_FLOOR = 1e-12
NUMBER = re.compile(r"\d+(?:[.,\u202f]\d+)*(?:\s?%)?")
NAMED_PLACE = re.compile(r"\b(?:layer|head|position)s? \d[\d,]*(?:(?:,| to| and) \d[\d,]*)*", re.IGNORECASE)
HEADLINE = 60


def render(look: Look) -> str:
    """The report as one self-contained HTML page, without any network access.

    Raises ArgumentError when parts of the Look contradict each other (a metric with another number of heads, a map
    whose bytes do not fill its side)."""
    _check(look)
    scripts = _scripts()
    plotly, packed = _plotly()
    environment = _environment()
    return environment.get_template("report.html.j2").render(
        look=look,
        title=f"{look.model.get('name', 'model')}: what its attention heads do",
        subtitle=_subtitle(look),
        provenance=_provenance(look.run),
        facts=[("Model", list(_flat(look.model))), ("Run", list(_flat(look.run)))],
        sections=_sections(look),
        policy=_policy(scripts, plotly),
        style=Markup(_source("report.css")),
        scripts=Markup(scripts),
        plotly=Markup(packed),
        data=Markup(_script_safe(payload(look))),
    )


def payload(look: Look) -> dict[str, Any]:
    """What the page's scripts read: the Look with numbers cut to four significant digits and received mass packed."""
    data = asdict(look)
    received = data.pop("received")
    for name in ("findings", "warnings", "format"):
        data.pop(name)
    layers, heads = _grid(look)
    data |= {
        "grid": {"layers": layers, "heads": heads},
        "families": [[name, FAMILY_TITLES[name]] for name in FAMILIES],
        "received": pack_log(np.asarray(received, dtype=float)) if received and look.tokens else None,
    }
    return _rounded(data)


def pack_log(values: Float[np.ndarray, "rows columns"]) -> dict[str, Any]:
    """Numbers ≥ 0 as 16-bit codes on a log scale, base64, row-major, little-endian.

        code 0: not a number;  code 1: zero;  code c ≥ 2:  low · (high / low)^((c − 2) / 65533)

    What is below 1e-12 of the largest number counts as zero. The relative error of the rest is at most half a step,
    (high / low)^(1 / 131066) − 1: below 2.2e-4."""
    values = np.asarray(values, dtype=float)
    positive = np.isfinite(values) & (values > LOG_FLOOR * values.max(initial=0, where=np.isfinite(values)))
    low, high = (float(values[positive].min()), float(values[positive].max())) if positive.any() else (1.0, 1.0)
    codes = np.zeros(values.shape, dtype="<u2")
    codes[np.isfinite(values)] = 1
    span = math.log(high / low)
    if span > 0:
        codes[positive] = 2 + np.rint(np.log(values[positive] / low) / span * LOG_CODES)
    else:
        codes[positive] = 2
    return {
        "rows": values.shape[0],
        "columns": values.shape[1],
        "low": _Exact(low),
        "high": _Exact(high),
        "codes": base64.b64encode(codes.tobytes()).decode("ascii"),
    }


class _Exact(float):
    """A float that rounding leaves alone."""


def visible(text: object) -> str:
    """Text in which control, direction and half characters are seen instead of obeyed."""

    def shown(character: str) -> str:
        if character in "\n\t" or unicodedata.category(character) not in ("Cc", "Cf", "Cs"):
            return character
        return f"⟨U+{ord(character):04X}⟩"

    return "".join(map(shown, str(text)))


def emphasised(sentence: object) -> Markup:
    """A sentence, escaped, with its first number set apart when it starts within the first 60 characters. The number of
    a layer, head or position is a name and does not count."""
    text = visible(sentence)
    found = NUMBER.search(NAMED_PLACE.sub(lambda place: "x" * len(place.group()), text))
    if not found or found.start() > HEADLINE:
        return escape(text)
    start, end = found.span()
    return escape(text[:start]) + Markup("<b>") + escape(text[start:end]) + Markup("</b>") + escape(text[end:])


def _environment() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("headway.look", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"visible": visible, "emphasised": emphasised}
    return environment


def _source(name: str) -> str:
    from importlib.resources import files

    return files("headway.look").joinpath("templates", name).read_text(encoding="utf-8")


def _scripts() -> str:
    return '"use strict";\n(() => {\n' + "\n".join(_source(name) for name in SCRIPTS) + "\n})();"


@lru_cache(maxsize=1)
def _plotly() -> tuple[str, str]:
    """The hash of Plotly's bundle for the policy, and the bundle gzipped in base64."""
    from plotly.offline import get_plotlyjs

    source = get_plotlyjs().encode("utf-8")
    return _hash(source), base64.b64encode(gzip.compress(source, 9, mtime=0)).decode("ascii")


def _hash(script: bytes) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(script).digest()).decode('ascii')}'"


def _policy(scripts: str, plotly_hash: str) -> str:
    allowed = f"{_hash(scripts.encode('utf-8'))} {plotly_hash}"
    return (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )


def _script_safe(data: Any) -> str:
    text = json.dumps(data, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _rounded(value: Any) -> Any:
    """JSON-ready copy with short numbers: whole floats as integers, NaN and infinity as null."""
    if isinstance(value, dict):
        return {str(k): _rounded(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(v) for v in value]
    if isinstance(value, np.ndarray):
        return _rounded(value.tolist())
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, _Exact):
        return float(value)
    if isinstance(value, float):
        if not math.isfinite(value):
            return None
        short = float(f"{value:.{SIGNIFICANT_DIGITS}g}")
        return int(short) if short.is_integer() and abs(short) < 1e15 else short
    if value is None or isinstance(value, str | int | bool):
        return value
    return str(value)


def _grid(look: Look) -> tuple[int, int]:
    """(layers, heads) of the head grids: the shape of the values, else what the model says, else none."""
    grids: list[Sequence[Sequence[object]]] = [metric.values for metric in look.heads]
    grids += [item.values for item in look.labels]
    for values in filter(None, grids):
        return len(values), len(values[0])
    return int(look.model.get("layers") or 0), int(look.model.get("heads") or 0)


def _check(look: Look) -> None:
    layers, heads = _grid(look)
    grids: list[tuple[str, Sequence[Sequence[object]]]] = [(m.name, grid) for m in look.heads for grid in _grids(m)]
    grids += [(item.name, item.values) for item in look.labels]
    for name, grid in grids:
        if len(grid) != layers or any(len(row) != heads for row in grid):
            got = f"{len(grid)} layers × {sorted({len(row) for row in grid})} heads"
            raise ArgumentError(f"{name}: got {got}, expected {layers} × {heads} as in the other metrics.")
    for series in look.layers:
        if len(series.layers) != len(series.values):
            raise ArgumentError(
                f"{series.name}: got {len(series.values)} values, expected one for each of {len(series.layers)} layers."
            )
    for row in look.received:
        if len(row) != len(look.tokens):
            raise ArgumentError(f"received: got a row of {len(row)} tokens, expected {len(look.tokens)}.")
    for item in look.maps:
        _check_map(item)


def _grids(metric: HeadMetric) -> list[list[list[float]]]:
    return [grid for grid in (metric.values, metric.low, metric.high) if grid is not None]


def _check_map(item: HeadMap) -> None:
    squares = [("map", item.side, item.pixels), *(("detail window", w.size, w.pixels) for w in item.windows)]
    for what, side, pixels in squares:
        size = len(base64.b64decode(pixels))
        if size != side * side:
            raise ArgumentError(
                f"{what} of layer {item.layer}, head {item.head}: got {size} bytes, expected {side} × {side}."
            )


def _sections(look: Look) -> list[tuple[str, str]]:
    candidates = (
        ("heads", "Heads", bool(look.heads or look.labels)),
        ("layers", "Layers", bool(look.layers)),
        ("tokens", "Tokens", bool(look.tokens)),
        ("secondary", "Secondary sinks", bool(look.secondary)),
        ("patterns", "Patterns", bool(look.patterns)),
        ("inspector", "Head inspector", bool(look.maps)),
        ("more", "More numbers", bool(look.sinks or look.roles)),
    )
    return [(name, title) for name, title, present in candidates if present]


def _subtitle(look: Look) -> str:
    model, run = look.model, look.run
    layers, heads = model.get("layers"), model.get("heads")
    parts = []
    if layers and heads:
        shared = model.get("kv_heads")
        groups = f" ({shared} key-value heads)" if shared and shared != heads else ""
        parts.append(f"{layers} layers × {heads} heads{groups}")
    if model.get("head_dim"):
        parts.append(f"head dimension {model['head_dim']}")
    if model.get("parameters"):
        parts.append(f"{_count(model['parameters'])} parameters")
    if model.get("dtype"):
        parts.append(str(model["dtype"]).removeprefix("torch."))
    tokens = run.get("tokens", len(look.tokens))
    parts.append(f"{tokens:,} tokens" if isinstance(tokens, int) else f"{tokens} tokens")
    return " · ".join(parts)


def _provenance(run: dict[str, Any]) -> str:
    """What was read, when and with which versions, as far as the run says so."""
    parts = [
        _cut(f"text: {run['text']}") if run.get("text") else "",
        str(run.get("date") or ""),
        ", ".join(f"{name} {run[name]}" for name in VERSIONS if run.get(name)),
    ]
    return " · ".join(part for part in parts if part)


def _cut(text: str) -> str:
    return text if len(text) <= TEXT_SHOWN else f"{text[:TEXT_SHOWN]}…"


def _count(number: object) -> str:
    if not isinstance(number, int | float):
        return str(number)
    for size, word in ((1e9, "billion"), (1e6, "million")):
        if number >= size:
            return f"{number / size:.1f} {word}"
    return f"{number:,}"


def _flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """(name, value) rows of a dictionary, inner dictionaries joined by a space, long texts cut."""
    for key, value in values.items():
        name = f"{prefix}{key}".replace("_", " ")
        if isinstance(value, dict):
            yield from _flat(value, f"{name} ")
            continue
        text = f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
        yield name, _cut(text)
