"""Limits on what a file from elsewhere may ask for: one table for every format, checked before work on a file starts.

A model file is a few kB that can ask for terabytes. Honest files keep far away from these numbers; what a file is worth
in memory and time follows from its own size and from the inputs that the user gives.
"""

from __future__ import annotations

import os
import re
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from edgekit.errors import EdgeKitError

MB = 1 << 20

# `python -c` looks for modules in the current folder first, whose files are anybody's. Our own interpreter leaves that
# out by -P; older ones, of devices, by what this puts before their code.
NOT_FROM_HERE = "import sys; sys.path[:] = filter(None, sys.path)\n"

# One try of a file, in a process of its own: bytes beyond what the process has when it starts, and CPU seconds.
MEMORY = 1200 * MB
MEMORY_PER_FILE_BYTE = 10  # weights are read, cast, copied and laid out anew
MEMORY_PER_INPUT_BYTE = 64  # activations of networks with many channels
SECONDS = 13.0  # what passes is done once more: twice, and the start, stay under half a minute
SECONDS_PER_FILE_MB = 0.5
SECONDS_PER_INPUT_MB = 1.0
WAITING = 4  # times the CPU seconds that may pass on the clock: other programs run too
MEMORY_VARIABLE = "EDGEKIT_MEMORY_LIMIT"
SECONDS_VARIABLE = "EDGEKIT_TIME_LIMIT"

# Archives (.pt, .pt2, TorchScript, .npz). torch.save does not compress; arrays of samples may shrink a hundred times.
ARCHIVE_MEMBERS = 1_000_000
ARCHIVE_GROWTH = 4
ARRAYS_GROWTH = 100
ARCHIVE_SLACK = 64 * MB
PICKLE_BYTES = 128 * MB
PICKLE_OPCODES = 5_000_000
TEXT_BYTES = 128 * MB  # a program in JSON, TorchScript's source
MANIFEST_BYTES = 16 * MB
TEXTS = {".pkl": PICKLE_BYTES, ".json": TEXT_BYTES, ".py": TEXT_BYTES}

# Graphs.
NAME_CHARACTERS = 2_000  # of an input or output
RANK = 64  # dimensions of one tensor
ELEMENTS = 1 << 40  # of one tensor, as a file tells its shape
RUN_BYTES = 256 * MB  # of made-up inputs for one run of a file
SUBGRAPHS = 8  # If, Loop and Scan inside one another: ONNX Runtime takes twice as long for each level
NODES = 1_000_000  # of a graph with all that it calls
EXPRESSION_CHARACTERS = 2_000
EXPRESSION_NODES = 300
SYMBOL_BITS = 32
EXPRESSION_BITS = 4096  # of any number that an expression of shapes can come to

MORE_MEMORY = f"give smaller inputs; if you trust the file, allow it more: {MEMORY_VARIABLE}=16GB"
UNTRUSTED = "only a file that was made to do harm, or is damaged, has this: export it again from its source"


@dataclass(frozen=True)
class Budget:
    """What one try of a file may take: bytes of memory beyond those at its start, and CPU seconds."""

    memory: int
    seconds: float

    @property
    def deadline(self) -> float:
        """Seconds on the clock after which a try is given up."""
        return WAITING * self.seconds


def budget(files: Iterable[Path] = (), input_bytes: int = 0) -> Budget:
    """Returns what a try of `files` on so many bytes of the user's own inputs may take.

    EDGEKIT_MEMORY_LIMIT (bytes, or 8GB) and EDGEKIT_TIME_LIMIT (seconds) take the place of what is worked out here.
    Raises EdgeKitError where one of them cannot be read.
    """
    size = sum(path.stat().st_size for path in files if path.is_file())
    memory = MEMORY + MEMORY_PER_FILE_BYTE * size + MEMORY_PER_INPUT_BYTE * input_bytes
    seconds = SECONDS + (SECONDS_PER_FILE_MB * size + SECONDS_PER_INPUT_MB * input_bytes) / MB
    return Budget(_from_environment(MEMORY_VARIABLE) or memory, _from_environment(SECONDS_VARIABLE) or seconds)


def _from_environment(variable: str) -> int:
    """The number in an environment variable, 0 where it is not set."""
    text = os.environ.get(variable, "").strip()
    if not text:
        return 0
    match = re.fullmatch(r"(\d{1,18})\s*([kMGT]?)(B|iB)?", text)
    if match is None or not int(match[1]):
        raise EdgeKitError(f"{variable} is {text[:40]!r}, which is no number", "write 60, or 8GB for memory")
    return int(match[1]) * {"": 1, "k": 1 << 10, "M": MB, "G": 1 << 30, "T": 1 << 40}[match[2]]


def check_archive(path: Path, growth: int = ARCHIVE_GROWTH) -> None:
    """Raises EdgeKitError for a zip archive that unpacks to far more than its size, or holds one name twice.

    Raises zipfile.BadZipFile for what is no archive.
    """
    with zipfile.ZipFile(path) as archive:
        check_members(path, [(member.filename, member.file_size) for member in archive.infolist()], growth)


def check_members(path: Path, members: Sequence[tuple[str, int]], growth: int = ARCHIVE_GROWTH) -> None:
    """Raises as `check_archive` does for the members, name and size once unpacked, that a reader found in `path`.

    Names count as the same whatever their case: torch's own reader ignores it, so that of two alike only one would be
    looked at here.
    """
    size = path.stat().st_size
    if len(members) > ARCHIVE_MEMBERS:
        raise EdgeKitError(f"{path} holds {len(members):,} members", UNTRUSTED)
    if len({name.lower() for name, _ in members}) < len(members):
        raise EdgeKitError(f"{path} holds two members of one name", "write the file again")
    unpacked = sum(length for _, length in members)
    if unpacked > growth * size + ARCHIVE_SLACK:
        raise EdgeKitError(
            f"{path} has {size:,} bytes and unpacks to {unpacked:,}",
            "write it again without compression" if growth > ARCHIVE_GROWTH else UNTRUSTED,
        )
    for name, length in members:
        most = next((most for suffix, most in TEXTS.items() if name.lower().endswith(suffix)), length)
        if length > most:
            raise EdgeKitError(f"{path} holds {length:,} bytes in {name}", UNTRUSTED)


def check_extent(what: str, sizes: Iterable[int], strides: Iterable[int] | None, offset: int, room: int) -> None:
    """Raises EdgeKitError for a tensor that reaches beyond the `room` (in elements) that its values take up.

    Without `strides` it is dense.
    """
    sizes = list(sizes)
    if len(sizes) > RANK or min(sizes, default=0) < 0 or offset < 0:
        raise EdgeKitError(f"{what} has a shape that no tensor has", UNTRUSTED)
    if 0 in sizes:
        return
    if strides is None:
        last = 1
        for size in sizes:
            last *= size
    else:
        steps = list(strides)
        if len(steps) != len(sizes) or min(steps, default=0) < 0:
            raise EdgeKitError(f"{what} has strides that no tensor has", UNTRUSTED)
        last = 1 + sum((size - 1) * step for size, step in zip(sizes, steps, strict=True))
    if offset + last > room:
        raise EdgeKitError(f"{what} reaches beyond the values that are stored for it", UNTRUSTED)
