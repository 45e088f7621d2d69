"""Noise floors: how small an output may be before rounding makes more of a difference than its values do.

Kernels compute a sigmoid as 1/(1 + e^-x) or as p/q + 1/2: sums with a number of the size of 1, which float32 rounds by
up to its epsilon of that, however near to 0 the result is. Of 1e-8 one runtime so makes 2.7e-8 and another 0, and all
are right. The same goes for what is added to a constant or a bias that it cancels out. How large those numbers are is
read from the graph: the outputs are followed up to the op that computes them, through those that only move values.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from onnx import ModelProto
    from torch.export import ExportedProgram

EPSILON = 2.0**-23  # of float32: how far apart numbers at 1 are
ROUNDED = 2  # of the two results that are compared each is rounded
DEEPEST = 200  # ops that an output is followed up through

# Ops by their names in ATen and ONNX, in small letters and without underscores.
OF_ONE = frozenset(
    "sigmoid tanh softmax logsoftmax hardsigmoid erf softplus logsigmoid logsigmoidforward log1p sin cos".split()  # noqa: SIM905
)
MOVES = frozenset(
    """
    alias amax amin cat clamp clip clone concat constantpadnd contiguous detach expand flatten gather getitem
    globalaveragepool hardtanh identity index indexselect max maximum maxpool mean min minimum pad permute reducemax
    reducemean reducemin relu repeat reshape select slice split splitwithsizes squeeze stack t tile tocopy transpose
    unbind unsafeview unsqueeze view cast quantizelinear dequantizelinear quantizepertensor dequantizepertensor
    """.split()  # noqa: SIM905
)
SUMS = {"add", "sub", "rsub"}
BIASES = {"linear": 2, "conv1d": 2, "conv2d": 2, "conv3d": 2, "convolution": 2, "conv": 2, "gemm": 2, "addmm": 0}

Step = tuple[str, Sequence[Any]]  # an op's name, and what it reads: values, numbers for constants, None for nothing


def floors(program: ExportedProgram | None, model: ModelProto | None = None) -> tuple[float, ...]:
    """Returns by output the difference that rounding alone makes, whatever the values: 0 where none is known.

    The graph is that of the `program`, or of an ONNX `model`.
    """
    if program is not None:
        outputs, step = _of_torch(program)
    elif model is not None:
        outputs, step = _of_onnx(model)
    else:
        return ()
    return tuple(ROUNDED * EPSILON * _magnitude(output, step, {}, 0) for output in outputs)


def _magnitude(value: Any, step: Callable[[Any], Step | float | None], known: dict[Any, float], depth: int) -> float:
    """Returns the size of the numbers that a value is a sum of, where it may be much smaller than they are; or 0."""
    if value in known or depth > DEEPEST:
        return known.get(value, 0.0)
    known[value] = 0.0
    found = step(value)
    if not isinstance(found, tuple):
        return 0.0
    op, reads = found
    steps = {i: read if isinstance(read, float) else step(read) for i, read in enumerate(reads) if read is not None}
    constants = {i: abs(part) for i, part in steps.items() if isinstance(part, float)}
    values = [read for i, read in enumerate(reads) if read is not None and i not in constants]

    def largest() -> float:
        return max((_magnitude(read, step, known, depth + 1) for read in values), default=0.0)

    result = 0.0
    if op in OF_ONE:
        result = 1.0
    elif op in MOVES:
        result = largest()
    elif op in SUMS:
        result = max(largest(), *constants.values(), 0.0)
    elif op in ("mul", "div") and len(values) == 1 and len(constants) == 1:
        factor = next(iter(constants.values()))
        result = largest() * (factor if op == "mul" else 1 / factor if factor else 0.0)
    elif op in BIASES:
        result = constants.get(BIASES[op], 0.0)
    known[value] = result
    return result


def _of_torch(program: ExportedProgram) -> tuple[list[Any], Callable[[Any], Step | float | None]]:
    import torch

    signature = program.graph_signature
    lifted = {
        **signature.inputs_to_parameters,
        **signature.inputs_to_buffers,
        **signature.inputs_to_lifted_tensor_constants,
    }
    held = {**program.state_dict, **program.constants}
    nodes = {node.name: node for node in program.graph.nodes}

    def step(node: Any) -> Step | float | None:
        tensor = held.get(lifted.get(node.name, ""))
        if isinstance(tensor, torch.Tensor):
            return float(tensor.detach().double().abs().max()) if tensor.numel() and not tensor.is_complex() else 0.0
        if node.op != "call_function":
            return None
        name = node.target.__name__ if not hasattr(node.target, "_schema") else node.target._schema.name.split("::")[1]
        return name.replace("_", "").lower(), _flat(node.args)

    return [nodes[str(name)] for name in signature.user_outputs if str(name) in nodes], step


def _flat(arguments: Sequence[Any]) -> list[Any]:
    """Returns an op's arguments, nodes of lists among them: numbers as floats, None for what is neither."""
    import torch

    found: list[Any] = []
    for argument in arguments:
        if isinstance(argument, (list, tuple)) and any(isinstance(part, torch.fx.Node) for part in argument):
            found += [part for part in argument if isinstance(part, torch.fx.Node)]
        elif isinstance(argument, torch.fx.Node):
            found.append(argument)
        else:
            found.append(float(argument) if isinstance(argument, (int, float)) else None)
    return found


def _of_onnx(model: ModelProto) -> tuple[list[Any], Callable[[Any], Step | float | None]]:
    import numpy as np
    from onnx import numpy_helper

    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    makers = {name: node for node in model.graph.node for name in node.output if name}

    def step(name: str) -> Step | float | None:
        node = makers.get(name)
        tensor = stored.get(name)
        if node is not None and node.op_type == "Constant":
            tensor = next((attribute.t for attribute in node.attribute if attribute.name == "value"), None)
        if tensor is not None:
            if tensor.data_location == tensor.EXTERNAL:
                return 0.0
            values = numpy_helper.to_array(tensor)
            return float(np.abs(values.astype(np.float64)).max(initial=0.0)) if values.dtype.kind in "fiu" else 0.0
        return (node.op_type.lower(), [read or None for read in node.input]) if node is not None else None

    return [output.name for output in model.graph.output], step
