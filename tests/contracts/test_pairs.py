"""Any two methods at once: which may, that each still does what it does alone, and that the others are refused."""

from __future__ import annotations

import itertools
from functools import cache

import pytest
import torch

import headway
from headway.errors import ConflictError
from tests.contracts import methods as contract
from tests.contracts.methods import SLUGS, host, read, stages, tokens
from tests.contracts.refusals import TOGETHER

PAIRS = list(itertools.combinations(SLUGS, 2))
GENERATE = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}


def what(**shares: float) -> tuple[torch.Tensor, list[int]]:
    """Logits of a prompt and steps, and greedy tokens, under methods by slug and share."""
    model, ids = host("llama"), tokens()
    acting = [stage for slug, share in shares.items() for stage in stages(slug.replace("_", "-"), "llama", share)]
    with headway.use(model, *acting):
        return read(model, ids, contract.decodes()), model.generate(ids, **GENERATE)[0].tolist()


@cache
def alone(slug: str) -> tuple[torch.Tensor, list[int]]:
    return what(**{slug: 0.5})


def test_the_list_of_pairs_names_methods_in_order():
    assert set(PAIRS) >= TOGETHER


@pytest.mark.parametrize(("first", "second"), [pair for pair in PAIRS if pair not in TOGETHER])
def test_two_methods_that_want_the_same_thing_name_each_other(first, second):
    """On attach, or where a driver opens a scope of its own, as soon as it generates."""
    model, ids = host("llama"), tokens(length=80)
    one, two = (stages(slug, "llama", 0.5) for slug in (first, second))
    before = contract.snapshot(model)
    with pytest.raises(ConflictError) as refused, headway.use(model, *one, *two):
        model.generate(ids, **GENERATE)
    for found in (one, two):
        assert any(stage.title in str(refused.value) for stage in found)
    contract.same(before, contract.snapshot(model))


@pytest.mark.parametrize(("first", "second"), sorted(TOGETHER))
def test_two_methods_together_do_what_each_does(first, second):
    """Where one of them has all it wants, the other is alone; where both are short, the result is neither's."""
    before = contract.snapshot(host("llama"))
    for of_first, of_second, other in ((1.0, 0.5, second), (0.5, 1.0, first)):
        logits, text = what(**{first: of_first, second: of_second})
        contract.close(logits, alone(other)[0], f"{other} alone", share=1e-5)
        assert text == alone(other)[1]
    logits, text = what(**{first: 0.5, second: 0.5})
    if "infiniretri" in (first, second):
        # A driver acts in `generate` alone.
        assert text != alone(first)[1] or text != alone(second)[1]
    else:
        assert not any(torch.allclose(logits, alone(slug)[0], atol=1e-3) for slug in (first, second))
    contract.same(before, contract.snapshot(host("llama")))
