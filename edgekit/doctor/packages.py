"""Doctor: what works on this machine, and what to install."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekit.screening.limits import NOT_FROM_HERE

if TYPE_CHECKING:
    from packaging.requirements import Requirement

IMPORT_TIMEOUT_S = 120.0
IMPORT_PROCESSES = 2
ANSWER_TIMEOUT_S = 30.0
OTHER_PYTHON = "EDGEKIT_TFLITE_RUNTIME_PYTHON"
TFLITE_RUNTIME = "tflite-runtime==2.14.0"

# What `--deep` imports, where it is not the distribution's own name with underscores.
MODULES = {"pillow": "PIL", "ai-edge-litert": "ai_edge_litert.interpreter", "executorch": "executorch.exir"}
# What each format needs; the first row is needed by everything.
FORMATS = {
    "executorch": ("torch", "torchao", "executorch"),
    "onnx": ("torch", "onnx", "onnxscript", "onnxruntime"),
    "tflite": ("torch", "onnx", "onnxscript", "ai-edge-litert", "flatbuffers"),
}

# Names in /proc/cpuinfo, and what each brings to an int8 network.
X86_FEATURES = {
    "avx2": "256-bit integer arithmetic: the least that int8 kernels are quick with",
    "avx512_vnni": "int8 dot products in one instruction, 512 bits wide",
    "avx_vnni": "the same 256 bits wide; with neither, int8 .onnx files need session.x64quantprecision=1",
    "amx_int8": "int8 matrix tiles, for large layers",
    "avx512_fp16": "half-precision arithmetic without conversion",
}
ARM_FEATURES = {
    "asimddp": "int8 dot products in one instruction (dotprod)",
    "i8mm": "int8 matrix products in one instruction",
    "asimdhp": "half-precision vectors without conversion (fphp for scalars)",
    "sve": "vectors wider than 128 bits",
}
ARM_MACHINES = ("aarch64", "arm64", "armv7l", "armv8l")
# Names that macOS gives the same features: `sysctl hw.optional.arm`.
APPLE_FEATURES = {"FEAT_DotProd": "asimddp", "FEAT_I8MM": "i8mm", "FEAT_FP16": "asimdhp"}


@dataclass(frozen=True)
class Dependency:
    """One package: the versions that were tested, the installed one, and what to do.

    `status` is `ok`, `untested` (another version than tested), `missing`, or `broken` (it does not import); `install`
    is the command that mends it. `problem` is the error of the import. `imported` is None where it was not tried.
    """

    name: str
    tested: str
    installed: str | None
    status: str
    imported: bool | None
    problem: str | None
    install: str | None
    required: bool


@dataclass(frozen=True)
class Feature:
    """A CPU instruction set that matters for int8 or fp16: whether it is there, and what it brings."""

    name: str
    present: bool
    brings: str


@dataclass(frozen=True)
class Machine:
    """This machine. `memory_bytes` is None where the system does not tell; `gpus` are the names that drivers give."""

    system: str
    architecture: str
    python: str
    cpu: str
    features: tuple[Feature, ...]
    cores: int
    memory_bytes: int | None
    gpus: tuple[str, ...]
    torch_cuda: str | None


@dataclass(frozen=True)
class Diagnosis:
    """Dependencies, machine, and the formats that can be exported and run here."""

    dependencies: tuple[Dependency, ...]
    machine: Machine
    formats: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether everything that EdgeKit needs is installed and, where it was tried, imports."""
        return all(d.status in ("ok", "untested") for d in self.dependencies if d.required)

    @property
    def verdict(self) -> str:
        """One sentence: what works."""
        missing = [d.name for d in self.dependencies if d.required and d.status in ("missing", "broken")]
        untested = [d.name for d in self.dependencies if d.required and d.status == "untested"]
        works = f"{', '.join(self.formats)} can be exported and run here" if self.formats else "nothing can be exported"
        if missing:
            return f"{works}; missing or broken: {', '.join(missing)}"
        return f"{works}; untested versions: {', '.join(untested)}" if untested else works

    def to_dict(self) -> dict[str, Any]:
        """Returns the JSON form of `doctor --json`."""
        values = asdict(self)
        values["machine"]["features"] = [asdict(feature) for feature in self.machine.features]
        return {
            "ok": self.ok,
            "verdict": self.verdict,
            "formats": list(self.formats),
            "dependencies": list(values["dependencies"]),
            "machine": {**values["machine"], "gpus": list(self.machine.gpus)},
        }


