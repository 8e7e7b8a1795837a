"""Detection on hidden states with known sinks: ranges, flags, labels, and what must not change them."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headway.errors import ArgumentError, NumericError
from headway.methods.sinks.secondary_sinks import SinkMap, detect, find_primary, label_rule
from headway.methods.sinks.secondary_sinks.detection import massive_spans

LAYERS, TOKENS, WIDTH = 12, 20, 32
START, END = 2, 10
#: position -> layers at which the token is planted along the primary's direction.
PLANTED = {5: range(4, 8), 9: range(6, 7), 14: range(3, 10)}


def streams(seed: int = 0, *, position: int = 0, jump: float = 50.0) -> torch.Tensor:
    """Random streams of norm about 6, with a primary sink in layers [START, END) and the planted tokens."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=generator))[0]
    sink, rest = basis[0], basis[1:]
    hidden = torch.randn(LAYERS, TOKENS, WIDTH - 1, generator=generator) @ rest
    hidden[START:END, position] += jump * sink
    for token, layers in PLANTED.items():
        hidden[list(layers), token] = 20 * sink + 0.1 * hidden[list(layers), token]
    return hidden


def flagged(sinks: SinkMap) -> dict[int, tuple[int, ...]]:
    return {s.position: s.layers for s in sinks.sinks}


def test_planted_tokens_are_found_at_exactly_their_layers():
    sinks = detect(streams())
    assert (sinks.primary.position, sinks.primary.start, sinks.primary.end) == (0, START, END)
    assert flagged(sinks) == {token: tuple(layers) for token, layers in PLANTED.items()}
    assert [(s.start, s.lifetime) for s in sinks.sinks] == [(4, 4), (6, 1), (3, 7)]


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10_000))
def test_a_common_rotation_changes_nothing(seed: int):
    hidden = streams(seed)
    turn = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(seed + 1)))[0]
    assert flagged(detect(hidden @ turn)) == flagged(detect(hidden))


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, TOKENS - 1), st.floats(1e-3, 1e3))
def test_scaling_a_tokens_whole_stream_changes_nothing(seed: int, token: int, scale: float):
    hidden = streams(seed)
    scaled = hidden.clone()
    scaled[:, token] *= scale
    assert flagged(detect(scaled, candidates=(0,))) == flagged(detect(hidden, candidates=(0,)))


@pytest.mark.parametrize("scale", [1e-3, 0.1, 100.0])
def test_scaling_the_primarys_own_stream_changes_nothing_once_it_is_accepted(scale: float):
    hidden = streams()
    scaled = hidden.clone()
    scaled[:, 0] *= scale
    assert flagged(detect(scaled, candidates=(0,), min_jump=0)) == flagged(detect(hidden))


def test_a_token_that_points_the_other_way_is_still_flagged():
    hidden = streams()
    hidden[:, 14] *= -1
    assert flagged(detect(hidden))[14] == tuple(PLANTED[14])


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10_000), st.integers(0, 1))
def test_nothing_is_flagged_outside_the_range_or_up_to_the_primary(seed: int, position: int):
    hidden = streams(seed, position=position)
    direction = hidden[START + 1, position].clone()
    hidden[:, 7] = 3 * direction
    hidden[START + 1 : END - 1, 0 if position else 7] = direction
    sinks = detect(hidden)
    assert sinks.primary.position == position
    assert all(START <= layer < END for layers in flagged(sinks).values() for layer in layers)
    assert min(flagged(sinks)) > position
    assert flagged(sinks)[7] == tuple(range(START, END))


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.05, 0.98), st.floats(0.0, 0.01))
def test_raising_the_threshold_never_adds_flags(seed: int, threshold: float, more: float):
    hidden = streams(seed)
    loose, strict = detect(hidden, threshold=threshold), detect(hidden, threshold=threshold + more)
    assert not bool((strict.flags() & ~loose.flags()).any())


def test_a_threshold_above_the_planted_cosine_drops_the_planted_tokens():
    assert flagged(detect(streams(), threshold=0.99999)) == {}


def test_a_flat_norm_profile_has_no_primary_sink():
    hidden = torch.randn(LAYERS, TOKENS, WIDTH, generator=torch.Generator().manual_seed(0))
    sinks = detect(hidden)
    assert sinks.primary is None
    assert sinks.sinks == ()
    assert sinks.reason.startswith("no primary sink found")
    assert detect(hidden, min_jump=0).primary is not None


def test_the_jump_is_measured_against_the_other_tokens():
    norms = torch.full((6, 8), 10.0)
    norms[2:, 0] = 10 + 19.9
    assert find_primary(norms)[0] is None
    norms[2:, 0] = 10 + 20.1
    assert find_primary(norms)[0].start == 2


def test_a_norm_that_never_falls_gives_a_range_to_the_end():
    hidden = streams()
    hidden[START:, 0] = torch.nn.functional.normalize(hidden[START, 0], dim=0) * torch.arange(100, 110)[:, None]
    assert detect(hidden).primary.end == LAYERS


def test_a_jump_at_the_last_layer_gives_a_range_of_one_layer():
    norms = torch.ones(5, 6)
    norms[4, 0] = 100
    primary = find_primary(norms)[0]
    assert (primary.start, primary.end) == (4, 5)


def test_the_range_ends_at_the_most_negative_step():
    norms = torch.ones(8, 6)
    norms[:, 0] = torch.tensor([1.0, 1, 100, 90, 95, 30, 20, 1])
    primary = find_primary(norms)[0]
    assert (primary.start, primary.end) == (2, 5)


def test_position_two_is_a_candidate_only_in_text_from_a_chat_template():
    hidden = streams(position=2)
    assert detect(hidden).primary is None
    assert detect(hidden, candidates=(0, 1, 2)).primary.position == 2


