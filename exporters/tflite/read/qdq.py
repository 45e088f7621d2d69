"""Read Quantize/Dequantize pairs as facts about values: which float values are held as int8, and with what."""

from __future__ import annotations

import numpy as np

from edgekit.exporters.tflite.ir import Graph, Info, Node, QParams
from edgekit.exporters.tflite.read.normalize import linear_params
from edgekit.exporters.tflite.registry import unsupported

# Ops that only move or select values, so that Quantize(op(x)) = op(Quantize(x)) exactly, and the inputs that are data.
COMMUTES: dict[str, tuple[int, ...] | None] = {
    "Relu": (0,),
    "Clip": (0,),
    "MaxPool": (0,),
    "GlobalMaxPool": (0,),
    "ReduceMax": (0,),
    "ReduceMin": (0,),
    "Max": None,
    "Min": None,
    "Reshape": (0,),
    "Flatten": (0,),
    "Squeeze": (0,),
    "Unsqueeze": (0,),
    "Transpose": (0,),
    "Identity": (0,),
    "Concat": None,
    "Split": (0,),
    "Slice": (0,),
    "Gather": (0,),
    "Expand": (0,),
    "Tile": (0,),
    "Pad": (0,),
    "DepthToSpace": (0,),
    "SpaceToDepth": (0,),
    "Where": (1, 2),
}


# Those that do the same to int8 numbers, whatever real ones they stand for.
MOVES_CODES = {
    op: data
    for op, data in COMMUTES.items()
    if op not in ("Relu", "Clip", "Pad", "Where", "Max", "Min", "ReduceMax", "ReduceMin")
}


def read_quantization(graph: Graph) -> None:
    """Turn QuantizeLinear → DequantizeLinear into `Quantize` nodes (float → float held as int8) and `held` entries.

    A Quantize disappears where its input can be made as int8 with its parameters in the first place: where every
    reader of the input asks for the same ones, directly or through ops that move values unchanged.
    """
    _read_dynamic(graph)
    _pair_up(graph)
    _merge(graph)
    _hoist(graph)


def _read_dynamic(graph: Graph) -> None:
    """Turn DynamicQuantizeLinear → DequantizeLinear into a mark on the layers that read it."""
    readers = graph.readers()
    sources: dict[str, str] = {}
    nodes: list[Node] = []
    for node in graph.nodes:
        if node.op == "DynamicQuantizeLinear":
            for pair in readers.get(node.outputs[0], []):
                sources[pair.outputs[0]] = node.inputs[0]
        elif node.op != "DequantizeLinear" or node.outputs[0] not in sources:
            node.dynamic = bool(node.inputs) and node.inputs[0] in sources
            node.inputs = [sources.get(name, name) for name in node.inputs]
            nodes.append(node)
    graph.nodes = nodes


def _pair_up(graph: Graph) -> None:
    """Replace each QuantizeLinear and the DequantizeLinear that read it by Quantize; int8 inputs become held values."""
    stored: dict[str, tuple[str, QParams]] = {}  # name of an int8 tensor → its float value and parameters
    renamed: dict[str, str] = {}
    nodes: list[Node] = []
    readers = graph.readers()
    for node in graph.nodes:
        node.inputs = [renamed.get(name, name) for name in node.inputs]
        if node.op == "QuantizeLinear":
            params = _params(graph, node)
            if not params.per_tensor:
                raise unsupported(node, "activations are quantized per channel, and TFLite has only per-tensor ones")
            value = f"{node.outputs[0]}:float"
            graph.info[value] = graph.info[node.inputs[0]]
            graph.held[value] = params
            stored[node.outputs[0]] = value, params
            graph.stored[node.outputs[0]] = value
            nodes.append(Node("Quantize", node.name, [node.inputs[0]], [value], qparams=params))
            if node.outputs[0] in graph.outputs:
                nodes.append(Node("StoredOutput", node.name, [value], [node.outputs[0]]))
        elif node.op == "DequantizeLinear":
            params = _params(graph, node)
            source, output = node.inputs[0], node.outputs[0]
            if source in graph.inputs and source not in stored:
                if graph.info[source].dtype not in (np.int8, np.uint8):
                    raise unsupported(node, f"the input '{source}' is {graph.info[source].dtype}; 8 bits are handled")
                if not params.per_tensor:
                    raise unsupported(node, f"the input '{source}' has a scale per channel, and TFLite takes one")
                if any(reader.op != "DequantizeLinear" for reader in readers[source]):
                    raise unsupported(node, f"the input '{source}' is also read as integers, and not dequantized")
                # The real value has a name of its own: under the input's, readers would take it for integers.
                value = f"{source}:float"
                graph.info[value] = Info(graph.info[source].shape, np.dtype(np.float32))
                graph.held[source] = graph.held[value] = params
                stored[source] = value, params
                nodes.append(Node("Identity", node.name, [source], [value]))
            if source not in stored or stored[source][1] != params:
                raise unsupported(node, "it reads a tensor that no QuantizeLinear with the same parameters made")
            if output in graph.outputs:
                nodes.append(Node("Identity", node.name, [stored[source][0]], [output]))
            else:
                renamed[output] = stored[source][0]
        else:
            nodes.append(node)
            if node.op in MOVES_CODES and node.inputs[0] in stored:
                nodes += _move_real(graph, node, stored)
    graph.nodes = nodes
    for node in nodes:
        if node.op != "Identity" and any(name in stored for name in node.inputs):
            raise unsupported(node, "it computes on the integers of a quantized tensor")


