"""Retrieval probes and heads: planted heads are found, others are not, and a model without any is refused."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch

import headway
from headway.errors import ArgumentError, HostError
from headway.evidence.recipes import _planted_retrieval as planted
from headway.hosts.tiny import tiny_host
from headway.kernels.head_scores import retrieval_score
from headway.methods.diagnosis.attention_influence.detection import (
    HeadScores,
    NoRetrievalHeadsError,
    detect_heads,
    measure_heads,
)
from headway.statistics.later_controls import later_controls
from headway.tasks.copying import CopySample
from headway.tasks.retrieval_probe import probe_sentences, retrieval_probe, retrieval_probes, write_probes

WORDS = ["river", "stone", "cloud", "maple", "engine", "garden", "letter", "silver", "window", "candle", "bridge"]


def sentences(count: int = 60) -> list[str]:
    random = np.random.default_rng(0)
    return [f"The {' '.join(random.choice(WORDS, 7))} number {i} ends here." for i in range(count)]


class Words:
    """A fast tokenizer of the library with words, single letters and marks, which joins a full stop and a quote."""

    def __new__(cls) -> Any:
        from tokenizers import Regex, Tokenizer
        from tokenizers.models import WordLevel
        from tokenizers.pre_tokenizers import Split
        from transformers import PreTrainedTokenizerFast

        splitter = Split(Regex(r'\."|[A-Za-z]+|\d|\s+|.'), behavior="isolated")
        known: dict[str, int] = {"<unk>": 0, '."': 1, ".": 2, '"': 3, " ": 4, "\n": 5, ",": 6, ":": 7, "{": 8, "}": 9}
        for word in [*WORDS, "The", "number", "ends", "here", "Key", "Answer", *"0123456789"]:
            known.setdefault(word, len(known))
        core = Tokenizer(WordLevel(known, unk_token="<unk>"))
        core.pre_tokenizer = splitter
        return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return Words()


def test_probes_fill_the_budget_and_no_more(tokenizer):
    for number in range(4):
        probe = retrieval_probe(tokenizer, sentences(), tokens=700, key_length=8, number=number)
        assert 640 < probe.ids.shape[1] <= 700


def test_the_answer_stands_once_in_the_object_and_is_found_by_its_offsets(tokenizer):
    for probe in retrieval_probes(tokenizer, sentences(), count=5, tokens=600, key_length=8):
        whole = json.loads(probe.object)
        assert whole[probe.asked] == probe.value
        assert probe.object.count(probe.value) == 1
        start, stop = probe.value_span
        assert tokenizer.decode(probe.ids[0, start:stop]).replace(" ", "") in probe.value.replace(" ", "")
        assert torch.equal(probe.ids[0, start:stop], probe.answer)
        assert torch.equal(probe.ids[0, probe.answer_rows + 1], probe.answer)


def test_a_token_that_reaches_over_the_quote_belongs_to_no_answer(tokenizer):
    probe = retrieval_probe(tokenizer, sentences(), tokens=500, key_length=8)
    assert 1 not in probe.answer.tolist()
    assert probe.ids[0, probe.value_span[1]] == 1


def test_keys_are_unique_and_the_question_is_about_another_than_the_demonstrations(tokenizer):
    for probe in retrieval_probes(tokenizer, sentences(), count=5, tokens=600, key_length=8):
        pairs = json.loads(probe.object, object_pairs_hook=list)
        assert len({key for key, _ in pairs}) == len(pairs)
        assert len(set(probe.shown)) == 3
        assert probe.asked not in probe.shown
        assert all(f'Key: {key}\nAnswer: "' in probe.text for key in (*probe.shown, probe.asked))


def test_a_seed_gives_the_same_bytes(tokenizer, tmp_path):
    files = [
        write_probes(tmp_path / name, retrieval_probes(tokenizer, sentences(), count=3, tokens=500, seed=seed))
        for name, seed in (("a", 4), ("b", 4), ("c", 5))
    ]
    assert files[0].read_bytes() == files[1].read_bytes() != files[2].read_bytes()
    assert len(files[0].read_text(encoding="utf-8").splitlines()) == 3


def test_sentences_are_short_different_and_need_no_escapes(tokenizer):
    text = 'Too short. He said "no" to the long and winding road today. The river bends near the old stone bridge now. '
    found = probe_sentences(text * 2, tokenizer)
    assert found == ["The river bends near the old stone bridge now."]


def test_probe_arguments_are_checked(tokenizer):
    with pytest.raises(ArgumentError, match="tokens: got 40, expected at least"):
        retrieval_probe(tokenizer, sentences(), tokens=40)
    with pytest.raises(ArgumentError, match="sentences: got 3"):
        retrieval_probe(tokenizer, sentences(3), tokens=400)
    with pytest.raises(ArgumentError, match="count"):
        retrieval_probes(tokenizer, sentences(), count=0, tokens=400)


def test_a_tokenizer_that_writes_no_sentence_alike_is_refused():
    class Counting:
        all_special_ids = ()

        def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
            self.calls = getattr(self, "calls", 0) + 1
            return {"input_ids": [self.calls] * len(text.split())}

    with pytest.raises(HostError, match="other tokens for a sentence"):
        retrieval_probe(Counting(), sentences(), tokens=4000)


def test_a_head_that_copies_scores_one_and_one_that_rests_on_the_first_token_none():
    ids = torch.tensor([0, 5, 6, 7, 1, 5, 6, 7])
    answer, span = ids[5:], (1, 4)
    assert float(retrieval_score(torch.tensor([1, 2, 3]), ids, answer, span)) == 1
    assert float(retrieval_score(torch.tensor([0, 0, 0]), ids, answer, span)) == 0


def lookups(count: int, *, row_shift: int = 0) -> list[CopySample]:
    """First questions of the planted decoder, each with the fact that its row has to find as the answer."""
    samples = []
    for seed in range(count):
        found = planted.lookup(seed)
        row = int(found.rows[0])
        first = planted.Layout.fact + (int(found.ids[0, row]) - planted.Layout.question) * planted.VALUES**3
        inside = (found.ids[0] >= first) & (found.ids[0] < first + planted.VALUES**3)
        place = int(inside.nonzero()[0, 0])
        ids = torch.cat([found.ids[0, : row + 1], found.ids[0, place : place + 1]])[None]
        rows = torch.tensor([row + row_shift])
        samples.append(
            CopySample(text="", ids=ids, answer=ids[0, -1:], answer_rows=rows, value_span=(place, place + 1))
        )
    return samples


@pytest.fixture(scope="module")
def found() -> HeadScores:
    return measure_heads(planted.planted_model(0), lookups(6), threshold=0.5)


def test_the_planted_heads_and_no_others_are_found(found):
    layer, shared = planted.planted_heads(0)[0]
    wanted = {(layer, planted.GROUPS * shared + i) for i in range(planted.GROUPS)}
    assert set(found.chosen) == wanted
    assert all(score == 1 for pair, score in found.ranking() if pair in wanted)
    assert all(score == 0 for pair, score in found.ranking() if pair not in wanted)


def test_scores_are_shares(found):
    assert float(found.per_sample.min()) >= 0
    assert float(found.per_sample.max()) <= 1
    assert found.per_sample.shape == (6, planted.LAYERS, planted.KV_HEADS * planted.GROUPS)


def test_the_row_of_the_answer_itself_tells_something_else(found):
    late = measure_heads(planted.planted_model(0), lookups(6, row_shift=1), threshold=0.5)
    assert late.scores.max() < 0.5 < found.scores.max()


def test_halves_agree_on_planted_heads(found):
    assert found.halves().value == pytest.approx(1)


def test_a_model_that_does_not_solve_the_probes_is_refused(found):
    with pytest.raises(NoRetrievalHeadsError, match=r"no retrieval heads detected.*solves none of 6") as raised:
        found.require()
    assert raised.value.scores is found


def scores(table: list[list[float]], *, accuracy: float = 1.0, **choice: Any) -> HeadScores:
    return HeadScores(
        layers=tuple(range(len(table))),
        per_sample=np.array([table, table], dtype=float),
        accuracy=np.full(2, accuracy),
        **choice,
    )


def test_a_share_takes_the_highest_and_ties_go_by_layer_and_head():
    table = [[0.2, 0.9, 0.3, 0.9], [0.9, 0.1, 0.05, 0.0]]
    assert scores(table, fraction=0.25).chosen == [(0, 1), (0, 3)]
    assert scores(table, threshold=0.3).chosen == [(0, 1), (0, 3), (1, 0), (0, 2)]


def test_heads_that_hardly_score_are_never_chosen():
    table = [[0.9, 0.05], [0.02, 0.0]]
    assert scores(table, fraction=1.0).chosen == [(0, 0)]
    assert scores(table, threshold=0.01).chosen == [(0, 0)]


def test_no_head_above_the_threshold_is_a_refusal_and_no_empty_ranking():
    with pytest.raises(NoRetrievalHeadsError, match=r"highest score is 0.08, expected at least 0.1"):
        scores([[0.08, 0.0]], fraction=0.5).require()
    with pytest.raises(NoRetrievalHeadsError, match=r"below the threshold 0.9"):
        scores([[0.5, 0.0]], threshold=0.9).require()


def test_only_solved_samples_count():
    table = np.zeros((3, 1, 2))
    table[0, 0, 0], table[1:, 0, 1] = 1.0, 1.0
    mixed = HeadScores(layers=(0,), per_sample=table, accuracy=np.array([0.9, 0.2, 0.3]), threshold=0.5)
    assert mixed.chosen == [(0, 0)]
    assert "1 of 3 samples count" in mixed.warnings()[0]


def test_a_share_of_few_heads_is_warned_of():
    assert any("threshold" in line for line in scores([[0.9] * 4] * 3, fraction=0.05).warnings())
    assert not scores([[0.9] * 4] * 3, threshold=0.5).warnings()


def test_scores_survive_json(found):
    again = HeadScores.from_json(found.to_json())
    assert again.chosen == found.chosen
    assert np.array_equal(again.per_sample, found.per_sample)
    assert again.host == found.host
    assert json.loads(found.to_json())["chosen"] == [list(pair) for pair in found.chosen]


def test_layers_with_fewer_heads_survive_json():
    table = np.array([[[0.5, 0.6], [0.7, np.nan]]])
    ragged = HeadScores(layers=(1, 3), per_sample=table, accuracy=np.ones(1), threshold=0.1, excluded=(0, 2))
    again = HeadScores.from_json(ragged.to_json())
    assert again.chosen == [(3, 0), (1, 1), (1, 0)]
    assert "Layers 0, 2" in again.warnings()[-1]


def test_controls_come_from_layers_that_have_heads():
    table = np.array([[[0.9, 0.8], [0.0, 0.0], [0.0, 0.0]]])
    hybrid = HeadScores(layers=(1, 3, 5), per_sample=table, accuracy=np.ones(1), threshold=0.5, excluded=(0, 2, 4))
    for control in hybrid.controls(draws=10, later=True):
        assert len(control) == 2
        assert {layer for layer, _ in control} <= {3, 5}


def test_controls_are_from_the_same_layers():
    table = [[0.9, 0.0, 0.0, 0.0], [0.0, 0.0, 0.8, 0.7]]
    for control in scores(table, threshold=0.5).controls(draws=10):
        assert sorted(layer for layer, _ in control) == [0, 1, 1]
        assert not {(0, 0), (1, 2), (1, 3)} & set(control)


def test_other_json_is_refused():
    for text in ("{}", "[]", "nothing", '{"format": "headway retrieval heads 1"}'):
        with pytest.raises(ArgumentError, match="Detect them again"):
            HeadScores.from_json(text)


def test_heads_belong_to_their_model(found):
    found.check(planted.planted_model(0))
    with pytest.raises(HostError, match="heads"):
        found.check(tiny_host("llama")[0])


def test_layers_without_heads_are_listed():
    host = tiny_host("lfm2")[0]
    probe = CopySample(
        text="",
        ids=torch.arange(8, 20)[None],
        answer=torch.tensor([19]),
        answer_rows=torch.tensor([10]),
        value_span=(3, 4),
    )
    result = measure_heads(host, [probe])
    with headway.use(host) as handle:
        attending = {site.layer for site in handle.sites}
    assert set(result.layers) == attending
    assert set(result.excluded) == set(range(host.config.num_hidden_layers)) - attending
    assert result.excluded


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_rows_are_read_under_any_kernel(implementation):
    probe = CopySample(
        text="",
        ids=torch.arange(8, 20)[None],
        answer=torch.tensor([18, 19]),
        answer_rows=torch.tensor([9, 10]),
        value_span=(0, 10),
    )
    host = tiny_host("llama", attn_implementation=implementation)[0]
    assert np.isfinite(measure_heads(host, [probe]).per_sample).all()


def test_a_random_model_has_no_retrieval_heads(tokenizer):
    host = tiny_host("llama", vocab_size=128, max_position_embeddings=1024)[0]
    text = " ".join(sentences())
    calls: list[tuple[int, int]] = []
    with pytest.raises(NoRetrievalHeadsError, match="no retrieval heads detected"):
        detect_heads(
            host,
            tokenizer,
            samples=2,
            tokens=400,
            key_length=8,
            text=text,
            progress=lambda done, total: calls.append((done, total)),
        )
    assert calls == [(1, 2), (2, 2)]


def test_detection_arguments_are_checked(tokenizer):
    host = tiny_host("llama", max_position_embeddings=64)[0]
    with pytest.raises(ArgumentError, match="tokens: got 512, expected at most 64"):
        detect_heads(host, tokenizer)
    with pytest.raises(ArgumentError, match=r"got 0.5 and 0.1, expected one of them"):
        measure_heads(host, lookups(1), threshold=0.5, fraction=0.1)
    with pytest.raises(ArgumentError, match="threshold: got 2"):
        measure_heads(host, lookups(1), threshold=2)
    with pytest.raises(ArgumentError, match="probes: got none"):
        measure_heads(host, [])


def test_a_model_that_looks_ahead_has_no_retrieval_scores():
    with pytest.raises(ArgumentError, match="causal language model"):
        measure_heads(tiny_host("bert", is_decoder=False)[0], lookups(1))


def test_later_controls_are_never_earlier_and_never_chosen():
    chosen = [(1, 0), (1, 1), (1, 2), (1, 3)]
    for control in later_controls(chosen, (4, 4), 0, draws=20):
        assert len(set(control)) == 4
        assert all(layer >= 2 for layer, _ in control)
    for control in later_controls([(1, 0), (2, 3)], (4, 4), 0, draws=20):
        assert sorted(layer for layer, _ in control) == [1, 2]
        assert not {(1, 0), (2, 3)} & set(control)


def test_later_controls_differ_and_are_those_of_their_seed():
    draws = later_controls([(0, 1), (0, 2)], (2, 8), 3, draws=10)
    assert draws == later_controls([(0, 1), (0, 2)], (2, 8), 3, draws=10)
    assert len({tuple(each) for each in draws}) > 3


def test_controls_that_cannot_be_had_are_refused():
    with pytest.raises(ArgumentError, match="too few others"):
        later_controls([(3, 0), (3, 1), (3, 2)], (4, 4), 0)
    with pytest.raises(ArgumentError, match="distinct"):
        later_controls([(0, 0), (0, 0)], (4, 4), 0)
    with pytest.raises(ArgumentError, match="layers < 4"):
        later_controls([(4, 0)], (4, 4), 0)
