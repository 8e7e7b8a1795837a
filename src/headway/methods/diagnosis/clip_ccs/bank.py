"""A bank of texts that heads are described with, embedded by the text tower of the model that is described."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from headway.errors import ArgumentError
from headway.hosts.fingerprint import Fingerprint, check_fingerprint, fingerprint
from headway.methods.diagnosis.clip_ccs.textspan import check_texts
from headway.methods.diagnosis.clip_ccs.towers import Tower

#: Turns texts into what a text tower reads.
Tokenise = Callable[[Sequence[str]], dict[str, Tensor]]


@dataclass(frozen=True)
class TextBank:
    """Texts with their unit embeddings, the concept of each where that is known, and the model that embedded them."""

    texts: tuple[str, ...]
    vectors: Float[Tensor, "texts joint"]
    concepts: Mapping[str, str] | None
    made_by: Fingerprint

    def __len__(self) -> int:
        return len(self.texts)

    def check(self, model: nn.Module) -> None:
        """Raises HostError when another model, or another checkpoint of it, embedded the bank."""
        check_fingerprint(self.made_by, model, "bank")


@torch.no_grad()
def embed_bank(
    part: Tower,
    tokenise: Tokenise,
    texts: Sequence[str],
    *,
    concepts: Mapping[str, str] | None = None,
    batch: int = 256,
) -> TextBank:
    """Embeds the texts in batches. Raises ArgumentError for empty or repeated texts and for an image tower."""
    if part.kind != "text":
        raise ArgumentError("part: got an image tower, expected the text tower of the model: tower(model, 'text').")
    kept = check_texts(texts)
    if concepts is not None and set(concepts) - set(kept):
        stray = sorted(set(concepts) - set(kept))[0]
        raise ArgumentError(
            f"concepts: got one for {stray!r}, which is not among the texts. Give concepts of the bank."
        )
    vectors = [
        nn.functional.normalize(part.embed(tokenise(kept[i : i + batch])).float(), dim=-1)
        for i in range(0, len(kept), batch)
    ]
    return TextBank(tuple(kept), torch.cat(vectors), concepts, fingerprint(part.model))


def tokeniser_of(processor: Any, *, longest: int | None = None) -> Tokenise:
    """The tokeniser of a CLIP processor (or a tokenizer itself) as a function of texts; long texts are cut."""
    reader = getattr(processor, "tokenizer", processor)

    def tokenise(texts: Sequence[str]) -> dict[str, Tensor]:
        made = reader(list(texts), padding=True, truncation=True, max_length=longest, return_tensors="pt")
        return {"input_ids": made["input_ids"], "attention_mask": made["attention_mask"]}

    return tokenise
