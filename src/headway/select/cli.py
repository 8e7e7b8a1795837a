"""The command line of `headway select`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def select(
    corpus: Annotated[list[str], typer.Argument(help="Files or folders of .jsonl, .jsonl.gz, .parquet, .txt and .md.")],
    model: Annotated[str, typer.Option(help="smollm2, a hub id, or a folder with a model.")] = "smollm2",
    share: Annotated[float, typer.Option(help="Share of every domain that is kept.")] = 0.2,
    text_field: Annotated[str, typer.Option(help="Field that holds the text.")] = "text",
    domain_field: Annotated[
        str | None, typer.Option(help="Field that names the domain, or @file or @folder (default: one domain).")
    ] = None,
    id_field: Annotated[str | None, typer.Option(help="Field that names the record (default: file and line).")] = None,
    split: Annotated[str, typer.Option(help="A record of a text file: file, paragraph or line.")] = "file",
    bad_rows: Annotated[str, typer.Option(help="Rows that cannot be used: refuse or skip.")] = "refuse",
    dedup: Annotated[str, typer.Option(help="Leave out exact copies, near ones too, or none.")] = "exact",
    heads: Annotated[
        str | None, typer.Option(help="Heads to mask, such as 18.6,20.1 (layer.head), or a file of head scores.")
    ] = None,
    probes: Annotated[int, typer.Option(help="Generated look-ups that heads are detected with.")] = 16,
    probe_tokens: Annotated[int, typer.Option(help="Longest look-up, in tokens.")] = 512,
    threshold: Annotated[
        float | None, typer.Option(help="Heads with at least this retrieval score (default: the top 5 %).")
    ] = None,
    repetition_weight: Annotated[float, typer.Option(help="How much repetition is taken off a score.")] = 0.0,
    controls: Annotated[int, typer.Option(help="Sets of other heads to compare with on some records.")] = 2,
    context: Annotated[int | None, typer.Option(help="Tokens read at once (default: what the model allows).")] = None,
    batch_tokens: Annotated[int, typer.Option(help="Tokens of a batch.")] = 4096,
    floor: Annotated[int, typer.Option(help="Records with fewer tokens are scored and not ranked.")] = 64,
    engine: Annotated[str, typer.Option(help="local, or ray for many machines.")] = "local",
    workers: Annotated[int, typer.Option(help="Ray: workers.")] = 2,
    threads: Annotated[int | None, typer.Option(help="CPUs of a worker (default: all, and one each for Ray).")] = None,
    address: Annotated[str | None, typer.Option(help="Ray: address of a cluster (default: start one here).")] = None,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    write: Annotated[str, typer.Option(help="jsonl, parquet, or auto (as the corpus is).")] = "auto",
    seed: Annotated[int, typer.Option(help="Seed of look-ups and controls.")] = 0,
    out: Annotated[
        Path, typer.Option(help="Folder for the scores, the selected records, select.html and select.json.")
    ] = Path("select-out"),
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON and nothing else.")] = False,
    trust_remote_code: Annotated[bool, typer.Option(help="Let a hub model run its own code.")] = False,
) -> None:
    """Keep the texts of a corpus that need a model's retrieval heads most; goes on where it was ended."""
    from headway.select.command import run

    run(
        corpus,
        model,
        share=share,
        text_field=text_field,
        domain_field=domain_field,
        id_field=id_field,
        split=split,
        bad_rows=bad_rows,
        dedup=dedup,
        heads=heads,
        probes=probes,
        probe_tokens=probe_tokens,
        threshold=threshold,
        repetition_weight=repetition_weight,
        controls=controls,
        context=context,
        batch_tokens=batch_tokens,
        floor=floor,
        engine=engine,
        workers=workers,
        threads=threads,
        address=address,
        dtype=dtype,
        device=device,
        write=write,
        seed=seed,
        out=out,
        as_json=json,
        trust_remote_code=trust_remote_code,
    )
