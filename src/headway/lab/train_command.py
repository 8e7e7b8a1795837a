"""What `headway train lm`, `headway train vit` and `headway data tokenize` do: check, build, train, save, print."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from headway.errors import ArgumentError, HeadwayError, unknown
from headway.files import write_atomically
from headway.hosts.convert import quiet_bars
from headway.lab.train_data import LanguageData, language_data, parse_value
from headway.pages.console import check_folder, progress_bar
from headway.progress import Tell
from headway.train import Trained, train
from headway.train.losses import LossFunction, classification_loss
from headway.train.optimizers import OPTIMIZERS, make_optimizer
from headway.train.tokenizing import tokenize_folder

RESULT = "train.json"
#: Validations and checkpoints of a run when nothing else is said.
PARTS = 10


@dataclass(frozen=True, kw_only=True)
class Course:
    """How a model is trained: what `headway train lm` and `headway train vit` have in common."""

    steps: int
    batch: int
    optimizer: str
    learning_rate: float
    weight_decay: float
    warmup: int | None
    schedule: str
    clip: float
    accumulate: int
    dtype: str
    seed: int
    validate_every: int | None
    checkpoint_every: int | None
    keep: int
    compile: bool
    resume: bool
    out: Path
    as_json: bool


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What a model is made of."""

    mixer: str
    normalizer: str | None
    options: Sequence[str]
    width: int
    layers: int
    heads: int
    mlp: str
    norm: str


def train_lm(shape: Shape, course: Course, *, data: str, tokenizer: str, tokens: int) -> None:
    """The command. The mixer is checked before texts are read, everything before the first step."""
    parts = model_parts(shape)
    _prepare(course)
    with _bar(course) as tell:
        found = language_data(
            data,
            length=tokens,
            rows=course.batch,
            seed=course.seed,
            tokenizer=tokenizer,
            folder=course.out / "data",
            tell=tell,
        )
        model = _build(lambda: _model_for(found, parts), course.seed)
        trained = _train(model, found.stream, found.loss, found.validation, course, tell)
        _save(model, course, found.tokenizer)
    _tell_result(
        shape,
        course,
        model,
        trained,
        data=found.about,
        kind="tokens" if found.numbers is None else "sequences",
        chance=found.chance,
        looks=found.tokenizer is not None,
    )


def _model_for(data: LanguageData, parts: dict[str, Any]) -> nn.Module:
    from headway.models import HeadwayConfig, HeadwayForCausalLM, HeadwayRegression, HeadwayRegressionConfig

    if data.numbers is not None:
        inputs, outputs = data.numbers
        return HeadwayRegression(HeadwayRegressionConfig(inputs=inputs, outputs=outputs, **parts))
    config = HeadwayConfig(
        vocab_size=data.vocabulary,
        positions=data.length,
        eos_token_id=data.separator,
        pad_token_id=getattr(data.tokenizer, "pad_token_id", None),
        **parts,
    )
    return HeadwayForCausalLM(config)


def train_vit(shape: Shape, course: Course, *, data: str, patch: int, shift: int, held_out: float) -> None:
    """The command for images."""
    from headway.models import HeadwayViT, HeadwayViTConfig, image_processor
    from headway.train.images import ImageStream, load_images

    parts = model_parts(shape)
    images = load_images(data)
    _prepare(course)
    kept, back = images.split(held_out=held_out, seed=course.seed)
    _, channels, *size = images.pixels.shape
    config = HeadwayViTConfig(
        image_size=(size[0], size[1]), patch_size=patch, num_channels=channels, classes=images.classes, **parts
    )
    processor = image_processor(config)
    model = _build(lambda: HeadwayViT(config), course.seed)
    batches = [
        {"pixel_values": back.pixels[i : i + 256], "labels": back.labels[i : i + 256]} for i in range(0, len(back), 256)
    ]
    with _bar(course) as tell:
        stream = ImageStream(kept, course.batch, seed=course.seed, shift=shift)
        trained = _train(model, stream, classification_loss, batches, course, tell)
        _save(model, course, processor)
    about = f"{data}: {len(kept):,} images, {len(back):,} held out ({images.source})"
    _tell_result(shape, course, model, trained, data=about, kind="images", chance=1 / images.classes, looks=False)


