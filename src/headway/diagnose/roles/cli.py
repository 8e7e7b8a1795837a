"""The command line of `headway diagnose roles`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def roles(
    model: Annotated[str, typer.Argument(help="smollm2, a hub id, or a folder with a model.")] = "smollm2",
    log: Annotated[
        Path | None, typer.Option(help="Conversations, one JSON object a line; their turns are marked.")
    ] = None,
    form: Annotated[
        str, typer.Option("--format", help="turns, messages, sharegpt, langchain, autogen, …; auto tells by fields.")
    ] = "auto",
    bad_rows: Annotated[str, typer.Option(help="Rows of the log that cannot be used: refuse or skip.")] = "refuse",
    judge: Annotated[str, typer.Option(help="rules, model, or rules,model to see how far they agree.")] = "rules",
    localize: Annotated[
        bool | None,
        typer.Option("--localize/--no-localize", help="Look into the model (default: when no log is given)."),
    ] = None,
    kinds: Annotated[str, typer.Option(help="Kinds of conflict, with commas; all seven by default.")] = "all",
    relations: Annotated[str, typer.Option(help="system-user, peer-peer, or both with a comma.")] = "all",
    items: Annotated[int, typer.Option(help="Cases of each kind and relation to find heads on.")] = 1,
    held_out: Annotated[int, typer.Option(help="Cases of each kind and relation to judge heads by.")] = 1,
    share: Annotated[float, typer.Option(help="Share of heads that are focal, at most 0.2.")] = 0.1,
    cover: Annotated[float, typer.Option(help="Share of the focal heads' score that the focal layers hold.")] = 0.5,
    window: Annotated[int | None, typer.Option(help="Take so many neighbouring layers in place of --cover.")] = None,
    draws: Annotated[int, typer.Option(help="Random head sets beside the focal heads.")] = 5,
    weigh: Annotated[
        str,
        typer.Option(help="Weigh cases by nothing, lost marks, or lost accuracy: even, cras, accuracy."),
    ] = "even",
    reply_tokens: Annotated[int, typer.Option(help="Length of the model's own replies; 0 leaves them out.")] = 24,
    align: Annotated[int, typer.Option(help="Steps of LoRA on the focal layers and on the controls; 0 for none.")] = 0,
    weights: Annotated[
        str, typer.Option(help="Token weights of the loss: attention, uniform, constant.")
    ] = "attention",
    rank: Annotated[int, typer.Option(help="Rank of LoRA.")] = 8,
    learning_rate: Annotated[float, typer.Option(help="Peak rate of LoRA training.")] = 2e-4,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    seed: Annotated[int, typer.Option(help="Seed of everything that is drawn.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder for roles.html, roles.json, adapters and finished parts.")] = Path(
        "roles-out"
    ),
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON and nothing else.")] = False,
    trust_remote_code: Annotated[bool, typer.Option(help="Let a hub model run its own code.")] = False,
) -> None:
    """See how agents keep their role, which heads a conflicting message moves, and mend their layers."""
    from headway.diagnose.roles.command import run

    run(
        model,
        log=log,
        form=form,
        bad_rows=bad_rows,
        judge=judge,
        localize=localize,
        kinds=kinds,
        relations=relations,
        items=items,
        held_out=held_out,
        share=share,
        cover=cover,
        window=window,
        draws=draws,
        weigh=weigh,
        reply_tokens=reply_tokens,
        align=align,
        weights=weights,
        rank=rank,
        learning_rate=learning_rate,
        dtype=dtype,
        seed=seed,
        out=out,
        as_json=json,
        trust_remote_code=trust_remote_code,
    )
