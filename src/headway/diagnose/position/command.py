"""What `headway diagnose position` does: get queries and a model, measure, write the page, print the headline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console

from headway.diagnose.position.analysing import Options, diagnose_position
from headway.diagnose.position.sources import default_set, read_documents
from headway.errors import ArgumentError, HostError, unknown
from headway.hosts import load
from headway.hosts.rows import check_policy
from headway.methods.diagnosis.posir import (
    RetrievalSet,
    TransformersEncoder,
    count_tokens,
    load_sentence_transformer,
    read_sets,
    write_set,
)
from headway.methods.diagnosis.posir.encoders import LEAST_TOKENS, POOLINGS
from headway.pages.console import check_folder, deliver, going_on, progress_bar
from headway.progress import Tell


def run(
    model: str,
    *,
    data: Path | None = None,
    corpus: Path | None = None,
    documents: Path | None = None,
    count: int = 300,
    questions: int = 2,
    sentence_transformers: bool = False,
    pooling: str = "mean",
    query_prefix: str = "",
    document_prefix: str = "",
    max_tokens: int | None = None,
    batch: int = 16,
    edges: str | None = None,
    bins: int = 20,
    several: str = "error",
    resamples: int = 1000,
    moved: int = 12,
    saliency: int = 16,
    saliency_batch: int = 4,
    least_tokens: int | None = None,
    bm25: bool = True,
    bad_rows: str = "refuse",
    dtype: str = "float32",
    seed: int = 0,
    out: Path = Path("position-out"),
    as_json: bool = False,
    trust_remote_code: bool = False,
) -> None:
    """The command. Arguments are checked before the model is loaded. Embeddings and gradients are kept in `out` as they
    come; the page, its numbers and the queries are written last."""
    if data is not None and documents is not None:
        raise ArgumentError("--data, --documents: got both, expected one of them. --data has questions already.")
    if corpus is not None and data is None:
        raise ArgumentError(
            "--corpus: got it without --data, expected both: queries of one language, texts of another."
        )
    check_policy(bad_rows, "--bad-rows")
    if pooling not in POOLINGS:
        raise unknown("--pooling", pooling, POOLINGS)
    if count < 1 or questions < 1 or batch < 1:
        raise ArgumentError(f"--count, --questions, --batch: got {count}, {questions} and {batch}, expected 1 or more.")
    if max_tokens is not None and max_tokens < LEAST_TOKENS:
        raise ArgumentError(f"--max-tokens: got {max_tokens}, expected {LEAST_TOKENS} or more.")
    options = Options(
        edges=None if edges is None else _edges(edges),
        bins=bins,
        several=several,
        resamples=resamples,
        moved=moved,
        saliency=saliency,
        batch=saliency_batch,
        least_tokens=least_tokens,
        seed=seed,
    )
    sets = None if data is None else read_sets(data, corpus=corpus, bad_rows=bad_rows)
    check_folder(out)
    with going_on(out / "parts"), progress_bar(Console(stderr=True)) as tell:
        tell(f"loading {model}", 0, 1)
        encoder: Any
        if sentence_transformers:
            encoder = load_sentence_transformer(
                model, max_tokens=max_tokens, batch=batch, trust_remote_code=trust_remote_code
            )
        else:
            host, tokenizer = load(model, dtype=dtype, trust_remote_code=trust_remote_code)
            encoder = TransformersEncoder(
                model=_encoder(host, model), tokenizer=tokenizer, pooling=pooling, query_prefix=query_prefix,
                document_prefix=document_prefix, max_tokens=max_tokens, batch=batch, name=model,
            )  # fmt: skip
        if sets is None:
            sets = [_made(documents, encoder, count, questions, bad_rows, seed, out, tell)]
        sets = [
            one if all(q.tokens for q in one.queries) else count_tokens(one, encoder.tokenizer, name=encoder.name)
            for one in sets
        ]
        found = diagnose_position(
            sets, encoder, baselines=None if bm25 else (), options=options, out=out, name=model, progress=tell
        )
    queries = found.save(out / "position.csv")
    deliver(found, out, "position", as_json=as_json, places=[f"Queries: {queries}"])


def _made(
    documents: Path | None,
    encoder: Any,
    count: int,
    questions: int,
    bad_rows: str,
    seed: int,
    out: Path,
    tell: Tell,
) -> RetrievalSet:
    """A set with questions of our own, kept in the public layout so that it can be read, mended and used again."""
    tell("making questions", 0, 1)
    if documents is None:
        made = default_set(
            encoder.tokenizer, encoder.max_tokens, count=count, questions=questions, seed=seed, name=encoder.name
        )
    else:
        made = read_documents(
            documents, encoder.tokenizer, questions=questions, bad_rows=bad_rows, seed=seed, name=encoder.name
        )
    write_set(made, out / "set")
    return made


def _encoder(host: Any, name: str) -> Any:
    """The text encoder of a host: a causal language model without its output layer. Raises HostError for one that does
    not read text."""
    inner = host.base_model if hasattr(host, "lm_head") else host
    if not callable(getattr(inner, "get_input_embeddings", None)) or hasattr(inner.config, "image_size"):
        raise HostError(f"model {name!r}: {type(host).__name__} is no text encoder; choose one, such as minilm.")
    return inner


def _edges(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ArgumentError(f"--edges: got {text!r}, expected growing token counts, such as 512,1024,1536.") from None
