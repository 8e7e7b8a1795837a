"""What gradient saliency of PosIR costs in memory: it is bounded by the batch, not by the documents.

The bar is a ratio: peak memory with eight times the documents at most 1.25 times that of one batch. Four documents at
once are shown against one at a time, which is what the batch buys and costs.
"""

from __future__ import annotations

from benchmarks.harness import compare
from headway.hosts import default_text, load
from headway.methods.diagnosis.posir import TransformersEncoder, saliency

QUESTION = "What does bad weather do to a roof?"
CHARACTERS, BATCH, TIMES = 1600, 4, 8
BAR = 1.25


def posir_saliency(documents: int = BATCH, repeats: int = 3) -> None:
    """MiniLM on documents of about 350 tokens: eight batches of four beside one, and one beside single documents."""
    model, tokenizer = load("minilm")
    encoder = TransformersEncoder(model=model, tokenizer=tokenizer, name="minilm")
    text = default_text().text
    few = [(QUESTION, text[i * CHARACTERS : (i + 1) * CHARACTERS]) for i in range(documents)]
    pairs = few * TIMES
    settings = {"model": "minilm", "characters": CHARACTERS, "batch": BATCH}
    grown = compare(
        "posir_saliency_documents",
        method=lambda: saliency(encoder, pairs, batch=BATCH),
        baseline=lambda: saliency(encoder, few, batch=BATCH),
        labels=(f"{len(pairs)} documents", f"{documents} documents"),
        repeats=repeats,
        memory=True,
        settings=settings,
    )
    compare(
        "posir_saliency_batch",
        method=lambda: saliency(encoder, few, batch=BATCH),
        baseline=lambda: saliency(encoder, few, batch=1),
        labels=(f"batches of {BATCH}", "one by one"),
        repeats=repeats,
        memory=True,
        settings=settings,
    )
    many, one = (peak.rise if peak else None for peak in (grown.method_peak, grown.baseline_peak))
    if many and one:
        print(f"peak memory: {many / one:.2f} × with {TIMES} times the documents (bar {BAR})")


if __name__ == "__main__":
    posir_saliency()
