"""Recurrent networks in every format: sizes against their weights, times against ONNX Runtime, nearness to PyTorch.

    python benchmarks/recurrent.py [--steps N] [--precision fp32|int8|int8-dynamic|int8-weight-only] [NETWORK …]

Files are timed in turn, one run each, in one process on one thread; the fastest of all turns counts. Memory is the
peak of the process that lowered them so far.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import nn

from edgekit.exporters.executorch.lower import to_executorch
from edgekit.exporters.onnx.export import to_onnx
from edgekit.exporters.tflite import convert
from edgekit.quant.ptq.recipes import RECIPES
from edgekit.runtimes import litert, ort, pte
from edgekit.runtimes.session import Session

TURNS = 30
WARM_UP = 3


class Last(nn.Module):
    """Gives all outputs of a layer and none of its states."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x is [batch, steps, features]."""
        return self.layer(x)[0]


# network → its layer, and the features of a step
NETWORKS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "gru-64": (lambda: nn.GRU(64, 64, batch_first=True), 64),
    "gru-128": (lambda: nn.GRU(128, 128, batch_first=True), 128),
    "gru-2x400": (lambda: nn.GRU(400, 400, 2, batch_first=True), 400),
    "lstm-128": (lambda: nn.LSTM(128, 128, batch_first=True), 128),
    "lstm-3x256": (lambda: nn.LSTM(40, 256, 3, batch_first=True), 40),
    "lstm-two-ways": (lambda: nn.LSTM(64, 128, bidirectional=True, batch_first=True), 64),
    "rnn-256": (lambda: nn.RNN(64, 256, batch_first=True), 64),
}


@torch.no_grad()
def measure(name: str, steps: int, precision: str, folder: Path) -> None:
    """Prints a row for each format of a network."""
    make, features = NETWORKS[name]
    torch.manual_seed(0)
    module, x = Last(make()).eval(), torch.randn(1, steps, features)
    weights = sum(parameter.nbytes for parameter in module.parameters())
    expected, program = module(x).numpy(), RECIPES[precision].apply(module, (x,), [(x,)]).program
    proto = to_onnx(program, ["x"], ["y"])
    files = {"onnx": proto.SerializeToString(), "tflite": convert(proto)}
    started = time.perf_counter()
    files["pte"] = to_executorch(program).data
    lowering = time.perf_counter() - started
    sessions: dict[str, Session] = {}
    for suffix, data in files.items():
        path = folder / f"{name}.{suffix}"
        path.write_bytes(data)
        load = {"onnx": ort.load, "tflite": litert.load, "pte": pte.load}[suffix]
        sessions[suffix] = load(str(path), threads=1, inputs=["x"], outputs=["y"])
    feeds, best = {"x": x.numpy()}, dict.fromkeys(files, float("inf"))
    for turn in range(WARM_UP + TURNS):
        for suffix, session in sessions.items():
            started = time.perf_counter()
            session.run(feeds)
            if turn >= WARM_UP:
                best[suffix] = min(best[suffix], time.perf_counter() - started)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    for suffix, session in sessions.items():
        ratio, size = best[suffix] / best["onnx"], len(files[suffix]) / weights
        error = np.abs(session.run(feeds)["y"] - expected)
        decibel = 10 * np.log10(np.square(expected).sum() / max(np.square(error).sum(), 1e-30))
        print(
            f"{name:14} {precision:16} {suffix:7} size/weights {size:5.2f}  "
            f"{1e3 * best[suffix]:8.3f} ms  time/ONNX Runtime {ratio:5.2f}  SQNR {decibel:6.1f} dB"
        )
    print(f"{name:14} {precision:16} lowering to ExecuTorch {lowering:.1f} s, peak {peak:.0f} MB", flush=True)


def main() -> None:
    """Measures the networks named on the command line, or all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", default=list(NETWORKS), metavar="NETWORK", help=", ".join(NETWORKS))
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--precision", default="fp32", choices=("fp32", "int8", "int8-dynamic", "int8-weight-only"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        for name in given.networks:
            measure(name, given.steps, given.precision, Path(folder))


if __name__ == "__main__":
    main()
