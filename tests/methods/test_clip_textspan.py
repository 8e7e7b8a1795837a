"""TextSpan finds planted directions and takes out what it found."""

from __future__ import annotations

import pytest
import torch

from headway.errors import ArgumentError, HostError, NumericError
from headway.methods.diagnosis.clip_ccs import embed_bank, text_span, tiny, tower
from headway.methods.diagnosis.clip_ccs.textspan import check_texts, completeness


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


def made(generator, images=60, width=20, texts=40, rank=6):
    bank = torch.nn.functional.normalize(torch.randn(texts, width, generator=generator), dim=-1)
    x = torch.randn(images, rank, generator=generator) @ torch.randn(rank, width, generator=generator)
    return x.double(), bank.double()


def test_a_planted_direction_is_found_first(generator):
    _, bank = made(generator)
    amounts = torch.randn(60, 1, generator=generator).double()
    x = amounts * bank[5] + 0.3 * bank.mean(0)
    found = text_span(x, bank, texts=3)
    assert found.chosen[0] == 5
    assert text_span(x[torch.randperm(60, generator=generator)], bank, texts=3).chosen[0] == 5


def test_the_order_of_the_images_does_not_matter(generator):
    x, bank = made(generator)
    order = torch.randperm(60, generator=generator)
    plain, mixed = text_span(x, bank, texts=5), text_span(x[order], bank, texts=5)
    assert mixed.chosen == plain.chosen
    assert mixed.explained == pytest.approx(plain.explained)
    torch.testing.assert_close(mixed.residual, plain.residual[order])


def test_a_constant_only_matters_for_the_span(generator):
    x, bank = made(generator, rank=20)
    shift = torch.randn(20, generator=generator).double()
    assert text_span(x + shift, bank, texts=4).chosen == text_span(x, bank, texts=4).chosen


def test_every_step_takes_its_direction_out(generator):
    x, bank = made(generator)
    last = 0.0
    for count in range(1, 6):
        found = text_span(x, bank, texts=count)
        assert (found.residual @ found.directions.T).abs().max() < 1e-4
        gram = found.directions @ found.directions.T
        torch.testing.assert_close(gram, torch.eye(count, dtype=gram.dtype), atol=1e-6, rtol=0)
        assert found.explained[-1] >= last - 1e-12
        last = found.explained[-1]
        torch.testing.assert_close(found.reconstruction + found.residual, x, atol=1e-6, rtol=0)


def test_no_text_comes_twice_and_the_rank_ends_it(generator):
    x, bank = made(generator, rank=4)
    found = text_span(x, bank, texts=12)
    assert len(set(found.chosen)) == len(found.chosen) == 4
    assert found.residual.abs().max() < 1e-6
    assert found.explained[-1] == pytest.approx(1.0)


def test_texts_inside_the_span_win_over_texts_beside_it(generator):
    bank = torch.eye(8).double()
    tilted = (bank[0] + 3 * bank[7]) / 10**0.5
    x = torch.randn(50, 1, generator=generator).double() * bank[0]
    assert text_span(x, torch.stack([tilted, bank[0]]), texts=1).chosen == (1,)


def test_the_rank_is_cut_to_images_and_head_dimension_with_a_note(generator):
    x, bank = made(generator, images=5, rank=20)
    few = text_span(x, bank, texts=2)
    assert few.rank == 5
    assert "rank 80 cut to 5: 5 images" in few.note
    assert "rank 6 cut to 5: 5 images" in text_span(x, bank, texts=2, rank=6).note
    assert text_span(x, bank, texts=2, rank=5).note == ""
    cut = text_span(x, bank, texts=2, head_dim=3)
    assert cut.rank == 3
    assert "cut to 3" in cut.note
    assert text_span(x, bank, texts=2, rank=3).note == ""


def test_a_head_that_writes_a_constant_has_no_texts(generator):
    _, bank = made(generator)
    assert text_span(torch.ones(10, 20), bank, texts=3).chosen == ()


def test_complete_texts_lose_nothing(generator):
    heads = torch.randn(30, 2, 2, 6, generator=generator)
    stages = torch.randn(30, 3, 6, generator=generator)
    fitted = {(layer, head): heads[:, layer, head] for layer in range(2) for head in range(2)}
    torch.testing.assert_close(completeness(heads, stages, fitted), heads.sum((1, 2)) + stages.sum(1))
    only = completeness(heads, stages, {})
    torch.testing.assert_close(only, stages.sum(1) + heads.mean(0).sum((0, 1)))


def test_bad_texts_and_banks_are_refused(generator):
    x, bank = made(generator)
    with pytest.raises(ArgumentError, match="empty text at line 2"):
        check_texts(["red", "  "])
    with pytest.raises(ArgumentError, match="'red' at lines 1 and 3"):
        check_texts(["red", "blue", " red "])
    with pytest.raises(ArgumentError, match="embedded by the text tower"):
        text_span(x, bank[:, :7])
    with pytest.raises(ArgumentError, match="two or more images"):
        text_span(x[:1], bank)
    with pytest.raises(ArgumentError, match="1 ≤ texts ≤ 40"):
        text_span(x, bank, texts=41)
    with pytest.raises(ArgumentError, match="zero vector at row 3"):
        text_span(x, torch.cat([bank[:3], torch.zeros(1, 20).double()]), texts=1)
    with pytest.raises(NumericError):
        text_span(x.where(x < 2, float("nan")), bank)


def test_a_bank_of_another_checkpoint_is_refused():
    one, other = tiny.untrained(0).eval(), tiny.untrained(1).eval()
    reader = tiny.tokenizer()
    bank = embed_bank(tower(one, "text"), lambda texts: tiny.tokens(reader, texts), ["something red", "a circle"])
    bank.check(one)
    with pytest.raises(HostError, match="bank: got one that was made on another model"):
        bank.check(other)
    with pytest.raises(ArgumentError, match="expected the text tower"):
        embed_bank(tower(one), lambda texts: tiny.tokens(reader, texts), ["red"])
    with pytest.raises(ArgumentError, match="not among the texts"):
        embed_bank(tower(one, "text"), lambda t: tiny.tokens(reader, t), ["red"], concepts={"blue": "colour"})
