"""Real servers that the tests start and end themselves: OpenSSH on loopback, and adbd in a network of its own."""

from __future__ import annotations

import contextlib
import getpass
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NoReturn

import pytest

START_S = 10.0
PYTHON = f"python={sys.executable}"
REQUIRED = "EDGEKIT_TEST_EVERY_DEVICE"
"""Set it, and a test that this machine cannot run fails instead of being skipped."""


def skip(reason: str) -> NoReturn:
    """Skip the test, and say why; or fail it where every device has to be tested."""
    (pytest.fail if os.environ.get(REQUIRED) else pytest.skip)(reason)
    raise AssertionError


def missing_qemu() -> str | None:
    """Why no ARM64 system can be emulated here; None where it can."""
    return _missing(
        ("qemu-aarch64", "mmdebstrap", "gcc", "aarch64-linux-gnu-g++"), "qemu-user mmdebstrap gcc g++-aarch64-linux-gnu"
    )


def missing_sshd() -> str | None:
    """Why no SSH server can be started here; None where it can."""
    return _missing(("sshd", "ssh", "ssh-keygen", "g++"), "openssh-server openssh-client g++")


def missing_adbd() -> str | None:
    """Why no adbd can be started here; None where it can."""
    reason = _missing(("adbd", "adb", "unshare", "nsenter", "g++"), "adb g++, and adbd from bookworm-backports")
    if reason:
        return reason
    allowed = subprocess.run(["unshare", "-Urn", "true"], capture_output=True, text=True)
    return None if allowed.returncode == 0 else f"this machine forbids a private network: {allowed.stderr.strip()}"


def _missing(programs: Sequence[str], packages: str) -> str | None:
    if sys.platform != "linux":
        return "these servers are started on Linux alone"
    missing = [program for program in programs if _which(program) is None]
    return f"not installed: {', '.join(missing)} (apt-get install {packages})" if missing else None


class Sshd:
    """A server with a host key, a user key and a port of its own, and the client's command that knows them.

    `bin` is a folder with an `ssh` that reads this server's configuration file, as ~/.ssh/config would be read.
    """

    def __init__(self, folder: Path, limit_kb: int | None = None) -> None:
        """`limit_kb` is the largest file that a session may write."""
        self.folder = folder
        self._limit = f"ulimit -f {2 * limit_kb}; " if limit_kb else ""  # in blocks of 512 bytes
        self.home = folder / "there"  # where jobs run
        self.home.mkdir()
        self._ssh = _need("ssh")
        self.bin = folder / "bin"
        self.bin.mkdir()
        for name in ("host", "user", "stranger"):
            _run([_need("ssh-keygen"), "-q", "-t", "ed25519", "-N", "", "-C", "", "-f", str(folder / name)])
        (folder / "authorized_keys").write_text((folder / "user.pub").read_text())
        self.port = _free_port()
        (folder / "known_hosts").write_text(f"[127.0.0.1]:{self.port} {(folder / 'host.pub').read_text()}")
        (folder / "sshd_config").write_text(
            f"Port {self.port}\nListenAddress 127.0.0.1\nHostKey {folder}/host\nPidFile {folder}/pid\n"
            f"AuthorizedKeysFile {folder}/authorized_keys\nStrictModes no\nUsePAM no\nPasswordAuthentication no\n"
            "KbdInteractiveAuthentication no\nPermitRootLogin prohibit-password\nMaxStartups 100\nPermitUserRC no\n"
            "SetEnv SHLVL=2\n"  # so that bash does not read a ~/.bashrc that takes a while
        )
        self.configure()
        # Root's server gives up its rights in this folder, which the package's service would make.
        if os.geteuid() == 0:
            Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
        self.start()

    @property
    def uri(self) -> str:
        return f"ssh://{getpass.getuser()}@127.0.0.1:{self.port}"

    @property
    def client(self) -> str:
        """The words that begin the client's command."""
        return f'{self._ssh} -F "{self.folder}/ssh_config"'

    def configure(self, key: str = "user", known_hosts: str = "known_hosts") -> None:
        """Write the client's configuration file and command."""
        (self.folder / "ssh_config").write_text(
            f"IdentityFile {self.folder}/{key}\nIdentitiesOnly yes\nIdentityAgent none\n"
            f"UserKnownHostsFile {self.folder}/{known_hosts}\nGlobalKnownHostsFile /dev/null\n"
        )
        self.command(f'exec {self.client} "$@"')

    def command(self, script: str) -> None:
        """Make `script` the client's command."""
        (self.bin / "ssh").write_text(f"#!/bin/sh\n{script}\n")
        (self.bin / "ssh").chmod(0o755)

    def start(self) -> None:
        sshd = f"{self._limit}exec {_need('sshd')} -D -e -f {self.folder}/sshd_config"
        command = ["/bin/sh", "-c", sshd]
        with (self.folder / "log").open("wb") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline and self._process.poll() is None:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1):
                return
            time.sleep(0.02)
        raise RuntimeError(f"sshd did not start: {(self.folder / 'log').read_text()}")

    def drop(self) -> None:
        """End every connection at once, as a machine does that loses its power; the server starts anew."""
        self.stop()
        self.start()

    def stop(self) -> None:
        # Sessions lead process groups of their own; what they started lives on.
        for pid in _descendants(self._process.pid):
            with contextlib.suppress(OSError):  # it has ended meanwhile
                if Path(f"/proc/{pid}/comm").read_text().startswith("sshd"):
                    os.kill(pid, signal.SIGKILL)
        self._process.wait()

    def left_behind(self) -> list[str]:
        """What lies in the folder for jobs."""
        return sorted(path.name for path in self.home.iterdir())


