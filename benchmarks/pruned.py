"""What pruning is worth: one network as trained, pruned, in int8 and both, measured in turn in one run.

    python benchmarks/pruned.py --data DATA [--train TRAIN] [--ratio 0.5] [--epochs N] NETWORK [--code CODE]

NETWORK is a name of benchmarks/networks.py, `efficientnet_lite0`, or what `edgekit prune` takes; so are CODE, DATA and
TRAIN. With `--pruned FILE` the network that `edgekit prune` wrote is measured, and nothing is trained. Accuracy is that
of the exported files on DATA's evaluation samples. Every file runs in processes of its own, pinned to one core,
interleaved over ROUNDS rounds; the speed-up is its p50 against that of the unpruned fp32 file of its format.
"""

from __future__ import annotations

import argparse
import functools
import logging
import time
import warnings
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import networks
import torch
from racing import race
from rich.console import Console

from edgekit.artifacts.artifact import Artifact
from edgekit.commands import export, prune
from edgekit.data import sources
from edgekit.loading import with_data
from edgekit.measuring import running
from edgekit.measuring.evaluation import Chunk, whole
from edgekit.metrics import accuracy
from edgekit.metrics.table import METRICS
from edgekit.reports import tables
from edgekit.reports.pruned import pruning_report
from edgekit.runtimes import Timing
from edgekit.util.progress import Terminal

ROUNDS = 10
TIMING = Timing(warmup_runs=50, seconds=1.0, min_runs=20, max_runs=5000)
TOP1 = METRICS["top1"]
KINDS = ("fp32", "pruned", "int8", "pruned int8")


def measure(options: argparse.Namespace, folder: Path, console: Console) -> Any:
    """Prunes where that was not done yet, exports all four networks, and returns the table."""
    network, code = options.network, options.code
    if ":" not in network and not Path(network).is_file():
        images = next(iter(next(iter(sources.load(options.data).calibration)).inputs.values()))[:48]
        network = networks.load(network, torch.from_numpy(images))[0]
    pruned: Any = options.pruned
    if pruned is None:
        start = time.perf_counter()
        result = prune.prune(
            network,
            code=code,
            ratio=options.ratio,
            data=options.data,
            train=options.train,
            epochs=options.epochs,
            out=options.out or folder,
            name="network",
            progress=Terminal(console),
        )
        console.print(pruning_report(result), f"pruned in {(time.perf_counter() - start) / 60:.1f} min")
        pruned = result.path / "model.pt2"
    files: dict[str, tuple[Artifact, ...]] = {}
    for kind in KINDS:
        given, needs = (pruned, None) if kind.startswith("pruned") else (network, code)
        precision = "int8" if kind.endswith("int8") else "fp32"
        bundle = export.export(
            given,
            code=needs,
            target="x86",
            formats=options.format,
            precision=precision,
            data=options.data,
            out=folder / kind,
            name="network",
        )
        files[kind] = bundle.artifacts
    original, source = with_data.load(network, data=options.data, inputs=(), code=code, mean=(), std=())
    assert source is not None
    return _table(files, whole(source, original), original)


def _table(files: dict[str, tuple[Artifact, ...]], evaluation: Chunk, original: Any) -> Any:
    table = tables.table("network", "format", "top-1", "drop", "p50 ms", "vs fp32", "size", "vs fp32")
    assert evaluation.target is not None
    reference = evaluation.cut(running.run_module(original.module, evaluation.feeds))
    right = TOP1.score(reference, evaluation.target)
    for position, base in enumerate(files["fp32"]):
        calls = [functools.partial(running.run, files[kind][position]) for kind in KINDS]
        latencies = race(calls, evaluation.feeds, ROUNDS, TIMING)
        for kind, latency in zip(KINDS, latencies, strict=True):
            artifact = files[kind][position]
            got = evaluation.cut(running.run(artifact, evaluation.feeds).outputs)[0]
            found = accuracy.accuracy_of(TOP1, right, TOP1.score([got], evaluation.target))
            table.add_row(
                kind,
                artifact.format,
                f"{100 * found.value:.2f} %",
                f"{found.drop:.2f}",
                tables.milliseconds(latency.p50),
                f"{latencies[0].p50 / latency.p50:.2f}x",
                tables.size(artifact.size_bytes),
                f"{artifact.size_bytes / base.size_bytes:.2f}",
            )
    return table


def main() -> None:
    """Parses the command line and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network", metavar="NETWORK")
    parser.add_argument("--code", help="what `edgekit prune --code` takes")
    parser.add_argument("--data", required=True, help="what `edgekit prune --data` takes, with labels")
    parser.add_argument("--train", help="what `edgekit prune --train` takes")
    parser.add_argument("--ratio", type=float, default=0.5, help="share of the multiply-adds to remove (%(default)s)")
    parser.add_argument("--epochs", type=int, help="of fine-tuning")
    parser.add_argument("--pruned", metavar="FILE", help="a pruned network, instead of pruning")
    parser.add_argument("--out", type=Path, help="folder that keeps the pruned network")
    parser.add_argument("--format", default="executorch,onnx,tflite", help="formats to measure")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    console = Console(width=140)
    with TemporaryDirectory() as temporary:
        console.print(measure(options, Path(temporary), console))


if __name__ == "__main__":
    main()
