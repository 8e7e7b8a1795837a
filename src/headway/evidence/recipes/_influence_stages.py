"""What AttentionInfluence's recipe measures on the toy, and on a real model."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from headway.door import UniformHeads, use
from headway.door.blocks import recorded_inputs, starting_at
from headway.errors import ArgumentError
from headway.evidence.recipe import Context
from headway.evidence.recipes import _influence_toy as toy
from headway.evidence.recipes import _planted_retrieval as planted
from headway.methods.diagnosis.attention_influence import HeadScores, InfluenceScorer, measure_heads
from headway.statistics import matched_controls
from headway.tasks.answering import takes_logits_to_keep
from headway.tasks.copying import CopySample
from headway.tasks.retrieval_probe import RetrievalProbe, probe_sentences, retrieval_probes
from headway.tasks.samples import opening_ids, plain_ids

Head = tuple[int, int]
THRESHOLD = 0.5
#: Of planted heads, each of which answers one question of three.
PLANTED = 0.2
#: Most that the losses of two texts may differ to be called equally hard, nats.
CALIPER = 0.1


def toy_run(context: Context, number: int) -> dict[str, Any]:
    """One toy: trained, its heads found, masked beside controls, and texts of every kind scored."""
    steps, count, draws, pool = context.choose(smoke=(4, 6, 3, 12), small=(250, 64, 20, 200), full=(1000, 200, 20, 400))
    generator = context.torch_generator(f"toy {number}")
    model = toy.trained(steps, generator)
    found = measure_heads(model, toy.probes(count, generator), threshold=THRESHOLD)
    chosen = _chosen(found)
    held = toy.records(8 * count, generator)
    late = measure_heads(model, [_one_row_late(probe) for probe in toy.probes(count, generator)], threshold=THRESHOLD)
    controls = _later_controls(found, draws, number)
    singles = {f"layer {layer}": [(layer, head) for head in range(toy.HEADS)] for layer in range(toy.LAYERS)}
    return {
        "accuracy": toy.recall(model, held),
        "scores": found.scores,
        "chosen": chosen,
        "halves": found.halves().value,
        "above": float((found.scores > THRESHOLD).mean()),
        "late": float(late.scores.max()),
        "masked": toy.recall(model, held, chosen),
        "controls": [toy.recall(model, held, control) for control in controls],
        "control heads": controls,
        "by layer": {name: toy.recall(model, held, heads) for name, heads in singles.items()},
        "by number": [toy.recall(model, held, chosen[:size]) for size in range(len(chosen) + 1)],
        "kinds": _kinds(model, chosen, controls[0] if controls else [(toy.LAYERS - 1, 0)], pool, generator),
        "students": _students(context, model, chosen, generator),
    }


def _later_controls(found: HeadScores, draws: int, seed: int) -> list[list[Head]]:
    """Controls of the same layers or later ones; none where these have too few other heads."""
    try:
        return found.controls(draws, seed=seed, later=True) if found.chosen else []
    except ArgumentError:
        return []


def _one_row_late(probe: CopySample) -> CopySample:
    """The probe with the row of the answer itself in place of the one that predicts it."""
    return CopySample(
        text="",
        ids=probe.ids,
        answer=probe.answer,
        answer_rows=probe.answer_rows + 1,
        value_span=probe.value_span,
    )


def _kinds(
    model: Any, heads: Sequence[Head], control: Sequence[Head], pool: int, generator: torch.Generator
) -> dict[str, Any]:
    """AI, loss and repetition of texts of every kind, of one length, each record with a text of every other kind whose
    loss is nearest to its own; and of records whose answers are guessed."""
    texts = {kind: toy.documents(kind, pool, generator) for kind in toy.KINDS}
    base = {kind: toy.mean_losses(model, ids) for kind, ids in texts.items()}
    picked: dict[str, list[int]] = {kind: [] for kind in toy.KINDS}
    for number, loss in enumerate(base["recall"][: pool // 2]):
        nearest = {kind: int((base[kind] - loss).abs().argmin()) for kind in toy.KINDS[1:]}
        if all(abs(float(base[kind][i] - loss)) <= CALIPER for kind, i in nearest.items()):
            picked["recall"].append(number)
            for kind, i in nearest.items():
                picked[kind].append(i)
    result: dict[str, Any] = {"matched": len(picked["recall"]), "tried": pool // 2}
    for kind, numbers in picked.items():
        ids = texts[kind][numbers] if numbers else texts[kind][:0]
        result[kind] = {"loss": base[kind][numbers], "repetition": [_repetition(row) for row in ids.tolist()]}
        for name, masked in (("influence", heads), ("random", control)):
            rise = toy.mean_losses(model, ids, masked) - base[kind][numbers] if numbers else torch.zeros(0)
            result[kind][name] = rise / base[kind][numbers]
    wrong = toy.guessed(toy.records(pool // 2, generator), generator)
    before = toy.mean_losses(model, wrong)
    result["guessed"] = (toy.mean_losses(model, wrong, heads) - before) / before
    return result


def _repetition(ids: Sequence[int]) -> float:
    """The share of pairs of neighbours that stood before."""
    pairs = list(itertools.pairwise(ids))
    return 1 - len(set(pairs)) / len(pairs)


def _students(context: Context, teacher: Any, heads: Sequence[Head], generator: torch.Generator) -> dict[str, float]:
    """The recall loss of models of twice the width after few steps on a corpus with a fifth of its texts seen twice as
    often: those of highest AI, drawn at random, of lowest loss."""
    steps, size = context.choose(smoke=(3, 20), small=(24, 800), full=(1000, 4000))
    corpus = torch.cat([toy.documents(kind, size // len(toy.KINDS), generator) for kind in toy.KINDS])
    base = toy.mean_losses(teacher, corpus)
    influence = (toy.mean_losses(teacher, corpus, heads) - base) / base
    top = -(-len(corpus) // 5)
    extra = {
        "influence": influence.argsort(descending=True)[:top],
        "random": torch.randperm(len(corpus), generator=generator)[:top],
        "perplexity": base.argsort()[:top],
    }
    held = toy.records(400, generator)
    seed = int(torch.randint(2**31, (1,), generator=generator))
    found = {}
    for name, picked in extra.items():
        both = torch.cat([corpus, corpus[picked]])
        student = toy.trained(steps, torch.Generator().manual_seed(seed), width=2 * toy.WIDTH, corpus=both)
        with torch.no_grad():
            found[name] = float(toy.token_losses(student, held)[:, toy.ASKING].double().mean())
        found[f"{name}, share of records"] = float((picked < size // len(toy.KINDS)).double().mean())
    return found


def planted_run(context: Context, number: int) -> dict[str, Any]:
    """A decoder with planted retrieval heads, one group in each layer: are they found, and what does masking do?"""
    count, draws = context.choose(smoke=(2, 2), small=(4, 20), full=(40, 20))
    seed = context.seeds(number + 1)[number] % 2**31
    model = planted.planted_model(seed)
    samples = [planted.lookup(seed + i) for i in range(count)]
    probes = [probe for sample in samples for probe in _planted_probes(sample)]
    found = measure_heads(model, probes, threshold=PLANTED)
    wanted = {
        (layer, planted.GROUPS * shared + i)
        for layer, shared in planted.planted_heads(seed)
        for i in range(planted.GROUPS)
    }

    def accuracy(heads: Sequence[Head]) -> float:
        with use(model, UniformHeads(heads=heads)):
            return planted.lookup_accuracy(model, samples)

    chosen = _chosen(found)
    controls = matched_controls(chosen, (planted.LAYERS, planted.KV_HEADS * planted.GROUPS), number, draws=draws)
    return {
        "found": len(wanted & set(chosen)) / len(wanted),
        "wrong": len(set(chosen) - wanted),
        "intact": planted.lookup_accuracy(model, samples),
        "masked": accuracy(chosen),
        "frequency": _by_frequency(samples),
        "controls": [accuracy(control) for control in controls],
    }


def _by_frequency(samples: Sequence[planted.Lookup]) -> float:
    """The accuracy of naming, for every question, the value that most facts of the text have."""
    right: list[bool] = []
    for sample in samples:
        facts = sample.ids[sample.ids >= planted.Layout.fact] - planted.Layout.fact
        for attribute, value in zip(sample.attributes.tolist(), sample.values.tolist(), strict=True):
            counts = torch.bincount(facts // planted.VALUES**attribute % planted.VALUES)
            right.append(int(counts.argmax()) == value)
    return float(np.mean(right))


def _chosen(found: HeadScores) -> list[Head]:
    """The chosen heads; of a model that has learned nothing the two highest, so that a short run goes through."""
    return found.chosen or [pair for pair, _ in found.ranking()[:2]]


def _planted_probes(sample: planted.Lookup) -> list[CopySample]:
    """The first three questions, one for each attribute, each with the fact that its row has to find as the answer."""
    probes = []
    for row in sample.rows[: planted.ATTRIBUTES].tolist():
        key = (int(sample.ids[0, row]) - planted.Layout.question) % planted.KEYS
        first = planted.Layout.fact + key * planted.VALUES**planted.ATTRIBUTES
        inside = (sample.ids[0] >= first) & (sample.ids[0] < first + planted.VALUES**planted.ATTRIBUTES)
        place = int(inside.nonzero()[0, 0])
        ids = torch.cat([sample.ids[0, : row + 1], sample.ids[0, place : place + 1]])[None]
        probes.append(
            CopySample(
                text="", ids=ids, answer=ids[0, -1:], answer_rows=torch.tensor([row]), value_span=(place, place + 1)
            )
        )
    return probes


def host(context: Context) -> tuple[Any, Any, list[str]]:
    """The real model with its tokenizer and the sentences of the probes; a random one of a few layers at smoke size."""
    from headway.hosts import default_text, load

    if context.size == "smoke":
        from headway.hosts.tiny import tiny_host

        model = tiny_host("llama", num_hidden_layers=3, max_position_embeddings=2048)[0]
        return model, Letters(), [f"no {i} says {3 * i} times" for i in range(30)]
    model, tokenizer = load("smollm2")
    most = 30
    return model, tokenizer, probe_sentences(default_text().text, tokenizer, most=most)


class Letters:
    """A tokenizer of letters, for a host without one."""

    all_special_ids: tuple[int, ...] = ()

    def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
        return {"input_ids": [8 + ord(letter) % 90 for letter in text]}


def make_probes(context: Context, tokenizer: Any, sentences: list[str], part: str) -> list[RetrievalProbe]:
    """Probes to find heads by, or others to judge them on: no text is in both parts."""
    tokens, key_length = context.choose(smoke=(900, 8), small=(448, 8), full=(1024, 32))
    counts = context.choose(smoke=(4, 2), small=(12, 8), full=(200, 50))
    half = len(sentences) // 2
    if part == "found":
        return retrieval_probes(
            tokenizer, sentences[:half], count=counts[0], tokens=tokens, seed=context.seed, key_length=key_length
        )
    return retrieval_probes(
        tokenizer, sentences[half:], count=counts[1], tokens=tokens, seed=context.seed + 1, key_length=key_length
    )


def detected(context: Context) -> dict[str, Any]:
    """Retrieval heads of the real model."""
    model, tokenizer, sentences = host(context)
    found = measure_heads(model, make_probes(context, tokenizer, sentences, "found"), fraction=0.05)
    if context.size != "smoke":
        found.require()
    finite = np.isfinite(found.scores)
    return {
        "json": found.to_json(),
        "accuracy": found.accuracy,
        "halves": found.halves().value,
        "above": float((found.scores[finite] > THRESHOLD).mean()),
        "chosen": _chosen(found),
        "highest": found.ranking()[:20],
    }


@torch.no_grad()
def masked_copying(context: Context, heads: list[Head], scores: HeadScores) -> dict[str, Any]:
    """The share of answer tokens of held-out probes that the model predicts: intact, without the object, with the heads
    masked, and with as many others of the same layers."""
    model, tokenizer, sentences = host(context)
    draws = context.choose(smoke=2, small=8, full=20)
    controls = scores.controls(draws, seed=context.seed) if scores.chosen else [[(1, 0)], [(2, 1)]]
    sets = {"masked": heads, **{f"control {i}": control for i, control in enumerate(controls)}}
    probes = make_probes(context, tokenizer, sentences, "held")
    right: dict[str, list[float]] = {}
    with use(model):
        for probe in context.track(probes, "masking", len(probes)):
            first = min(layer for some in sets.values() for layer, _ in some)
            with recorded_inputs(model) as inputs:
                right.setdefault("intact", []).append(_right(model, probe.ids, probe))
            right.setdefault("floor", []).append(_right(model, _without_object(tokenizer, probe), probe))
            for name, some in sets.items():
                with use(model, UniformHeads(heads=some)), starting_at(model, first, inputs[first]):
                    right.setdefault(name, []).append(_right(model, probe.ids, probe))
    return {"right": right, "controls": controls}


def _without_object(tokenizer: Any, probe: RetrievalProbe) -> Tensor:
    """The probe's ids without the object: what can be said of the answer from its own beginning alone."""
    before = probe.text[: -len(probe.value)].replace(probe.object, "{}")
    return torch.tensor([[*opening_ids(tokenizer), *plain_ids(tokenizer, before), *probe.answer.tolist()]])


