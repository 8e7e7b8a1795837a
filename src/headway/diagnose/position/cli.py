"""The command line of `headway diagnose position`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def position(
    model: Annotated[str, typer.Argument(help="minilm, a hub id, or a folder with an encoder.")] = "minilm",
    data: Annotated[
        Path | None, typer.Option(help="Folder with queries, corpus and qrels, or a tree of such folders.")
    ] = None,
    corpus: Annotated[Path | None, typer.Option(help="The same tree in another language, for its documents.")] = None,
    documents: Annotated[
        Path | None, typer.Option(help="Your own texts: a folder, or JSONL with _id and text; questions are made.")
    ] = None,
    count: Annotated[int, typer.Option(help="Documents to make where neither --data nor --documents is given.")] = 300,
    questions: Annotated[int, typer.Option(help="Questions for each document that is made or read.")] = 2,
    sentence_transformers: Annotated[
        bool, typer.Option("--sentence-transformers", help="Load MODEL with sentence-transformers, with its pooling.")
    ] = False,
    pooling: Annotated[str, typer.Option(help="mean, cls or last.")] = "mean",
    query_prefix: Annotated[str, typer.Option(help="Text before each query.")] = "",
    document_prefix: Annotated[str, typer.Option(help="Text before each document.")] = "",
    max_tokens: Annotated[int | None, typer.Option(help="What is read of a document, in tokens.")] = None,
    batch: Annotated[int, typer.Option(help="Documents that are embedded at once.")] = 16,
    edges: Annotated[str | None, typer.Option(help="Edges of the length buckets in tokens, as 512,1024,1536.")] = None,
    bins: Annotated[int, typer.Option(help="Bins of the relative position.")] = 20,
    several: Annotated[str, typer.Option(help="Queries with several positives: error, first or best.")] = "error",
    resamples: Annotated[int, typer.Option(help="Shuffles behind each null and interval.")] = 1000,
    moved: Annotated[int, typer.Option(help="Documents whose answer is moved to ten places; 0 for none.")] = 12,
    saliency: Annotated[int, typer.Option(help="Documents for gradient saliency; 0 for none.")] = 16,
    saliency_batch: Annotated[int, typer.Option(help="Documents that gradients are taken of at once.")] = 4,
    least_tokens: Annotated[
        int | None, typer.Option(help="Shortest document for saliency (default: the second edge).")
    ] = None,
    bm25: Annotated[bool, typer.Option(help="BM25 on the same queries.")] = True,
    bad_rows: Annotated[str, typer.Option(help="Rows that cannot be used: refuse or skip.")] = "refuse",
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    seed: Annotated[int, typer.Option(help="Seed of everything that is drawn.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder for position.html, .json, .csv and finished parts.")] = Path(
        "position-out"
    ),
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON and nothing else.")] = False,
    trust_remote_code: Annotated[bool, typer.Option(help="Let a hub model run its own code.")] = False,
) -> None:
    """Find out whether a retriever misses answers that stand late in their documents, beyond what chance gives."""
    from headway.diagnose.position.command import run

    run(
        model,
        data=data,
        corpus=corpus,
        documents=documents,
        count=count,
        questions=questions,
        sentence_transformers=sentence_transformers,
        pooling=pooling,
        query_prefix=query_prefix,
        document_prefix=document_prefix,
        max_tokens=max_tokens,
        batch=batch,
        edges=edges,
        bins=bins,
        several=several,
        resamples=resamples,
        moved=moved,
        saliency=saliency,
        saliency_batch=saliency_batch,
        least_tokens=least_tokens,
        bm25=bm25,
        bad_rows=bad_rows,
        dtype=dtype,
        seed=seed,
        out=out,
        as_json=json,
        trust_remote_code=trust_remote_code,
    )
