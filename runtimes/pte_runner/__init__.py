"""The C++ runner for .pte files, and the bundle that takes it to devices without Python, torch or a C++ library."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import platform
import re
import shutil
import sys
import zipfile
from pathlib import Path
from typing import NamedTuple

from edgekit.errors import EdgeKitError
from edgekit.runtimes.cache import cached, step, wheels

SOURCE = Path(__file__).with_name("runner.cpp")
FLAGS = ("-O2", "-std=c++17", "-DC10_USING_CUSTOM_GENERATED_MACROS")
LIBRARIES = ("executorch", "executorch_kernels_optimized", "executorch_kernels_quantized",
             "executorch_backend_xnnpack", "executorch_threadpool", "executorch_etdump")  # fmt: skip
# The headers include c10's by their own name.
C10 = "executorch/runtime/core/portable_type/c10"
RUNNER = "runner"
LOADER = "loader"


class Target(NamedTuple):
    """One machine: its compiler when it is not this one, Debian's package for that, and the wheel's platform and hash.

    The hash is that of executorch 1.5.1 for CPython 3.11, of which the libraries alone are used.
    """

    compiler: str
    package: str
    platform: str
    sha256: str


TARGETS = {
    "x86_64": Target(
        "x86_64-linux-gnu-g++",
        "g++-x86-64-linux-gnu",
        "manylinux_2_28_x86_64",
        "274c28c2fe2b76acb03f9fa381537425c40e0098dcf886baf6d97a1a55ffe300",
    ),
    "aarch64": Target(
        "aarch64-linux-gnu-g++",
        "g++-aarch64-linux-gnu",
        "manylinux_2_28_aarch64",
        "8ee02348a3ea80ddf770822911ebf78da616b73afce0fbaaa79f23311c88c66a",
    ),
}
RELEASE = "1.5.1"
WHEEL_PYTHON = "3.11"


def bundle(machine: str) -> dict[str, Path]:
    """The files of the bundle for `machine` (`uname -m`), by name: the runner, its libraries and their loader.

    It is put together at the first call: the runner is compiled against the libraries of the installed executorch, or
    for another machine against those of its wheel, whose hash is checked, and its C and C++ libraries are those of the
    compiler. Raises EdgeKitError for a machine that there is no runner for, and where a compiler is missing.
    """
    target = TARGETS.get(machine)
    if target is None:
        raise EdgeKitError(
            f"there is no ExecuTorch runner for {machine}",
            f"it runs on {' and '.join(TARGETS)}; .onnx and .tflite files run wherever Python has their runtime",
        )
    native = machine == platform.machine() and sys.platform == "linux"
    compiler = "g++" if native else target.compiler
    help_ = f"install it: apt-get install {'g++' if native else target.package}"
    what = f"cannot build the ExecuTorch runner for {machine}"
    version = step([compiler, "--version"], what, help_).splitlines()[0]
    sdk = _installed() if native else _wheel(machine, target)
    content = "\n".join([SOURCE.read_text(), version, RELEASE, target.sha256, str(FLAGS), str(LIBRARIES)])
    key = hashlib.sha256(content.encode()).hexdigest()[:16]
    folder = cached(f"pte-runner-{machine}-{key}", lambda into: _build(into, sdk, compiler, what, help_))
    return {path.name: path for path in sorted(folder.iterdir())}


def command(bundle: str, job: str) -> list[str]:
    """The command that runs `job` on a device, where `bundle` is the bundle's folder there.

    The loader is called by name, so that neither the device's own nor its C library, of any age or kind, is used.
    """
    return [f"{bundle}/{LOADER}", "--library-path", bundle, f"{bundle}/{RUNNER}", job]


def release() -> str:
    """The version of ExecuTorch that the runner is built from, here as for other machines."""
    return RELEASE


def _installed() -> Path:
    """The folder of the installed executorch, found without importing it: that would import torch."""
    spec = importlib.util.find_spec("executorch")
    installed = importlib.metadata.version("executorch") if spec is not None else "missing"
    if spec is None or not spec.submodule_search_locations or installed != RELEASE:
        raise EdgeKitError(
            f"the runner is built from executorch {RELEASE}, and the installed one is {installed}",
            f"{sys.executable} -m pip install executorch=={RELEASE}",
        )
    return Path(next(iter(spec.submodule_search_locations)))


def _wheel(machine: str, target: Target) -> Path:
    """The folder `executorch` out of the wheel for `machine`, downloaded once, its hash checked by pip."""

    def fetch(into: Path) -> None:
        pinned = [(f"executorch=={RELEASE}", target.platform, target.sha256)]
        what = f"cannot download executorch {RELEASE} for {machine}"
        with wheels(pinned, WHEEL_PYTHON, what) as (wheel,), zipfile.ZipFile(wheel) as archive:
            for name in archive.namelist():
                if re.match(r"executorch/(include/|lib/[^/]*\.so)", name):
                    archive.extract(name, into)

    return cached(f"executorch-{machine}-{target.sha256[:16]}", fetch) / "executorch"


def _build(into: Path, sdk: Path, compiler: str, what: str, help: str) -> None:
    include = sdk / "include"
    step(
        [compiler, *FLAGS, "-isystem", include, "-isystem", include / C10, SOURCE, "-o", into / RUNNER,
         "-L", sdk / "lib", "-Wl,--no-as-needed", *(f"-l{name}" for name in LIBRARIES), "-s"],
        what, help,
    )  # fmt: skip
    waiting = [into / RUNNER]
    while waiting:
        for name in _needed(waiting.pop(), what):
            target = into / (LOADER if name.startswith("ld-linux") else name)
            if not target.exists():
                shutil.copyfile(_find(name, sdk, compiler, what), target)
                waiting.append(target)
    for name in (RUNNER, LOADER):
        (into / name).chmod(0o755)


def _needed(binary: Path, what: str) -> list[str]:
    """The libraries that an ELF file asks for, the loader among them."""
    listed = step(["readelf", "-d", "-l", binary], what, "apt-get install binutils")
    loader = re.findall(r"interpreter: \S*/(\S+?)\]", listed)
    return [*re.findall(r"\(NEEDED\)\s+Shared library: \[(.+?)\]", listed), *loader]


def _find(name: str, sdk: Path, compiler: str, what: str) -> Path:
    own = sdk / "lib" / name
    if own.is_file():
        return own
    found = Path(step([compiler, f"-print-file-name={name}"], what, "install the compiler again").strip())
    if not found.is_absolute():
        raise EdgeKitError(f"{what}: the compiler has no {name}", "install the compiler and its C++ library again")
    return found
