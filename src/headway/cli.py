"""The command line: one thin command per verb. Parse, call, print; heavy imports happen inside the commands."""

from __future__ import annotations

import _thread
import sys
import threading
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from headway.diagnose.cli import app as diagnose_app
from headway.select.cli import select

app = typer.Typer(
    name="headway",
    help="See what attention does in a real model, change it, train new kinds of it, and test what papers claim.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

train_app = typer.Typer(help="Train models of any mixer.", no_args_is_help=True)
app.add_typer(train_app, name="train")
data_app = typer.Typer(help="Prepare data for training.", no_args_is_help=True)
app.add_typer(data_app, name="data")
lab_app = typer.Typer(help="Train small models that differ in one thing, and compare them.", no_args_is_help=True)
app.add_typer(lab_app, name="lab")
app.add_typer(diagnose_app, name="diagnose")
app.command("select")(select)


class Size(StrEnum):
    smoke = "smoke"
    small = "small"
    full = "full"


def version(show: bool) -> None:
    if show:
        from headway import __version__

        typer.echo(f"headway {__version__}")
        raise typer.Exit


@app.callback()
def root(
    _: Annotated[bool, typer.Option("--version", callback=version, is_eager=True, help="Print the version.")] = False,
) -> None:
    """Options that come before the verb."""


@app.command()
def look(
    model: Annotated[str, typer.Argument(help="smollm2, minilm, a hub id, or a folder with a model.")] = "smollm2",
    text: Annotated[
        str | None, typer.Option(help="Text file, or - for standard input; a built-in text by default.")
    ] = None,
    encoding: Annotated[str, typer.Option(help="Encoding of the text.")] = "utf-8",
    tokens: Annotated[
        int | None, typer.Option(help="How many tokens to read (default 2048, or what the model allows).")
    ] = None,
    rows: Annotated[
        int | None, typer.Option(help="Query rows to sample on long inputs (default: all up to 8192 tokens).")
    ] = None,
    layers: Annotated[str | None, typer.Option(help="Layers to report, such as 0,4-7 (default: all).")] = None,
    heads: Annotated[str | None, typer.Option(help="Heads for the inspector, such as 3.7,12.0 (layer.head).")] = None,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    seed: Annotated[int, typer.Option(help="Seed of the generated tasks and samples.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder for look.html and look.json.")] = Path("look-out"),
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON and nothing else.")] = False,
    allow_longer: Annotated[bool, typer.Option(help="Read more tokens than the model has positions for.")] = False,
    trust_remote_code: Annotated[bool, typer.Option(help="Let a hub model run its own code.")] = False,
) -> None:
    """Read what every attention head of a model does, and write one report."""
    from headway.look.command import run

    run(
        model,
        text=text,
        encoding=encoding,
        tokens=tokens,
        rows=rows,
        layers=layers,
        heads=heads,
        dtype=dtype,
        seed=seed,
        out=out,
        as_json=json,
        allow_longer=allow_longer,
        trust_remote_code=trust_remote_code,
    )


@app.command()
def compare(
    model: Annotated[str, typer.Argument(help="smollm2, a hub id, or a folder with a model.")] = "smollm2",
    text: Annotated[
        str | None, typer.Option(help="Text file, or - for standard input; a built-in text by default.")
    ] = None,
    encoding: Annotated[str, typer.Option(help="Encoding of the text.")] = "utf-8",
    methods: Annotated[
        str,
        typer.Option(
            "--methods",
            "--method",
            help="Slugs of `headway papers`, or window, sinks-window, random-blocks; with commas.",
        ),
    ] = "streaming-llm,flexprefill,sinks-window,random-blocks",
    budgets: Annotated[
        str, typer.Option("--budgets", "--budget", help="Shares of the keys, such as 0.5,0.25.")
    ] = "0.5,0.25,0.125",
    tasks: Annotated[
        str,
        typer.Option(
            "--tasks",
            "--task",
            help="Of perplexity, streaming, passkey, needle, recall, turns, choice, agreement, fidelity, ruler, or one "
            "of its thirteen such as niah_single_1; with commas.",
        ),
    ] = "perplexity,needle",
    tokens: Annotated[
        int | None, typer.Option(help="Length of the text and of prompts (default 1024, or what the model allows).")
    ] = None,
    count: Annotated[int, typer.Option(help="Samples of each task.")] = 6,
    modes: Annotated[str, typer.Option(help="Question-blind, question-aware, or both.")] = "blind,aware",
    chat: Annotated[
        bool, typer.Option("--chat", help="Ask in the model's chat template, as instruction-tuned models want it.")
    ] = False,
    chunk: Annotated[int | None, typer.Option(help="Prefill so many tokens at once (default: whole prompts).")] = None,
    repeats: Annotated[int, typer.Option(help="Pairs of timed runs, method beside dense.")] = 5,
    new_tokens: Annotated[int, typer.Option(help="Tokens decoded in a timed run.")] = 16,
    tolerance: Annotated[float, typer.Option(help="Loss of quality that a recommended point may have.")] = 0.05,
    save: Annotated[str, typer.Option(help="What to save: time, memory, or auto.")] = "auto",
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    seed: Annotated[int, typer.Option(help="Seed of the generated tasks.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder for compare.html, compare.json and finished cells.")] = Path(
        "compare-out"
    ),
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON and nothing else.")] = False,
    trust_remote_code: Annotated[bool, typer.Option(help="Let a hub model run its own code.")] = False,
) -> None:
    """Run methods beside dense attention: quality, time, memory and density at several budgets, and which to use."""
    from headway.compare.command import run

    run(
        model,
        text=text,
        encoding=encoding,
        methods=methods,
        budgets=budgets,
        tasks=tasks,
        modes=modes,
        tolerance=tolerance,
        dtype=dtype,
        out=out,
        as_json=json,
        trust_remote_code=trust_remote_code,
        tokens=tokens,
        count=count,
        chunk=chunk,
        chat=chat,
        repeats=repeats,
        new_tokens=new_tokens,
        save=save,
        seed=seed,
    )


@app.command()
def prove(
    slug: Annotated[str, typer.Argument(help="Which paper, such as sink-emergence; `headway papers` lists them.")],
    size: Annotated[
        Size, typer.Option(help="smoke (seconds), small (minutes on two cores), full (the paper's setting).")
    ] = Size.small,
    seed: Annotated[int, typer.Option(help="Seed of the run.")] = 0,
    record: Annotated[bool, typer.Option("--record", help="Store the result under evidence/.")] = False,
    resume: Annotated[Path | None, typer.Option(help="Go on with an interrupted run (its folder).")] = None,
    out: Annotated[Path, typer.Option(help="Where runs are written.")] = Path("runs"),
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON and nothing else.")] = False,
) -> None:
    """Re-measure one paper's claims here, and give verdicts from numbers."""
    from headway.evidence.command import prove as run

    run(slug, size=size.value, seed=seed, record=record, resume=resume, out=out, as_json=json)


@app.command()
def evidence() -> None:
    """Write EVIDENCE.md and docs/evidence.html from the recorded results."""
    from headway.evidence.command import write

    write()


@app.command()
def papers(
    word: Annotated[
        str | None, typer.Argument(help="Only papers whose title, family or summary has this word.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """List the methods that are implemented, from their cards."""
    from dataclasses import asdict
    from json import dumps

    from rich.console import Console
    from rich.table import Table

    from headway.card import catalogue

    cards = [c for c in catalogue().values() if word is None or word.lower() in str(asdict(c)).lower()]
    if json:
        typer.echo(dumps([asdict(c) for c in cards], indent=2))
        return
    if not cards:
        typer.echo(f"no method mentions {word!r}; `headway papers` lists them all", err=True)
        raise typer.Exit(1)
    table = Table("slug", "family", "year", "paper", "what it is for")
    for card in cards:
        table.add_row(card.slug, card.family, str(card.year), f"{card.title} (arXiv {card.arxiv})", card.summary)
    Console().print(table)


@app.command()
def plan(
    model: Annotated[
        str | None, typer.Argument(help="A built-in shape such as llama-3.1-70b, a hub id, or a folder with a config.")
    ] = None,
    tokens: Annotated[
        str | None,
        typer.Option(
            "--tokens",
            "--context",
            help="Length of the prompt: 4096, 128k, 1M, 128Ki (default 128Ki; 1024 with --check).",
        ),
    ] = None,
    methods: Annotated[
        str, typer.Option("--methods", "--method", help="Slugs of `headway papers`; with commas.")
    ] = "streaming-llm",
    budgets: Annotated[
        str, typer.Option("--budgets", "--budget", help="Shares of the keys, such as 0.25,0.1.")
    ] = "0.25",
    hardware: Annotated[str | None, typer.Option(help="h100, a100 or cpu (default h100).")] = None,
    devices: Annotated[
        int | None, typer.Option(help="How many share the work (default: as many as dense attention needs).")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16, float16 or float8 (default bfloat16; float32 with --check).")
    ] = None,
    batch: Annotated[int, typer.Option(help="Sequences at once.")] = 1,
    layers: Annotated[int | None, typer.Option(help="Layers, for a Llama-like model of your own.")] = None,
    hidden: Annotated[int | None, typer.Option(help="Its width.")] = None,
    heads: Annotated[int | None, typer.Option(help="Its query heads.")] = None,
    kv_heads: Annotated[int | None, typer.Option(help="Its key-value heads (default: as many).")] = None,
    head_dim: Annotated[int | None, typer.Option(help="Width of a head (default: hidden / heads).")] = None,
    intermediate: Annotated[int | None, typer.Option(help="Width of its MLP (default: 8/3 of hidden).")] = None,
    vocabulary: Annotated[int | None, typer.Option(help="Its vocabulary (default 128,256).")] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Measure here too: smollm2, or a model that runs here.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON and nothing else.")] = False,
) -> None:
    """Predict memory and time of methods on a model at a length, without its weights."""
    from headway.plan.command import run

    sizes = {
        "layers": layers, "hidden": hidden, "heads": heads, "kv_heads": kv_heads, "head_dim": head_dim,
        "intermediate": intermediate, "vocabulary": vocabulary,
    }  # fmt: skip
    run(
        model,
        tokens=tokens,
        methods=methods,
        budgets=budgets,
        hardware=hardware,
        devices=devices,
        dtype=dtype,
        batch=batch,
        sizes=sizes,
        measure=check,
        as_json=json,
    )


@app.command()
def doctor(
    model: Annotated[str | None, typer.Argument(help="Also show what the door can do in this model.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """Tell what works on this machine and why not; with a model, list its attention sites."""
    from headway.look.doctor import run

    run(model, as_json=json)


# Options that `headway train lm` and `headway train vit` share.
Normalizer = Annotated[
    str | None, typer.Option("--normalizer", help="What softmax or diffqkv do to their logits, such as softpick.")
]
Width = Annotated[int, typer.Option(help="Width of the model.")]
Layers = Annotated[int, typer.Option(help="Its layers.")]
Heads = Annotated[int, typer.Option(help="Its heads.")]
Mlp = Annotated[str, typer.Option(help="swiglu, geglu, reglu, sglu, gelu, relu, swish or none.")]
Norm = Annotated[str, typer.Option(help="rms, srms, layer or single_scale.")]
Steps = Annotated[int, typer.Option(help="Optimiser steps.")]
Optimizer = Annotated[str, typer.Option(help="adamw, orthoadam or muon.")]
LearningRate = Annotated[float, typer.Option(help="Peak learning rate.")]
WeightDecay = Annotated[float, typer.Option(help="Of matrices; norms and biases do not decay.")]
Warmup = Annotated[int | None, typer.Option(help="Steps of warm-up (default: a tenth, at most 100).")]
Schedule = Annotated[str, typer.Option(help="cosine, wsd, linear or constant.")]
Clip = Annotated[float, typer.Option(help="Largest norm of the gradient.")]
Accumulate = Annotated[int, typer.Option(help="Batches per step.")]
Dtype = Annotated[str, typer.Option(help="float32, or bfloat16 for autocast.")]
Seed = Annotated[int, typer.Option(help="Seed of weights, data and dropout.")]
ValidateEvery = Annotated[int | None, typer.Option(help="Steps between validations (default: a tenth).")]
CheckpointEvery = Annotated[int | None, typer.Option(help="Steps between checkpoints (default: a tenth).")]
Keep = Annotated[int, typer.Option(help="How many checkpoints stay.")]
Compile = Annotated[bool, typer.Option("--compile", help="Through torch.compile; reported.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on where the run in --out was ended.")]
Out = Annotated[Path, typer.Option(help="Folder for model, log and checkpoints.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON and nothing else.")]


@train_app.command("lm")
def train_lm(
    mixer: Annotated[
        str, typer.Option(help="Name of a mixer, or several with commas, which repeat from layer to layer.")
    ] = "softmax",
    normalizer: Normalizer = None,
    option: Annotated[
        list[str] | None, typer.Option("--option", help="Further options of the mixer: window=64. Repeatable.")
    ] = None,
    data: Annotated[
        str,
        typer.Option(
            help="default (a built-in text), a folder of `headway data tokenize`, a text file or folder, or a "
            "generated task: recall, key-value, copy, state, piecewise-regression; with settings: "
            "recall:pairs=4,gap=64."
        ),
    ] = "default",
    tokenizer: Annotated[str, typer.Option(help="For texts: bytes, a folder, a hub id, or smollm2.")] = "bytes",
    tokens: Annotated[int, typer.Option(help="Length of a row.")] = 256,
    width: Width = 128,
    layers: Layers = 4,
    heads: Heads = 4,
    mlp: Mlp = "swiglu",
    norm: Norm = "rms",
    steps: Steps = 500,
    batch: Annotated[int, typer.Option(help="Rows of a batch.")] = 16,
    optimizer: Optimizer = "adamw",
    learning_rate: LearningRate = 1e-3,
    weight_decay: WeightDecay = 0.1,
    warmup: Warmup = None,
    schedule: Schedule = "cosine",
    clip: Clip = 1.0,
    accumulate: Accumulate = 1,
    dtype: Dtype = "float32",
    seed: Seed = 0,
    validate_every: ValidateEvery = None,
    checkpoint_every: CheckpointEvery = None,
    keep: Keep = 2,
    compile: Compile = False,
    resume: Resume = False,
    out: Out = Path("train-out"),
    json: Json = False,
) -> None:
    """Train a causal language model of any mixer; `headway look OUT` then reads it."""
    from headway.lab.train_command import Course, Shape
    from headway.lab.train_command import train_lm as run

    shape = Shape(
        mixer=mixer, normalizer=normalizer, options=option or [], width=width, layers=layers, heads=heads, mlp=mlp,
        norm=norm,
    )  # fmt: skip
    course = Course(
        steps=steps, batch=batch, optimizer=optimizer, learning_rate=learning_rate, weight_decay=weight_decay,
        warmup=warmup, schedule=schedule, clip=clip, accumulate=accumulate, dtype=dtype, seed=seed,
        validate_every=validate_every,
        checkpoint_every=checkpoint_every, keep=keep, compile=compile, resume=resume, out=out, as_json=json,
    )  # fmt: skip
    run(shape, course, data=data, tokenizer=tokenizer, tokens=tokens)


@train_app.command("vit")
def train_vit(
    mixer: Annotated[
        str, typer.Option(help="Name of a mixer that reads both ways, or several with commas.")
    ] = "softmax",
    normalizer: Normalizer = None,
    option: Annotated[
        list[str] | None, typer.Option("--option", help="Further options of the mixer: name=value. Repeatable.")
    ] = None,
    data: Annotated[str, typer.Option(help="digits or mnist-5k.")] = "digits",
    patch: Annotated[int, typer.Option(help="Pixels of a side of a patch.")] = 1,
    shift: Annotated[int, typer.Option(help="Move images by up to so many pixels at random.")] = 0,
    held_out: Annotated[float, typer.Option(help="Share of the images for validation.")] = 0.25,
    width: Width = 32,
    layers: Layers = 2,
    heads: Heads = 4,
    mlp: Mlp = "gelu",
    norm: Norm = "layer",
    steps: Steps = 300,
    batch: Annotated[int, typer.Option(help="Images of a batch.")] = 64,
    optimizer: Optimizer = "adamw",
    learning_rate: LearningRate = 3e-3,
    weight_decay: WeightDecay = 0.05,
    warmup: Warmup = None,
    schedule: Schedule = "cosine",
    clip: Clip = 5.0,
    accumulate: Accumulate = 1,
    dtype: Dtype = "float32",
    seed: Seed = 0,
    validate_every: ValidateEvery = None,
    checkpoint_every: CheckpointEvery = None,
    keep: Keep = 2,
    compile: Compile = False,
    resume: Resume = False,
    out: Out = Path("train-out"),
    json: Json = False,
) -> None:
    """Train an image classifier of any mixer that reads both ways."""
    from headway.lab.train_command import Course, Shape
    from headway.lab.train_command import train_vit as run

    shape = Shape(
        mixer=mixer, normalizer=normalizer, options=option or [], width=width, layers=layers, heads=heads, mlp=mlp,
        norm=norm,
    )  # fmt: skip
    course = Course(
        steps=steps, batch=batch, optimizer=optimizer, learning_rate=learning_rate, weight_decay=weight_decay,
        warmup=warmup, schedule=schedule, clip=clip, accumulate=accumulate, dtype=dtype, seed=seed,
        validate_every=validate_every,
        checkpoint_every=checkpoint_every, keep=keep, compile=compile, resume=resume, out=out, as_json=json,
    )  # fmt: skip
    run(shape, course, data=data, patch=patch, shift=shift, held_out=held_out)


@data_app.command("tokenize")
def tokenize(
    folder: Annotated[Path, typer.Argument(help="A folder of texts, or one file: .txt, .md, .jsonl.")],
    out: Annotated[Path, typer.Option(help="Folder for the token files.")] = Path("tokens"),
    tokenizer: Annotated[str, typer.Option(help="bytes (no download), a folder, a hub id, or smollm2.")] = "bytes",
    pattern: Annotated[
        list[str] | None, typer.Option("--pattern", help="Which files, such as '**/*.py'. Repeatable.")
    ] = None,
    split: Annotated[str, typer.Option(help="What is a document: file, line or paragraph.")] = "file",
    field: Annotated[str, typer.Option(help="Where .jsonl files have their text.")] = "text",
    separator: Annotated[
        int | None, typer.Option(help="Id behind each document (default: the tokenizer's end of text).")
    ] = None,
    shard_tokens: Annotated[int, typer.Option(help="Tokens of a shard.")] = 2**25,
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON and nothing else.")] = False,
) -> None:
    """Write the token files of a folder of texts; goes on where it was ended."""
    from headway.lab.train_command import tokenize as run
    from headway.train.tokenizing import PATTERNS

    run(
        folder,
        out,
        tokenizer=tokenizer,
        patterns=pattern or PATTERNS,
        split=split,
        field=field,
        separator=separator,
        shard_tokens=shard_tokens,
        as_json=json,
    )


@lab_app.command("sinks")
def lab_sinks(
    arms: Annotated[
        str | None, typer.Argument(help="A YAML file of arms, or the name of a shipped experiment; none lists those.")
    ] = None,
    text: Annotated[
        str | None, typer.Option(help="Text file, or - for standard input; a built-in text by default.")
    ] = None,
    encoding: Annotated[str, typer.Option(help="Encoding of the text.")] = "utf-8",
    steps: Annotated[
        int | None, typer.Option(help="Training steps of every arm, in place of those of the file.")
    ] = None,
    seeds: Annotated[str | None, typer.Option(help="Seeds with commas, in place of those of the file.")] = None,
    evaluation: Annotated[int, typer.Option(help="Held-out sequences that every arm is measured on.")] = 64,
    out: Annotated[Path, typer.Option(help="Folder for sinks.html, sinks.json and finished arms.")] = Path("lab-out"),
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON and nothing else.")] = False,
) -> None:
    """Train the arms of an experiment and compare their attention sinks; goes on where it was ended."""
    from headway.lab.command import sinks as run

    run(arms, text=text, encoding=encoding, steps=steps, seeds=seeds, evaluation=evaluation, out=out, as_json=json)


def main() -> Any:
    """Runs the command; errors made on purpose print one line and exit with 1, an interrupt with 130."""
    from headway.errors import HeadwayError

    sys.unraisablehook = _give_again
    try:
        return app()
    except HeadwayError as error:
        typer.secho(f"headway: {error}", fg="red", err=True)
        _print_notes(error)
        sys.exit(1)
    except SystemExit as done:
        interrupt = _interrupt_behind(done)
        if interrupt is not None:
            typer.secho("headway: interrupted; nothing half-written was left behind", fg="yellow", err=True)
            _print_notes(interrupt)
        raise


def _give_again(lost: Any) -> None:
    """Ctrl-C that arrives inside a finaliser raises where nothing can catch it, and Python drops it with a warning.
    It is given again a moment later, when the finaliser is over."""
    if lost.exc_type is not None and issubclass(lost.exc_type, KeyboardInterrupt):
        threading.Timer(0.05, _thread.interrupt_main).start()
    else:
        sys.__unraisablehook__(lost)


def _interrupt_behind(error: BaseException | None) -> KeyboardInterrupt | None:
    """The interrupt that typer turned into an exit code."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error


def _print_notes(error: BaseException) -> None:
    """What an error carries along, such as the command that resumes a run."""
    for note in getattr(error, "__notes__", ()):
        typer.echo(note, err=True)


if __name__ == "__main__":
    main()