def _right(model: Any, ids: Tensor, probe: CopySample) -> float:
    """The share of answer tokens, the last ones of `ids`, that are predicted right."""
    count = len(probe.answer)
    rows = torch.arange(ids.shape[1] - count - 1, ids.shape[1] - 1)
    inputs = {"logits_to_keep": rows} if takes_logits_to_keep(model) else {}
    logits = model(input_ids=ids, use_cache=False, **inputs).logits[0]
    return float(((logits if inputs else logits[rows]).argmax(-1) == probe.answer).double().mean())


def scored_texts(context: Context, heads: list[Head]) -> dict[str, Any]:
    """AI of lists whose entries are asked for again with the right answers, of the same lists with wrong ones, and of
    plain prose of about the same length."""
    model, tokenizer, sentences = host(context)
    count = context.choose(smoke=2, small=6, full=100)
    random = context.generator("texts")
    right, wrong = zip(*(_list_text(random) for _ in range(count)), strict=True)
    prose = [" ".join(sentences[i] for i in random.choice(len(sentences), 6, replace=False)) for _ in range(count)]
    scorer = InfluenceScorer(model, tokenizer, heads)
    found = {}
    for name, texts in (("right", right), ("wrong", wrong), ("prose", prose)):
        scores = scorer.score(texts)
        found[name] = {
            "influence": [score.influence for score in scores],
            "loss": [score.base_loss for score in scores],
            "tokens": [score.tokens for score in scores],
        }
    return found | {"shares prefix": scorer.shares_prefix}


def _list_text(random: np.random.Generator) -> tuple[str, str]:
    """A list of places with numbers and questions about it, answered rightly, and with other numbers of the list."""
    names = ["Alder", "Birch", "Cedar", "Elm", "Hazel", "Maple", "Oak", "Willow"]
    numbers = random.choice(np.arange(100, 1000), len(names), replace=False).tolist()
    listed = "".join(f"{name} Street has number {number}.\n" for name, number in zip(names, numbers, strict=True))
    asked = random.permutation(len(names))[:4].tolist()
    texts = []
    for shift in (0, 3):
        lines = [f"Which number has {names[i]} Street? It is {numbers[(i + shift) % len(names)]}.\n" for i in asked]
        texts.append(listed + "".join(lines))
    return texts[0], texts[1]
