"""Whole architectures from torch through ONNX to TFLite, against ONNX Runtime.

The test suite runs them reduced. `python tests/exporters/test_architectures.py --full [NAME...]` runs them in full
size (minutes) and prints a table; without `--full` it prints the table of the reduced ones.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from tflite_tools import interpreter, model, node, op_names, run_onnx

sys.path.append(str(Path(__file__).parents[1]))
from architectures import ARCHITECTURES, build, example

from edgekit.exporters.tflite import convert

TOLERANCE = 1e-4  # of the largest reference value
NAMED = {
    "resnet18", "mobilenet_v2", "mobilenet_v3_small", "efficientnet_b0", "shufflenet_v2", "regnet_y400", "squeezenet",
    "googlenet", "densenet121", "mobilevit_xxs", "convnext_tiny", "vit_tiny", "swin_tiny", "lraspp", "deeplab_v3",
    "yolo", "unet", "bert_tiny", "lstm", "gru", "audio_m5", "autoencoder", "vae",
}  # fmt: skip
PLAIN = {
    "resnet18", "mobilenet_v2", "mobilenet_v3_small", "efficientnet_b0", "regnet_y400", "squeezenet", "googlenet",
    "densenet121", "convnext_tiny", "lraspp", "deeplab_v3", "yolo", "unet", "audio_m5",
    "autoencoder",
}  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """`difference` is the largest of all outputs, with and without XNNPACK, relative to the largest reference value.

    `transposes` counts those inside: not the one that turns an image input, nor the one that turns an image output.
    """

    difference: float
    transposes: int
    ops: int
    size: int
    milliseconds: float
    convert_seconds: float


def to_onnx(model: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> onnx.ModelProto:
    """Exports with torch's exporter; every input and output has the shape of the example."""
    with torch.no_grad():
        program = torch.onnx.export(model, inputs, dynamo=True, opset_version=18, verbose=False)
    assert program is not None
    return program.model_proto


def measure(made: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> Outcome:
    """Converts, runs with and without XNNPACK, and compares every output with ONNX Runtime."""
    start = time.perf_counter()
    data = convert(made)
    seconds = time.perf_counter() - start
    expected = run_onnx(made, feeds)
    differences, milliseconds = [], 0.0
    for xnnpack in (False, True):
        runner = interpreter(data, xnnpack).get_signature_runner("serving_default")
        times = []
        for _ in range(5):
            start = time.perf_counter()
            actual = runner(**feeds)
            times.append(time.perf_counter() - start)
        milliseconds = 1000 * min(times)
        assert set(actual) == set(expected)
        for name, array in expected.items():
            assert actual[name].shape == array.shape and actual[name].dtype == array.dtype, name
            assert np.ptp(array) > 0, f"{name} does not depend on anything"
            differences.append(float(np.abs(actual[name] - array).max() / np.abs(array).max()))
    difference = float(np.max(differences))  # unlike max(), keeps a NaN
    return Outcome(difference, inner_transposes(data), len(op_names(data)), len(data), milliseconds, seconds)


def inner_transposes(data: bytes) -> int:
    made = interpreter(data, xnnpack=False)
    details = [*made.get_input_details(), *made.get_output_details()]
    edges = {tensor["index"] for tensor in details if len(tensor["shape"]) >= 3}
    transposes = [op for op in made._get_ops_details() if op["op_name"] == "TRANSPOSE"]
    return sum(not edges.intersection((*op["inputs"], *op["outputs"])) for op in transposes)


def outcome(name: str, full: bool = False) -> Outcome:
    inputs = example(name, full)
    made = to_onnx(build(name, full), inputs)
    feeds = {value.name: array.numpy() for value, array in zip(made.graph.input, inputs, strict=True)}
    return measure(made, feeds)


def test_the_table_is_complete() -> None:
    assert set(ARCHITECTURES) == NAMED
    assert {name for name in PLAIN if ARCHITECTURES[name].transposes == 0} == PLAIN


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architecture(name: str) -> None:
    measured = outcome(name)
    assert measured.difference <= TOLERANCE
    assert measured.transposes <= ARCHITECTURES[name].transposes


@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("sizes", [(7,), (5, 4), (3, 2, 4), (96, 80)])
def test_group_normalization_costs_no_transpose(sizes: tuple[int, ...], groups: int) -> None:
    """An image normalized by groups of channels; the normalized groups themselves are an output too."""
    rng = np.random.default_rng(0)
    feeds = {"x": rng.standard_normal((2, 3, *sizes)).astype(np.float32) + 3}
    constants = {
        "w": rng.standard_normal((6, 3, *[1] * len(sizes))).astype(np.float32),
        "scale": rng.standard_normal(groups).astype(np.float32),
        "offset": rng.standard_normal(groups).astype(np.float32),
        "split": np.array([0, groups, -1]),
        "join": np.array([2, 6, *sizes]),
    }
    nodes = [
        node("Conv", ["x", "w"], "a"),
        node("Reshape", ["a", "split"], "b"),
        node("InstanceNormalization", ["b", "scale", "offset"], "c"),
        node("Reshape", ["c", "join"], "d"),
        node("Sigmoid", ["d"], "y"),
    ]
    measured = measure(model(nodes, feeds, constants), feeds)
    assert measured.difference <= TOLERANCE
    assert measured.transposes == (len(sizes) == 1)  # a signal is given an axis before it is turned
    assert measure(model(nodes, feeds, constants, ("y", "c")), feeds).difference <= TOLERANCE


def main() -> None:
    """Prints one line per architecture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=list(ARCHITECTURES), metavar="NAME")
    parser.add_argument("--full", action="store_true", help="full size")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{'architecture':20}{'rel. diff.':>11}{'transposes':>12}{'ops':>6}{'MB':>8}{'ms':>9}{'convert s':>11}")
    for name in arguments.names:
        try:
            o = outcome(name, arguments.full)
        except Exception as error:  # one that fails must not hide the others
            print(f"{name:20}{type(error).__name__}: {str(error).splitlines()[0]}", flush=True)
            continue
        numbers = f"{o.difference:11.1e}{o.transposes:12}{o.ops:6}{o.size / 1e6:8.2f}{o.milliseconds:9.2f}"
        print(f"{name:20}{numbers}{o.convert_seconds:11.2f}", flush=True)


if __name__ == "__main__":
    main()
