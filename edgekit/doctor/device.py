"""Doctor of a device: what it is, what it has, and which files run there."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from edgekit.doctor.packages import Feature, cpu_name, features

if TYPE_CHECKING:
    pass

HOT_C = 70.0  # most boards and phones begin to slow down between here and 85 °C
STEADY_GOVERNOR = "performance"


@dataclass(frozen=True)
class DeviceRuntime:
    """One runtime: the format that it runs, its version there (None: not installed), and what installs it."""

    name: str
    format: str
    version: str | None
    install: str | None


@dataclass(frozen=True)
class DeviceDiagnosis:
    """One device. What it does not tell is None or empty: many phones hide clocks and temperatures.

    `governors` are the distinct frequency governors of its cores, `ghz` the highest clock now and at most, and
    `temperatures_c` the sensors' readings by name.
    """

    uri: str
    system: str
    os: str | None
    model: str | None
    machine: str
    cpu: str
    features: tuple[Feature, ...]
    cores: int | None
    memory_bytes: int | None
    memory_available_bytes: int | None
    disk_free_bytes: int | None
    governors: tuple[str, ...]
    ghz: tuple[float | None, float | None]
    temperatures_c: dict[str, float]
    python: str | None
    timing: str
    runtimes: tuple[DeviceRuntime, ...]
    notes: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether any file runs there."""
        return any(runtime.version for runtime in self.runtimes)

    @property
    def verdict(self) -> str:
        """One sentence: what runs there."""
        formats = dict.fromkeys(runtime.format for runtime in self.runtimes if runtime.version)
        return f"{', '.join(formats)} files run on {self.uri}" if formats else f"no file runs on {self.uri}"

    def to_dict(self) -> dict[str, Any]:
        """Returns the JSON form of `doctor --device --json`."""
        return {"ok": self.ok, "verdict": self.verdict, **asdict(self)}


def diagnose_device(uri: str) -> DeviceDiagnosis:
    """Asks the device at `uri`. Raises EdgeKitError for one that cannot be reached."""
    from edgekit.runtimes import open_device

    device = open_device(uri)
    try:
        facts: dict[str, Any] = device.probe()
        return _diagnosis(device, facts)
    finally:
        device.cleanup()


def _diagnosis(device: Any, facts: dict[str, Any]) -> DeviceDiagnosis:
    machine = facts.get("machine", "")
    text = facts.get("cpuinfo", "")
    now, most = (max(facts[key]) / 1e6 if facts.get(key) else None for key in ("khz", "max_khz"))
    return DeviceDiagnosis(
        uri=device.uri,
        system=facts.get("system", ""),
        os=facts.get("os"),
        model=facts.get("model"),
        machine=machine,
        cpu=cpu_name(text) or machine,
        features=features(text, machine),
        cores=len(facts["cpus"]) if "cpus" in facts else None,
        memory_bytes=facts.get("memory_bytes"),
        memory_available_bytes=facts.get("memory_available_bytes"),
        disk_free_bytes=facts.get("disk_free_bytes"),
        governors=tuple(sorted(set(facts.get("governors", ())))),
        ghz=(now, most),
        temperatures_c=facts.get("temperatures_c", {}),
        python=facts.get("python"),
        timing=device.timing,
        runtimes=tuple(_runtimes(device, facts)),
        notes=tuple(_notes(device, facts)),
    )


def _runtimes(device: Any, facts: dict[str, Any]) -> list[DeviceRuntime]:
    from edgekit.runtimes import RUNTIMES, pte_runner

    packages = facts.get("packages", {})
    found = []
    for name, runtime in RUNTIMES.items():
        if runtime.format == "executorch" and device.runner is not None:
            version = f"{pte_runner.release()} (EdgeKit's runner)" if device.runner in pte_runner.TARGETS else None
            found.append(DeviceRuntime(name, runtime.format, version, None))
            continue
        version = packages.get(runtime.package.partition("==")[0]) if facts.get("python") else None
        install = f"{device.python} -m pip install {runtime.package}" if version is None else None
        found.append(DeviceRuntime(name, runtime.format, version, install))
    return found


def _notes(device: Any, facts: dict[str, Any]) -> list[str]:
    notes = []
    if device.timing == "emulated":
        notes.append("its processor is emulated: outputs are those of the real one, times are not; instructions count")
    if device.runner is not None and not facts.get("python"):
        notes.append(f"it has no {device.python}: .pte files need none, .onnx and .tflite files need it")
    unsteady = sorted(set(facts.get("governors", ())) - {STEADY_GOVERNOR})
    if unsteady:
        notes.append(
            f"the frequency governor is {', '.join(unsteady)}: latencies vary with the clock; "
            f"'{STEADY_GOVERNOR}' keeps it steady, where you may set it"
        )
    hot = {name: degrees for name, degrees in facts.get("temperatures_c", {}).items() if degrees >= HOT_C}
    if hot:
        name = max(hot, key=lambda key: hot[key])
        notes.append(f"it is hot ({name} {hot[name]:.0f} °C): let it cool before measuring")
    return notes
