"""PosIR: planted position biases recovered beside chance, trained ones told apart, and what MiniLM does.

Encoders whose bias is known (hashed words with decay or a cut) and two trained bi-encoders that differ only in where
their training answers stood (`_posir_toy`) show that the index finds what is there and nothing else. MiniLM with BM25
beside it stands for the real models, on real prose with planted English facts: it reads 512 tokens, so length buckets
are 128, 256 and 512 where the paper has 512, 1,024 and 1,536. The paper's ten models and 310 sets need a download and
GPUs; `headway diagnose position --data` reads them.

Paper: PosIR: Position-Aware Heterogeneous Information Retrieval Benchmark, arXiv 2601.08363.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch

from headway.evidence.claims import Claim
from headway.evidence.recipe import Context, Recipe
from headway.evidence.recipes import _posir_claims as claims
from headway.evidence.recipes import _posir_toy as toy
from headway.methods.diagnosis import posir as method
from headway.methods.diagnosis.posir import Encoder, Evaluation, Scorer, TransformersEncoder
from headway.methods.diagnosis.posir.sensitivity import BINS
from headway.tasks.positioned_evidence import Fact, english_facts, prose_corpus, topic_corpus

CRITERIA = claims.CRITERIA
#: Length buckets of the planted corpus in words, and the words that its cut encoder reads.
EDGES, CUT = (300, 600, 900), 256
SIZES = (150, 1200)
DECAYS = (1.5, 3.0, 6.0)
#: Length buckets for MiniLM in its tokens.
REAL_EDGES = (128, 256, 512)
#: Words or tokens of a fact at most: an answer that ends so far behind the cut begins behind it.
LONGEST_FACT = 32


def run(context: Context) -> list[Claim]:
    chance = context.stage("chance", lambda: _chance(context))
    words = context.stage("words", lambda: _words(context))
    seeds = context.seeds(context.choose(smoke=1, small=2, full=5))
    toys = [context.stage(f"toy-{i}", partial(_toy, context, seed)) for i, seed in enumerate(seeds)]
    real = context.stage("minilm", lambda: _real(context))
    memory = context.stage("memory", lambda: _memory(context))
    return [
        claims.chance_claim(chance),
        *claims.words_claims(words),
        *claims.toy_claims(context, toys),
        *claims.real_claims(context, real),
        claims.memory_claim(memory),
    ]


def _chance(context: Context) -> dict[str, Any]:
    """Flat truths: the index as it is, beyond chance, and how often chance is called an effect."""
    draws, resamples = context.choose(smoke=(2, 20), small=(60, 100), full=(400, 400))
    random = context.generator("flat")
    found: dict[str, Any] = {}
    for count in (10, 50, 200):
        for rate in (0.5, 0.7, 0.9):
            raw, corrected, alarms = [], [], []
            for _ in range(draws):
                x = np.repeat((np.arange(BINS) + 0.5) / BINS, count)
                one = method.sensitivity((random.random(x.size) < rate).astype(float), x, resamples=resamples)
                if one.psi is not None:
                    raw.append(one.psi.value)
                    corrected.append(one.psi.excess)
                    alarms.append(one.psi.p_value < 0.05)
            found[f"{count} at {rate}"] = {"raw": raw, "corrected": corrected, "alarms": alarms}
    return found


def _words(context: Context) -> dict[str, Any]:
    """Planted encoders on documents of made-up words."""
    documents, resamples = context.choose(smoke=(100, 20), small=(800, 300), full=(4000, 1000))
    made = topic_corpus(documents, context.generator("words"), sizes=SIZES, facts=2)
    data = method.count_tokens(method.from_corpus(made), method.word_tokens, name="words")
    encoders: dict[str, Encoder | Scorer] = {
        "even": method.WordEncoder(),
        "cut": method.WordEncoder(max_tokens=CUT),
        **{f"decay {sign * decay:g}": method.WordEncoder(decay=sign * decay) for sign in (1, -1) for decay in DECAYS},
        "bm25": method.Bm25(),
    }
    found = {}
    for name, encoder in encoders.items():
        evaluation = method.evaluate(data, encoder)
        found[name] = measured(evaluation, EDGES, resamples) | {"behind": _behind(evaluation, CUT)}
    filler = [f"{' '.join(text.split()[:8])}." for text in list(made.documents.values())[:12]]
    facts = [Fact(statement=f"thing{i} stands here.", question=f"thing{i}") for i in range(6)]
    moved = method.paired_intervention(method.WordEncoder(), [filler] * 6, facts)
    return {"encoders": found, "moved": moved.slope.value}


def measured(evaluation: Evaluation, edges: tuple[int, ...], resamples: int) -> dict[str, Any]:
    """Sensitivities as plain data, over all lengths and by bucket."""
    buckets = evaluation.buckets(edges=edges, resamples=resamples)
    return {
        "overall": evaluation.overall(edges=edges, resamples=resamples).to_dict(),
        "buckets": [None if one is None else one.to_dict() for one in buckets.values()],
        "reading": list(evaluation.reading(edges=edges).values()),
    }


def _behind(evaluation: Evaluation, cut: int) -> list[float]:
    """Scores of questions whose answer begins behind the cut."""
    inside = evaluation.stops > cut + LONGEST_FACT
    return [float(score) for score in evaluation.scores[inside]]


def _toy(context: Context, seed: int) -> dict[str, Any]:
    """Two encoders from one seed, each tried where it was trained, then both everywhere."""
    steps, documents, resamples, looks = context.choose(
        smoke=(4, 40, 40, 4), small=(750, 600, 300, 40), full=(2000, 680, 1000, 100)
    )
    random = np.random.default_rng([seed % 2**31, 2])
    data = method.from_corpus(toy.corpus(documents, random, asked=3, others=0))
    middle = method.from_corpus(toy.corpus(looks, random, where=(0.45, 0.55), sizes=(36, 48)))
    found = {}
    for name, where in (("anywhere", toy.ANYWHERE), ("early", toy.EARLY)):
        encoder = toy.train(steps, seed % 2**31, where=where, name=name)
        own = method.from_corpus(toy.corpus(documents, np.random.default_rng([seed % 2**31, 3]), where=where))
        pairs = [(q.text, middle.documents[next(iter(middle.judgements[q.id]))]) for q in middle.queries]
        found[name] = measured(method.evaluate(data, encoder), toy.EDGES, resamples) | {
            "own": float(method.evaluate(own, encoder).scores.mean()),
            "first": method.saliency(encoder, pairs, batch=16).mass(0, 0.2).tolist(),
        }
    return found


def _real(context: Context) -> dict[str, Any]:
    """MiniLM and BM25 on real prose with planted facts; the same answers moved; where gradients are."""
    documents, resamples, moved, looks = context.choose(
        smoke=(60, 40, 3, 3), small=(400, 500, 12, 16), full=(4000, 1000, 200, 200)
    )
    encoder, sentences = _host(context)
    random = context.generator("prose")
    longest = encoder.max_tokens or REAL_EDGES[-1]
    edges = (longest // 4, longest // 2, longest)
    count = _counter(encoder)
    corpus = prose_corpus(
        sentences, documents, random, sizes=(max(longest // 8, 8), int(1.4 * longest)), facts=2, count=count
    )
    data = method.count_tokens(method.from_corpus(corpus), encoder.tokenizer, name=encoder.name)
    model, words = method.evaluate(data, encoder), method.evaluate(data, method.Bm25())
    fillers = _fillers(sentences, moved, int(0.85 * longest), count, random)
    facts = english_facts(moved, random)
    pairs = _middle(encoder, sentences, looks, random)
    movers: tuple[Encoder | Scorer, ...] = (encoder, method.Bm25())
    found = {
        "counted by": data.counted_by,
        "minilm": measured(model, edges, resamples) | {"behind": _behind(model, longest)},
        "bm25": measured(words, edges, resamples) | {"behind": _behind(words, longest)},
        "moved": {
            one.name: {"slope": m.slope.to_dict(), "share": m.share, "curve": m.curve.tolist()}
            for one in movers
            for m in [method.paired_intervention(one, fillers, facts)]
        },
    }
    curves = method.saliency(encoder, pairs, batch=4)
    attention = method.pooling_attention(encoder, [text for _, text in pairs])
    return found | {
        "first": curves.mass(0, 0.2).tolist(),
        "last": curves.mass(0.8, 1).tolist(),
        "curve": curves.mean.tolist(),
        "attention": attention.mean.tolist(),
    }


def _host(context: Context) -> tuple[TransformersEncoder, list[str]]:
    """MiniLM and the sentences of the default text; at smoke size the untrained toy on its own words."""
    if context.size == "smoke":
        random = context.generator("sentences")
        words = [" ".join(f"w{i}" for i in random.integers(toy.FILLERS, size=4)) for _ in range(60)]
        return toy.bi_encoder(context.seed % 2**31), words
    from headway.hosts import default_text, load
    from headway.tasks.words import prose

    model, tokenizer = load("minilm")
    return TransformersEncoder(model=model, tokenizer=tokenizer, name="minilm"), prose(default_text().text)


def _counter(encoder: TransformersEncoder) -> Any:
    return lambda sentence: len(encoder.tokenizer(sentence, add_special_tokens=False)["input_ids"])


def _fillers(sentences: list[str], count: int, size: int, counted: Any, random: np.random.Generator) -> list[list[str]]:
    """Stretches of the text of about `size` tokens, nine sentences at least."""
    found = []
    for _ in range(count):
        own: list[str] = []
        start, taken = int(random.integers(len(sentences))), 0
        while taken < size or len(own) < 9:
            own.append(sentences[(start + len(own)) % len(sentences)])
            taken += max(counted(own[-1]), 1)
        found.append(own[:-1] if len(own) > 9 else own)
    return found


def _middle(
    encoder: TransformersEncoder, sentences: list[str], documents: int, random: np.random.Generator
) -> list[tuple[str, str]]:
    """Questions whose answer stands in the middle of a long document that is read whole."""
    longest = encoder.max_tokens or REAL_EDGES[-1]
    sizes = (longest // 2, int(0.85 * longest))
    corpus = prose_corpus(
        sentences, documents, random, sizes=sizes, facts=1, where=(0.45, 0.55), count=_counter(encoder)
    )
    return [(q.text, corpus.documents[q.document]) for q in corpus.questions]


def _memory(context: Context) -> dict[str, Any]:
    """What a batch keeps for its backward pass, and that batches change nothing."""
    encoder, sentences = _host(context)
    size = (encoder.max_tokens or REAL_EDGES[-1]) // 4
    count = _counter(encoder)
    texts = [" ".join(one) for one in _fillers(sentences, 12, size, count, context.generator("memory"))]
    pairs = [("w1 w2", texts[0])] * 12
    kept = {f"{documents} by {batch}": _kept(encoder, pairs[:documents], batch) for documents, batch in
            ((2, 2), (12, 2), (12, 4))}  # fmt: skip
    mixed = [("w1 w2", text) for text in texts[:4]]
    apart = np.abs(
        method.saliency(encoder, mixed, batch=4).curves - method.saliency(encoder, mixed, batch=1).curves
    ).max()
    return {"kept": kept, "apart": float(apart)}


def _kept(encoder: TransformersEncoder, pairs: list[tuple[str, str]], batch: int) -> int:
    """The most bytes that one batch keeps."""
    now, most = 0, 0

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal now
        now += tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):

        def told(what: str, done: int, total: int) -> None:
            nonlocal now, most
            now, most = 0, max(most, now)

        method.saliency(encoder, pairs, batch=batch, progress=told)
    return most


RECIPE = Recipe(
    slug="posir",
    title="PosIR: Position-Aware Heterogeneous Information Retrieval Benchmark",
    run=run,
    criteria=CRITERIA,
)
