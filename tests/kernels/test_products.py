"""Products of tiles: both ways of multiplying give the same, and each is taken where it should be."""

from __future__ import annotations

import pytest
import torch

from headway.kernels import products
from headway.kernels.products import inner, outer, pieces, sandwich


def tensors(systems: int = 3, rows: int = 40, keys: int = 600, dim: int = 33) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((rows, dim), (keys, dim), (rows, keys), (keys, 17))
    return tuple(torch.randn(systems, *shape, generator=generator) for shape in shapes)


@pytest.fixture
def wide(monkeypatch):
    """A processor on which oneDNN is taken, whatever this one is."""
    if not torch.backends.mkldnn.is_available():
        pytest.skip("torch without oneDNN")
    monkeypatch.setattr(products, "_wide", lambda: True)


@pytest.mark.parametrize("widest", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("systems", [1, 3])
def test_products_are_those_of_einsum(systems, dtype, widest, monkeypatch):
    monkeypatch.setattr(products, "_wide", lambda: widest and torch.backends.mkldnn.is_available())
    a, b, w, c = (x.to(dtype) for x in tensors(systems))
    slack = {"rtol": 1e-4, "atol": 1e-3} if dtype == torch.float32 else {"rtol": 1e-9, "atol": 1e-9}
    torch.testing.assert_close(inner(a, b), torch.einsum("sid,sjd->sij", a, b), **slack)
    torch.testing.assert_close(outer(w, c), torch.einsum("sij,sjd->sid", w, c), **slack)
    expected = torch.einsum("sij,sij,sjd->sid", w, torch.einsum("sid,sjd->sij", a, b), c)
    torch.testing.assert_close(sandwich(a, b, w, c), expected, rtol=1e-3, atol=1e-2 if dtype == torch.float32 else 1e-8)


def test_large_float32_systems_are_taken_one_by_one(wide):
    a, b, _, _ = tensors()
    assert len(pieces(a, b)) == 3
    assert len(pieces(a.double(), b.double())) == 1
    assert len(pieces(a[:, :4], b)) == 1, "few rows are bound by memory"
    assert len(pieces(a[:, :20, :5], b[:, :30, :5])) == 1, "small products are not worth a call each"


def test_gradients_flow_where_they_are_asked_for(wide):
    a, b, w, c = (x.requires_grad_() for x in tensors(1))
    assert len(pieces(a, b)) == 1
    found = torch.autograd.grad(inner(a, b).sum() + outer(w, c).sum(), (a, b, w, c))
    torch.testing.assert_close(found[0], b.sum(1, keepdim=True).expand_as(a), rtol=1e-4, atol=1e-3)


def test_matrices_cut_out_of_wider_ones_are_not_given_to_one_dnn(monkeypatch, wide):
    """Where rows are further apart than they are long oneDNN was a thousand times slower."""
    keys = torch.randn(1, 600, 80)
    monkeypatch.setattr(products, "_linear", lambda: pytest.fail("taken"))
    with torch.no_grad():
        inner(torch.randn(1, 64, 40), keys[..., :40])


def test_without_one_dnn_everything_still_works(monkeypatch, wide):
    a, b, w, c = tensors()
    before = sandwich(a, b, w, c)
    monkeypatch.setattr(products, "_wide", lambda: False)
    assert len(pieces(a, b)) == 1
    torch.testing.assert_close(sandwich(a, b, w, c), before, rtol=1e-3, atol=1e-2)
