"""`make bench`: every speed statement of the project, both sides printed, written to benchmarks/results.

make bench ARGS="capture_4096 import_headway"      # some of them
"""

from __future__ import annotations

import logging
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch

import headway
from benchmarks import (
    anchors,
    dhsa,
    diffqkv,
    duo,
    infiniretri,
    influence,
    inline,
    lightning,
    local_linear,
    models,
    normalizers,
    plan,
    posir,
    prefill,
    recycled,
    ruler,
    streaming,
    tappa,
    titans,
)
from benchmarks.executor import crossover, executor
from benchmarks.harness import compare, write_facts
from headway.door import Observer

#: What the capture benchmark reads for all heads: sinks, entropy, received mass, distances.
CAPTURED = ("first", "entropy", "received", "distance")


def host(tokens: int, **options: Any) -> tuple[Any, torch.Tensor]:
    from headway.hosts import default_text, tokenize

    model, tokenizer = headway.load("smollm2", **options)
    return model, tokenize(tokenizer, default_text(), tokens)


def plain(model: Any, ids: torch.Tensor) -> Callable[[], None]:
    def run() -> None:
        with torch.no_grad():
            model(ids, use_cache=False, logits_to_keep=1)

    return run


def captured(model: Any, ids: torch.Tensor) -> Callable[[], None]:
    def run() -> None:
        with torch.no_grad(), headway.capture(model, what=CAPTURED):
            model(ids, use_cache=False, logits_to_keep=1)

    return run


def capture_4096() -> None:
    """Sinks, entropy, received mass and distances of all 270 heads at 4,096 tokens, against the plain SDPA forward."""
    _capture(4096)


def capture_2048() -> None:
    """The same at 2,048 tokens, to stand beside the usual way."""
    _capture(2048)


def _capture(tokens: int) -> None:
    model, ids = host(tokens)
    compare(
        f"capture_{tokens}",
        captured(model, ids),
        plain(model, ids),
        labels=("capture", "plain SDPA forward"),
        repeats=3,
        memory=True,
        settings={"model": "smollm2", "tokens": tokens, "what": CAPTURED, "dtype": "float32"},
    )


def output_attentions_2048() -> None:
    """The usual way, output_attentions=True on the eager path at 2,048 tokens, against the plain SDPA forward."""
    model, ids = host(2048)
    eager, _ = host(2048, attn_implementation="eager")

    def usual() -> None:
        with torch.no_grad():
            eager(ids, use_cache=False, logits_to_keep=1, output_attentions=True)

    settings = {"model": "smollm2", "tokens": 2048, "dtype": "float32"}
    labels = ("output_attentions, eager", "plain SDPA forward")
    compare(
        "output_attentions_2048", usual, plain(model, ids), labels=labels, repeats=3, memory=True, settings=settings
    )


def nothing_attached() -> None:
    """A model whose scope was left, against one that never had a scope; and whether their outputs are the same bits."""
    model, ids = host(512)
    fresh, _ = host(512)
    with headway.capture(model, what=CAPTURED):
        pass
    with torch.no_grad():
        same = torch.equal(model(ids).logits, fresh(ids).logits)
    settings = {"model": "smollm2", "tokens": 512, "bit_identical": same}
    print(f"outputs bit-identical: {same}")
    labels = ("scope left", "never attached")
    compare("nothing_attached", plain(model, ids), plain(fresh, ids), labels=labels, repeats=15, settings=settings)


def empty_observer() -> None:
    """An observer that does nothing, against no scope: what passing the door costs."""

    class Idle(Observer):
        def observe(self, call: Any, output: Any, lse: Any = None) -> None: ...

    model, ids = host(512)
    fresh, _ = host(512)
    with headway.observe(model, Idle()):
        labels = ("idle observer", "no scope")
        compare(
            "empty_observer", plain(model, ids), plain(fresh, ids), labels=labels, repeats=15, settings={"tokens": 512}
        )


def import_headway() -> None:
    """`import torch, headway` against `import torch`, and `headway --help`, each in a process of its own."""

    def python(code: str) -> Callable[[], None]:
        return lambda: subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL) and None

    labels = ("import torch, headway", "import torch")
    compare("import_headway", python("import torch, headway"), python("import torch"), labels=labels, repeats=7)
    start = "from headway.cli import main; import sys; sys.argv = ['headway', '--help']; main()"
    labels = ("headway --help", "python -c pass")
    compare("help", python(start), python("pass"), labels=labels, repeats=7)


def look_default() -> None:
    """Wall time of `headway look` with its defaults in a fresh process: with an empty cache (the model is converted)
    and with the model in the cache."""
    import os

    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "HEADWAY_CACHE": f"{folder}/cache"}
        command = [sys.executable, "-m", "headway.cli", "look", "--out", f"{folder}/out"]

        def cold() -> None:
            subprocess.run(["rm", "-rf", f"{folder}/cache"], check=True)
            subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)

        def warm() -> None:
            subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)

        labels = ("empty cache", "model in the cache")
        compare("look_default", cold, warm, labels=labels, repeats=2, warmup=0, settings={"tokens": 2048})


