"""`select`: a corpus in, its texts that need retrieval heads out. Walk, score, choose, write; each step is kept and
found again, so the same call goes on wherever an earlier one was ended."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import nn

from headway.errors import ArgumentError, unknown
from headway.hosts.facts import model_facts, versions
from headway.methods.diagnosis.attention_influence import FLOOR, InfluenceScorer
from headway.methods.diagnosis.attention_influence.detection import HeadScores
from headway.progress import Tell, silent
from headway.select.choosing import check_share, choose
from headway.select.conclusions import conclude, correlations
from headway.select.controls import measure_controls
from headway.select.finishing import FORMATS, finish
from headway.select.local import score_locally
from headway.select.on_ray import score_on_ray
from headway.select.recipe import (
    Detection,
    Head,
    InfluenceRecipe,
    describe,
    find_heads,
    load_model,
    reachable_name,
)
from headway.select.records import Reading, find_sources
from headway.select.result import CorpusSelection
from headway.select.shards import Ledger, Plan, make_plan
from headway.select.shards.work import Recipe, Scorer

ENGINES = ("local", "ray")
#: The folder in `out` that holds what a later run goes on from.
STATE = "state"


def select(
    corpus: str | Path | Sequence[str | Path],
    model: str | nn.Module = "smollm2",
    tokenizer: Any = None,
    *,
    out: str | Path,
    reading: Reading | None = None,
    bad_rows: str = "refuse",
    dedup: str = "exact",
    heads: Sequence[Head] | HeadScores | None = None,
    detection: Detection | None = None,
    share: float = 0.2,
    repetition_weight: float = 0.0,
    controls: int = 2,
    context: int | None = None,
    batch_tokens: int = 4096,
    floor: int = FLOOR,
    engine: str = "local",
    workers: int = 2,
    threads: int | None = None,
    address: str | None = None,
    dtype: str = "float32",
    device: str = "cpu",
    write: str = "auto",
    seed: int = 0,
    trust_remote_code: bool = False,
    progress: Tell = silent,
) -> CorpusSelection:
    """Scores every text of a corpus by how much masking a model's retrieval heads raises its loss, and keeps the top
    `share` of every domain.

    corpus: files and folders of .jsonl, .jsonl.gz, .parquet, .txt and .md. model: a name for `headway.load`, or a model
        beside its `tokenizer`. out: folder for `scores` and `selected`, and for the state that a later call goes on
        from.
    reading: which fields hold text, id and domain. bad_rows: "refuse" or "skip" rows that cannot be used; both list
    them. dedup: leave out "exact" copies, "near" ones too, or "none". heads: (layer, head) pairs to mask, or detected
        ones; None detects them as `detection` says. repetition_weight: how much repetition inside a text is taken off
        its score.
    controls: sets of other heads of the same layers that some records are scored with for comparison; 0 for none.
    context, batch_tokens, floor: of `InfluenceScorer`. engine: "local", or "ray" with `workers` of `threads` CPUs (and
        a GPU each for a CUDA device) at `address` (None: this machine). threads: of the local engine, torch's own by
        default.
    write: "jsonl", "parquet", or "auto" for Parquet where all of the corpus is.

    The same records come out in the same order on both engines. Raises ArgumentError, HostError and
    NoRetrievalHeadsError, each with what to do."""
    start = time.perf_counter()
    check_options(engine, write, share, repetition_weight, controls, threads, workers)
    reading, detection, out = reading or Reading(), detection or Detection(seed=seed), Path(out)
    parts = [corpus] if isinstance(corpus, str | Path) else list(corpus)
    sources, ignored = find_sources(parts, out=out)
    plan = make_plan(sources, reading, out / STATE, bad_rows=bad_rows, dedup=dedup, tell=progress)
    name = model if isinstance(model, str) else str(getattr(model, "name_or_path", "") or type(model).__name__)
    host, prepared = _host(model, tokenizer, dtype, device, trust_remote_code, progress)
    # Refuses what cannot be before heads are looked for, which takes long.
    InfluenceScorer(host, prepared, (), context=context, batch_tokens=batch_tokens, floor=floor)
    found = _heads(heads, host, prepared, detection, out, progress)
    recipe = InfluenceRecipe(
        name=reachable_name(name),
        heads=tuple(found.chosen if isinstance(found, HeadScores) else found),
        described=describe(host),
        host=None if isinstance(model, str) else (model, tokenizer),
        dtype=str(next(host.parameters()).dtype).removeprefix("torch."),
        device=str(next(host.parameters()).device),
        trust_remote_code=trust_remote_code,
        context=context,
        batch_tokens=batch_tokens,
        floor=floor,
    )
    scorer = recipe.scorer(host, prepared)
    with open_ledger(plan, recipe, out) as ledger:
        before = ledger.done
        scoring = time.perf_counter()
        score_all(plan, ledger, recipe, scorer, engine=engine, workers=workers, threads=threads, address=address,
                  gpus=float(recipe.device.startswith("cuda")), progress=progress)  # fmt: skip
        scoring = time.perf_counter() - scoring
        progress("choosing", 0, 1)
        choice = choose(ledger, ledger.path.parent, share=share, repetition_weight=repetition_weight)
        finished = finish(plan, ledger, choice, out, write=write, repetition_weight=repetition_weight, tell=progress)
        other = measure_controls(plan, ledger, recipe, host, prepared, draws=controls, seed=seed, folder=out / STATE,
                                 tell=progress)  # fmt: skip
        resumed, damaged = before, ledger.damaged
    result = CorpusSelection(
        model=model_facts(host, name),
        corpus={
            "given": [str(part) for part in parts],
            "files": len(sources),
            "rows": plan.rows,
            "scored": plan.kept,
            "megabytes": round(plan.bytes / 1e6, 3),
            "sha256": plan.sha256,
        },
        heads=[list(pair) for pair in recipe.heads],
        head_scores=found.scores.tolist() if isinstance(found, HeadScores) else [],
        domains=finished.domains,
        sample=finished.sample,
        correlations=correlations(finished.sample, seed),
        examples=finished.examples,
        controls=[vars(control) for control in other],
        left_out={**plan.left_out, "named": list(plan.named), "file": str(plan.left_out_file), "ignored": ignored},
        files=finished.files,
        run={
            "share": share,
            "repetition_weight": repetition_weight,
            "text_field": reading.text_field,
            "domain_field": reading.domain_field,
            "split": reading.split,
            "bad_rows": bad_rows,
            "dedup": dedup,
            "context": scorer.context,
            "batch_tokens": batch_tokens,
            "floor": floor,
            "engine": engine,
            "workers": workers if engine == "ray" else 1,
            "threads": threads or (1 if engine == "ray" else torch.get_num_threads()),
            "shards": plan.shards,
            "shards_found": resumed,
            "lines_damaged": damaged,
            "seed": seed,
            "probes": detection.samples if isinstance(found, HeadScores) and heads is None else "given heads",
            "seconds_scoring": round(scoring, 2),
            "seconds": round(time.perf_counter() - start, 2),
            "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
            **versions(),
            "device": recipe.device,
        },
    )
    result.findings, result.warnings = conclude(result)
    if isinstance(found, HeadScores):
        result.warnings += found.warnings()
    return result


def check_options(
    engine: str,
    write: str,
    share: float,
    repetition_weight: float,
    controls: int,
    threads: int | None,
    workers: int,
) -> None:
    """Refuses what cannot be, before any work."""
    if engine not in ENGINES:
        raise unknown("engine", engine, ENGINES)
    if write not in FORMATS:
        raise unknown("write", write, FORMATS)
    if write == "parquet":
        from headway.select.parquet import arrow

        arrow()
    check_share(share, repetition_weight)
    if controls < 0:
        raise ArgumentError(f"controls: got {controls}, expected 0 or more sets of heads.")
    if threads is not None and threads < 1:
        raise ArgumentError(f"threads: got {threads}, expected 1 or more.")
    if workers < 1:
        raise ArgumentError(f"workers: got {workers}, expected 1 or more.")


def open_ledger(plan: Plan, recipe: Recipe, out: Path) -> Ledger:
    """The ledger of a plan and a recipe in `out`: runs that differ in what scores depend on have one each."""
    settings = {"plan": plan.describe(), "scorer": recipe.settings()}
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
    return Ledger(out / STATE / f"scores-{key}" / "ledger", settings, plan.shards)


def score_all(
    plan: Plan,
    ledger: Ledger,
    recipe: Recipe,
    scorer: Scorer | None = None,
    *,
    engine: str = "local",
    workers: int = 2,
    threads: int | None = None,
    address: str | None = None,
    gpus: float = 0,
    progress: Tell = silent,
) -> None:
    """Fills the ledger. `scorer` is one that is built already, for the local engine; `gpus` are those of a worker."""
    sizes = plan.sizes()
    records = sum(size for number, size in enumerate(sizes) if number in ledger)
    progress("scoring records", records, plan.kept)

    def done(number: int) -> None:
        nonlocal records
        records += sizes[number]
        progress("scoring records", records, plan.kept)

    if ledger.done == plan.shards:
        return
    try:
        if engine == "ray":
            score_on_ray(plan, ledger, recipe, done, workers=workers, threads=threads or 1, gpus=gpus, address=address)
        else:
            _with_threads(threads, lambda: score_locally(plan, ledger, scorer or recipe.build(), done))
    except KeyboardInterrupt as error:
        error.add_note(f"Scores of {records:,} records are kept: the same command goes on from them.")
        raise


def _with_threads(threads: int | None, work: Callable[[], None]) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        work()
    finally:
        torch.set_num_threads(before)


def _host(
    model: str | nn.Module, tokenizer: Any, dtype: str, device: str, trust_remote_code: bool, tell: Tell
) -> tuple[nn.Module, Any]:
    if isinstance(model, str):
        tell(f"loading {model}", 0, 1)
        return load_model(model, dtype, device, trust_remote_code)
    if tokenizer is None:
        raise ArgumentError("tokenizer: got none beside a model, expected the model's own. Pass tokenizer=tokenizer.")
    return model, tokenizer


def _heads(
    heads: Sequence[Head] | HeadScores | None,
    model: nn.Module,
    tokenizer: Any,
    wanted: Detection,
    out: Path,
    tell: Tell,
) -> HeadScores | list[Head]:
    if heads is None:
        return find_heads(model, tokenizer, wanted, out / STATE, tell)
    if isinstance(heads, HeadScores):
        heads.check(model)
        return heads.require()
    chosen = sorted({(int(layer), int(head)) for layer, head in heads})
    if not chosen:
        raise ArgumentError("heads: got none, expected (layer, head) pairs. Leave heads out to detect them.")
    return chosen
