"""What the InfiniRetri recipe measures: needles in a planted host and in real text, rows, phrases, two hops."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from headway.evidence.recipe import Context
from headway.hosts import default_text, load
from headway.hosts.tiny import tiny_host
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
from headway.tasks.planted_retrieval import chain_text, planted_host, planted_text
from headway.tasks.samples import Sample, plain_ids
from headway.tasks.words import NOUNS, draw, pick, spread

#: The planted host: positions 512, chunks of half of them.
PLANTED = Settings(window=256, budget=96, topk=16, phrase=8)
PLANTED_TEMPLATE = "{context} {question} answer :"
DEPTHS = tuple(i / 10 for i in range(11))
TRUNCATIONS = ("head", "tail", "middle")
#: Widths of the smoothing window and lengths of planted phrases.
WIDTHS = (1, 4, 8, 16)
#: Mean of a phrase's tokens above the noise, in its standard deviations.
SIGNAL = 2.0
DIGITS = 5
NEW_TOKENS = 8
REAL_TEMPLATE = "Secret codes are hidden in the following text.\n\n{context}\n\n{question}"


@dataclass(frozen=True, kw_only=True)
class Hidden:
    """A real text with needles: the text, what is asked for, and the question about all of it."""

    text: str
    keys: tuple[str, ...]
    values: tuple[str, ...]
    needles: tuple[str, ...]
    question: str


def truncated(lengths: Sequence[int], budget: int, way: str) -> list[int]:
    """The numbers of the sentences that stay when a text is cut to `budget` tokens: its head, its tail, or half of
    each (the middle is out)."""
    if way == "middle":
        front = truncated(lengths, budget // 2, "head")
        back = truncated(lengths, budget - sum(lengths[i] for i in front), "tail")
        return sorted({*front, *back})
    order = range(len(lengths)) if way == "head" else range(len(lengths) - 1, -1, -1)
    kept: list[int] = []
    for number in order:
        if lengths[number] > budget:
            break
        budget -= lengths[number]
        kept.append(number)
    return sorted(kept)


def measure_planted(context: Context) -> list[dict[str, Any]]:
    """One needle at every depth of every length, in the planted host. Short texts are repeated."""
    grid = context.choose(
        smoke=((400, (0.0, 0.5, 1.0), 1), (1_600, (0.0, 0.5, 1.0), 1)),
        small=((1_000, DEPTHS, 3), (4_000, DEPTHS, 3), (16_000, DEPTHS, 1), (64_000, DEPTHS[::2], 1)),
        full=tuple((tokens, DEPTHS, 3) for tokens in (1_000, 4_000, 16_000, 64_000, 256_000)),
    )
    model, tokenizer = planted_host()
    found = []
    cells = [(tokens, depth, i) for tokens, depths, repeats in grid for depth in depths for i in range(repeats)]
    for tokens, depth, repeat in context.track(cells, "needles in the planted host"):
        planted = planted_text(tokens, [depth], context.generator(f"planted {tokens} {depth} {repeat}"))
        needle = planted.sentences[planted.needles[0]]
        got = retrieve(
            model,
            tokenizer,
            planted.text,
            planted.question,
            settings=PLANTED,
            template=PLANTED_TEMPLATE,
            max_new_tokens=1,
        )
        sizes = [len(sentence.split()) for sentence in planted.sentences]
        whole = model.config.n_positions - 16
        random = context.generator(f"random sentences {tokens} {depth} {repeat}").permutation(len(sizes)).tolist()
        at = planted.needles[0]
        found.append(
            {
                "tokens": got.tokens,
                "depth": depth,
                "kept": any(needle in item.sentence.text for item in got.kept),
                "kept_tokens": got.kept_tokens,
                "read": got.read,
                "longest_pass": max(record.tokens for record in got.passes),
                "sentences": len(got.kept),
                "displaced": sum(
                    planted.text[item.sentence.start : item.sentence.stop] != item.sentence.text for item in got.kept
                ),
                "random": at in fill(random, sizes, got.kept_tokens),
                "bm25": at in bm25_keep(planted.sentences, planted.question, sizes, got.kept_tokens),
                **{way: at in truncated(sizes, whole, way) for way in TRUNCATIONS},
            }
        )
    return found


def measure_rows(context: Context) -> dict[str, float]:
    """Rows of tiny hosts of several kinds beside their own full maps, by the largest difference of a weight."""
    names = context.choose(smoke=("llama", "gpt2"), small=("llama", "gpt2", "qwen3", "phi", "olmo", "gemma2"))
    worst = {}
    for name in names:
        model, _ = tiny_host(name, attn_implementation="eager", max_position_embeddings=256)
        ids = torch.randint(8, 100, (1, 60), generator=context.torch_generator(f"rows {name}"))
        with torch.no_grad():
            full = model(input_ids=ids, output_attentions=True, use_cache=False).attentions
        with HostRows(model, layer=-1) as rows:
            got = rows(ids[0].tolist(), 50, 60)
            layer = next(site.layer for site in rows.handle.sites if site.name in rows.observer.sites)
        worst[name] = float((got - full[layer][0, :, 50:60].sum(0)).abs().max())
    return worst


def measure_phrases(context: Context) -> dict[str, list[bool]]:
    """Whether the best token of noisy scores lies in the planted phrase, by phrase length and window width."""
    trials = context.choose(smoke=20, small=400, full=4000)
    generator = context.torch_generator("phrases")
    found: dict[str, list[bool]] = {f"{n} {w}": [] for n in WIDTHS for w in WIDTHS}
    for length in WIDTHS:
        for _ in range(trials):
            start = int(torch.randint(0, 512 - length, (1,), generator=generator))
            scores = torch.randn(512, generator=generator)
            scores[start : start + length] += SIGNAL
            for width in WIDTHS:
                best = int(token_scores(scores[None], phrase=width).argmax())
                found[f"{length} {width}"].append(start <= best < start + length)
    return found


def measure_two_hops(context: Context) -> dict[str, list[dict[str, bool]]]:
    """Which of two chained facts are kept, by rule. The question shows the second alone."""
    trials, tokens = context.choose(smoke=(3, 800), small=(30, 2000), full=(200, 16_000))
    model, tokenizer = planted_host()
    rules = {
        "replace": PLANTED,
        "accumulate": Settings(window=256, budget=160, topk=16, phrase=8, keep="accumulate"),
    }
    found: dict[str, list[dict[str, bool]]] = {name: [] for name in rules}
    for number in range(trials):
        chain = chain_text(tokens, context.generator(f"chain {number}"))
        for name, settings in rules.items():
            got = retrieve(
                model, tokenizer, chain.text, chain.question, settings=settings, template=PLANTED_TEMPLATE,
                max_new_tokens=1,
            )  # fmt: skip
            hops = [any(chain.sentences[i] in item.sentence.text for item in got.kept) for i in chain.needles]
            found[name].append({"first": hops[0], "second": hops[1]})
    return found


def real_host(context: Context) -> tuple[Any, Any]:
    """The real model; at smoke size the planted one, so that a run takes seconds."""
    if context.size == "smoke":
        return planted_host(positions=1024, layers=4)
    if context.size == "full":
        return load("Qwen/Qwen2.5-0.5B-Instruct", device="cuda", dtype="bfloat16")
    return load("smollm2", dtype="bfloat16")


def _real_settings(context: Context) -> Settings:
    return context.choose(
        smoke=Settings(window=300, budget=120, topk=40),
        small=Settings(window=2048, budget=512, topk=300),
        full=Settings(window=8192, budget=1024, topk=300),
    )


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


def measure_study(context: Context, model: Any, tokenizer: Any) -> dict[str, Any]:
    """Texts read by the paper's last layer, with every layer's ranking of the needles in the same passes."""
    texts, tokens, needles = context.choose(smoke=(1, 900, 2), small=(3, 8_000, 4), full=(25, 32_000, 4))
    source = list(split_text(default_text().text))
    settings = _real_settings(context)
    result: dict[str, Any] = {"reciprocal": [], "hit": [], "needles": [], "displaced": 0, "sentences": 0}
    for number in context.track(range(texts), "needles in real text"):
        hidden = hide(tokenizer, source, tokens, needles, context.generator(f"study {number}"))
        frame = frame_of(tokenizer, hidden.question, REAL_TEMPLATE)
        sentences = list(sentences_of_text(hidden.text, tokenizer, settings.longest(settings.budget or 1)))
        with HostRows(model, layer=tuple(range(_layers(model)))) as rows:
            watch = _EveryLayer(rows, frame, settings, hidden)
            scan = Scan(settings=settings, frame=frame, attend=watch, budget=settings.budget or 1)
            for chunk in pack(sentences, settings.window):
                watch.context = [*(item.sentence for item in scan.kept), *chunk]
                watch.new = len(scan.kept)
                scan.step(chunk)
            got = scan.result()
        result["reciprocal"] += watch.reciprocal
        result["hit"] += watch.hits
        result["sentences"] += len(got.kept)
        result["displaced"] += sum(
            hidden.text[item.sentence.start : item.sentence.stop] != item.sentence.text for item in got.kept
        )
        rows_of = _needle_rows(context, model, tokenizer, hidden, sentences, got, f"study {number}")
        window = _in_window(model, tokenizer, hidden, sentences, got.kept_tokens)
        result["needles"] += [row | beside for row, beside in zip(rows_of, window, strict=True)]
    return result


class _EveryLayer:
    """Attention of the last layer for the scan; on the way, how every layer ranks the needles of the new chunk.

    A hit is a needle among as many best sentences as needles are asked for."""

    def __init__(self, rows: HostRows, frame: Frame, settings: Settings, hidden: Hidden) -> None:
        self.rows, self.frame, self.settings, self.hidden = rows, frame, settings, hidden
        self.context: list[Sentence] = []
        self.new = 0
        self.reciprocal: list[list[float]] = []
        self.hits: list[list[bool]] = []

    def __call__(self, ids: Sequence[int], first: int, last: int) -> Tensor:
        self.rows(ids, first, last)
        layers = list(self.rows.observer.by_site.values())
        held = [
            number
            for number, sentence in enumerate(self.context)
            if number >= self.new and any(needle in sentence.text for needle in self.hidden.needles)
        ]
        if held:
            ranks = np.array([[self._ranked(layer, first).index(number) for layer in layers] for number in held])
            self.reciprocal += (1 / (1 + ranks)).tolist()
            self.hits += (ranks < len(self.hidden.needles)).tolist()
        return layers[-1]

    def _ranked(self, rows: Tensor, first: int) -> list[int]:
        before = len(self.frame.before)
        stop = before + sum(sentence.tokens for sentence in self.context)
        scores = token_scores(rows[:, before:stop], question_weights(rows[:, first:]), phrase=self.settings.phrase)
        return rank_sentences(scores, [sentence.tokens for sentence in self.context])[0]


def measure_long(context: Context, model: Any, tokenizer: Any, layer: int) -> dict[str, Any]:
    """One text far longer than the model, read in the layer that the study found, and answered from what was kept."""
    tokens, needles = context.choose(smoke=(2_000, 2), small=(64_000, 8), full=(1_000_000, 20))
    source = list(split_text(default_text().text))
    hidden = hide(tokenizer, source, tokens, needles, context.generator("long"))
    base = _real_settings(context)
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
        "longest_pass": max(record.tokens for record in got.passes),
        "passes": len(got.passes),
        "needles": _needle_rows(context, model, tokenizer, hidden, sentences, got, "long"),
    }


def _needle_rows(
    context: Context,
    model: Any,
    tokenizer: Any,
    hidden: Hidden,
    sentences: Sequence[Sentence],
    got: Retrieval,
    name: str,
) -> list[dict[str, Any]]:
    """For every needle: who keeps it, and whether the model then names its value."""
    sizes = [sentence.tokens for sentence in sentences]
    texts = [sentence.text for sentence in sentences]
    whole = int(model.config.max_position_embeddings) - len(got.prompt_ids) + got.kept_tokens - NEW_TOKENS
    ways = {way: truncated(sizes, whole, way) for way in TRUNCATIONS}
    ways["bm25"] = bm25_keep(texts, hidden.question, sizes, got.kept_tokens)
    ways["random"] = fill(context.generator(f"random {name}").permutation(len(sizes)).tolist(), sizes, got.kept_tokens)
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


def _layers(model: Any) -> int:
    return int(model.config.num_hidden_layers)
