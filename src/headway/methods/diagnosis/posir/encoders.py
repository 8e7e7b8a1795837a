"""Encoders behind one protocol: a function, a transformers encoder with its pooling, a sentence-transformers model.

    encode(texts, is_query=…) -> (texts, width)

`Bm25` answers the other protocol, scores of all documents for a query, as late interaction and rerankers do.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from headway.door.evaluating import evaluating
from headway.errors import ArgumentError, HostError, missing_extra, unknown
from headway.hosts import positions_of
from headway.hosts.fingerprint import fingerprint
from headway.tasks.bm25 import K1, B, words

POOLINGS = ("mean", "cls", "last")
#: Tokens of a document at most, as in the benchmark, where the model has room for them.
MAX_TOKENS = 8192
#: Two special tokens and a word.
LEAST_TOKENS = 3
#: The prefix of queries in the benchmark's code; only for models trained with it.
INSTRUCTION = "Instruct: Given a web search query, retrieve relevant passages that answer the query\nQuery: "


@runtime_checkable
class Encoder(Protocol):
    """Embeds texts. `name` stands in reports, `identity` is everything that embeddings depend on, `max_tokens` what is
    read of a text (None: all of it)."""

    name: str
    max_tokens: int | None

    @property
    def identity(self) -> str: ...

    def encode(self, texts: Sequence[str], *, is_query: bool) -> Float[np.ndarray, "texts width"]: ...


@runtime_checkable
class PooledEncoder(Encoder, Protocol):
    """An encoder that gradients go through: a module over token embeddings, and its pooling."""

    @property
    def model(self) -> Any: ...

    @property
    def tokenizer(self) -> Any: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def tokenized(
        self, texts: Sequence[str], *, is_query: bool, max_tokens: int | None = None
    ) -> dict[str, Tensor]: ...

    def pooled(self, inputs: dict[str, Tensor]) -> Float[Tensor, "texts width"]: ...


@runtime_checkable
class Scorer(Protocol):
    """Scores documents for a query: BM25, late interaction, a reranker."""

    name: str

    def prepare(self, documents: Sequence[str]) -> None: ...

    def scores(self, query: str) -> Float[np.ndarray, " documents"]: ...


@dataclass(kw_only=True)
class CallableEncoder:
    """Any function (texts, is_query) -> array. `name` and `version` tell its embeddings from those of others."""

    function: Callable[[Sequence[str], bool], Any]
    name: str
    max_tokens: int | None = None
    version: str = ""

    @property
    def identity(self) -> str:
        return f"callable {self.name} {self.version} {self.max_tokens}"

    def encode(self, texts: Sequence[str], *, is_query: bool) -> Float[np.ndarray, "texts width"]:
        return _checked(np.asarray(self.function(list(texts), is_query)), len(texts), self.name)


@dataclass(kw_only=True)
class TransformersEncoder:
    """A transformers model whose last hidden states are pooled.

    pooling: "mean" over real tokens, "cls" the first real token, "last" the last real one (found by the mask, so the
    side of the padding does not matter). `query_prefix` and `document_prefix` go before the texts; a model trained with
    an instruction wants INSTRUCTION. `max_tokens` counts special tokens; by default the model's positions, at most
    MAX_TOKENS. `batch` is in documents; twice as many queries are taken at once."""

    model: nn.Module
    tokenizer: Any
    pooling: str = "mean"
    query_prefix: str = ""
    document_prefix: str = ""
    max_tokens: int | None = None
    batch: int = 16
    name: str = ""
    _identity: str = field(default="", repr=False)

    def __post_init__(self) -> None:
        if self.pooling not in POOLINGS:
            raise unknown("pooling", self.pooling, POOLINGS)
        room = positions_of(self.model) if hasattr(self.model, "config") else None
        if self.max_tokens is not None and (self.max_tokens < LEAST_TOKENS or (room and self.max_tokens > room)):
            raise ArgumentError(
                f"max_tokens: got {self.max_tokens}, expected {LEAST_TOKENS} to {room or MAX_TOKENS}, the positions of "
                "the model."
            )
        if self.batch < 1:
            raise ArgumentError(f"batch: got {self.batch}, expected 1 or more.")
        self.max_tokens = self.max_tokens or min(room or MAX_TOKENS, MAX_TOKENS)
        self.name = self.name or str(getattr(self.model, "name_or_path", "")) or type(self.model).__name__

    @property
    def identity(self) -> str:
        if not self._identity:
            own = fingerprint(self.model).to_dict()
            settings = [self.pooling, self.query_prefix, self.document_prefix, self.max_tokens, str(self.dtype)]
            self._identity = json.dumps([self.name, own, settings], sort_keys=True)
        return self._identity

    @property
    def dtype(self) -> torch.dtype:
        return _dtype(self.model)

    @torch.no_grad()
    def encode(self, texts: Sequence[str], *, is_query: bool) -> Float[np.ndarray, "texts width"]:
        size = self.batch * (2 if is_query else 1)
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        found: list[np.ndarray | None] = [None] * len(texts)
        with evaluating(self.model):
            for first in range(0, len(texts), size):
                chosen = order[first : first + size]
                pooled = self.pooled(self.tokenized([texts[i] for i in chosen], is_query=is_query))
                for i, row in zip(chosen, pooled.float().cpu().numpy(), strict=True):
                    found[i] = row
        return _checked(np.stack([row for row in found if row is not None]), len(texts), self.name)

    def tokenized(self, texts: Sequence[str], *, is_query: bool, max_tokens: int | None = None) -> dict[str, Tensor]:
        """The model's inputs for texts, cut, and padded on the right: positions count from the first real token."""
        prefix = self.query_prefix if is_query else self.document_prefix
        return _tokenized(self, [prefix + text for text in texts], max_tokens)

    def pooled(self, inputs: dict[str, Tensor]) -> Float[Tensor, "texts width"]:
        """Pooled last hidden states; gradients flow where they are on."""
        hidden = self.model(**inputs)
        states = hidden.last_hidden_state if hasattr(hidden, "last_hidden_state") else hidden[0]
        return pool(states, inputs["attention_mask"].bool(), self.pooling)


