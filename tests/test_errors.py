"""Errors for names and numbers outside a known set."""

from __future__ import annotations

from headway.errors import unknown


def test_a_name_is_told_with_the_nearest_and_all_others():
    text = str(unknown("method", "flexprefil", ["dhsa", "flexprefill"], fix="See the list."))
    assert text == (
        "method: got 'flexprefil', expected one of dhsa, flexprefill. Did you mean 'flexprefill'? See the list."
    )


def test_a_number_outside_a_range_is_told_its_ends_and_no_guess():
    assert str(unknown("layer", 99, range(30))) == "layer: got 99, expected a number from 0 to 29."
