"""Read an ONNX model into a Graph: static shapes everywhere, shape arithmetic folded, constants kept as stored."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from operator import gt
from typing import Any

import numpy as np
import onnx
import onnx.inliner
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator

from edgekit.errors import EdgeKitError
from edgekit.exporters.tflite.ir import Graph, Info, Node, QParams, unused
from edgekit.exporters.tflite.read import initializers
from edgekit.exporters.tflite.read.opset_upgrade import is_open, upgraded
from edgekit.exporters.tflite.read.rewrites import OPSET, real_products, rewritten
from edgekit.exporters.tflite.registry import LOWERINGS, no_lowering, unsupported
from edgekit.exporters.tflite.write.flatbuffer import check_size

FOLD_LIMIT = 2**27  # elements: half a gigabyte of float32
DATA_LIMIT = 4096  # elements: a constant larger than this does not describe a shape
# Their value differs from run to run, so that they cannot be computed ahead.
RANDOM = {"RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Bernoulli", "Multinomial"}
SHAPE_ONLY = {"Shape", "Size", "EyeLike"}
RUNTIME_TYPES = {
    onnx.TensorProto.FLOAT: "float",
    onnx.TensorProto.BOOL: "bool",
    onnx.TensorProto.INT32: "int32",
    onnx.TensorProto.INT64: "int64",
}
QUANTIZATION = {"QuantizeLinear", "DequantizeLinear"}
DYNAMIC = "DynamicQuantizeLinear"
CUTS = {"Slice", "Concat"}
MOVES = {"Transpose", "Reshape", "Squeeze", "Unsqueeze", "Flatten"}


def normalize(model: onnx.ModelProto) -> Graph:
    """Read a model: functions inlined, constants folded, every value with a static shape.

    Raises EdgeKitError for an old opset that cannot be upgraded, dynamic shapes, control flow that is not constant, and
    data-dependent shapes.
    """
    size = 0
    for tensor in model.graph.initializer:
        initializers.refuse_external(tensor)  # the checker would look for the file
        size += initializers.size(tensor)
    check_size(size)
    try:
        onnx.checker.check_model(initializers.without_weights(model))
    except onnx.checker.ValidationError as error:
        reason = str(error).strip().splitlines()[0]
        raise EdgeKitError(f"the ONNX model is not valid: {reason}", "export it anew") from error
    model = upgraded(model)
    if model.functions:
        model = onnx.inliner.inline_local_functions(model)
    return _Reader(real_products(model)).read()


def _moved_axis(op: str, axis: int, attrs: dict[str, Any], before: Sequence[int], after: Sequence[int]) -> int | None:
    """Where the axis of a constant's scales lies after a move; None where the move cuts or joins it."""
    if op == "Transpose":
        perm: list[int] = attrs.get("perm", list(range(len(before)))[::-1])
        return perm.index(axis)
    if op in ("Squeeze", "Unsqueeze") and math.prod(before[:axis]) == 1:
        moved = axis + len(after) - len(before)
        return moved if 0 <= moved < len(after) and after[moved] == before[axis] else None
    return None


