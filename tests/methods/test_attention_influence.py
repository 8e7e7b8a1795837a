"""Scoring texts by masking heads: what a score is, what it does not depend on, and what it refuses."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

import headway
from headway.door import Editor, UniformHeads, capture
from headway.errors import ArgumentError
from headway.hosts.tiny import tiny_host
from headway.methods.diagnosis.attention_influence import QUARANTINED, InfluenceScorer, influence, relative_rise

HEADS = [(1, 0), (1, 3)]
TEXTS = ["a short one", "the second text is a little longer", "and " * 9, "xy", "the second text is a little longer."]


class Letters:
    """One token per character; `bos` is put in front of a text."""

    def __init__(self, bos: int | None = None) -> None:
        self.bos = bos
        self.all_special_ids = [] if bos is None else [bos]

    def __call__(self, text: str, add_special_tokens: bool = True, **options: Any) -> dict[str, list[int]]:
        ids = [8 + ord(letter) % 90 for letter in text]
        return {"input_ids": ([self.bos] if add_special_tokens and self.bos is not None else []) + ids}


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_host("llama", num_hidden_layers=3, max_position_embeddings=256)[0]


@pytest.fixture(scope="module")
def scorer(model: Any) -> InfluenceScorer:
    return InfluenceScorer(model, Letters(), HEADS, floor=4)


def mean_loss(model: Any, ids: list[int], *stages: Any) -> float:
    """The definition: cross-entropy of each token given those before it."""
    rows = torch.tensor([ids])
    with torch.no_grad(), headway.use(model, *stages):
        logits = model(input_ids=rows, use_cache=False).logits
    return float(nn.functional.cross_entropy(logits[0, :-1].double(), rows[0, 1:]))


def test_a_score_is_the_relative_rise_of_the_loss(model, scorer):
    for text, found in zip(TEXTS, scorer.score(TEXTS), strict=True):
        ids = Letters()(text)["input_ids"]
        base, masked = mean_loss(model, ids), mean_loss(model, ids, UniformHeads(heads=HEADS))
        assert found.tokens == len(ids) - 1
        assert found.base_loss == pytest.approx(base, rel=1e-5)
        assert found.masked_loss == pytest.approx(masked, rel=1e-5)
        assert found.influence == pytest.approx((masked - base) / base, abs=1e-5)
        assert found.tokens == 1 or masked != pytest.approx(base, rel=1e-5)


def test_no_heads_change_nothing(model):
    for found in InfluenceScorer(model, Letters(), []).score(TEXTS):
        assert found.masked_loss == found.base_loss
        assert found.influence == 0


def test_scoring_leaves_the_model_as_it_was(model, scorer):
    ids = torch.arange(8, 40)[None]
    model.train()
    before = model(input_ids=ids).logits
    scorer.score(TEXTS)
    assert torch.equal(model(input_ids=ids).logits, before)
    assert model.training
    model.eval()


def test_a_score_does_not_depend_on_the_batch_or_the_order(model, scorer):
    together = scorer.score(TEXTS)
    alone = [scorer.score([text])[0] for text in TEXTS]
    tight = InfluenceScorer(model, Letters(), HEADS, floor=4, batch_tokens=1).score(TEXTS)
    turned = scorer.score(TEXTS[::-1])[::-1]
    for a, b, c, d in zip(together, alone, tight, turned, strict=True):
        assert a.influence == pytest.approx(b.influence, abs=1e-5)
        assert a.influence == pytest.approx(c.influence, abs=1e-5)
        assert a.influence == pytest.approx(d.influence, abs=1e-5)
        assert a.tokens == b.tokens == c.tokens == d.tokens


def test_the_shared_prefix_gives_what_a_whole_masked_pass_gives(model, scorer, monkeypatch):
    assert scorer.shares_prefix
    whole = InfluenceScorer(model, Letters(), HEADS, floor=4)
    monkeypatch.setattr(whole, "_shareable", lambda: None)
    assert not whole.shares_prefix
    assert whole.score(TEXTS) == scorer.score(TEXTS)


def test_nothing_is_shared_when_a_head_of_the_first_layer_is_masked(model):
    scorer = InfluenceScorer(model, Letters(), [(0, 1)], floor=4)
    assert not scorer.shares_prefix
    ids = Letters()(TEXTS[1])["input_ids"]
    assert scorer.score([TEXTS[1]])[0].masked_loss == pytest.approx(
        mean_loss(model, ids, UniformHeads(heads=[(0, 1)])), rel=1e-5
    )


def test_long_texts_are_cut_into_chunks_and_no_token_counts_twice(model):
    scorer = InfluenceScorer(model, Letters(), HEADS, context=10, floor=0)
    text = "abcdefghijklmnopqrstuvwxyz"
    ids = Letters()(text)["input_ids"]
    parts = [ids[:10], ids[10:20], ids[20:]]
    found = scorer.score([text])[0]
    assert scorer.chunks(text) == parts
    assert found.tokens == 9 + 9 + 5
    total = sum(mean_loss(model, part) * (len(part) - 1) for part in parts)
    assert found.base_loss == pytest.approx(total / 23, rel=1e-5)


@pytest.mark.parametrize("order", [(1, 0, 2), (2, 1, 0), (1, 2, 0)])
def test_a_score_does_not_depend_on_the_order_of_whole_chunks(model, order):
    scorer = InfluenceScorer(model, Letters(), HEADS, context=10, floor=0)
    parts = ["abcdefghij", "0123456789", "KLMNOPQRST"]
    moved = "".join(parts[i] for i in order)
    assert scorer.chunks(moved) == [scorer.chunks("".join(parts))[i] for i in order]
    straight, mixed = scorer.score(["".join(parts), moved])
    assert mixed.tokens == straight.tokens == 27
    assert mixed.base_loss == pytest.approx(straight.base_loss, rel=1e-6)
    assert mixed.masked_loss == pytest.approx(straight.masked_loss, rel=1e-6)
    assert mixed.influence == pytest.approx(straight.influence, abs=1e-6)
    whole = InfluenceScorer(model, Letters(), HEADS, floor=0)
    assert whole.score([moved])[0].base_loss != pytest.approx(whole.score(["".join(parts)])[0].base_loss, rel=1e-4)


def test_a_text_can_be_looked_at_token_by_token(model):
    scorer = InfluenceScorer(model, Letters(bos=1), HEADS, context=10, floor=0)
    found, score = scorer.inspect("abcdefghijklmnopqrs"), scorer.score(["abcdefghijklmnopqrs"])[0]
    assert found.ids.tolist() == Letters()("abcdefghijklmnopqrs")["input_ids"]
    assert float(found.base.mean()) == pytest.approx(score.base_loss, rel=1e-5)
    assert float(found.rise.mean()) == pytest.approx(score.masked_loss - score.base_loss, abs=1e-5)
    assert scorer.inspect("").ids.numel() == 0


def test_an_opening_token_stands_before_every_chunk_and_is_not_predicted(model):
    scorer = InfluenceScorer(model, Letters(bos=1), HEADS, context=10, floor=0)
    rows = scorer.chunks("abcdefghijklmnopqrs")
    assert [len(row) for row in rows] == [10, 10, 2]
    assert all(row[0] == 1 for row in rows)
    assert scorer.score(["abcdefghijklmnopqrs"])[0].tokens == 19


def test_a_last_chunk_of_one_token_predicts_nothing(model):
    assert [len(row) for row in InfluenceScorer(model, Letters(), HEADS, context=5).chunks("abcdefghijk")] == [5, 5]


def test_later_tokens_do_not_change_earlier_losses(model):
    with torch.no_grad(), headway.use(model, UniformHeads(heads=HEADS)):
        first = model(input_ids=torch.arange(8, 28)[None]).logits
        changed = torch.arange(8, 28)[None].clone()
        changed[0, -1] = 99
        second = model(input_ids=changed).logits
    assert torch.equal(first[:, :-1], second[:, :-1])


class ZeroQueries(Editor):
    """Constant logits in chosen heads, by the host's or the door's ordinary softmax."""

    def __init__(self, heads: list[tuple[int, int]]) -> None:
        self.heads = heads

    def edit_call(self, call: Any) -> Any:
        query = call.query.clone()
        query[:, [head for layer, head in self.heads if layer == call.site.layer]] = 0
        return call.replace(query=query)


@pytest.mark.parametrize("architecture", ["llama", "mistral", "gpt2", "opt"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_uniform_head_is_a_head_of_constant_logits(architecture, implementation):
    options = {"sliding_window": 6} if architecture == "mistral" else {}
    host = tiny_host(architecture, attn_implementation=implementation, **options)[0]
    ids = torch.randint(8, 100, (2, 20), generator=torch.Generator().manual_seed(0))
    padding = torch.ones_like(ids)
    padding[1, :7] = 0
    for mask in (None, padding):
        found = []
        for stage in (UniformHeads(heads=[(0, 1), (1, 0)]), ZeroQueries([(0, 1), (1, 0)])):
            with torch.no_grad(), headway.use(host, stage):
                found.append(host(input_ids=ids, attention_mask=mask).logits)
        real = torch.ones_like(ids) if mask is None else mask
        assert float((found[0] - found[1])[real.bool()].abs().max()) < 1e-4


def test_the_first_row_sees_one_key_and_is_unchanged(model):
    ids = torch.arange(8, 28)[None]
    with torch.no_grad():
        plain = model(input_ids=ids).logits
        with headway.use(model, UniformHeads(heads=HEADS)):
            masked = model(input_ids=ids).logits
    assert torch.allclose(plain[:, 0], masked[:, 0], atol=1e-6)
    assert not torch.allclose(plain[:, 5:], masked[:, 5:], atol=1e-3)


def test_padding_is_left_out_of_the_mean(model):
    ids = torch.arange(8, 20)[None]
    padded = torch.cat([torch.full((1, 5), 3), ids], 1)
    mask = torch.cat([torch.zeros(1, 5, dtype=torch.long), torch.ones_like(ids)], 1)
    places = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad(), headway.use(model, UniformHeads(heads=HEADS)):
        alone = model(input_ids=ids).logits
        beside = model(input_ids=padded, attention_mask=mask, position_ids=places).logits[:, 5:]
    assert torch.allclose(alone, beside, atol=1e-4)


def test_a_masked_head_is_the_same_token_by_token(model):
    ids = torch.arange(8, 24)[None]
    with torch.no_grad(), headway.use(model, UniformHeads(heads=HEADS)):
        whole = model(input_ids=ids).logits
        cache, steps = None, []
        for step in range(ids.shape[1]):
            output = model(input_ids=ids[:, step : step + 1], past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            steps.append(output.logits)
    assert torch.allclose(whole, torch.cat(steps, 1), atol=1e-4)


def test_a_query_head_is_masked_without_the_others_of_its_group():
    host = tiny_host("llama", num_attention_heads=4, num_key_value_heads=2)[0]
    ids = torch.arange(8, 28)[None]
    outputs = []
    for heads in ([], [(1, 0)]):
        with torch.no_grad(), headway.use(host, UniformHeads(heads=heads)):
            with capture(host, what=("head_output",), layers=(1,)) as scope:
                host(input_ids=ids)
            outputs.append(scope.result()[1]["head_output"])
    assert torch.equal(outputs[0][:, 1:], outputs[1][:, 1:])
    assert not torch.allclose(outputs[0][:, 0], outputs[1][:, 0])


def test_doubling_both_losses_changes_nothing():
    assert relative_rise(1.5, 2.1) == pytest.approx(relative_rise(3.0, 4.2))


def test_a_text_known_by_heart_is_divided_by_the_least_loss():
    assert relative_rise(0.0, 1e-4) == pytest.approx(0.1)
    assert math.isnan(relative_rise(float("nan"), 1.0))
    assert math.isnan(relative_rise(1.0, float("inf")))


def test_empty_texts_and_texts_of_one_token_are_flagged(scorer):
    for found in scorer.score(["", "x"]):
        assert found.flags == ("empty",)
        assert not found.usable
        assert math.isnan(found.influence)


def test_short_texts_are_flagged_and_have_a_score(model):
    found = InfluenceScorer(model, Letters(), HEADS, floor=64).score(["a few words"])[0]
    assert found.flags == ("short",)
    assert found.usable
    assert math.isfinite(found.influence)


def test_a_text_that_is_predicted_surely_is_flagged(model, monkeypatch):
    monkeypatch.setattr(influence, "negative_log_likelihood", lambda logits, wanted: torch.zeros(len(wanted)))
    found = InfluenceScorer(model, Letters(), HEADS, floor=0).score(["again and again"])[0]
    assert found.flags == ("tiny-loss",)


def test_noise_is_no_text(scorer):
    broken = scorer.score(["\x00\x01\x02 abc \x03\x04", "half \ud800 of a pair, in a long enough text of words"])
    assert "not-text" in broken[0].flags
    assert "not-text" not in broken[1].flags
    assert math.isfinite(broken[1].influence)


def test_a_broken_model_gives_flags_and_no_numbers():
    host = tiny_host("llama", num_hidden_layers=2)[0]
    scorer = InfluenceScorer(host, Letters(), [(1, 0)], floor=4)
    scorer.score(["an ordinary text"])
    with torch.no_grad():
        host.lm_head.weight[5] = float("nan")
    found = scorer.score(["an ordinary text"])[0]
    assert "not-finite" in found.flags
    assert set(found.flags) & QUARANTINED


def test_half_precision_is_summed_in_double(model):
    host = tiny_host("llama", num_hidden_layers=2, max_position_embeddings=256)[0].bfloat16()
    text = "abc " * 50
    found = InfluenceScorer(host, Letters(), [(1, 0)]).score([text])[0]
    rows = torch.tensor([Letters()(text)["input_ids"]])
    with torch.no_grad():
        logits = host(input_ids=rows).logits[0, :-1].double()
    assert found.base_loss == pytest.approx(float(nn.functional.cross_entropy(logits, rows[0, 1:])), rel=1e-5)


def test_uniform_heads_need_no_map_of_all_pairs(scorer, monkeypatch):
    from headway.door.call import AttentionCall

    def refuse(call: Any, rows: Any = None) -> Any:
        raise AssertionError("a map of all pairs was made")

    scorer.score(["a text"])
    monkeypatch.setattr(AttentionCall, "visible", refuse)
    assert all(found.usable for found in scorer.score(TEXTS[:3]))


@pytest.mark.parametrize("architecture", ["gpt2", "gemma2", "gemma3_text", "opt", "mistral", "gpt_neox", "lfm2"])
def test_other_hosts_score_as_defined(architecture):
    host = tiny_host(architecture)[0]
    last = max(site.layer for site in _sites(host) if site.kind == "self")
    found = InfluenceScorer(host, Letters(), [(last, 0)], floor=4).score([TEXTS[1]])[0]
    ids = Letters()(TEXTS[1])["input_ids"]
    assert found.base_loss == pytest.approx(mean_loss(host, ids), rel=1e-4)
    assert found.masked_loss == pytest.approx(mean_loss(host, ids, UniformHeads(heads=[(last, 0)])), rel=1e-4)


def _sites(host: Any) -> Any:
    with headway.use(host) as handle:
        return handle.sites


def test_bad_arguments_are_named(model):
    with pytest.raises(ArgumentError, match="context: got 1,000"):
        InfluenceScorer(model, Letters(), HEADS, context=1000)
    with pytest.raises(ArgumentError, match="context: got 1,"):
        InfluenceScorer(model, Letters(), HEADS, context=1)
    with pytest.raises(ArgumentError, match="batch_tokens"):
        InfluenceScorer(model, Letters(), HEADS, batch_tokens=0)
    with pytest.raises(ArgumentError, match="one string"):
        InfluenceScorer(model, Letters(), HEADS).score("a text")
    with pytest.raises(ArgumentError, match="expected strings"):
        InfluenceScorer(model, Letters(), HEADS).score([b"bytes"])
    with pytest.raises(ArgumentError, match="layer"):
        InfluenceScorer(model, Letters(), [(9, 0)]).score(["a text"])
    with pytest.raises(ArgumentError, match="heads: got 7"):
        InfluenceScorer(model, Letters(), [(1, 7)]).score(["a text"])


def test_a_model_that_looks_ahead_is_refused():
    host = tiny_host("bert", is_decoder=False)[0]
    with pytest.raises(ArgumentError, match="causal language model"):
        InfluenceScorer(host, Letters(), [(1, 0)]).score(["some text"])
