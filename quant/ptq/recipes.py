"""Recipes: what each `--precision` does to a model before it is exported."""

from __future__ import annotations

import copy
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.ao.quantization.fx.utils as fx_utils
import torch.utils._pytree as pytree
import torchao.utils as torchao_utils
from torch.export import ExportedProgram
from torch.fx import GraphModule
from torch.fx.node import map_aggregate
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

from edgekit.errors import EdgeKitError
from edgekit.quant.graph.fx import drop_unread
from edgekit.quant.graph.passes import capture, drop_implied_clips, export
from edgekit.quant.ptq.batches import Batches, processes_help
from edgekit.quant.ptq.cross_layer_equalization import equalize
from edgekit.quant.ptq.dynamic import RECURRENT, StaticQuantizer, WeightQuantizer, counted
from edgekit.quant.ptq.float_heads import head_notes, uneven_heads
from edgekit.quant.ptq.gptq_rounding import round_weights
from edgekit.quant.ptq.observers import MSEObserver
from edgekit.quant.ptq.smoothquant import smooth
from edgekit.util.forking import deal

q = torch.ops.quantized_decomposed

Batch = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Compressed:
    """What a recipe made of a model, and what its user should know about it."""

    program: ExportedProgram
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Recipe:
    """One precision: whether it needs calibration data, how files store its weights, and what it does.

    `apply` takes the module, example inputs, calibration batches, and the names of nodes of the canonical graph
    (see `passes.capture`) that stay in float.
    """

    name: str
    summary: str
    needs_data: bool
    half_weights: bool
    apply: Callable[[torch.nn.Module, Batch, Iterable[Batch], frozenset[str]], Compressed]


def float32(
    module: torch.nn.Module, example: Batch, batches: Iterable[Batch] = (), keep_float: frozenset[str] = frozenset()
) -> Compressed:
    """Captures `module` unchanged but for graph canonicalization."""
    return Compressed(export(capture(module, example), example))


def int8_static(
    module: torch.nn.Module, example: Batch, batches: Iterable[Batch], keep_float: frozenset[str] = frozenset()
) -> Compressed:
    """Quantizes weights and activations to int8 by torchao's PT2E flow.

    Reads `batches` twice, one at a time: to round the weights, then to find the ranges of the activations (before
    that some of them once more where the network ends in a concat). Raises EdgeKitError where there are none.
    """
    return convert(calibrate(module, example, batches, keep_float))


@dataclass(frozen=True)
class Calibrated:
    """A network before it is converted to int8: what there is to know of every layer, and nothing fixed yet.

    `original` is the canonical float graph, `prepared` the same with rounded weights and with observers that have seen
    the calibration data; both name their nodes alike.
    """

    original: GraphModule
    prepared: GraphModule
    example: Batch
    notes: tuple[str, ...]


def calibrate(
    module: torch.nn.Module, example: Batch, batches: Iterable[Batch], keep_float: frozenset[str] = frozenset()
) -> Calibrated:
    """Rounds the weights of `module` and finds the ranges of its activations; see `int8_static`."""
    graph, original, keep_float, notes = evened(module, example, batches, keep_float)
    quantizer = StaticQuantizer(round_weights(graph, batches, keep_float), keep_float)
    prepared = prepare_pt2e(graph, quantizer)
    observe(prepared, batches)
    if quantizer.recurrent:
        notes = (*notes, f"int8 computes {counted(quantizer.recurrent)} in float, from int8 weights")
    return Calibrated(original, prepared, example, notes)


def evened(
    module: torch.nn.Module, example: Batch, batches: Iterable[Batch], keep_float: frozenset[str]
) -> tuple[GraphModule, GraphModule, frozenset[str], tuple[str, ...]]:
    """Captures `module` and evens out its channels, which changes nothing in float.

    Returns the graph, a copy of it on the same weights, the names of the nodes that stay in float, and notes.
    """
    if iter(batches) is batches:
        raise TypeError("batches are read twice: pass a list or another iterable that starts anew, not an iterator")
    graph = capture(module, example)
    notes = (*smooth(graph, batches, keep_float), *equalize(graph, batches, keep_float))
    original = GraphModule(graph, copy.deepcopy(graph.graph))  # on the same weights: rounding adds others
    heads = uneven_heads(graph, batches)
    return graph, original, keep_float | heads.keys(), (*notes, *head_notes(original, heads))


def observe(prepared: GraphModule, batches: Iterable[Batch]) -> None:
    """Shows `batches` to the observers of a network; raises EdgeKitError where there are none."""
    observers = {name: module for name, module in prepared.named_modules() if isinstance(module, MSEObserver)}
    this = os.getpid()
    count = 0

    def show(batch: Batch) -> None:
        nonlocal count
        count += 1
        prepared(*batch)

    def seen() -> dict[str, MSEObserver]:
        """What a copy of this process has shown its own observers."""
        return {} if os.getpid() == this else observers

    with torch.inference_mode():
        for name, other in deal(Batches(batches), show, show, seen, processes_help()).items():
            observers[name].merge(other)
    if not count:
        raise EdgeKitError("int8 needs data to calibrate with, and there is none", "give some with --data")


