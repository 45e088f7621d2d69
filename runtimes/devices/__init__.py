"""Devices: one transport per URI scheme."""

from __future__ import annotations

from collections.abc import Callable

from edgekit.errors import UsageError

from .adb import open_adb
from .device import Device
from .local import open_local
from .python import open_python
from .qemu import open_qemu
from .ssh import open_ssh

DEVICES: dict[str, Callable[[str], Device]] = {
    "local": open_local,
    "python": open_python,
    "ssh": open_ssh,
    "adb": open_adb,
    "qemu": open_qemu,
}


def opener(uri: str) -> Callable[[str], Device]:
    """What opens the device that `uri` names, such as `local:`. Raises UsageError for a scheme not in DEVICES."""
    scheme = uri.partition(":")[0]
    if scheme not in DEVICES:
        kinds = ", ".join(f"{known}:" for known in DEVICES)
        raise UsageError(f"there is no device '{uri}'", f"the kinds of device are {kinds}")
    return DEVICES[scheme]


def open_device(uri: str) -> Device:
    """The device that `uri` names; see `opener`."""
    return opener(uri)(uri)