@dataclass(kw_only=True)
class SentenceTransformersEncoder:
    """A `sentence_transformers.SentenceTransformer`, with its own modules, and its prompts by name."""

    model: Any
    query_prompt: str | None = None
    document_prompt: str | None = None
    max_tokens: int | None = None
    batch: int = 16
    name: str = ""

    def __post_init__(self) -> None:
        if not callable(getattr(self.model, "encode", None)):
            raise ArgumentError(f"model: got {type(self.model).__name__}, expected a SentenceTransformer.")
        if self.max_tokens is not None and self.max_tokens < LEAST_TOKENS:
            raise ArgumentError(f"max_tokens: got {self.max_tokens}, expected {LEAST_TOKENS} or more.")
        if self.batch < 1:
            raise ArgumentError(f"batch: got {self.batch}, expected 1 or more.")
        own = getattr(self.model, "max_seq_length", None)
        if self.max_tokens is not None:
            self.model.max_seq_length = self.max_tokens
        self.max_tokens = self.max_tokens or own
        self.name = self.name or _st_name(self.model)

    @property
    def identity(self) -> str:
        own = fingerprint(self.model).weights
        return f"{self.name} {own} {self.query_prompt} {self.document_prompt} {self.max_tokens}"

    def encode(self, texts: Sequence[str], *, is_query: bool) -> Float[np.ndarray, "texts width"]:
        prompt = self.query_prompt if is_query else self.document_prompt
        found = self.model.encode(
            list(texts),
            batch_size=self.batch * (2 if is_query else 1),
            prompt_name=prompt,
            convert_to_numpy=True,
            show_progress_bar=False,
        )
        return _checked(np.asarray(found, dtype=np.float32), len(texts), self.name)

    @property
    def tokenizer(self) -> Any:
        return self.model.tokenizer

    @property
    def dtype(self) -> torch.dtype:
        return _dtype(self.model)

    def tokenized(self, texts: Sequence[str], *, is_query: bool, max_tokens: int | None = None) -> dict[str, Tensor]:
        """The model's inputs for texts behind their prompt, cut and padded."""
        name = (self.query_prompt if is_query else self.document_prompt) or self.model.default_prompt_name
        prompt = self.model.prompts[name] if name else ""
        return _tokenized(self, [prompt + text for text in texts], max_tokens)

    def pooled(self, inputs: dict[str, Tensor]) -> Float[Tensor, "texts width"]:
        """What all modules make of the inputs; gradients flow where they are on."""
        return self.model(dict(inputs))["sentence_embedding"]


