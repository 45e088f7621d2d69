"""`qemu:arm64?cpu=cortex-a76`: ARM64 without hardware, by QEMU's emulation of one process, without any rights.

Outputs are those of a real processor with these features. Times are not: `timing` is "emulated", and what is counted
instead is instructions. The files of the emulated system are put together once, out of Debian packages whose signatures
mmdebstrap checks and wheels whose hashes are listed here.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal

from edgekit.errors import EdgeKitError
from edgekit.runtimes.cache import cached, step, wheels
from edgekit.util import atomic_files

from . import facts
from .device import Device, Exit
from .local import PROBE_TIMEOUT_S, LocalDevice
from .shell import options

USAGE = "write qemu:arm64, or qemu:arm64?cpu=cortex-a76"
SUITE = "bookworm"
MIRROR = "http://deb.debian.org/debian"
PACKAGES = ("python3", "libstdc++6", "libgomp1")
PYTHON = "3.11"
# requirement, platform tag, SHA-256 of the wheel
WHEELS = (
    ("numpy==2.4.6", "manylinux_2_28_aarch64", "0ab0a9c4ffb1a6d95ef519fe4247dba8eb6b18ad93999f76b7f657039acabd47"),
    ("onnxruntime==1.31.1", "manylinux_2_28_aarch64",
     "da05378364c44d4407e463982d2bf8d5e4cfea873283757e48beeb41df97b7f3"),
    ("ai-edge-litert==2.3.0", "manylinux_2_27_aarch64",
     "853fc608f96da87bd5f3458465dfb9abbf18d5ae6b94eceacead407146f175ae"),
    ("flatbuffers==25.12.19", "manylinux_2_28_aarch64",
     "7634f50c427838bb021c2d66a3d1168e9d199b0607e6329399f04846d42e20b4"),
    ("protobuf==7.36.2", "manylinux2014_aarch64", "e11e1f0180583a2af89db6a2ecd9e8dc40aa6d2988ca175bfd0e6d12ea72d74e"),
)  # fmt: skip
# QEMU's model → the part number and the features that the processor tells, as in its /proc/cpuinfo.
ARMV8 = "fp asimd evtstrm aes pmull sha1 sha2 crc32 cpuid"
ARMV82 = "fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp"
CPUS = {
    "cortex-a53": ("0xd03", ARMV8),
    "cortex-a57": ("0xd07", ARMV8),
    "cortex-a72": ("0xd08", ARMV8),
    "cortex-a76": ("0xd0b", ARMV82),
    "neoverse-n1": ("0xd0c", ARMV82),
}
PROGRAMS = ("qemu-aarch64", "qemu-aarch64-static")  # the second has no plugins, and so counts nothing
COUNTER = Path(__file__).with_name("count_instructions.c")
SHARED_FACTS = ("system", "cpus", "memory_bytes", "memory_available_bytes", "disk_free_bytes")
GETPPID = 173  # its number on ARM64
NEEDS = "apt-get install qemu-user mmdebstrap gcc"


def open_qemu(uri: str) -> Device:
    """The device for `qemu:arm64[?cpu=NAME]`; the first call puts its system together, which takes a minute.

    Raises EdgeKitError for another address, and where QEMU or what builds the system is missing.
    """
    machine, _, query = uri.partition(":")[2].partition("?")
    if machine != "arm64":
        raise EdgeKitError(f"there is no emulated machine '{uri}'", USAGE)
    cpu = options(uri, query, {"cpu": "cortex-a76"}, USAGE)["cpu"]
    if cpu not in CPUS:
        raise EdgeKitError(f"there is no emulated processor '{cpu}'", f"choose one of {', '.join(CPUS)}")
    program = next(filter(None, map(shutil.which, PROGRAMS)), None)
    if program is None:
        raise EdgeKitError("qemu-aarch64 is not installed", NEEDS)
    return QemuDevice(f"qemu:arm64?cpu={cpu}", program, cpu, _system(cpu))


class QemuDevice(LocalDevice):
    """Processes of the emulated system on this machine."""

    timing: Literal["measured", "emulated"] = "emulated"
    stall_s = 600.0  # an emulator is hundreds of times slower
    runner: str | None = "aarch64"

    def __init__(self, uri: str, program: str, cpu: str, root: Path) -> None:
        """`program` is QEMU, `root` the folder with the system's files."""
        super().__init__(uri, str(root / f"usr/bin/python{PYTHON}"))
        self._program = program
        self._qemu = ["-L", str(root), "-cpu", cpu]
        self._root = root
        self._counter: str | None = None

    def probe(self) -> dict[str, object]:
        """Facts about the emulated machine."""
        ask = facts.ASK_PYTHON.format(packages=facts.PACKAGES)
        exit_ = self.exec([self.python, "-c", f"{ask}\nprint('machine=' + platform.machine())"], PROBE_TIMEOUT_S)
        if exit_.code != 0:
            raise EdgeKitError(f"{self.uri} does not work: {exit_.output.strip()[-200:]}", NEEDS)
        cpuinfo = (self._root / "proc/cpuinfo").read_text()
        here = facts.read(self._here())
        there = facts.read(exit_.output + "".join(f"cpuinfo={line}\n" for line in cpuinfo.splitlines()))
        same = {key: here[key] for key in SHARED_FACTS if key in here}
        return {**same, "os": f"Debian {SUITE}, emulated by {Path(self._program).name}", **there}

    def exec(self, argv: Sequence[str], timeout_s: float) -> Exit:
        """Run a command of the emulated system. Nothing of this process's environment reaches it."""
        count = [] if self._counter is None else ["-plugin", self._counter]
        clean = ["env", "-i", "PATH=/usr/bin:/bin", "HOME=/", "LC_ALL=C.UTF-8", f"TMPDIR={tempfile.gettempdir()}"]
        return super().exec([*clean, self._program, *count, *self._qemu, *argv], timeout_s)

    @contextlib.contextmanager
    def counting(self) -> Iterator[Callable[[], list[int]]]:
        """While open, `exec` notes the count of instructions at every call of getppid.

        Raises EdgeKitError where they cannot be counted: a static QEMU takes no plugins, and ours has to be compiled.
        """
        with atomic_files.temporary_folder() as folder:
            marks = Path(folder, "marks")
            self._counter = f"{_plugin(self._program)},out={marks},mark={GETPPID}"
            try:
                yield lambda: [int(line) for line in marks.read_text().split()] if marks.is_file() else []
            finally:
                self._counter = None

    def _here(self) -> str:
        return LocalDevice.exec(
            self, ["sh", "-c", facts.script("false", tempfile.gettempdir())], PROBE_TIMEOUT_S
        ).output


