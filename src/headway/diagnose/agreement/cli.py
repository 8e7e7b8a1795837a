"""The command line of `headway diagnose agreement`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def agreement(
    model: Annotated[str, typer.Argument(help="minilm, smollm2, a hub id, or a folder with a model.")] = "minilm",
    texts: Annotated[
        Path | None, typer.Option(help="JSONL with text (and label, rationale, name) a line, or one text a line.")
    ] = None,
    count: Annotated[int, typer.Option(help="How many texts are explained.")] = 12,
    tokens: Annotated[int, typer.Option(help="Tokens that are read of a text.")] = 128,
    methods: Annotated[
        str | None, typer.Option(help="Methods by name, with commas; without, all that the model allows.")
    ] = None,
    measure: Annotated[
        str, typer.Option(help="kendall, spearman, pearson, weighted, ap, rbo, top-5, top-25% or overlap-5.")
    ] = "kendall",
    baseline: Annotated[str, typer.Option(help="What a removed token becomes: pad, mask, mean or zero.")] = "pad",
    target: Annotated[str, typer.Option(help="The class explained: predicted, gold, or a number.")] = "predicted",
    sign: Annotated[str, typer.Option(help="abs, positive or signed; attention has no sign.")] = "abs",
    special: Annotated[str, typer.Option(help="exclude or include special tokens, for all methods.")] = "exclude",
    words: Annotated[str, typer.Option(help="Rank tokens, or words by the sum or max of their tokens.")] = "tokens",
    readout: Annotated[str, typer.Option(help="What a probe reads of an encoder: mean, first or last.")] = "mean",
    masks: Annotated[int, typer.Option(help="Masks of LIME (paper: 1000).")] = 300,
    steps: Annotated[int, typer.Option(help="Steps of integrated gradients.")] = 50,
    allow_unsupported: Annotated[
        bool, typer.Option(help="Let DeepLIFT run on operations that its rules do not cover.")
    ] = False,
    sheet: Annotated[int, typer.Option(help="Texts on the comparison sheet for people; 0 makes none.")] = 10,
    sheet_methods: Annotated[
        str | None, typer.Option(help="Methods on the sheet, with commas (default: one of each kind).")
    ] = None,
    answers: Annotated[
        list[Path] | None, typer.Option(help="A sheet that was filled in; may be given several times.")
    ] = None,
    bad_rows: Annotated[str, typer.Option(help="Rows that cannot be used: refuse or skip.")] = "refuse",
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    seed: Annotated[int, typer.Option(help="Seed of everything that is drawn.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder for the page, the numbers, the sheet and finished parts.")] = Path(
        "agreement-out"
    ),
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON and nothing else.")] = False,
    trust_remote_code: Annotated[bool, typer.Option(help="Let a hub model run its own code.")] = False,
) -> None:
    """Compare explanations of a classifier with each other, with their own noise, and with what is true."""
    from headway.diagnose.agreement.command import run

    run(
        model,
        texts=texts,
        count=count,
        tokens=tokens,
        methods=methods,
        measure=measure,
        baseline=baseline,
        target=target,
        sign=sign,
        special=special,
        words=words,
        readout=readout,
        masks=masks,
        steps=steps,
        allow_unsupported=allow_unsupported,
        sheet=sheet,
        sheet_methods=sheet_methods,
        answers=answers or [],
        bad_rows=bad_rows,
        dtype=dtype,
        seed=seed,
        out=out,
        as_json=json,
        trust_remote_code=trust_remote_code,
    )
