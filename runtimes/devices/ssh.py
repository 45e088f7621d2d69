"""`ssh://user@host[:port]`: another machine, through the OpenSSH client that is installed here.

The client's own configuration, agent, keys and jump hosts hold. All commands share one connection (ControlMaster).
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import NamedTuple

from edgekit.errors import EdgeKitError
from edgekit.util import atomic_files

from .device import Device
from .shell import ShellDevice, options, tool

# A connection that carries nothing for 15 s is lost.
OPTIONS = {
    "BatchMode": "yes",
    "StrictHostKeyChecking": "yes",
    "ConnectTimeout": "10",
    "ServerAliveInterval": "5",
    "ServerAliveCountMax": "3",
    "ForwardAgent": "no",
    "ForwardX11": "no",
    "ClearAllForwardings": "yes",
    "PermitLocalCommand": "no",
    "RequestTTY": "no",
    "RemoteCommand": "none",
}
# No part begins with a dash, which would make it an option of ssh. Names keep their case: they may be in ~/.ssh/config.
URI = re.compile(
    r"ssh://((?P<user>[\w.][\w.+$-]*)@)?(?P<host>[\w.][\w.-]*|\[[0-9a-fA-F:.]+(%\w+)?\])(:(?P<port>\d{1,5}))?/?"
    r"(\?(?P<query>.*))?",
    re.ASCII | re.DOTALL,
)
USAGE = "write ssh://user@host, with :port, ?python=/path/to/python or ?dir=/folder for files where needed"
# What ssh says → what to do. The first that matches counts.
REFUSALS = (
    (r"REMOTE HOST IDENTIFICATION HAS CHANGED|Host key verification failed",
     "its host key is not the known one; connect once by hand and compare the key: {command}"),
    (r"Permission denied|Too many authentication failures|no mutual signature",
     "let your key in: ssh-copy-id {target}, or ssh-add the key that it knows"),
    (r"Could not resolve|Name or service not known", "check the name of the machine"),
    (r"Connection refused", "start the SSH server there, or give its port: ssh://user@host:port"),
    (r"timed out|No route to host|unreachable", "check that it is switched on and in reach"),
)  # fmt: skip


class Address(NamedTuple):
    """Where a URI points to."""

    user: str
    host: str
    port: str
    python: str
    folder: str


def open_ssh(uri: str) -> Device:
    """The device for `ssh://[user@]host[:port][?python=PATH][&dir=PATH]`, connected.

    Raises EdgeKitError for an address that is none, and for a machine that does not let us in. Its host key has to be
    known already.
    """
    address = parse(uri)
    link = SshLink(tool("ssh", "openssh-client"), address)
    return ShellDevice(link.uri, link, address.python, address.folder)


def parse(uri: str) -> Address:
    """The parts of an ssh:// URI. Raises EdgeKitError for one that is malformed."""
    match = URI.fullmatch(uri)
    if match is None:
        raise EdgeKitError(f"'{uri}' names no machine", USAGE)
    given = options(uri, match["query"] or "", {"python": "python3", "dir": "/tmp"}, USAGE)
    host = match["host"].strip("[]")
    return Address(match["user"] or "", host, match["port"] or "", given["python"], given["dir"])


class SshLink:
    """One connection of the OpenSSH client."""

    def __init__(self, program: str, address: Address) -> None:
        """Prepares the connection; `keep` opens it."""
        self._target = f"{address.user}@{address.host}" if address.user else address.host
        self._port = f"-p {address.port} " if address.port else ""
        self.name = f"{self._target}:{address.port}" if address.port else self._target
        self.uri = f"ssh://{self.name}"
        # A socket's path has 104 characters at most, and TMPDIR may be longer.
        self._folder = atomic_files.make_temporary(Path("/tmp"))
        settings = {**OPTIONS, "ControlPath": f"{self._folder}/socket"}
        self._ssh = [program, *(word for key, value in settings.items() for word in ("-o", f"{key}={value}"))]
        if address.port:
            self._ssh += ["-p", address.port]

    def keep(self, script: str) -> list[str]:
        """The command for the first channel, whose connection the others share."""
        return [*self._ssh, "-o", "ControlMaster=yes", "-o", "ControlPersist=no", "--", self._target, _sh(script)]

    def run(self, script: str) -> list[str]:
        """The command for one more channel. Without the first it fails, rather than connect anew."""
        return [*self._ssh, "-o", "ControlMaster=no", "-o", "ProxyCommand=false", "--", self._target, _sh(script)]

    def refused(self, said: str) -> EdgeKitError:
        """The error for what ssh said when it could not connect."""
        command = f"ssh {self._port}{self._target}"
        lines = [line.strip() for line in said.splitlines() if line.strip() and not line.startswith("@")]
        for pattern, help_ in REFUSALS:
            if re.search(pattern, said, re.IGNORECASE):
                return EdgeKitError(
                    f"cannot connect to {self.name}: {lines[-1] if lines else 'no answer'}",
                    help_.format(command=command, target=self._target),
                )
        return EdgeKitError(
            f"cannot connect to {self.name}: {lines[-1] if lines else 'it closed the connection'}",
            f"see whether this works: {command}",
        )

    def close(self) -> None:
        """Remove the connection's socket."""
        atomic_files.remove(self._folder)


def _sh(script: str) -> str:
    """The words that a login shell, bash or fish, hands to a POSIX shell as one script."""
    return f"exec /bin/sh -c {shlex.quote(script)}"
