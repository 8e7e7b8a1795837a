"""Without the harness there is one line that says what to install."""

from __future__ import annotations

import importlib.util

import pytest

from headway.errors import MissingExtraError
from headway.evaluate import register


def test_a_missing_harness_is_one_line(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "lm_eval" else find(name))
    with pytest.raises(MissingExtraError, match=r"pip install 'headway\[eval\]'"):
        register()
