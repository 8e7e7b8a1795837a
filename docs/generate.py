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
        f"| `{card.slug}` | {card.family} | [{card.title}](https://arxiv.org/abs/{card.arxiv}) ({card.year}) | "
        f"{card.summary} |"
        for card in catalogue().values()
    ]
    return "\n".join(rows)


def readme(text: str) -> str:
    """The README with its table of methods made anew."""
    before, rest = text.split(START)
    _, after = rest.split(END)
    return f"{before}{START}\n{methods_table()}\n{END}{after}"


def coverage() -> str:
    """The page that says which hosts the door can enter: one row per architecture of the installed transformers."""
    import transformers

    from headway.door.coverage import cover
    from headway.errors import HostError
    from headway.hosts.tiny import architectures, other_architectures, tiny_host

    def row(name: str) -> tuple[str, str]:
        try:
            model, example = tiny_host(name)
        except HostError as error:
            return "not built", str(error)
        found = cover(model, example, architecture=name)
        detail = f"{found.sites} sites" if found.outcome == "passes" else found.reason
        return found.outcome, detail

    def table(names: list[str]) -> tuple[list[str], int]:
        rows = {name: row(name) for name in names}
        lines = ["| architecture | outcome | |", "|---|---|---|"]
        lines += [f"| `{name}` | {outcome} | {shorten(detail)} |" for name, (outcome, detail) in rows.items()]
        return lines, sum(outcome == "passes" for outcome, _ in rows.values())

    causal, passing = table(sorted(architectures()))
    others, passing_others = table(sorted(other_architectures()))
    return "\n".join(
        [
            "# Which hosts pass the door",
            "",
            f"Made by `make docs` with transformers {transformers.__version__}: a tiny random model of every "
            "architecture is",
            "built, attached, run through the door's own kernel at every site, and compared with its native output.",
            "*Refused* hosts raise an error with the reason; none passes without being intercepted.",
            "",
            f"## Causal language models: {passing} of {len(causal) - 2} pass",
            "",
            *causal,
            "",
            f"## Encoders, vision, encoder-decoders: {passing_others} of {len(others) - 2} pass",
            "",
            *others,
            "",
        ]
    )


def shorten(text: str, limit: int = 220) -> str:
    """One table cell: no line breaks or bars, cut at a word."""
    flat = " ".join(text.split()).replace("|", "/")
    return flat if len(flat) <= limit else flat[:limit].rsplit(" ", 1)[0] + " …"


def main() -> None:
    logging.disable(logging.WARNING)
    path = ROOT / "README.md"
    write_atomically(path, readme(path.read_text(encoding="utf-8")))
    write_atomically(ROOT / "docs" / "coverage.md", coverage())


if __name__ == "__main__":
    main()
