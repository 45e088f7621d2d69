"""Convert random graphs to TFLite and compare the files with ONNX Runtime, each in a process that may die.

    python tests/exporters/check_random.py float 0 10000      float graphs of seeds 0 to 9999 (12 minutes on one core)
    python tests/exporters/check_random.py int8 0 3000        int8 networks (4 minutes)
    python tests/exporters/check_random.py torch 0 200        torch networks in three formats, fp32 and int8 (an hour)
    python tests/exporters/check_random.py float 4711         one graph, with the smallest part of it that fails

A graph may be converted and agree, or be refused with an error. Wrong values, other shapes or types, an interpreter
that does not run the file, a traceback and a death of the process are faults.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2])]

from isolated import Verdict, outcomes
from random_graphs import Made, finished, graph, reads
from random_int8 import allowed, network
from tflite_tools import run_onnx, run_tflite

from edgekit.errors import EdgeKitError
from edgekit.exporters.tflite import convert, convert_with_notes
from edgekit.exporters.tflite.int8_check import steps

CLOSE = 2e-4  # of a float's size
NOISE = 2e-6  # of a float's size, added to every value in between: what moves an output by more says nothing
ROUGH = 20  # times as much, where ONNX Runtime's own sums lose digits
ROUGH_OPS = {"DFT", "STFT", "GridSample"}
TRIALS, ROUGH_TRIALS = 7, 60  # of noise: what is 0 but for rounding ties with many others
AMPLIFIED = 20
STEPS = 2  # of an int8 op on its own inputs
BAD = ("wrong", "shape", "type", "invoke", "raised", "died", "hung")


def noisy(made: Made, seed: int) -> onnx.ModelProto:
    """The model with small errors in the floats that its nodes make: all up, all down, or random ones."""
    random = np.random.default_rng(seed)
    kept = [value.name for value in made.model.graph.output]
    inner = [name for node in made.model.graph.node for name in node.output if name]
    probe = onnx.ModelProto()
    probe.CopyFrom(made.model)
    del probe.graph.output[:]
    probe.graph.output.extend(onnx.ValueInfoProto(name=name) for name in inner)
    arrays = run_onnx(probe, made.feeds, optimized=False)
    nodes, constants = [], {}
    for node in made.model.graph.node:
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        nodes.append(copy)
        for place, name in enumerate(node.output):
            if name not in arrays or arrays[name].dtype != np.float32 or node.op_type in MOVES:
                continue
            array = arrays[name]
            size = np.maximum(np.abs(array), 0.05 * np.abs(array).max(initial=0))
            signs = 1.0 if seed == 0 else -1.0 if seed == 1 else random.uniform(-1, 1, array.shape)
            noise = NOISE * (ROUGH if node.op_type in ROUGH_OPS else 1)
            constants[f"{name}_error"] = np.asarray(noise * signs * size, np.float32)
            copy.output[place] = f"{name}_exact"
            nodes.append(helper.make_node("Add", [f"{name}_exact", f"{name}_error"], [name]))
    model = onnx.ModelProto()
    model.CopyFrom(made.model)
    del model.graph.node[:], model.graph.output[:]
    model.graph.node.extend(nodes)
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in kept)
    model.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in constants.items())
    return model


MOVES = {
    "Transpose", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity", "Concat", "Split", "Slice", "Gather",
    "GatherElements", "GatherND", "Expand", "Tile", "Pad", "DepthToSpace", "SpaceToDepth", "Relu", "Abs", "Neg",
    "Constant", "Dropout", "Trilu", "Sign", "Ceil", "Floor", "Round", "Max", "Min", "ReduceMax", "ReduceMin", "MaxPool",
    "GlobalMaxPool", "Where", "OneHot", "ReverseSequence", "Cast", "Shape", "Size", "ConstantOfShape", "EyeLike",
    "Hardmax", "Clip",
}  # fmt: skip


def limits(made: Made, expected: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """How far each number may be off; infinitely where small errors before it decide what it is."""
    found = {}
    for name, array in expected.items():
        size = np.abs(array).max(initial=0) if array.dtype.kind == "f" else 0
        found[name] = np.full(array.shape, CLOSE * size + 1e-6 if array.dtype.kind == "f" else 0, np.float64)
    rough = any(node.op_type in ROUGH_OPS for node in made.model.graph.node)
    for seed in range(ROUGH_TRIALS if rough else TRIALS):
        other = run_onnx(noisy(made, seed), made.feeds, optimized=False)
        for name, array in expected.items():
            with np.errstate(invalid="ignore"):
                off = np.abs(other[name].astype(np.float64) - array.astype(np.float64))
            off = np.where(np.isnan(off), 0.0 if np.array_equal(other[name], array, equal_nan=True) else np.inf, off)
            found[name] = np.where(off > 50 * found[name] + 0.0, np.inf, found[name] + AMPLIFIED * off)
    return found


def compare(made: Made) -> Verdict:
    """Convert a graph, run it with and without XNNPACK, and compare every output."""
    try:
        expected = run_onnx(made.model, made.feeds, optimized=False)
    except Exception as error:  # what ONNX Runtime took node by node
        return "invalid", str(error)[:200]
    try:
        data = convert(made.model)
    except EdgeKitError as error:
        return "refused", error.what
    try:
        allowed = limits(made, expected)
    except Exception as error:  # ONNX Runtime infers a shape otherwise than it computes
        return "invalid", str(error)[:200]
    for xnnpack in (True, False):
        try:
            actual = run_tflite(data, made.feeds, xnnpack)
        except (RuntimeError, ValueError) as error:
            return "invoke", f"XNNPACK {xnnpack}: {str(error)[:200]}"
        for name, array in expected.items():
            got, what = actual[name], f"'{name}' by {_maker(made, name)}, XNNPACK {xnnpack}"
            if got.shape != array.shape:
                return "shape", f"{what}: {got.shape}, not {array.shape}"
            if got.dtype != array.dtype:
                return "type", f"{what}: {got.dtype}, not {array.dtype}"
            with np.errstate(invalid="ignore"):
                off = np.abs(got.astype(np.float64) - array.astype(np.float64))
            same = (off <= allowed[name]) | (np.isnan(got) & np.isnan(array) if array.dtype.kind == "f" else False)
            if not np.all(same | np.isinf(allowed[name])):
                return (
                    "wrong",
                    f"{what}: up to {np.nanmax(np.where(same, 0, off)):.3g} of {np.abs(array.astype(float)).max():.3g}",
                )
    blurred = [float(np.isinf(each).mean()) for each in allowed.values() if each.size]
    return ("passed" if not blurred or min(blurred) < 0.5 else "blurred"), " ".join(made.ops)


def compare_int8(made: Made) -> Verdict:
    """Convert an int8 network: each op within steps of ONNX Runtime's on its own inputs, each output within noise."""
    expected = run_onnx(made.model, made.feeds, optimized=False)
    try:
        converted = convert_with_notes(made.model)
    except EdgeKitError as error:
        return "refused", error.what
    for step in steps(made.model, converted.data, converted.places, made.feeds, "nchw"):
        if step.most > STEPS:
            return "wrong", str(step)
    limit = allowed(made, expected)
    for xnnpack in (True, False):
        try:
            actual = run_tflite(converted.data, made.feeds, xnnpack)
        except (RuntimeError, ValueError) as error:
            return "invoke", f"XNNPACK {xnnpack}: {str(error)[:200]}"
        for name, array in expected.items():
            got, what = actual[name], f"'{name}' by {_maker(made, name)}, XNNPACK {xnnpack}"
            if got.shape != array.shape:
                return "shape", f"{what}: {got.shape}, not {array.shape}"
            if got.dtype != array.dtype:
                return "type", f"{what}: {got.dtype}, not {array.dtype}"
            off = np.abs(got.astype(float) - array.astype(float)).max(initial=0)
            if off > limit[name]:
                return "wrong", f"{what}: up to {off:.3g}, where noise moves it by {limit[name]:.3g}"
    int8 = sum(1 for kind in converted.qparams)
    return ("passed" if int8 else "float"), " ".join(made.ops)


