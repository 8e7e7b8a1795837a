"""The command line of `headway diagnose concepts`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def concepts(
    model: Annotated[
        str, typer.Argument(help="attribute-clip (trained here once), a hub id of a CLIP, or a folder with one.")
    ] = "attribute-clip",
    pictures: Annotated[
        Path | None,
        typer.Option(help="A folder of pictures (sub-folders are classes), or JSONL with a picture a line."),
    ] = None,
    bank: Annotated[
        Path | None,
        typer.Option(help="Texts that heads are described with, one a line; a tab and its concept may follow."),
    ] = None,
    neutral: Annotated[
        Path | None, typer.Option(help="Neutral prompts, one a line, whose retrieval is measured for skew.")
    ] = None,
    template: Annotated[str, typer.Option(help="Prompt of a class; {} stands for its name.")] = "a photo of a {}.",
    count: Annotated[int, typer.Option(help="Scenes that attribute-clip is audited on; most pictures read.")] = 400,
    layers: Annotated[int, typer.Option(help="Layers, from the last, whose heads are described.")] = 4,
    texts: Annotated[int, typer.Option(help="Texts per head.")] = 5,
    rank: Annotated[int, typer.Option(help="Directions of a head that texts are projected on.")] = 80,
    draws: Annotated[int, typer.Option(help="Random sets of heads beside each silenced set.")] = 5,
    top: Annotated[int, typer.Option(help="Pictures that a neutral prompt retrieves.")] = 10,
    bad_rows: Annotated[str, typer.Option(help="Pictures and rows that cannot be used: refuse or skip.")] = "refuse",
    seed: Annotated[int, typer.Option(help="Seed of scenes and of everything that is drawn.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder for concepts.html, concepts.json and finished parts.")] = Path(
        "concepts-out"
    ),
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON and nothing else.")] = False,
    trust_remote_code: Annotated[bool, typer.Option(help="Let a hub model run its own code.")] = False,
) -> None:
    """Describe the heads of a CLIP by texts, score their consistency, and silence them beside equally many others."""
    from headway.diagnose.concepts.command import run

    run(
        model,
        pictures=pictures,
        bank=bank,
        neutral=neutral,
        template=template,
        count=count,
        layers=layers,
        texts=texts,
        rank=rank,
        draws=draws,
        top=top,
        bad_rows=bad_rows,
        seed=seed,
        out=out,
        as_json=json,
        trust_remote_code=trust_remote_code,
    )
