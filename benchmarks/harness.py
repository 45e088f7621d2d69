"""What EdgeKit's clock itself costs, and how well a p50 repeats.

    python benchmarks/harness.py [NETWORK...]

NETWORK is a name of benchmarks/networks.py or `example`, the network of examples/fashion_mnist; each is exported to
every format at fp32 and int8. Overhead: in a process pinned to one core, EdgeKit's timed loop and a plain loop on the
runtime's own calls take turns, each on a session of its own; both hand a new input over and take the outputs. The
p50 of the undisturbed runs (see `edgekit.measuring.outliers`) of BLOCKS x PROCESSES turns may differ by 3 % or 5 µs.
Repeatability: `edgekit profile` twice in a row, REPEATS times; two p50 of more than 0.2 ms have to be within 5 %.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from edgekit.artifacts import bare as artifacts_bare
from edgekit.artifacts.bundles import Bundle
from edgekit.commands import export as pipeline
from edgekit.commands import profile
from edgekit.measuring import outliers as steady
from edgekit.measuring.feeds import random_feeds
from edgekit.measuring.latency import Latency
from edgekit.runtimes import RUNTIMES, stopwatch, table

ROOT = Path(__file__).parents[1]
PROCESSES, BLOCKS, BLOCK_S = 4, 30, 0.1
REPEATS = 3
OVERHEAD_SHARE, OVERHEAD_US = 0.03, 5.0
REPEATED_SHARE, REPEATED_FROM_MS = 0.05, 0.2
Call = Callable[[], object]


def bare_onnx(path: str, feeds: list[np.ndarray]) -> Iterable[Call]:
    """ONNX Runtime's own run(), with the options that EdgeKit sets."""
    import onnxruntime

    from edgekit.runtimes.ort import session_options

    session = onnxruntime.InferenceSession(path, session_options(1), providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return [lambda feed=feed: session.run(None, {name: feed}) for feed in feeds]


def bare_executorch(path: str, feeds: list[np.ndarray]) -> Iterable[Call]:
    """ExecuTorch's method, on tensors that are there."""
    import torch
    from executorch.extension.pybindings import _C

    program = _C._load_program(path)
    method = program.load_method("forward")
    tensors = [[torch.from_numpy(feed)] for feed in feeds]
    return [lambda given=given: (method.call(given, clone_outputs=False), program)[0] for given in tensors]


def bare_tflite(path: str, feeds: list[np.ndarray]) -> Iterable[Call]:
    """LiteRT's interpreter: input in, invoke, output out."""
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(model_path=path, num_threads=1)
    interpreter.allocate_tensors()
    given = interpreter.get_input_details()[0]["index"]
    taken = interpreter.get_output_details()[0]["index"]

    def call(feed: np.ndarray) -> np.ndarray:
        interpreter.set_tensor(given, feed)
        interpreter.invoke()
        return interpreter.get_tensor(taken)

    return [lambda feed=feed: call(feed) for feed in feeds]


BARE = {"onnx": bare_onnx, "executorch": bare_executorch, "tflite": bare_tflite}


def bare_runs(calls: list[Call], seconds: float) -> list[float]:
    """Milliseconds of each run in a plain loop."""
    clock = time.perf_counter_ns
    taken = []
    end = clock() + seconds * 1e9
    for call in itertools.cycle(calls):
        start = clock()
        call()
        stop = clock()
        taken.append((stop - start) / 1e6)
        if stop > end:
            break
    return taken


def edgekit_runs(sessions: list[Call], seconds: float) -> list[float]:
    """Milliseconds of each run as the worker times it."""
    cycle = itertools.cycle(sessions)
    return stopwatch.time_runs(lambda: next(cycle)(), warmup_runs=0, seconds=seconds, min_runs=20, max_runs=1_000_000)


def take_turns(path: Path) -> list[list[list[float]]]:
    """The runs, in ms, of BLOCKS turns in this process: bare and EdgeKit's."""
    import importlib

    format = table.format_of(path)
    runtime = importlib.import_module(f"edgekit.runtimes.{RUNTIMES[table.runtime_for(path)].module}")
    stopwatch.pin(1)
    session = runtime.load(str(path), threads=1)
    [info] = session.inputs
    feeds = list(random_feeds(artifacts_bare.bare(path).inputs)[0])
    ours = [session.prepared({info.name: feed}) for feed in feeds]
    bare = list(BARE[format](str(path), feeds))
    turns: list[list[list[float]]] = [[], []]
    for block in range(BLOCKS + 1):
        order = [(turns[0], bare_runs, bare), (turns[1], edgekit_runs, ours)]
        for taken, measured, calls in order if block % 2 else order[::-1]:
            taken.append(measured(calls, BLOCK_S))
    return [taken[1:] for taken in turns]  # the first warm up


def overhead(path: Path) -> tuple[float, float]:
    """The bare p50, and how much longer EdgeKit's is, in µs."""
    turns: list[list[list[float]]] = [[], []]
    for _ in range(PROCESSES):
        done = subprocess.run([sys.executable, __file__, "--turns", str(path)], capture_output=True, text=True)
        if done.returncode:
            sys.exit(done.stderr)
        for taken, found in zip(turns, json.loads(done.stdout.splitlines()[-1]), strict=True):
            taken += found
    bare, ours = (1e3 * steady.undisturbed(Latency(tuple(map(tuple, taken)), 1)).p50 for taken in turns)
    return bare, ours - bare


def repeated(path: Path) -> list[tuple[float, float]]:
    """The p50 in ms of two profiles in a row, REPEATS times."""
    pairs = []
    for _ in range(REPEATS):
        first, second = (profile.profile(path).latency for _ in range(2))
        pairs.append((first.p50, second.p50))
    return pairs


def export(name: str, folder: Path) -> list[Bundle]:
    """The network at fp32 and int8, in every format."""
    if name == "example":
        example = ROOT / "examples/fashion_mnist"
        model: Any = str(example / "model.pt")
        options: dict[str, Any] = {"code": str(example / "model.py"), "data": str(example / "data.npz")}
    else:
        import networks
        import torch

        images = np.random.default_rng(0).standard_normal((32, 3, 224, 224)).astype("float32")
        model, _ = networks.load(name, torch.from_numpy(images))
        options = {"data": {"x": images}}
    return [
        pipeline.export(model, target="x86", precision=precision, out=folder / precision, name=name, **options)
        for precision in ("fp32", "int8")
    ]


def main() -> None:
    """Measure every file of every network."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", metavar="NETWORK", default=["example", "mobilenet_v2"])
    parser.add_argument("--turns", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.turns:
        print(json.dumps(take_turns(given.turns)))
        return
    print(f"{'file':34}{'bare p50 µs':>12}{'overhead µs':>13}{'%':>8}       p50 in ms, twice in a row")
    for name in given.networks:
        with TemporaryDirectory(prefix="edgekit-") as folder:
            for bundle in export(name, Path(folder)):
                for artifact in bundle.artifacts:
                    bare, more = overhead(artifact.path)
                    cheap = more < OVERHEAD_US or more < OVERHEAD_SHARE * bare
                    pairs = repeated(artifact.path)
                    worst = max(abs(b / a - 1) for a, b in pairs)
                    steady = worst < REPEATED_SHARE or min(map(min, pairs)) < REPEATED_FROM_MS
                    print(
                        f"{name} {artifact.format} {artifact.precision}".ljust(34)
                        + f"{bare:12.1f}{more:+13.2f}{100 * more / bare:+8.2f}  {'ok' if cheap else 'over':6}"
                        + " ".join(f"{a:.3f}/{b:.3f}" for a, b in pairs)
                        + f"  worst {100 * worst:.1f} %  {'ok' if steady else 'over'}",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
