"""What users have as samples: images of every mode, arrays and tensors of every kind, and the forms they come in."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from kit import SHAPE, network, quick
from onnx import TensorProto, helper, numpy_helper
from PIL import Image, ImageOps
from torch import nn

import edgekit
from edgekit.data import sources
from edgekit.errors import EdgeKitError
from edgekit.loading import with_data
from edgekit.loading.pixel_scaling import onnx_scales_bytes, scales_bytes
from edgekit.measuring.running import run_module
from edgekit.util.user_code import import_code

RNG = np.random.default_rng(0)
BASE = RNG.integers(0, 256, (32, 32, 3)).astype(np.uint8)
WIDE = RNG.integers(0, 65536, (32, 32)).astype(np.uint16)


def base(mode: str) -> Image.Image:
    return Image.fromarray(BASE).convert("P").convert(mode) if mode == "PA" else Image.fromarray(BASE).convert(mode)


def sixteen(mode: str) -> Image.Image:
    return Image.frombytes(mode, (32, 32), WIDE.astype(">u2" if mode == "I;16B" else "<u2").tobytes())


def turned(path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    Image.fromarray(BASE).save(path, exif=exif, format="PNG")


def animated(path: Path) -> None:
    frames = [Image.fromarray(RNG.integers(0, 256, (32, 32, 3)).astype(np.uint8)) for _ in range(3)]
    frames[0].save(path, save_all=True, append_images=frames[1:])


def wide_colors(path: Path) -> None:
    """A PNG of three channels of 16 bits, which PIL cannot write."""
    import struct
    import zlib

    values = np.repeat(WIDE[..., None], 3, axis=2).astype(">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in values)

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = struct.pack(">IIBBBBB", 32, 32, 16, 2, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    )


def eight_bits() -> np.ndarray:
    """WIDE as shares of its range."""
    return np.rint(WIDE / 65535 * 255).astype(np.uint8)


# Name of the file → how it is written, and what is expected of it: an image as PIL or numpy gives it.
IMAGES: dict[str, tuple[Callable[[Path], object], Callable[[Path], Image.Image]]] = {
    **{
        f"{mode}.{suffix}": (lambda path, mode=mode: base(mode).save(path), Image.open)
        for mode, suffix in (
            ("1", "png"), ("L", "png"), ("L", "jpg"), ("LA", "png"), ("P", "png"), ("P", "gif"), ("PA", "tif"),
            ("RGB", "png"), ("RGB", "jpg"), ("RGB", "bmp"), ("RGB", "webp"), ("RGBA", "png"), ("CMYK", "jpg"),
            ("CMYK", "tif"), ("YCbCr", "jpg"),
        )
    },
    **{
        f"{mode.replace(';', '')}.{suffix}": (
            lambda path, mode=mode: sixteen(mode).save(path),
            lambda path: Image.fromarray(eight_bits()),
        )
        for mode, suffix in (("I;16", "png"), ("I;16", "tif"), ("I;16L", "tif"), ("I;16B", "tif"), ("I;16B", "png"))
    },
    "turned.png": (turned, lambda path: ImageOps.exif_transpose(Image.fromarray(np.rot90(BASE, -1)))),
    "animated.gif": (animated, Image.open),
    "wide.png": (wide_colors, lambda path: Image.fromarray(np.repeat((WIDE >> 8).astype(np.uint8)[..., None], 3, 2))),
}  # fmt: skip


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", IMAGES)
def test_images_of_every_mode_are_what_pil_says(name: str, channels: int, tmp_path: Path) -> None:
    """The center crop of 28 out of 32 keeps the scale, so that pixels are those of the file."""
    write, read = IMAGES[name]
    write(tmp_path / name)
    expected = read(tmp_path / name).convert("L" if channels == 1 else "RGB")
    pixels = np.asarray(expected)[2:30, 2:30]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = sources._read_image(tmp_path / name, (channels, 28, 28))
    np.testing.assert_array_equal(found, pixels[None] if channels == 1 else pixels.transpose(2, 0, 1))


def cut_short(path: Path) -> None:
    base("RGB").save(path, format="PNG")
    path.write_bytes(path.read_bytes()[:1500])


REFUSED_IMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "integers.tif": (lambda p: Image.fromarray(WIDE.astype(np.int32)).save(p), "32-bit integers, whose range"),
    "floats.tif": (lambda p: Image.fromarray(WIDE.astype(np.float32)).save(p), "floating-point numbers, whose range"),
    "line.png": (lambda p: Image.new("1", (3_000_000, 1)).save(p), "3000000x1 pixels, too long and narrow"),
    "bomb.png": (lambda p: Image.new("1", (20_000, 10_000)).save(p), "decompression bomb"),
    "short.png": (cut_short, "truncated"),
    "empty.png": (lambda p: p.write_bytes(b""), "cannot identify"),
}


@pytest.mark.parametrize("name", REFUSED_IMAGES)
def test_images_without_a_right_reading_are_refused(name: str, tmp_path: Path) -> None:
    write, message = REFUSED_IMAGES[name]
    write(tmp_path / name)
    with pytest.raises(EdgeKitError, match=message) as caught:
        sources._read_image(tmp_path / name, (3, 28, 28))
    assert name in caught.value.what and caught.value.help


def picture(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    base("RGB").save(path)


@pytest.mark.parametrize(
    ("folders", "asks"),
    [
        (("train/cat", "val/cat"), True),
        (("Train/cat", "Test/cat", "valid/dog"), True),
        (("train/cat",), True),
        (("train", "test"), True),
        (("train", "bus", "car"), False),
        (("train",), False),
    ],
)
def test_the_root_of_a_data_set_is_no_folder_of_classes(folders: tuple[str, ...], asks: bool, tmp_path: Path) -> None:
    for folder in folders:
        picture(tmp_path / folder / "a.png")
    if asks:
        with pytest.raises(EdgeKitError, match="parts of a data set") as caught:
            sources.load(tmp_path, image_size=(3, 28, 28))
        assert str(tmp_path) in str(caught.value.help)
    else:
        assert len(sources.load(tmp_path, image_size=(3, 28, 28)).labels) == len(folders)


FEW = RNG.random((6, 4)).astype(np.float32)
TENSORS: dict[str, tuple[torch.Tensor, np.ndarray | str]] = {
    "sparse": (torch.from_numpy(FEW).to_sparse(), FEW),
    "csr": (torch.from_numpy(FEW).to_sparse_csr(), FEW),
    "quantized": (torch.quantize_per_tensor(torch.from_numpy(FEW), 0.5, 0, torch.quint8), np.rint(FEW * 2) / 2),
    "bfloat16": (torch.from_numpy(FEW).bfloat16(), torch.from_numpy(FEW).bfloat16().float().numpy()),
    "float16": (torch.from_numpy(FEW).half(), FEW.astype(np.float16).astype(np.float32)),
    "float64": (torch.from_numpy(FEW).double(), FEW),
    "float8": (torch.ones(6, 4).to(torch.float8_e4m3fn), np.ones((6, 4), np.float32)),
    "transposed": (torch.from_numpy(FEW.T.copy()).T, FEW),
    "with a gradient": (torch.from_numpy(FEW).requires_grad_(), FEW),
    "int16": (torch.arange(24, dtype=torch.int16).reshape(6, 4), np.arange(24, dtype=np.float32).reshape(6, 4)),
    "complex": (torch.from_numpy(FEW).to(torch.complex64), "numbers"),
    "meta": (torch.empty(6, 4, device="meta"), "meta device"),
    "scalar": (torch.tensor(1.0), "numbers"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("saved", [False, True], ids=["given", "saved"])
@pytest.mark.parametrize("kind", TENSORS)
def test_tensors_of_every_kind_are_read_or_refused(kind: str, saved: bool, tmp_path: Path) -> None:
    tensor, expected = TENSORS[kind]
    given: Any = {"x": tensor}
    if saved:
        torch.save(given, tmp_path / "data.pt")
        given = tmp_path / "data.pt"
    if isinstance(expected, str):
        with pytest.raises(EdgeKitError, match=expected) as caught:
            sources.load(given)
        assert caught.value.help
        return
    (batch,) = sources.load(given).evaluation
    specs = (sources.TensorSpec("x", "float32", (6, 4)),)
    ((x,), _, _), *_ = sources.batches([batch], specs)
    np.testing.assert_array_equal(x, expected)


@pytest.mark.parametrize("compressed", [False, True], ids=["stored", "deflated"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_large_arrays_are_read_from_their_file(
    compressed: bool, order: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "IN_MEMORY", 100)
    x, y = np.asarray(RNG.random((130, 5, 3)), order=order), RNG.integers(0, 9, 130)
    (np.savez_compressed if compressed else np.savez)(tmp_path / "data.npz", x=x, y=y)
    np.save(tmp_path / "data.npy", x)
    for name in ("data.npz", "data.npy"):
        found = sources.load(tmp_path / name)
        for _ in range(2):
            batches = list(found.evaluation)
            np.testing.assert_array_equal(np.concatenate([batch.inputs[0] for batch in batches]), x)
        if name == "data.npz":
            np.testing.assert_array_equal(np.concatenate([batch.target for batch in batches]), y)
    content = bytearray((tmp_path / "data.npz").read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "bad.npz").write_bytes(content)
    (tmp_path / "cut.npy").write_bytes((tmp_path / "data.npy").read_bytes()[:-9])
    for name in ("bad.npz", "cut.npy"):
        with pytest.raises(EdgeKitError, match="cannot be read"):
            sources.load(tmp_path / name)


def test_arrays_of_objects_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "objects.npz", x=np.array([{}, {}], dtype=object))
    for given in (tmp_path / "objects.npz", {"x": np.array([None, {}], dtype=object)}):
        with pytest.raises(EdgeKitError, match=r"Python objects|not a batch of numbers"):
            sources.load(given)


def test_integer_labels_are_targets_and_texts_are_names() -> None:
    images = RNG.random((5, 2)).astype(np.float32)
    data = sources.load({"images": images, "labels": np.arange(5)})
    (batch,) = data.evaluation
    assert batch.target is not None and batch.target.tolist() == [0, 1, 2, 3, 4] and data.labels == ()
    named = sources.load({"images": images, "labels": np.array(["a", "b"])})
    assert named.labels == ("a", "b") and next(iter(named.evaluation)).target is None
    both = sources.load({"x": images, "y": np.arange(5), "labels": np.array(["a", "b", "c", "d", "e"])})
    assert both.labels == ("a", "b", "c", "d", "e")


@pytest.mark.parametrize("name", ["images", "image", "data", "x"])
def test_a_lone_input_fits_whatever_it_is_called(name: str) -> None:
    images = RNG.random((4, *SHAPE)).astype(np.float32)
    for given in ({name: images}, [({name: images}, None)]):
        original, source = load(network(), given)
        (chunk,) = edgekit.measuring.evaluation.Evaluation(source, original)
        np.testing.assert_array_equal(chunk.cut(chunk.feeds)[0], images)


class OfDict(nn.Module):
    """Takes its one image in a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = network()

    def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return self.inner(batch["image"])


