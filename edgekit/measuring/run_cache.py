"""Run cache: what a command has measured is kept while it fails, so that `--resume` goes on from there."""

from __future__ import annotations

import hashlib
import io
import json
import time
import zipfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekit.artifacts.artifact import Artifact
from edgekit.data import digests
from edgekit.errors import EdgeKitError
from edgekit.measuring import running
from edgekit.types import TensorSpec
from edgekit.util import atomic_files

if TYPE_CHECKING:
    import numpy as np

    from edgekit.runtimes import RunResult
    from edgekit.runtimes.devices.device import Device

KEPT_DAYS = 7
LARGEST = 2 << 30  # bytes of outputs that one command keeps; with --resume those of further runs are computed anew
SPECS = ("input_specs", "output_specs")
KEPT = "what was measured so far is kept: add --resume to go on from there"


class Journal:
    """The results of one command's runs. An entry is found by what was run: file, inputs, device, options, round."""

    def __init__(self, resume: bool) -> None:
        """With `resume`, runs that an earlier command finished are read instead of run."""
        from edgekit.runtimes.cache import root

        self._folder = root() / "journal"
        self._resume = resume
        self._entries: list[Path] = []
        self._room = LARGEST
        self.reused = 0
        _forget_old(self._folder)

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        """Forgets the results of a command that ended well; an error says that those of another are kept."""
        if error is None:
            for path in self._entries:
                path.unlink(missing_ok=True)
        elif isinstance(error, EdgeKitError) and self._entries:
            raise EdgeKitError(error.what, f"{error.help}; {KEPT}" if error.help else KEPT) from error

    @property
    def notes(self) -> tuple[str, ...]:
        """A note where results of an earlier command were used: its times are of another moment."""
        if not self.reused:
            return ()
        return (f"{self.reused} results are those of the command before, and their times of another moment",)

    def run(
        self,
        artifact: Artifact,
        feeds: Sequence[np.ndarray],
        *,
        device: Device,
        number: int = 0,
        digest: str | None = None,
        **options: Any,
    ) -> RunResult:
        """`running.run`, or its result of before. `number` tells runs apart that are alike otherwise.

        `digest` is that of the feeds where it is known.
        """
        samples = digests.digest_of(feeds) if digest is None else digest
        path = self._folder / f"{_key(artifact, samples, device, number, options)}.zip"
        if self._resume:
            with suppress(Exception):  # whatever a damaged archive raises: it is measured anew
                result = _load(path)
                self._entries.append(path)
                self.reused += 1
                return result
        result = running.run(artifact, feeds, device=device, **options)
        self._room -= sum(array.nbytes for array in result.outputs)
        if self._room >= 0:
            with suppress(OSError, EdgeKitError):  # a full disk here is no reason to end a measurement there
                _save(path, result)
                self._entries.append(path)
        return result


def _key(artifact: Artifact, samples: str, device: Device, number: int, options: dict[str, Any]) -> str:
    names = [spec.name for spec in (*artifact.inputs, *artifact.outputs)]
    hashes = [atomic_files.sha256(path) for path in (artifact.path, *artifact.weight_files)]
    about = [samples, hashes, artifact.layout, names, artifact.state, device.uri, number, sorted(options.items())]
    return hashlib.sha256(repr(about).encode()).hexdigest()[:32]


def _save(path: Path, result: RunResult) -> None:
    import numpy as np

    facts = {key: value for key, value in vars(result).items() if key not in ("outputs", "trace")}
    facts |= {key: [asdict(spec) for spec in facts[key]] for key in SPECS}
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("facts.json", json.dumps({**facts, "outputs": len(result.outputs)}))
        if result.trace is not None:
            archive.writestr("trace", result.trace)
        for i, array in enumerate(result.outputs):
            with archive.open(f"{i}.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array(file, array, allow_pickle=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_files.write(path, buffer.getvalue())


def _load(path: Path) -> RunResult:
    import numpy as np

    from edgekit.runtimes import RunResult

    with zipfile.ZipFile(path) as archive:
        facts = json.loads(archive.read("facts.json"))
        trace = archive.read("trace") if "trace" in archive.namelist() else None
        outputs = []
        for i in range(facts.pop("outputs")):
            with archive.open(f"{i}.npy") as file:
                outputs.append(np.lib.format.read_array(file, allow_pickle=False))
    for key in SPECS:
        facts[key] = tuple(TensorSpec(s["name"], s["dtype"], tuple(s["shape"])) for s in facts[key])
    for key in ("latency_ms", "cpus"):
        facts[key] = tuple(facts[key])
    return RunResult(outputs=tuple(outputs), trace=trace, **facts)


def _forget_old(folder: Path) -> None:
    for path in folder.glob("*.zip"):
        with suppress(OSError):
            if time.time() - path.stat().st_mtime > KEPT_DAYS * 86400:
                path.unlink()
