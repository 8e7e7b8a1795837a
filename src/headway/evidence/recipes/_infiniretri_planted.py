"""InfiniRetri where the truth is known: planted hosts, rows of tiny hosts, phrases in noise, two hops, and cost.

`planted_host` attends as its one retrieval head says; `answering_host` can also say the value of a name. They stand
beside what else can be done with a text that is too long: truncation, BM25, random sentences, and a vote of the answers
from sliding chunks.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch

from headway.evidence.recipe import Context
from headway.hosts.tiny import tiny_host
from headway.methods.long_context.infiniretri import HostRows, Settings, answer, fill, retrieve, token_scores
from headway.tasks.bm25 import bm25_keep
from headway.tasks.planted_retrieval import answering_host, chain_text, planted_host, planted_text
from headway.tasks.samples import plain_ids

#: The planted hosts: positions 512, chunks of half of them.
PLANTED = Settings(window=256, budget=96, topk=16, phrase=8)
PLANTED_TEMPLATE = "{context} {question} answer :"
#: A name at the end of a prompt is what the answering host continues.
ASKING_TEMPLATE = "{context} {question}"
DEPTHS = tuple(i / 10 for i in range(11))
TRUNCATIONS = ("head", "tail", "middle")
#: Widths of the smoothing window and lengths of planted phrases.
WIDTHS = (1, 4, 8, 16)
#: Mean of a phrase's tokens above the noise, in its standard deviations.
SIGNAL = 2.0
#: Chunks that one forward of the vote reads.
BATCH = 32


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


def measure_answers(context: Context) -> list[dict[str, Any]]:
    """Whether the answering host names the value of a planted fact, by what it was given to read."""
    grid = context.choose(
        smoke=((400, (0.0, 1.0)), (1_600, (0.5,))),
        small=((1_000, DEPTHS), (4_000, DEPTHS), (16_000, DEPTHS[::2]), (64_000, (0.0, 0.5, 1.0))),
        full=tuple((tokens, DEPTHS) for tokens in (1_000, 4_000, 16_000, 64_000, 256_000)),
    )
    model, tokenizer = answering_host()
    whole = model.config.n_positions - 16
    found = []
    cells = [(tokens, depth) for tokens, depths in grid for depth in depths]
    for tokens, depth in context.track(cells, "answers of the planted host"):
        planted = planted_text(tokens, [depth], context.generator(f"answer {tokens} {depth}"))
        at = planted.needles[0]
        name, value = (planted.sentences[at].split()[i] for i in (3, 5))
        question = f"the code of {name}"
        got = answer(
            model, tokenizer, planted.text, question, settings=PLANTED, template=ASKING_TEMPLATE, max_new_tokens=1
        )
        sizes = [len(sentence.split()) for sentence in planted.sentences]
        others = [number for number in range(len(sizes)) if number != at]
        near = others[max(at - 3, 0) : at + 3]
        texts = {way: [planted.sentences[i] for i in truncated(sizes, whole, way)] for way in TRUNCATIONS}
        texts["in_window"] = [planted.sentences[i] for i in sorted([*near, at])]
        said = {way: _said(model, tokenizer, " ".join(text), question) for way, text in texts.items()}
        said["majority"] = _majority(model, tokenizer, planted.text, question)
        found.append(
            {
                "tokens": got.retrieval.tokens,
                "depth": depth,
                "kept": planted.sentences[at] in got.retrieval.text,
                "answer": got.text.strip() == value,
                **{way: word == value for way, word in said.items()},
            }
        )
    return found


@torch.no_grad()
def _said(model: Any, tokenizer: Any, text: str, question: str) -> str:
    """The likeliest next word behind a text and a question."""
    ids = torch.tensor([plain_ids(tokenizer, f"{text} {question}")])
    return str(tokenizer.decode(model(input_ids=ids).logits[0, -1].argmax()))


@torch.no_grad()
def _majority(model: Any, tokenizer: Any, text: str, question: str) -> str:
    """The most frequent of the answers from chunks of the window's size that overlap by half; of several, the first."""
    ids, asked = plain_ids(tokenizer, text), plain_ids(tokenizer, question)
    size = min(PLANTED.window, len(ids))
    starts = [*range(0, len(ids) - size, max(size // 2, 1)), len(ids) - size]
    chunks = torch.tensor([[*ids[start : start + size], *asked] for start in starts])
    votes: Counter[int] = Counter()
    for part in chunks.split(BATCH):
        votes.update(model(input_ids=part, logits_to_keep=1).logits[:, -1].argmax(-1).tolist())
    return str(tokenizer.decode(votes.most_common(1)[0][0]))


def measure_slopes(context: Context) -> dict[str, dict[str, float]]:
    """Seconds of reading a text in passes and of one dense forward over it by a host with as many positions, and the
    pairs of tokens that each attends over, by length; of several runs the quickest."""
    lengths = context.choose(smoke=(600, 1_200), small=(4_000, 8_000, 16_000), full=(16_000, 32_000, 64_000))
    repeats = context.choose(smoke=1, small=3, full=3)
    found: dict[str, dict[str, float]] = {}
    for tokens in context.track(lengths, "time by length"):
        planted = planted_text(tokens, [0.5], context.generator(f"slope {tokens}"))
        model, tokenizer = planted_host()
        long, _ = planted_host(positions=tokens + 256)
        ids = torch.tensor([plain_ids(tokenizer, planted.text)])
        own, dense, pairs = [], [], 0
        for _ in range(repeats):
            start = time.perf_counter()
            got = retrieve(
                model, tokenizer, planted.text, planted.question, settings=PLANTED, template=PLANTED_TEMPLATE,
                max_new_tokens=1,
            )  # fmt: skip
            own.append(time.perf_counter() - start)
            pairs = sum(record.tokens * (record.tokens + 1) // 2 for record in got.passes)
            start = time.perf_counter()
            with torch.no_grad():
                long(input_ids=ids, use_cache=False, logits_to_keep=1)
            dense.append(time.perf_counter() - start)
        count = ids.shape[1]
        found[str(count)] = {
            "own": min(own), "dense": min(dense), "own pairs": pairs, "dense pairs": count * (count + 1) // 2,
        }  # fmt: skip
    return found
