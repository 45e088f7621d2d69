"""Writing so that nothing is ever left half done: temporary names, then a rename."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from edgekit.errors import EdgeKitError


@contextmanager
def new_folder(path: Path, marker: str) -> Iterator[Path]:
    """Yields an empty temporary folder that becomes `path` when the block ends well, and is removed when it does not.

    An existing folder is replaced only where it is empty or holds `marker`, so that nothing but our own output is
    ever deleted. Raises EdgeKitError where the place cannot be written to, before the block runs.
    """
    if path.exists() and not (path.is_dir() and ((path / marker).is_file() or not any(path.iterdir()))):
        raise EdgeKitError(f"{path} exists and is not an EdgeKit bundle", "choose another --out, or move it away")
    temporary: Path | None = None
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
        yield temporary
        with writing(path):
            temporary.chmod(0o755)
            old = temporary.with_name(temporary.name + ".old")
            if path.exists():
                path.rename(old)
            temporary.rename(path)
            shutil.rmtree(old, ignore_errors=True)
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns a failed write into an EdgeKitError that names the place."""
    try:
        yield
    except OSError as error:
        raise EdgeKitError(
            f"cannot write {path}: {os.strerror(error.errno) if error.errno else error}",
            "free some space or choose another --out" if error.errno == 28 else "choose another --out",
        ) from None


def write(path: Path, data: bytes) -> None:
    """Writes `data` to `path` under a temporary name first; raises EdgeKitError where that fails."""
    temporary = path.with_name(f".{path.name}.partial")
    with writing(path):
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
