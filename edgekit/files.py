"""Writing so that nothing is ever left half done: temporary names, then a rename."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from edgekit.errors import EdgeKitError

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@contextmanager
def new_folder(path: Path, ours: Collection[str]) -> Iterator[Path]:
    """Yields an empty temporary folder that becomes `path` when the block ends well, and is removed when it does not.

    An existing folder is replaced only where it holds nothing but files named in `ours`, so that nothing but our own
    output is ever deleted. Raises EdgeKitError where the place cannot be written to, before the block runs.
    """
    path = path.resolve() if path.is_symlink() else path
    made: list[Path] = []
    temporary: Path | None = None
    try:
        with writing(path):
            _check_ours(path, ours)
            made = [p for p in path.parents if not p.exists()]
            path.parent.mkdir(parents=True, exist_ok=True)
            # Named before it is made: an interruption in between would leave it behind.
            temporary = path.parent / f".{path.name}-{secrets.token_hex(8)}"
            temporary.mkdir(mode=0o700)
        yield temporary
        with writing(path):
            temporary.chmod(0o755)
            _replace(path, temporary)
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
        for parent in made:
            with suppress(OSError):  # holds the result, or what others put there
                parent.rmdir()


@contextmanager
def resumable(checkpoint: Path) -> Iterator[None]:
    """Adds a note to an interruption of the block: which files beside `checkpoint` stay for a run that goes on."""
    try:
        yield
    except KeyboardInterrupt as stop:
        left = _left_beside(checkpoint)
        if left:
            stop.add_note(f"the same command with --resume goes on from {', '.join(left)}")
        raise


def not_resumed(checkpoint: Path, resume: bool) -> tuple[str, ...]:
    """Returns a note where a run is to go on from what lies beside `checkpoint`, and nothing does."""
    if not resume or _left_beside(checkpoint):
        return ()
    return (f"--resume found nothing to go on from, {checkpoint} is not there: all was done anew",)


def _left_beside(checkpoint: Path) -> list[str]:
    stem = checkpoint.name.removesuffix(checkpoint.suffix)
    return sorted(str(path) for path in checkpoint.parent.glob("*") if path.name.startswith(stem) and path.is_file())


def _check_ours(path: Path, ours: Collection[str]) -> None:
    if not path.exists():
        return
    if not path.is_dir():
        raise EdgeKitError(f"{path} exists and is not a folder", "choose another --out, or move it away")
    foreign = sorted(entry.name for entry in path.iterdir() if entry.name not in ours or not entry.is_file())
    if foreign:
        raise EdgeKitError(
            f"{path} exists and holds what EdgeKit did not write: {foreign[0]}", "choose another --out, or move it away"
        )


def _replace(path: Path, new: Path) -> None:
    """Puts the folder `new` in the place of `path`, which stays as it was where that fails."""
    old = new.with_name(f"{new.name}.old")
    if path.exists():
        path.rename(old)
    try:
        new.rename(path)
    except BaseException:
        if old.exists():
            old.rename(path)
        raise
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns a failed write into an EdgeKitError that names the place."""
    try:
        yield
    except OSError as error:
        raise EdgeKitError(
            f"cannot write {path}: {os.strerror(error.errno) if error.errno else error}",
            "free some space, or write to another place" if error.errno in FULL else "write to another place",
        ) from None


def check_writable(path: Path) -> None:
    """Raises EdgeKitError where `path` cannot be written, before long work is done for it."""
    if path.is_dir():
        raise EdgeKitError(f"cannot write {path}: it is a folder", "name a file")
    if _is_special(path):
        return
    with writing(path), tempfile.NamedTemporaryFile(prefix=f".{path.name}-", dir=path.parent):
        pass


def _is_special(path: Path) -> bool:
    """Whether `path` is a pipe or a device such as /dev/null, which is written to and never replaced."""
    return path.exists() and not path.is_file() and not path.is_dir()


def write(path: Path, data: bytes) -> None:
    """Writes `data` to `path` under a temporary name first; raises EdgeKitError where that fails."""
    path = path.resolve() if path.is_symlink() else path
    temporary = path.with_name(f".{path.name}.partial")
    with writing(path):
        if _is_special(path):
            path.write_bytes(data)
            return
        try:
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Writes `value` as indented JSON; NaN and infinities are bugs and raise ValueError."""
    write(path, (json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False) + "\n").encode())


def sha256(path: Path) -> str:
    """Returns the hex SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