class _Reader:
    """One walk over the nodes in order: each is folded if its inputs are constant, or given static output shapes."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model = model
        self.imports = list(model.opset_import)
        self.types: dict[str, onnx.TypeProto] = {}
        self.renamed: dict[str, str] = {}
        self.dynamic: set[str] = set()
        self.names: set[str] = set()
        self.graph = Graph([], {}, {}, [], [value.name for value in model.graph.output])

    def read(self) -> Graph:
        graph = self.model.graph
        if graph.sparse_initializer:
            raise EdgeKitError("the ONNX model has sparse initializers, which TFLite export does not read")
        for tensor in graph.initializer:
            self.constant(tensor.name, initializers.array(tensor))
        for value in graph.input:
            if value.name not in self.graph.constants:
                if value.type.tensor_type.elem_type == onnx.TensorProto.DOUBLE:
                    self.graph.wide.add(value.name)
                self.declare(value.name, value.type, f"input '{value.name}' of the ONNX model")
                self.graph.inputs.append(value.name)
        self.dynamic = _dequantized_at_once(graph)
        self.block(graph.node)
        for value in graph.output:
            if value.name not in self.graph.info:
                raise EdgeKitError(f"the ONNX model has no node that makes its output '{value.name}'")
            if self.graph.info[value.name].dtype == np.float64:
                self.constant(value.name, self.narrow(value.name))
            if value.type.tensor_type.elem_type == onnx.TensorProto.DOUBLE:
                self.graph.wide.add(value.name)
        return self.graph

    def block(self, nodes: Any) -> None:
        for number, proto in enumerate(nodes):
            node = onnx.NodeProto()
            node.CopyFrom(proto)
            node.name = self.unique(node.name or f"{node.op_type}_{number}")
            for index, name in enumerate(node.input):
                node.input[index] = self.renamed.get(name, name)
            self.visit(node)

    def unique(self, name: str) -> str:
        """A node's name that no other has: ONNX asks for none, and passes name what they make by it."""
        found = unused(name, self.names)
        self.names.add(found)
        return found

    def visit(self, proto: onnx.NodeProto) -> None:
        if proto.op_type == "If":
            self.branches(proto)
            return
        if proto.op_type in ("Identity", "Dropout") and self.skip(proto):
            return
        if self.held_constant(proto):
            return
        if proto.op_type == "Cast" and attributes(proto)["to"] == onnx.TensorProto.DOUBLE and not self.known(proto):
            proto.attribute[0].i = onnx.TensorProto.FLOAT
            self.graph.narrowed = True
        if self.known(proto) and proto.op_type not in RANDOM and not _has_graphs(proto):
            outputs = self.evaluate(proto)
            if outputs is not None:
                for name, array in zip(filter(None, proto.output), outputs, strict=True):
                    self.constant(name, np.asarray(array))
                self.factored(proto)
                return
        standard = rewritten(proto, attributes(proto), self.count)
        if standard is not None:
            self.within(standard, [onnx.helper.make_opsetid("", OPSET)])
        elif proto.op_type in SHAPE_ONLY:
            self.shape_of(proto)
        elif proto.output[0] in self.dynamic:
            self.infer(proto)
        elif proto.op_type not in LOWERINGS and proto.op_type not in QUANTIZATION and self.expand(proto):
            return
        else:
            self.infer(proto)

    def factored(self, proto: onnx.NodeProto) -> None:
        """Note of which two matrices a constant is the product, with axes of one before it or without."""
        graph, out = self.graph, proto.output[0]
        if proto.op_type == "Unsqueeze" and proto.input[0] in graph.factors:
            graph.factors[out] = graph.factors[proto.input[0]]
        elif proto.op_type == "MatMul" and graph.constants[out].ndim == 2:
            first, second = (graph.constants[name] for name in proto.input)
            if first.ndim == second.ndim == 2 and graph.constants[out].size > first.size + second.size:
                graph.factors[out] = proto.input[0], proto.input[1]

    def known(self, proto: onnx.NodeProto) -> bool:
        """Whether all inputs of a node are constant."""
        return all(not name or name in self.graph.constants for name in proto.input)

    def count(self, name: str) -> int | None:
        """How many numbers a constant has."""
        array = self.graph.constants.get(name)
        return None if array is None else array.size

    def within(self, nodes: list[onnx.NodeProto], imports: list[onnx.OperatorSetIdProto]) -> None:
        """Read nodes that are written in other opsets."""
        outside, self.imports = self.imports, imports
        self.block(nodes)
        self.imports = outside

    def constant(self, name: str, stored: np.ndarray, held: QParams | None = None, dtype: Any = None) -> None:
        self.graph.constants[name] = stored
        dtype = np.dtype(np.float32 if held else dtype or stored.dtype)
        self.graph.info[name] = Info(stored.shape, dtype)
        if held:
            self.graph.held[name] = held
        elem = onnx.helper.np_dtype_to_tensor_dtype(dtype)
        self.types[name] = onnx.helper.make_tensor_type_proto(elem, stored.shape)

    def declare(self, name: str, type_proto: onnx.TypeProto, what: str) -> None:
        if type_proto.WhichOneof("value") != "tensor_type":
            raise EdgeKitError(f"{what} is not a tensor, and TFLite holds only tensors")
        tensor = type_proto.tensor_type
        if not tensor.HasField("shape"):
            raise EdgeKitError(f"{what} has no known shape, and TFLite export needs fixed shapes", _FIXED)
        for dim in tensor.shape.dim:
            if dim.dim_value < -1:
                raise EdgeKitError(f"{what} has a negative size: {dim.dim_value}", "export the model anew")
            if is_open(dim):
                label = f" '{dim.dim_param}'" if dim.dim_param else ""
                raise EdgeKitError(
                    f"{what} has the dynamic dimension{label}, and TFLite export needs fixed shapes", _FIXED
                )
        if tensor.elem_type == onnx.TensorProto.DOUBLE:
            # TFLite computes with float64 nowhere: it is cast where it enters and leaves the graph.
            type_proto = onnx.helper.make_tensor_type_proto(
                onnx.TensorProto.FLOAT, [d.dim_value for d in tensor.shape.dim]
            )
            tensor = type_proto.tensor_type
            self.graph.narrowed = True
        self.types[name] = type_proto
        shape = tuple(dim.dim_value for dim in tensor.shape.dim)
        self.graph.info[name] = Info(shape, np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)))

    def skip(self, proto: onnx.NodeProto) -> bool:
        """Read past an Identity or an inference-time Dropout, unless it makes a graph output."""
        if proto.op_type == "Dropout":
            training = len(proto.input) > 2 and proto.input[2]
            if (len(proto.output) > 1 and proto.output[1]) or (training and self.graph.array(training) is None):
                return False
            if training and bool(self.graph.array(training)):
                raise EdgeKitError(f"ONNX node '{proto.name}' is a Dropout in training mode", "export model.eval()")
        if proto.output[0] in self.graph.outputs:
            del proto.input[1:]
            proto.op_type = "Identity"
            proto.ClearField("attribute")
            return False
        self.renamed[proto.output[0]] = proto.input[0]
        return True

    def held_constant(self, proto: onnx.NodeProto) -> bool:
        """Keep a constant as stored through DequantizeLinear, float16 → float32 Cast and moves of its axes."""
        graph = self.graph
        if not proto.input or not proto.input[0] or any(name and name not in graph.constants for name in proto.input):
            return False
        source, out = proto.input[0], proto.output[0]
        stored, held = graph.constants[source], graph.held.get(source)
        attrs = attributes(proto)
        if proto.op_type == "DequantizeLinear" and not attrs.get("block_size"):
            params = linear_params(graph, [source, *proto.input[1:]], attrs, stored.shape, stored.dtype)
            if stored.dtype == np.uint8:
                stored = (stored.astype(np.int16) - 128).astype(np.int8)
            if stored.dtype not in (np.int8, np.int32):
                return False
            self.constant(out, stored, held=params)
            return True
        if proto.op_type == "Cast" and stored.dtype == np.float16 and attrs["to"] == onnx.TensorProto.FLOAT:
            self.constant(out, stored, dtype=np.float32)
            return True
        joined = proto.input if proto.op_type == "Concat" else [source]
        widened = all(
            graph.constants[name].dtype == np.float16 and graph.info[name].dtype == np.float32 for name in joined
        )
        if (proto.op_type in MOVES and held) or (proto.op_type in MOVES | CUTS and widened):
            opsets = {entry.domain: entry.version for entry in self.imports}
            feeds = {name: graph.constants[name] for name in proto.input if name}
            (moved,) = ReferenceEvaluator(proto, opsets).run(None, feeds)
            if held and held.axis is not None:
                axis = _moved_axis(proto.op_type, held.axis, attrs, stored.shape, moved.shape)
                if axis is None:
                    return False
                held = held.moved(axis)
            self.constant(out, moved, held=held, dtype=np.float32)
            return True
        return False

    def evaluate(self, proto: onnx.NodeProto) -> list[Any] | None:
        """The named outputs of a node whose inputs are constant, or None where nothing here computes it."""
        self.check_size(proto)
        feeds = {name: self.graph.array(name) for name in proto.input if name}
        # ONNX Runtime is what a file is compared with, and the reference computes some ops otherwise (GlobalMaxPool
        # of three axes); the reference has the types that ONNX Runtime lacks, and copies no large constant.
        outputs = None if proto.op_type == "Constant" else _onnxruntime(self.alone(proto), feeds)
        if outputs is None:
            try:
                outputs = list(ReferenceEvaluator(self.alone(proto)).run(None, feeds))
            except Exception:  # not computable here: the node stays in the graph, and its lowering decides
                return None
        if outputs is None or not all(isinstance(array, np.ndarray | np.generic) for array in outputs):
            return None
        return outputs

    def check_size(self, proto: onnx.NodeProto) -> None:
        """Refuse to compute a constant that a few bytes of the file blow up to gigabytes."""
        if proto.domain not in ("", "ai.onnx") or not onnx.defs.has(proto.op_type):
            return
        try:
            types = self.inferred(proto)
        except Exception:  # what is not valid here is reported where the node is computed or read
            return
        for type_proto in types.values():
            size = math.prod(dim.dim_value or 1 for dim in type_proto.tensor_type.shape.dim)
            if size > FOLD_LIMIT:
                raise EdgeKitError(f"ONNX node '{proto.name}' makes a constant of {size} elements", _HUGE)

    def alone(self, proto: onnx.NodeProto) -> onnx.ModelProto:
        """A model of one node."""
        inputs = [onnx.helper.make_value_info(name, self.types[name]) for name in dict.fromkeys(proto.input) if name]
        outputs = [onnx.ValueInfoProto(name=name) for name in proto.output if name]
        graph = onnx.helper.make_graph([proto], "node", inputs, outputs)
        return onnx.helper.make_model(graph, opset_imports=self.imports, ir_version=self.model.ir_version)

    def shape_of(self, proto: onnx.NodeProto) -> None:
        """Compute what depends on nothing but the shape and type of an input."""
        info = self.graph.info[proto.input[0]]
        (result,) = ReferenceEvaluator(self.alone(proto)).run(None, {proto.input[0]: np.zeros(info.shape, info.dtype)})
        self.constant(proto.output[0], np.asarray(result))

    def branches(self, proto: onnx.NodeProto) -> None:
        """Read the branch of an If that a constant chooses, or both, and let Where choose between what they make."""
        condition = self.graph.array(proto.input[0])
        if condition is not None:
            chosen = self.branch(proto, "then_branch" if bool(condition) else "else_branch")
            for name, outer in zip(chosen, proto.output, strict=True):
                if outer in self.graph.outputs:
                    self.visit(onnx.helper.make_node("Identity", [name], [outer], name=f"{proto.name}/{outer}"))
                else:
                    self.renamed[outer] = name
            return
        first, second = self.branch(proto, "then_branch"), self.branch(proto, "else_branch")
        for names in zip(first, second, strict=True):
            infos = [self.graph.info.get(name) for name in names]
            if None in infos or infos[0] != infos[1]:
                raise unsupported(
                    Node("If", proto.name, [], []), "its branches make values of different shapes or types"
                )
        scalar = f"{proto.name}/condition"
        self.visit(onnx.helper.make_node("Squeeze", [proto.input[0]], [scalar], name=scalar))
        scalar = self.renamed.get(scalar, scalar)
        for one, other, outer in zip(first, second, proto.output, strict=True):
            self.visit(onnx.helper.make_node("Where", [scalar, one, other], [outer], name=f"{proto.name}/{outer}"))

    def branch(self, proto: onnx.NodeProto, which: str) -> list[str]:
        """Read the nodes of a branch; returns the names of what it makes."""
        branch, prefix = attributes(proto)[which], f"{proto.name}/{which}/"
        # Another branch may use the same names for its own values.
        made = _made_in(branch)
        names = {"": ""} | {name: name for name in _read_in(branch) if name not in made}
        for tensor in branch.initializer:
            own = names.setdefault(tensor.name, f"{prefix}{tensor.name}")
            self.constant(own, initializers.array(tensor))
        self.block([_renamed(node, names, prefix, {}) for node in branch.node])
        given = [names.get(value.name, value.name) for value in branch.output]
        return [self.renamed.get(name, name) for name in given]

    def expand(self, proto: onnx.NodeProto) -> bool:
        """Replace an op that has no lowering by the ONNX function that defines it, if one does."""
        body = self.function(proto)
        if body is None:
            return False
        defaults = [attribute.default_value for attribute in self.schema(proto).attributes.values()]
        given = [*(value for value in defaults if value.name), *body.attribute_proto, *proto.attribute]
        attrs = {attribute.name: attribute for attribute in given}
        names = {"": ""}
        names |= dict(zip(body.input, [*proto.input, *[""] * len(body.input)], strict=False))
        names |= {inner: outer for inner, outer in zip(body.output, proto.output, strict=False) if outer}
        nodes = [_renamed(node, names, f"{proto.name}/", attrs) for node in body.node]
        self.within(nodes, list(body.opset_import) or self.imports)
        return True

    def inferred(self, proto: onnx.NodeProto) -> dict[str, onnx.TypeProto]:
        """The types of a node's outputs, from those of its inputs and the values of small constants."""
        data = {
            name: numpy_helper.from_array(self.graph.constants[name], name)
            for name in proto.input
            if name and self.graph.constants.get(name, _LARGE).size <= DATA_LIMIT and name not in self.graph.held
        }
        types = {name: self.types[name] for name in proto.input if name}
        schema = self.schema(proto)
        return onnx.shape_inference.infer_node_outputs(schema, proto, types, data, opset_imports=self.imports)

    def inferred_in_function(self, proto: onnx.NodeProto) -> dict[str, onnx.TypeProto]:
        """The types of a node's outputs as the function that defines its op makes them."""
        inferred = onnx.shape_inference.infer_shapes(self.alone(proto))
        return {value.name: value.type for value in inferred.graph.output if _is_fixed(value.type)}

    def inferred_by_runtime(self, proto: onnx.NodeProto) -> dict[str, onnx.TypeProto]:
        """The types that ONNX Runtime gives a node's outputs: it reads constants that ONNX's inference does not."""
        import onnxruntime

        model = self.alone(proto)
        held = [name for name in dict.fromkeys(proto.input) if name and name in self.graph.constants]
        model.graph.initializer.extend(numpy_helper.from_array(self.graph.constants[name], name) for name in held)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        try:
            session = onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
        except Exception:  # it lacks some ops and types
            return {}
        found = {}
        for value in session.get_outputs():
            elem = next((elem for elem, name in RUNTIME_TYPES.items() if value.type == f"tensor({name})"), None)
            # An unknown rank is [] too.
            if elem is not None and value.shape and all(isinstance(size, int) for size in value.shape):
                found[value.name] = onnx.helper.make_tensor_type_proto(elem, value.shape)
        return found

    def function(self, proto: onnx.NodeProto) -> onnx.FunctionProto | None:
        """The newest function that defines an op and is no newer than the model."""
        if proto.domain not in ("", "ai.onnx") or not onnx.defs.has(proto.op_type):
            return None
        schema: Any = self.schema(proto)
        plain = [version for version in schema.function_opset_versions if version <= self.opset]
        if plain:
            return onnx.FunctionProto.FromString(schema.get_function_with_opset_version(max(plain)))
        for_types = [version for version in schema.context_dependent_function_opset_versions if version <= self.opset]
        if not for_types:
            return None
        types = [self.types[name].SerializeToString() if name else b"" for name in proto.input]
        made = schema.get_context_dependent_function_with_opset_version(
            max(for_types), proto.SerializeToString(), types
        )
        return onnx.FunctionProto.FromString(made) if made else None

    def schema(self, proto: onnx.NodeProto) -> onnx.defs.OpSchema:
        """ONNX's own description of an op."""
        return onnx.defs.get_schema(proto.op_type, self.opset, "")

    @property
    def opset(self) -> int:
        """Version of the ONNX operators that the nodes at hand are written in."""
        return _opset(self.imports)

    def narrow(self, name: str) -> np.ndarray:
        """A float64 constant as float32."""
        array = self.graph.constants[name]
        with np.errstate(over="ignore"):
            narrow = array.astype(np.float32)
        if (np.isinf(narrow) & np.isfinite(array)).any():
            raise EdgeKitError(f"the float64 constant '{name}' of the ONNX model is too large for float32", _FLOAT64)
        self.graph.narrowed = True
        return narrow

    def infer(self, proto: onnx.NodeProto) -> None:
        for index, name in enumerate(proto.input):
            if name and name in self.graph.constants and self.graph.info[name].dtype == np.float64:
                proto.input[index] = f"{name}/float32"
                if proto.input[index] not in self.graph.constants:
                    self.constant(proto.input[index], self.narrow(name))
        _agree_with_inference(proto)
        node = Node(proto.op_type, proto.name, [*proto.input], [*proto.output], attributes(proto))
        self.graph.nodes.append(node)
        if proto.domain not in ("", "ai.onnx"):
            node.op = f"{proto.domain}.{proto.op_type}"
            raise no_lowering(node)
        try:
            types = self.inferred(proto)
        except Exception as error:
            raise EdgeKitError(f"the ONNX model is not valid at {node}: {str(error).splitlines()[0]}") from error
        if not all(name in types and _is_fixed(types[name]) for name in proto.output if name):
            types |= self.inferred_by_runtime(proto) | self.inferred_in_function(proto)
        for name in filter(None, proto.output):
            if name not in types:
                raise EdgeKitError(f"the shape of '{name}' cannot be known ahead from ONNX op {node}", _FIXED)
            self.declare(name, types[name], f"'{name}', made by ONNX op {node},")


