"""The command line of `headway diagnose anchors`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def anchors(
    model: Annotated[str, typer.Argument(help="smollm2, a hub id, or a folder with a model.")] = "smollm2",
    traces: Annotated[
        Path | None, typer.Option(help="A text, or JSONL with prompt and text (and sentences, answer) a line.")
    ] = None,
    question: Annotated[str | None, typer.Option(help="A question for the model to think about.")] = None,
    tokens: Annotated[int, typer.Option(help="Longest reasoning and rollout, in tokens.")] = 200,
    rollouts: Annotated[int, typer.Option(help="Continuations for each sentence; 0 leaves this out.")] = 0,
    answer: Annotated[
        str | None, typer.Option(help="Regular expression with a group for the answer (default: boxed or stated).")
    ] = None,
    which: Annotated[str, typer.Option("--which-answer", help="Where several stand: the last or the first.")] = "last",
    settle: Annotated[
        float | None, typer.Option(help="Stop drawing where importance is known to so many nats.")
    ] = None,
    proximity: Annotated[int, typer.Option(help="Sentences this near are not looked back at.")] = 4,
    top: Annotated[int, typer.Option(help="How many receiver heads.")] = 20,
    depth_control: Annotated[bool, typer.Option(help="Ranks in place of attention for receiver scores.")] = False,
    orders: Annotated[int, typer.Option(help="Random sentence orders behind each receiver score; 0 for none.")] = 8,
    top_p: Annotated[bool, typer.Option(help="Keep little of each distribution (long traces).")] = False,
    bad_rows: Annotated[str, typer.Option(help="Rows of a JSONL that cannot be used: refuse or skip.")] = "refuse",
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    seed: Annotated[int, typer.Option(help="Seed of everything that is drawn.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder for anchors.html, anchors.json and finished parts.")] = Path(
        "anchors-out"
    ),
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON and nothing else.")] = False,
    trust_remote_code: Annotated[bool, typer.Option(help="Let a hub model run its own code.")] = False,
) -> None:
    """Find the sentences of a chain of thought that later sentences, and the answer, depend on."""
    from headway.diagnose.anchors.command import run

    run(
        model,
        traces=traces,
        question=question,
        tokens=tokens,
        rollouts=rollouts,
        answer=answer,
        which=which,
        settle=settle,
        proximity=proximity,
        top=top,
        depth_control=depth_control,
        orders=orders,
        top_p=top_p,
        bad_rows=bad_rows,
        dtype=dtype,
        seed=seed,
        out=out,
        as_json=json,
        trust_remote_code=trust_remote_code,
    )