def diagnose(deep: bool = False) -> Diagnosis:
    """Looks at the installed packages and the machine; `deep` also imports each package in a process of its own."""
    needed = requirements()
    problems = import_problems([r.name for r in needed if _installed(r.name)]) if deep else {}
    found = tuple(_dependency(requirement, problems, deep) for requirement in needed)
    working = {d.name for d in found if d.status in ("ok", "untested")}
    formats = tuple(format for format, names in FORMATS.items() if working.issuperset(names))
    cuda = _torch_cuda() if deep and "torch" in working else None
    return Diagnosis((*found, _tflite_runtime(deep)), _machine(cuda), formats)


def requirements() -> list[Requirement]:
    """What EdgeKit depends on here: from the installed package, or from pyproject.toml in a checkout.

    The checkout comes first: a package that is installed beside it may be an older one.
    """
    from packaging.requirements import Requirement

    pyproject = Path(__file__).parents[2] / "pyproject.toml"
    if pyproject.is_file():
        lines = tomllib.loads(pyproject.read_text())["project"]["dependencies"]
    else:
        lines = importlib.metadata.requires("edgekit") or []
    found = [Requirement(line) for line in lines]
    return [r for r in found if r.marker is None or r.marker.evaluate({"extra": ""})]


def import_problems(names: list[str]) -> dict[str, str | None]:
    """Imports each distribution's module in a process of its own; returns its error, or None where it works."""
    with ThreadPoolExecutor(IMPORT_PROCESSES) as pool:
        return dict(zip(names, pool.map(_import_problem, names), strict=True))


def _import_problem(name: str) -> str | None:
    module = MODULES.get(name, name.replace("-", "_"))
    return _ask([sys.executable, "-P", "-c", f"import {module}"], IMPORT_TIMEOUT_S)[1]


