"""The harness's model: its numbers are the harness's own for dense attention, and a method changes them."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'headway[eval]'")

import lm_eval
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

import headway
from headway.compare.baselines import PlainWindow
from headway.errors import ArgumentError
from headway.evaluate import register
from headway.methods.budget import budgeted, stages_at_budget
from headway.methods.sinks.streaming_llm import StreamingLLM
from tests.look.tiny import TEXT, byte_tokenizer, tiny_llama

#: A task that is all here: choose the word that follows.
DOCS = [
    {"question": f"{TEXT[20 * i : 20 * i + 60]} Then", "choices": [" yes", " no", f" {i}"], "answer": i % 3}
    for i in range(4)
]


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer(bos=True)


def attach(model, tokenizer, **options):
    return register()(model, tokenizer=tokenizer, **options)


def task(name: str, **fields):
    import datasets

    base = {
        "task": name,
        "custom_dataset": lambda **_: {"test": datasets.Dataset.from_list(DOCS)},
        "test_split": "test",
        "doc_to_text": "{{question}}",
        "num_fewshot": 0,
    }
    return base | fields


CHOICE = {
    "output_type": "multiple_choice",
    "doc_to_choice": "choices",
    "doc_to_target": "answer",
    "metric_list": [{"metric": "acc"}],
}
GENERATE = {
    "output_type": "generate_until",
    "doc_to_target": "{{choices[answer]}}",
    "generation_kwargs": {"until": ["e"], "max_gen_toks": 8},
    "metric_list": [{"metric": "exact_match"}],
}
ROLLING = {
    "output_type": "loglikelihood_rolling",
    "doc_to_text": "",
    "doc_to_target": "{{question}}",
    "metric_list": [{"metric": "word_perplexity"}, {"metric": "byte_perplexity"}],
}


def evaluate(lm, *tasks):
    # Without the harness's own tasks, whose thousands of files it would read each time.
    own = TaskManager(include_defaults=False)
    return lm_eval.simple_evaluate(lm, tasks=list(tasks), bootstrap_iters=0, log_samples=True, task_manager=own)


@pytest.mark.parametrize("fields", [CHOICE, GENERATE, ROLLING], ids=["choice", "generate", "rolling"])
@pytest.mark.parametrize("scoring", ["decode", "forward"])
def test_dense_numbers_are_those_of_the_harnesss_own_model(model, tokenizer, fields, scoring):
    toy = task("toy", **fields)
    mine = evaluate(attach(model, tokenizer, scoring=scoring), toy)
    theirs = evaluate(HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1), toy)
    for one, other in zip(mine["samples"]["toy"], theirs["samples"]["toy"], strict=True):
        if fields is CHOICE:
            for (score, greedy), (their_score, their_greedy) in zip(one["filtered_resps"], other["filtered_resps"],
                                                                    strict=True):  # fmt: skip
                assert score == pytest.approx(their_score, abs=1e-3)
                assert greedy == their_greedy
        elif fields is GENERATE:
            assert one["filtered_resps"] == other["filtered_resps"]
        else:
            assert one["filtered_resps"][0] == pytest.approx(other["filtered_resps"][0], abs=1e-2)


def test_a_share_of_one_changes_nothing_and_a_small_one_does(model, tokenizer):
    toy = task("toy", **CHOICE)
    scores = {}
    for budget in (None, 1.0, 0.2):
        options = {} if budget is None else {"method": "streaming-llm", "budget": budget}
        found = evaluate(attach(model, tokenizer, **options), toy)
        scores[budget] = [score for sample in found["samples"]["toy"] for score, _ in sample["filtered_resps"]]
    assert scores[1.0] == pytest.approx(scores[None], abs=1e-3)
    assert scores[0.2] != pytest.approx(scores[None], abs=1e-2)


@pytest.mark.parametrize("fields", [CHOICE, GENERATE, ROLLING], ids=["choice", "generate", "rolling"])
@pytest.mark.parametrize("method", ["streaming-llm", "duo-attention", "flexprefill", "recycled-attention"])
def test_a_whole_task_at_the_full_budget_has_the_results_of_dense(model, tokenizer, method, fields):
    """Metrics and every response, from the harness's own evaluation."""
    toy = task("toy", **fields)
    dense = evaluate(attach(model, tokenizer), toy)
    full = evaluate(attach(model, tokenizer, method=method, budget=1.0), toy)
    assert full["config"]["method"] == method
    for name, value in dense["results"]["toy"].items():
        if isinstance(value, float):
            assert full["results"]["toy"][name] == pytest.approx(value, rel=1e-3), name
    for one, other in zip(dense["samples"]["toy"], full["samples"]["toy"], strict=True):
        if fields is GENERATE:
            assert one["filtered_resps"] == other["filtered_resps"]
        elif fields is ROLLING:
            assert one["filtered_resps"][0] == pytest.approx(other["filtered_resps"][0], abs=1e-2)
        else:
            for (score, greedy), (full_score, full_greedy) in zip(
                one["filtered_resps"], other["filtered_resps"], strict=True
            ):
                assert full_score == pytest.approx(score, abs=1e-3)
                assert full_greedy == greedy