def test_a_dict_of_one_key_is_a_dict() -> None:
    images = RNG.random((4, *SHAPE)).astype(np.float32)
    original, source = load(OfDict(), [({"image": images}, None)])
    (chunk,) = edgekit.measuring.evaluation.Evaluation(source, original)
    (outputs,) = run_module(original.module, chunk.feeds)
    with torch.no_grad():
        np.testing.assert_allclose(outputs[:, 0], network()(torch.from_numpy(images)).numpy(), atol=1e-5)
    with pytest.raises(EdgeKitError, match="no input 'picture'"):
        load(network(), {"picture": images}, "picture:float32[1,3,16,16]")


class Sum(nn.Module):
    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return x + y


def load(module: nn.Module, data: Any, *inputs: str) -> tuple[Any, Any]:
    return with_data.load(module, data=data, inputs=inputs, code=None, mean=(), std=())


@pytest.mark.parametrize("inputs", [(), ("x:float32[1,3]", "y:float32[1,3]"), ("1x3", "1x3")])
def test_an_input_called_y_is_an_input(inputs: tuple[str, ...]) -> None:
    x, y = RNG.random((2, 5, 3)).astype(np.float32)
    original, source = load(Sum(), {"x": x, "y": y}, *inputs)
    (chunk,) = edgekit.measuring.evaluation.Evaluation(source, original)
    assert chunk.target is None and sources.Y_IS_AN_INPUT in source.notes
    np.testing.assert_array_equal(chunk.feeds[1][:, 0], y)
    (outputs,) = run_module(original.module, chunk.feeds)
    np.testing.assert_array_equal(outputs[:, 0], x + y)


