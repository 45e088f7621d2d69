"""`adb:SERIAL`: an Android phone, or anything else that runs adbd, through the adb client that is installed here.

Experimental for phones: it is tested against the real adbd on Linux. .pte files run by EdgeKit's runner, which brings
its own C library; .onnx and .tflite files run where the device has Python.
"""

from __future__ import annotations

import re

from edgekit.errors import EdgeKitError

from .device import Device
from .shell import ShellDevice, options, tool

# The one folder that a phone's shell may write and run programs in.
FOLDER = "/data/local/tmp"
URI = re.compile(r"adb:(?P<serial>[\w.\[][\w.:\[\]%-]*)?(\?(?P<query>.*))?", re.ASCII | re.DOTALL)
USAGE = "write adb:SERIAL as `adb devices` lists it, with ?dir=/folder or ?python=/path/to/python where needed"
# What adb says → what to do. The first that matches counts.
REFUSALS = (
    (r"unauthorized", "unlock the device and allow this computer to debug it"),
    (r"more than one device", "name one of them: adb:SERIAL, as `adb devices` lists it"),
    (r"offline", "plug it in again, or restart its debugging: adb reconnect"),
    (r"not found|no devices", "check the cable and that USB debugging is on; `adb devices` lists what is there"),
    (r"no permissions", "let your user use USB devices: apt-get install android-sdk-platform-tools-common"),
)  # fmt: skip


def open_adb(uri: str) -> Device:
    """The device for `adb:[SERIAL][?dir=PATH][&python=PATH]`, connected; without a serial, the only one there is.

    Raises EdgeKitError for an address that is none, and for a device that does not answer.
    """
    match = URI.fullmatch(uri)
    if match is None:
        raise EdgeKitError(f"'{uri}' names no device", USAGE)
    given = options(uri, match["query"] or "", {"python": "python3", "dir": FOLDER}, USAGE)
    link = AdbLink(tool("adb", "adb"), match["serial"] or "")
    return ShellDevice(f"adb:{match['serial'] or ''}", link, given["python"], given["dir"])


class AdbLink:
    """The adb client for one device."""

    def __init__(self, program: str, serial: str) -> None:
        """An empty `serial` is the only device."""
        self.name = serial or "the device"
        self._adb = [program, *(["-s", serial] if serial else []), "shell", "-T"]

    def keep(self, script: str) -> list[str]:
        """The command for the first channel."""
        return [*self._adb, script]

    def run(self, script: str) -> list[str]:
        """The command for one more channel."""
        return [*self._adb, script]

    def refused(self, said: str) -> EdgeKitError:
        """The error for what adb said when it could not reach the device."""
        lines = [line.strip() for line in said.splitlines() if line.strip() and not line.startswith("*")]
        what = f"cannot reach {self.name}: {lines[0] if lines else 'it closed the connection'}"
        for pattern, help_ in REFUSALS:
            if re.search(pattern, said):
                return EdgeKitError(what, help_)
        return EdgeKitError(what, "see whether this works: adb shell true")

    def close(self) -> None:
        """Nothing is kept here; the adb server is the user's."""
