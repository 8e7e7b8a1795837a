"""The Titans recipe at smoke size, its toys, and that its measurements can fail."""

from __future__ import annotations

import math

import pytest
import torch

from headway.evidence import prove
from headway.evidence.recipes import titans as recipe
from headway.evidence.recipes._titans_toys import ARMS, NOISE, RUNS, SEGMENT, Bound, Setting, stream_losses, task_of
from headway.statistics import Measurement
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
    asked = [name for name in recipe.CRITERIA if name.startswith(("recall-", "depth"))]
    asked += ["momentum", "forgetting", "convolution", "persistent"]
    assert len(asked) == 4 + 4 + 4
    for name in asked:
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
        assert setting.gap > setting.layers * (window - 1)
        assert (setting.pairs + setting.gap) % SEGMENT == 0 or size == "smoke", "questions open segments of MAC"


@pytest.mark.parametrize("name", sorted(recipe._GAINS))
def test_ablations_take_away_what_they_say_and_nothing_else(name):
    *_, with_it, without = recipe._GAINS[name]
    kinds = {f"{kind} {arm}" if kind != "plain" else arm: (arm, kind) for arm, kind in RUNS}
    (arm, kind), (other, same) = kinds[with_it], kinds[without]
    assert kind == same
    (mixer, options), (other_mixer, other_options) = ARMS[arm], ARMS[other]
    assert mixer == other_mixer
    changed = {
        option
        for option in options.keys() | other_options.keys()
        if options.get(option, "default") != other_options.get(option, "default")
    }
    assert changed == {name.split("-")[0].replace("convolution", "conv")}


def test_a_gain_counts_only_where_the_arm_has_learned():
    better = Measurement(0.3, 0.2, 0.4, n=3)
    for accuracy, verdict in ((0.9, "holds"), (0.4, "inconclusive")):
        found = recipe.CRITERIA["convolution"].judge({"measured": better, "with": Measurement(accuracy)})
        assert found.verdict == verdict
    none = Measurement(0.0, -0.1, 0.1, n=3)
    assert recipe.CRITERIA["momentum"].judge({"measured": none, "with": Measurement(0.9)}).verdict == "inconclusive"


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


SETTING = Setting(width=8, steps=1, rows=16, pairs=3, gap=4, seeds=1)


def test_the_newer_binding_is_right():
    task = task_of(SETTING, 5, kind="rebound")
    assert isinstance(task, Bound)
    batch = task.batch(0)
    for ids, labels in zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True):
        assert len(ids) == task.length
        bindings = [divmod(token - NOISE - 3 - 6, 6) for token in ids[:6]]
        older, newer = dict(bindings[:3]), dict(bindings[3:])
        assert set(older) == set(newer) == {0, 1, 2}
        assert not set(older.values()) & set(newer.values())
        check_questions(ids, labels, newer)


def test_split_bindings_are_a_key_and_then_its_value():
    task = task_of(SETTING, 5, kind="split")
    batch = task.batch(0)
    for ids, labels in zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True):
        assert len(ids) == task.length
        keys, values = ([token - NOISE for token in ids[start:6:2]] for start in (0, 1))
        stated = dict(zip(keys, [value - 3 for value in values], strict=True))
        assert set(stated) == set(stated.values()) == {0, 1, 2}
        check_questions(ids, labels, stated)


def check_questions(ids: list[int], labels: list[int], stated: dict[int, int]) -> None:
    """Every key once behind the gap, no two in one segment, each with its answer behind it in the labels alone."""
    places = [at for at, token in enumerate(ids) if at >= 6 and token >= NOISE]
    assert places == [10, 14, 18]
    assert len(ids) == 20
    assert sorted(ids[at] - NOISE for at in places) == [0, 1, 2]
    assert [at for at, label in enumerate(labels) if label != IGNORE] == [at + 1 for at in places]
    assert all(labels[at + 1] - NOISE - 3 == stated[ids[at] - NOISE] for at in places)


def test_a_constant_step_blows_up_at_large_chunks_and_order_is_by_size():
    found = stream_losses((1, 4, 16), streams=3, tokens=256, generator=torch.Generator().manual_seed(0))
    constant = found["largest loss over the first"]["constant"]
    assert constant["1"] < 4
    assert constant["16"] > 1e3 or math.isinf(constant["16"])
    means = [sum(found["mean loss"][size]) for size in ("1", "4", "16")]
    assert means == sorted(means)