class Scaling(nn.Module):
    """A network whose images go through `scale` first."""

    def __init__(self, scale: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.scale, self.rest = scale, network()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.rest(self.scale(x))


MEANS = torch.tensor([123.675, 116.28, 103.53]).reshape(1, 3, 1, 1)
OF_BYTES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "float, / 255": lambda x: x.float() / 255,
    "/ 255": lambda x: x / 255,
    "* 1/255": lambda x: x.to(torch.float32) * (1 / 255),
    "- means": lambda x: (x - MEANS) / 58.0,
    "- 127.5": lambda x: x.float().sub(127.5).div(127.5),
    "/ 127.5 - 1": lambda x: x / 127.5 - 1,
    "channels turned around": lambda x: x.flip(1).contiguous().float().div_(255),
}
OF_SHARES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "as it is": lambda x: x,
    "float": lambda x: x.float(),
    "- mean": lambda x: (x - 0.485) / 0.225,
    "2x - 1": lambda x: x * 2 - 1,
    "* 255": lambda x: x * 255.0 - 128.0,
}


@pytest.mark.parametrize("scripted", [False, True], ids=["eager", "traced"])
@pytest.mark.parametrize("how", [*OF_BYTES, *OF_SHARES])
def test_networks_that_scale_bytes_themselves_are_told_apart(how: str, scripted: bool) -> None:
    images = torch.randint(0, 256, (1, *SHAPE), dtype=torch.uint8)
    module: Any = Scaling((OF_BYTES | OF_SHARES)[how])
    if scripted:
        module = torch.jit.trace(module, images.float())
    assert scales_bytes(module, (images,)) == (how in OF_BYTES)