def sampled_rows() -> None:
    """How often the 95 % intervals of a row-sampled capture hold the exact mean of a head, where both can run.

    A sampled capture of the first seed shows that sampled rows are rows of the whole; the others are drawn from it."""
    from headway.kernels.rows import estimate_mean, stratified_rows

    model, ids = host(4096)
    exact = captured_rows(model, ids, None)
    seeds, hits = range(40), dict.fromkeys(exact, 0.0)
    for seed in seeds:
        sample = stratified_rows(4096, 512, torch.Generator().manual_seed(seed))
        rows = {name: values[..., sample.index] for name, values in exact.items()}
        if seed == 0:
            found = captured_rows(model, ids, sample)
            worst = {name: float((found[name] - rows[name]).abs().nan_to_num().max()) for name in rows}
        for name, values in exact.items():
            mean, found_mean = values.double().mean(-1), estimate_mean(rows[name], sample)
            inside = (found_mean.low <= mean) & (mean <= found_mean.high)
            hits[name] += float(inside.double().mean()) / len(seeds)
    print(f"share of 270 heads whose 95 % interval holds the exact mean (512 of 4,096 rows, {len(seeds)} seeds):")
    for name, share in hits.items():
        print(f"  {name}: {share:.3f} (a sampled row differs from the whole by {worst[name]:.1g} at most)")
    facts = {"tokens": 4096, "rows": 512, "seeds": len(seeds), "share_covered": hits, "largest_difference": worst}
    write_facts("sampled_rows", facts)


def captured_rows(model: Any, ids: torch.Tensor, rows: Any) -> dict[str, torch.Tensor]:
    names = ("first", "entropy", "distance")
    with torch.no_grad(), headway.capture(model, what=names, rows=rows) as capture:
        model(ids, use_cache=False, logits_to_keep=1)
    return {name: capture.result().stack(name)[:, 0] for name in names}


def capture_32768() -> None:
    """Wall time of a row-sampled capture (1,024 rows) beside the plain forward at 32,768 tokens; one run of each."""
    from headway.kernels.rows import stratified_rows

    model, ids = host(8192, dtype="bfloat16")
    ids = ids.repeat(1, 4)
    sample = stratified_rows(32768, 1024, torch.Generator().manual_seed(0))
    seconds = {}
    for label, run in (
        ("plain", plain(model, ids)),
        ("row-sampled capture", lambda: sampled(model, ids, sample)),
    ):
        start = time.perf_counter()
        run()
        seconds[label] = time.perf_counter() - start
        print(f"32,768 tokens, {label}: {seconds[label]:.0f} s")
    write_facts("capture_32768", {"tokens": 32768, "rows": 1024, "dtype": "bfloat16", "seconds": seconds})


def look_32768() -> None:
    """Wall time of `headway look` on 32,768 tokens in bfloat16 (1,024 sampled rows) in a fresh process; one run."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable, "-m", "headway.cli", "look", "--tokens", "32768", "--allow-longer", "--dtype", "bfloat16",
            "--out", folder,
        ]  # fmt: skip
        start = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        seconds = time.perf_counter() - start
    print(f"headway look, 32,768 tokens: {seconds:.0f} s")
    write_facts("look_32768", {"tokens": 32768, "rows": 1024, "dtype": "bfloat16", "seconds": seconds})


def sampled(model: Any, ids: torch.Tensor, sample: Any) -> None:
    with torch.no_grad(), headway.capture(model, what=CAPTURED, rows=sample):
        model(ids, use_cache=False, logits_to_keep=1)


BENCHMARKS: dict[str, Callable[[], None]] = {
    f.__name__: f
    for f in (
        import_headway, nothing_attached, empty_observer, capture_4096, capture_2048, output_attentions_2048,
        sampled_rows, look_default, look_32768, capture_32768, executor, crossover,
        *prefill.PREFILL,
        streaming.streaming_step, streaming.streaming_against_dense, streaming.streaming_rotation,
        streaming.streaming_200k,
        duo.duo_decode, duo.duo_prefill, duo.duo_reordered,
        recycled.recycled_attention, recycled.recycled_steps, recycled.recycled_slope,
        dhsa.dhsa_call_8192, dhsa.dhsa_memory_8192, dhsa.dhsa_predictor_8192, dhsa.dhsa_prefill_4096,
        dhsa.dhsa_decode_8192,
        infiniretri.infiniretri_rows, infiniretri.infiniretri_early_stop, infiniretri.infiniretri_linear,
        tappa.tappa_prefill, tappa.tappa_decode, tappa.tappa_pruned,
        lightning.lightning_forward, lightning.lightning_padded, lightning.lightning_backward,
        lightning.lightning_linear, lightning.lightning_decode, lightning.lightning_training,
        titans.titans_dual_form, titans.titans_decode, titans.titans_chunk_sizes, titans.titans_training,
        diffqkv.diffqkv_decode, diffqkv.diffqkv_step, diffqkv.diffqkv_selected, diffqkv.diffqkv_prefill,
        local_linear.local_linear_forward, local_linear.local_linear_lengths, local_linear.local_linear_training,
        local_linear.local_linear_decode, local_linear.local_linear_solvers,
        inline.inline_grids, inline.inline_vit, inline.inline_causal, inline.inline_decode, inline.inline_residual,
        normalizers.normalizer_forward, normalizers.normalizer_training, normalizers.normalizer_explicit,
        normalizers.normalizer_decode, models.model_training,
        influence.influence_scoring, influence.corpus_selection, anchors.anchors_suppression, posir.posir_saliency,
        plan.plan_check, ruler.ruler_dense, ruler.ruler_methods,
    )
}  # fmt: skip


def main(names: list[str]) -> None:
    """Runs the named benchmarks, or all of them."""
    logging.disable(logging.INFO)
    unknown = set(names) - set(BENCHMARKS)
    if unknown:
        sys.exit(f"unknown benchmark {', '.join(sorted(unknown))}; there are {', '.join(BENCHMARKS)}")
    for name in names or BENCHMARKS:
        print(f"\n{name}: {' '.join((BENCHMARKS[name].__doc__ or '').split())}")
        BENCHMARKS[name]()


if __name__ == "__main__":
    main(sys.argv[1:])