def _ask(command: list[str], timeout: float) -> tuple[str, str | None]:
    """Output of a command, and what went wrong in one line (None where nothing did)."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, errors="replace")
    except subprocess.TimeoutExpired:
        return "", f"no answer within {timeout:.0f} s"
    except OSError as error:
        return "", f"{command[0]}: {error.strerror}"
    if done.returncode == 0:
        return done.stdout.strip(), None
    lines = done.stderr.strip().splitlines()
    return "", lines[-1] if lines else f"exit code {done.returncode}"


def _installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _dependency(requirement: Requirement, problems: dict[str, str | None], deep: bool) -> Dependency:
    version = _installed(requirement.name)
    problem = problems.get(requirement.name)
    if version is None:
        status = "missing"
    elif problem is not None:
        status = "broken"
    else:  # a local part such as +cpu names a build, not another version
        status = "ok" if requirement.specifier.contains(version, prereleases=True) else "untested"
    return Dependency(
        name=requirement.name,
        tested=str(requirement.specifier),
        installed=version,
        status=status,
        imported=problem is None if deep and version is not None else None,
        problem=problem,
        install=None if status == "ok" else _install_command(requirement, reinstall=status == "broken"),
        required=True,
    )


def _install_command(requirement: Requirement, reinstall: bool) -> str:
    force = "--force-reinstall " if reinstall else ""
    # The default index has a CUDA build of torch for Linux, gigabytes that nothing here needs.
    index = " --index-url https://download.pytorch.org/whl/cpu" if requirement.name == "torch" else ""
    wanted = shlex.quote(f"{requirement.name}{requirement.specifier}")
    return f"{shlex.quote(sys.executable)} -m pip install {force}{wanted}{index}"


def _tflite_runtime(deep: bool) -> Dependency:
    """tflite-runtime, which needs numpy < 2 and so an interpreter of its own, that OTHER_PYTHON names."""
    python = os.environ.get(OTHER_PYTHON)
    install = (
        f"python3.11 -m venv tflite-env && tflite-env/bin/pip install {TFLITE_RUNTIME} 'numpy<2' "
        f"&& export {OTHER_PYTHON}=$PWD/tflite-env/bin/python"
    )
    tested = TFLITE_RUNTIME.removeprefix("tflite-runtime")
    if python is None:
        return Dependency("tflite-runtime", tested, None, "missing", None, None, install, required=False)
    question = f"{NOT_FROM_HERE}import importlib.metadata as m; print(m.version('tflite-runtime'))"
    version, problem = _ask([python, "-c", question], ANSWER_TIMEOUT_S)
    if problem is None and deep:
        _, problem = _ask([python, "-c", f"{NOT_FROM_HERE}import tflite_runtime.interpreter"], IMPORT_TIMEOUT_S)
    status = "broken" if problem else "ok" if f"=={version}" == tested else "untested"
    imported = problem is None if deep else None
    return Dependency(
        "tflite-runtime", tested, version or None, status, imported, problem,
        None if status == "ok" else install, required=False,
    )  # fmt: skip


def _machine(torch_cuda: str | None) -> Machine:
    architecture = platform.machine()
    text = _cpuinfo()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Machine(
        system=platform.platform(),
        architecture=architecture,
        python=platform.python_version(),
        cpu=cpu_name(text) or platform.processor() or architecture,
        features=features(text, architecture),
        cores=cores,
        memory_bytes=_memory(),
        gpus=tuple(_gpus()),
        torch_cuda=torch_cuda,
    )


def _cpuinfo() -> str:
    """/proc/cpuinfo, or the same facts in its form on macOS; empty elsewhere."""
    path = Path("/proc/cpuinfo")
    if path.is_file():
        return path.read_text(errors="replace")
    if platform.system() != "Darwin":
        return ""
    name, _ = _ask(["sysctl", "-n", "machdep.cpu.brand_string"], ANSWER_TIMEOUT_S)
    if platform.machine() == "x86_64":
        listed, _ = _ask(["sysctl", "-n", "machdep.cpu.features", "machdep.cpu.leaf7_features"], ANSWER_TIMEOUT_S)
        return f"model name: {name}\nflags: {' '.join(listed.lower().split())}\n"
    answer, _ = _ask(["sysctl", "hw.optional.arm"], ANSWER_TIMEOUT_S)
    present = {line.split(":")[0].rsplit(".", 1)[-1] for line in answer.splitlines() if line.endswith(": 1")}
    names = [linux for apple, linux in APPLE_FEATURES.items() if apple in present]
    return f"model name: {name}\nFeatures: {' '.join(names)}\n"


def cpu_name(cpuinfo: str) -> str:
    """Returns the CPU's name from the text of /proc/cpuinfo: of a PC, an ARM board, or its part number; or empty."""
    for key in ("model name", "Hardware", "Model"):
        found = _fields(cpuinfo, key)
        if found:
            return found[0]
    parts = sorted({f"0x{int(part, 0):03x}" for part in _fields(cpuinfo, "CPU part")})
    return f"ARM CPU part {', '.join(parts)}" if parts else ""


def features(cpuinfo: str, architecture: str) -> tuple[Feature, ...]:
    """Returns the features that matter on this architecture, each present only where every core has it.

    Work moves between cores: on big.LITTLE chips a feature that some cores lack cannot be relied on.
    """
    arm = architecture.lower() in ARM_MACHINES
    cores = [set(line.split()) for line in _fields(cpuinfo, "Features" if arm else "flags")]
    common = set.intersection(*cores) if cores else set()
    table = ARM_FEATURES if arm else X86_FEATURES if architecture.lower() in ("x86_64", "amd64") else {}
    return tuple(Feature(name, name in common, brings) for name, brings in table.items())


def _fields(cpuinfo: str, key: str) -> list[str]:
    lines = (line.partition(":") for line in cpuinfo.splitlines())
    return [value.strip() for name, _, value in lines if name.strip() == key and value.strip()]


def _memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows has no sysconf
        return None


def _gpus() -> Iterator[str]:
    """The names that nvidia-smi gives; nothing where it is not installed or finds none."""
    program = shutil.which("nvidia-smi")
    if program is not None:
        answer, problem = _ask([program, "--query-gpu=name", "--format=csv,noheader"], ANSWER_TIMEOUT_S)
        if problem is None:
            yield from filter(None, map(str.strip, answer.splitlines()))


def _torch_cuda() -> str:
    """Whether torch can use a GPU, asked in a process of its own."""
    question = "import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else 'not available')"
    answer, problem = _ask([sys.executable, "-P", "-c", question], IMPORT_TIMEOUT_S)
    return answer if problem is None else problem
