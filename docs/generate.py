"""Makes the parts of the documentation that are generated: the tables of methods and of the coverage of hosts.

`make docs` runs it; a test checks that what is stored is what it makes.
"""

from __future__ import annotations

import logging
from pathlib import Path

from headway.card import catalogue
from headway.files import write_atomically

ROOT = Path(__file__).resolve().parents[1]
START, END = "<!-- methods: start -->", "<!-- methods: end -->"


def methods_table() -> str:
    """The methods, one row per card."""
    rows = ["| method | family | paper | what it is for |", "|---|---|---|---|"]
    rows += [
        f"| `{card.slug}` | {card.family} | [{card.title}](https://arxiv.org/abs/{card.arxiv}) ({card.year}) | {card.summary} |"
        for card in catalogue().values()
    ]
    return "\n".join(rows)


def readme(text: str) -> str:
    """The README with its table of methods made anew."""
    before, rest = text.split(START)
    _, after = rest.split(END)
    return f"{before}{START}\n{methods_table()}\n{END}{after}"


def coverage() -> str:
    """The page that says which causal language models the door can enter."""
    from headway.door.coverage import render_coverage, sweep

    return render_coverage(sweep())


def main() -> None:
    logging.disable(logging.WARNING)
    path = ROOT / "README.md"
    write_atomically(path, readme(path.read_text(encoding="utf-8")))
    write_atomically(ROOT / "docs" / "coverage.md", coverage())


if __name__ == "__main__":
    main()