def _maker(made: Made, name: str) -> str:
    return next((node.op_type for node in made.model.graph.node if name in node.output), "nothing")


def smallest(made: Made, judge: Callable[[Made], Verdict], kinds: tuple[str, ...] = BAD) -> tuple[Made, Verdict] | None:
    """The smallest run of nodes, ending anywhere, that fails by itself on the values that it reads."""
    nodes = [node for node in made.model.graph.node if node.op_type != "Constant"]
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in made.model.graph.initializer}
    for node in made.model.graph.node:
        if node.op_type == "Constant":
            constants[node.output[0]] = numpy_helper.to_array(node.attribute[0].t)
    probe = onnx.ModelProto()
    probe.CopyFrom(made.model)
    del probe.graph.output[:]
    probe.graph.output.extend(onnx.ValueInfoProto(name=name) for node in nodes for name in node.output if name)
    values = run_onnx(probe, made.feeds, optimized=False) | made.feeds
    opset = next(each.version for each in made.model.opset_import if not each.domain)
    parts = []
    for size in range(1, len(nodes) + 1):
        for last in range(len(nodes)):
            part, wanted = [], {*nodes[last].output}
            for node in reversed(nodes[: last + 1]):
                if len(part) < size and wanted & {*node.output}:
                    part.insert(0, node)
                    wanted |= {*reads(node)}
            if len(part) == size:
                parts.append(part)
    for part in parts:
        inside = {name for node in part for name in node.output}
        read = dict.fromkeys(name for node in part for name in reads(node) if name not in inside)
        feeds = {name: values[name] for name in read if name not in constants}
        held = {name: constants[name] for name in read if name in constants}
        names = [name for name in part[-1].output if name]
        names += [value.name for value in made.model.graph.output if value.name in inside and value.name not in names]
        try:
            small = Made(finished(part, feeds, held, names, opset), feeds, tuple(node.op_type for node in part))
            run_onnx(small.model, feeds, optimized=False)
        except Exception:
            continue
        ((_, verdict),) = outcomes(lambda _, small=small: judge(small), [0])
        if verdict[0] in kinds:
            return small, verdict
    return None


