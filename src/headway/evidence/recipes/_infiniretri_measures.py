"""InfiniRetri on a real model: needles in real text, how every layer ranks them, and a text far beyond its window."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from headway.evidence.parallel import side_by_side
from headway.evidence.recipe import Context
from headway.evidence.recipes._infiniretri_planted import TRUNCATIONS, truncated
from headway.hosts import default_text, load
from headway.methods.long_context.infiniretri import (
    Frame,
    HostRows,
    Retrieval,
    Scan,
    Sentence,
    Settings,
    fill,
    frame_of,
    pack,
    question_weights,
    rank_sentences,
    retrieve,
    sentences_of_text,
    split_text,
    token_scores,
)
from headway.tasks.answering import answer
from headway.tasks.bm25 import bm25_keep
from headway.tasks.planted_retrieval import planted_host
from headway.tasks.samples import Sample, plain_ids
from headway.tasks.words import NOUNS, draw, pick, spread

DIGITS = 5
NEW_TOKENS = 8
#: Least score whose logarithm is taken.
TINY = 1e-30
REAL_TEMPLATE = "Secret codes are hidden in the following text.\n\n{context}\n\n{question}"


@dataclass(frozen=True, kw_only=True)
class Hidden:
    """A real text with needles: the text, what is asked for, and the question about all of it."""

    text: str
    keys: tuple[str, ...]
    values: tuple[str, ...]
    needles: tuple[str, ...]
    question: str


def real_host(size: str) -> tuple[Any, Any]:
    """The real model; at smoke size the planted one, so that a run takes seconds."""
    if size == "smoke":
        return planted_host(positions=1024, layers=4)
    if size == "full":
        return load("Qwen/Qwen2.5-0.5B-Instruct", device="cuda", dtype="bfloat16")
    return load("smollm2", dtype="bfloat16")


def _settings(size: str) -> Settings:
    return {
        "smoke": Settings(window=300, budget=120, topk=40),
        "small": Settings(window=2048, budget=512, topk=300),
        "full": Settings(window=8192, budget=1024, topk=300),
    }[size]


def hide(tokenizer: Any, source: Sequence[str], tokens: int, needles: int, random: np.random.Generator) -> Hidden:
    """Needles at even depths of about `tokens` tokens of real sentences, from a random one on, and their question."""
    keys = tuple(pick(random, NOUNS, needles))
    values = tuple(draw("number", random, needles, digits=DIGITS))
    start = int(random.integers(len(source)))
    size, taken = 0, list[str]()
    while size < tokens:
        sentence = source[(start + len(taken)) % len(source)]
        taken.append(sentence)
        size += len(plain_ids(tokenizer, sentence))
    facts = [f"\n\nThe secret code of the {key} is {value}.\n\n" for key, value in zip(keys, values, strict=True)]
    text = "".join(spread(taken, facts, [100 * (i + 0.5) / needles for i in range(needles)]))
    listed = ", the ".join(keys[:-1]) + f" and the {keys[-1]}" if needles > 1 else keys[0]
    return Hidden(
        text=text,
        keys=keys,
        values=values,
        needles=tuple(fact.strip() for fact in facts),
        question=f"What are the secret codes of the {listed}?",
    )


def measure_study(context: Context) -> dict[str, Any]:
    """Texts read by the paper's last layer, with every layer's ranking of the needles in the same passes."""
    texts, tokens, needles = context.choose(smoke=(1, 900, 2), small=(4, 8_000, 4), full=(25, 32_000, 4))
    workers = context.choose(smoke=1, small=2, full=1)
    source = list(split_text(default_text().text))
    tokenizer = real_host(context.size)[1]
    calls = [
        (context.size, hide(tokenizer, source, tokens, needles, context.generator(f"study {n}")), _seed(context, n))
        for n in range(texts)
    ]
    parts = side_by_side(study_text, calls, workers=workers)
    return {
        **{name: [row for part in parts for row in part[name]] for name in ("reciprocal", "hit", "margin", "needles")},
        "text": [number for number, part in enumerate(parts) for _ in part["hit"]],
        **{name: sum(part[name] for part in parts) for name in ("displaced", "sentences")},
    }


def study_text(size: str, hidden: Hidden, seed: int) -> dict[str, Any]:
    """One text of the study."""
    model, tokenizer = real_host(size)
    settings = _settings(size)
    frame = frame_of(tokenizer, hidden.question, REAL_TEMPLATE)
    sentences = list(sentences_of_text(hidden.text, tokenizer, settings.longest(settings.budget or 1)))
    with HostRows(model, layer=tuple(range(int(model.config.num_hidden_layers)))) as rows:
        watch = _EveryLayer(rows, frame, settings, hidden)
        scan = Scan(settings=settings, frame=frame, attend=watch, budget=settings.budget or 1)
        for chunk in pack(sentences, settings.window):
            watch.context = [*(item.sentence for item in scan.kept), *chunk]
            watch.new = len(scan.kept)
            scan.step(chunk)
        got = scan.result()
    rows_of = _needle_rows(model, tokenizer, hidden, sentences, got, seed)
    window = _in_window(model, tokenizer, hidden, sentences, got.kept_tokens)
    return {
        "reciprocal": watch.reciprocal,
        "hit": watch.hits,
        "margin": watch.margins,
        "sentences": len(got.kept),
        "displaced": sum(
            hidden.text[item.sentence.start : item.sentence.stop] != item.sentence.text for item in got.kept
        ),
        "needles": [row | beside for row, beside in zip(rows_of, window, strict=True)],
    }


def chosen_layer(margins: Sequence[Sequence[float]]) -> int:
    """The layer by which a long text is read: that of the largest mean margin over held-out needles, (needles, layers);
    of equal ones the last, as the paper reads the last layer of all."""
    means = np.mean(np.asarray(margins, dtype=float), axis=0)
    return int(len(means) - 1 - np.argmax(means[::-1]))


def last_and_best(
    hits: Sequence[Sequence[bool]], texts: Sequence[int]
) -> tuple[Float[np.ndarray, " needles"], Float[np.ndarray, " needles"]]:
    """For every needle the hit rate of the last quarter of layers, and of the best quarter that ends before it.

    `hits` are (needles, layers). Which quarter is best is read off the needles of the other texts (of equal ones the
    last), so that choosing among many does not flatter it; a single text has no others and chooses for itself."""
    found, of = np.asarray(hits, dtype=float), np.asarray(texts)
    width = max(found.shape[1] // 4, 1)
    blocks = np.lib.stride_tricks.sliding_window_view(found, width, axis=1).mean(-1)
    before = blocks[:, : max(blocks.shape[1] - width, 1)]
    best = np.empty(len(found))
    for number in range(len(found)):
        others = of != of[number] if (of != of[number]).any() else of == of[number]
        means = before[others].mean(0)
        best[number] = before[number, len(means) - 1 - int(np.argmax(means[::-1]))]
    return blocks[:, -1], best


class _EveryLayer:
    """Attention of the last layer for the scan; on the way, how every layer ranks the needles of the new chunk.

    A hit is a needle among as many best sentences as needles are asked for; its margin is the logarithm of its score
    over that of the best sentence without a needle."""

    def __init__(self, rows: HostRows, frame: Frame, settings: Settings, hidden: Hidden) -> None:
        self.rows, self.frame, self.settings, self.hidden = rows, frame, settings, hidden
        self.context: list[Sentence] = []
        self.new = 0
        self.reciprocal: list[list[float]] = []
        self.hits: list[list[bool]] = []
        self.margins: list[list[float]] = []

    def __call__(self, ids: Sequence[int], first: int, last: int) -> Tensor:
        self.rows(ids, first, last)
        layers = list(self.rows.observer.by_site.values())
        held = [
            number
            for number, sentence in enumerate(self.context)
            if number >= self.new and any(needle in sentence.text for needle in self.hidden.needles)
        ]
        if held:
            judged = [self._ranked(layer, first) for layer in layers]
            others = [i for i, one in enumerate(self.context) if not any(n in one.text for n in self.hidden.needles)]
            ranks = np.array([[ranked.index(number) for ranked, _ in judged] for number in held])
            best = np.array([max(scores[i] for i in others) for _, scores in judged])
            own = np.array([[scores[number] for _, scores in judged] for number in held])
            self.margins += np.log(np.maximum(own, TINY) / np.maximum(best, TINY)).tolist()
            self.reciprocal += (1 / (1 + ranks)).tolist()
            self.hits += (ranks < len(self.hidden.needles)).tolist()
        return layers[-1]

    def _ranked(self, rows: Tensor, first: int) -> tuple[list[int], list[float]]:
        """Sentences, best first, and the score of each."""
        before = len(self.frame.before)
        stop = before + sum(sentence.tokens for sentence in self.context)
        scores = token_scores(rows[:, before:stop], question_weights(rows[:, first:]), phrase=self.settings.phrase)
        ranked, best, _ = rank_sentences(scores, [sentence.tokens for sentence in self.context])
        return ranked, best


def measure_long(context: Context, layer: int) -> list[dict[str, Any]]:
    """Texts far longer than the model, read in the layer that the study found, and answered from what was kept."""
    texts, tokens, needles = context.choose(smoke=(1, 2_000, 2), small=(2, 64_000, 12), full=(3, 1_000_000, 20))
    workers = context.choose(smoke=1, small=2, full=1)
    source = list(split_text(default_text().text))
    tokenizer = real_host(context.size)[1]
    calls = [
        (
            context.size,
            hide(tokenizer, source, tokens, needles, context.generator(f"long {n}")),
            layer,
            _seed(context, 1000 + n),
        )
        for n in range(texts)
    ]
    return side_by_side(long_text, calls, workers=workers)


def long_text(size: str, hidden: Hidden, layer: int, seed: int) -> dict[str, Any]:
    """One text far beyond the window."""
    model, tokenizer = real_host(size)
    base = _settings(size)
    settings = Settings(window=base.window, budget=base.budget, topk=base.topk, layer=layer)
    got = retrieve(
        model,
        tokenizer,
        hidden.text,
        hidden.question,
        settings=settings,
        template=REAL_TEMPLATE,
        max_new_tokens=NEW_TOKENS,
    )
    sentences = list(sentences_of_text(hidden.text, tokenizer, settings.longest(settings.budget or 1)))
    return {
        "layer": layer,
        "tokens": got.tokens,
        "read": got.read,
        "prompt": len(got.prompt_ids),
        "kept tokens": got.kept_tokens,
        "longest_pass": max(record.tokens for record in got.passes),
        "passes": len(got.passes),
        "needles": _needle_rows(model, tokenizer, hidden, sentences, got, seed),
    }


def _seed(context: Context, number: int) -> int:
    return int(context.generator(f"random sentences {number}").integers(2**31))


def _needle_rows(
    model: Any, tokenizer: Any, hidden: Hidden, sentences: Sequence[Sentence], got: Retrieval, seed: int
) -> list[dict[str, Any]]:
    """For every needle: who keeps it, and whether the model then names its value."""
    sizes = [sentence.tokens for sentence in sentences]
    texts = [sentence.text for sentence in sentences]
    whole = int(model.config.max_position_embeddings) - len(got.prompt_ids) + got.kept_tokens - NEW_TOKENS
    ways = {way: truncated(sizes, whole, way) for way in TRUNCATIONS}
    ways["bm25"] = bm25_keep(texts, hidden.question, sizes, got.kept_tokens)
    ways["random"] = fill(np.random.default_rng(seed).permutation(len(sizes)).tolist(), sizes, got.kept_tokens)
    rows = []
    for key, value, needle in zip(hidden.keys, hidden.values, hidden.needles, strict=True):
        rows.append(
            {
                "kept": needle in got.text,
                **{way: any(needle in texts[i] for i in numbers) for way, numbers in ways.items()},
                "answer": _right(model, tokenizer, got.text, key, value),
            }
        )
    return rows


def _in_window(
    model: Any, tokenizer: Any, hidden: Hidden, sentences: Sequence[Sentence], tokens: int
) -> list[dict[str, float]]:
    """Whether the model names each value from a text of so many tokens with the same needles in it."""
    others = [one for one in sentences if not any(needle in one.text for needle in hidden.needles)]
    kept = truncated([one.tokens for one in others], tokens, "head")
    count = len(hidden.needles)
    facts = [f"\n\n{needle}\n\n" for needle in hidden.needles]
    short = "".join(spread([others[i].text for i in kept], facts, [100 * (i + 0.5) / count for i in range(count)]))
    pairs = zip(hidden.keys, hidden.values, strict=True)
    return [{"in_window": _right(model, tokenizer, short, key, value)} for key, value in pairs]


def _right(model: Any, tokenizer: Any, text: str, key: str, value: str) -> float:
    before, _, after = REAL_TEMPLATE.partition("{context}")
    question = after.replace("{question}", f"What is the secret code of the {key}?\nThe secret code of the {key} is")
    sample = Sample(
        task="needle",
        context_ids=torch.tensor([plain_ids(tokenizer, before + text)]),
        question_ids=torch.tensor([plain_ids(tokenizer, question)]),
        references=(value,),
        max_new_tokens=NEW_TOKENS,
        match="exact",
        stop=("\n",),
    )
    return answer(model, tokenizer, sample, question_aware=True).score
