"""RULER-like tasks through the whole of `compare`: a host with the answers gets every point, one without loses them."""

from __future__ import annotations

import json

import pytest
from benchmarks.ruler import facts_of, table

import headway
from headway.compare import Comparison
from headway.compare.baselines import PlainWindow
from headway.errors import ArgumentError
from headway.hosts import default_text
from headway.tasks.ruler import RULER
from tests.contracts.test_cache_policy import KeepLast
from tests.look.tiny import byte_tokenizer, tiny_llama
from tests.tasks.ruler_solver import solving

TOKENIZER = byte_tokenizer()
HOST = tiny_llama(num_hidden_layers=1, max_position_embeddings=4096)
METHODS = [("keep last", KeepLast(20)), ("window", PlainWindow(window=64))]


def compare(tasks, *, change=list, methods=METHODS, **options) -> Comparison:
    settings = {"tokens": 2800, "count": 1, "repeats": 2, "new_tokens": 2} | options
    with solving(HOST, TOKENIZER, change):
        return headway.compare(HOST, TOKENIZER, default_text(), methods=methods, tasks=tasks, **settings)


@pytest.fixture(scope="module")
def found() -> Comparison:
    return compare(list(RULER))


@pytest.mark.parametrize("task", list(RULER))
def test_a_host_that_reads_the_prompt_gets_every_point_in_both_modes_dense_and_with_methods(found, task):
    for point in found.points:
        assert [point.score(task, mode).value for mode in ("blind", "aware")] == [1.0, 1.0], point.label
        assert point.score(task, "blind").name == "references found"
    assert {(task, "blind"), (task, "aware")} <= set(found.judged)


def test_every_task_by_name_has_as_many_samples_as_were_asked_for():
    found = compare(["fwe", "vt"], count=3, methods=METHODS[:1], modes=["aware"])
    assert found.qualities == [("fwe", "aware"), ("vt", "aware")]
    assert [found.dense.score(task, "aware").n for task in ("fwe", "vt")] == [3, 3]
    assert found.dense.score("fwe", "aware").value == 1.0


def test_ruler_is_the_mean_of_the_thirteen_with_the_score_of_each_beside_it():
    """The host leaves out its last word: tasks with one wanted string lose it, those with n keep (n − 1) / n."""
    found = compare(["ruler"], change=lambda words: words[:-1], methods=METHODS[:1], modes=["blind"])
    beside = {score.name: score.value for score in found.dense.scores if not score.primary}
    assert beside == pytest.approx(
        dict.fromkeys(RULER, 0.0)
        | {"niah_multivalue": 3 / 4, "niah_multiquery": 3 / 4, "vt": 4 / 5, "cwe": 9 / 10, "fwe": 2 / 3}
    )
    assert found.dense.score("ruler", "blind").value == pytest.approx(sum(beside.values()) / 13)


def test_a_host_that_answers_wrong_gets_nothing_and_the_page_says_that_no_loss_could_show():
    found = compare(["niah_single_1"], change=lambda words: [word[::-1] + "x" for word in words], methods=METHODS[:1])
    assert [found.dense.score("niah_single_1", mode).value for mode in ("blind", "aware")] == [0.0, 0.0]
    assert found.judged == []
    assert any("niah_single_1, blind (0)" in sentence for sentence in found.warnings)


def test_the_benchmark_stores_every_sample_and_shows_both_modes(found):
    facts = json.loads(json.dumps(facts_of(found, 3)))
    for point in found.points:
        stored = facts["points"][point.label]
        assert stored["scores"] == {f"{s.task}, {s.mode}": s.parts for s in point.scores}
        assert stored["density_by_task"] == {t: d["all"] for t, d in point.density_by_task.items() if "all" in d}
    facts["points"]["window"]["means"] |= {"vt, blind": 0.25}
    del facts["points"]["keep last"]["means"]["vt, aware"]
    head, _, *rows = table(facts).splitlines()
    assert head == "| task | dense | keep last | window |"
    assert rows[list(RULER).index("vt")] == "| `vt` | 1 / 1 | 1 / – | 0.25 / 1 |"
    assert len(rows) == len(RULER)


def test_an_unknown_task_of_ruler_names_the_nearest_and_a_short_prompt_says_how_many_tokens_it_takes():
    with pytest.raises(ArgumentError, match="Did you mean 'niah_single_1'"):
        compare(["niah_single1"])
    with pytest.raises(ArgumentError, match=r"tokens: got 300 for cwe, expected at least \d"):
        compare(["cwe"], tokens=300)