def test_a_task_whose_answer_stands_outside_the_window_is_lost_by_the_method_and_solved_by_dense(tokenizer):
    """The first word of the context decides the option. A host that copies it is right on every question; behind a
    window that has dropped it, it is right on none of them: the harness's accuracy falls from 1 to 0."""
    host = first_token_host()
    docs = [
        {"question": f"{letter}{'.' * 60}", "choices": ["x", "y", "z"], "answer": number}
        for number, letter in enumerate("xyz")
    ]
    import datasets

    toy = task("toy", **CHOICE) | {
        "custom_dataset": lambda **_: {"test": datasets.Dataset.from_list(docs)}, "target_delimiter": "",
    }  # fmt: skip
    plain = byte_tokenizer()
    dense = evaluate(attach(host, plain), toy)
    lost = evaluate(attach(host, plain, stages=[PlainWindow(window=16)]), toy)
    full = evaluate(attach(host, plain, stages=[PlainWindow(window=100)]), toy)
    found = [one["results"]["toy"]["acc,none"] for one in (dense, full, lost)]
    assert found[:2] == [1.0, 1.0]
    assert found[2] < 0.5


def first_token_host():
    """One layer whose every row attends to letters above all else, and says the letter that it reads."""
    host = tiny_llama(num_hidden_layers=1, hidden_size=64, num_attention_heads=1, num_key_value_heads=1, head_dim=64)
    letters = byte_tokenizer()("xyz", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        for parameter in host.parameters():
            if parameter.ndim >= 2:
                parameter.zero_()
        width, mark = host.config.hidden_size, 63
        embedding, attention = host.model.embed_tokens.weight, host.model.layers[0].self_attn
        # Every token has a constant in its last dimension but one; a letter has a mark and a dimension of its own.
        embedding[:, width - 2] = 1.0
        for number, letter in enumerate(letters):
            embedding[letter, number] = 4.0
            embedding[letter, mark] = 4.0
            host.lm_head.weight[letter, 8 + number] = 1.0
        # The slowest rotary pair is all but still: its first half stands at dimension 31, its second at 63.
        attention.q_proj.weight[mark, width - 2] = 40.0
        attention.k_proj.weight[mark, mark] = 4.0
        for number in range(len(letters)):
            attention.v_proj.weight[number, number] = 1.0
            attention.o_proj.weight[8 + number, number] = 1.0
    return host


def test_a_continuation_is_scored_as_it_would_be_decoded(model, tokenizer):
    """log P of each token, given a cache under the method, by hand."""
    stage = StreamingLLM(sinks=2, window=10)
    lm = attach(model, tokenizer, stages=[stage])
    context, continuation = lm.tok_encode(TEXT[:50]), lm.tok_encode(" yes.")
    score, _ = lm.score(context, continuation)
    assert score == pytest.approx(decoded(model, [stage], context, continuation), abs=1e-4)


def decoded(model, stages, context, continuation) -> float:
    total, past = 0.0, None
    with headway.use(model, *stages), torch.no_grad():
        pieces = [context, *[[token] for token in continuation]]
        for piece, token in zip(pieces, continuation, strict=False):
            out = model(input_ids=torch.tensor([piece]), past_key_values=past, use_cache=True)
            past = out.past_key_values
            total += float(out.logits[0, -1].log_softmax(-1)[token])
    return total


@pytest.mark.parametrize("slug", sorted(budgeted()))
def test_any_method_scores_and_writes_as_its_stages_do(model, tokenizer, slug):
    """At a budget as by hand, of each request's own length; at the full one as dense."""
    dense, full, part = (
        attach(model, tokenizer, method=name, budget=share)
        for name, share in (("dense", 1.0), (slug, 1.0), (slug, 0.4))
    )
    context, continuation = dense.tok_encode(TEXT[:120]), dense.tok_encode(" yes.")
    acting = stages_at_budget(slug, 0.4, tokens=len(context) + len(continuation), model=model)
    score, _ = part.score(context, continuation)
    assert score == pytest.approx(decoded(model, acting, context, continuation), abs=1e-4)
    assert full.score(context, continuation)[0] == pytest.approx(dense.score(context, continuation)[0], abs=1e-3)
    options = {"max_new_tokens": 6, "pad_token_id": tokenizer.eos_token_id}
    with headway.use(model, *stages_at_budget(slug, 0.4, tokens=len(context) + 6, model=model)):
        written = model.generate(torch.tensor([context]), **options)[0, len(context) :]
    assert part._generate(TEXT[:120], 6, [], {}) == tokenizer.decode(written, skip_special_tokens=True)
    assert full._generate(TEXT[:120], 6, [], {}) == dense._generate(TEXT[:120], 6, [], {})


def test_results_say_which_method_ran_and_what_it_read(model, tokenizer):
    lm = attach(model, tokenizer, method="streaming-llm", budget=0.3, tokens=100)
    found = evaluate(lm, task("toy", **CHOICE))
    assert found["config"]["method"] == "streaming-llm"
    assert found["config"]["budget"] == 0.3
    assert 0 < found["config"]["density"] < 1
    assert found["results"]["toy"]["acc,none"] in {0.0, 0.25, 0.5, 0.75, 1.0}


def test_a_budget_is_a_share_of_each_request_unless_a_length_is_given(model, tokenizer):
    lm = attach(model, tokenizer, method="streaming-llm", budget=0.5)
    assert lm.stages(100)[0].window < lm.stages(400)[0].window
    fixed = attach(model, tokenizer, method="streaming-llm", budget=0.5, tokens=200)
    assert fixed.stages(100) is fixed.stages(400)


def test_a_long_context_loses_its_beginning(model, tokenizer):
    lm = attach(model, tokenizer, max_length=32)
    context, continuation = lm.tok_encode(TEXT), lm.tok_encode(" yes")
    kept = context[-(33 - len(continuation)) :]
    assert lm.score(context, continuation) == lm.score(kept, continuation)
    with pytest.raises(ArgumentError, match="max_length"):
        lm.score([5], list(range(5, 38)))
    with pytest.raises(ArgumentError, match="max_gen_toks"):
        lm._generate(TEXT, 40, [], {})


def test_the_model_is_as_it_was_after_a_task(model, tokenizer):
    ids = torch.tensor([tokenizer.encode(TEXT)])
    with torch.no_grad():
        before = model(input_ids=ids).logits
        evaluate(attach(model, tokenizer, method="streaming-llm", budget=0.2), task("toy", **CHOICE))
        assert torch.equal(model(input_ids=ids).logits, before)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"method": "streaming-lm"}, "streaming-llm"),
        ({"method": "streaming-llm", "budget": 0.0}, "budget"),
        ({"method": "streaming-llm", "budget": 1.5}, "budget"),
        ({"scoring": "both"}, "forward"),
        ({"batch_size": 8}, "batch_size"),
        ({"batch_size": "auto"}, "batch_size"),
        ({"max_length": 0}, "max_length"),
        ({"tokens": 0}, "tokens"),
        ({"tokenizer": None}, "tokenizer"),
    ],
)
def test_arguments_that_cannot_be_are_refused_at_once(model, tokenizer, options, words):
    with pytest.raises(ArgumentError, match=words):
        register()(model, **({"tokenizer": tokenizer} | options))