def _system(cpu: str) -> Path:
    """The folder with the files of the emulated system, as a process on `cpu` sees them."""
    key = hashlib.sha256(repr((SUITE, PACKAGES, PYTHON, WHEELS)).encode()).hexdigest()[:16]
    part, features = CPUS[cpu]

    def link(into: Path) -> None:
        # Hard links: each processor's files take no room of their own.
        base = cached(f"arm64-{key}", _debian)
        shutil.copytree(base, into, symlinks=True, copy_function=_link, dirs_exist_ok=True)
        # Under QEMU a process reads the host's /proc/cpuinfo, and ONNX Runtime crashes on that of a PC.
        (into / "proc").mkdir(exist_ok=True)
        cores = "".join(
            f"processor\t: {core}\nBogoMIPS\t: 100.00\nFeatures\t: {features}\nCPU implementer\t: 0x41\n"
            f"CPU architecture: 8\nCPU variant\t: 0x1\nCPU part\t: {part}\nCPU revision\t: 0\n\n"
            for core in range(os.cpu_count() or 1)
        )
        (into / "proc/cpuinfo").write_text(cores)

    recipe = hashlib.sha256(repr((part, features, os.cpu_count())).encode()).hexdigest()[:8]
    return cached(f"arm64-{key}-{cpu}-{recipe}", link)


def _link(source: str, target: str) -> None:
    os.link(source, target, follow_symlinks=False)


def _debian(into: Path) -> None:
    """Fill a folder with Debian's Python for ARM64 and the runtimes' wheels."""
    what = "cannot put the emulated ARM64 system together"
    step(
        ["mmdebstrap", "--quiet", "--mode=chrootless", "--variant=extract", "--architectures=arm64",
         f"--include={','.join(PACKAGES)}", SUITE, into / "root", MIRROR],
        what, NEEDS,
    )  # fmt: skip
    packages = into / "root/usr/lib/python3/dist-packages"
    packages.mkdir(parents=True, exist_ok=True)
    with wheels(WHEELS, PYTHON, what) as found:
        for wheel in found:
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(packages)
    for path in (into / "root").iterdir():
        path.rename(into / path.name)
    (into / "root").rmdir()


def _plugin(program: str) -> str:
    """The plugin that counts instructions, compiled for this QEMU."""
    if program.endswith("-static"):
        raise EdgeKitError(f"{Path(program).name} takes no plugins, which count the instructions", NEEDS)
    if shutil.which("gcc") is None:
        raise EdgeKitError("instructions cannot be counted: there is no C compiler for QEMU's plugin", NEEDS)
    version = re.search(r"version (\d+)", step([program, "--version"], "QEMU does not start", NEEDS))
    interface = 2 if version and int(version[1]) >= 9 else 1
    key = hashlib.sha256(f"{COUNTER.read_text()}{interface}".encode()).hexdigest()[:16]
    flags = ["-O2", "-shared", "-fPIC", f"-DPLUGIN_VERSION={interface}"]

    def build(into: Path) -> None:
        step(["gcc", *flags, COUNTER, "-o", into / "count.so"], "cannot build the counter", "apt-get install gcc")

    return str(cached(f"qemu-counter-{key}", build) / "count.so")
