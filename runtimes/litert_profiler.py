"""Per-op times of LiteRT, through the C interface of libLiteRt.so: its Python interface has no profiler.

The interface is not documented for this use, so everything about it is checked as it is used: what does not look as
expected is an error, never a wrong figure. It is pushed to devices beside the worker.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ai_edge_litert
import numpy as np

CPU = 1  # kLiteRtHwAcceleratorCpu
HOST_MEMORY = 1  # kLiteRtTensorBufferTypeHostMemory
LOCK_WRITE, LOCK_READ_WRITE = 1, 2
TENSOR_TYPE_BYTES = 256  # room for a LiteRtRankedTensorType, which is only handed on
# ProfiledEventData begins with: tag (char *), type (int), start in µs and duration in µs (uint64). What follows, the
# use of memory, differs between versions, and with it the size of an event: it is found by looking.
EVENT = struct.Struct("<QixxxxQQ")
EVENT_SIZES = range(72, 264, 8)
EVENT_TYPES = frozenset(1 << bit for bit in range(9))

Handle = ctypes.c_void_p
Event = tuple[str, int, int, int]


def profile(
    path: str, threads: int, feeds: Sequence[Mapping[str, np.ndarray]], runs: int
) -> dict[str, list[list[Event]]]:
    """The events of each of `runs` runs of the file, under "runs": (tag, type, start in µs, duration in µs).

    Types are those of TFLite's Profiler: 1 a stage, 2 an op, 4 and 8 an op of a delegate. A delegate's ops have no
    start of their own. Raises RuntimeError where the library does not do what is known of it.
    """
    try:
        model = _CompiledModel(path, threads)
        return {"runs": [model.profiled(feeds[i % len(feeds)]) for i in range(runs)]}
    except (AttributeError, OSError) as error:
        raise RuntimeError(f"libLiteRt.so has no profiler as it is known: {error}") from error


class _CompiledModel:
    """One .tflite file, compiled for XNNPACK with the profiler on."""

    def __init__(self, path: str, threads: int) -> None:
        self._library = ctypes.CDLL(str(Path(ai_edge_litert.__file__).with_name("libLiteRt.so")))
        self._payloads: list[Any] = []
        self._environment = self._make("LiteRtCreateEnvironment", ctypes.c_int(0), None)
        self._model = self._make("LiteRtCreateModelFromFile", self._environment, ctypes.c_char_p(path.encode()))
        options = self._make("LiteRtCreateOptions")
        self._call("LiteRtSetOptionsHardwareAccelerators", options, ctypes.c_int(CPU))
        self._add(options, b"runtime_options_string", b"enable_profiling = true\n")
        self._add(options, b"xnnpack", b"num_threads = %d\n" % threads)
        self._compiled = self._make("LiteRtCreateCompiledModel", self._environment, self._model, options)
        self._signature = self._make("LiteRtGetModelSignature", self._model, ctypes.c_size_t(0))
        self._inputs = self._buffers("Input")
        self._outputs = self._buffers("Output")
        self._profiler = self._make("LiteRtCompiledModelGetProfiler", self._compiled)

    def profiled(self, feeds: Mapping[str, np.ndarray]) -> list[Event]:
        """Run once: the events of it."""
        for name, (buffer, size) in self._inputs.items():
            array = np.ascontiguousarray(feeds[name])
            if array.nbytes != size:
                raise RuntimeError(f"the input '{name}' takes {size} bytes, not {array.nbytes}")
            memory = Handle()
            self._call("LiteRtLockTensorBuffer", buffer, ctypes.byref(memory), ctypes.c_int(LOCK_WRITE))
            ctypes.memmove(memory, array.ctypes.data, size)
            self._call("LiteRtUnlockTensorBuffer", buffer)
        inputs, outputs = (_array(buffers) for buffers in (self._inputs, self._outputs))
        sizes = [ctypes.c_size_t(len(array)) for array in (inputs, outputs)]
        self._call("LiteRtResetProfiler", self._profiler)
        self._call("LiteRtStartProfiler", self._profiler)
        self._call(
            "LiteRtRunCompiledModel", self._compiled, ctypes.c_size_t(0), sizes[0], inputs, sizes[1], outputs
        )  # fmt: skip
        self._call("LiteRtStopProfiler", self._profiler)
        number = ctypes.c_int()
        self._call("LiteRtGetNumProfilerEvents", self._profiler, ctypes.byref(number))
        raw = ctypes.create_string_buffer(max(number.value, 1) * EVENT_SIZES.stop)
        self._call("LiteRtGetProfilerEvents", self._profiler, number, raw)
        return _events(raw.raw, number.value)

    def _buffers(self, kind: str) -> dict[str, tuple[Handle, int]]:
        """A buffer for each input or output of the signature, and its size in bytes."""
        count = ctypes.c_size_t()
        self._call(f"LiteRtGetNumSignature{kind}s", self._signature, ctypes.byref(count))
        buffers = {}
        for i in range(count.value):
            index = ctypes.c_size_t(i)
            name = ctypes.c_char_p()
            self._call(f"LiteRtGetSignature{kind}Name", self._signature, index, ctypes.byref(name))
            tensor = self._make(f"LiteRtGetSignature{kind}TensorByIndex", self._signature, index)
            kind_of_tensor = ctypes.create_string_buffer(TENSOR_TYPE_BYTES)
            self._call("LiteRtGetRankedTensorType", tensor, kind_of_tensor)
            wanted = self._make(
                f"LiteRtGetCompiledModel{kind}BufferRequirements", self._compiled, ctypes.c_size_t(0), index
            )
            size = ctypes.c_size_t()
            self._call("LiteRtGetTensorBufferRequirementsBufferSize", wanted, ctypes.byref(size))
            buffer = self._make(
                "LiteRtCreateManagedTensorBuffer", self._environment, ctypes.c_int(HOST_MEMORY), kind_of_tensor, size
            )
            packed = ctypes.c_size_t()
            self._call("LiteRtGetTensorBufferPackedSize", buffer, ctypes.byref(packed))
            buffers[(name.value or b"").decode()] = (buffer, packed.value)
        return buffers

    def _add(self, options: Handle, identifier: bytes, toml: bytes) -> None:
        """Options that LiteRT reads from text. The text is kept here, so the library is given nothing to free."""
        text = ctypes.create_string_buffer(toml)
        keep = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(lambda pointer: None)
        self._payloads += [text, keep]
        made = self._make("LiteRtCreateOpaqueOptions", ctypes.c_char_p(identifier), text, keep)
        self._call("LiteRtAddOpaqueOptions", options, made)

    def _make(self, function: str, *arguments: Any) -> Handle:
        """Call a function whose last parameter takes the handle of what it makes or finds."""
        handle = Handle()
        self._call(function, *arguments, ctypes.byref(handle))
        return handle

    def _call(self, function: str, *arguments: Any) -> None:
        call = getattr(self._library, function)
        call.restype = ctypes.c_int
        status = call(*arguments)
        if status != 0:
            raise RuntimeError(f"{function} of LiteRT fails with status {status}")


def _array(buffers: Mapping[str, tuple[Handle, int]]) -> Any:
    return (Handle * len(buffers))(*(buffer for buffer, _ in buffers.values()))


def _events(raw: bytes, number: int) -> list[Event]:
    """The events at the beginning of `raw`. Raises RuntimeError where no size of an event makes sense of it."""
    for size in EVENT_SIZES:
        fields = [EVENT.unpack_from(raw, i * size) for i in range(number)]
        if all(kind in EVENT_TYPES and tag for tag, kind, _, _ in fields) and not any(raw[number * size :]):
            return [(ctypes.string_at(tag).decode(), kind, start, us) for tag, kind, start, us in fields]
    raise RuntimeError("the events of LiteRT's profiler have a form that is not known")
