from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headway.door import AttentionCall, Forward, Site
from headway.errors import ArgumentError, HostError, NumericError
from headway.kernels.head_scores import (
    duplicate_score,
    earlier_places,
    induction_score,
    mass_at,
    mean_distance,
    normalised_entropy,
    previous_token_score,
    receiver_score,
    retrieval_score,
    row_entropy,
    streaming_mass,
    vertical_scores,
)
from headway.kernels.rows import RowSample, all_rows, stratified_rows
from headway.look.probes import RetrievalResult, measure_induction, measure_retrieval, retrieval_chance
from headway.look.roles import RoleObserver, SiteRoles, role_metrics
from headway.tasks.copying import CopySample, key_value_copy, ordinary_ids, repeated_random_tokens
from headway.tasks.sentences import piece_offsets, sentence_spans, split_sentences

#: Logit of a planted key above all others: the rest gets less than exp(-60).
SURE = 60.0


def planted_call(targets: list[list[int]], **fields) -> AttentionCall:
    """One head per list; head h of row i reads key targets[h][i] and nothing else."""
    index = torch.tensor(targets)
    heads, tokens = index.shape
    query = torch.nn.functional.one_hot(index, tokens).float()[None] * SURE
    key = torch.eye(tokens).expand(1, heads, -1, -1)
    return AttentionCall.from_tensors(query, key, key, scale=1.0, **{"causal": True, **fields})


def random_call(tokens: int, heads: int = 4, kv_heads: int = 2, *, seed: int = 0, **fields) -> AttentionCall:
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(1, heads, tokens, 8, generator=generator) * 2
    key, value = (torch.randn(1, kv_heads, tokens, 8, generator=generator) for _ in range(2))
    return AttentionCall.from_tensors(query, key, value, **{"causal": True, **fields})


def observed(call: AttentionCall, **options) -> SiteRoles:
    observer = RoleObserver(**options)
    observer.start()
    observer.observe(call, call.value)
    return observer.result()[0]


