"""`python:/path/to/python`: another interpreter on this machine, for a runtime that cannot be installed in this one."""

from __future__ import annotations

import shutil
from pathlib import Path

from edgekit.errors import EdgeKitError

from .device import Device
from .local import LocalDevice


def open_python(uri: str) -> Device:
    """The device for `python:PATH`. Raises EdgeKitError when PATH is not a program."""
    address = uri.partition(":")[2]
    python = shutil.which(Path(address).expanduser()) if address else None
    if python is None:
        raise EdgeKitError(
            f"'{uri}' names no Python interpreter that can be started",
            "write python:/path/to/venv/bin/python",
        )
    return LocalDevice(f"python:{python}", str(Path(python).absolute()))