def test_the_command_runs_a_task_that_is_defined_by_a_file(tmp_path):
    """`--model headway` with a YAML task and documents from a file, without a download."""
    tiny_llama().save_pretrained(tmp_path / "model")
    byte_tokenizer(bos=True).save_pretrained(tmp_path / "model")
    (tmp_path / "docs.jsonl").write_text("\n".join(json.dumps(doc) for doc in DOCS), encoding="utf-8")
    (tmp_path / "toy.yaml").write_text(
        f"""
task: toy_file
dataset_path: json
dataset_kwargs:
  data_files:
    test: {tmp_path / "docs.jsonl"}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: choices
doc_to_target: answer
metric_list:
  - metric: acc
""",
        encoding="utf-8",
    )
    arguments = [
        "run", "--model", "headway", "--model_args",
        f"pretrained={tmp_path / 'model'},method=streaming-llm,budget=0.25", "--tasks", "toy_file",
        "--include_path", str(tmp_path), "--output_path", str(tmp_path / "out"),
    ]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "headway.evaluate", *arguments], capture_output=True, text=True, timeout=240,
        env=os.environ | { "HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    (stored,) = (tmp_path / "out").rglob("results*.json")
    found = json.loads(stored.read_text(encoding="utf-8"))
    assert found["config"]["method"] == "streaming-llm"
    assert "acc,none" in found["results"]["toy_file"]
