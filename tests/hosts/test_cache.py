from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from headway.errors import ArgumentError, HostError
from headway.hosts import cache as cache_module
from headway.hosts.cache import MANIFEST, SMALL_FILE, converted, damage, host_folder, remembered_sha256

KEY = "host-abc-1"


def write_weights(folder, report):
    report("writing")
    (folder / "weights").write_bytes(b"numbers")
    (folder / "config.json").write_text("{}")


def visible(cache) -> list[str]:
    """Everything in the cache but the empty lock files."""
    return sorted(str(p.relative_to(cache)) for p in cache.rglob("*") if p.is_file() and p.suffix != ".lock")


def convert_with(function):
    return converted(KEY, function, title="model 'host'")


def test_a_conversion_runs_once_and_leaves_a_checked_folder(cache):
    calls = []

    def convert(folder, report):
        calls.append(folder)
        write_weights(folder, report)

    assert convert_with(convert) == convert_with(convert) == cache / "hosts" / KEY
    assert len(calls) == 1
    assert damage(host_folder(KEY), verify=True) is None
    assert visible(cache) == [f"hosts/{KEY}/{name}" for name in ("config.json", MANIFEST, "weights")]


def test_the_cache_folder_follows_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("HEADWAY_CACHE", str(tmp_path))
    assert host_folder("x") == tmp_path / "hosts" / "x"
    monkeypatch.setenv("HEADWAY_CACHE", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    assert "headway" in host_folder("x").parts


@pytest.mark.parametrize("trigger", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_leaves_nothing(cache, trigger):
    def convert(folder, report):
        write_weights(folder, report)
        raise trigger

    with pytest.raises(trigger):
        convert_with(convert)
    assert visible(cache) == []
    assert [p for p in (cache / "hosts").iterdir() if p.is_dir()] == []


def disk_full_as_os_error():
    raise OSError(errno.ENOSPC, "No space left on device")


def disk_full_as_text():
    raise RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")


def disk_full_underneath():
    try:
        disk_full_as_os_error()
    except OSError as error:
        raise ValueError("could not save") from error


@pytest.mark.parametrize("fail", [disk_full_as_os_error, disk_full_as_text, disk_full_underneath])
def test_a_full_disk_leaves_nothing_and_names_the_fix(cache, fail):
    def convert(folder, report):
        write_weights(folder, report)
        fail()

    with pytest.raises(HostError, match=r"disk is full.*HEADWAY_CACHE") as caught:
        convert_with(convert)
    assert "\n" not in str(caught.value)
    assert visible(cache) == []


def test_a_disk_full_at_the_manifest_leaves_nothing(cache, monkeypatch):
    monkeypatch.setattr(cache_module, "write_atomically", lambda *_: disk_full_as_os_error())
    with pytest.raises(HostError, match="disk is full"):
        convert_with(write_weights)
    assert visible(cache) == []


def test_too_little_room_is_found_before_the_work(cache):
    with pytest.raises(HostError, match=r"disk is full; converting needs 1,000,000,000,000 MB"):
        converted(KEY, lambda *_: pytest.fail("conversion ran"), title="model 'host'", room=10**18)


def test_a_cache_that_cannot_be_written_names_the_variable(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("HEADWAY_CACHE", str(tmp_path / "file"))
    with pytest.raises(HostError, match=r"cannot write the cache .*set HEADWAY_CACHE"):
        convert_with(write_weights)


def test_a_failed_conversion_says_why_on_one_line_and_leaves_nothing(cache):
    def convert(folder, report):
        write_weights(folder, report)
        raise ValueError("shapes differ\nmore")

    with pytest.raises(HostError, match=r"converting failed \(ValueError: shapes differ\)$"):
        convert_with(convert)
    assert visible(cache) == []


def test_the_errors_of_headway_pass_through_a_conversion_unchanged(cache):
    def convert(folder, report):
        raise ArgumentError("checksum: wrong")

    with pytest.raises(ArgumentError, match=r"^checksum: wrong$"):
        convert_with(convert)


def truncate(folder):
    (folder / "weights").write_bytes(b"num")


def remove_a_file(folder):
    (folder / "weights").unlink()


def change_a_small_file(folder):
    (folder / "weights").write_bytes(b"NUMBERS")


def tear_the_manifest(folder):
    (folder / MANIFEST).write_text((folder / MANIFEST).read_text()[:40])


def replace_the_manifest(folder):
    (folder / MANIFEST).write_text(json.dumps([1, 2]))


def age_the_manifest(folder):
    (folder / MANIFEST).write_text(json.dumps({"format": 0, "files": {}}))


@pytest.mark.parametrize(
    "harm",
    [truncate, remove_a_file, change_a_small_file, tear_the_manifest, replace_the_manifest, age_the_manifest],
)
def test_a_damaged_copy_is_noticed_and_made_again(cache, harm):
    folder = convert_with(write_weights)
    harm(folder)
    assert damage(folder) is not None
    assert convert_with(write_weights) == folder
    assert damage(folder, verify=True) is None
    assert (folder / "weights").read_bytes() == b"numbers"
    assert [p.name for p in folder.parent.iterdir() if p.is_dir()] == [KEY]


def test_large_files_are_hashed_only_when_asked(cache):
    def convert(folder, report):
        (folder / "weights").write_bytes(bytes(SMALL_FILE + 1))

    folder = convert_with(convert)
    (folder / "weights").write_bytes(b"\1" + bytes(SMALL_FILE))
    assert damage(folder) is None
    assert damage(folder, verify=True) == "weights has another checksum"
    converted(KEY, convert, title="model 'host'", verify=True)
    assert damage(folder, verify=True) is None


def test_what_a_killed_conversion_left_is_swept(cache):
    stale = cache / "hosts" / f".{KEY}.partial-dead"
    stale.mkdir(parents=True)
    (stale / "weights").write_bytes(b"half")
    convert_with(write_weights)
    assert not stale.exists()


def test_an_abandoned_folder_without_manifest_is_replaced(cache):
    host_folder(KEY).mkdir(parents=True)
    convert_with(write_weights)
    assert damage(host_folder(KEY)) is None


# Announces itself, converts once `company` processes have done so, and then takes a while longer.
SLOW_CONVERSION = """
    import os, sys, time
    from pathlib import Path
    from headway.hosts.cache import converted

    meeting, company = Path(sys.argv[1]), int(sys.argv[2])

    def convert(folder, report):
        (folder / "weights").write_bytes(b"numbers")
        while len(list(meeting.glob("here-*"))) < company:
            time.sleep(0.02)
        time.sleep(0.5)
        (meeting / f"converted-{os.getpid()}").touch()

    (meeting / f"here-{os.getpid()}").touch()
    folder = converted("host-abc-1", convert, title="model 'host'")
    print((folder / "weights").read_text())
"""


def start_conversion(meeting, company: int) -> subprocess.Popen:
    command = [sys.executable, "-c", textwrap.dedent(SLOW_CONVERSION), str(meeting), str(company)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(condition):
    while not condition():
        time.sleep(0.02)


def test_two_processes_convert_once(cache, tmp_path):
    both = [start_conversion(tmp_path, company=2) for _ in range(2)]
    results = [process.communicate(timeout=120) for process in both]
    assert [process.returncode for process in both] == [0, 0], results
    assert [out for out, _ in results] == ["numbers\n", "numbers\n"]
    assert len(list(tmp_path.glob("converted-*"))) == 1


def test_a_killed_process_hands_over_to_the_next(cache, tmp_path):
    first = start_conversion(tmp_path, company=2)
    wait_for(lambda: list(cache.glob("hosts/.*.partial-*/weights")) or first.poll() is not None)
    os.kill(first.pid, signal.SIGKILL)
    first.communicate()
    assert convert_with(write_weights) == host_folder(KEY)
    assert visible(cache) == [f"hosts/{KEY}/{name}" for name in ("config.json", MANIFEST, "weights")]


def test_a_checksum_is_remembered_until_the_file_changes(cache, tmp_path, monkeypatch):
    file = tmp_path / "weights"
    file.write_bytes(b"one")
    first = remembered_sha256(file)
    monkeypatch.setattr(cache_module, "sha256_of", lambda _: pytest.fail("hashed again"))
    assert remembered_sha256(file) == first
    monkeypatch.undo()
    file.write_bytes(b"other")
    assert remembered_sha256(file) != first


def test_a_checksum_is_found_without_a_cache_to_remember_it(tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"one")
    monkeypatch.setenv("HEADWAY_CACHE", str(tmp_path / "file"))
    assert remembered_sha256(tmp_path / "file") == cache_module.sha256_of(tmp_path / "file")
