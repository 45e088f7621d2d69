"""Discrepancies: why a file does not compute what the model computes, where that lies, and what to do about it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from edgekit.errors import EdgeKitError, NotFaithful
from edgekit.measuring import running
from edgekit.metrics import parity

if TYPE_CHECKING:
    from torch.export import ExportedProgram

    from edgekit.artifacts.artifact import Artifact
    from edgekit.loading.model import Model
    from edgekit.metrics.parity import Parity

LARGEST_HALF = float(np.finfo(np.float16).max)
SMALLEST = float(np.finfo(np.float32).tiny)  # smaller numbers are denormal
STATE_HELP = "hold what changes from call to call in a buffer: self.register_buffer(name, tensor), and assign to that"


class _Watch(TorchDispatchMode):
    """Keeps what of a run's numbers runtimes take for others."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0.0
        self.denormal = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, torch.Tensor) and value.is_floating_point() and value.numel():
                sizes = value.abs()
                sizes = sizes[torch.isfinite(sizes)]
                most = float(sizes.max()) if sizes.numel() else 0.0
                self.largest = max(self.largest, most)
                self.denormal |= 0 < most < SMALLEST
        return result


def check(
    original: Model,
    program: ExportedProgram | None,
    feeds: Sequence[np.ndarray],
    reference: Sequence[Any],
    graph: Sequence[Parity],
    recipe: str,
) -> None:
    """Raises EdgeKitError where no file of any format can be faithful, because of what the model itself does.

    `reference` are its outputs on `feeds`, `graph` how near those of `program`, which was captured, come.
    """
    again = running.run_module(original.module, feeds, state=original.state)
    moved = parity.worst(parity.parities(*running.aligned(reference, again, original)))
    if moved.max_rel > parity.FP32_MAX_REL:
        raise EdgeKitError(
            "the model gives other outputs when it is called again with the same inputs: forward keeps something in "
            "an attribute, or reads what changes by itself",
            STATE_HELP,
        )
    if program is None:
        return
    for node in program.graph.nodes:
        name = str(node.target)
        if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()) and "attention" not in name:
            raise EdgeKitError(
                f"the model seeds its own random numbers ({name.rpartition('.')[0]}), and a file draws others",
                "draw them once, and hold them in a buffer: self.register_buffer(name, tensor)",
            )
    if recipe == "fp32" and parity.worst(graph).max_rel > parity.FP32_MAX_REL:
        raise EdgeKitError(
            "the captured graph computes something else than the model: forward decides by what a graph does not hold, "
            "such as a try that catches errors, the time, or whether gradients are on",
            "let forward decide by shapes and settings alone",
        )


def refusal(
    original: Model, feeds: Sequence[np.ndarray], artifact: Artifact, why: str, finite: bool, others: Sequence[str]
) -> NotFaithful:
    """Returns the error of a file that is not faithful for the reason `why`.

    `finite` says that its outputs are; `others` are the formats that are exported beside it.
    """
    cause, help_ = _cause(original, feeds, artifact.precision, finite)
    if not cause:
        cause = "nothing in the model explains it: an exporter or a runtime is at fault"
        help_ = f"leave it out with --format {','.join(others)}" if others else "give another --precision"
        help_ += "; a part of the model that shows the same is what EdgeKit's developers need to mend it"
    what = f"{artifact.path.name} is not faithful to the model: it {why}; {cause}"
    return NotFaithful(what, f"nothing was written; {help_}")


def _cause(original: Model, feeds: Sequence[np.ndarray], precision: str, finite: bool) -> tuple[str, str]:
    """What in the model a file of this precision computes otherwise, and what helps; nothing where none is known."""
    if original.onnx is not None:
        return "", ""
    watch = _Watch()
    state = [part.value for part in original.state]
    given = [torch.from_numpy(np.array(array)) for array in (*(feed[0] for feed in feeds), *state)]
    with torch.no_grad(), watch:
        original.module(*given)
    if precision == "fp16" and watch.largest > LARGEST_HALF:
        what = f"half precision ends at {LARGEST_HALF:.0f}, and numbers inside the model reach {watch.largest:.1e}"
        return what, "give --precision fp32 or int8, or normalize before what becomes so large"
    if watch.denormal:
        what = f"numbers inside the model are below {SMALLEST:.1e}, which runtimes take for 0"
        return what, "scale them up, or add 1e-6 to what is divided by"
    if precision == "fp16" and finite:
        return "half precision has 11 bits, and this model needs more", "give --precision fp32, or int8 with --data"
    return "", ""
