"""Work in processes of one thread: results in order, errors raised, numbers as in one process."""

from __future__ import annotations

import os

import pytest
import torch

from headway.errors import ArgumentError
from headway.evidence.parallel import processes, side_by_side


def fact(number: int) -> tuple[int, int, int]:
    if number == 13:
        raise ArgumentError("number: got 13, expected another.")
    return number * number, torch.get_num_threads(), os.getpid()


def test_results_are_in_the_order_of_the_calls_from_processes_of_one_thread():
    found = side_by_side(fact, [(3,), (1,), (2,)], workers=2)
    assert [square for square, _, _ in found] == [9, 1, 4]
    assert {threads for _, threads, _ in found} == {1}
    assert os.getpid() not in {process for _, _, process in found}


def test_one_worker_is_this_process():
    assert {process for _, _, process in side_by_side(fact, [(1,), (2,)], workers=1)} == {os.getpid()}


def test_the_error_of_a_call_is_raised():
    with pytest.raises(ArgumentError, match="got 13"):
        side_by_side(fact, [(1,), (13,), (2,)], workers=2)
    with pytest.raises(ArgumentError, match="workers"):
        side_by_side(fact, [(1,)], workers=0)


def test_processes_stay_for_several_calls_and_end_with_the_block():
    with processes(2) as together:
        first, second = (together(fact, [(n,) for n in range(start, start + 6)]) for start in (0, 6))
    assert [square for square, _, _ in first + second] == [n * n for n in range(12)]
    used = {process for _, _, process in first + second}
    assert len(used) <= 2
    assert os.getpid() not in used
    with pytest.raises(ProcessLookupError):
        os.kill(used.pop(), 0)
