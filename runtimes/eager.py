"""PyTorch eager: runs the original module in this process, as the reference for every file."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import cycle

import numpy as np
import torch

from .session import TensorInfo


def version() -> str:
    """torch's version."""
    return str(torch.__version__)


def load(
    module: torch.nn.Module,
    *,
    device: str = "cpu",
    threads: int = 1,
    inputs: Sequence[str] = (),
    outputs: Sequence[str] = (),
) -> EagerSession:
    """A session on `module`, which is called as `module(*tensors)` and returns a tensor or a tuple of tensors.

    `device` is "cpu" or "cuda"; the module is moved there. Arithmetic is full float32 (TF32 off). The number of threads
    and TF32 are settings of the process. Without names, inputs are `input_0`, … in the order of the feeds and
    outputs `output_0`, ….
    """
    torch.set_num_threads(threads)
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    return EagerSession(module.to(device), torch.device(device), inputs, outputs)


class EagerSession:
    """One module. It declares no dtypes and shapes, so torch decides what it takes; names are checked where given."""

    def __init__(
        self, module: torch.nn.Module, device: torch.device, inputs: Sequence[str], outputs: Sequence[str]
    ) -> None:
        """`module` is on `device` already."""
        self._module: torch.nn.Module | None = module
        self._device = device
        self._input_names = tuple(inputs)
        self._output_names = tuple(outputs)
        self.inputs: tuple[TensorInfo, ...] = ()
        self.outputs: tuple[TensorInfo, ...] = ()

    @torch.inference_mode()
    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Outputs by name; on CUDA this includes both copies and waits for the device.

        Raises ValueError for wrong names, and for a module that does not return tensors.
        """
        if self._module is None:
            raise ValueError("this session is closed")
        names = self._input_names or tuple(f"input_{i}" for i in range(len(feeds)))
        if set(names) != set(feeds):
            raise ValueError(f"the model takes the inputs {', '.join(names)}, not {', '.join(map(str, feeds))}")
        # The copy parts a feed from a module that works in place, and gives torch an array that it may write.
        tensors = [torch.from_numpy(np.array(feeds[name], order="C")).to(self._device) for name in names]
        results = self._module(*tensors)
        results = (results,) if isinstance(results, torch.Tensor) else tuple(results)
        if not all(isinstance(result, torch.Tensor) for result in results):
            raise ValueError("the model returns something other than tensors")
        names = self._output_names or tuple(f"output_{i}" for i in range(len(results)))
        if len(names) != len(results):
            raise ValueError(f"the model returns {len(results)} outputs, which {', '.join(names)} do not name")
        # The copy parts an output from the module's own memory: a buffer, or a feed that was passed through.
        arrays = {name: np.array(result.cpu().numpy()) for name, result in zip(names, results, strict=True)}
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return arrays

    def resident(self, feeds: Sequence[Mapping[str, np.ndarray]]) -> Callable[[], object]:
        """A call that runs the module on the next of `feeds`, in turn, which lie on the device; outputs stay there."""
        module = self._module
        if module is None:
            raise ValueError("this session is closed")
        turns = cycle([[torch.from_numpy(np.array(a)).to(self._device) for a in feed.values()] for feed in feeds])

        @torch.inference_mode()
        def call() -> object:
            return module(*next(turns))

        return call

    def clocked(self, feeds: Sequence[Mapping[str, np.ndarray]]) -> tuple[Callable[[], None], Callable[[], float]]:
        """The call of `resident`, which waits for the GPU, and what the last one took there by CUDA events, in ms."""
        call = self.resident(feeds)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

        def timed() -> None:
            start.record()
            call()
            end.record()
            end.synchronize()

        return timed, lambda: float(start.elapsed_time(end))

    def close(self) -> None:
        """Let go of the module."""
        self._module = None
