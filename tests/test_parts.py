"""Finished parts survive what happens to files, and are never read for something else."""

import json
import math
from dataclasses import dataclass

import numpy as np
import pytest

from headway.errors import ArgumentError
from headway.parts import Parts, key_of


class Work:
    """Counts how often a part is made."""

    def __init__(self, result):
        self.result, self.made = result, 0

    def __call__(self):
        self.made += 1
        return self.result


def arrays():
    return {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.array([1.5], np.float16)}


def keep(kind, folder, what="work", **options):
    """(result, times it was made) of one part of either kind."""
    work = Work({"x": [1, 2.5], "s": "é"} if kind == "data" else arrays())
    return getattr(Parts(folder), kind)(what, work, **options), work.made


KINDS = pytest.mark.parametrize("kind", ["data", "arrays"])


@KINDS
def test_a_finished_part_is_not_made_again(kind, tmp_path):
    first, made = keep(kind, tmp_path)
    again, more = keep(kind, tmp_path)
    assert (made, more) == (1, 0)
    assert str(again) == str(first)


@KINDS
@pytest.mark.parametrize("harm", ["cut", "empty", "altered", "other", "unreadable"])
def test_a_part_that_is_not_whole_is_told_and_made_again(kind, harm, tmp_path, caplog):
    keep(kind, tmp_path)
    (path,) = tmp_path.iterdir()
    data = path.read_bytes()
    if harm == "other":
        keep(kind, tmp_path, what="other work")
        (other,) = set(tmp_path.iterdir()) - {path}
        other.replace(path)
    elif harm == "altered":
        place = data.rindex(b"2.5" if kind == "data" else arrays()["a"].tobytes())
        path.write_bytes(data[:place] + b"\x37" + data[place + 1 :])
    else:
        path.write_bytes({"cut": data[: len(data) - 3], "empty": b"", "unreadable": b"\xff\xfe[]"}[harm])
    found, made = keep(kind, tmp_path)
    assert made == 1
    assert path.name in caplog.text
    assert str(found) == str(keep(kind, tmp_path / "fresh")[0])
    assert keep(kind, tmp_path)[1] == 0, "the part that was made again stands in the place of the damaged one"


@KINDS
def test_parts_of_other_work_are_not_read(kind, tmp_path):
    keep(kind, tmp_path, what=["model", 1])
    assert keep(kind, tmp_path, what=["model", 2])[1] == 1


@KINDS
def test_anew_makes_a_part_in_any_case(kind, tmp_path):
    keep(kind, tmp_path)
    assert keep(kind, tmp_path, anew=True)[1] == 1


def test_without_a_folder_nothing_is_written_and_data_is_remembered():
    parts, work = Parts(), Work(None)
    assert parts.data("a", work) is None
    assert parts.data("a", work) is None
    assert (work.made, parts.reused) == (1, 1)


def test_an_interrupt_leaves_no_part(tmp_path):
    def broken():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Parts(tmp_path).arrays("a", broken)
    assert list(tmp_path.iterdir()) == []


def test_data_holds_what_json_holds_and_nan(tmp_path):
    made = Parts(tmp_path).data("a", lambda: {"v": (1, math.nan)})
    found = Parts(tmp_path).data("a", dict)
    assert made["v"][0] == found["v"][0] == 1
    assert math.isnan(found["v"][1])


def test_arrays_come_back_exactly(tmp_path):
    Parts(tmp_path).arrays("a", arrays)
    found = Parts(tmp_path).stored("a")
    for name, value in arrays().items():
        assert found[name].dtype == value.dtype
        np.testing.assert_array_equal(found[name], value)
    assert Parts(tmp_path).stored("b") is None


@dataclass(frozen=True)
class Setting:
    rate: float


@dataclass(frozen=True)
class OtherSetting:
    rate: float


def test_keys_tell_apart_whatever_differs():
    long = np.zeros(5000)
    changed = long.copy()
    changed[2500] = 1
    given = [long, changed, long.astype(np.float32), long.reshape(2, -1), Setting(1.0), Setting(2.0), OtherSetting(1.0)]
    assert len({key_of([x]) for x in given}) == len(given)
    assert key_of({"a": 1, "b": 2}) == key_of({"b": 2, "a": 1})
    assert key_of(["\ud800"]) != key_of(["\ud801"])


def test_a_key_of_something_else_is_refused():
    with pytest.raises(ArgumentError, match="expected plain data"):
        key_of([object()])


def test_a_part_tells_what_it_is_of(tmp_path):
    Parts(tmp_path, prefix="x-").data(["a"], lambda: 1)
    (path,) = tmp_path.iterdir()
    assert path.name == f"x-{key_of(['a'])}.json"
    assert json.loads(path.read_text())["key"] == key_of(["a"])
