"""What scoring by influence costs: `InfluenceScorer` beside two plain forward passes over the same batches, and all of
`headway select` beside the scoring alone."""

from __future__ import annotations

import itertools
import json
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch

import headway
from benchmarks.harness import compare
from headway.hosts import default_text
from headway.methods.diagnosis.attention_influence import InfluenceScorer
from headway.methods.diagnosis.attention_influence.rows import batches, padded
from headway.select import select

#: Retrieval heads of SmolLM2 on probes of 288 tokens with a score of at least 0.1, highest first: 5 % of 270 heads.
HEADS = (
    (18, 6), (20, 6), (17, 3), (17, 4), (18, 7), (23, 2), (17, 5), (20, 5), (22, 7), (21, 8), (23, 7), (24, 4), (23, 8),
    (23, 1),
)  # fmt: skip
#: Characters of the texts, short and long together.
SIZES = (300, 500, 800, 1100, 1600)
BAR = 0.8
#: Texts of the corpus of `select`, and most that it may take beside scoring: walking, looking for copies, choosing and
#: writing.
CORPUS, WHOLE_BAR = 60, 1.1


def influence_scoring() -> None:
    """Tokens per second of scoring texts of 70 to 400 tokens against two plain forwards that make logits only, with the
    model's retrieval heads, and with one more head in the first layer, so that no prefix is shared."""
    model, tokenizer = headway.load("smollm2")
    texts = _texts()
    for name, heads in (("retrieval", HEADS), ("first_layer", ((0, 0), *HEADS))):
        scorer = InfluenceScorer(model, tokenizer, heads)
        shared = scorer.shares_prefix
        found = compare(
            f"influence_{name}",
            partial(scorer.score, texts),
            partial(_two_passes, scorer, texts),
            labels=("influence", "two plain forwards"),
            repeats=3,
            settings={"model": "smollm2", "texts": len(texts), "heads": heads, "shares_prefix": shared},
        )
        print(f"{name}: {1 / found.ratio.value:.2f} × the tokens/s of two plain forwards (bar {BAR})")


def corpus_selection() -> None:
    """All of `select` on a corpus of JSON lines, each time in a folder of its own, beside scoring the same texts."""
    model, tokenizer = headway.load("smollm2")
    texts = list(itertools.islice(itertools.cycle(_texts()), CORPUS))
    with tempfile.TemporaryDirectory() as folder:
        corpus, outs = Path(folder) / "corpus.jsonl", (Path(folder) / f"out-{number}" for number in itertools.count())
        # Copies would be left out, so every text says its own number.
        rows = [{"text": f"Text {number}. {text}"} for number, text in enumerate(texts)]
        corpus.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

        def whole() -> Any:
            return select(corpus, model, tokenizer, out=next(outs), heads=list(HEADS), controls=0)

        scorer = InfluenceScorer(model, tokenizer, HEADS)
        found = compare(
            "influence_select",
            whole,
            partial(scorer.score, [row["text"] for row in rows]),
            labels=("select", "scoring alone"),
            repeats=3,
            settings={"model": "smollm2", "texts": len(rows), "heads": HEADS},
        )
    print(f"select: {found.ratio.value:.2f} × the time of scoring alone (bar {WHOLE_BAR})")


def _texts() -> list[str]:
    text = default_text().text
    texts, start = [], 0
    for size in SIZES:
        texts.append(text[start : start + size])
        start += size
    return texts


def _two_passes(scorer: InfluenceScorer, texts: list[str]) -> None:
    """The model run twice over the batches that the scorer makes, with nothing attached."""
    rows = [(number, chunk) for number, text in enumerate(texts) for chunk in scorer.chunks(text)]
    with torch.no_grad():
        for batch in batches(rows, scorer.most_tokens()):
            ids = padded([chunk for _, chunk in batch])
            for _ in range(2):
                scorer.model(input_ids=ids, use_cache=False)
