"""The benchmark helper: what it counts and writes, never how long things take."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from pathlib import Path

import pytest
import torch

from headway.errors import ArgumentError

SOURCE = Path(__file__).parents[2] / "benchmarks" / "harness.py"


@pytest.fixture(scope="module")
def harness():
    spec = importlib.util.spec_from_file_location("benchmark_harness", SOURCE)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def test_both_sides_alternate_who_goes_first(harness, tmp_path):
    calls: list[str] = []
    harness.compare("order", lambda: calls.append("m"), lambda: calls.append("b"), repeats=3, results=tmp_path)
    assert "".join(calls) == "mb" + "mb" + "bm" + "mb"


def test_the_ratio_is_of_medians_with_an_interval(harness, tmp_path, monkeypatch):
    seconds = {"m": iter([3.0, 3.0, 3.0, 90.0, 3.0, 3.0, 3.0]), "b": iter([2.0] * 7)}
    monkeypatch.setattr(harness, "_seconds", lambda function: next(seconds[function()]))
    result = harness.compare("ratio", lambda: "m", lambda: "b", repeats=7, results=tmp_path)
    assert result.ratio.value == pytest.approx(1.5)
    assert result.ratio.low == pytest.approx(1.5)
    assert result.ratio_of_minima == pytest.approx(1.5)
    assert result.ratio.n == 7


def test_the_result_is_written_with_its_environment(harness, tmp_path, capsys):
    harness.compare("written", dict, list, repeats=2, settings={"tokens": 4}, memory=True, results=tmp_path)
    stored = json.loads((tmp_path / "written.json").read_text())
    assert stored["settings"] == {"tokens": 4}
    assert stored["environment"]["torch"] == torch.__version__
    assert len(stored["method"]) == len(stored["baseline"]) == 2
    assert stored["method_peak"]["source"] in ("VmHWM", "ru_maxrss", "unknown")
    printed = capsys.readouterr().out
    assert "method" in printed
    assert "baseline" in printed


def test_peak_memory_sees_a_tensor_that_is_gone_afterwards(harness):
    peak = harness.peak_memory(lambda: torch.ones(64 * 2**20 // 4).sum().item())
    if peak.source != "VmHWM":
        pytest.skip("this system cannot reset the peak of a process")
    assert 48 * 2**20 < peak.rise < 160 * 2**20


def test_without_proc_the_peak_comes_from_getrusage(harness, monkeypatch):
    monkeypatch.setattr(harness, "_status", lambda field: None)
    peak = harness.peak_memory(lambda: None)
    assert peak.source == "ru_maxrss"
    assert peak.rise >= 0


def test_without_any_source_the_peak_is_unknown(harness, monkeypatch):
    monkeypatch.setattr(harness, "_status", lambda field: None)
    monkeypatch.setattr(harness, "_maxrss", lambda: None)
    assert harness.peak_memory(lambda: None) == harness.Peak(rise=None, source="unknown")


@pytest.mark.parametrize(("load", "warned"), [(0.4, False), (0.6, True)])
def test_a_busy_machine_is_named(harness, monkeypatch, caplog, load, warned):
    monkeypatch.setattr(os, "getloadavg", lambda: (load, 0, 0))
    assert harness.warn_if_busy() == load
    assert ("something else is running" in caplog.text) == warned


def test_a_system_without_load_average_is_no_error(harness, monkeypatch):
    monkeypatch.delattr(os, "getloadavg")
    assert harness.warn_if_busy() is None


def test_one_repeat_is_too_few(harness, tmp_path):
    with pytest.raises(ArgumentError, match="repeats ≥ 2"):
        harness.compare("few", dict, list, repeats=1, results=tmp_path)
