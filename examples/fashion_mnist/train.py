"""Make every file of the Fashion-MNIST example anew: both checkpoints and data.npz; or full.npz, to train on.

`python -m edgekit.examples.fashion_mnist.train --out examples/fashion_mnist`, from a checkout of the repository.
"""

import argparse
import gzip
import math
import os
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from edgekit.errors import EdgeKitError

from .model import FashionNet, LeNet

DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
LABELS = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
TEST_PER_CLASS = 200
CALIBRATION_IMAGES = 512
IMAGES = {"train": 60_000, "t10k": 10_000}
IDX_UINT8 = 0x08


@dataclass(frozen=True)
class Plan:
    """How one network is trained, and the file that it becomes."""

    network: Callable[[], nn.Module]
    file: str
    epochs: int
    learning_rate: float
    is_state_dict: bool  # a plain state_dict; otherwise a checkpoint that holds it beside epoch and accuracy
    batch: int = 128
    weight_decay: float = 0.02
    label_smoothing: float = 0.05
    max_shift: int = 2


PLANS = {
    "fashion": Plan(FashionNet, "model.pt", epochs=10, learning_rate=6e-3, is_state_dict=False),
    "lenet": Plan(LeNet, "lenet.pt", epochs=12, learning_rate=3e-3, is_state_dict=True, max_shift=1),
}


@dataclass(frozen=True)
class Split:
    """Images uint8 (N, 1, 28, 28) and their classes int64 (N,)."""

    x: np.ndarray
    y: np.ndarray


def read_idx(path: Path) -> np.ndarray:
    """Return the uint8 array of a gzipped IDX file (format: http://yann.lecun.com/exdb/mnist/, at its end).

    Raises EdgeKitError when the file is missing, is no gzip file, holds other than unsigned bytes, or holds more or
    fewer bytes than its header says.
    """
    help_text = "give the folder of the four Fashion-MNIST .gz files with --idx, or install dataset-fashion-mnist"
    try:
        with gzip.open(path, "rb") as file:
            raw = file.read()
    except (OSError, EOFError, zlib.error) as error:
        raise EdgeKitError(f"cannot read {path}: {error}", help_text) from error
    if len(raw) < 4 or raw[:2] != b"\0\0":
        raise EdgeKitError(f"{path} is no IDX file: it must begin with two zero bytes", help_text)
    if raw[2] != IDX_UINT8:
        raise EdgeKitError(f"{path} holds IDX type 0x{raw[2]:02x}; only unsigned bytes (0x08) are known", help_text)
    header = 4 + 4 * raw[3]
    if len(raw) < header:
        raise EdgeKitError(f"{path} is truncated within its header of {header} bytes", help_text)
    shape = tuple(int(size) for size in np.frombuffer(raw, ">u4", raw[3], 4))
    if len(raw) - header != math.prod(shape):
        raise EdgeKitError(
            f"{path} is truncated or damaged: {math.prod(shape)} bytes announced, {len(raw) - header} found", help_text
        )
    return np.frombuffer(raw, np.uint8, offset=header).reshape(shape)


def read_split(folder: Path, name: str) -> Split:
    """Return the split `name` ("train" or "t10k"); raises EdgeKitError when its two files do not fit together."""
    images = read_idx(folder / f"{name}-images-idx3-ubyte.gz")
    labels = read_idx(folder / f"{name}-labels-idx1-ubyte.gz")
    count = IMAGES[name]
    if images.shape != (count, 28, 28) or labels.shape != (count,) or labels.max() >= len(LABELS):
        raise EdgeKitError(
            f"{folder}: {name} has images {images.shape} and labels {labels.shape} up to {labels.max(initial=0)}",
            f"Fashion-MNIST has {count} images of 28x28 pixels there, and labels 0 to 9",
        )
    return Split(images[:, None].copy(), labels.astype(np.int64))


def statistics(x: np.ndarray) -> tuple[np.float32, np.float32]:
    """Return mean and standard deviation of the pixels, after scaling uint8 to 0..1."""
    histogram = np.bincount(x.ravel(), minlength=256) / x.size
    levels = np.arange(256) / 255
    mean = (histogram * levels).sum()
    return np.float32(mean), np.float32(np.sqrt((histogram * (levels - mean) ** 2).sum()))


def normalize(x: np.ndarray, mean: np.float32, std: np.float32) -> torch.Tensor:
    """Return (x / 255 - mean) / std as float32, of the shape of `x`."""
    return torch.from_numpy((x.astype(np.float32) / 255 - mean) / std)


def balanced(y: np.ndarray, per_class: int, rng: np.random.Generator) -> np.ndarray:
    """Return the sorted indices of `per_class` random items of each class of `y`."""
    chosen = [rng.choice(np.flatnonzero(y == label), per_class, replace=False) for label in np.unique(y)]
    return np.sort(np.concatenate(chosen))


def augment(x: torch.Tensor, max_shift: int, generator: torch.Generator) -> torch.Tensor:
    """Shift each image of (N, 1, H, W) by up to `max_shift` pixels and mirror every other one, at random."""
    n, _, height, width = x.shape
    edge = float(x.min())  # the normalized value of black
    windows = F.pad(x, (max_shift,) * 4, value=edge).unfold(2, height, 1).unfold(3, width, 1)
    dy, dx = torch.randint(0, 2 * max_shift + 1, (2, n), generator=generator)
    shifted = windows[torch.arange(n), :, dy, dx]
    mirror = torch.rand(n, generator=generator) < 0.5
    return torch.where(mirror[:, None, None, None], shifted.flip(3), shifted)


