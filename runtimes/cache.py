"""Cache of what EdgeKit builds for devices: one folder for each content, made whole or not at all."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from edgekit.errors import EdgeKitError
from edgekit.util import atomic_files

STEP_TIMEOUT_S = 900.0
LINES = 3


def root() -> Path:
    """The user's cache of EdgeKit, which may not exist yet."""
    given = os.environ.get("XDG_CACHE_HOME")
    if given:
        return Path(given) / "edgekit"
    try:
        return Path.home() / ".cache" / "edgekit"
    except RuntimeError:  # a user without a home
        return Path(tempfile.gettempdir()) / f"edgekit-cache-{os.getuid()}"


def cached(name: str, make: Callable[[Path], None]) -> Path:
    """The folder `name` in the user's cache, which `make` fills the first time. What fails leaves nothing behind.

    Two processes may make it at once: the first to finish wins. Raises EdgeKitError when the cache cannot be written.
    """
    top = root()
    done = top / name
    if done.is_dir():
        return done
    try:
        top.mkdir(parents=True, exist_ok=True)
        making = atomic_files.make_temporary(top, f".{name}-")
    except OSError as error:
        raise EdgeKitError(
            f"cannot use the cache {top}: {error.strerror}", "set XDG_CACHE_HOME to a folder that can be written"
        ) from error
    try:
        make(making)
        making.chmod(0o755)
        try:
            making.rename(done)
        except OSError:
            if not done.is_dir():
                raise
    except OSError as error:
        raise EdgeKitError(f"cannot use the cache {top}: {error.strerror}", "free some space there") from error
    finally:
        atomic_files.remove(making)
    return done


@contextmanager
def wheels(pinned: Sequence[tuple[str, str, str]], python: str, what: str) -> Iterator[list[Path]]:
    """Yields the wheels of `pinned` (requirement, platform tag, SHA-256) for CPython `python`, and then removes them.

    pip checks the hashes. Raises EdgeKitError(`what`) where it cannot download them.
    """
    with atomic_files.temporary_folder() as folder:
        wanted = Path(folder, "requirements.txt")
        wanted.write_text("".join(f"{requirement} --hash=sha256:{digest}\n" for requirement, _, digest in pinned))
        platforms = [word for tag in dict.fromkeys(tag for _, tag, _ in pinned) for word in ("--platform", tag)]
        step(
            [sys.executable, "-P", "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:",
             "--python-version", python, "--implementation", "cp", *platforms, "--require-hashes",
             "-r", wanted, "-d", folder],
            what, "check the connection to the package index (pip's settings hold)",
        )  # fmt: skip
        yield sorted(Path(folder).glob("*.whl"))


def step(argv: Sequence[str | Path], what: str, help: str) -> str:
    """Run one command of a recipe; its standard output. Raises EdgeKitError(`what`, `help`) with its last words."""
    command = [str(word) for word in argv]
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=STEP_TIMEOUT_S,
            check=False,
        )
    except FileNotFoundError as error:
        raise EdgeKitError(f"{what}: {command[0]} is not installed", help) from error
    except subprocess.TimeoutExpired as error:
        raise EdgeKitError(f"{what}: {command[0]} ran longer than {STEP_TIMEOUT_S:g} s", help) from error
    if done.returncode != 0:
        said = [line.strip() for line in (done.stderr or done.stdout).splitlines() if line.strip()][-LINES:]
        raise EdgeKitError(f"{what}: {' | '.join(said) or f'exit code {done.returncode}'}", help)
    return done.stdout