def uri(server: Sshd, python: str = PYTHON) -> str:
    """The device, with this interpreter and the folder where the tests look for what stays behind."""
    return f"{server.uri}?{python}&dir={server.home}"


# adbd listens on every interface, so it runs in a network where there is no other than loopback.
IN_NAMESPACE = """
import fcntl, socket, struct, sys
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
    fcntl.ioctl(any_socket, 0x8914, struct.pack("16sH14x", b"lo", 0x41))  # SIOCSIFFLAGS: up and running
print(flush=True)
sys.stdin.read()
"""


class Adbd:
    """A device behind adb: the real daemon with this machine's files. `bin` has an `adb` that reaches it."""

    serial = "127.0.0.1:5555"

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.home = folder / "there"
        self.home.mkdir()
        self.bin = folder / "bin"
        self.bin.mkdir()
        self._network = subprocess.Popen(
            ["unshare", "-Urn", sys.executable, "-c", IN_NAMESPACE], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert self._network.stdout is not None and self._network.stdout.readline() == b"\n"
        self._enter = [_need("nsenter"), "--preserve-credentials", "-U", "-n", "-t", str(self._network.pid)]
        variables = " ".join(f"{name}={shlex.quote(value)}" for name, value in self._env().items())
        (self.bin / "adb").write_text(
            f'#!/bin/sh\nexec {shlex.join(self._enter)} env {variables} {_need("adb")} "$@"\n'
        )
        (self.bin / "adb").chmod(0o755)
        self.start()

    @property
    def uri(self) -> str:
        return f"adb:{self.serial}?dir={self.home}"

    def start(self) -> None:
        with (self.folder / "log").open("wb") as log:
            self._daemon = subprocess.Popen(
                [*self._enter, _need("adbd")], stdout=log, stderr=log, start_new_session=True, env=self._env()
            )
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline:
            if "connected to" in self.adb("connect", self.serial):
                return
            time.sleep(0.1)
        raise RuntimeError(f"adbd did not start: {(self.folder / 'log').read_text()[-500:]}")

    def adb(self, *arguments: str) -> str:
        done = subprocess.run([self.bin / "adb", *arguments], capture_output=True, text=True, timeout=START_S)
        return done.stdout + done.stderr

    def drop(self) -> None:
        """The daemon dies, as a phone does that is switched off, and starts anew."""
        self._daemon.kill()
        self._daemon.wait()
        self.adb("disconnect", self.serial)
        self.start()

    def stop(self) -> None:
        self.adb("kill-server")
        self._daemon.kill()
        self._daemon.wait()
        self._network.communicate()

    def _env(self) -> dict[str, str]:
        # The client looks for emulators on these ports, and would take the daemon for one of them as well.
        return {"HOME": str(self.folder), "TMPDIR": str(self.folder), "ADB_LOCAL_TRANSPORT_MAX_PORT": "5553",
                "PATH": os.environ["PATH"]}  # fmt: skip

    def left_behind(self) -> list[str]:
        return sorted(path.name for path in self.home.iterdir())


def _descendants(pid: int) -> list[int]:
    """The process and all that it started, itself first."""
    found = [pid]
    for one in found:
        with contextlib.suppress(OSError):
            found += map(int, Path(f"/proc/{one}/task/{one}/children").read_text().split())
    return found


def _which(program: str) -> str | None:
    return shutil.which(program) or shutil.which(program, path="/usr/sbin:/usr/local/sbin:/sbin")


def _need(program: str) -> str:
    found = _which(program)
    assert found is not None, program
    return found


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True, capture_output=True, timeout=START_S)


@contextlib.contextmanager
def mounted(folder: Path, options: str) -> Iterator[None]:
    """A disk in memory at `folder`, with options such as `size=9000`; skips the test where this user may mount none."""
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "edgekit", str(folder)], capture_output=True, text=True
    )
    if done.returncode != 0:
        skip(f"a small disk cannot be mounted here: {done.stderr.strip()}")
    try:
        yield
        deadline = time.monotonic() + START_S
        while list(folder.iterdir()) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not list(folder.iterdir())
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)
