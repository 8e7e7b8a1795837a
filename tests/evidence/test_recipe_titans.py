"""The Titans recipe at smoke size, its toys, and that its measurements can fail."""

from __future__ import annotations

import math

import pytest
import torch

from headway.evidence import prove
from headway.evidence.recipes import titans as recipe
from headway.evidence.recipes._titans_toys import ARMS, Bound, Setting, stream_losses, task_of
from headway.train.losses import IGNORE


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    return prove("titans", size="smoke", seed=3, out=tmp_path_factory.mktemp("runs"), show_progress=False)


def claim(run, name):
    return next(found for found in run.claims if found.id == name)


def test_every_planned_claim_is_measured(smoke):
    assert [found.id for found in smoke.claims] == list(recipe.CRITERIA)
    assert smoke.planned


def test_an_untrained_toy_says_nothing_about_recall(smoke):
    for name in ("recall-lmm", "recall-mac", "recall-mag", "recall-mal", "depth", "momentum", "forgetting"):
        assert claim(smoke, name).verdict == "inconclusive"


def test_bounded_steps_are_stable_and_states_do_not_grow(smoke):
    assert claim(smoke, "chunk-stability").verdict == "holds"
    assert claim(smoke, "constant-state").verdict == "holds"


def test_gaps_are_drawn(smoke):
    assert (smoke.folder / "plots" / "gaps.html").exists()
    assert set(claim(smoke, "recall-lmm").details["by gap"]) == {"1×", "2×", "4×", "8×"}


def test_the_gap_of_each_size_is_beyond_the_reach_of_the_window():
    window = ARMS["window"][1]["window"]
    for size in ("smoke", "small", "full"):
        setting = setting_of(size)
        assert setting.gap >= 2 * (window - 1)


def setting_of(size: str) -> Setting:
    found = {}

    class StopError(Exception):
        pass

    class Fake:
        def choose(self, **given):
            found.update(given)
            raise StopError

    with pytest.raises(StopError):
        recipe.run(Fake())
    return found[size]


def test_the_newer_binding_is_right():
    setting = Setting(width=8, steps=1, rows=16, pairs=3, gap=4, seeds=1)
    task = task_of(setting, 5, rebound=True)
    assert isinstance(task, Bound)
    batch = task.batch(0)
    for ids, labels in zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True):
        assert len(ids) == task.length
        bindings = [divmod(token - 4 - 3 - 6, 6) for token in ids[:6]]
        older, newer = dict(bindings[:3]), dict(bindings[3:])
        assert set(older) == set(newer) == {0, 1, 2}
        assert not set(older.values()) & set(newer.values())
        assert [label != IGNORE for label in labels] == [False] * (task.length - 3) + [True] * 3
        assert [newer[key - 4] for key in ids[-4:-1]] == [label - 4 - 3 for label in labels[-3:]]


def test_a_constant_step_blows_up_at_large_chunks_and_order_is_by_size():
    found = stream_losses((1, 4, 16), streams=3, tokens=256, generator=torch.Generator().manual_seed(0))
    constant = found["largest loss over the first"]["constant"]
    assert constant["1"] < 4
    assert constant["16"] > 1e3 or math.isinf(constant["16"])
    means = [sum(found["mean loss"][size]) for size in ("1", "4", "16")]
    assert means == sorted(means)