def tokenize(
    folder: Path,
    out: Path,
    *,
    tokenizer: str,
    patterns: Sequence[str],
    split: str,
    field: str,
    separator: int | None,
    shard_tokens: int,
    as_json: bool,
) -> None:
    """The command `headway data tokenize`."""
    check_folder(out)
    with progress_bar(Console(stderr=True, quiet=as_json)) as tell:
        tokens = tokenize_folder(
            folder,
            out,
            tokenizer=tokenizer,
            patterns=patterns,
            split=split,
            field=field,
            separator=separator,
            shard_tokens=shard_tokens,
            tell=tell,
        )
    header = tokens.header
    facts = {"folder": str(out), "tokens": len(tokens), "documents": tokens.documents, "shards": len(header["shards"]),
             "vocabulary": tokens.vocabulary, "tokenizer": header["tokenizer"], "dtype": header["dtype"]}  # fmt: skip
    if as_json:
        sys.stdout.write(json.dumps(facts, indent=1) + "\n")
        return
    console = Console()
    console.print(
        f"{facts['tokens']:,} tokens of {facts['documents']:,} documents in [bold]{out}[/] ({facts['shards']} shards, "
        f"{facts['dtype']}, {facts['tokenizer']})",
        soft_wrap=True,
    )
    console.print(f"Train on them: headway train lm --data {out}", soft_wrap=True)


