"""A machine that is reached through its shell: the part that ssh and adb share.

One channel, the keeper, makes a private folder there and holds it: when its standard input ends, because EdgeKit is
done, was killed, or the connection broke, it removes the folder. Every command has a channel of its own, and is killed
in the same way when that ends. So nothing stays behind, whatever happens here.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import os
import re
import select
import shlex
import shutil
import signal
import subprocess
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Literal, Protocol
from urllib.parse import parse_qsl

from edgekit.errors import EdgeKitError

from . import facts
from .device import STALL_S, Exit, listen

CONNECT_TIMEOUT_S = 25.0
ANSWER_TIMEOUT_S = 25.0
CLOSE_TIMEOUT_S = 10.0
LAST_WORDS_S = 2.0
SLOWEST_BYTES_PER_S = 100_000.0
MARK = "edgekit folder: "
GREETING_BYTES = 1 << 16  # what a login shell may print before a command begins
MISSING = 44
SHELL_SIGNAL = 128

KEEP = f"""
umask 077
d=$(mktemp -d FOLDER/edgekit-XXXXXXXX) || exit 1
trap '' HUP INT TERM PIPE
printf '\\n{MARK}%s %s\\n' "$(uname -m)" "$d"
cat >/dev/null 2>&1
cd /
rm -rf "$d" || {{ sleep 1; rm -rf "$d"; }}
"""
# The background shell alone reads the channel's standard input, which ends when the channel does. It reads by itself: a
# `cat` would outlive it, and hold the channel open.
RUN = """
trap '' HUP
exec 3<&0
COMMAND </dev/null 3<&- &
job=$!
( while read -r _ <&3; do :; done; kill -9 $job ) >/dev/null 2>&1 &
watch=$!
wait $job
code=$?
kill -9 $watch 2>/dev/null
echo "edgekit exit code: $code" >&2
"""
EXIT = "edgekit exit code:"
FILES = b"edgekit files:\n"
FULL = re.compile(r"no space left|disk quota|file too large|file size limit", re.IGNORECASE)
DENIED = re.compile(r"permission denied|read-only file system|operation not permitted", re.IGNORECASE)
DIGEST = re.compile(r"^([0-9a-f]{64}) ", re.MULTILINE)


class Link(Protocol):
    """One way to run a POSIX shell script on another machine."""

    name: str
    """What the user calls the machine."""

    def keep(self, script: str) -> list[str]:
        """The command here that runs the first script there, and opens the connection for the others."""
        ...

    def run(self, script: str) -> list[str]:
        """The command here that runs a script there, with its standard streams and exit code."""
        ...

    def refused(self, said: str) -> EdgeKitError:
        """The error for a connection that failed with the words `said`."""
        ...

    def close(self) -> None:
        """Remove what the link keeps here."""
        ...


class ShellDevice:
    """A machine behind a Link."""

    timing: Literal["measured", "emulated"] = "measured"
    stall_s = STALL_S

    def __init__(self, uri: str, link: Link, python: str, folder: str) -> None:
        """Connects, and makes a private folder in the folder `folder` there. Raises EdgeKitError where it cannot."""
        self.uri = uri
        self.python = python
        self._link = link
        self._folder = folder
        self._jobs = 0
        self._words = tempfile.TemporaryFile()  # noqa: SIM115 (lives as long as the connection)
        try:
            self._keeper = _start(
                link.keep(KEEP.replace("FOLDER", _quote(folder))), stdout=subprocess.PIPE, stderr=self._words
            )
        except BaseException:
            link.close()
            raise
        try:
            machine, self._home = self._wait_for_folder()
        except BaseException:
            self.cleanup()
            raise
        self.runner: str | None = machine

    def probe(self) -> dict[str, object]:
        """Facts about the machine, see facts.py."""
        _, output, _ = self._run(facts.script(self.python, self._home), ANSWER_TIMEOUT_S)
        return facts.read(output.decode(errors="replace"))

    def push(self, files: Mapping[str, Path]) -> str:
        """A new folder with the files, each checked by its SHA-256 over there."""
        self._jobs += 1
        job = f"{self._home}/{self._jobs}"
        # One channel for all files: a login shell may take a while to start. Runners and many inputs shrink well.
        digests = "; ".join(f"sha256sum <{_quote(f'./{name}')}" for name in files)
        script = f"mkdir {_quote(job)} && cd {_quote(job)} && tar -xzf - && {{ {digests}; }}"
        seconds = ANSWER_TIMEOUT_S + sum(path.stat().st_size for path in files.values()) / SLOWEST_BYTES_PER_S
        code, output, errors = self._run(script, seconds, send=lambda pipe: _pack(files, pipe))
        said = errors.decode(errors="replace")
        if code != 0:
            if FULL.search(said) or code == SHELL_SIGNAL + signal.SIGXFSZ:
                raise self._full()
            if "not found" in said:
                raise EdgeKitError(
                    f"{self._link.name} lacks a program: {_last(errors)}",
                    "it needs sh, tar, gzip and sha256sum, which coreutils, busybox and toybox have",
                )
            if DENIED.search(said):
                raise EdgeKitError(
                    f"{self._link.name} does not take files into {self._home}: {_last(errors)}",
                    "name another folder: add ?dir=/path to the device",
                )
        digests_there = DIGEST.findall(output.decode(errors="replace"))
        for i, (name, path) in enumerate(files.items()):
            self._check(name, path, digests_there[i : i + 1])
        return job

    def exec(self, argv: Sequence[str], timeout_s: float) -> Exit:
        """Run a command. Raises TimeoutError or Stalled when it was killed."""
        command = " ".join(_quote(word) for word in argv)
        _, output, errors = self._run(RUN.replace("COMMAND", command), timeout_s, hold=True)
        # The exit code of a client may be that of a broken connection: the shell there tells its own.
        words, told, code = errors.decode(errors="replace").rpartition(EXIT)
        if not told or not code.strip().isdigit():
            raise self._lost()
        number = int(code)
        number = SHELL_SIGNAL - number if SHELL_SIGNAL < number < SHELL_SIGNAL + 65 else number
        return Exit(number, output.decode(errors="replace") + words)

    def pull(self, job: str, names: Sequence[str], into: Path) -> None:
        """Copy files, each checked by its SHA-256."""
        script = (
            f"cd {_quote(job)} && set -- && for f in {' '.join(_quote(f'./{name}') for name in names)}; do "
            f'if [ -f "$f" ]; then set -- "$@" "$f"; sha256sum <"$f" >&2; fi; done; '
            f'if [ $# -eq 0 ]; then exit {MISSING}; fi; echo {_quote(FILES.decode().strip())}; tar -cf - "$@"'
        )
        with tempfile.TemporaryFile(dir=into) as packed:
            code, _, errors = self._run(script, ANSWER_TIMEOUT_S, stdout=packed)
            if code == MISSING:
                return
            packed.seek(0)
            packed.seek(packed.read(GREETING_BYTES).find(FILES) + len(FILES))
            try:
                found = _unpack(packed, names, into)
            except (tarfile.TarError, EOFError) as error:
                self._check_connection(LAST_WORDS_S)
                raise EdgeKitError(
                    f"cannot read {', '.join(names)} from {self._link.name}: {_last(errors)}", "run the command again"
                ) from error
        digests = DIGEST.findall(errors.decode(errors="replace"))
        if len(found) != len(digests):
            raise self._damaged(", ".join(names))
        for name, digest in zip(found, digests, strict=True):
            self._check(name, into / name, [digest])

    def remove(self, folder: str) -> None:
        """Remove one folder."""
        self._run(f"rm -rf {_quote(folder)}", ANSWER_TIMEOUT_S)

    def cleanup(self) -> None:
        """End the connection; the keeper removes the folder there."""
        try:
            if self._keeper.stdin is not None and not self._keeper.stdin.closed:
                with contextlib.suppress(OSError):
                    self._keeper.stdin.close()
                try:
                    self._keeper.wait(CLOSE_TIMEOUT_S)
                except subprocess.TimeoutExpired:
                    _kill(self._keeper)
                if self._keeper.stdout is not None:
                    self._keeper.stdout.close()
        finally:
            self._words.close()
            self._link.close()

    def _wait_for_folder(self) -> tuple[str, str]:
        """The machine and the folder that the keeper prints, after whatever the login shell prints."""
        assert self._keeper.stdout is not None
        deadline = time.monotonic() + CONNECT_TIMEOUT_S
        text = b""
        while True:
            match = re.search(rf"^{MARK}(\S+) (/.*)$".encode(), text, re.MULTILINE)
            if match and text[match.end() : match.end() + 1] in (b"\n", b"\r"):
                return match[1].decode(), match[2].rstrip(b"\r").decode()
            ready, _, _ = select.select([self._keeper.stdout], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                raise EdgeKitError(
                    f"{self._link.name} did not answer within {CONNECT_TIMEOUT_S:g} s",
                    "check that it is switched on and in reach",
                )
            block = os.read(self._keeper.stdout.fileno(), 1 << 16)
            if not block:
                self._keeper.wait(CLOSE_TIMEOUT_S)
                raise self._refused()
            text += block

    def _refused(self) -> EdgeKitError:
        self._words.seek(0)
        said = self._words.read().decode(errors="replace")
        if FULL.search(said):
            return self._full()
        if "mktemp" in said or (DENIED.search(said) and self._folder in said):
            return EdgeKitError(
                f"cannot make a folder in {self._folder} on {self._link.name}: {_last(said.encode())}",
                "name another folder: add ?dir=/path to the device",
            )
        return self._link.refused(said)

    def _run(
        self,
        script: str,
        timeout_s: float,
        stdout: IO[bytes] | None = None,
        send: Callable[[IO[bytes]], None] | None = None,
        hold: bool = False,
    ) -> tuple[int, bytes, bytes]:
        """Run a script: exit code, output and errors. `send` writes its input; `hold` leaves that open until it ends.

        Raises EdgeKitError when the connection is lost, and after `timeout_s`, or so long without any more output into
        the file `stdout`; with `hold` that is a TimeoutError or Stalled.
        """
        self._check_connection()
        stdin = subprocess.PIPE if send or hold else subprocess.DEVNULL
        process = _start(self._link.run(script), stdin=stdin, stdout=stdout or subprocess.PIPE)
        pipe, process.stdin = process.stdin, None  # or `communicate` would close it
        sender = threading.Thread(target=_send, args=(send, pipe), daemon=True) if send else None
        try:
            if sender is not None:
                sender.start()
            output, errors = listen(process, timeout_s) if hold else _communicate(process, timeout_s, stdout)
        except BaseException as error:
            if sender is None and pipe is not None:
                pipe.close()
            _end(process)
            if not isinstance(error, TimeoutError | subprocess.TimeoutExpired):
                raise
            self._check_connection()
            if hold:
                raise
            raise EdgeKitError(
                f"{self._link.name} did not answer within {timeout_s:g} s", "check its network or cable, and its load"
            ) from error
        if sender is not None:
            sender.join(CLOSE_TIMEOUT_S)
        elif pipe is not None:
            pipe.close()
        return process.returncode, output, errors

    def _check_connection(self, wait_s: float = 0.0) -> None:
        """Raise EdgeKitError when the keeper is gone, or goes within `wait_s`: it may be the last to notice."""
        try:
            self._keeper.wait(wait_s)
        except subprocess.TimeoutExpired:
            return
        raise self._lost()

    def _lost(self) -> EdgeKitError:
        return EdgeKitError(
            f"the connection to {self._link.name} was lost",
            "check the device and its network or cable, then run the command again; it removes its files itself",
        )

    def _check(self, name: str, path: Path, digests: Sequence[str | None]) -> None:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if list(digests) != [digest]:
            raise self._damaged(name)

    def _damaged(self, name: str) -> EdgeKitError:
        self._check_connection(LAST_WORDS_S)
        return EdgeKitError(
            f"{name} did not pass between here and {self._link.name} whole: its SHA-256 differs",
            "run the command again; if it stays so, check the connection and the device's disk",
        )

    def _full(self) -> EdgeKitError:
        return EdgeKitError(
            f"the disk of {self._link.name} is full, or a limit there is too low, in {self._folder}",
            "free some space there, or name another folder: add ?dir=/path to the device",
        )


def _pack(files: Mapping[str, Path], pipe: IO[bytes]) -> None:
    with (
        gzip.GzipFile(fileobj=pipe, mode="wb", compresslevel=1) as packed,
        tarfile.open(fileobj=packed, mode="w|", format=tarfile.GNU_FORMAT) as archive,
    ):
        for name, path in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = path.stat().st_size
            entry.mode = 0o700 if os.access(path, os.X_OK) else 0o600
            with path.open("rb") as file:
                archive.addfile(entry, file)


def _send(send: Callable[[IO[bytes]], None], pipe: IO[bytes]) -> None:
    # A channel that ends early tells why by itself.
    with contextlib.suppress(OSError), pipe:
        send(pipe)


def _unpack(packed: IO[bytes], names: Sequence[str], into: Path) -> list[str]:
    """Write the files called `names`, and nothing else, into the folder `into`; those that were there, in order."""
    found = []
    with tarfile.open(fileobj=packed, mode="r:") as archive:
        for entry in archive:
            name = entry.name.removeprefix("./")
            source = archive.extractfile(entry) if entry.isfile() and name in names else None
            if source is not None:
                with (into / name).open("wb") as file:
                    shutil.copyfileobj(source, file)
                found.append(name)
    return found


def options(uri: str, query: str, known: Mapping[str, str], usage: str) -> dict[str, str]:
    """The options after the `?` of a device's URI, over those in `known`. Raises EdgeKitError for a wrong one."""
    try:
        pairs = parse_qsl(query, keep_blank_values=True, strict_parsing=True) if query else []
    except ValueError as error:
        raise EdgeKitError(f"'{uri}' has options that cannot be read", usage) from error
    for name, value in pairs:
        if name not in known:
            raise EdgeKitError(f"'{uri}' has an unknown option '{name}'", usage)
        if not value or any(ord(c) < 32 for c in value) or (name == "dir" and not value.startswith("/")):
            raise EdgeKitError(f"'{uri}' has a wrong {name}: '{value}'", usage)
    return {**known, **dict(pairs)}


