"""ExecuTorch: runs a .pte file through the runtime's Python binding."""

from __future__ import annotations

import ctypes
import importlib.metadata
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch  # the binding resolves its symbols from torch's libraries, so torch comes first

# `executorch.runtime` and `portable_lib` are thin covers of this module that import all of exir for one decorator:
# 2.8 s and 137 MB more.
from executorch.extension.pybindings import _C

from .session import Session, TensorInfo, checked_feeds, numbered

# Numbers of torch's ScalarType, which the program file stores.
DTYPES = {
    0: "uint8",
    1: "int8",
    2: "int16",
    3: "int32",
    4: "int64",
    5: "float16",
    6: "float32",
    7: "float64",
    11: "bool",
}
METHOD = "forward"


def version() -> str:
    """The runtime's version."""
    return importlib.metadata.version("executorch")


def load(path: str, *, threads: int, inputs: Sequence[str] = (), outputs: Sequence[str] = ()) -> Session:
    """A session on method `forward` of the .pte file at `path`, which has no names: `inputs` and `outputs` give them.

    The thread pool belongs to the process: the last `threads` holds for every session, and a program takes the pool as
    it is when it loads. Raises ValueError for a wrong number of names, no method `forward`, or a dtype that
    numpy has no name for. What ExecuTorch raises on a corrupt file passes through.
    """
    _load_quantized_kernels()
    # The binding calls this unsafe because a running program would lose its pool; none runs here, and the pool is left
    # alone when it already has the size.
    if _C._threadpool_get_thread_count() != threads:
        _C._unsafe_reset_threadpool(threads)
    torch.set_num_threads(threads)
    return ProgramSession(_program(path), inputs, outputs)


def trace(
    path: str, into: Path, *, threads: int, inputs: Sequence[str], feeds: Sequence[Mapping[str, np.ndarray]], runs: int
) -> None:
    """Run the file `runs` times on `feeds` in turn, and leave ExecuTorch's own record, an ETDump, in the file `into`.

    The pool is that of the session that was loaded before.
    """
    program = _program(path, enable_etdump=True)
    session = ProgramSession(program, inputs, ())
    for i in range(runs):
        session.run(feeds[i % len(feeds)])
    program.write_etdump_result_to_file(str(into))


def _program(path: str, enable_etdump: bool = False) -> _C.ExecuTorchProgram:
    check = _C.Verification.InternalConsistency
    program = _C._load_program(path, enable_etdump=enable_etdump, program_verification=check)
    methods = [program.get_method_name(i) for i in range(program.num_methods())]
    if METHOD not in methods:
        raise ValueError(f"the program has no method '{METHOD}', only {', '.join(methods) or 'none'}")
    return program


class ProgramSession:
    """One loaded .pte file."""

    def __init__(self, program: _C.ExecuTorchProgram, inputs: Sequence[str], outputs: Sequence[str]) -> None:
        """Raises ValueError for a wrong number of names, and for a dtype without a numpy name."""
        meta = program.method_meta(METHOD)
        input_names = numbered(inputs, meta.num_inputs(), "input")
        output_names = numbered(outputs, meta.num_outputs(), "output")
        self.inputs = tuple(_info(name, meta.input_tensor_meta(i)) for i, name in enumerate(input_names))
        self.outputs = tuple(_info(name, meta.output_tensor_meta(i)) for i, name in enumerate(output_names))
        self._output_names = output_names
        self._program: _C.ExecuTorchProgram | None = program
        self._method = program.load_method(METHOD)

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Outputs by name. Raises ValueError for a feed that does not match `inputs`."""
        # Uncloned outputs lie in the program's memory until the next call; numpy copies them faster than torch does.
        results = self.prepared(feeds)()
        return {name: result.numpy().copy() for name, result in zip(self._output_names, results, strict=True)}

    def prepared(self, feeds: Mapping[str, np.ndarray]) -> Callable[[], Sequence[torch.Tensor]]:
        """What runs once on `feeds`; its outputs hold until the next run, in the memory where the C++ runner has them.

        Raises ValueError for a feed that does not match `inputs`.
        """
        if self._method is None:
            raise ValueError("this session is closed")
        tensors = [_tensor(array) for array in checked_feeds(self.inputs, feeds)]
        return partial(self._method.call, tensors, clone_outputs=False)

    def close(self) -> None:
        """Let go of the program."""
        self._method = None
        self._program = None


def _tensor(array: np.ndarray) -> torch.Tensor:
    """A tensor on the memory of a C-contiguous array, or of a copy: torch has no tensors that cannot be written."""
    return torch.from_numpy(array if array.flags.writeable else array.copy())


def _info(name: str, meta: _C.TensorInfo) -> TensorInfo:
    if meta.dtype() not in DTYPES:
        raise ValueError(f"'{name}' has torch's scalar type {meta.dtype()}, which numpy has no dtype for")
    return TensorInfo(name, DTYPES[meta.dtype()], tuple(meta.sizes()))


def _load_quantized_kernels() -> None:
    """Register `quantized_decomposed::*`, which a program needs where XNNPACK left a quantize or dequantize outside."""
    library = Path(_C.__file__).parents[2] / "lib" / "libexecutorch_kernels_quantized.so"
    if library.is_file() and not any(name.startswith("quantized_decomposed") for name in _C._get_operator_names()):
        ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
