"""Writing so that nothing is ever left half done: temporary names, then a rename."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import stat
import tempfile
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from edgekit.errors import EdgeKitError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
TRIES = 100
_held: dict[Path, int] = {}  # what this process works in → the descriptor whose lock says that it lives


@contextmanager
def temporary_folder() -> Iterator[str]:
    """Yields an empty folder for the block, `edgekit-<hex>` in the folder for temporary files.

    It is removed with the block, and where this process is killed by the next one that wants such a folder.
    """
    folder = make_temporary()
    try:
        yield str(folder)
    finally:
        remove(folder)


def make_temporary(parent: Path | None = None, start: str = "edgekit-") -> Path:
    """Makes a folder as `temporary_folder` does, or in `parent` with a name that begins with `start`, for `remove`."""
    return _claim(parent or Path(tempfile.gettempdir()), start, "")


def remove(folder: Path) -> None:
    """Removes a folder of `make_temporary` with all that is in it; one that is not there is passed over."""
    shutil.rmtree(folder, ignore_errors=True)
    descriptor = _held.pop(folder, None)
    if descriptor is not None:
        os.close(descriptor)


@contextmanager
def torch_cache() -> Iterator[None]:
    """Gives torch's compiler, which makes a folder for its results on import, one that goes with the block."""
    variable = "TORCHINDUCTOR_CACHE_DIR"
    if variable in os.environ:
        yield
        return
    try:
        folder = make_temporary()
    except OSError:  # told by whatever needs the place
        yield
        return
    os.environ[variable] = str(folder)
    try:
        yield
    finally:
        os.environ.pop(variable, None)
        remove(folder)


def _claim(parent: Path, start: str, end: str, file: bool = False) -> Path:
    """Makes a new folder (or file) of ours in `parent`, with a lock that lasts as long as this process and its copies.

    What processes left there under such names that live no more is removed first.
    """
    _sweep(parent, start, end)
    for _ in range(TRIES):
        path = parent / f"{start}{secrets.token_hex(8)}{end}"
        if file:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        else:
            path.mkdir(mode=0o700)
            if fcntl is None:
                return path
            try:
                descriptor = os.open(path, os.O_RDONLY)
            except FileNotFoundError:  # swept away by another process before it was locked
                continue
        _held[path] = descriptor
        if _lock(descriptor) and path.exists():
            return path
        os.close(_held.pop(path))
    raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN), str(parent))


def _lock(descriptor: int) -> bool:
    """Whether the lock of a file or folder is ours now. File systems without locks have none to give."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def _sweep(parent: Path, start: str, end: str) -> None:
    """Removes what killed processes left in `parent`: names of ours whose locks nobody holds, of this user alone."""
    if fcntl is None:
        return
    ours = re.compile(re.escape(start) + r"[0-9a-f]{16}" + re.escape(end))
    try:
        left = [path for path in parent.iterdir() if ours.fullmatch(path.name)]
    except OSError:
        return
    for path in left:
        with suppress(OSError):
            found = path.lstat()
            if found.st_uid != os.geteuid() or stat.S_ISLNK(found.st_mode):
                continue
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if stat.S_ISDIR(found.st_mode):
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink()
            finally:
                os.close(descriptor)


def shown(path: Path) -> str:
    """Returns what a message calls a file: its path, or its name alone in a folder of ours that goes again."""
    return path.name if path.parent in _held else str(path)


@contextmanager
def new_folder(path: Path, ours: Collection[str]) -> Iterator[Path]:
    """Yields an empty temporary folder that becomes `path` when the block ends well, and is removed when it does not.

    An existing folder is replaced only where it holds nothing but files named in `ours`, so that nothing but our own
    output is ever deleted. What a killed process left of it is removed, or put back where it was killed amid the
    change. Raises EdgeKitError where the place cannot be written to, before the block runs.
    """
    path = _followed(path)
    made: list[Path] = []
    temporary: Path | None = None
    try:
        with writing(path):
            if path.parent.is_dir():
                with _alone(path.parent):
                    _put_back(path)
                    _check_ours(path, ours)
            else:
                _check_ours(path, ours)
            made = [p for p in path.parents if not p.exists()]
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = _claim(path.parent, f".{path.name}-", "")
        yield temporary
        with writing(path), _alone(path.parent):
            temporary.chmod(0o755)
            _replace(path, temporary)
    finally:
        if temporary is not None:
            remove(temporary)
        for parent in made:
            with suppress(OSError):  # holds the result, or what others put there
                parent.rmdir()


def check_folder(path: Path, ours: Collection[str]) -> None:
    """Raises EdgeKitError where `new_folder` could not make or replace `path`; leaves nothing behind."""
    path = path.resolve() if path.is_symlink() else path
    _check_ours(path, ours)
    parent = next(folder for folder in path.absolute().parents if folder.exists())
    with writing(path), tempfile.TemporaryDirectory(prefix=f".{path.name}-", dir=parent):
        pass


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Waits until no other process changes what lies in `folder`, where its file system has locks."""
    if fcntl is None:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _put_back(path: Path) -> None:
    """Ends what a process began that was killed while it put a new folder in the place of `path`."""
    for old in sorted(path.parent.glob(f".{path.name}-*.old")):
        if path.exists():
            shutil.rmtree(old, ignore_errors=True)
        else:
            old.rename(path)


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
    with writing(path):
        if path.is_dir():
            raise EdgeKitError(f"cannot write {path}: it is a folder", "name a file")
        if _is_special(path):
            return
        _drop(_claim(path.parent, f".{path.name}-", ".partial", file=True))


def _drop(temporary: Path) -> None:
    temporary.unlink(missing_ok=True)
    os.close(_held.pop(temporary))


def _followed(path: Path) -> Path:
    """Returns where a link leads, which is what is to be written."""
    with writing(path):
        return path.resolve() if path.is_symlink() else path


def _is_special(path: Path) -> bool:
    """Whether `path` is a pipe or a device such as /dev/null, which is written to and never replaced."""
    return path.exists() and not path.is_file() and not path.is_dir()


def write(path: Path, data: bytes) -> None:
    """Writes `data` to `path` under a temporary name first; raises EdgeKitError where that fails."""
    write_pieces(path, (data,))


def write_pieces(path: Path, pieces: Iterable[bytes | memoryview]) -> None:
    """Does what `write` does with `pieces`, one behind the other."""
    path = _followed(path)
    with writing(path):
        if _is_special(path):
            with path.open("wb") as file:
                file.writelines(pieces)
            return
        temporary = _claim(path.parent, f".{path.name}-", ".partial", file=True)
        try:
            with open(_held[temporary], "wb", closefd=False) as file:
                file.writelines(pieces)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            _drop(temporary)


def write_json(path: Path, value: Any) -> None:
    """Writes `value` as indented JSON; NaN and infinities are bugs and raise ValueError."""
    text = json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False) + "\n"
    write(path, text.encode(errors="replace"))  # a file's name may be no text


def sha256(path: Path) -> str:
    """Returns the hex SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