_FLOAT64 = "export the model in float32 (model.float())"
_HUGE = "it is larger than any model for a phone or board: check where the file comes from"
_FIXED = "export the model with fixed input shapes (no dynamic axes)"
_LARGE = np.empty(DATA_LIMIT + 1, np.bool_)


def _is_fixed(type_proto: onnx.TypeProto) -> bool:
    tensor = type_proto.tensor_type
    return tensor.HasField("shape") and not any(is_open(dim) for dim in tensor.shape.dim)


def _agree_with_inference(proto: onnx.NodeProto) -> None:
    """Write attributes as ONNX's shape inference has to read them for the shapes that ONNX Runtime makes.

    It heeds ceil_mode where auto_pad SAME says how many windows there are, and takes onesided for 0 where it is absent.
    """
    if proto.op_type == "STFT" and "onesided" not in attributes(proto):
        proto.attribute.append(onnx.helper.make_attribute("onesided", 1))
    if attributes(proto).get("auto_pad", "").startswith("SAME"):
        for attribute in proto.attribute:
            if attribute.name == "ceil_mode" and attribute.i:
                given = attributes(proto)
                if any(map(gt, given.get("strides", ()), given["kernel_shape"])):
                    node = Node(proto.op_type, proto.name, [], [])
                    raise unsupported(node, "ceil_mode with auto_pad SAME and gaps, which ONNX Runtime reads otherwise")
                attribute.i = 0


