"""Row-masked conjugate gradients: solutions, what is reported, and what happens to rows that cannot be solved."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headway.errors import ArgumentError
from headway.kernels.conjugate_gradient import (
    ConvergenceError,
    ConvergenceWarning,
    conjugate_gradient,
    report_unconverged,
)


def systems(batch: int = 2, rows: int = 5, dim: int = 7, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(batch, rows, dim, dim + 2, generator=generator, dtype=torch.float64)
    matrix = root @ root.transpose(-1, -2) / dim + 0.1 * torch.eye(dim, dtype=torch.float64)
    return matrix, torch.randn(batch, rows, dim, generator=generator, dtype=torch.float64)


def product(matrix: torch.Tensor):
    return lambda x: (matrix @ x[..., None]).squeeze(-1)


@given(batch=st.integers(1, 3), rows=st.integers(1, 6), dim=st.integers(1, 9), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=25)
def test_it_solves_every_row(batch, rows, dim, seed):
    matrix, right = systems(batch, rows, dim, seed)
    found = conjugate_gradient(product(matrix), right, tolerance=1e-11, max_iterations=60)
    torch.testing.assert_close(found.value, torch.linalg.solve(matrix, right), rtol=1e-7, atol=1e-8)
    assert bool(found.converged.all())


def test_the_residual_is_what_is_left():
    matrix, right = systems()
    found = conjugate_gradient(product(matrix), right, tolerance=1e-12, max_iterations=3)
    left = (right - product(matrix)(found.value)).norm(dim=-1) / right.norm(dim=-1)
    torch.testing.assert_close(found.residual, left, rtol=1e-8, atol=1e-12)
    assert not bool(found.converged.any())


def test_a_row_of_zeros_takes_no_step():
    matrix, right = systems()
    right[0, 2] = 0
    found = conjugate_gradient(product(matrix), right, tolerance=1e-10, max_iterations=50)
    assert int(found.steps[0, 2]) == 0
    assert not bool(found.value[0, 2].any())
    assert bool(found.converged.all())


def test_a_solved_row_is_frozen_while_others_go_on():
    matrix, right = systems()
    matrix[0, 0] = torch.eye(7)
    found = conjugate_gradient(product(matrix), right, tolerance=1e-10, max_iterations=50)
    assert int(found.steps[0, 0]) == 1
    assert int(found.steps.max()) > 3
    torch.testing.assert_close(found.value[0, 0], right[0, 0])


def test_a_row_that_meets_infinity_keeps_its_last_finite_value():
    matrix, right = systems()
    matrix[1, 3] = torch.inf
    found = conjugate_gradient(product(matrix), right, tolerance=1e-10, max_iterations=50)
    assert bool(found.value.isfinite().all())
    assert found.converged.sum() == 9
    assert not bool(found.converged[1, 3])


def test_a_direction_without_curvature_ends_its_row():
    matrix, right = systems()
    matrix[0, 1] = 0
    found = conjugate_gradient(product(matrix), right, tolerance=1e-10, max_iterations=50)
    assert not bool(found.converged[0, 1])
    assert not bool(found.value[0, 1].any())


def test_narrowing_changes_nothing_but_the_work():
    matrix, right = systems(1, 64, 12)
    matrix[:, :48] = 2 * torch.eye(12)
    applied = []

    def apply_to(rows):
        def apply(x):
            applied.append(x.shape[1])
            return product(matrix[:, rows])(x)

        return apply

    plain = conjugate_gradient(product(matrix), right, tolerance=1e-10, max_iterations=50)
    narrowed = conjugate_gradient(apply_to(slice(None)), right, tolerance=1e-10, max_iterations=50, narrow=apply_to)
    torch.testing.assert_close(narrowed.value, plain.value)
    assert torch.equal(narrowed.steps, plain.steps)
    assert applied[0] == 64
    assert max(applied[1:]) == 16


def test_narrowing_happens_more_than_once():
    matrix, right = systems(2, 16, 9)
    matrix[:, :8] = torch.eye(9)
    matrix[:, 8:12] = torch.diag_embed(torch.tensor([1.0] * 5 + [2.0] * 4, dtype=torch.float64))
    seen = []

    def apply_to(rows):
        seen.append(16 if isinstance(rows, slice) else rows.numel())
        return product(matrix[:, rows])

    found = conjugate_gradient(apply_to(slice(None)), right, tolerance=1e-10, max_iterations=50, narrow=apply_to)
    torch.testing.assert_close(found.value, torch.linalg.solve(matrix, right), rtol=1e-7, atol=1e-8)
    assert seen[:3] == [16, 8, 4]


def test_jacobi_solves_a_badly_scaled_diagonal_in_one_step():
    scales = torch.logspace(-3, 3, 7, dtype=torch.float64)
    matrix = torch.diag_embed(scales.expand(1, 2, 7))
    _, right = systems(1, 2)
    plain = conjugate_gradient(product(matrix), right, tolerance=1e-8, max_iterations=5)
    scaled = conjugate_gradient(
        product(matrix), right, tolerance=1e-8, max_iterations=5, diagonal=scales.expand(1, 2, 7)
    )
    assert not bool(plain.converged.any())
    assert scaled.steps.tolist() == [[1, 1]]
    torch.testing.assert_close(scaled.value, right / scales)


def test_jacobi_solves_what_plain_solves():
    matrix, right = systems()
    diagonal = torch.diagonal(matrix, dim1=-2, dim2=-1)
    found = conjugate_gradient(product(matrix), right, tolerance=1e-11, max_iterations=60, diagonal=diagonal)
    torch.testing.assert_close(found.value, torch.linalg.solve(matrix, right), rtol=1e-7, atol=1e-8)


def test_the_worst_row_is_named():
    residual = torch.tensor([[1e-9, 0.25], [1e-3, 1e-9]])
    with pytest.warns(ConvergenceWarning, match=r"2 of 4 rows .* the worst is row \(0, 1\) with 0.25. Do more."):
        report_unconverged("here", residual, 1e-6, "Do more.", strict=False)
    with pytest.raises(ConvergenceError, match=r"row \(0, 1\)"):
        report_unconverged("here", residual, 1e-6, "Do more.", strict=True)


def test_a_residual_that_is_not_a_number_is_the_worst():
    with pytest.warns(ConvergenceWarning, match=r"row \(1,\)"):
        report_unconverged("here", torch.tensor([0.5, torch.nan]), 1e-6, "", strict=False)


def test_solved_rows_say_nothing(recwarn):
    report_unconverged("here", torch.tensor([1e-9]), 1e-6, "", strict=True)
    assert not recwarn.list


@pytest.mark.parametrize(
    ("name", "options"), [("tolerance", {"tolerance": 0.0}), ("max_iterations", {"max_iterations": 0})]
)
def test_unusable_settings_are_named(name, options):
    matrix, right = systems()
    with pytest.raises(ArgumentError, match=name):
        conjugate_gradient(product(matrix), right, **{"tolerance": 1e-6, "max_iterations": 5, **options})
