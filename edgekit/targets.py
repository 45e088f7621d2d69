"""Targets: what a deployment target takes. A target is a row; no code knows one by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from edgekit.errors import UsageError
from edgekit.types import SUFFIXES


@dataclass(frozen=True)
class Target:
    """Formats that the platform's runtimes read, the precision that pays there, and how to reach a device.

    `machines` are its processors as `uname -m` calls them: times of others say nothing of it. `int8_notes` says by
    format what has to be known of int8 files there.
    """

    formats: tuple[str, ...]
    precision: str
    device: str
    summary: str
    machines: tuple[str, ...] = ()
    int8_notes: Mapping[str, str] = field(default_factory=dict)


# Precision → whether it needs data to calibrate on: the names of `quant.recipes.RECIPES`, known without torch.
PRECISIONS = {"fp32": False, "fp16": False, "int8": True, "int8-dynamic": False, "int8-weight-only": False}

WITHOUT_VNNI = (
    "ONNX: on x86 processors without VNNI (Intel before 2019, AMD before Zen 4) int8 sums overflow in ONNX Runtime "
    "unless its session option session.x64quantprecision is 1; where there is VNNI, that option only costs speed"
)

ARM64 = ("aarch64", "arm64", "armv8l")
X86 = ("x86_64", "amd64", "i686")

TARGETS = {
    "android": Target(("executorch", "onnx", "tflite"), "int8", "adb", "phones and tablets, ARM64", ARM64),
    "ios": Target(("executorch", "onnx", "tflite"), "int8", "ssh", "iPhone and iPad, CPU runtimes", ARM64),
    "linux-arm64": Target(
        ("executorch", "onnx", "tflite"), "int8", "ssh", "Raspberry Pi and other ARM64 boards", ARM64
    ),
    "x86": Target(("executorch", "onnx", "tflite"), "int8", "local", "PCs and servers", X86, {"onnx": WITHOUT_VNNI}),
}


def find(name: str) -> Target:
    """Returns the target called `name`; raises UsageError that lists the known ones."""
    if name not in TARGETS:
        raise UsageError(f"unknown target '{name}'", f"choose one of {', '.join(TARGETS)}")
    return TARGETS[name]


def find_precision(name: str) -> str:
    """Returns `name` where it is a precision; raises UsageError that lists the known ones."""
    if name not in PRECISIONS:
        raise UsageError(f"unknown precision '{name}'", f"choose one of {', '.join(PRECISIONS)}")
    return name


def is_of(target: str | None, machine: str) -> bool:
    """Whether a machine (`uname -m`) has the target's processor; every one has that of a target that is not known."""
    return target not in TARGETS or machine.lower() in TARGETS[target].machines


def find_formats(names: str | Sequence[str] | None, target: Target) -> tuple[str, ...]:
    """Parses `executorch,onnx,tflite` (None: all of the target's); raises UsageError for an unknown one."""
    if names is None:
        return target.formats
    given = names.split(",") if isinstance(names, str) else names
    formats = tuple(dict.fromkeys(name.strip() for name in given if name.strip()))
    unknown = [name for name in formats if name not in SUFFIXES]
    if unknown or not formats:
        raise UsageError(f"unknown format '{''.join(unknown[:1])}'", f"choose of {', '.join(SUFFIXES)}")
    return formats