def written(module: nn.Module, path: Path) -> onnx.ModelProto:
    """An ONNX file of a network with an input of float32, by torch's own exporter."""
    torch.onnx.export(module.eval(), (torch.rand(1, *SHAPE),), str(path), dynamo=True, input_names=["x"], verbose=False)
    return onnx.load(path)


@pytest.mark.parametrize("how", [*OF_BYTES, *OF_SHARES])
def test_onnx_graphs_that_scale_bytes_themselves_are_told_apart(how: str, tmp_path: Path) -> None:
    model = written(Scaling((OF_BYTES | OF_SHARES)[how]), tmp_path / "m.onnx")
    assert onnx_scales_bytes(model, "x") == (how in OF_BYTES)


# What stands before the network's first convolution → whether images of 0..255 go in.
ONNX_FRONTS: dict[str, tuple[list[onnx.NodeProto], bool]] = {
    "BatchNormalization of bytes": (
        [helper.make_node("BatchNormalization", ["x", "ones", "zeros", "means", "ones"], ["y"])], True
    ),
    "BatchNormalization of shares": (
        [helper.make_node("BatchNormalization", ["x", "ones", "zeros", "shares", "ones"], ["y"])], False
    ),
    "a Constant behind a Cast": (
        [
            helper.make_node("Constant", [], ["c"], value_float=255.0),
            helper.make_node("Cast", ["c"], ["d"], to=TensorProto.FLOAT),
            helper.make_node("Transpose", ["x"], ["t"], perm=[0, 1, 3, 2]),
            helper.make_node("Div", ["t", "d"], ["y"]),
        ],
        True,
    ),
    "a computed divisor": (
        [helper.make_node("ReduceMax", ["x"], ["m"]), helper.make_node("Div", ["x", "m"], ["y"])], False
    ),
}  # fmt: skip


@pytest.mark.parametrize("front", ONNX_FRONTS)
def test_onnx_graphs_that_others_wrote_are_told_apart(front: str) -> None:
    nodes, of_bytes = ONNX_FRONTS[front]
    values = {"ones": np.ones(3), "zeros": np.zeros(3), "means": np.full(3, 116.3), "shares": np.full(3, 0.5)}
    constants = [numpy_helper.from_array(value.astype(np.float32), name) for name, value in values.items()]
    info = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, *SHAPE]) for name in "xy"]
    graph = helper.make_graph(nodes, "g", info[:1], info[1:], constants)
    assert onnx_scales_bytes(helper.make_model(graph), "x") == of_bytes


