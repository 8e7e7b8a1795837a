"""Other heads beside the chosen ones: as many, from the same layers on, scored as the chosen ones are."""

from __future__ import annotations

import numpy as np
import pytest

from headway.hosts.tiny import tiny_host
from headway.methods.diagnosis.attention_influence import InfluenceScorer
from headway.select import Reading, select
from tests.look.tiny import byte_tokenizer, tiny_llama
from tests.select.standins import text, write_corpus

RECORDS = 12


@pytest.fixture(scope="module")
def host():
    return tiny_llama(num_hidden_layers=2).eval(), byte_tokenizer(bos=True)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"), records=RECORDS, files=1)


def run(corpus, host, out, **options):
    return select(corpus, *host, out=out, reading=Reading(id_field="id"), floor=0, **options)


def test_controls_are_scored_as_their_heads_say(corpus, host, tmp_path):
    found = run(corpus, host, tmp_path, heads=[(1, 0)], controls=2)
    assert len(found.controls) == 2
    for control in found.controls:
        ((layer, head),) = control["heads"]
        assert layer == 1
        assert head != 0
        assert control["records"] == RECORDS
        direct = InfluenceScorer(*host, [(layer, head)], floor=0).score([text(n) for n in range(RECORDS)])
        assert control["control"] == pytest.approx(np.mean([each.influence for each in direct]), abs=1e-5)
    assert found.controls[0]["chosen"] == pytest.approx(found.domains[0].influence, abs=1e-6)


def test_controls_are_found_again(corpus, host, tmp_path):
    first = run(corpus, host, tmp_path, heads=[(1, 0)], controls=1)
    again = run(corpus, host, tmp_path, heads=[(1, 0)], controls=1)
    assert again.controls == first.controls
    assert again.run["shards_found"] == again.run["shards"]


def test_other_heads_get_a_ledger_of_their_own(corpus, host, tmp_path):
    first = run(corpus, host, tmp_path, heads=[(1, 0)], controls=0)
    other = run(corpus, host, tmp_path, heads=[(1, 1)], controls=0)
    assert other.run["shards_found"] == 0
    assert other.domains[0].influence != first.domains[0].influence


def test_a_model_without_enough_other_heads_has_no_controls_and_says_so(corpus, host, tmp_path):
    count = host[0].config.num_attention_heads
    found = run(corpus, host, tmp_path, heads=[(1, head) for head in range(count)], controls=2)
    assert found.controls == []
    assert any("No control heads" in warning for warning in found.warnings)
    assert any("one domain" in warning for warning in found.warnings)


def test_controls_on_a_hybrid_model_come_from_layers_that_have_heads(corpus, tmp_path):
    kinds = ["conv", "full_attention", "conv", "full_attention"]
    model = tiny_host("lfm2", vocab_size=300, num_hidden_layers=4, layer_types=kinds)[0]
    heads = [(1, head) for head in range(model.config.num_attention_heads)]
    found = run(corpus, (model, byte_tokenizer(bos=True)), tmp_path, heads=heads, controls=2)
    assert [{layer for layer, _ in control["heads"]} for control in found.controls] == [{3}, {3}]