def described(made: Made) -> str:
    lines = [f"  in {name} {array.dtype}{list(array.shape)}" for name, array in made.feeds.items()]
    for tensor in made.model.graph.initializer:
        array = numpy_helper.to_array(tensor)
        lines.append(f"  const {tensor.name} {array.dtype}{list(array.shape)} {array.reshape(-1)[:8].tolist()}")
    for node in made.model.graph.node:
        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute if a.type != a.GRAPH}
        lines.append(f"  {list(node.output)} = {node.op_type}({', '.join(node.input)}) {attributes}")
    lines.append(
        f"  out {[value.name for value in made.model.graph.output]} opset {made.model.opset_import[0].version}"
    )
    return "\n".join(lines)


KINDS: dict[str, tuple[Callable[[int], Made], Callable[[Made], Verdict]]] = {
    "float": (graph, compare),
    "int8": (network, compare_int8),
}


def check(kind: str, seeds: range) -> dict[int, Verdict]:
    """The verdict on each seed's graph."""
    if kind == "torch":
        import random_torch

        import edgekit.exporters.executorch.lower  # noqa: F401 (imported before the forks, which then need not)

        return dict(outcomes(random_torch.export_and_compare, seeds, 300))
    make, judge = KINDS[kind]
    return dict(outcomes(lambda seed: judge(make(seed)), seeds))


if __name__ == "__main__":
    name, numbers = sys.argv[1], [int(each) for each in sys.argv[2:4]]
    if len(numbers) == 1:
        whole = KINDS[name][0](numbers[0])
        print(described(whole))
        ((_, verdict),) = outcomes(lambda seed: KINDS[name][1](KINDS[name][0](seed)), numbers)
        print(verdict)
        part = smallest(whole, KINDS[name][1], (verdict[0],))
        if part is not None:
            print("smallest:", part[1])
            print(described(part[0]))
    else:
        found = check(name, range(*numbers))
        if "--json" in sys.argv:
            print(json.dumps(found))
        else:
            for number, (what, detail) in found.items():
                if what in BAD:
                    print(number, what, detail)
            reasons = Counter(detail.split("(node")[0][:110] for what, detail in found.values() if what == "refused")
            print("refused:", *(f"{count} {reason}" for reason, count in reasons.most_common(60)), sep="\n  ")
            print(dict(Counter(what for what, _ in found.values())))