def convert(calibrated: Calibrated) -> Compressed:
    """Converts a calibrated network to int8; `calibrated.prepared` is used up."""
    converted = drop_implied_clips(_converted(calibrated.prepared))
    return Compressed(export(converted, calibrated.example), calibrated.notes)


def _converted(prepared: GraphModule) -> GraphModule:
    """Returns what torchao makes of an observed network, which is used up, without the float weights."""
    converted = convert_pt2e(prepared)
    drop_unread(converted)
    for kept in (torchao_utils._assert_and_get_unique_device, fx_utils.assert_and_get_unique_device):
        kept.cache_clear()  # the networks that were asked for, as long as this process lives
    return converted


def int8_dynamic(
    module: torch.nn.Module, example: Batch, batches: Iterable[Batch] = (), keep_float: frozenset[str] = frozenset()
) -> Compressed:
    """Quantizes the weights of linear, recurrent and embedding layers, and the inputs of linear ones as the file runs.

    Convolutions stay in float; where the others hold hardly any weights, those of convolutions are stored as int8 too.
    Raises EdgeKitError where no layer can be quantized.
    """
    graph = capture(module, example)
    quantizer = WeightQuantizer(dynamic=True, keep_float=keep_float)
    prepared = prepare_pt2e(graph, quantizer)
    if not quantizer.quantized:
        raise EdgeKitError(
            "int8-dynamic quantizes linear, recurrent and embedding layers, and this model has none",
            "use --precision fp16, or int8 with --data",
        )
    notes = []
    if quantizer.convolutions:
        stored = Counter({name: count for name, count in quantizer.quantized.items() if "convolution" in name})
        notes.append(
            "int8-dynamic is for linear and recurrent layers, which hold "
            f"{100 * quantizer.other_share:.0f} % of this model's weights: the weights of {counted(stored)} are stored "
            "as int8, for size alone; --precision int8, which needs --data, computes convolutions in int8"
        )
    if quantizer.left_float:
        notes.append(
            f"int8-dynamic leaves {counted(quantizer.left_float)} in float: with inputs quantized as they come, "
            "convolutions lose their accuracy; --precision int8 quantizes them"
        )
    recurrent = Counter({name: count for name, count in quantizer.quantized.items() if name in RECURRENT.values()})
    if recurrent:
        notes.append(f"int8-dynamic computes {counted(recurrent)} in float, from int8 weights")
    return Compressed(export(_converted(prepared), example), tuple(notes))


def int8_weight_only(
    module: torch.nn.Module, example: Batch, batches: Iterable[Batch] = (), keep_float: frozenset[str] = frozenset()
) -> Compressed:
    """Stores the weights of layers as int8; all arithmetic stays in float.

    Raises EdgeKitError where there are none.
    """
    graph = capture(module, example)
    quantizer = WeightQuantizer(dynamic=False, keep_float=keep_float)
    prepared = prepare_pt2e(graph, quantizer)
    if not quantizer.quantized:
        raise EdgeKitError(
            "int8-weight-only stores the weights of layers as int8, and this model has none", "use --precision fp16"
        )
    notes = ("int8-weight-only makes files smaller, not faster: the arithmetic is that of fp32",)
    return Compressed(export(_converted(prepared), example), notes)


def half_compute(module: torch.nn.Module, example: Batch) -> ExportedProgram:
    """Captures `module` computing in float16 between float32 inputs and outputs: what ExecuTorch's fp16 is."""
    halved = copy.deepcopy(capture(module, example)).half()
    for node in halved.graph.nodes:  # tensors that the graph makes, such as an LSTM's first state, and casts
        node.args, node.kwargs = map_aggregate((node.args, node.kwargs), _halved)
        makes = node.op == "call_function" and not node.all_input_nodes
        if makes and isinstance(made := node.meta["val"], torch.Tensor) and made.dtype == torch.float32:
            node.kwargs = {**node.kwargs, "dtype": torch.float16}
    halved.recompile()
    return export(capture(HalfCompute(halved), example), example)


def _halved(argument: Any) -> Any:
    return torch.float16 if argument is torch.float32 else argument


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
        Recipe(
            "int8-dynamic",
            "int8 weights; the inputs of linear layers are quantized as the file runs",
            needs_data=False,
            half_weights=False,
            apply=int8_dynamic,
        ),
        Recipe(
            "int8-weight-only",
            "int8 weights, float arithmetic",
            needs_data=False,
            half_weights=False,
            apply=int8_weight_only,
        ),
    )
}