def model_parts(shape: Shape) -> dict[str, Any]:
    """The fields of a model's config. Raises ArgumentError for names that are unknown, with the nearest ones."""
    from headway.kernels.normalizers import normalizers
    from headway.models import mixers

    known = mixers()
    names = [name.strip() for name in shape.mixer.split(",")]
    for name in names:
        if name not in known:
            raise unknown("--mixer", name, known)
    if shape.layers % len(names):
        raise ArgumentError(
            f"--mixer: got {len(names)} names for {shape.layers} layers, expected a number that divides the layers. "
            "The names repeat from layer to layer."
        )
    if shape.heads < 1 or shape.width % shape.heads:
        raise ArgumentError(f"--heads: got {shape.heads}, expected a number that divides the width {shape.width}.")
    accepted = {name: set(known[name].option_names()) for name in names}
    options: dict[str, dict[str, Any]] = {name: {} for name in names}
    given = dict(parse_option(text) for text in shape.options)
    if shape.normalizer is not None:
        if shape.normalizer not in normalizers():
            raise unknown("--normalizer", shape.normalizer, normalizers())
        given["normalizer"] = shape.normalizer
    for option, value in given.items():
        takers = [name for name in names if option in accepted[name]]
        if not takers:
            if option == "normalizer" and shape.normalizer is not None:
                able = sorted(name for name, cls in known.items() if option in cls.option_names())
                raise ArgumentError(
                    f"--normalizer: got {value!r}, expected a mixer that has one: {', '.join(able)}. {shape.mixer} has "
                    "none; leave it out."
                )
            valid = sorted(set().union(*accepted.values()))
            raise unknown("--option", option, valid, fix=f"These are those of {', '.join(dict.fromkeys(names))}.")
        for name in takers:
            options[name][option] = value
    hybrid = len(set(names)) > 1
    return {
        "width": shape.width,
        "layers": shape.layers,
        "heads": shape.heads,
        "mixer": names * (shape.layers // len(names)) if hybrid else names[0],
        "mixer_options": options if hybrid else options[names[0]],
        "mlp": shape.mlp,
        "norm": shape.norm,
    }


def parse_option(text: str) -> tuple[str, Any]:
    """An option of a mixer from text such as "window=64"; the value is JSON where it is some."""
    name, equals, value = text.partition("=")
    if not equals or not name.strip():
        raise ArgumentError(f"--option: got {text!r}, expected name=value, such as window=64.")
    return name.strip().replace("-", "_"), parse_value(value.strip())


def _prepare(course: Course) -> None:
    if course.batch < 1:
        raise ArgumentError(f"--batch: got {course.batch}, expected at least 1.")
    if course.optimizer not in OPTIMIZERS:
        raise unknown("--optimizer", course.optimizer, OPTIMIZERS)
    if course.learning_rate <= 0 or course.weight_decay < 0:
        raise ArgumentError(
            f"--learning-rate, --weight-decay: got {course.learning_rate}, {course.weight_decay}, expected above 0, "
            "and at least 0."
        )
    if course.out.is_dir() and (course.out / "checkpoints").is_dir() and not course.resume:
        raise ArgumentError(f"--out: {course.out} holds a run already. Go on with it with --resume, or name another.")
    check_folder(course.out)


def _build(make: Any, seed: int) -> nn.Module:
    """The untrained model; its weights depend on the seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()


def _train(model: nn.Module, stream: Any, loss: LossFunction, validation: Any, course: Course, tell: Tell) -> Trained:
    part = max(course.steps // PARTS, 1)
    try:
        return train(
            model,
            stream,
            steps=course.steps,
            loss=loss,
            optimizer=lambda made: make_optimizer(
                course.optimizer, made, learning_rate=course.learning_rate, weight_decay=course.weight_decay
            ),
            schedule=course.schedule,
            warmup=min(100, course.steps // PARTS) if course.warmup is None else course.warmup,
            clip=course.clip,
            accumulate=course.accumulate,
            dtype=course.dtype,
            seed=course.seed,
            validation=validation,
            validate_every=part if course.validate_every is None else course.validate_every,
            folder=course.out,
            checkpoint_every=part if course.checkpoint_every is None else course.checkpoint_every,
            keep=course.keep,
            resume=course.resume,
            compile=course.compile,
            accelerator="auto" if int(os.environ.get("WORLD_SIZE", "1")) > 1 else None,
            progress=tell,
        )
    except KeyboardInterrupt as interrupt:
        interrupt.add_note("Go on with the same command and --resume.")
        raise


def _save(model: Any, course: Course, processor: Any) -> None:
    """Writes the model, and beside it what prepares its input, where it has such a thing."""
    if not _first_process():
        return
    try:
        with quiet_bars():
            model.save_pretrained(course.out)
        if processor is not None:
            processor.save_pretrained(course.out)
    except OSError as error:
        raise HeadwayError(f"--out: {course.out} cannot be written ({error.strerror or error}).") from error


def _tell_result(
    shape: Shape,
    course: Course,
    model: nn.Module,
    trained: Trained,
    *,
    data: str,
    kind: str,
    chance: float | None,
    looks: bool,
) -> None:
    """Writes train.json, and prints it as JSON or as a table."""
    if not _first_process():
        return
    last = trained.rows[-1]
    judged = {name: value for name, value in last.items() if name.startswith("validation_")}
    facts: dict[str, Any] = {
        "data": data,
        "mixer": shape.mixer,
        "normalizer": shape.normalizer,
        "options": list(shape.options),
        "parameters": sum(p.numel() for p in model.parameters()),
        "steps": trained.steps,
        "resumed": trained.resumed,
        "loss": trained.loss,
        **judged,
        "chance": chance,
        kind: trained.tokens,
        "seconds": trained.seconds,
        "compiled": None if trained.compiled is None else asdict(trained.compiled),
        "seed": course.seed,
        "folder": str(course.out),
    }
    write_atomically(course.out / RESULT, json.dumps(facts, indent=1) + "\n")
    if course.as_json:
        sys.stdout.write(json.dumps(facts, indent=1) + "\n")
        return
    console = Console()
    console.print(_table(facts, kind))
    console.print(f"Model, log and checkpoints: [bold]{course.out}[/]", soft_wrap=True)
    if looks:
        console.print(f"What its heads do: headway look {course.out}", soft_wrap=True)


def _table(facts: dict[str, Any], kind: str) -> Table:
    table = Table("", "", show_header=False, title=f"{facts['mixer']}, {facts['parameters']:,} parameters")
    table.add_row("data", facts["data"])
    table.add_row("steps", f"{facts['steps']:,}" + (f" (from {facts['resumed']:,})" if facts["resumed"] else ""))
    table.add_row("loss", f"{facts['loss']:.4f}")
    if (loss := facts.get("validation_loss")) is not None:
        beside = "" if facts["chance"] else f" (perplexity {math.exp(min(loss, 99)):.3g})"
        if kind == "sequences":
            beside = f" (an answer of zero: {facts['chance']:.4f})"
        table.add_row("validation loss", f"{loss:.4f}{beside}")
    if (accuracy := facts.get("validation_accuracy")) is not None:
        beside = f" (a guess: {facts['chance']:.1%})" if facts["chance"] else ""
        table.add_row("validation accuracy", f"{accuracy:.1%}{beside}")
    table.add_row("read", f"{facts[kind]:,} {kind} in {facts['seconds']:,.0f} s")
    if facts["compiled"]:
        cut = sum(facts["compiled"]["breaks"].values())
        table.add_row("torch.compile", f"{facts['compiled']['graphs']} graphs, {cut} breaks")
    return table


def _bar(course: Course) -> Any:
    return progress_bar(Console(stderr=True, quiet=course.as_json or not _first_process()))


def _first_process() -> bool:
    return int(os.environ.get("RANK", "0")) == 0