def test_a_given_span_is_examined_instead_of_the_range_found():
    sinks = detect(streams(), span=(4, 6))
    assert flagged(sinks) == {5: (4, 5), 14: (4, 5)}


@pytest.mark.parametrize("span", [(4, 4), (-1, 3), (2, LAYERS + 1)])
def test_a_span_outside_the_model_is_refused(span: tuple[int, int]):
    with pytest.raises(ArgumentError, match="span: got"):
        detect(streams(), span=span)


def test_further_ranges_in_which_the_primary_is_massive_are_listed():
    norms = torch.ones(14, 9)
    norms[:, 0] = torch.tensor([1.0, 4, 5, 1, 4, 1, 1, 90, 90, 5, 1, 1, 3, 3])
    primary = find_primary(norms)[0]
    assert (primary.start, primary.end) == (7, 9)
    assert massive_spans(norms, primary) == [(1, 3), (12, 14)]
    assert massive_spans(norms, primary, min_jump=3) == [(1, 3)]


def test_massive_half_precision_streams_do_not_overflow():
    hidden = torch.ones(6, 8, 64, dtype=torch.float16)
    hidden[2:5, 0] = 3e4
    hidden[2:5, 5] = 2e4
    sinks = detect(hidden)
    assert float(hidden[2, 0].norm()) == float("inf")
    assert (sinks.primary.start, sinks.primary.end) == (2, 5)
    assert flagged(sinks)[5] == (2, 3, 4)


@pytest.mark.parametrize(
    ("layers", "lifetime", "label"),
    [
        (48, 33, "bos_sink"),
        (48, 32, "secondary"),
        (48, 5, "secondary"),
        (48, 4, "noise"),
        (30, 15, "bos_sink"),
        (30, 14, "secondary"),
        (16, 10, "bos_sink"),
        (16, 9, "secondary"),
        (16, 3, "secondary"),
        (16, 2, "noise"),
        (4, 2, "secondary"),
        (4, 1, "noise"),
    ],
)
def test_labels_follow_the_paper_in_deep_models_and_the_depth_in_shallow_ones(layers: int, lifetime: int, label: str):
    assert label_rule(layers).label(lifetime) == label


def test_the_label_rule_can_be_chosen():
    assert (label_rule(30, "paper").primary_min, label_rule(30, "scaled").primary_min) == (15, 18)
    assert (label_rule(20, "paper").noise_max, label_rule(20, "scaled").noise_max) == (4, 2)
    assert label_rule(24, "scaled").noise_max == 4
    with pytest.raises(ArgumentError, match=r"rule: got 'papr'.*Did you mean 'paper'"):
        label_rule(30, "papr")


def test_the_longest_run_ignores_a_flicker_that_the_count_takes():
    hidden = streams()
    hidden[8, 5] = hidden[4, 5]
    hidden[6, 5] = torch.ones(WIDTH)
    hidden[3, 5] = hidden[4, 5]
    count, run = detect(hidden), detect(hidden, lifetime="longest_run")
    level = {s.position: (s.start, s.lifetime) for s in run.sinks}[5]
    assert {s.position: (s.start, s.lifetime) for s in count.sinks}[5] == (3, 5)
    assert level == (3, 3)


def test_a_sink_map_survives_json():
    for sinks in (detect(streams()), detect(torch.ones(4, 6, 8))):
        assert SinkMap.from_json(sinks.to_json()) == sinks


def test_a_cache_policy_can_ask_which_tokens_to_protect_at_a_layer():
    sinks = detect(streams())
    assert sinks.at(6) == [5, 9, 14]
    assert sinks.at(6, "secondary") == [s.position for s in sinks.sinks if s.label == "secondary"]
    assert sinks.at(11) == []
    with pytest.raises(ArgumentError, match="layer: got 12"):
        sinks.at(12)
    with pytest.raises(ArgumentError, match="labels: got 'second'"):
        sinks.at(6, "second")


@pytest.mark.parametrize("text", ["", "[1]", "{}", '{"format": 1}', '{"format": 0}'])
def test_json_that_is_no_sink_map_is_refused(text: str):
    with pytest.raises(ArgumentError):
        SinkMap.from_json(text)


def test_a_sink_map_of_another_format_is_refused():
    data = json.loads(detect(streams()).to_json()) | {"format": 99}
    with pytest.raises(ArgumentError, match="format: got 99"):
        SinkMap.from_dict(data)


@pytest.mark.parametrize(
    ("hidden", "options", "message"),
    [
        (torch.ones(1, 6, 4), {}, "at least two layers"),
        (torch.ones(4, 2, 4), {}, "text of 2, expected at least 3"),
        (torch.ones(4, 0, 4), {}, "text of 0"),
        (torch.ones(4, 6, 4), {"candidates": ()}, "candidates: got"),
        (torch.ones(4, 6, 4), {"candidates": (-1,)}, "candidates: got"),
        (torch.ones(4, 6, 4), {"threshold": 1.0}, "threshold: got 1.0"),
        (torch.ones(4, 6, 4), {"threshold": float("nan")}, "threshold: got nan"),
        (torch.ones(4, 6, 4), {"lifetime": "runs"}, "lifetime: got 'runs'"),
    ],
)
def test_unusable_arguments_are_refused_with_a_reason(hidden: torch.Tensor, options: dict, message: str):
    with pytest.raises(ArgumentError, match=message):
        detect(hidden, **options)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_streams_that_are_not_finite_name_the_layer(value: float):
    hidden = streams()
    hidden[3, 7, 2] = value
    with pytest.raises(NumericError, match="after layer 3"):
        detect(hidden)


def test_a_zero_stream_is_no_sink():
    hidden = streams()
    hidden[:, 11] = 0
    assert 11 not in flagged(detect(hidden))
