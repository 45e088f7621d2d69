"""The example that the repository carries: its checkpoints, its data, and the reader that makes them anew."""

import gzip
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from edgekit.errors import EdgeKitError
from edgekit.examples import fashion_mnist
from edgekit.examples.fashion_mnist.model import FashionNet, LeNet
from edgekit.examples.fashion_mnist.train import (
    LABELS,
    PLANS,
    Split,
    augment,
    balanced,
    normalize,
    read_idx,
    read_split,
    statistics,
    train,
)

FOLDER = Path(fashion_mnist.__file__).parent
# File, network, whether the file is a checkpoint dict, least top-1 accuracy on data.npz.
CHECKPOINTS = {
    "model.pt": (FashionNet, True, 0.91),
    "lenet.pt": (LeNet, False, 0.88),
}
ARRAYS = {
    "x": (np.uint8, (2000, 1, 28, 28)),
    "y": (np.int64, (2000,)),
    "calib_x": (np.uint8, (512, 1, 28, 28)),
    "calib_y": (np.int64, (512,)),
    "mean": (np.float32, (1,)),
    "std": (np.float32, (1,)),
    "labels": (np.str_, (10,)),
}


@pytest.fixture(scope="module")
def data() -> dict[str, np.ndarray]:
    with np.load(FOLDER / "data.npz", allow_pickle=False) as archive:
        return dict(archive)


def test_every_checkpoint_is_in_the_table() -> None:
    assert {path.name for path in FOLDER.glob("*.pt")} == set(CHECKPOINTS)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_checkpoint_loads_and_is_accurate(name: str, data: dict[str, np.ndarray]) -> None:
    network, is_checkpoint, bound = CHECKPOINTS[name]
    stored = torch.load(FOLDER / name, weights_only=True)
    if is_checkpoint:
        assert set(stored) == {"state_dict", "epoch", "test_accuracy"}
        assert stored["test_accuracy"] >= bound
        stored = stored["state_dict"]
    model = network()
    model.load_state_dict(stored, strict=True)
    with torch.inference_mode():
        logits = model.eval()(normalize(data["x"], data["mean"][0], data["std"][0]))
    assert (logits.argmax(1).numpy() == data["y"]).mean() >= bound


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_checkpoint_is_small(name: str) -> None:
    assert (FOLDER / name).stat().st_size <= 1_000_000


def test_data_has_the_promised_arrays(data: dict[str, np.ndarray]) -> None:
    assert set(data) == set(ARRAYS)
    for name, (dtype, shape) in ARRAYS.items():
        assert np.issubdtype(data[name].dtype, dtype), name
        assert data[name].shape == shape, name
    assert tuple(data["labels"]) == LABELS


def test_test_images_are_balanced_and_calibration_covers_every_class(data: dict[str, np.ndarray]) -> None:
    assert np.bincount(data["y"], minlength=10).tolist() == [200] * 10
    assert (np.bincount(data["calib_y"], minlength=10) > 20).all()


def test_calibration_shares_no_image_with_the_test(data: dict[str, np.ndarray]) -> None:
    assert not {image.tobytes() for image in data["x"]} & {image.tobytes() for image in data["calib_x"]}


def test_normalization_standardizes_the_images(data: dict[str, np.ndarray]) -> None:
    images = normalize(data["calib_x"], data["mean"][0], data["std"][0])
    assert abs(float(images.mean())) < 0.05
    assert abs(float(images.std()) - 1) < 0.05


def test_statistics_match_numpy() -> None:
    images = np.random.default_rng(0).integers(0, 256, (5, 1, 28, 28), dtype=np.uint8)
    assert np.allclose(statistics(images), [(images / 255).mean(), (images / 255).std()], rtol=1e-6)


def test_balanced_takes_as_many_of_each_class_without_repeats() -> None:
    y = np.random.default_rng(0).integers(0, 3, 100)
    chosen = balanced(y, 7, np.random.default_rng(1))
    assert len(set(chosen)) == 21
    assert np.bincount(y[chosen]).tolist() == [7, 7, 7]