def _dequantized_at_once(graph: onnx.GraphProto) -> set[str]:
    """The first outputs of the DynamicQuantizeLinear nodes that only a DequantizeLinear reads, with that very scale."""
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    outputs = {value.name for value in graph.output}
    return {
        node.output[0]
        for node in graph.node
        if node.op_type == DYNAMIC
        and not outputs.intersection(node.output)
        and all(
            reader.op_type == "DequantizeLinear" and [*reader.input] == [*node.output]
            for name in node.output
            for reader in readers.get(name, [])
        )
    }


def attributes(proto: onnx.NodeProto) -> dict[str, Any]:
    """The attributes of a node as Python values: strings as str, tensors as numpy arrays."""
    result: dict[str, Any] = {}
    for attribute in proto.attribute:
        value = onnx.helper.get_attribute_value(attribute)
        if isinstance(value, bytes):
            value = value.decode()
        elif isinstance(value, onnx.TensorProto):
            value = initializers.array(value)
        elif attribute.type == onnx.AttributeProto.STRINGS:
            value = [item.decode() for item in value]
        elif attribute.type in (onnx.AttributeProto.INTS, onnx.AttributeProto.FLOATS):
            value = list(value)
        result[attribute.name] = value
    return result


def linear_params(
    graph: Graph, inputs: list[str], attrs: dict[str, Any], shape: tuple[int, ...], stored: np.dtype
) -> QParams | None:
    """Parameters of a QuantizeLinear or DequantizeLinear as int8 (uint8 shifted by 128), or None if not constant.

    `stored` is the dtype of the integers.
    """
    scale = graph.array(inputs[1])
    if scale is None:
        return None
    zero = graph.array(inputs[2]) if len(inputs) > 2 and inputs[2] else np.zeros((), np.uint8)
    if zero is None:
        return None
    shift = 128 if stored == np.uint8 else 0
    if not (np.isfinite(scale).all() and (scale > 0).all()):
        raise EdgeKitError(f"the scale '{inputs[1]}' of the ONNX model is not a positive number", "quantize it anew")
    axis = None if scale.size == 1 else attrs.get("axis", 1)
    fits = axis is None or (-len(shape) <= axis < len(shape) and shape[axis] == scale.size)
    if not fits or zero.size not in (1, scale.size):
        raise EdgeKitError(f"the scale '{inputs[1]}' of the ONNX model does not fit its tensor", "quantize it anew")
    axis = axis if axis is None else axis % len(shape)
    return QParams.of(scale, zero.astype(np.int64) - shift, axis)


