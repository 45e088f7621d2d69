"""The original as a baseline: what it gives and how long it takes, kept for the next command on the same content."""

from __future__ import annotations

import hashlib
import io
import platform
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekit import files
from edgekit.errors import EdgeKitError

if TYPE_CHECKING:
    import numpy as np

    from edgekit.model import Model

KEPT_DAYS = 30
STEADY = 1.1  # times the shortest median
LARGEST = 256 << 20  # bytes of outputs that are kept; of more, the latencies alone
CACHED = "the original's latency was measured by an earlier command on this machine: --no-cache measures it anew"


@dataclass(frozen=True)
class Kept:
    """What was measured of an original: outputs, (runs, …) each, None where they were too large, and ms by process."""

    outputs: tuple[np.ndarray, ...] | None
    processes: tuple[tuple[float, ...], ...]


def check(original: Model, device: str) -> None:
    """Raises EdgeKitError for an original that does not run on `device`."""
    if device == "cuda" and original.onnx is not None:
        raise EdgeKitError(
            f"{original.name} is an ONNX file, which runs in ONNX Runtime on the CPU",
            "give the PyTorch model, or leave out --baseline-device",
        )


def folder() -> Path:
    """Where baselines are kept."""
    from edgekit.runtimes.cache import root

    return root() / "baselines"


def key(original: Model, feeds: Sequence[np.ndarray], device: str, *options: Any) -> str | None:
    """Returns a name for all that a measurement depends on, or None for a model whose content cannot be told.

    That is the captured graph with its constants and weights, the data, the device, this machine, the versions of what
    runs it, and `options`. Source code is no part of it: the graph holds what of it runs.
    """
    import numpy as np

    digest = hashlib.blake2b(digest_size=16)
    try:
        for part in _content(original):
            digest.update(part)
    except Exception:  # whatever torch.export raises for a model that cannot be captured
        return None
    for feed in feeds:
        digest.update(f"{feed.dtype.str}{feed.shape}".encode())
        digest.update(np.ascontiguousarray(feed).data)
    digest.update(repr((_machine(device), options)).encode())
    return digest.hexdigest()


def _content(original: Model) -> Iterator[bytes | memoryview]:
    import torch

    yield repr((original.inputs, original.state)).encode()
    if original.onnx is not None:
        yield original.onnx.SerializeToString()
        return
    program = torch.export.export(original.module, original.example, strict=False)
    for module in program.graph_module.modules():
        yield str(getattr(module, "code", "")).encode()
    for name, tensor in sorted({**program.state_dict, **program.constants}.items()):
        plain = tensor.detach().cpu().contiguous()
        yield f"{name}{plain.dtype}{tuple(plain.shape)}".encode()
        yield plain.reshape(-1).view(torch.uint8).numpy().data


def _machine(device: str) -> tuple[str, ...]:
    import onnxruntime
    import torch

    gpu = (torch.cuda.get_device_name(), str(torch.version.cuda)) if device == "cuda" else ()
    return (device, *gpu, platform.node(), platform.machine(), torch.__version__, onnxruntime.__version__)


def recall(name: str | None) -> Kept | None:
    """Returns what is kept under a key, or None: nothing, or what cannot be read."""
    import zipfile

    import numpy as np

    if name is None:
        return None
    with suppress(OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        with np.load(folder() / f"{name}.npz", allow_pickle=False) as arrays:
            counts = {kind: sum(key.startswith(kind) for key in arrays) for kind in ("output", "process")}
            outputs = tuple(arrays[f"output_{i}"] for i in range(counts["output"]))
            processes = tuple(tuple(arrays[f"process_{i}"].tolist()) for i in range(counts["process"]))
        if processes:
            return Kept(outputs or None, processes)
    return None


def keep(name: str | None, outputs: Sequence[np.ndarray], processes: Sequence[tuple[float, ...]]) -> None:
    """Keeps a measurement under a key, and forgets those of more than KEPT_DAYS ago.

    One that was disturbed is not kept: the medians of its processes are apart by more than STEADY.
    """
    import numpy as np

    medians = [float(np.median(samples)) for samples in processes]
    if name is None or max(medians) > STEADY * min(medians):
        return
    place = folder()
    arrays: dict[str, Any] = {f"process_{i}": np.array(samples) for i, samples in enumerate(processes)}
    if sum(array.nbytes for array in outputs) <= LARGEST:
        arrays |= {f"output_{i}": array for i, array in enumerate(outputs)}
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    with suppress(OSError, EdgeKitError):  # a cache that cannot be written is no reason to fail
        place.mkdir(parents=True, exist_ok=True)
        for path in place.glob("*.npz"):
            if time.time() - path.stat().st_mtime > KEPT_DAYS * 86400:
                path.unlink()
        files.write(place / f"{name}.npz", buffer.getvalue())


def note(device: str) -> str | None:
    """Returns how the original was measured on a GPU; None on the CPU, where it is measured as the files are."""
    if device != "cuda":
        return None
    import torch

    return (
        f"the original ran on {torch.cuda.get_device_name()} in fp32 with TF32 off; its latency is that of the forward "
        "pass by CUDA events, with inputs and outputs in the GPU's memory"
    )