@pytest.fixture(scope="module")
def characters():
    """A fast tokenizer with one token per byte."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<s>": 0} | {c: i + 1 for i, c in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")


@pytest.fixture(scope="module")
def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=300,
        max_position_embeddings=512,
        initializer_range=0.5,
    )
    return LlamaForCausalLM(config).eval()


class SlowTokenizer:
    """One token per character, a BOS in front, no offsets."""

    is_fast = False

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": ([0] if add_special_tokens else []) + [ord(c) for c in text]}


# Scores of planted heads


def test_previous_token_head_scores_one_and_sink_head_zero():
    tokens = 12
    call = planted_call([[max(i - 1, 0) for i in range(tokens)], [0] * tokens, list(range(tokens))])
    roles = observed(call).scores
    previous, sink, self_reading = roles["previous_token"].mean.tolist()
    assert previous == pytest.approx(1)
    assert self_reading == pytest.approx(0)
    assert sink == pytest.approx(1 / (tokens - 1)), "only row 1 has token 0 before it"
    assert previous_token_score(call.weights(), torch.arange(tokens))[0].tolist() == pytest.approx([1, 1 / 11, 0])


def test_induction_and_duplicate_heads_score_one_on_their_own_task_and_zero_on_the_other():
    length = 16
    ids = repeated_random_tokens(range(100), length, 2, torch.Generator().manual_seed(3))[0]
    second = torch.arange(length, 2 * length)
    stay = list(range(length))
    call = planted_call(
        [stay + [i - length + 1 for i in second.tolist()], stay + [i - length for i in second.tolist()]]
    )
    weights = call.weights(second)
    assert induction_score(weights, second, ids)[0].tolist() == pytest.approx([1, 0], abs=1e-6)
    assert duplicate_score(weights, second, ids)[0].tolist() == pytest.approx([0, 1], abs=1e-6)


def test_rows_without_an_earlier_place_are_left_out():
    ids = torch.tensor([5, 6, 5, 7])
    assert earlier_places(ids).tolist() == [-1, -1, 0, -1]
    call = planted_call([[0, 1, 1, 3]])
    assert induction_score(call.weights(), torch.arange(4), ids).item() == pytest.approx(1)
    assert math.isnan(induction_score(call.weights(torch.tensor([0, 1])), torch.tensor([0, 1]), ids).item())


def test_mass_at_an_invisible_key_is_nan():
    call = random_call(5)
    rows = torch.arange(5)
    found = mass_at(call.weights(), rows + 1 - 5 * (rows == 4), call.visible())
    assert found[..., :4].isnan().all()
    assert torch.equal(found[..., 4], call.weights()[..., 4, 0])


def test_streaming_counts_exactly_the_first_sinks_and_the_last_window():
    rows = torch.tensor([20])
    weights = torch.eye(24)[None, :, None]
    sink_mass, streaming = streaming_mass(weights, rows, sinks=4, window=6)
    assert sink_mass[0, :, 0].nonzero().flatten().tolist() == [0, 1, 2, 3]
    assert streaming[0, :, 0].nonzero().flatten().tolist() == [0, 1, 2, 3, 15, 16, 17, 18, 19, 20]
    _, both = streaming_mass(weights, rows, sinks=0, window=3, both_sides=True)
    assert both[0, :, 0].nonzero().flatten().tolist() == [18, 19, 20, 21, 22]


def test_sinks_inside_the_window_count_once():
    _, streaming = streaming_mass(torch.full((1, 1, 1, 8), 1 / 8), torch.tensor([5]), sinks=4, window=6)
    assert streaming.item() == pytest.approx(6 / 8)


def test_sink_head_streams_and_distant_head_does_not():
    tokens = 40
    call = planted_call([[0] * tokens, list(range(tokens)), [min(i, 10) for i in range(tokens)]])
    scores = observed(call, sinks=4, window=8).scores
    assert scores["streaming"].mean[:2].tolist() == pytest.approx([1, 1])
    assert scores["streaming"].mean[2].item() == pytest.approx(18 / 40), "rows 0..17 have key min(i, 10) in sight"
    assert scores["sink_mass"].mean.tolist() == pytest.approx([1, 4 / 40, 4 / 40])
    assert scores["distance"].mean[0].item() == pytest.approx(np.arange(tokens).mean())
    assert scores["entropy"].mean.tolist() == pytest.approx([0, 0, 0], abs=1e-6)


def test_uniform_attention_scores_the_chance_level_of_every_role():
    tokens, call = 50, random_call(50)
    call = call.replace(query=torch.zeros_like(call.query))
    spans = [(4 + 4 * s, 8 + 4 * s) for s in range(11)]
    roles = observed(call, sentences=spans, sinks=2, window=5)
    visible = np.arange(1, tokens + 1)
    expected = {
        "previous_token": (1 / visible[1:]).mean(),
        "sink_mass": (np.minimum(visible, 2) / visible).mean(),
        "streaming": (np.minimum(visible, 7) / visible).mean(),
        "entropy": np.log(visible).mean(),
        "normalised_entropy": 1.0,
        "distance": ((visible - 1) / 2).mean(),
    }
    for name, value in expected.items():
        assert roles.uniform[name] == pytest.approx(value, rel=1e-5), name
        assert roles.scores[name].mean.tolist() == pytest.approx([value] * 4, rel=1e-5), name
    assert roles.receiver.tolist() == pytest.approx([roles.uniform["receiver"]] * 4, rel=1e-3)


def test_statistics_of_weights_follow_their_definitions():
    weights = torch.tensor([0.5, 0.25, 0.25, 0.0]).view(1, 1, 1, 4)
    assert row_entropy(weights).item() == pytest.approx(1.5 * math.log(2))
    assert mean_distance(weights, torch.tensor([3])).item() == pytest.approx(0.5 * 3 + 0.25 * 2 + 0.25)
    entropy = torch.tensor([[[math.log(4), 0.0]]])
    relative = normalised_entropy(entropy, torch.tensor([[[4.0, 1.0]]]))[0, 0]
    assert relative[0].item() == pytest.approx(1)
    assert relative[1].isnan()


# Retrieval


def copy_sample() -> CopySample:
    ids = torch.tensor([[9, 1, 2, 3, 9, 9, 1, 2, 3]])
    return CopySample(
        text="", ids=ids, answer=torch.tensor([1, 2, 3]), answer_rows=torch.tensor([5, 6, 7]), value_span=(1, 4)
    )


def test_copy_head_scores_one_and_first_token_head_zero():
    sample = copy_sample()
    copying = [0, 0, 0, 0, 0, 1, 2, 3, 0]
    call = planted_call([copying, [0] * 9])
    argmax = call.weights(sample.answer_rows).argmax(-1)[0]
    assert retrieval_score(argmax, sample.ids[0], sample.answer, sample.value_span).tolist() == [1, 0]


def test_the_row_of_the_answer_token_itself_gives_another_score():
    sample = copy_sample()
    call = planted_call([[0, 0, 0, 0, 0, 1, 2, 3, 0]])
    late = call.weights(sample.answer_rows + 1).argmax(-1)[0]
    assert retrieval_score(late, sample.ids[0], sample.answer, sample.value_span).tolist() == [0]


def test_the_right_token_outside_the_value_is_no_hit_and_a_wrong_one_inside_neither():
    sample = copy_sample()
    argmax = torch.tensor([[6, 6, 6], [2, 3, 1], [1, 0, 3], [-1, -1, -1]])
    scores = retrieval_score(argmax, sample.ids[0], sample.answer, sample.value_span)
    assert scores.tolist() == pytest.approx([0, 0, 2 / 3, 0])


def test_retrieval_chance_is_the_score_of_a_random_key():
    sample = copy_sample()
    scores = []
    for row, token in zip(sample.answer_rows.tolist(), sample.answer.tolist(), strict=True):
        keys = torch.arange(row + 1)
        hits = retrieval_score(keys[:, None], sample.ids[0], torch.tensor([token]), sample.value_span)
        scores.append(hits.mean().item())
    assert retrieval_chance(sample) == pytest.approx(np.mean(scores))


def result_with_accuracy(accuracy: float) -> RetrievalResult:
    site = Site(name="a", layer=0, heads=2)
    table = torch.tensor([[0.0, 1.0], [0.0, 1.0]])
    return RetrievalResult(
        sites=[site], scores=[table.mean(0)], per_sample=[table], accuracy=accuracy, solved=0.0, chance=0.0
    )


def test_a_model_that_does_not_copy_gets_a_warning_instead_of_a_ranking():
    assert result_with_accuracy(0.9).warning() is None
    warning = result_with_accuracy(0.1).warning()
    assert "10%" in warning
    assert "does not solve the copy task" in warning


def test_equal_halves_correlate_fully():
    assert result_with_accuracy(0.9).halves() == pytest.approx(1)


# Receiver score


def test_one_spike_has_the_kurtosis_of_its_closed_form():
    sentences, proximity = 14, 4
    means = np.zeros((2, sentences, sentences))
    means[0, :, 3] = 1.0
    means[1] = 0.2
    count = sentences - proximity
    expected = (count**2 - 3 * count + 3) / (count - 1) - 3
    scores = receiver_score(means, proximity=proximity)
    assert scores[0] == pytest.approx(expected)
    assert scores[1] == -np.inf, "a head that looks at all alike"


def test_vertical_scores_leave_out_near_sentences_and_end_with_nan():
    means = np.arange(36, dtype=float).reshape(6, 6)
    scores = vertical_scores(means, proximity=2)
    assert np.isnan(scores[-2:]).all()
    assert scores[:4].tolist() == [np.mean([12, 18, 24, 30]), np.mean([19, 25, 31]), np.mean([26, 32]), 33]


def test_invisible_sentence_pairs_do_not_pull_the_mean_down():
    means = np.full((8, 8), 0.5)
    means[6:, 0] = np.nan
    assert vertical_scores(means, proximity=2)[0] == 0.5


def test_ranks_take_out_the_depth_of_a_row():
    means = np.random.default_rng(0).random((10, 10))
    deeper = means / np.arange(1, 11)[:, None]
    plain, scaled = (vertical_scores(m, ranks=True) for m in (means, deeper))
    assert plain[:6].tolist() == pytest.approx(scaled[:6].tolist())
    assert vertical_scores(means)[:6].tolist() != pytest.approx(vertical_scores(deeper)[:6].tolist())


def test_too_few_sentences_raise_in_the_score_and_leave_it_out_in_the_observer():
    with pytest.raises(ArgumentError, match="got 7 sentences, expected at least 8"):
        receiver_score(np.ones((7, 7)))
    roles = observed(random_call(20), sentences=[(4, 10), (10, 20)])
    assert roles.receiver is None
    assert "receiver" not in {m.name for m in role_metrics([roles])}


def test_the_head_that_looks_back_at_one_sentence_is_the_receiver():
    tokens = 64
    spans = [(4 * s, 4 * s + 4) for s in range(16)]
    looks_back = [i if i < 24 else 20 + i % 4 for i in range(tokens)]
    even = [i // 2 for i in range(tokens)]
    roles = observed(planted_call([looks_back, even, [0] * tokens]), sentences=spans)
    assert int(roles.receiver.argmax()) == 0
    assert roles.receiver[2] == -np.inf, "the sentence with the sinks is left out, so a sink head receives nothing"
    assert roles.block_means[0, 10, 4].item() == pytest.approx(0.25), "sentence 5 is the fifth without the first"


# Collection


@settings(max_examples=25, deadline=None)
@given(
    tokens=st.integers(18, 40),
    block=st.integers(1, 45),
    causal=st.booleans(),
    window=st.integers(1, 50),
    seed=st.integers(0, 99),
)
def test_streamed_scores_equal_those_of_the_full_map(tokens, block, causal, window, seed):
    call = random_call(tokens, seed=seed, causal=causal)
    spans = [(2 * s, 2 * s + 2) for s in range(9)]
    roles = observed(call, sentences=spans, sinks=0, window=window, proximity=3, block=block)
    weights, rows = call.weights()[0], torch.arange(tokens)
    gap = rows[:, None] - rows
    near = (gap < window) & (gap > -window) if not causal else (gap < window) & (gap >= 0)
    expected = {
        "previous_token": weights.diagonal(-1, 1, 2).mean(-1),
        "streaming": (weights * near).sum(-1).mean(-1),
        "entropy": row_entropy(weights).mean(-1),
        "distance": (weights * gap.abs()).sum(-1).mean(-1),
    }
    for name, value in expected.items():
        assert roles.scores[name].mean.tolist() == pytest.approx(value.tolist(), abs=1e-4), name
    if not causal:
        full = weights[:, :18, :18].reshape(4, 9, 2, 9, 2).mean((2, 4))
        assert torch.allclose(roles.block_means, full, atol=1e-5)


def test_all_rows_sampled_is_exact_and_some_rows_are_their_weighted_mean():
    call = random_call(60)
    full = observed(call)
    every = observed(call, rows=all_rows(60))
    assert torch.equal(every.scores["entropy"].mean, full.scores["entropy"].mean)
    assert every.exact
    sample = stratified_rows(60, 15, torch.Generator().manual_seed(1))
    some = observed(call, rows=sample, block=4)
    rows = row_entropy(call.weights(sample.index))[0].double()
    expected = (rows * sample.weight).sum(-1) / sample.weight.sum()
    assert not some.exact
    assert some.scores["entropy"].mean.tolist() == pytest.approx(expected.tolist(), rel=1e-5)
    assert (some.scores["entropy"].low < some.scores["entropy"].mean).all()


def test_sampled_rows_count_with_their_weight_in_sentence_means():
    call = planted_call([[i if i < 20 else (3 if i % 2 else 0) for i in range(40)]])
    sample = RowSample(
        index=torch.tensor([20, 21, 30, 31]),
        weight=torch.tensor([1.0, 3.0, 2.0, 2.0]),
        stratum=torch.tensor([0, 0, 1, 1]),
        total=40,
    )
    roles = observed(call, sentences=[(2, 4), (20, 30), (30, 40)], rows=sample, sinks=0, proximity=1)
    assert roles.block_means[0, 1, 0].item() == pytest.approx(3 / 4 / 2)
    assert roles.block_means[0, 2, 0].item() == pytest.approx(1 / 2 / 2)


def test_left_padding_changes_no_score():
    plain = random_call(30)
    pad = 5

    def padded(x: torch.Tensor) -> torch.Tensor:
        return torch.cat([torch.full((1, x.shape[1], pad, x.shape[3]), 3.0), x], 2)

    real = (torch.arange(30 + pad) >= pad)[None]
    call = plain.replace(
        query=padded(plain.query),
        key=padded(plain.key),
        value=padded(plain.value),
        mask=real[:, None, None].expand(1, 1, 30 + pad, -1),
        forward=Forward(padding=real),
    )
    left, right = observed(plain, window=6), observed(call, window=6)
    for name, estimate in left.scores.items():
        assert right.scores[name].mean.tolist() == pytest.approx(estimate.mean.tolist(), rel=1e-4), name
        assert right.uniform[name] == pytest.approx(left.uniform[name], rel=1e-5), name


def test_observer_refuses_what_it_cannot_read():
    call = random_call(10)
    observer = RoleObserver()
    observer.start()
    observer.observe(call, call.value)
    with pytest.raises(ArgumentError, match="second one"):
        observer.observe(call, call.value)
    observer.start()
    with pytest.raises(ArgumentError, match="expected one forward over the whole text"):
        observer.observe(call.replace(query=call.query[:, :, -1:]), call.value)
    with pytest.raises(ArgumentError, match="Sample the rows of this text"):
        observed(call, rows=all_rows(9))
    with pytest.raises(NumericError, match="NaN"):
        observed(call.replace(query=call.query * torch.nan))
    with pytest.raises(ArgumentError, match="window"):
        RoleObserver(window=0)
    assert not observer.acts_at(Site(name="x", layer=0, kind="cross"))


# Sentences


@settings(max_examples=100, deadline=None)
@given(st.text(st.sampled_from("ab .?!\n é"), max_size=80))
def test_sentences_join_to_the_text_and_tokens_never_overlap(text):
    spans = split_sentences(text)
    assert "".join(text[a:b] for a, b in spans) == text
    offsets = [(i, i + 1) for i in range(len(text))]
    tokens = sentence_spans(text, offsets)
    assert tokens == spans, "with one token per character both agree"


def test_an_unterminated_last_sentence_is_kept():
    text = "This is the first one. And here is an open end"
    assert [text[a:b] for a, b in split_sentences(text)] == ["This is the first one. ", "And here is an open end"]


def test_short_sentences_join_the_next_and_a_short_end_the_one_before():
    text = "Wait. This one is long enough.\n\nSo is this one here! Ok."
    assert [text[a:b] for a, b in split_sentences(text)] == [
        "Wait. This one is long enough.\n\n",
        "So is this one here! Ok.",
    ]


def test_marks_inside_numbers_do_not_end_a_sentence():
    assert len(split_sentences("The value of pi is 3.14159 as we know")) == 1


def test_a_token_belongs_to_the_sentence_of_its_last_character():
    text = "First things first. Second things second."
    offsets = [(0, 0), (0, 12), (12, 18), (18, 19), (19, 26), (26, 33), (33, 41)]
    assert sentence_spans(text, offsets) == [(1, 4), (4, 7)]


def test_offsets_of_another_text_are_refused():
    with pytest.raises(ArgumentError, match="offset_mapping"):
        sentence_spans("short", [(0, 3), (3, 9)])
    with pytest.raises(ArgumentError, match="backwards"):
        sentence_spans("short text", [(3, 5), (0, 3)])


def test_pieces_stand_in_for_missing_offsets():
    text, offsets = piece_offsets(["Hello ", "", "there."])
    assert text == "Hello there."
    assert offsets == [(0, 6), (6, 6), (6, 12)]


# Copy tasks


def test_repeated_tokens_are_one_row_of_different_ids_twice_over():
    ids = repeated_random_tokens(range(10, 40), 20, 2, torch.Generator().manual_seed(0), prefix=[1])[0]
    assert ids[0] == 1
    assert torch.equal(ids[1:21], ids[21:])
    assert ids[1:21].unique().numel() == 20
    again = repeated_random_tokens(range(10, 40), 20, 2, torch.Generator().manual_seed(0), prefix=[1])[0]
    assert torch.equal(ids, again)


def test_a_vocabulary_too_small_for_the_row_is_refused():
    with pytest.raises(ArgumentError, match="got 3 different ids"):
        repeated_random_tokens([1, 2, 3, 3], 4, 2, torch.Generator())
    with pytest.raises(ArgumentError, match="at least 2"):
        repeated_random_tokens(range(9), 4, 1, torch.Generator())


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), records=st.integers(3, 12))
def test_the_answer_stands_once_in_the_records_and_is_predicted_by_the_rows_before_it(characters, seed, records):
    sample = key_value_copy(characters, records, torch.Generator().manual_seed(seed))
    ids, (start, stop) = sample.ids[0], sample.value_span
    value = characters.decode(sample.answer)
    listing = sample.text[: sample.text.index("}")]
    assert listing.count(value) == 1
    assert sample.text.endswith(f'" is "{value}')
    assert torch.equal(ids[start:stop], sample.answer)
    assert torch.equal(ids[sample.answer_rows + 1], sample.answer)
    assert int(sample.answer_rows[-1]) + 2 == ids.numel()
    asked = [line.split('"')[1] for line in sample.text.splitlines() if line.startswith("The value of")]
    assert len(set(asked)) == 3, "two demonstrations and the question ask for different keys"


def test_the_same_seed_gives_the_same_sample_with_and_without_offsets(characters):
    fast, slow = (
        key_value_copy(tokenizer, 5, torch.Generator().manual_seed(4)) for tokenizer in (characters, SlowTokenizer())
    )
    assert fast.text == slow.text
    shift = 1
    assert slow.value_span == tuple(s + shift for s in fast.value_span), "the slow one has a BOS in front"
    assert torch.equal(slow.answer_rows, fast.answer_rows + shift)
    assert slow.ids[0, 0] == 0


def test_a_tokenizer_that_writes_the_answer_differently_is_refused():
    class Wandering(SlowTokenizer):
        count = 0

        def __call__(self, text, add_special_tokens=True):
            self.count += 1
            return {"input_ids": [1000 + self.count] * len(text)}

    with pytest.raises(HostError, match="retrieval score cannot be measured"):
        key_value_copy(Wandering(), 3)


def test_fewer_records_than_questions_are_refused(characters):
    with pytest.raises(ArgumentError, match="expected at least 3"):
        key_value_copy(characters, 2)


def test_ordinary_ids_leave_out_special_tokens(characters):
    ids = ordinary_ids(characters)
    assert 0 not in ids.tolist()
    assert ids.numel() == len(characters) - 1


# Through the door


def eager_weights(model, ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
    model.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            return model(ids, output_attentions=True).attentions
    finally:
        model.set_attn_implementation("sdpa")


def test_measured_induction_equals_the_scores_of_the_eager_maps(llama):
    result = measure_induction(llama, range(1, 300), length=24, samples=2, prefix=[0], seed=5)
    generator = torch.Generator().manual_seed(5)
    rows = torch.arange(24, 48) + 1
    expected = []
    for _ in range(2):
        ids = repeated_random_tokens(range(1, 300), 24, 2, generator, prefix=[0])
        weights = eager_weights(llama, ids)
        expected.append(torch.stack([induction_score(w[:, :, rows], rows, ids[0])[0] for w in weights]))
    assert torch.allclose(torch.stack(result.induction), torch.stack(expected).mean(0).double(), atol=1e-5)
    assert [s.layer for s in result.sites] == [0, 1]
    assert result.chance == pytest.approx((1 / (rows + 1)).mean().item())


def test_measured_retrieval_equals_the_arg_max_of_the_eager_maps(llama, characters):
    steps = []
    result = measure_retrieval(
        llama, characters, samples=4, records=3, seed=3, progress=lambda done, total: steps.append((done, total))
    )
    generator = torch.Generator().manual_seed(3)
    expected = []
    for _ in range(4):
        task = key_value_copy(characters, 3, generator)
        weights = eager_weights(llama, task.ids)
        argmax = torch.stack([w[0, :, task.answer_rows].argmax(-1) for w in weights])
        expected.append(retrieval_score(argmax, task.ids[0], task.answer, task.value_span))
    assert torch.allclose(torch.stack(result.scores), torch.stack(expected).mean(0))
    assert torch.stack(result.scores).max() > 0, "else nothing is compared"
    assert steps == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert not result.usable, "random weights do not copy"


def test_measuring_restores_training_mode_and_implementation(llama):
    llama.train()
    try:
        measure_induction(llama, range(300), length=8, samples=1)
        assert llama.training
        assert llama.model.layers[0].self_attn.training
    finally:
        llama.eval()
    assert llama.config._attn_implementation == "sdpa"
    assert not llama.model.layers[0].self_attn._forward_pre_hooks


def test_measuring_refuses_hosts_and_sizes_that_cannot_work(llama):
    from transformers import BertConfig, BertForMaskedLM

    with pytest.raises(ArgumentError, match="at most 512, the positions"):
        measure_induction(llama, range(300), length=300, samples=1)
    with pytest.raises(ArgumentError, match="without next-token logits"):
        measure_induction(llama.model, range(300), length=8, samples=1)
    with pytest.raises(ArgumentError, match="samples"):
        measure_induction(llama, range(300), length=8, samples=0)
    small = BertConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=50)
    with pytest.raises(ArgumentError, match="bidirectional"):
        measure_induction(BertForMaskedLM(small), range(50), length=8, samples=1)


def test_one_forward_fills_every_layer(llama):
    from headway.door import observe

    observer = RoleObserver()
    ids = torch.arange(40)[None]
    with torch.no_grad(), observe(llama, observer):
        llama(ids)
    roles = observer.result()
    weights = eager_weights(llama, ids)
    for site, full in zip(roles, weights, strict=True):
        assert site.scores["entropy"].mean.tolist() == pytest.approx(row_entropy(full)[0].mean(-1).tolist(), rel=1e-4)


@pytest.mark.real
def test_smollm2_copies_by_few_heads_that_also_do_induction():
    from headway.hosts import load

    model, tokenizer = load("smollm2")
    retrieval = measure_retrieval(model, tokenizer, samples=2)
    induction = measure_induction(model, ordinary_ids(tokenizer), length=48, samples=1)
    copying = torch.stack(retrieval.scores)
    repeating = torch.stack(induction.induction)
    assert retrieval.usable
    assert copying.max() > 0.8
    assert (copying > 0.1).sum() < 0.1 * copying.numel(), "retrieval heads are few"
    assert repeating.flatten()[copying.argmax()] > 10 * induction.chance


# Metrics


def test_metrics_line_up_by_site_and_hold_only_finite_numbers_or_nan():
    call = planted_call([[0] * 64, list(range(64))], layer=0)
    spans = [(4 * s, 4 * s + 4) for s in range(16)]
    first = observed(call, sentences=spans)
    missing = Site(name="layers.7", layer=7, heads=3)
    metrics = {m.name: m for m in role_metrics([first], sites=[missing, first.site])}
    grid = metrics["sink_mass"].array()
    assert grid.shape == (2, 3)
    assert np.isnan(grid[0]).all()
    assert grid[1, :2].tolist() == pytest.approx([1, 4 / 64])
    assert np.isnan(grid[1, 2])
    assert np.isnan(metrics["receiver"].array()[1, 0]), "−inf has no colour"
    assert metrics["previous_token"].low is None
    assert "first 4 and the last 64" in metrics["streaming"].description
    assert f"Uniform attention scores {first.uniform['sink_mass']:.3g}." in metrics["sink_mass"].description
    json.dumps([m.values for m in metrics.values()])


def test_sampled_roles_come_with_intervals():
    call = random_call(60)
    roles = observed(call, rows=stratified_rows(60, 15, torch.Generator().manual_seed(0)))
    metric = role_metrics([roles])[0]
    assert (np.asarray(metric.low) <= metric.array()).all()
    assert (metric.array() <= np.asarray(metric.high)).all()


def test_task_scores_carry_the_interval_over_their_samples(llama):
    induction = measure_induction(llama, range(300), length=8, samples=4)
    metric = next(m for m in role_metrics(induction=induction) if m.name == "duplicate_token")
    drawn = torch.stack([table[:, 1] for table in induction.per_sample], 1).numpy()
    half = 3.18245 * drawn.std(0, ddof=1) / 2
    assert np.asarray(metric.high) == pytest.approx(drawn.mean(0) + half, rel=1e-3)
    assert np.asarray(metric.low) == pytest.approx(drawn.mean(0) - half, rel=1e-3)
    one = measure_induction(llama, range(300), length=8, samples=1)
    assert np.isnan(np.asarray(role_metrics(induction=one)[0].low)).all(), "one sample has no interval"


def test_task_metrics_stand_on_their_own_sites():
    retrieval = result_with_accuracy(0.9)
    (metric,) = role_metrics(retrieval=retrieval)
    assert metric.name == "retrieval"
    assert metric.values == [[0.0, 1.0]]
    assert "A random key scores 0" in metric.description