def _made_in(graph: onnx.GraphProto) -> set[str]:
    """The values that a branch makes, those of branches inside it too."""
    values = (*graph.initializer, *graph.input)
    made = {value.name for value in values} | {name for node in graph.node for name in node.output}
    return made.union(*(_made_in(inner) for inner in _branches(graph)))


def _read_in(graph: onnx.GraphProto) -> set[str]:
    """The values that the nodes of a branch read, and those that are its outputs."""
    read = {name for node in graph.node for name in node.input} | {value.name for value in graph.output}
    return read.union(*(_read_in(inner) for inner in _branches(graph)))


def _branches(graph: onnx.GraphProto) -> list[onnx.GraphProto]:
    attributes = [attribute for node in graph.node for attribute in node.attribute]
    return [attribute.g for attribute in attributes if attribute.type == onnx.AttributeProto.GRAPH]


def _has_graphs(proto: onnx.NodeProto) -> bool:
    return any(attribute.type == onnx.AttributeProto.GRAPH for attribute in proto.attribute)


def _opset(imports: Iterable[onnx.OperatorSetIdProto]) -> int:
    return next((entry.version for entry in imports if entry.domain in ("", "ai.onnx")), 0)


def _renamed(
    node: onnx.NodeProto, names: dict[str, str], prefix: str, attrs: dict[str, onnx.AttributeProto]
) -> onnx.NodeProto:
    """A node of a function's body as a node of the graph: names prefixed, references to attributes resolved."""
    made = onnx.NodeProto()
    made.CopyFrom(node)
    made.name = prefix + (node.name or node.output[0])
    for field in (made.input, made.output):
        field[:] = [names.setdefault(name, prefix + name) for name in field]
    del made.attribute[:]
    for attribute in node.attribute:
        if attribute.ref_attr_name:
            given = attrs.get(attribute.ref_attr_name)
            if given is None:
                continue
            made.attribute.add().CopyFrom(given)
            made.attribute[-1].name = attribute.name
            continue
        made.attribute.add().CopyFrom(attribute)
        graph = made.attribute[-1].g
        for tensor in graph.initializer:
            tensor.name = names.setdefault(tensor.name, prefix + tensor.name)
        inner = [_renamed(each, names, prefix, attrs) for each in graph.node]
        del graph.node[:]
        graph.node.extend(inner)
        for value in (*graph.input, *graph.output):
            value.name = names.setdefault(value.name, prefix + value.name)
    return made


def rejection(model: onnx.ModelProto) -> str | None:
    """What ONNX Runtime says against loading a model or running it on zeros, or None if it does both."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    try:
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        held = {tensor.name for tensor in model.graph.initializer}
        session.run(None, {value.name: _zeros(value) for value in model.graph.input if value.name not in held})
    except Exception as error:
        return str(error).strip().splitlines()[0]
    return None


def _zeros(value: onnx.ValueInfoProto) -> np.ndarray:
    tensor = value.type.tensor_type
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)
    return np.zeros([dim.dim_value for dim in tensor.shape.dim], dtype)


def _onnxruntime(model: onnx.ModelProto, feeds: dict[str, Any]) -> list[Any] | None:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    try:
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        return list(session.run(None, feeds))
    except Exception:  # it lacks some ops and types
        return None
