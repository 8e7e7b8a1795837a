"""The lightning recipe at smoke size, and that its measures tell apart what they should."""

from __future__ import annotations

import pytest
import torch

from headway.evidence import prove
from headway.evidence.recipes import _lightning_costs as costs
from headway.evidence.recipes import _lightning_text as text
from headway.evidence.recipes.lightning_attention import CRITERIA, slopes
from headway.kernels.scan import causal_scan


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs")
    return prove("lightning-attention", size="smoke", seed=3, out=out, show_progress=False)


def claim(run, name):
    return next(found for found in run.claims if found.id == name)


def test_every_planned_claim_is_measured(smoke):
    assert [found.id for found in smoke.claims] == list(CRITERIA)
    assert smoke.planned


def test_the_bytes_of_the_cache_are_exact(smoke):
    found = claim(smoke, "decode-bytes")
    assert found.measured.value == 0
    assert found.baseline.value > 0
    assert found.verdict == "holds"


def test_memory_does_not_depend_on_the_machine(smoke):
    assert claim(smoke, "memory").verdict == "holds"


def test_models_that_learned_nothing_leave_the_language_claims_open(smoke):
    for name in ("language", "linear", "gate", "decay"):
        assert claim(smoke, name).verdict == "inconclusive"


def test_slopes_tell_constant_from_growing_time():
    lengths = [1000, 4000, 16_000]
    assert slopes(lengths, [[float(n)] * 2 for n in lengths]) == pytest.approx([0, 0], abs=1e-9)
    assert slopes(lengths, [[float(n) ** 2] * 2 for n in lengths]) == pytest.approx([1, 1])


def test_the_running_sum_is_the_same_operation():
    q, k, v = (torch.randn(1, 1, 30, 5, dtype=torch.float64) for _ in range(3))
    torch.testing.assert_close(costs.cumulative(q, k, v), causal_scan(q, k, v)[0])


def test_arms_are_of_one_size():
    sizes = {arm: sum(p.numel() for p in text.build(arm, 64, 3).parameters()) for arm in text.ARMS}
    assert max(sizes.values()) < 1.01 * min(sizes.values())


def test_arms_read_the_same_windows():
    data = torch.arange(500)
    first, second = (text.window(data, 7, 3, 16, index) for index in (0, 0))
    assert torch.equal(first, second)
    assert not torch.equal(first, text.window(data, 7, 3, 16, 1))
