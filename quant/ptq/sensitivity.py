"""What each layer costs: a calibrated network run with some of its layers quantized and the others in float.

The measure is the signal to quantization noise ratio at the network's outputs when one layer alone (its inputs,
weight and output) is quantized: the per-layer analysis of "A Practical Guide to Quantization" (Nagel et al., "A White
Paper on Neural Network Quantization", 2021, §4.3).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from edgekit.quant.graph.passes import attribute, is_attribute, is_zero_pad, q
from edgekit.quant.ptq.quantizer import MOVES, fused_activation

SAMPLES = 16  # calibration samples that sensitivity is measured on
LOST_DB = -100.0  # where nothing of the outputs is left, NaN and silence included
WRAPPER = "inner"  # the attribute under which LOAD's wrapper holds the user's module

Values = dict[str, Any]  # node name → what it computed


@dataclass(frozen=True)
class Layer:
    """One unit that is quantized on its own: an op and the activation that runtimes fuse into it.

    `node` is its node in the canonical graph, `path` the module as the user's code names it (of an op that is no
    module: the one that holds it). `sqnr_db` is that of the worst output when this layer alone is quantized (inf where
    that changes nothing), `weight_share` the part of all weights that it holds.
    """

    node: str
    path: str
    op: str
    sqnr_db: float
    weight_share: float

    @property
    def label(self) -> str:
        """How messages call it: features.3.conv (conv2d + relu)."""
        return f"{self.path} ({self.op})" if self.path else self.op

    def to_dict(self) -> dict[str, Any]:
        """Returns JSON-ready values; an infinite SQNR is null."""
        return {**asdict(self), "sqnr_db": self.sqnr_db if math.isfinite(self.sqnr_db) else None}


class Simulation:
    """A calibrated network with any of its layers quantized, computing what the converted network would.

    `original` is the canonical float graph; `prepared` the same graph with rounded weights and with observers that
    have seen the calibration data. Batches are of the size that the graph was captured with.
    """

    def __init__(self, original: GraphModule, prepared: GraphModule) -> None:
        self.original, self.prepared = original, prepared
        self.nodes = [n for n in original.graph.nodes if n.op in ("placeholder", "get_attr", "call_function")]
        self.result = original.graph.output_node().args[0]
        known = {node.name for node in self.nodes}
        self.units = {n.name: n for n in prepared.graph.nodes if n.name in known and is_unit(n)}
        self._fakes: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {}
        self._constants: dict[Node, torch.Tensor] = {}

    def values(self, batch: tuple[torch.Tensor, ...]) -> Values:
        """Runs the float network; returns what every node computed."""
        return self._execute(batch, frozenset(), None)

    def outputs(
        self, batch: tuple[torch.Tensor, ...], quantized: frozenset[str], floats: Values | None = None
    ) -> list[torch.Tensor]:
        """Returns the network's outputs with the units named in `quantized` quantized.

        With `floats`, the float network's values on the same batch, only what depends on those units is computed.
        """
        values = self._execute(batch, quantized, floats)
        return torch.utils._pytree.tree_leaves(map_arg(self.result, lambda node: _find(values, floats, node.name)))

    def _execute(self, batch: tuple[torch.Tensor, ...], quantized: frozenset[str], floats: Values | None) -> Values:
        """With `floats`, the values that differ from those alone."""
        values: Values = {}
        inputs = iter(batch)
        ends = {self._end(self.units[name]): self.units[name] for name in quantized}
        with torch.inference_mode():
            for node in self.nodes:
                name = node.name
                if node.op == "call_function":
                    unit = self.units[name] if name in quantized else None
                    if floats is not None and unit is None and not any(n.name in values for n in node.all_input_nodes):
                        continue
                    read = self._reader(values, floats)
                    source = node if unit is None else unit
                    result = node.target(*map_arg(source.args, read), **map_arg(source.kwargs, read))
                    if name in ends:
                        result = self._requantized(ends[name], result)
                    values[name] = result
                elif floats is None:
                    values[name] = next(inputs) if node.op == "placeholder" else attribute(self.original, node)
        return values

    def _reader(self, values: Values, floats: Values | None) -> Callable[[Node], Any]:
        def read(node: Node) -> Any:
            if node.op == "call_module":  # an observer of the prepared graph
                source = node.args[0]
                while source.op == "call_module":
                    source = source.args[0]
                if not is_attribute(source):
                    return self._fake(node)(_find(values, floats, source.name))
                if node not in self._constants:
                    self._constants[node] = self._fake(node)(attribute(self.prepared, source))
                return self._constants[node]
            if is_attribute(node):
                return attribute(self.prepared if node.graph is self.prepared.graph else self.original, node)
            return _find(values, floats, node.name)

        return read

    def _end(self, unit: Node) -> str:
        """The name of the node whose output is the unit's: its fused activation, or itself."""
        activation = _activation(unit)
        return unit.name if activation is None else activation.name

    def _requantized(self, unit: Node, result: torch.Tensor) -> torch.Tensor:
        end = _activation(unit) or unit
        observers = [user for user in end.users if user.op == "call_module"]
        annotation = end.meta.get("quantization_annotation")
        if not observers or annotation is None or annotation.output_qspec is None:
            return result
        return self._fake(observers[0])(result)

    def _fake(self, observer: Node) -> Callable[[torch.Tensor], torch.Tensor]:
        target = str(observer.target)
        if target not in self._fakes:
            self._fakes[target] = fake_quantizer(self.prepared.get_submodule(target))
        return self._fakes[target]


