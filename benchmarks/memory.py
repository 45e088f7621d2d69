"""Peak memory of `edgekit compare` over the number of samples, and of `edgekit export` of a ViT-B.

    python benchmarks/memory.py compare --samples 1000,5000,20000
    python benchmarks/memory.py export --precision fp32,int8
    python benchmarks/memory.py --root OTHER_CHECKOUT export        the same with another version of EdgeKit

`compare` reads 3x224x224 images from a generator and compares a small network's .onnx and .tflite files with it;
with `--segment` the network gives outputs as large as its images. `export` exports a ViT-B (86 million parameters,
random weights) to all formats. Memory is that of the command's process and all that it starts, sampled every 20 ms: the
sum of their proportional set sizes (PSS), in which pages that processes share count once, and the largest resident set
(RSS) of one process. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

HERE = Path(__file__).resolve()
SAMPLES = "EDGEKIT_MEMORY_SAMPLES"  # how many images `images` gives
EVERY_S = 0.02
MB = 1e6


class Block(nn.Module):
    """A transformer's encoder layer with the norm in front."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Run on (batch, places, width)."""
        batch, count, width = x.shape
        qkv = self.qkv(self.norm1(x)).reshape(batch, count, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        attended = nn.functional.scaled_dot_product_attention(*qkv.unbind(0))
        x = x + self.out(attended.transpose(1, 2).reshape(batch, count, width))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """A vision transformer with patches of 16."""

    def __init__(
        self, width: int = 768, depth: int = 12, heads: int = 12, size: int = 224, classes: int = 1000
    ) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 16, 16)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.places = nn.Parameter(0.02 * torch.randn(1, (size // 16) ** 2 + 1, width))
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Run on images; class scores."""
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], dim=1) + self.places
        return self.head(self.norm(self.blocks(x))[:, 0])


def vit_b() -> nn.Module:
    """Returns a ViT-B/16 with random weights."""
    torch.manual_seed(0)
    return ViT().eval()


def classifier() -> nn.Module:
    """Returns a small network that is quick at 224x224."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 4, 1), nn.ReLU(), nn.Conv2d(8, 16, 3, 4, 1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10),
    ).eval()  # fmt: skip


def segmenter() -> nn.Module:
    """Returns a small network with an output of four classes at each pixel."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 1)).eval()


def images() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yields random images and labels."""
    generator = torch.Generator().manual_seed(0)
    for start in range(0, int(os.environ[SAMPLES]), 20):
        yield torch.rand(20, 3, 224, 224, generator=generator), torch.arange(start, start + 20) % 10


def masks() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yields random images and a class for each of their pixels."""
    for pictures, labels in images():
        yield pictures, (labels % 4)[:, None, None].expand(-1, 224, 224)


def peak(arguments: Sequence[str], root: Path, samples: int) -> tuple[float, float, float]:
    """Runs EdgeKit's command line; returns the peaks of all its processes' PSS and of the largest RSS, and seconds."""
    environment = {**os.environ, "PYTHONPATH": str(root), SAMPLES: str(samples), "OMP_NUM_THREADS": "1"}
    start = time.monotonic()
    command = [sys.executable, "-m", "edgekit", *arguments]
    process = subprocess.Popen(command, cwd=root, env=environment, stdout=subprocess.DEVNULL)
    together = largest = 0.0
    while process.poll() is None:
        found = [_memory(pid) for pid in _family(process.pid)]
        together = max(together, sum(pss for pss, _ in found))
        largest = max([largest, *(rss for _, rss in found)])
        time.sleep(EVERY_S)
    if process.returncode:
        sys.exit(f"edgekit {' '.join(arguments)} ended with {process.returncode}")
    return together, largest, time.monotonic() - start


def _family(pid: int) -> list[int]:
    """A process and all that descend from it."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []
    return [pid, *(other for child in children for other in _family(int(child)))]


def _memory(pid: int) -> tuple[float, float]:
    """The proportional and the resident set size of a process in bytes."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0.0, 0.0
    sizes = {line.split(":")[0]: float(line.split()[1]) * 1024 for line in lines[1:]}
    return sizes["Pss"], sizes["Rss"]


def compare(options: argparse.Namespace, folder: Path, table: Table) -> None:
    """Adds a row for each number of samples."""
    network, data = ("segmenter", "masks") if options.segment else ("classifier", "images")
    model = f"{HERE}:{network}"
    given = [model, "--input", "1x3x224x224", "--data", f"{HERE}:{data}"]
    peak(
        ["export", *given, "--target", "x86", "--format", "onnx,tflite", "--precision", "fp32", "--out", str(folder)],
        options.root,
        20,
    )
    (bundle,) = folder.iterdir()
    metric = ["--metric", "miou"] if options.segment else []
    for samples in map(int, options.samples.split(",")):
        arguments = ["compare", given[0], str(bundle), *given[1:], *metric, "--no-cache", "--rounds", "1"]
        found = peak(arguments, options.root, samples)
        table.add_row(f"compare, {samples:,} images", *_cells(found), "")


def export(options: argparse.Namespace, folder: Path, table: Table) -> None:
    """Adds a row for each precision."""
    size = 4 * sum(parameter.numel() for parameter in vit_b().parameters())
    for precision in options.precision.split(","):
        given = ["--data", f"{HERE}:images"] if precision == "int8" else []
        arguments = ["export", f"{HERE}:vit_b", "--input", "1x3x224x224", "--target", "android", *given]
        arguments += ["--format", options.format, "--precision", precision, "--out", str(folder / precision)]
        found = peak(arguments, options.root, 20)
        table.add_row(f"export at {precision}", *_cells(found), f"{found[0] / size:.1f}")


def _cells(found: tuple[float, float, float]) -> list[str]:
    return [f"{found[0] / MB:,.0f}", f"{found[1] / MB:,.0f}", f"{found[2]:.0f}"]


def main() -> None:
    """Parses the command line and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=HERE.parents[1], help="a checkout of EdgeKit (this one)")
    jobs = parser.add_subparsers(required=True)
    comparing = jobs.add_parser("compare")
    comparing.add_argument("--samples", default="1000,5000,20000", help="numbers of images (%(default)s)")
    comparing.add_argument("--segment", action="store_true", help="outputs as large as the images")
    comparing.set_defaults(run=compare)
    exporting = jobs.add_parser("export")
    exporting.add_argument("--precision", default="fp32,int8", help="%(default)s")
    exporting.add_argument("--format", default="executorch,onnx,tflite", help="%(default)s")
    exporting.set_defaults(run=export)
    options = parser.parse_args()
    table = Table("command", "all processes, MB", "largest, MB", "s", "times the weights")
    with TemporaryDirectory() as folder:
        options.run(options, Path(folder), table)
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
