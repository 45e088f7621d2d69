"""Run the original in this process, and files in processes of their own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from edgekit.artifacts.artifact import Artifact
from edgekit.data.batch_axis import batch_of
from edgekit.errors import EdgeKitError, UsageError
from edgekit.loading import forward_errors
from edgekit.types import INT8_ARITHMETIC, State, TensorSpec, axis_order
from edgekit.util import ragged_arrays

if TYPE_CHECKING:
    import numpy as np
    import torch

    from edgekit.loading.model import Model
    from edgekit.runtimes import Timing
    from edgekit.runtimes.devices.device import Device


@contextmanager
def in_process(module: torch.nn.Module, device: str, threads: int) -> Iterator[Any]:
    """Yields a session on a torch module in this process, and then puts the module and the threads back."""
    import torch

    from edgekit.loading.wrappers import OnnxReference
    from edgekit.runtimes import eager

    before = torch.get_num_threads()
    if isinstance(module, OnnxReference):
        module.use(threads)
    session = eager.load(module, device=device, threads=threads)
    try:
        yield session
    finally:
        session.close()
        module.to("cpu")
        torch.set_num_threads(before)


def run_module(
    module: torch.nn.Module,
    feeds: Sequence[np.ndarray],
    device: str = "cpu",
    threads: int = 1,
    state: Sequence[State] = (),
    start: int = 0,
) -> tuple[np.ndarray, ...]:
    """Runs a torch module in this process on (runs, *shape) inputs; returns (runs, *shape) outputs.

    A module with `state` takes it behind the inputs and gives its next value behind the outputs: it is at its initial
    value in the first run, and each run goes on where the one before it ended.

    One thread is the default because torch's spin at every op: on a machine with other work, two took ten times
    as long as one. Raises EdgeKitError where the module fails on a sample; the first is number `start` of the data.
    """
    import numpy as np

    runs = len(feeds[0])
    values = [part.value for part in state]
    outputs: list[Any] = []
    with in_process(module, device, threads) as session:
        for run in range(runs):
            try:
                given = enumerate((*(feed[run] for feed in feeds), *values))
                found = list(session.run({f"input_{i}": array for i, array in given}).values())
            except (EdgeKitError, MemoryError):
                raise
            except Exception as error:  # whatever the user's forward raises
                raise EdgeKitError(
                    f"the model fails on batch {start + run} of the data: {forward_errors.told(error)}",
                    forward_errors.remedy(error, module, "check the values in --data"),
                ) from error
            found, values = found[: len(found) - len(state)], found[len(found) - len(state) :]
            outputs = outputs or [np.empty((runs, *array.shape), array.dtype) for array in found]
            for i, array in enumerate(found):
                if isinstance(outputs[i], np.ndarray) and outputs[i].shape[1:] != array.shape:
                    outputs[i] = list(outputs[i][:run])  # its shape depends on the values
                if isinstance(outputs[i], list):
                    outputs[i].append(array)
                else:
                    outputs[i][run] = array
    return tuple(ragged_arrays.stack(output) if isinstance(output, list) else output for output in outputs)


def run(artifact: Artifact, feeds: Sequence[np.ndarray], **options: Any) -> Any:
    """Runs an artifact in a process of its own, on NCHW feeds and to NCHW outputs whatever the file's layout is.

    One with state starts at its initial value, and each run goes on where the one before it ended.
    """
    import numpy as np

    from edgekit.runtimes import run_artifact

    inputs, outputs = ([spec.name for spec in specs] for specs in (artifact.inputs, artifact.outputs))
    there = [feed.transpose(_stacked_order(feed, artifact)) for feed in feeds]
    state = [(part, part.value.transpose(axis_order(part.value.ndim, artifact.layout))) for part in artifact.state]
    result = run_artifact(
        artifact.path,
        there,
        inputs=inputs,
        outputs=outputs,
        state=[(part.input.name, part.output, value) for part, value in state],
        weight_files=artifact.weight_files,
        **options,
    )
    back = [array.transpose(np.argsort(_stacked_order(array, artifact))) for array in result.outputs]
    return replace(result, outputs=tuple(np.ascontiguousarray(array) for array in back))


def settings_notes(artifact: Artifact, result: Any) -> tuple[str, ...]:
    """Returns a note where int8 is right on this processor only with options that a runtime does not set itself."""
    if not result.settings or artifact.precision not in INT8_ARITHMETIC:
        return ()
    options = ", ".join(f"{key}={value}" for key, value in result.settings.items())
    return (
        f"{artifact.path.name} ran with {options}: without it {result.runtime}'s int8 sums overflow on this processor, "
        "so set it in your application for such processors too",
    )


def _stacked_order(stacked: np.ndarray, artifact: Artifact) -> tuple[int, ...]:
    return (0, *(axis + 1 for axis in axis_order(stacked.ndim - 1, artifact.layout)))


def flat(outputs: Sequence[np.ndarray], batch: int, specs: Sequence[TensorSpec] | None = None) -> list[np.ndarray]:
    """Joins runs and batch, (runs, batch, …) → (runs·batch, …); outputs without the batch in front stay as they are.

    So do those whose number of rows depends on values, as the `specs` of the outputs tell.
    """
    fixed = [not ragged_arrays.is_open(spec) for spec in specs] if specs is not None else [True] * len(outputs)
    return [
        a.reshape(-1, *a.shape[2:]) if fits and a.ndim > 1 and a.shape[1] == batch else a
        for a, fits in zip(outputs, fixed, strict=True)
    ]


def aligned(
    reference: Sequence[np.ndarray], outputs: Sequence[np.ndarray], subject: Model | Artifact
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Returns (runs, …) outputs of two networks as one row a sample; those of data-dependent shape as pairs of rows."""
    batch = batch_of(subject.inputs)
    left, right = ragged_arrays.matched(reference, outputs, subject.outputs)
    return flat(left, batch, subject.outputs), flat(right, batch, subject.outputs)


