"""What `headway compare` does: check, load, measure what is not yet measured, write the page, print the table."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from rich.console import Console

from headway.compare.comparing import LEAST_TOKENS, check_choices, compare
from headway.compare.methods import check_share, resolve
from headway.compare.quality import check_tasks
from headway.compare.speed import check_repeats
from headway.compare.terminal import summarise
from headway.errors import ArgumentError
from headway.files import write_atomically
from headway.hosts import default_text, load, read_text
from headway.hosts.text import check_counts
from headway.methods.budget import parse_shares
from headway.pages.console import check_folder, going_on, progress_bar


def run(
    model: str,
    *,
    text: str | None,
    encoding: str,
    methods: str,
    budgets: str,
    tasks: str,
    modes: str,
    tolerance: float,
    dtype: str,
    out: Path,
    as_json: bool,
    trust_remote_code: bool,
    **options: Any,
) -> None:
    """The command. Arguments are checked before the model is loaded. Finished cells are kept in `out` as they come; the
    page and its numbers are written last, whole or not at all."""
    names = parse_names("--methods", methods)
    shares, wanted = parse_shares("--budgets", budgets), parse_names("--tasks", tasks)
    resolve(names)
    check_tasks(wanted)
    check_share(tolerance)
    asked = parse_names("--modes", modes)
    check_choices(asked, options["save"], options["count"], options["chunk"])
    check_counts(options["tokens"], needed=LEAST_TOKENS)
    check_repeats(options["repeats"], options["new_tokens"], options["tokens"])
    given = default_text() if text is None else read_text(text, encoding=encoding)
    check_folder(out)
    console = Console(stderr=True)
    with going_on(out / "cells", "cells"), progress_bar(console) as tell:
        tell(f"loading {model}", 0, 1)
        host, tokenizer = load(model, dtype=dtype, trust_remote_code=trust_remote_code)
        found = compare(
            host,
            tokenizer,
            given,
            methods=names,
            budgets=shares,
            tasks=wanted,
            modes=asked,
            tolerance=tolerance,
            name=model,
            out=out,
            progress=tell,
            **options,
        )
    if as_json:
        sys.stdout.write(found.to_json() + "\n")
        return
    page = write_atomically(out / "compare.html", found.to_html())
    data = write_atomically(out / "compare.json", found.to_json())
    printed = Console()
    summarise(found, printed)
    printed.print(f"\nPage: [bold]{page}[/] ({page.stat().st_size / 1e6:.1f} MB), numbers: {data}", soft_wrap=True)


def parse_names(option: str, text: str) -> list[str]:
    """Names from text such as "a,b,c"."""
    names = [part.strip() for part in text.split(",")]
    if not all(names):
        raise ArgumentError(f"{option}: got {text!r}, expected names with commas between them, such as a,b.")
    return list(dict.fromkeys(names))
