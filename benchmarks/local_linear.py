"""What local linear attention costs beside softmax attention: forward, forward and backward, a decode step, memory."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import normalize, scaled_dot_product_attention

from benchmarks.harness import compare, write_facts
from headway.kernels.local_linear import fit_local_linear, local_linear_attention

HEADS, DIM, RIDGE = 8, 64, 0.1


def _tensors(tokens: int, dim: int = DIM, queries: int | None = None) -> tuple[torch.Tensor, ...]:
    """Queries and keys of length one, as the mixer makes them."""
    generator = torch.Generator().manual_seed(0)
    rows = tokens if queries is None else queries
    shapes = ((rows, dim), (tokens, dim), (tokens, dim))
    q, k, v = (torch.randn(1, HEADS, *shape, generator=generator) for shape in shapes)
    return normalize(q, dim=-1), normalize(k, dim=-1), v


def _local(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return local_linear_attention(q, k, v, ridge=RIDGE, scale=q.shape[3] ** 0.5)


def _softmax(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    causal = q.shape[2] == k.shape[2]
    return scaled_dot_product_attention(q, k, v, scale=q.shape[3] ** 0.5, is_causal=causal)


def _accuracy(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> dict[str, Any]:
    """Error of the first head against a float64 solve, and the iterations of the default tolerance."""
    options = {"ridge": RIDGE, "scale": q.shape[3] ** 0.5}
    fast = fit_local_linear(q, k, v, **options)
    exact = fit_local_linear(*(x[:, :1].double() for x in (q, k, v)), solver="cg", **options).output
    error = float((fast.output[:, :1] - exact).norm() / exact.norm())
    return {
        "relative_error": error,
        "mean_iterations": float(fast.steps.float().mean()),
        "most_iterations": int(fast.steps.max()),
        "largest_residual": float(fast.residual.max()),
    }


def local_linear_forward() -> None:
    """The block form at 2,048 tokens against causal softmax SDPA: 8 heads of 64 and of 32, float32, default
    tolerance."""
    for dim in (64, 32):
        q, k, v = _tensors(2048, dim)
        with torch.no_grad():
            facts = _accuracy(q, k, v)
            compare(
                f"local_linear_forward_{dim}",
                lambda q=q, k=k, v=v: _local(q, k, v),
                lambda q=q, k=k, v=v: _softmax(q, k, v),
                labels=("local linear, block form", "softmax SDPA"),
                repeats=9,
                memory=True,
                settings={"tokens": 2048, "heads": HEADS, "dim": dim, "ridge": RIDGE, **facts},
            )
        print(f"relative error {facts['relative_error']:.1e}, {facts['mean_iterations']:.1f} iterations on average")


def local_linear_lengths() -> None:
    """The same ratio from 512 to 8,192 tokens, heads of 64."""
    for tokens in (512, 1024, 4096, 8192):
        q, k, v = _tensors(tokens)
        with torch.no_grad():
            compare(
                f"local_linear_forward_at_{tokens}",
                lambda q=q, k=k, v=v: _local(q, k, v),
                lambda q=q, k=k, v=v: _softmax(q, k, v),
                labels=("local linear, block form", "softmax SDPA"),
                repeats=5,
                settings={"tokens": tokens, "heads": HEADS, "dim": DIM, "ridge": RIDGE},
            )


def local_linear_training() -> None:
    """Forward and backward at 2,048 tokens against those of softmax SDPA."""
    leaves = [x.requires_grad_() for x in _tensors(2048)]

    def both(function: Callable[..., torch.Tensor]) -> Callable[[], None]:
        return lambda: function(*leaves).sum().backward()

    compare(
        "local_linear_training",
        both(_local),
        both(_softmax),
        labels=("local linear, forward and backward", "softmax SDPA, forward and backward"),
        repeats=5,
        memory=True,
        settings={"tokens": 2048, "heads": HEADS, "dim": DIM, "ridge": RIDGE},
    )


def local_linear_decode() -> None:
    """One query against stored keys, by their number: local linear and softmax. Both read all keys, so neither is
    flat."""
    rows = {}
    for tokens in (1024, 4096, 16384):
        q, k, v = _tensors(tokens, queries=1)
        with torch.no_grad():
            found = compare(
                f"local_linear_decode_{tokens}",
                lambda q=q, k=k, v=v: _local(q, k, v),
                lambda q=q, k=k, v=v: _softmax(q, k, v),
                labels=("local linear, one query", "softmax SDPA, one query"),
                repeats=15,
                settings={"keys": tokens, "heads": HEADS, "dim": DIM, "ridge": RIDGE},
            )
        rows[str(tokens)] = {
            "local_linear_seconds": statistics.median(found.method),
            "softmax_seconds": statistics.median(found.baseline),
        }
    write_facts("local_linear_decode", {"by_keys": rows})


def local_linear_solvers() -> None:
    """Conjugate gradients against forming and factoring the covariance, heads of 8, 16 and 32, 1,024 tokens."""
    for dim in (8, 16, 32):
        q, k, v = _tensors(1024, dim)

        def solve(solver: str, q: Any = q, k: Any = k, v: Any = v) -> Callable[[], object]:
            return lambda: fit_local_linear(q, k, v, ridge=RIDGE, scale=q.shape[3] ** 0.5, solver=solver)

        compare(
            f"local_linear_solver_{dim}",
            solve("cg"),
            solve("direct"),
            labels=("conjugate gradients", "direct"),
            repeats=5,
            settings={"tokens": 1024, "heads": HEADS, "dim": dim, "ridge": RIDGE},
        )