def test_an_onnx_file_that_scales_bytes_gets_them_once(tmp_path: Path) -> None:
    images = RNG.integers(0, 256, (5, *SHAPE)).astype(np.uint8)
    written(Scaling(OF_BYTES["float, / 255"]), tmp_path / "m.onnx")
    original, source = load(str(tmp_path / "m.onnx"), {"x": images})
    (chunk,) = edgekit.measuring.evaluation.Evaluation(source, original)
    (outputs,) = run_module(original.module, chunk.feeds)
    with torch.no_grad():
        expected = network()(torch.from_numpy(images).float() / 255).numpy()
    np.testing.assert_allclose(outputs[:, 0], expected, atol=1e-5)
    assert chunk.feeds[0].dtype == np.float32 and sources.AS_THEY_ARE in source.notes


@pytest.mark.parametrize("inputs", [(), ("x:uint8[1,3,16,16]",), ("x:float32[1,3,16,16]",)])
def test_bytes_are_scaled_once(inputs: tuple[str, ...]) -> None:
    """The samples that a model with `/ 255` in it gets are those of the file, in the type that its input has."""
    images = RNG.integers(0, 256, (5, *SHAPE)).astype(np.uint8)
    original, source = load(Scaling(OF_BYTES["float, / 255"]), {"x": images}, *inputs)
    (chunk,) = edgekit.measuring.evaluation.Evaluation(source, original)
    assert original.inputs[0].dtype == chunk.feeds[0].dtype.name == ("float32" if "float32" in str(inputs) else "uint8")
    np.testing.assert_array_equal(chunk.cut(chunk.feeds)[0], images)
    assert sources.AS_THEY_ARE in source.notes and source.preprocessing is None
    (outputs,) = run_module(original.module, chunk.feeds)
    with torch.no_grad():
        expected = network()(torch.from_numpy(images).float() / 255).numpy()
    np.testing.assert_allclose(outputs[:, 0], expected, atol=1e-5)
    original, source = load(network(), {"x": images})
    (chunk,) = edgekit.measuring.evaluation.Evaluation(source, original)
    np.testing.assert_allclose(chunk.cut(chunk.feeds)[0], images / 255, atol=1e-6)


def test_a_model_of_bytes_is_exported_and_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Calibration is told of where it took place, and a comparison says which of its samples were calibrated on."""
    quick(monkeypatch)
    images = RNG.integers(0, 256, (30, *SHAPE)).astype(np.uint8)
    module = Scaling(OF_BYTES["float, / 255"])
    given: Any = {"target": "x86", "formats": "onnx", "out": tmp_path}
    bundle = edgekit.export(module, precision="int8", data={"x": images}, **given)
    assert [spec["dtype"] for spec in bundle.manifest["inputs"]] == ["uint8"]
    assert bundle.manifest["recipe"]["calibration"]["samples"] == 30
    assert any("calibration reads samples" in note for note in bundle.notes)
    others = RNG.integers(0, 256, (8, *SHAPE)).astype(np.uint8)
    for data, count in ((np.concatenate([images[:6], others]), 6), (others, 0)):
        result = edgekit.compare(module, [bundle], data={"x": data}, rounds=1)
        assert all(file.parity.sqnr_db > 15 for file in result.artifacts)
        told = [note for note in result.notes if "calibrat" in note]
        assert bool(told) == bool(count) and all(f"calibrated on {count} of these 14" in note for note in told)
    plain = edgekit.export(module, precision="fp32", data={"x": images}, **given)
    assert "calibration" not in plain.manifest["recipe"] and not any("calibrat" in note for note in plain.notes)


def test_helpers_of_the_same_name_are_each_folder_s_own(tmp_path: Path) -> None:
    for name, value in (("a", 1), ("b", 2)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "shared_helper.py").write_text(f"VALUE = {value}\n")
        (tmp_path / name / "twin.py").write_text(
            "import shared_helper\ndef now(): return shared_helper.VALUE\n"
            "def later():\n    import shared_helper\n    return shared_helper.VALUE\n"
        )
    from edgekit.util.user_code import running

    for name, value in (("a", 1), ("b", 2), ("a", 1)):
        code = import_code(f"{tmp_path / name / 'twin.py'}:now")
        later = import_code(f"{tmp_path / name / 'twin.py'}:later")
        assert code.get()() == value  # type: ignore[operator]
        with running("the test", code.folder):
            assert later.get()() == value  # type: ignore[operator]
