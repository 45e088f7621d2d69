"""Intermediate outputs: a copy of a file that also gives what every op writes, and the first op that two differ in."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from edgekit.artifacts.artifact import Culprit
from edgekit.errors import EdgeKitError
from edgekit.util import atomic_files

if TYPE_CHECKING:
    import numpy as np

EQUAL_DB = 100.0  # nearer than this, two tensors are called equal: floating point is no better
FAULT_DB = 10.0  # what an op has to lose against its inputs to be called the culprit
CLOSE_DB = 60.0  # no op is, whose output is still this near
UNTAPPED = "ExecuTorch lets no one look inside the parts that XNNPACK runs: the op is not named"
OTHER_OPS = "its ops are not those of the file that EdgeKit exports from this model now: the op is not named"
SAME_OPS = "op by op it is the file that EdgeKit exports from this model now: the exporter or the runtime is to blame"


class Tap(NamedTuple):
    """One tensor that an op writes: the op's kind and name, the tensor's name, those that the op reads, and its scale.

    `scale` and `zero_point` are those of the file for a tensor of integers in TFLite, 1 and 0 elsewhere.
    """

    op: str
    node: str
    tensor: str
    reads: tuple[str, ...]
    scale: float = 1.0
    zero_point: int = 0


def tapped(path: Path, format: str, into: Path) -> list[Tap]:
    """Writes a copy of the file at `path` whose outputs are what each op writes; the taps, in the order of the ops.

    The copy computes the same, and takes its inputs by the same names. Raises EdgeKitError for a format without taps,
    and for a file that cannot be read.
    """
    if format not in TAPPERS:
        raise EdgeKitError(UNTAPPED)
    try:
        return TAPPERS[format](path, into)
    except EdgeKitError:
        raise
    except Exception as error:
        # Readers of damaged files raise whatever they stumble over.
        raise EdgeKitError(f"the ops of {path} cannot be read: {error}") from error


def first_difference(
    taps: Sequence[Tap],
    values: Sequence[np.ndarray],
    expected_taps: Sequence[Tap],
    expected: Sequence[np.ndarray],
) -> Culprit | str:
    """Returns the first op that loses much of what its inputs were, against the same tensors of a file without defect.

    An op far downstream of a defect is as wrong as its inputs are, and loses nothing of its own. Returns a sentence
    where no op stands out.
    """
    wanted = {tap.tensor: _real(tap, array) for tap, array in zip(expected_taps, expected, strict=True)}
    near: dict[str, float] = {}
    compared = 0
    for tap, array in zip(taps, values, strict=True):
        before = min((near.get(name, EQUAL_DB) for name in tap.reads), default=EQUAL_DB)
        reference = wanted.get(tap.tensor)
        if reference is None or reference.shape != array.shape:
            near[tap.tensor] = before
            continue
        compared += 1
        now = near[tap.tensor] = _sqnr_db(reference, _real(tap, array))
        if now < CLOSE_DB and before - now > FAULT_DB:
            return Culprit(tap.op, tap.node, now)
    return SAME_OPS if 2 * compared >= len(taps) else OTHER_OPS


def _real(tap: Tap, array: np.ndarray) -> np.ndarray:
    import numpy as np

    return (array.astype(np.float64) - tap.zero_point) * tap.scale


def _sqnr_db(reference: np.ndarray, array: np.ndarray) -> float:
    error, signal = float(((array - reference) ** 2).sum()), float((reference**2).sum())
    if not math.isfinite(error):
        return -math.inf
    if not error:
        return EQUAL_DB
    return min(EQUAL_DB, 10 * math.log10(signal / error)) if signal else -math.inf


def _tap_onnx(path: Path, into: Path) -> list[Tap]:
    import onnx

    model = onnx.load(path)
    given = {value.name: value for value in model.graph.output}
    constant = {tensor.name for tensor in model.graph.initializer} | {""}
    taps = {}
    for node in model.graph.node:
        if constant.issuperset(node.input):  # weights that are dequantized: to blame is the op that they are for
            constant |= set(node.output)
            continue
        for name in filter(None, node.output):
            taps[name] = Tap(node.op_type, node.name or name, name, tuple(n for n in node.input if n not in constant))
    del model.graph.output[:]
    model.graph.output.extend(given.get(name, onnx.ValueInfoProto(name=name)) for name in taps)
    atomic_files.write(into, model.SerializeToString())
    return list(taps.values())


def _tap_tflite(path: Path, into: Path) -> list[Tap]:
    import flatbuffers
    from ai_edge_litert import schema_py_generated as schema

    from edgekit.artifacts.tflite_file import OPERATORS

    model = schema.ModelT.InitFromPackedBuf(path.read_bytes(), 0)
    graph = model.subgraphs[0]
    names = [tensor.name.decode() for tensor in graph.tensors]
    inputs = {int(index): names[index] for index in graph.inputs}
    for signature in model.signatureDefs or []:
        inputs |= {int(entry.tensorIndex): entry.name.decode() for entry in signature.inputs}
    taps = {}
    for op in graph.operators:
        code = model.operatorCodes[op.opcodeIndex]
        kind = OPERATORS.get(max(code.builtinCode, code.deprecatedBuiltinCode), "CUSTOM")
        reads = tuple(names[index] for index in op.inputs if index >= 0)
        for index in map(int, op.outputs):
            q = graph.tensors[index].quantization
            whole = q is not None and q.scale is not None and len(q.scale) == 1
            scale, zero = (float(q.scale[0]), int(q.zeroPoint[0])) if whole else (1.0, 0)
            taps[index] = Tap(kind, names[index], names[index], reads, scale, zero)
    for index, tensor in enumerate(graph.tensors):
        tensor.name = inputs.get(index, f"#{index}").encode()  # names in a file need not be unique
    graph.outputs = list(taps)
    model.signatureDefs = None
    builder = flatbuffers.Builder(path.stat().st_size + (1 << 16))
    builder.Finish(model.Pack(builder), file_identifier=b"TFL3")
    atomic_files.write(into, bytes(builder.Output()))
    return list(taps.values())


TAPPERS: dict[str, Any] = {"onnx": _tap_onnx, "tflite": _tap_tflite}
