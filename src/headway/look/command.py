"""What `headway look` does: load, read, write the report, print the headline."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from rich.console import Console

from headway.errors import ArgumentError
from headway.files import write_atomically
from headway.hosts import default_text, load, read_text
from headway.look.looking import look
from headway.look.terminal import summarise
from headway.pages.console import check_folder, progress_bar


def run(
    model: str,
    *,
    text: str | None,
    encoding: str,
    tokens: int | None,
    rows: int | None,
    layers: str | None,
    heads: str | None,
    dtype: str,
    seed: int,
    out: Path,
    as_json: bool,
    allow_longer: bool,
    trust_remote_code: bool,
) -> None:
    """The command. Arguments are checked before the model is loaded; files are written last, whole or not at all."""
    chosen_layers = None if layers is None else parse_layers(layers)
    chosen_heads = None if heads is None else parse_heads(heads)
    given = default_text() if text is None else read_text(text, encoding=encoding)
    if not as_json:
        check_folder(out)
    console = Console(stderr=True)
    with progress_bar(console) as tell:
        tell(f"loading {model}", 0, 1)
        host, tokenizer = load(model, dtype=dtype, trust_remote_code=trust_remote_code)
        found = look(
            host,
            tokenizer,
            given,
            tokens=tokens,
            rows=rows,
            layers=chosen_layers,
            heads=chosen_heads,
            seed=seed,
            name=model,
            allow_longer=allow_longer,
            progress=tell,
        )
    if as_json:
        sys.stdout.write(found.to_json() + "\n")
        return
    page = write_atomically(out / "look.html", found.to_html())
    data = write_atomically(out / "look.json", found.to_json())
    printed = Console()
    summarise(found, printed)
    printed.print(f"\nReport: [bold]{page}[/] ({page.stat().st_size / 1e6:.1f} MB), numbers: {data}", soft_wrap=True)


def parse_layers(text: str) -> list[int]:
    """Layers from text such as "0,4-7"."""
    layers: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:\s*-\s*(\d+))?\s*", part)
        if match is None or (match[2] and int(match[2]) < int(match[1])):
            raise ArgumentError(f"--layers: got {text!r}, expected layers such as 0,4-7.")
        first, last = int(match[1]), int(match[2] or match[1])
        if last - first > 10_000:
            raise ArgumentError(f"--layers: got {text!r}, a range of more than 10,000 layers.")
        layers.extend(range(first, last + 1))
    return sorted(set(layers))


def parse_heads(text: str) -> list[tuple[int, int]]:
    """Heads from text such as "3.7,12.0" (layer.head)."""
    heads = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,6})\.(\d{1,6})\s*", part)
        if match is None:
            raise ArgumentError(f"--heads: got {text!r}, expected layer.head pairs such as 3.7,12.0.")
        heads.append((int(match[1]), int(match[2])))
    return list(dict.fromkeys(heads))
