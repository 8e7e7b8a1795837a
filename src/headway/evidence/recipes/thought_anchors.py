"""Thought Anchors: known dependency graphs recovered, a planted branch found, and a real model's own reasoning.

The toy is a trained decoder whose traces have a known graph with one path for each fact, with distractors that catch
attention (`_anchors_toy`). A scripted reasoner shows what forced answers miss. SmolLM2 stands for the real models: it
thinks about four questions, and what is measured on its traces is reported as found; it is no reasoning model. The
paper's own traces need 14-billion-parameter models and 100 rollouts of up to 16,384 tokens for each sentence.

Paper: Thought Anchors: Which LLM Reasoning Steps Matter?, arXiv 2506.19143.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from headway.evidence.claims import Claim
from headway.evidence.recipe import Context, Recipe
from headway.evidence.recipes import _anchors_choice as choice
from headway.evidence.recipes import _anchors_claims as claims
from headway.evidence.recipes import _anchors_measures as measures
from headway.evidence.recipes import _anchors_toy as toy
from headway.methods.diagnosis import thought_anchors as method
from headway.tasks.sentences import split_sentences

CRITERIA = claims.CRITERIA | choice.CRITERIA
QUESTIONS = (
    "A shop sells pens for 3 dollars each and notebooks for 5 dollars each. Ann buys 4 pens and 2 notebooks and pays "
    "with a 50 dollar note. How much change does she get? Explain every step, then check your result.",
    "Should a small town build a new library or a new swimming pool? Think it through step by step, weigh both sides, "
    "and then decide.",
    "A train leaves at 9:40 and arrives at 13:05, with a stop of 25 minutes on the way. How long does it move? Plan "
    "your solution first, then compute it step by step, and check it in another way.",
    "A basket holds 7 red and 5 green apples. Two are taken out without looking. How likely is it that both are green? "
    "Explain what you plan to do, compute it, and say whether you are sure.",
)


def run(context: Context) -> list[Claim]:
    seeds = context.seeds(context.choose(smoke=1, small=2, full=5))
    toys = [context.stage(f"toy-{i}", partial(_toy, context, seed)) for i, seed in enumerate(seeds)]
    control = context.stage("random-weights", lambda: _control(context))
    script = context.stage(
        "scripted", lambda: measures.forced(*context.choose(smoke=(4, 20), small=(20, 40), full=(60, 100)))
    )
    real = context.stage("smollm2", lambda: _real(context))
    cost = context.stage("shared-prefix", lambda: _cost(context))
    chosen = context.stage("choice", lambda: _choice(context))
    return [
        *claims.toy_claims(context, toys, control),
        claims.forced_claim(script),
        *claims.real_claims(context, real),
        *claims.cost_claims(context, cost),
        choice.choice_claim(context, chosen),
    ]


def _toy(context: Context, seed: int) -> dict[str, Any]:
    """One toy: trained, checked on fresh traces, then measured on others."""
    steps, edges, looks, branches, rollouts = context.choose(
        smoke=(20, 2, 6, 1, 6), small=(600, 12, 40, 12, 30), full=(1000, 60, 100, 40, 100)
    )
    model = toy.train(steps, seed % 2**31)
    draw = np.random.default_rng([seed % 2**31, 1])
    accuracy = toy.derived_right(model, toy.draw_ids(200, draw))
    traces = [toy.planted(row.tolist()) for row in toy.draw_ids(looks, draw)]
    ends = [toy.planted(row.tolist()) for row in toy.draw_ids(branches, draw, mode_last=True)]
    return {
        "accuracy": accuracy,
        "edges": measures.planted_edges(model, traces[:edges]),
        "receivers": measures.broadcasting(model, traces),
        "branch": measures.branching(model, ends, rollouts),
    }


def _control(context: Context) -> dict[str, Any]:
    """The receiver measure on untrained weights of the same shape."""
    count = context.choose(smoke=8, small=80, full=200)
    draw = context.generator("random weights")
    traces = [toy.planted(row.tolist()) for row in toy.draw_ids(count, draw)]
    return measures.broadcasting(toy.decoder(context.seed).eval(), traces)


def _real(context: Context) -> dict[str, Any]:
    """A real model: its receiver heads on passages of prose, and its own reasoning."""
    if context.size == "smoke":
        model: Any = toy.decoder(context.seed).eval()
        traces = [toy.planted(row.tolist()).trace for row in toy.draw_ids(2, context.generator("traces"))]
        heads = measures.real_heads(model, traces, top=measures.TOY_TOP)
        return {"heads": heads, "thoughts": measures.real_thoughts(model, traces, heads["heads"], claims.PROXIMITY)}
    from headway.hosts import load

    model, tokenizer = load("smollm2")
    passages, sentences, repeats, tokens = context.choose(small=(4, 16, 3, 256), full=(40, 60, 8, 400))
    heads = measures.real_heads(model, _passages(tokenizer, passages, sentences), top=20)
    sampler = method.LocalSampler(model, tokenizer, max_tokens=tokens)
    thoughts = [
        thought
        for question in QUESTIONS
        for thought in _thoughts(tokenizer, sampler, question, context.seeds(repeats))
        if len(thought) >= 2 * claims.PROXIMITY
    ]
    found = measures.real_thoughts(model, thoughts, heads["heads"], claims.PROXIMITY)
    return {"heads": heads, "thoughts": found | {"example": thoughts[0].sentences}}


def _choice(context: Context) -> dict[str, Any]:
    """SmolLM2 as its own sampler, line by line; at smoke size a stand-in that always picks 1."""
    rollouts = context.choose(smoke=5, small=10, full=100)
    if context.size == "smoke":
        return choice.choices(None, lambda prefix, seeds: ["".join(choice.sentences(1))] * len(seeds), rollouts, (6,))
    from headway.hosts import load

    model, tokenizer = load("smollm2")
    ends = tokenizer("\n", add_special_tokens=False)["input_ids"]
    sampler = method.LocalSampler(model, tokenizer, max_tokens=32, stop=(*ends, tokenizer.eos_token_id))
    return choice.choices(tokenizer, sampler, rollouts)


def _thoughts(tokenizer: Any, sampler: method.LocalSampler, question: str, seeds: Sequence[int]) -> list[method.Trace]:
    turn = [{"role": "user", "content": question}]
    prompt = str(tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False))
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    texts = sampler(method.Prefix(tuple(ids), prompt), seeds)
    return [method.read_trace(text, tokenizer, prompt=prompt, add_special_tokens=False) for text in texts]


def _passages(tokenizer: Any, count: int, sentences: int) -> list[method.Trace]:
    """Passages of the default text that follow each other, of so many sentences each."""
    from headway.hosts import default_text

    text = default_text().text
    spans = split_sentences(text)
    found = []
    for k in range(count):
        inside = spans[k * sentences : (k + 1) * sentences]
        start, stop = inside[0][0], inside[-1][1]
        ranges = [(a - start, b - start) for a, b in inside]
        found.append(method.read_trace(text[start:stop], tokenizer, sentences=ranges, name=f"passage {k}"))
    return found


def _cost(context: Context) -> dict[str, Any]:
    if context.size == "smoke":
        model: Any = toy.decoder(context.seed).eval()
        ids = toy.draw_ids(1, context.generator("cost"))[:, :36]
        return measures.shared_prefix(model, ids, 6, 2) | {"maps": measures.block_means(model, ids, 6)}
    from headway.hosts import default_text, load, tokenize

    model, tokenizer = load("smollm2")
    length, sentences, repeats = context.choose(small=(96, 8, 3), full=(1024, 32, 5))
    found = measures.shared_prefix(model, tokenize(tokenizer, default_text(), length), sentences, repeats)
    ids = tokenize(tokenizer, default_text(), context.choose(small=512, full=1024))
    return found | {"maps": measures.block_means(model, ids, 32)}


def _obstacle(size: str) -> str | None:
    if size == "full" and not torch.cuda.is_available():
        return "it draws 100 rollouts for each sentence of many traces and there is no GPU. Run --size small."
    return None


RECIPE = Recipe(
    slug="thought-anchors",
    title="Thought Anchors: Which LLM Reasoning Steps Matter?",
    run=run,
    criteria=CRITERIA,
    obstacle=_obstacle,
)