def time_module(
    module: torch.nn.Module,
    feeds: Sequence[np.ndarray],
    device: str,
    threads: int,
    timing: Timing,
    state: Sequence[State] = (),
) -> tuple[float, ...]:
    """Times the original in this process, on `device` with `threads` threads; returns latencies in ms.

    Every run starts from the initial `state`.

    On "cuda" they are those of the forward pass by CUDA events, without the copies to the GPU and back.
    """
    import os
    from itertools import cycle

    from edgekit.runtimes import stopwatch

    values = [part.value for part in state]
    samples = [
        {f"input_{i}": array for i, array in enumerate((*(feed[run] for feed in feeds), *values))}
        for run in range(len(feeds[0]))
    ]
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    with in_process(module, device, threads) as session:
        try:
            stopwatch.pin(threads)
            if device == "cuda":
                call, own_ms = session.clocked(samples)
                return tuple(stopwatch.time_runs(call, own_ms=own_ms, **asdict(timing)))
            turns = cycle(samples)
            return tuple(stopwatch.time_runs(lambda: session.run(next(turns)), **asdict(timing)))
        finally:
            if cores is not None:
                os.sched_setaffinity(0, cores)


@contextmanager
def opened(device: str, baseline: str = "cpu", timeout: float | None = None, timed: bool = True) -> Iterator[Device]:
    """Yields the device at a URI, connected once for all jobs, and cleans it up.

    `timeout` is how many seconds a job may go without progress, the device's own limit by default. With `timed` files
    are to be timed there. Raises EdgeKitError for a device that does not answer, for an emulated one that cannot count
    the instructions of `timed` files, or for a baseline device that torch cannot use.
    """
    from edgekit.runtimes import open_device
    from edgekit.runtimes.devices.device import Emulator

    if baseline not in ("cpu", "cuda"):
        raise UsageError(f"unknown baseline device '{baseline}'", "choose cpu or cuda")
    if baseline == "cuda":
        import torch

        if not torch.cuda.is_available():
            why = "finds no CUDA device here" if torch.version.cuda else "is built without CUDA"
            raise EdgeKitError(
                f"torch {torch.__version__} {why}",
                "leave out --baseline-device, or use a machine with an NVIDIA GPU and a CUDA build of torch",
            )
    there = open_device(device)
    try:
        there.probe()
        if timed and isinstance(there, Emulator):
            with there.counting():
                pass
        if timeout is not None:
            there.stall_s = timeout
        yield there
    finally:
        there.cleanup()
