"""What `headway diagnose concepts` does: get a model, pictures and texts, audit, write the page, print the headline."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from headway.diagnose.concepts import pictures as material
from headway.diagnose.concepts.auditing import Settings, audit
from headway.diagnose.concepts.pictures import Pictures
from headway.errors import ArgumentError, HostError
from headway.hosts import load
from headway.hosts.rows import check_policy
from headway.methods.diagnosis.clip_ccs import attribute_clip, embed_bank, tiny, tokeniser_of, tower
from headway.methods.diagnosis.clip_ccs.bank import Tokenise
from headway.pages.console import check_folder, deliver, going_on, progress_bar

#: The name of the model that is trained here.
TRAINED = "attribute-clip"


@dataclass(frozen=True)
class Host:
    """A model with what prepares its inputs; `pixels` is None for the scenes' own model."""

    model: Any
    tokenise: Tokenise
    pixels: Callable[[list[Any]], Tensor] | None


def run(
    model: str = TRAINED,
    *,
    pictures: Path | None = None,
    bank: Path | None = None,
    neutral: Path | None = None,
    template: str = "a photo of a {}.",
    count: int = 400,
    layers: int = 4,
    texts: int = 5,
    rank: int = 80,
    draws: int = 5,
    top: int = 10,
    bad_rows: str = "refuse",
    seed: int = 0,
    out: Path = Path("concepts-out"),
    as_json: bool = False,
    trust_remote_code: bool = False,
) -> None:
    """The command. Arguments and texts are checked before the model is loaded. Contributions and silenced runs are kept
    in `out` as they come; the page and its numbers are written last."""
    check_policy(bad_rows, "--bad-rows")
    if count < 2:
        raise ArgumentError(f"--count: got {count}, expected two or more pictures.")
    if model != TRAINED and pictures is None:
        raise ArgumentError(
            f"--pictures: got none for {model!r}, expected a folder of pictures or a JSONL. Only {TRAINED} has its "
            "own scenes."
        )
    if model == TRAINED and pictures is not None:
        raise ArgumentError(
            f"--pictures: got {pictures} for {TRAINED}, which knows its own scenes alone; leave it out, or name "
            "another model."
        )
    if pictures is not None:
        material.check_source(pictures, template)
    settings = Settings(layers=layers, texts=texts, rank=rank, draws=draws, top=top, seed=seed)
    known, left_out = _texts(bank, model, bad_rows)
    asked = None if neutral is None else {line: [line] for line in material.read_neutral(neutral)}
    check_folder(out)
    with going_on(out / "parts"), progress_bar(Console(stderr=True)) as tell:
        tell(f"loading {model}", 0, 1)
        host = _host(model, trust_remote_code)
        given = _pictures(host, pictures, template, bad_rows, count, seed)
        if asked is not None:
            given = _with_neutral(given, asked)
        tell("embedding texts", 0, 1)
        concepts = {text: concept for text, concept in known.items() if concept is not None}
        texts_of = embed_bank(tower(host.model, "text"), host.tokenise, list(known), concepts=concepts)
        found = audit(host.model, host.tokenise, given, texts_of, settings=settings, name=model, out=out, progress=tell)
    if given.left_out or left_out:
        found.run["left_out"] = [*given.left_out, *left_out]
    if left_out:
        found.warnings.insert(0, f"{len(left_out)} texts could not be used and were left out: {left_out[0]}")
    deliver(found, out, "concepts", as_json=as_json)


def _texts(path: Path | None, model: str, bad_rows: str) -> tuple[dict[str, str | None], list[str]]:
    if path is not None:
        return material.read_bank(path, bad_rows=bad_rows)
    return dict(material.scene_bank() if model == TRAINED else material.everyday_bank()), []


def _host(name: str, trust_remote_code: bool) -> Host:
    if name == TRAINED:
        model, reader = attribute_clip()
        return Host(model, lambda texts: tiny.tokens(reader, texts), None)
    model, processor = load(name, trust_remote_code=trust_remote_code)
    for kind in ("image", "text"):
        tower(model, kind)
    if not hasattr(processor, "image_processor") or not hasattr(processor, "tokenizer"):
        raise HostError(
            f"model {name!r}: got a {type(processor).__name__} to prepare its inputs, expected one with an image "
            "processor and a tokenizer. Save a CLIPProcessor beside the model."
        )
    longest = int(model.config.text_config.max_position_embeddings)
    images = processor.image_processor

    def pixels(opened: list[Any]) -> Tensor:
        return torch.as_tensor(images(opened, return_tensors="pt")["pixel_values"])

    return Host(model, tokeniser_of(processor, longest=longest), pixels)


def _pictures(host: Host, path: Path | None, template: str, bad_rows: str, count: int, seed: int) -> Pictures:
    if path is None:
        return material.scenes(count, seed=seed + 1)
    assert host.pixels is not None
    return material.read_pictures(path, host.pixels, template=template, bad_rows=bad_rows, most=count)


def _with_neutral(given: Pictures, asked: dict[str, list[str]]) -> Pictures:
    if given.groups is None:
        raise ArgumentError(
            "--neutral: got prompts, but the pictures have no groups; give a JSONL with a 'group' in every row."
        )
    return replace(given, neutral=asked)
