"""Files are whole or not there."""

from __future__ import annotations

import errno
import os

import pytest

from headway.files import write_atomically


def test_text_and_bytes_are_written_and_folders_made(tmp_path):
    assert write_atomically(tmp_path / "a" / "b.txt", "é").read_text(encoding="utf-8") == "é"
    assert write_atomically(tmp_path / "c", b"\0").read_bytes() == b"\0"


@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_full_disk_or_an_interrupt_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, failure):
    path = write_atomically(tmp_path / "report.html", "old")

    def fail(*_):
        raise failure

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(type(failure)):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]
