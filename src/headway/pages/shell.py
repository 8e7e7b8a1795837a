"""The shell of every page: one HTML file that needs nothing but a browser.

A verb brings a template that extends `page.html.j2`, its own style sheet and scripts, and numbers. Those travel as
JSON in an inert script element in which `<`, `>` and `&` are written as escapes, so no text can end the element; the
scripts put text on the page as text nodes only. Plotly's bundle is carried once, gzipped, and unpacked by the browser.
A content security policy names the hashes of the two scripts that may run and forbids every request: a text that did
get into the page as markup could neither run nor call home.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

from markupsafe import Markup, escape

HOME = "headway.pages"
TEXT_SHOWN = 160
VERSIONS = ("headway", "torch", "transformers")
NUMBER = re.compile(r"\d+(?:[.,\u202f]\d+)*(?:\s?%)?")
NAMED_PLACE = re.compile(r"\b(?:layer|head|position)s? \d[\d,]*(?:(?:,| to| and) \d[\d,]*)*", re.IGNORECASE)
HEADLINE = 60


def render_page(
    package: str,
    template: str,
    *,
    styles: Sequence[str],
    scripts: Sequence[str],
    data: Mapping[str, Any],
    **context: Any,
) -> str:
    """A page from a template in `<package>/templates`, which extends `page.html.j2`.

    `styles` and `scripts` are files of that folder; they stand behind those of the shell, scripts before the shell's
    last one, which draws. `data` is what the scripts read, ready for JSON. `context` goes to the template."""
    from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=ChoiceLoader([PackageLoader(package, "templates"), PackageLoader(HOME, "templates")]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"visible": visible, "emphasised": emphasised}
    sources = [*(source(HOME, name) for name in ("base.js", "colour.js", "plots.js"))]
    sources += [*(source(package, name) for name in scripts), source(HOME, "end.js")]
    script = '"use strict";\n(() => {\n' + "\n".join(sources) + "\n})();"
    plotly, packed = _plotly()
    return environment.get_template(template).render(
        policy=_policy(script, plotly),
        style=Markup("\n".join([source(HOME, "page.css"), *(source(package, name) for name in styles)])),
        scripts=Markup(script),
        plotly=Markup(packed),
        data=Markup(script_safe(data)),
        **context,
    )


def source(package: str, name: str) -> str:
    """A file of a package's templates."""
    from importlib.resources import files

    return files(package).joinpath("templates", name).read_text(encoding="utf-8")


def script_safe(data: Any) -> str:
    """JSON that can stand inside a script element."""
    text = json.dumps(data, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


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


def provenance(run: Mapping[str, Any]) -> str:
    """What was read, when and with which versions, as far as the run says so."""
    parts = [
        cut(f"text: {run['text']}") if run.get("text") else "",
        str(run.get("date") or ""),
        ", ".join(f"{name} {run[name]}" for name in VERSIONS if run.get(name)),
    ]
    return " · ".join(part for part in parts if part)


def model_parts(model: Mapping[str, Any]) -> list[str]:
    """A model in a few words: layers and heads, head dimension, parameters, dtype, as far as it says so."""
    layers, heads = model.get("layers"), model.get("heads")
    parts = []
    if layers and heads:
        shared = model.get("kv_heads")
        groups = f" ({shared} key-value heads)" if shared and shared != heads else ""
        parts.append(f"{layers} layers × {heads} heads{groups}")
    if model.get("head_dim"):
        parts.append(f"head dimension {model['head_dim']}")
    if model.get("parameters"):
        parts.append(f"{count_in_words(model['parameters'])} parameters")
    if model.get("dtype"):
        parts.append(str(model["dtype"]).removeprefix("torch."))
    return parts


def count_in_words(number: object) -> str:
    if not isinstance(number, int | float):
        return str(number)
    for size, word in ((1e9, "billion"), (1e6, "million")):
        if number >= size:
            return f"{number / size:.1f} {word}"
    return f"{number:,}"


def flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """(name, value) rows of a dictionary, inner names joined by a space, lists by commas, long texts cut."""
    for key, value in values.items():
        name = f"{prefix}{key}".replace("_", " ")
        if isinstance(value, dict):
            yield from flat(value, f"{name} ")
            continue
        parts = value if isinstance(value, list | tuple) else [value]
        yield name, cut(", ".join(_fact(part) for part in parts))


def _fact(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def cut(text: str) -> str:
    return text if len(text) <= TEXT_SHOWN else f"{text[:TEXT_SHOWN]}…"


@lru_cache(maxsize=1)
def _plotly() -> tuple[str, str]:
    """The hash of Plotly's bundle for the policy, and the bundle gzipped in base64."""
    from plotly.offline import get_plotlyjs

    bundle = get_plotlyjs().encode("utf-8")
    return _hash(bundle), base64.b64encode(gzip.compress(bundle, 9, mtime=0)).decode("ascii")


def _hash(script: bytes) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(script).digest()).decode('ascii')}'"


def _policy(scripts: str, plotly_hash: str) -> str:
    allowed = f"{_hash(scripts.encode('utf-8'))} {plotly_hash}"
    return (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
