"""Every form of data, and what is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from edgekit.compression import compress
from edgekit.data import sources
from edgekit.data.sources import CALIBRATION_SAMPLES, Batch, Data
from edgekit.errors import EdgeKitError
from edgekit.loading.model import Model
from edgekit.measuring.evaluation import whole
from edgekit.types import TensorSpec

IMAGE = (TensorSpec("image", "float32", (1, 3, 4, 4)),)


def everything(stream: Any, inputs: tuple[TensorSpec, ...] = IMAGE) -> tuple[list[np.ndarray], np.ndarray | None]:
    """All real samples of a stream as the model gets them, one array per input, and their targets."""
    parts, targets = [], []
    for arrays, real, target in sources.batches(stream, inputs):
        assert [array.shape for array in arrays] == [spec.shape for spec in inputs]
        assert [array.dtype.name for array in arrays] == [spec.dtype for spec in inputs]
        parts.append([array[:real] for array in arrays])
        targets += [] if target is None else [target[:real]]
    return [np.concatenate(p) for p in zip(*parts, strict=True)], np.concatenate(targets) if targets else None


def floats(count: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(count).standard_normal((count, *shape)).astype(np.float32)


def save(path: Path, **arrays: Any) -> Path:
    np.savez(path, **arrays)
    return path


def test_npz_of_x_and_y(tmp_path: Path) -> None:
    x, y = floats(7, 3, 4, 4), np.arange(7)
    data = sources.load(save(tmp_path / "d.npz", x=x, y=y))
    got, target = everything(data.evaluation)
    assert np.array_equal(got[0], x)
    assert np.array_equal(target, y)
    assert data.example()[0].shape == (1, 3, 4, 4)
    assert data.shared is not None and "calib_x" in data.shared


@pytest.mark.parametrize("names", [("ids", "mask"), ("x", "mask"), ("mask", "x")])
def test_npz_of_named_inputs_goes_by_name_not_by_order(names: tuple[str, str], tmp_path: Path) -> None:
    ids, mask = np.arange(12).reshape(4, 3), np.ones((4, 3), bool)
    arrays = dict(zip(names, (ids, mask), strict=True))
    specs = (TensorSpec(names[0], "int32", (2, 3)), TensorSpec(names[1], "bool", (2, 3)))
    for order in (1, -1):
        data = sources.load(save(tmp_path / "d.npz", **dict(list(arrays.items())[::order])))
        (first, second), _ = everything(data.evaluation, specs)
        assert np.array_equal(first, ids)
        assert np.array_equal(second, mask)


def test_npz_images_are_scaled_and_normalized_per_channel(tmp_path: Path) -> None:
    x = np.random.default_rng(0).integers(0, 256, (5, 3, 4, 4), dtype=np.uint8)
    mean, std = np.array([0.1, 0.2, 0.3]), np.array([0.5, 0.6, 0.7])
    data = sources.load(save(tmp_path / "d.npz", x=x, calib_x=x[:2], mean=mean, std=std, labels=["cat", "dog"]))
    expected = (x / 255 - mean.reshape(1, 3, 1, 1)) / std.reshape(1, 3, 1, 1)
    assert np.allclose(everything(data.evaluation)[0][0], expected, atol=1e-6)
    assert np.allclose(everything(data.calibration)[0][0], expected[:2], atol=1e-6)
    assert data.labels == ("cat", "dog")
    assert data.preprocessing.to_dict() == {
        "scale": 1 / 255, "mean": pytest.approx(mean), "std": pytest.approx(std), "layout": "NCHW"
    }  # fmt: skip
    assert not data.notes
    plain = sources.load(save(tmp_path / "e.npz", x=x))
    assert np.allclose(everything(plain.evaluation)[0][0], x / 255)
    assert any("not normalized" in note for note in plain.notes)
    given = sources.load(save(tmp_path / "e.npz", x=x), mean=(0.5,), std=(0.5,))
    assert np.allclose(everything(given.evaluation)[0][0], (x / 255 - 0.5) / 0.5, atol=1e-6)


def test_floats_are_fed_as_they_are_and_left_aside_statistics_are_told(tmp_path: Path) -> None:
    x = floats(3, 3, 4, 4)
    data = sources.load(save(tmp_path / "d.npz", x=x, mean=[0.5], std=[0.5]))
    assert np.array_equal(everything(data.evaluation)[0][0], x)
    assert any("left aside" in note for note in data.notes)


def test_a_lone_npy_array_is_x(tmp_path: Path) -> None:
    np.save(tmp_path / "d.npy", floats(3, 3, 4, 4))
    assert everything(sources.load(tmp_path / "d.npy").evaluation)[0][0].shape == (3, 3, 4, 4)


def test_pt_of_tensors(tmp_path: Path) -> None:
    x = torch.from_numpy(floats(3, 3, 4, 4)).requires_grad_()
    torch.save({"x": x, "y": torch.arange(3)}, tmp_path / "d.pt")
    got, target = everything(sources.load(tmp_path / "d.pt").evaluation)
    assert np.array_equal(got[0], x.detach().numpy())
    assert target.tolist() == [0, 1, 2]
    torch.save(x.detach().bfloat16(), tmp_path / "half.pt")
    assert np.allclose(everything(sources.load(tmp_path / "half.pt").evaluation)[0][0], x.detach(), atol=0.02)


def picture(path: Path, color: tuple[int, int, int], size: tuple[int, int] = (20, 30)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path)


def test_folder_of_class_folders(tmp_path: Path) -> None:
    picture(tmp_path / "cats" / "b.png", (255, 0, 0))
    picture(tmp_path / "cats" / "deep" / "a.jpg", (250, 0, 0), (50, 10))
    picture(tmp_path / "dogs" / "c.png", (0, 0, 255))
    (tmp_path / ".hidden").mkdir()
    (tmp_path / "dogs" / "notes.txt").write_text("no picture")
    data = sources.load(tmp_path, image_size=(3, 4, 4))
    got, target = everything(data.evaluation)
    assert target.tolist() == [0, 0, 1]
    assert data.labels == ("cats", "dogs")
    assert np.allclose(got[0][2, :, 0, 0], [0, 0, 1])
    assert got[0][:2, 0].min() > 0.9
    gray = (TensorSpec("image", "float32", (2, 1, 6, 4)),)
    assert everything(sources.load(tmp_path, image_size=(1, 6, 4)).evaluation, gray)[0][0].shape == (3, 1, 6, 4)


def test_numbered_class_folders_are_their_own_labels(tmp_path: Path) -> None:
    for name in ("2", "10", "7"):
        picture(tmp_path / name / "a.png", (0, 0, 0))
    data = sources.load(tmp_path, image_size=(3, 4, 4))
    assert sorted(everything(data.evaluation)[1].tolist()) == [2, 7, 10]
    assert data.labels == ()


X = floats(6, 3, 4, 4)
MADE = """
import torch