@torch.inference_mode()
def accuracy(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> float:
    """Return the top-1 accuracy of `model` on normalized images `x`, between 0 and 1."""
    model.eval()
    predictions = torch.cat([model(part).argmax(1) for part in x.split(500)])
    model.train()
    return float((predictions == y).double().mean())


def train(
    rank: int, processes: int, plan: Plan, splits: tuple[Split, Split], seed: int, meeting: str, out: Path
) -> None:
    """Train one network as process `rank` of `processes`, each on its share of every batch; rank 0 saves it.

    `splits` are the training and the test images; `meeting` names a file, not yet there, where the processes meet.
    """
    torch.set_num_threads(1)  # PyTorch's small convolutions gain more from one process per core than from threads
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=processes)
    train_split, test_split = splits
    mean, std = statistics(train_split.x)
    x, y = normalize(train_split.x, mean, std), torch.from_numpy(train_split.y)

    torch.manual_seed(seed)
    model = plan.network()
    parallel = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), plan.learning_rate, weight_decay=plan.weight_decay)
    steps = len(x) // plan.batch
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, plan.learning_rate, plan.epochs * steps, pct_start=0.2)
    shuffling = torch.Generator().manual_seed(seed)  # alike in all processes, so that their shares are disjoint
    augmenting = torch.Generator().manual_seed(seed + 1 + rank)
    torch.manual_seed(seed + 1 + rank)  # for dropout
    started = time.monotonic()
    for epoch in range(1, plan.epochs + 1):
        total = 0.0
        order = torch.randperm(len(x), generator=shuffling)[: steps * plan.batch]
        for batch in order.split(plan.batch):
            share = batch[rank::processes]
            logits = parallel(augment(x[share], plan.max_shift, augmenting))
            loss = F.cross_entropy(logits, y[share], label_smoothing=plan.label_smoothing)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += float(loss.detach())
        if rank == 0:
            seconds = time.monotonic() - started
            print(f"{plan.file} epoch {epoch}/{plan.epochs}: loss {total / steps:.4f}, {seconds:.0f} s", flush=True)
    if rank == 0:
        # The test images choose nothing: no epoch, no setting; they are looked at once, here.
        score = accuracy(model, normalize(test_split.x, mean, std), torch.from_numpy(test_split.y))
        state = model.state_dict()
        checkpoint = {"state_dict": state, "epoch": plan.epochs, "test_accuracy": score}
        write(out / plan.file, lambda file: torch.save(state if plan.is_state_dict else checkpoint, file))
        print(f"{plan.file}: top-1 {score:.2%} of the {len(test_split.y)} test images", flush=True)
    dist.barrier()
    dist.destroy_process_group()


def write_data(train_split: Split, test_split: Split, seed: int, out: Path) -> None:
    """Write data.npz: a class-balanced part of the test images, calibration images, normalization and labels."""
    rng = np.random.default_rng(seed)
    test = balanced(test_split.y, TEST_PER_CLASS, rng)
    calibration = rng.choice(len(train_split.y), CALIBRATION_IMAGES, replace=False)
    mean, std = statistics(train_split.x)
    arrays = {
        "x": test_split.x[test],
        "y": test_split.y[test],
        "calib_x": train_split.x[calibration],
        "calib_y": train_split.y[calibration],
        "mean": np.array([mean]),
        "std": np.array([std]),
        "labels": np.array(LABELS),
    }
    write(out / "data.npz", lambda file: np.savez_compressed(file, allow_pickle=False, **arrays))
    print(f"data.npz: {len(test)} test images and {len(calibration)} calibration images")


def write_full(split: Split, out: Path) -> None:
    """Write full.npz: every training image, with its class and the normalization of data.npz."""
    mean, std = statistics(split.x)
    arrays = {"x": split.x, "y": split.y, "mean": np.array([mean]), "std": np.array([std])}
    write(out / "full.npz", lambda file: np.savez_compressed(file, allow_pickle=False, **arrays))
    print(f"full.npz: {len(split.y)} training images")


def write(path: Path, save: Callable[[IO[bytes]], None]) -> None:
    """Call `save` on a temporary file beside `path`, then rename it: `path` is whole or untouched."""
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        temporary = Path(file.name)
        try:
            save(file.file)
        except BaseException:
            temporary.unlink()
            raise
    temporary.chmod(0o644)
    temporary.replace(path)


def main() -> None:
    """Parse the command line and make what it names."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--idx", type=Path, default=DEBIAN_FOLDER, help="folder of the four .gz files (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path(), help="folder to write to (the current one)")
    parser.add_argument("--only", choices=[*PLANS, "data", "full"], help="make this one file")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=min(2, os.cpu_count() or 1), help="of training (%(default)s)")
    options = parser.parse_args()
    smallest_batch = min(plan.batch for plan in PLANS.values())
    if not 1 <= options.processes <= smallest_batch:
        parser.error(f"--processes must lie between 1 and the batch size, {smallest_batch}")
    if not options.out.is_dir():
        parser.error(f"--out {options.out} is no folder")
    try:
        splits = read_split(options.idx, "train"), read_split(options.idx, "t10k")
        if options.only in (None, "data"):
            write_data(*splits, options.seed, options.out)
        if options.only == "full":
            write_full(splits[0], options.out)
        for name, plan in PLANS.items():
            if options.only in (None, name):
                with tempfile.TemporaryDirectory() as scratch:
                    meeting = str(Path(scratch) / "meeting")
                    arguments = (options.processes, plan, splits, options.seed, meeting, options.out)
                    mp.spawn(train, arguments, nprocs=options.processes)
    except EdgeKitError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