def _move_real(graph: Graph, node: Node, stored: dict[str, tuple[str, QParams]]) -> list[Node]:
    """Let a node that moves int8 numbers move the real ones that they stand for; returns what makes graph outputs."""
    copies = []
    data = MOVES_CODES[node.op]
    codes = node.inputs if data is None else [node.inputs[index] for index in data]
    params = {stored[name][1] for name in codes if name in stored}
    if len(params) != 1 or not all(name in stored for name in codes):
        raise unsupported(node, "it joins int8 tensors with different parameters")
    node.inputs = [stored[name][0] if name in codes else name for name in node.inputs]
    for place, name in enumerate(node.outputs):
        if name:
            value = f"{name}:float"
            graph.info[value] = Info(graph.info[name].shape, np.dtype(np.float32))
            graph.held[value] = next(iter(params))
            graph.stored[name] = node.outputs[place] = value
            stored[name] = value, graph.held[value]
            if name in graph.outputs:
                copies.append(Node("StoredOutput", node.name, [value], [name]))
    return copies


def _params(graph: Graph, node: Node) -> QParams:
    unknown = set(node.attrs) - {"axis", "saturate", "output_dtype"}
    if {name for name in unknown if node.attrs[name]}:
        raise unsupported(node, f"attribute {sorted(unknown)[0]}")
    stored = graph.info[node.outputs[0] if node.op == "QuantizeLinear" else node.inputs[0]].dtype
    if stored not in (np.int8, np.uint8):
        raise unsupported(node, f"it quantizes to {stored}; int8 and uint8 are handled")
    params = linear_params(graph, node.inputs, node.attrs, graph.info[node.inputs[0]].shape, stored)
    if params is None:
        raise unsupported(node, "its scale or zero point is not constant")
    return params


def _merge(graph: Graph) -> None:
    """Let equal Quantize nodes of one value be one node; fold Quantize of a constant."""
    first: dict[tuple[str, QParams], str] = {}
    renamed: dict[str, str] = {}
    nodes: list[Node] = []
    for node in graph.nodes:
        node.inputs = [renamed.get(name, name) for name in node.inputs]
        if node.op == "Quantize" and node.qparams is not None:
            source, output = node.inputs[0], node.outputs[0]
            known = first.setdefault((source, node.qparams), output)
            if known != output:
                renamed[output] = known
                continue
            array = graph.array(source)
            if array is not None:
                graph.constants[output] = node.qparams.quantize(array)
                continue
        nodes.append(node)
    graph.nodes = nodes
    graph.stored = {name: renamed.get(value, value) for name, value in graph.stored.items()}


def _hoist(graph: Graph) -> None:
    """Walk backwards and hold a value at the parameters that all its readers ask for."""
    readers = graph.readers()
    for node in reversed(graph.nodes):
        for output in filter(None, node.outputs):
            wanted = _wanted(graph, output, readers.get(output, []))
            if wanted is not None and output not in graph.held:
                graph.held[output] = wanted
    renamed: dict[str, str] = {}
    nodes: list[Node] = []
    for node in graph.nodes:
        node.inputs = [renamed.get(name, name) for name in node.inputs]
        if node.op == "Quantize" and graph.held.get(node.inputs[0]) == node.qparams:
            renamed[node.outputs[0]] = node.inputs[0]
        else:
            nodes.append(node)
    graph.nodes = nodes
    graph.stored = {name: renamed.get(value, value) for name, value in graph.stored.items()}


def _wanted(graph: Graph, name: str, readers: list[Node]) -> QParams | None:
    if name in graph.outputs or graph.info[name].dtype != np.float32:
        return None
    wanted: set[QParams | None] = set()
    for reader in readers:
        if reader.op == "Quantize":
            wanted.add(reader.qparams)
        elif reader.op in COMMUTES and _is_data(reader, name):
            wanted.update(graph.held.get(output) for output in reader.outputs if output)
        else:
            wanted.add(None)
    return wanted.pop() if len(wanted) == 1 else None


def _is_data(reader: Node, name: str) -> bool:
    data = COMMUTES[reader.op]
    return all(data is None or index in data for index, value in enumerate(reader.inputs) if value == name)
