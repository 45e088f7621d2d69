"""Facts about a machine, asked by a POSIX shell script that runs on anything from a phone to a server.

The script prints `key=value` lines; what a machine does not tell is left out. `read` turns them into

    machine, system, os, model    strings, such as aarch64, "Linux 6.6.31", "Debian GNU/Linux 12", "Raspberry Pi 5"
    cpuinfo                       the text of /proc/cpuinfo
    cpus                          the numbers of the cores that a process may use
    memory_bytes, memory_available_bytes, disk_free_bytes (of the folder that jobs run in)
    governors                     the frequency governor of each core that tells it, and `khz`, `max_khz` likewise
    temperatures_c                by the name of the sensor, in °C
    python, packages              the interpreter's version, and the versions of the runtimes that it has
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence

from edgekit.screening.limits import NOT_FROM_HERE

PACKAGES = ("numpy", "onnxruntime", "ai-edge-litert", "tflite-runtime", "executorch")

ASK_PYTHON = (
    NOT_FROM_HERE
    + """
import platform
print("python=" + platform.python_version())
try:
    import importlib.metadata as metadata
except ImportError:
    metadata = None
for name in {packages!r} if metadata else ():
    try:
        print("package=" + name + " " + metadata.version(name))
    except metadata.PackageNotFoundError:
        pass
"""
)

ASK = r"""
LC_ALL=C; export LC_ALL
say() { [ -n "$2" ] && printf '%s=%s\n' "$1" "$2"; }
say machine "$(uname -m)"
say system "$(uname -sr)"
if command -v getprop >/dev/null 2>&1; then
  say os "Android $(getprop ro.build.version.release)"
  say model "$(getprop ro.product.manufacturer) $(getprop ro.product.model)"
elif [ -r /etc/os-release ]; then
  say os "$(. /etc/os-release; printf '%s' "$PRETTY_NAME")"
fi
[ -r /proc/device-tree/model ] && say model "$(tr -d '\000' </proc/device-tree/model)"
[ -r /proc/cpuinfo ] && sed 's/^/cpuinfo=/' /proc/cpuinfo
[ -r /proc/meminfo ] && sed -n 's/^MemTotal: *\([0-9]*\) kB/memory_kb=\1/p
s/^MemAvailable: *\([0-9]*\) kB/available_kb=\1/p' /proc/meminfo
[ -r /proc/self/status ] && sed -n 's/^Cpus_allowed_list:[[:space:]]*/cpus=/p' /proc/self/status
say disk_kb "$(df -Pk FOLDER 2>/dev/null | sed -n '2s/^.*[0-9]  *[0-9][0-9]*  *\([0-9][0-9]*\)  *[0-9]*%.*/\1/p')"
for cpu in /sys/devices/system/cpu/cpu[0-9]*/cpufreq; do
  [ -r "$cpu/scaling_governor" ] && say governor "$(cat "$cpu/scaling_governor")"
  [ -r "$cpu/scaling_cur_freq" ] && say khz "$(cat "$cpu/scaling_cur_freq" 2>/dev/null)"
  [ -r "$cpu/cpuinfo_max_freq" ] && say max_khz "$(cat "$cpu/cpuinfo_max_freq" 2>/dev/null)"
done
for zone in /sys/class/thermal/thermal_zone*; do
  [ -r "$zone/temp" ] && say temperature "$(cat "$zone/temp" 2>/dev/null) $(cat "$zone/type" 2>/dev/null)"
done
command -v PYTHON >/dev/null 2>&1 && PYTHON -c ASK_PYTHON 2>/dev/null
exit 0
"""


def script(python: str, folder: str) -> str:
    """The script for a machine with the interpreter `python`, which may be missing, and jobs in `folder`."""
    words = {"ASK_PYTHON": ASK_PYTHON.format(packages=PACKAGES), "PYTHON": python, "FOLDER": folder}
    return re.sub("|".join(words), lambda match: shlex.quote(words[match[0]]), ASK)


def read(text: str) -> dict[str, object]:
    """Facts from the output of the script. What is not a line of it (a greeting, a warning) is passed over."""
    lines = [line.partition("=") for line in text.splitlines()]
    pairs = [(key, value) for key, equals, value in lines if equals]

    def every(key: str) -> list[str]:
        return [value for name, value in pairs if name == key]

    def number(key: str, unit: int) -> int | None:
        found = [value for value in every(key) if value.isdigit()]
        return int(found[0]) * unit if found else None

    facts: dict[str, object] = {
        **{key: every(key)[0].strip() for key in ("machine", "system", "os", "model", "python") if every(key)},
        "cpuinfo": "\n".join(every("cpuinfo")),
        "cpus": _ranges(every("cpus")),
        "memory_bytes": number("memory_kb", 1024),
        "memory_available_bytes": number("available_kb", 1024),
        "disk_free_bytes": number("disk_kb", 1024),
        "governors": every("governor"),
        "khz": [int(value) for value in every("khz") if value.isdigit()],
        "max_khz": [int(value) for value in every("max_khz") if value.isdigit()],
        "temperatures_c": dict(filter(None, map(_temperature, every("temperature")))),
        "packages": {name: version for name, _, version in (value.partition(" ") for value in every("package"))},
    }
    return {key: value for key, value in facts.items() if value not in (None, "", [], {})}


def _ranges(texts: Sequence[str]) -> list[int]:
    """The numbers in lists such as `0-3,6`."""
    found: list[int] = []
    for low, _, high in (part.partition("-") for text in texts[:1] for part in text.split(",")):
        if low.strip().isdigit():
            found.extend(range(int(low), int(high or low) + 1))
    return found


def _temperature(text: str) -> tuple[str, float] | None:
    """Name and °C. The kernel gives thousandths of a degree; some phones give degrees or tenths."""
    match = re.match(r"(-?\d+)\s+(\S.*)?$", f"{text.strip()} ")
    if match is None:
        return None
    value = int(match[1])
    scale = 1000 if abs(value) > 1000 else 10 if abs(value) > 150 else 1
    return (match[2] or "").strip() or "thermal", value / scale
