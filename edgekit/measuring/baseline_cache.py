"""Baseline cache: what the original gives and how long it takes, kept for the next command on the same content."""

from __future__ import annotations

import hashlib
import io
import platform
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekit.errors import EdgeKitError
from edgekit.measuring import running
from edgekit.util import atomic_files

if TYPE_CHECKING:
    import numpy as np

    from edgekit.loading.model import Model
    from edgekit.measuring.evaluation import Chunk

KEPT_DAYS = 30
STEADY = 1.1  # times the shortest median
LARGEST = 256 << 20  # bytes of outputs that one command keeps; those of further chunks are computed anew
CACHED = "the original's latency was measured by an earlier command on this machine: --no-cache measures it anew"


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


class Reference:
    """The original as a runner of chunks: what an earlier command kept of the same content is not run again.

    A model with state starts from its initial values in every chunk, as the files do.
    """

    def __init__(self, original: Model, device: str, threads: int, cache: bool) -> None:
        """Without `cache` nothing is read; what is measured is kept all the same, for the next command."""
        self._original, self._device, self._threads, self._reads = original, device, threads, cache
        self._content = content(original)
        self._chunks: list[str] = []
        self._room = LARGEST

    def __call__(self, chunk: Chunk) -> Sequence[np.ndarray]:
        """Returns the original's outputs for a chunk of the samples."""
        self._chunks.append(chunk.digest)
        name = key(self._content, [chunk.digest], self._device, self._threads)
        outputs = recall_outputs(name) if self._reads else None
        if outputs is not None:
            return outputs
        original = self._original
        outputs = running.run_module(
            original.module, chunk.feeds, self._device, self._threads, original.state, chunk.start
        )
        self._room -= sum(array.nbytes for array in outputs)
        if self._room >= 0:
            keep_outputs(name, outputs)
        return outputs

    def processes(self, *options: Any) -> tuple[tuple[float, ...], ...] | None:
        """Returns the latencies that are kept of the original with these samples, ms by process; None where none are.

        It is asked after the last chunk. `options` are all else that they depend on.
        """
        return recall(self._name(options)) if self._reads else None

    def keep(self, processes: Sequence[tuple[float, ...]], *options: Any) -> None:
        """Keeps latencies for the next command."""
        keep(self._name(options), processes)

    def _name(self, options: tuple[Any, ...]) -> str | None:
        return key(self._content, self._chunks, self._device, self._threads, *options)


def content(original: Model) -> str | None:
    """Returns a name for the content of a model, or None where it cannot be told.

    That is the captured graph with its constants and weights. Source code is no part of it: the graph holds what of it
    runs.
    """
    digest = hashlib.blake2b(digest_size=16)
    try:
        for part in _content(original):
            digest.update(part)
    except Exception:  # whatever torch.export raises for a model that cannot be captured
        return None
    return digest.hexdigest()


def key(content: str | None, samples: Sequence[str], device: str, *options: Any) -> str | None:
    """Returns a name for all that a measurement depends on, or None for a model whose `content` cannot be told.

    That is the model, the digests of the `samples`, the device, this machine, the versions of what runs the model, and
    `options`.
    """
    if content is None:
        return None
    about = repr((content, list(samples), _machine(device), options)).encode()
    return hashlib.blake2b(about, digest_size=16).hexdigest()


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


def recall(name: str | None) -> tuple[tuple[float, ...], ...] | None:
    """Returns the latencies kept under a key, ms by process, or None: nothing, or what cannot be read."""
    arrays = _read(name)
    return tuple(tuple(array.tolist()) for array in arrays) if arrays else None


def keep(name: str | None, processes: Sequence[tuple[float, ...]]) -> None:
    """Keeps latencies under a key.

    Those that were disturbed are not kept: the medians of the processes are apart by more than STEADY.
    """
    import numpy as np

    medians = [float(np.median(samples)) for samples in processes]
    if max(medians) <= STEADY * min(medians):
        _write(name, [np.array(samples) for samples in processes])


def recall_outputs(name: str | None) -> tuple[np.ndarray, ...] | None:
    """Returns the outputs kept under a key, (runs, …) each, or None as `recall` does."""
    return _read(name) or None


def keep_outputs(name: str | None, outputs: Sequence[np.ndarray]) -> None:
    """Keeps outputs under a key."""
    _write(name, outputs)


def _read(name: str | None) -> tuple[np.ndarray, ...]:
    import numpy as np

    if name is None:
        return ()
    # Whatever a damaged archive raises: it is measured anew.
    with suppress(Exception), np.load(folder() / f"{name}.npz", allow_pickle=False) as arrays:
        return tuple(arrays[str(i)] for i in range(len(arrays.files)))
    return ()


def _write(name: str | None, arrays: Sequence[np.ndarray]) -> None:
    """Keeps arrays under a key, and forgets those of more than KEPT_DAYS ago."""
    import numpy as np

    if name is None:
        return
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **{str(i): array for i, array in enumerate(arrays)})
    place = folder()
    with suppress(OSError, EdgeKitError):  # a cache that cannot be written is no reason to fail
        place.mkdir(parents=True, exist_ok=True)
        for path in place.glob("*.npz"):
            if time.time() - path.stat().st_mtime > KEPT_DAYS * 86400:
                path.unlink()
        atomic_files.write(place / f"{name}.npz", buffer.getvalue())


def note(device: str) -> str | None:
    """Returns how the original was measured on a GPU; None on the CPU, where it is measured as the files are."""
    if device != "cuda":
        return None
    import torch

    return (
        f"the original ran on {torch.cuda.get_device_name()} in fp32 with TF32 off; its latency is that of the forward "
        "pass by CUDA events, with inputs and outputs in the GPU's memory"
    )