def tool(name: str, package: str) -> str:
    """The path of a program. Raises EdgeKitError where it is not installed."""
    found = shutil.which(name)
    if found is None:
        raise EdgeKitError(f"{name} is not installed", f"apt-get install {package}, or your system's package of it")
    return found


def _start(
    argv: list[str],
    stdin: IO[bytes] | int = subprocess.PIPE,
    stdout: IO[bytes] | int = subprocess.PIPE,
    stderr: IO[bytes] | int = subprocess.PIPE,
) -> subprocess.Popen[bytes]:
    # A session of its own: Ctrl-C is ours to handle, and no client asks for a password on the terminal.
    return subprocess.Popen(argv, stdin=stdin, stdout=stdout, stderr=stderr, start_new_session=True)


def _communicate(process: subprocess.Popen[bytes], timeout_s: float, growing: IO[bytes] | None) -> tuple[bytes, bytes]:
    """`process.communicate`, which waits for as long as the file `growing` grows within every `timeout_s`."""
    size = -1
    while True:
        try:
            output, errors = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            before, size = size, os.fstat(growing.fileno()).st_size if growing else size
            if size == before:
                raise
        else:
            return output or b"", errors or b""


def _end(process: subprocess.Popen[bytes]) -> None:
    """Wait until a command whose channel was closed has ended there, and here at the latest."""
    try:
        process.communicate(timeout=CLOSE_TIMEOUT_S)
    except (subprocess.TimeoutExpired, ValueError, OSError):
        _kill(process)


def _kill(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _last(errors: bytes) -> str:
    lines = [line.strip() for line in errors.decode(errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else ""


_quote = shlex.quote