def _find(values: Values, floats: Values | None, name: str) -> Any:
    return values[name] if name in values or floats is None else floats[name]


def fake_quantizer(observer: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """Returns quantizing and dequantizing by the parameters of `observer`, which has seen its data."""
    low, high = observer.quant_min, observer.quant_max
    if observer.is_dynamic:
        return lambda x: _as_it_comes(x, low, high, observer.eps)
    scale, zero_point = observer.calculate_qparams()
    if scale.numel() > 1:
        axis, zeros = observer.ch_axis, zero_point.to(torch.int32)
        return lambda x: torch.fake_quantize_per_channel_affine(x, scale, zeros, axis, low, high)
    step, zero = float(scale), int(zero_point)
    inverse = 1.0 / step
    # The steps of torch's own kernel, which at the size of activations takes four times as long.
    return lambda x: torch.mul(x, inverse).round_().clamp_(low - zero, high - zero).mul_(step)


def _as_it_comes(x: torch.Tensor, low: int, high: int, eps: float) -> torch.Tensor:
    scale, zero_point = q.choose_qparams.tensor(x, low, high, eps, torch.int8)
    return torch.fake_quantize_per_tensor_affine(x, scale.float(), zero_point.to(torch.int32), low, high)


def is_unit(node: Node) -> bool:
    """Whether a node of a prepared graph starts a unit that is quantized: it computes, and its inputs are quantized."""
    annotation = node.meta.get("quantization_annotation")
    computes = node.op == "call_function" and node.target not in MOVES and not is_zero_pad(node)
    return computes and annotation is not None and bool(annotation.input_qspec_map)


def sensitivity(
    simulation: Simulation, batches: Iterable[tuple[torch.Tensor, ...]], advance: Callable[[], None] = lambda: None
) -> tuple[Layer, ...]:
    """Measures every layer of a calibrated network, the most sensitive one first.

    Runs `batches`, which should hold about SAMPLES samples in all, and calls `advance` after each.
    """
    noise: dict[str, list[float]] = {}
    signal: list[float] = []
    for batch in batches:
        floats = simulation.values(batch)
        reference = simulation.outputs(batch, frozenset(), floats)
        signal = _added(signal, [_power(r) for r in reference])
        for name in simulation.units:
            got = simulation.outputs(batch, frozenset([name]), floats)
            noise[name] = _added(noise.get(name, []), [_power(g, r) for g, r in zip(got, reference, strict=True)])
        advance()
    shares = weight_shares(simulation.original, simulation.units)
    layers = [
        Layer(name, module_path(unit), op_name(unit), _worst(signal, noise[name]), shares[name])
        for name, unit in simulation.units.items()
        if name in noise
    ]
    return tuple(sorted(layers, key=lambda layer: layer.sqnr_db))


def _power(value: torch.Tensor, reference: torch.Tensor | None = None) -> float:
    if not value.is_floating_point():  # an index or a mask: its distance is a count
        value = value.double()
        reference = None if reference is None else reference.double()
    difference = value if reference is None else value - reference
    return float(difference.double().square().sum())


def _added(total: list[float], more: list[float]) -> list[float]:
    return [a + b for a, b in zip(total, more, strict=True)] if total else more


def _worst(signal: list[float], noise: list[float]) -> float:
    return min(_decibel(s, n) for s, n in zip(signal, noise, strict=True))


def _decibel(signal: float, noise: float) -> float:
    if not noise:
        return math.inf
    ratio = signal / noise
    return max(10 * math.log10(ratio), LOST_DB) if ratio > 0 else LOST_DB  # NaN is above nothing


def weight_shares(model: GraphModule, units: Mapping[str, Node]) -> dict[str, float]:
    """Returns the share of all parameters and buffers that `model` reads which lies in the weight of each unit."""
    read = {node.target: attribute(model, node).numel() for node in model.graph.nodes if is_attribute(node)}
    total = sum(read.values()) or 1
    nodes = {node.name: node for node in model.graph.nodes}
    return {
        name: sum(read[source.target] for source in nodes[name].all_input_nodes if is_attribute(source)) / total
        for name in units
    }


def module_path(node: Node) -> str:
    """Returns the path of the module that a node comes from, as in the user's own model; empty for the model itself."""
    stack = [entry[0] for entry in (node.meta.get("nn_module_stack") or {}).values()]
    path = stack[-1] if stack else ""
    path = path.removeprefix("L['self'].").removeprefix("L['self']")
    return path.removeprefix(WRAPPER).removeprefix(".") if WRAPPER in stack[1:2] else path


def op_name(unit: Node) -> str:
    """Returns the unit's op and the activation fused into it: conv2d + relu."""
    nodes = [unit, _activation(unit)]
    return " + ".join(str(n.target).split(".")[1] for n in nodes if n is not None)


def _activation(unit: Node) -> Node | None:
    """The activation fused into a unit of a prepared graph, where nothing comes between the two."""
    activation = fused_activation(unit)
    return activation if activation is not None and "quantization_annotation" in activation.meta else None
