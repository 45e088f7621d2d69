"""Compress a model by a recipe, calibrated on its data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

from edgekit.data import sources
from edgekit.data.batch_axis import batch_of
from edgekit.data.digests import sample_digests
from edgekit.errors import EdgeKitError
from edgekit.loading.with_data import as_tensors
from edgekit.types import TensorSpec
from edgekit.util.memory import is_large, map_weights, release_memory
from edgekit.util.progress import Progress

if TYPE_CHECKING:
    import torch
    from torch.export import ExportedProgram

    from edgekit.loading.model import Model
    from edgekit.quant.ptq.recipes import Compressed


ONNX_IS_FP32 = "fp32, because an ONNX file is not quantized: give the PyTorch model for int8"
MOST_LINEAR = 0.5  # of the weights: where int8-dynamic reaches so many, it makes the smaller and faster file


def calibrated_on(original: Model, source: sources.Data) -> dict[str, Any]:
    """Returns what the manifest says of the samples that a recipe calibrated on: their source, and a digest of each."""
    most = -(-sources.CALIBRATION_SAMPLES // batch_of(original.inputs))
    found: list[str] = []
    for arrays, real, _ in islice(sources.batches(source.calibration, original.inputs), most):
        found += sample_digests(arrays, original.inputs, real)
    return {"source": source.source, "samples": len(found), "digests": found}


def precisions(original: Model, source: sources.Data | None, target: str) -> tuple[str, ...]:
    """Returns what to export where no precision is asked for: the best first, and what to take where that fails.

    With data that is `target`, the precision that pays on the target. Without, int8-dynamic where it reaches most
    weights, and else fp16.
    """
    if original.onnx is not None:
        return ("fp32",)
    if source is not None:
        return (target,)
    from edgekit.quant.ptq.dynamic import reachable_share

    share = reachable_share(original.module, original.example)
    return (*(["int8-dynamic"] if share >= MOST_LINEAR else []), "fp16", "fp32")


def compress(
    original: Model,
    source: sources.Data | None,
    precision: str,
    progress: Progress,
    keep_float: frozenset[str] = frozenset(),
) -> Compressed | None:
    """Applies the recipe called `precision`; None for an ONNX file, which is not taken apart.

    `keep_float` names nodes of the canonical graph that stay in float.
    """
    from edgekit.quant.ptq.recipes import RECIPES

    recipe = RECIPES[precision]
    if original.onnx is not None:
        if precision not in ("fp32", "fp16"):
            raise EdgeKitError(
                f"{precision} starts from a PyTorch model, and {original.name} is an ONNX file",
                "give the PyTorch model, or export the ONNX file with --precision fp32 or fp16",
            )
        return None
    if not recipe.needs_data:
        with progress.step("Capturing the graph"):
            return recipe.apply(original.module, original.example, (), keep_float)
    assert source is not None
    large = is_large(original.module)
    with progress.step(f"Calibrating {precision}"), quickest_threads(original):
        if large:
            map_weights()
        made = recipe.apply(original.module, original.example, calibration_of(original, source), keep_float)
    if large:
        release_memory()
    return made


@contextmanager
def quickest_threads(original: Model) -> Iterator[None]:
    """Lets torch use one thread or all of them, whichever runs the model quicker.

    Threads that wait for each other spin: for small models, or beside other work, several are up to ten times slower
    than one.
    """
    import torch

    from edgekit.runtimes import stopwatch

    def run_ms(count: int, runs: int) -> float:
        torch.set_num_threads(count)
        times = stopwatch.time_runs(
            lambda: original.module(*original.example), warmup_runs=0, seconds=0, min_runs=runs, max_runs=runs
        )
        return stopwatch.percentile(times, 50)

    most = torch.get_num_threads()
    together = False
    if most > 2:  # two gain little at best
        with torch.inference_mode():
            alone = run_ms(1, 5)
            # A second process, which one thread leaves room for, halves the time. One run tells of threads that would
            # take seconds to be measured.
            together = run_ms(most, 1) < 4 * alone and run_ms(most, 5) < 0.5 * alone
    torch.set_num_threads(most if together else 1)
    try:
        yield
    finally:
        torch.set_num_threads(most)


@dataclass(frozen=True)
class Calibration:
    """Batches for a recipe, which may read them any number of times; each time one at a time.

    A `module` with state is run along: each batch ends with the state that the ones before it left.
    """

    source: sources.Data
    inputs: tuple[TensorSpec, ...]
    module: torch.nn.Module | None = None
    state: tuple[torch.Tensor, ...] = ()

    def __iter__(self) -> Iterator[tuple[torch.Tensor, ...]]:
        import torch

        most = -(-sources.CALIBRATION_SAMPLES // batch_of(self.inputs))
        state = self.state
        for arrays, _, _ in islice(sources.batches(self.source.calibration, self.inputs), most):
            yield (*as_tensors(arrays), *state)
            if self.module is not None:
                with torch.no_grad():
                    state = self.module(*as_tensors(arrays), *state)[-len(state) :]


def calibration_of(original: Model, source: sources.Data) -> Calibration:
    """Returns the batches of `source` that `original` is calibrated on."""
    if not original.state:
        return Calibration(source, original.inputs)
    return Calibration(source, original.inputs, original.module, original.example[-len(original.state) :])


def qparams(original: Model, program: ExportedProgram | None) -> dict[str, Any]:
    """Returns scale and zero point of each quantized input and output, by name."""
    if program is None:
        return {}
    from edgekit.quant.ptq.recipes import io_qparams

    return io_qparams(program, [s.name for s in original.all_inputs], [s.name for s in original.all_outputs])


def output_scales(qparams: Mapping[str, Any], outputs: Sequence[TensorSpec]) -> list[float]:
    """Returns the scale of each output from what `qparams` returned, 0 where an output is not quantized."""
    found = qparams.get("outputs", {})
    return [found[spec.name]["scale"] if spec.name in found else 0.0 for spec in outputs]
