"""Recipes: what each `--precision` does to a model before it is exported."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.utils._pytree as pytree
from torch.export import ExportedProgram
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

from edgekit.errors import EdgeKitError
from edgekit.quant.passes import capture, drop_implied_clips
from edgekit.quant.quantizer import EdgeQuantizer
from edgekit.quant.rounding import round_weights

q = torch.ops.quantized_decomposed

Batch = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Recipe:
    """One precision: whether it needs calibration data, how files store its weights, and what it does."""

    name: str
    summary: str
    needs_data: bool
    half_weights: bool
    apply: Callable[[torch.nn.Module, Batch, Iterable[Batch]], ExportedProgram]


def float32(module: torch.nn.Module, example: Batch, batches: Iterable[Batch]) -> ExportedProgram:
    """Captures `module` unchanged but for graph canonicalization."""
    return torch.export.export(capture(module, example), example, strict=False)


def int8_static(module: torch.nn.Module, example: Batch, batches: Iterable[Batch]) -> ExportedProgram:
    """Quantizes weights and activations to int8 by torchao's PT2E flow.

    Reads `batches` twice, one at a time: to round the weights, then to find the ranges of the activations. Raises
    EdgeKitError where there are none.
    """
    if iter(batches) is batches:
        raise TypeError("batches are read twice: pass a list or another iterable that starts anew, not an iterator")
    graph = capture(module, example)
    prepared = prepare_pt2e(graph, EdgeQuantizer(round_weights(graph, batches)))
    count = 0
    with torch.inference_mode():
        for batch in batches:
            prepared(*batch)
            count += 1
    if not count:
        raise EdgeKitError("int8 needs data to calibrate with, and there is none", "give some with --data")
    converted = drop_implied_clips(convert_pt2e(prepared))
    return torch.export.export(converted, example, strict=False)


def half_compute(module: torch.nn.Module, example: Batch) -> ExportedProgram:
    """Captures `module` computing in float16 between float32 inputs and outputs: what ExecuTorch's fp16 is."""
    halved = copy.deepcopy(capture(module, example)).half()
    return torch.export.export(capture(HalfCompute(halved), example), example, strict=False)


class HalfCompute(torch.nn.Module):
    """Casts floating-point inputs to float16 and outputs back to float32 around a half-precision module."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *inputs: torch.Tensor) -> object:
        """Takes and returns float32 tensors, as the module it wraps would."""
        results = self.module(*(i.half() if i.is_floating_point() else i for i in inputs))
        return pytree.tree_map_only(torch.Tensor, lambda r: r.float() if r.is_floating_point() else r, results)


def io_qparams(
    program: ExportedProgram, inputs: Sequence[str], outputs: Sequence[str]
) -> dict[str, dict[str, dict[str, float | int | str]]]:
    """Returns {"inputs": {name: qparams}, "outputs": …} of the inputs and outputs that are quantized."""
    nodes = list(program.graph.nodes)
    fed = [n for n in nodes if n.op == "placeholder" and n.name in program.graph_signature.user_inputs]
    read = next(n for n in nodes if n.op == "output").args[0]
    found: dict[str, dict[str, dict[str, float | int | str]]] = {"inputs": {}, "outputs": {}}
    for name, node in zip(inputs, fed, strict=True):
        quantizes = [u for u in node.users if u.target == q.quantize_per_tensor.default]
        if quantizes and len(quantizes) == len(node.users):
            found["inputs"][name] = _qparams(quantizes[0])
    for name, node in zip(outputs, read[-len(outputs) :], strict=True):
        if isinstance(node, torch.fx.Node) and node.target == q.dequantize_per_tensor.default:
            found["outputs"][name] = _qparams(node)
    return found


def _qparams(node: torch.fx.Node) -> dict[str, float | int | str]:
    return {"scale": node.args[1], "zero_point": node.args[2], "dtype": "int8"}


RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe("fp32", "as trained", needs_data=False, half_weights=False, apply=float32),
        Recipe("fp16", "weights in half precision", needs_data=False, half_weights=True, apply=float32),
        Recipe(
            "int8",
            "int8 weights by GPTQ, corrected biases, activation ranges of least squared error",
            needs_data=True,
            half_weights=False,
            apply=int8_static,
        ),
    )
}
