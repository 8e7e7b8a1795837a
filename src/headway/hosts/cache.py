"""The user cache: converted models that are either complete and checked, or absent.

A conversion writes into a temporary folder beside its goal and is renamed into place when all is on disk, so no reader
ever sees a part of it. Each folder carries a manifest with the size and SHA-256 of every file. One lock per folder lets
two processes ask at once: the second waits and finds the work done. The lock file itself, which is empty, stays.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from headway.errors import HeadwayError, HostError
from headway.files import write_atomically

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
FORMAT = 1
# Files up to this size are hashed on every load (a few milliseconds); larger ones only have their size compared.
SMALL_FILE = 8_000_000
CHUNK = 1 << 20

Report = Callable[[str], None]
Converter = Callable[[Path, Report], None]


def cache_folder() -> Path:
    """Where Headway keeps converted models: the environment variable HEADWAY_CACHE, else the user's cache folder."""
    from platformdirs import user_cache_dir

    return Path(os.environ.get("HEADWAY_CACHE") or user_cache_dir("headway")).expanduser()


def host_folder(key: str) -> Path:
    """The folder of one converted model, whether it exists or not."""
    return cache_folder() / "hosts" / key


def converted(key: str, convert: Converter, *, title: str, room: int = 0, verify: bool = False) -> Path:
    """The folder `key` of converted weights; made by `convert(folder, report)` where it is absent or damaged.

    `convert` writes its files into the folder it is given and names each stage through `report`. `room` is the space in
    bytes that the result takes. `verify` hashes the weights of an existing copy as well.

    Raises HostError on a full disk, a cache that cannot be written, and a conversion that fails. Whatever ends a
    conversion early, an interrupt too, leaves no part of it behind."""
    folder = host_folder(key)
    fault = damage(folder, verify=verify)
    if fault is None:
        return folder
    with _cache_errors(title, room), _locked(folder, title):
        fault = damage(folder, verify=verify)
        if fault is None:
            return folder
        if folder.exists():
            logger.warning("%s: the converted copy is damaged (%s); converting it again", title, fault)
        _sweep(folder)
        _require_room(folder, room)
        _make(folder, convert, title)
    return folder


def damage(folder: Path, *, verify: bool = False) -> str | None:
    """What is wrong with a converted copy, or None where it is whole: every file of its manifest has its size, small
    files (and all, with `verify`) their SHA-256."""
    if not folder.is_dir():
        return "there is none"
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT:
            return f"its manifest has format {manifest['format']!r}, expected {FORMAT}"
        files = {str(name): (int(entry["bytes"]), str(entry["sha256"])) for name, entry in manifest["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return "its manifest cannot be read"
    for name, (size, checksum) in files.items():
        path = folder / name
        try:
            found = path.stat().st_size
            if found != size:
                return f"{name} has {found:,} bytes, expected {size:,}"
            if (verify or size <= SMALL_FILE) and sha256_of(path) != checksum:
                return f"{name} has another checksum"
        except OSError:
            return f"{name} cannot be read"
    return None


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(CHUNK):
            digest.update(piece)
    return digest.hexdigest()


def remembered_sha256(path: Path) -> str:
    """SHA-256 of a file that is not ours, hashed once: the cache remembers it for as long as path, size and time of
    last change stay the same. Where the cache cannot be written the file is hashed each time."""
    facts = path.stat()
    place = str(path.resolve())
    identity = {"path": place, "bytes": facts.st_size, "changed": facts.st_mtime_ns}
    note = cache_folder() / "checked" / f"{hashlib.sha256(place.encode()).hexdigest()[:16]}.json"
    try:
        known = json.loads(note.read_text(encoding="utf-8"))
        if {fact: known[fact] for fact in identity} == identity:
            return str(known["sha256"])
    except (OSError, ValueError, KeyError, TypeError):
        pass
    checksum = sha256_of(path)
    try:
        write_atomically(note, json.dumps({**identity, "sha256": checksum}))
    except OSError as error:
        logger.info("cannot remember the checksum of %s: %s", path, error)
    return checksum


def _make(folder: Path, convert: Converter, title: str) -> None:
    partial = Path(tempfile.mkdtemp(prefix=_partial_prefix(folder), dir=folder.parent))
    try:
        with _progress(title) as report:
            convert(partial, report)
            report("checking")
            _seal(partial)
        partial.chmod(0o755)
        if folder.exists():
            folder.rename(Path(tempfile.mkdtemp(prefix=_partial_prefix(folder), dir=folder.parent)) / "damaged")
        os.replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        _sweep(folder)


def _seal(folder: Path) -> None:
    """Puts every file on the disk, readable for all (safetensors leaves it to the owner), and writes the manifest."""
    files = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        with path.open("rb+") as file:
            os.fsync(file.fileno())
        path.chmod(0o644)
        files[path.relative_to(folder).as_posix()] = {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
    write_atomically(folder / MANIFEST, json.dumps({"format": FORMAT, "files": files}, indent=1))


def _partial_prefix(folder: Path) -> str:
    return f".{folder.name}.partial-"


def _sweep(folder: Path) -> None:
    """Removes what a killed conversion left. The lock is held, so nobody works in these folders."""
    for stale in folder.parent.glob(_partial_prefix(folder) + "*"):
        shutil.rmtree(stale, ignore_errors=True)


def _require_room(folder: Path, room: int) -> None:
    if shutil.disk_usage(folder.parent).free < room:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder.parent))


@contextmanager
def _locked(folder: Path, title: str) -> Iterator[None]:
    from filelock import FileLock, Timeout

    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder.parent / f".{folder.name}.lock")
    try:
        lock.acquire(timeout=1)
    except Timeout:
        with _progress(title) as report:
            report("waiting for another process that converts it")
            lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _cache_errors(title: str, room: int) -> Iterator[None]:
    """Turns what can go wrong while the cache is written into one line with its fix."""
    try:
        yield
    except HeadwayError:
        raise
    except Exception as error:
        where = cache_folder()
        if _is_disk_full(error):
            raise HostError(
                f"{title}: the disk is full; converting needs {room / 1e6:,.0f} MB in {where}. Free some space, or set "
                "HEADWAY_CACHE to a folder on another disk."
            ) from error
        if isinstance(error, OSError):
            raise HostError(
                f"{title}: cannot write the cache {where} ({error.strerror or error}); set HEADWAY_CACHE to a folder "
                "you can write to."
            ) from error
        raise HostError(f"{title}: converting failed ({type(error).__name__}: {_first_line(error)})") from error


def _is_disk_full(error: BaseException | None) -> bool:
    """True for ENOSPC and EDQUOT; safetensors reports them as text ("os error 28") and not as an OSError."""
    codes = (errno.ENOSPC, errno.EDQUOT)
    while error is not None:
        if isinstance(error, OSError) and error.errno in codes:
            return True
        if any(f"os error {code})" in str(error) for code in codes):
            return True
        error = error.__cause__ or error.__context__
    return False


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0]


@contextmanager
def _progress(title: str) -> Iterator[Report]:
    """A spinner with the current stage and the time so far, on the error stream."""
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(title, total=None)
        yield lambda stage: progress.update(task, description=f"{title}: {stage}")