def test_augment_shifts_within_bounds_and_mirrors() -> None:
    image = torch.zeros(1, 1, 9, 9)
    image[..., 4, 2] = 1
    result = augment(image.expand(400, 1, 9, 9), 2, torch.Generator().manual_seed(0))
    assert result.shape == (400, 1, 9, 9)
    positions = {tuple(position) for position in result[:, 0].nonzero()[:, 1:].tolist()}
    assert positions == {(row, column) for row in range(2, 7) for column in range(9)}


def idx(shape: tuple[int, ...], payload: bytes, kind: int = 0x08) -> bytes:
    return struct.pack(f">BBBB{len(shape)}I", 0, 0, kind, len(shape), *shape) + payload


def test_idx_reader_reads_what_was_written(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (3, 4, 5), dtype=np.uint8)
    path = tmp_path / "images.gz"
    path.write_bytes(gzip.compress(idx(images.shape, images.tobytes())))
    assert read_idx(path).dtype == np.uint8
    assert np.array_equal(read_idx(path), images)


DAMAGED: dict[str, tuple[Callable[[], bytes], str]] = {
    "too few bytes": (lambda: gzip.compress(idx((3, 4), bytes(11))), "12 bytes announced, 11 found"),
    "too many bytes": (lambda: gzip.compress(idx((3, 4), bytes(13))), "12 bytes announced, 13 found"),
    "half a header": (lambda: gzip.compress(idx((3, 4), b"")[:10]), "truncated within its header"),
    "empty": (lambda: gzip.compress(b""), "no IDX file"),
    "another magic": (lambda: gzip.compress(b"PNG!" + bytes(12)), "no IDX file"),
    "floats": (lambda: gzip.compress(idx((2,), bytes(8), kind=0x0D)), "type 0x0d"),
    "truncated gzip": (lambda: gzip.compress(idx((30, 40), bytes(range(240)) * 5))[:-12], "cannot read"),
    "no gzip": (lambda: idx((3, 4), bytes(12)), "cannot read"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_idx_reader_rejects_a_damaged_file(case: str, tmp_path: Path) -> None:
    content, message = DAMAGED[case]
    path = tmp_path / "damaged.gz"
    path.write_bytes(content())
    with pytest.raises(EdgeKitError, match=message) as caught:
        read_idx(path)
    assert str(path) in caught.value.what
    assert caught.value.help


def test_idx_reader_names_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(EdgeKitError, match=r"nowhere\.gz"):
        read_idx(tmp_path / "nowhere.gz")


def test_read_split_rejects_what_is_not_fashion_mnist(tmp_path: Path) -> None:
    images, labels = tmp_path / "t10k-images-idx3-ubyte.gz", tmp_path / "t10k-labels-idx1-ubyte.gz"
    images.write_bytes(gzip.compress(idx((2, 28, 28), bytes(2 * 28 * 28))))
    labels.write_bytes(gzip.compress(idx((2,), bytes(2))))
    with pytest.raises(EdgeKitError, match=r"t10k has images \(2, 28, 28\) and labels \(2,\)"):
        read_split(tmp_path, "t10k")


@pytest.mark.parametrize("name", PLANS)
def test_training_learns_and_saves_its_checkpoint(name: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Two classes that differ in one quarter of the image are told apart after a few steps."""
    rng = np.random.default_rng(0)
    y = rng.integers(0, 2, 256)
    x = rng.integers(0, 50, (256, 1, 28, 28), dtype=np.uint8)
    x[y == 1, :, :14] += 200
    plan = replace(PLANS[name], epochs=4, batch=16)
    threads = torch.get_num_threads()
    try:
        train(0, 1, plan, (Split(x, y), Split(x, y)), 0, str(tmp_path / "meeting"), tmp_path)
    finally:
        torch.set_num_threads(threads)
    stored = torch.load(tmp_path / plan.file, weights_only=True)
    plan.network().load_state_dict(stored if plan.is_state_dict else stored["state_dict"], strict=True)
    printed = capsys.readouterr().out
    assert f"{plan.file} epoch 4/4" in printed
    score = float(printed.split("top-1 ")[1].split("%")[0])
    assert score > 95
    assert plan.is_state_dict or stored["test_accuracy"] == pytest.approx(score / 100, abs=1e-4)
    assert {path.name for path in tmp_path.iterdir()} - {"meeting"} == {plan.file}