class Bm25:
    """BM25 over an index made once (extra `retrieval`)."""

    name = "bm25"

    def prepare(self, documents: Sequence[str]) -> None:
        try:
            from bm25s import BM25
        except ImportError as error:
            raise missing_extra("bm25s", "retrieval", "BM25") from error
        self._size = len(documents)
        self._index = BM25(k1=K1, b=B)
        self._index.index([words(text) or ["\0"] for text in documents], show_progress=False)

    def scores(self, query: str) -> Float[np.ndarray, " documents"]:
        asked = words(query)
        return np.asarray(self._index.get_scores(asked), dtype=float) if asked else np.zeros(self._size)


def pool(
    states: Float[Tensor, "texts tokens width"], real: Bool[Tensor, "texts tokens"], pooling: str
) -> Float[Tensor, "texts width"]:
    """One vector per text from its real tokens; padding on either side changes nothing."""
    if pooling == "mean":
        weight = real[..., None].to(states.dtype)
        return (states * weight).sum(1) / weight.sum(1).clamp(min=1)
    places = torch.arange(real.shape[1], device=real.device)
    first = torch.where(real, places, real.shape[1]).amin(1).clamp(max=real.shape[1] - 1)
    last = torch.where(real, places, -1).amax(1).clamp(min=0)
    return states[torch.arange(len(states), device=states.device), first if pooling == "cls" else last]


def load_sentence_transformer(
    name: str, *, trust_remote_code: bool = False, **options: Any
) -> SentenceTransformersEncoder:
    """The sentence-transformers model of a hub id or folder."""
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise missing_extra("sentence-transformers", "retrieval", "a sentence-transformers model") from error
    try:
        model = SentenceTransformer(name, device="cpu", trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise HostError(
            f"model {name!r}: sentence-transformers cannot load it ({str(error).splitlines()[0]})."
        ) from error
    return SentenceTransformersEncoder(model=model, name=name, **options)


def _dtype(model: nn.Module) -> torch.dtype:
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def _tokenized(encoder: PooledEncoder, texts: list[str], max_tokens: int | None) -> dict[str, Tensor]:
    tokenizer = encoder.tokenizer
    if getattr(tokenizer, "pad_token", None) is None and len(texts) > 1:
        tokenizer.pad_token = tokenizer.eos_token
    found = tokenizer(
        texts,
        truncation=True,
        max_length=min(max_tokens or MAX_TOKENS, encoder.max_tokens or MAX_TOKENS),
        padding=len(texts) > 1,
        padding_side="right",
        return_tensors="pt",
    )
    device = next(encoder.model.parameters()).device
    return {name: tensor.to(device) for name, tensor in found.items()}


def _st_name(model: Any) -> str:
    card = getattr(model, "model_card_data", None)
    return str(getattr(card, "base_model", None) or type(model).__name__)


def _checked(found: np.ndarray, count: int, name: str) -> Float[np.ndarray, "texts width"]:
    if found.ndim != 2 or len(found) != count:
        raise ArgumentError(f"encoder {name!r}: gave shape {found.shape} for {count} texts, expected ({count}, width).")
    return found