X = torch.load({path!r})
def as_list(): return [(X[:4], torch.arange(4)), (X[4:], torch.arange(4, 6))]
def as_generator():
    for i in range(6): yield X[i : i + 1], torch.tensor([i])
def as_tuple(): return [((X,), torch.arange(6))]
def as_dict(): return [({{"image": X}}, torch.arange(6))]
def as_loader(): return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X, torch.arange(6)), batch_size=4)
def no_labels(): return [(X, None)]
ready = as_list()
"""


@pytest.mark.parametrize(
    "name", ["as_list", "as_generator", "as_tuple", "as_dict", "as_loader", "no_labels", "ready"]
)  # fmt: skip
def test_code_that_makes_batches(name: str, tmp_path: Path) -> None:
    torch.save(torch.from_numpy(X), tmp_path / "x.pt")
    code = tmp_path / f"made_{name}.py"
    code.write_text(MADE.format(path=str(tmp_path / "x.pt")))
    data = sources.load(f"{code}:{name}")
    for _ in range(2):  # read anew each time
        got, target = everything(data.evaluation)
        assert np.array_equal(got[0], X)
        assert target is None if name == "no_labels" else target.tolist() == list(range(6))


def test_a_generator_object_can_be_read_twice() -> None:
    data = sources.load((X[i : i + 1], None) for i in range(6))
    for stream in (data.calibration, data.evaluation, data.evaluation):
        assert np.array_equal(everything(stream)[0][0], X)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8, 13])
@pytest.mark.parametrize("labeled", [True, False])
def test_any_batches_become_batches_of_the_models_size(size: int, labeled: bool) -> None:
    """Split or padded, never dropped, never out of order: for random cuts of the samples."""
    rng = np.random.default_rng(size)
    spec = (TensorSpec("a", "float32", (size, 2)), TensorSpec("b", "int64", (size,)))
    for _ in range(20):
        count = int(rng.integers(1, 30))
        a, b = floats(count, 2), np.arange(count)
        cuts = [0, *sorted(rng.integers(0, count + 1, int(rng.integers(0, 6)))), count]
        stream = [Batch({0: a[i:j], 1: b[i:j]}, 10 * b[i:j] if labeled else None) for i, j in pairwise(cuts)]
        (got_a, got_b), target = everything(stream, spec)
        assert np.array_equal(got_a, a)
        assert np.array_equal(got_b, b)
        assert np.array_equal(target, 10 * b) if labeled else target is None
        last = list(sources.batches(stream, spec))[-1]
        assert (last[0][1][last[1] :] == count - 1).all()  # padding repeats the last sample


def test_calibration_is_spread_evenly_over_sorted_samples() -> None:
    y = np.repeat(np.arange(10), 300)
    data = sources.load({"x": y[:, None].astype(np.float32)})
    read = everything(data.calibration, (TensorSpec("x", "float32", (8, 1)),))[0][0][:, 0]
    assert len(read) == CALIBRATION_SAMPLES
    assert (np.abs(np.bincount(read.astype(int)) - CALIBRATION_SAMPLES / 10) <= 1).all()
    assert len(everything(data.evaluation, (TensorSpec("x", "float32", (8, 1)),))[0][0]) == len(y)


def test_calibration_streams() -> None:
    """Batches are made one at a time as calibration takes them, no further than it reads, and are let go of."""
    made: list[int] = []

    def endless() -> Iterator[tuple[np.ndarray, None]]:
        while True:
            made.append(len(made))
            yield floats(2, 3, 4, 4), None

    data = sources.load(endless)
    calibration = compress.Calibration(data, (TensorSpec("image", "float32", (4, 3, 4, 4)),))
    for _ in range(2):
        made.clear()
        seen = 0
        for seen, (batch,) in enumerate(calibration, start=1):
            assert len(made) <= 2 * seen
            assert batch.shape == (4, 3, 4, 4)
        assert seen == CALIBRATION_SAMPLES / 4
    assert sum(len(batch) for batch in data.calibration) == CALIBRATION_SAMPLES


def test_memory_of_a_stream_does_not_grow() -> None:
    import weakref

    alive: list[weakref.ref] = []

    class Held(np.ndarray):
        pass

    def stream() -> Iterator[Batch]:
        for _ in range(100):
            array = floats(3, 2).view(Held)
            alive.append(weakref.ref(array))
            yield Batch({0: array}, None)

    for _ in sources.batches(stream(), (TensorSpec("x", "float32", (4, 2)),)):
        assert sum(ref() is not None for ref in alive) <= 3
    assert len(alive) == 100


NAN = np.where(np.arange(48).reshape(1, 3, 4, 4) == 7, np.nan, 1).astype(np.float32)
OBJECTS = np.array([{"a": 1}, None], dtype=object)


def bad_pickle(folder: Path) -> Path:
    np.savez(folder / "d.npz", x=OBJECTS)
    return folder / "d.npz"


def cut_short(folder: Path) -> Path:
    path = save(folder / "d.npz", x=floats(50, 3, 4, 4))
    path.write_bytes(path.read_bytes()[:-200])
    return path


def flipped(folder: Path) -> Path:
    path = save(folder / "d.npz", x=floats(50, 3, 4, 4))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    path.write_bytes(content)
    return path


def text(folder: Path, name: str, content: str) -> Path:
    (folder / name).write_text(content)
    return folder / name


def code(folder: Path, body: str) -> str:
    return f"{text(folder, 'made.py', body)}:make"


def pickled(folder: Path) -> Path:
    torch.save({"x": Path("x")}, folder / "d.pt")
    return folder / "d.pt"


def pictures(folder: Path, *, broken: bool = False, empty: bool = False) -> Path:
    picture(folder / "images" / "cats" / "a.png", (1, 2, 3))
    if broken:
        text(folder / "images" / "cats", "b.png", "no picture")
    if empty:
        (folder / "images" / "dogs").mkdir()
    return folder / "images"


def loads(source: Callable[[Path], Any], **options: Any) -> Callable[[Path], Data]:
    return lambda folder: sources.load(source(folder), **options)


REFUSED: dict[str, tuple[Callable[[Path], Data], str]] = {
    "missing": (loads(lambda f: f / "none.npz"), "no data at .*none.npz"),
    "no function": (loads(lambda f: text(f, "d.py", "")), "names a file but no function"),
    "text": (loads(lambda f: text(f, "d.npz", "hello")), "damaged, cut short, or no .npz"),
    "cut short": (loads(cut_short), "damaged, cut short"),
    "a flipped byte": (loads(flipped), "cannot be read"),
    "pickled objects": (loads(bad_pickle), "cannot be read: Object arrays"),
    "pickled .pt": (loads(pickled), "not a .pt file of plain tensors"),
    "another file": (loads(lambda f: text(f, "d.csv", "1,2")), "neither an .npz nor a .pt"),
    "images to calibrate floats": (
        loads(lambda f: {"x": X, "calib_x": np.zeros((2, 3, 4, 4), np.uint8)}), "x holds float32 and calib_x uint8"),
    "floats to calibrate images": (
        loads(lambda f: {"x": np.zeros((2, 3, 4, 4), np.uint8), "calib_x": X}), "x holds uint8 and calib_x float32"),
    "no inputs": (loads(lambda f: save(f / "d.npz", y=np.arange(3))), "has no inputs: it holds y"),
    "strings": (loads(lambda f: {"x": np.array(["a", "b"])}), "'x' of the given arrays is not a batch of numbers"),
    "ragged": (loads(lambda f: {"x": [[1], [1, 2]]}), "differ in length"),
    "a scalar": (loads(lambda f: {"x": 3}), "not a batch of numbers"),
    "no samples": (loads(lambda f: save(f / "d.npz", x=np.zeros((0, 3, 4, 4)))), "'x' .* holds no samples"),
    "nothing to calibrate on": (
        loads(lambda f: {"x": X, "calib_x": X[:0]}), "array 'calib_x' of the given arrays holds no samples"),
    "calib_x of one of two": (loads(lambda f: {"a": X, "b": X, "calib_x": X}), "does not tell which"),
    "labels of another length": (loads(lambda f: {"x": X, "y": np.arange(5)}), "differ in length: .*'x': 6, 'y': 5"),
    "inputs of other lengths": (loads(lambda f: {"a": X, "b": X[:5]}), "differ in length"),
    "batch of other lengths": (loads(lambda f: [((X, X[:5]), None)]), "differ in length"),
    "a label too few": (loads(lambda f: [(X, np.arange(5))]), "6 samples with 5 labels"),
    "a batch without a label": (loads(lambda f: [(X[:3], np.arange(3)), (X, None)]), "9 samples but 3 labels"),
    "NaN": (loads(lambda f: {"x": NAN}), "input 'image' holds NaN"),
    "another shape": (loads(lambda f: {"x": floats(2, 1, 4, 4)}), "samples are 1x4x4, .* takes 3x4x4"),
    "too many inputs": (loads(lambda f: {"a": X, "b": X}), "has 2 inputs, the model takes 1: image"),
    "another name": (loads(lambda f: {"picture": X}), "lacks the model's input 'image'; it has picture"),
    "mean without std": (loads(lambda f: {"x": X}, mean=(0.5,)), "both a mean and a standard deviation"),
    "std in the file alone": (
        loads(lambda f: {"x": np.zeros((2, 3, 4, 4), np.uint8), "std": [1.0]}), "both a mean and a standard"),
    "std of zero": (loads(lambda f: {"x": X}, mean=(0.5,), std=(0.0,)), "above zero"),
    "mean of NaN": (loads(lambda f: {"x": X}, mean=(float("nan"),), std=(1.0,)), "must be finite"),
    "two means for three channels": (
        loads(lambda f: {"x": np.zeros((2, 3, 4, 4), np.uint8)}, mean=(1, 2), std=(1, 2)), "2 values, .* 3 channels"),
    "mean of floats": (loads(lambda f: {"x": X}, mean=(0.5,), std=(0.5,)), "normalize uint8 images"),
    "mean of an iterable": (loads(lambda f: [(X, None)], mean=(0.5,), std=(0.5,)), "normalize uint8 images"),
    "a number": (loads(lambda f: 5), "not an iterable"),
    "an empty list": (loads(lambda f: []), "gave no samples"),
    "an empty batch": (loads(lambda f: [((), None)]), "a batch without inputs"),
    "no pairs": (loads(lambda f: [X]), r"pairs \(inputs, target\), not ndarray"),
    "a single sample": (loads(lambda f: [(X[0], 3)]), "batched along the first dimension"),
    "no such function": (loads(lambda f: code(f, "def other(): pass")), "has no 'make'"),
    "a function that fails": (loads(lambda f: code(f, "def make(): 1 / 0")), "line 1.*ZeroDivisionError"),
    "a function that exits": (loads(lambda f: code(f, "import sys\ndef make(): sys.exit(0)")), "SystemExit"),
    "a generator that fails": (
        loads(lambda f: code(f, "def make():\n    yield 1 / 0")), "line 2.*ZeroDivisionError"),
    "a function of nothing": (loads(lambda f: code(f, "def make(): pass")), "not an iterable"),
    "no images": (loads(lambda f: f, image_size=(3, 4, 4)), "no images in class folders"),
    "an unknown size": (loads(pictures), "does not tell the size"),
    "two channels": (loads(pictures, image_size=(2, 4, 4)), "1 or 3 channels, the model takes 2"),
    "a broken image": (loads(lambda f: pictures(f, broken=True), image_size=(3, 4, 4)), "b.png is not a readable"),
    "a class without images": (
        loads(lambda f: pictures(f, empty=True), image_size=(3, 4, 4)), "dogs holds no images"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str, tmp_path: Path) -> None:
    make, message = REFUSED[case]
    with pytest.raises(EdgeKitError, match=message) as caught:
        data = make(tmp_path)
        everything(data.calibration)
        original = Model(torch.nn.Identity(), "m", "object", IMAGE, IMAGE, (), (), None)
        whole(data, original)
    assert caught.value.help


@pytest.mark.parametrize(
    ("array", "dtype", "message"),
    [
        (np.array([[300]]), "uint8", "outside uint8"),
        (np.array([[-1]]), "uint8", "outside uint8"),
        (np.array([[0.5]]), "int64", "takes int64, but the data holds float64"),
    ],
)
def test_numbers_that_a_type_cannot_hold_are_refused(array: np.ndarray, dtype: str, message: str) -> None:
    with pytest.raises(EdgeKitError, match=message):
        sources.conform(array, TensorSpec("x", dtype, (1, 1)))


def test_tokens_are_cast_where_nothing_is_lost() -> None:
    got = sources.conform(np.array([[5, 7]], dtype=np.int64), TensorSpec("ids", "int32", (1, 2)))
    assert got.dtype == np.int32
    assert got.tolist() == [[5, 7]]
