"""Calibration and evaluation data: arrays, image folders and the user's own iterables, as one stream of batches."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from edgekit.data import boxes
from edgekit.data.batch_axis import Placement, placements
from edgekit.errors import EdgeKitError, reason
from edgekit.screening import limits
from edgekit.types import TensorSpec
from edgekit.util.disk_arrays import BLOCK, Rows, Spool

if TYPE_CHECKING:
    import zipfile

    import numpy as np
    import torch
    from PIL import Image

    Arrays = Mapping[str | int, np.ndarray]  # one array per input, by name or by position, batched along axis 0

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff"}
IMAGE_CHANNELS = (1, 3)
MOST_PIXELS = 178_956_970  # of an image, where PIL takes it for a decompression bomb
SIXTEEN_BITS = ("PNG", "PPM")  # formats whose integers, of PIL's mode I, have 16 bits
PARTS = {"train", "training", "val", "valid", "validation", "eval", "dev", "test", "testing"}  # of a data set
CALIBRATION_SAMPLES = 512  # the most that calibration reads, so that it takes seconds
IN_MEMORY = 64 << 20  # bytes of an array of a file that are read at once; of larger ones the rows that are asked for
CALIBRATION = {"calib_x", "calib_y"}
RESERVED = {"x", "y", "y_boxes", "y_labels", "calib_x", "calib_y", "mean", "std", "labels"}
OBJECTS = ("y_boxes", "y_labels")
ANY_INPUT = {
    "x",
    "X",
    "input",
    "inputs",
    "image",
    "images",
    "data",
}  # names of a lone array, whatever the model calls it
NOT_NORMALIZED = "scaled to 0..1 and not normalized"
AS_THEY_ARE = "uint8 images go in as they are, of 0..255: the model takes bytes, or scales them itself"
Y_IS_AN_INPUT = "y is an input of the model, and no label: the data has none"
HELP = "give --data an .npz with x and y, a .pt likewise, a folder of class folders, or FILE.py:function"


@dataclass(frozen=True)
class Preprocessing:
    """How uint8 images became model input: (x · scale − mean) / std, per channel."""

    scale: float
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Returns float32 NCHW images of uint8 ones (N, C, H, W)."""
        import numpy as np

        result = images.astype(np.float32) * np.float32(self.scale)
        if self.mean:
            mean, std = (np.array(v, np.float32).reshape(1, -1, 1, 1) for v in (self.mean, self.std))
            result = (result - mean) / std
        return result

    def to_dict(self) -> dict[str, Any]:
        """Returns the manifest's form."""
        return {"scale": self.scale, "mean": list(self.mean), "std": list(self.std), "layout": "NCHW"}


@dataclass(frozen=True)
class Batch:
    """Some samples: one array per input (batched along axis 0) and one target per sample, or None.

    Targets are numbers of any shape (N, …), or for detection objects: (N,) of `boxes.Boxes`. Unless samples are
    known to be `in_front`, an input may be batched as the model takes it.
    """

    inputs: Arrays
    target: np.ndarray | None
    in_front: bool = True

    def __len__(self) -> int:
        return len(next(iter(self.inputs.values())))


@dataclass(frozen=True)
class Data:
    """A source of samples. `calibration` and `evaluation` can each be read any number of times.

    `separate` says whether calibration reads samples that evaluation does not. `training` are all samples that
    calibration may read, where it reads a part of them. `shared` is what to know of a calibration on samples that
    evaluation reads too.
    """

    source: str
    calibration: Iterable[Batch]
    evaluation: Iterable[Batch]
    preprocessing: Preprocessing | None = None
    labels: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    separate: bool = False
    training: Iterable[Batch] | None = None
    shared: str | None = None

    def unscaled(self) -> Data:
        """Returns the same with uint8 images as they are, for a model that takes bytes or scales them itself."""
        streams: dict[str, Any] = {
            key: replace(stream, preprocessing=None)
            for key in ("calibration", "evaluation", "training")
            if isinstance(stream := getattr(self, key), _Slices | _Images)
        }
        notes = (*(note for note in self.notes if NOT_NORMALIZED not in note), AS_THEY_ARE)
        return replace(self, preprocessing=None, notes=notes, **streams)

    def with_targets_as(self, name: str) -> Data | None:
        """Returns the same with the array `y` as the input `name` and without labels; None where it is not called so.

        The input that has no name of its own is then called `x`.
        """
        given = self.evaluation
        if name != "y" or not isinstance(given, _Slices) or given.target is None or self.separate:
            return None
        target = given.target
        arrays = {"x" if key == 0 else key: array for key, array in given.arrays.items()} | {name: target}
        parts: dict[str, Any] = {
            key: replace(stream, arrays=arrays, target=None)
            for key in ("calibration", "evaluation")
            if isinstance(stream := getattr(self, key), _Slices)
        }
        return replace(self, notes=(*self.notes, Y_IS_AN_INPUT), **parts)

    def read_once(self) -> Iterable[Batch]:
        """Returns the evaluation samples to be read as a whole for the last time.

        Those of a generator, beyond what calibration reads, are then not kept on disk.
        """
        if isinstance(self.evaluation, _Iterable) and isinstance(self.evaluation.make, Replay):
            self.evaluation.make.samples_to_keep = CALIBRATION_SAMPLES
        return self.evaluation

    def example(self) -> Arrays:
        """Returns the first sample, with a batch dimension of 1."""
        for batch in self.calibration:
            if len(batch):
                return {key: array[:1] for key, array in batch.inputs.items()}
        raise EdgeKitError(f"{self.source} holds no samples", HELP)


def load(
    source: Any,
    *,
    image_size: tuple[int, int, int] | None = None,
    mean: Sequence[float] = (),
    std: Sequence[float] = (),
) -> Data:
    """Opens a data source.

    `source` is a path (.npz, .pt, a folder of class folders), `FILE.py:function` or `package.module:function`, a
    mapping of arrays, or an iterable of (inputs, target). `image_size` is (channels, height, width), needed for
    folders. `mean` and `std`, per channel, normalize uint8 images after scaling to 0..1.

    Raises EdgeKitError for a source that is missing, empty, of an unknown form, or inconsistent.
    """
    check_normalization(mean, std)
    if isinstance(source, Mapping):
        return _from_arrays("the given arrays", source, mean, std)
    if not isinstance(source, (str, Path)):
        return _from_iterable("the given iterable", source, mean)
    path = Path(source)
    if path.is_dir():
        return _from_folder(path, image_size, mean, std)
    if path.is_file() and path.suffix != ".py":
        return _from_arrays(str(path), _read_arrays(path), mean, std)
    text = str(source)
    if ":" in text:
        from edgekit.util.user_code import import_code

        return _from_iterable(text, import_code(text).get(), mean)
    if path.suffix == ".py" and path.is_file():
        raise EdgeKitError(f"{text} names a file but no function in it", f"write --data {text}:function")
    raise EdgeKitError(f"no data at {text}", HELP)


def rereadable(source: Any) -> Any:
    """Returns `source`, or where it is an iterator, which can be read once only, its batches as what can be again."""
    return Replay(source) if isinstance(source, Iterator) else source


class Replay:
    """The batches of an iterator, any number of times: those that were read lie in a temporary file."""

    def __init__(self, items: Iterator[Any]) -> None:
        """`items` are pairs (inputs, target)."""
        self._items = items
        self._kept: list[tuple[dict[str | int, Rows], Rows | np.ndarray | None]] = []
        self._read = 0
        self._spool: Spool | None = None
        self.samples_to_keep = math.inf
        """How many samples at least stay readable; the rest is given once, and then forgotten."""

    def __iter__(self) -> Iterator[Batch]:
        number = samples = 0
        while True:
            if number < len(self._kept):
                inputs, target = self._kept[number]
                target = target[:] if isinstance(target, Rows) else target
                batch = Batch({key: rows[:] for key, rows in inputs.items()}, target, in_front=False)
            elif number < self._read:
                raise RuntimeError("batches of a generator are asked for that were not kept")
            else:
                item = next(self._items, None)
                if item is None:
                    return
                batch = _as_batch("the given iterable", item)
                self._read += 1
                if samples < self.samples_to_keep:
                    self._keep(batch)
            yield batch
            number += 1
            samples += len(batch)

    def _keep(self, batch: Batch) -> None:
        spool = self._spool = self._spool or Spool()
        target = batch.target
        kept = target if target is None or target.dtype == object else spool.put(target)
        self._kept.append(({key: spool.put(array) for key, array in batch.inputs.items()}, kept))


def check_normalization(mean: Sequence[float], std: Sequence[float]) -> None:
    """Raises EdgeKitError unless both or none are given, of finite numbers with positive standard deviations."""
    if bool(mean) != bool(std):
        raise EdgeKitError("normalization needs both a mean and a standard deviation", "give --mean and --std together")
    if not all(map(math.isfinite, (*mean, *std))) or any(value <= 0 for value in std):
        raise EdgeKitError(
            "a mean must be finite, and a standard deviation above zero", "give those of each channel on the 0..1 scale"
        )


def batches(
    stream: Iterable[Batch], inputs: Sequence[TensorSpec]
) -> Iterator[tuple[tuple[np.ndarray, ...], int, np.ndarray | None]]:
    """Cuts a stream into batches of the model's own size.

    Yields (one array per model input shaped exactly as `inputs` say, how many of its samples are real, their targets,
    or None where one of them has none). The last batch is padded by repeating its last sample. Raises EdgeKitError
    where samples do not fit the model's inputs.
    """
    import numpy as np

    placed = placements(inputs)
    size = placed[0].size
    held: list[np.ndarray] = []
    targets: list[tuple[int, np.ndarray | None]] = []  # of the samples that are held: how many, and their targets
    for batch in stream:
        given = _in_order(batch.inputs, inputs)
        arrays = [conform(_rows(array, place, batch), place.spec) for array, place in zip(given, placed, strict=True)]
        held = [np.concatenate(pair) for pair in zip(held, arrays, strict=True)] if held and len(held[0]) else arrays
        targets.append((len(arrays[0]), batch.target))
        start = 0
        while len(held[0]) - start >= size:
            stop = start + size
            yield (
                tuple(place.of(a[start:stop]) for a, place in zip(held, placed, strict=True)),
                size,
                _take(targets, size),
            )
            start = stop
        held = [a[start:] for a in held]
    rest = len(held[0]) if held else 0
    if rest:
        fill = [np.concatenate([a, np.repeat(a[-1:], size - rest, axis=0)]) for a in held]
        yield tuple(place.of(a) for a, place in zip(fill, placed, strict=True)), rest, _take(targets, rest)


def _take(targets: list[tuple[int, np.ndarray | None]], count: int) -> np.ndarray | None:
    """Takes the targets of the first `count` samples out of `targets`; None where a sample has none."""
    parts: list[np.ndarray | None] = []
    while count:
        there, target = targets.pop(0)
        taken = min(there, count)
        parts.append(None if target is None else target[:taken])
        if taken < there:
            targets.insert(0, (there - taken, None if target is None else target[taken:]))
        count -= taken
    known = [part for part in parts if part is not None]
    return joined(known) if len(known) == len(parts) else None


def joined(targets: Sequence[np.ndarray]) -> np.ndarray:
    """Returns targets (n, …) of several batches as one array; raises EdgeKitError where they differ in shape."""
    import numpy as np

    shapes = {target.shape[1:] for target in targets}
    if len(shapes) > 1:
        told = " and ".join("x".join(map(str, shape)) or "scalars" for shape in sorted(shapes)[:2])
        raise EdgeKitError(f"the labels of the data differ in shape: {told}", "give each sample a label of one shape")
    return np.concatenate(targets) if len(targets) > 1 else targets[0]


def _rows(array: np.ndarray, place: Placement, batch: Batch) -> np.ndarray:
    """Returns the `array` of a `batch` with the samples in front; EdgeKitError where they do not fit the input."""
    rows = place.rows(array, len(batch), batch.in_front)
    if rows is None:
        has, takes = ("x".join(map(str, shape)) for shape in (array.shape[1:], place.row))
        raise EdgeKitError(
            f"the data's samples are {has or 'scalars'}, the model's input '{place.spec.name}' takes "
            f"{takes or 'scalars'}",
            "check --data and --input: shapes here leave the batch dimension out",
        )
    return rows


def unprocessed(
    stream: Iterable[Batch], inputs: Sequence[TensorSpec]
) -> tuple[Iterable[Batch], tuple[str, ...], tuple[Preprocessing | None, ...]]:
    """Returns a stream with uint8 images as they are, the dtype of each input in it, and what makes it the model's.

    Kept like that, images take a quarter of the space.
    """
    how = getattr(stream, "preprocessing", None)
    if how is None or not isinstance(stream, _Slices | _Images):
        return stream, tuple(spec.dtype for spec in inputs), (None,) * len(inputs)
    raw = replace(stream, preprocessing=None)
    first = _in_order(next(iter(raw)).inputs, inputs)
    images = [_is_image(array) and spec.dtype == "float32" for array, spec in zip(first, inputs, strict=True)]
    dtypes = tuple("uint8" if image else spec.dtype for image, spec in zip(images, inputs, strict=True))
    return raw, dtypes, tuple(how if image else None for image in images)


def conform(array: np.ndarray, spec: TensorSpec) -> np.ndarray:
    """Returns `array` as the contiguous dtype of `spec`; raises EdgeKitError where that does not hold its values."""
    import numpy as np

    wanted = np.dtype(spec.dtype)
    if array.dtype != wanted:
        if np.issubdtype(array.dtype, np.floating) and not np.issubdtype(wanted, np.floating):
            raise EdgeKitError(f"input '{spec.name}' takes {spec.dtype}, but the data holds {array.dtype}", HELP)
        cast = array.astype(wanted)
        if np.issubdtype(wanted, np.integer) and (cast != array).any():
            raise EdgeKitError(f"the data for input '{spec.name}' holds values outside {spec.dtype}", HELP)
        array = cast
    if np.issubdtype(wanted, np.floating) and not np.isfinite(array).all():
        raise EdgeKitError(f"the data for input '{spec.name}' holds NaN or infinite values", "clean the data first")
    return np.ascontiguousarray(array)


def _in_order(arrays: Arrays, inputs: Sequence[TensorSpec]) -> list[np.ndarray]:
    if len(arrays) != len(inputs):
        raise EdgeKitError(
            f"the data has {len(arrays)} inputs, the model takes {len(inputs)}: {', '.join(s.name for s in inputs)}",
            HELP,
        )
    if len(arrays) == 1 and set(arrays) <= ANY_INPUT:
        return list(arrays.values())
    missing = [spec.name for i, spec in enumerate(inputs) if spec.name not in arrays and i not in arrays]
    if missing:
        raise EdgeKitError(
            f"the data lacks the model's input '{missing[0]}'; it has {', '.join(map(str, arrays))}", HELP
        )
    return [arrays[spec.name] if spec.name in arrays else arrays[i] for i, spec in enumerate(inputs)]


@dataclass(frozen=True)
class _Slices:
    """Batches of 64 out of whole arrays, uint8 images made float as they are read."""

    arrays: Arrays
    target: np.ndarray | None
    preprocessing: Preprocessing | None = None
    indices: np.ndarray | None = None

    def __len__(self) -> int:
        return len(next(iter(self.arrays.values())) if self.indices is None else self.indices)

    def __iter__(self) -> Iterator[Batch]:
        import numpy as np

        count = len(next(iter(self.arrays.values())))
        indices = np.arange(count) if self.indices is None else self.indices
        for start in range(0, len(indices), 64):
            part = indices[start : start + 64]
            inputs = {
                key: self.preprocessing(array[part]) if self.preprocessing and _is_image(array) else array[part]
                for key, array in self.arrays.items()
            }
            yield Batch(inputs, None if self.target is None else self.target[part])


def _is_image(array: np.ndarray) -> bool:
    return array.dtype.name == "uint8" and array.ndim == 4


def _read_arrays(path: Path) -> dict[str, Any]:
    import zipfile

    with path.open("rb") as file:
        magic = file.read(6)
    if magic == b"\x93NUMPY":
        return {"x": _guarded(path, lambda: _read_npy(path))}
    if path.suffix == ".npz":
        return _guarded(path, lambda: _read_npz(path))
    if not zipfile.is_zipfile(path):
        raise EdgeKitError(f"{path} is neither an .npz nor a .pt file", HELP)
    import torch

    from edgekit.screening.unpickle import read_tensors

    content = read_tensors(path, HELP)
    if isinstance(content, torch.Tensor):
        content = {"x": content}
    if not isinstance(content, dict) or not all(isinstance(v, torch.Tensor) for v in content.values()):
        raise EdgeKitError(f"{path} does not hold a dict of tensors", HELP)
    return {str(key): _array(value) for key, value in content.items()}


def _read_npz(path: Path) -> dict[str, np.ndarray | Rows]:
    import zipfile

    if not zipfile.is_zipfile(path):
        raise ValueError("it is damaged, cut short, or no .npz file")
    limits.check_archive(path, limits.ARRAYS_GROWTH)
    with zipfile.ZipFile(path) as archive:
        members = [info for info in archive.infolist() if info.filename.endswith(".npy")]
        return {info.filename.removesuffix(".npy"): _read_member(path, archive, info) for info in members}


def _read_npy(path: Path) -> np.ndarray | Rows:
    import numpy as np

    with path.open("rb") as file:
        dtype, shape, in_order = _header(file)
        if math.prod(shape) * dtype.itemsize <= IN_MEMORY or not in_order:
            return np.asarray(np.load(path, allow_pickle=False))
        return _stored_rows(path, file.tell(), dtype, shape)


def _read_member(path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> np.ndarray | Rows:
    """Reads an array of an .npz file: a large one stays there, or goes into a temporary file where it is compressed."""
    import zipfile

    import numpy as np

    with archive.open(info) as member:
        dtype, shape, in_order = _header(member)
        if info.file_size <= IN_MEMORY or not in_order:
            member.seek(0)
            return np.asarray(np.lib.format.read_array(member, allow_pickle=False))
        start, spool = member.tell(), Spool() if info.compress_type != zipfile.ZIP_STORED else None
        while block := member.read(BLOCK):  # to its end, where the archive tells whether it is damaged
            if spool is not None:
                spool.write(block)
    if spool is not None:
        return spool.rows(dtype, shape)
    with path.open("rb") as file:
        file.seek(info.header_offset + 26)  # where the local header tells the lengths of its last two fields
        lengths = file.read(4)
    header = 30 + int.from_bytes(lengths[:2], "little") + int.from_bytes(lengths[2:], "little")
    return _stored_rows(path, info.header_offset + header + start, dtype, shape)


def _stored_rows(path: Path, offset: int, dtype: np.dtype[Any], shape: tuple[int, ...]) -> Rows:
    if path.stat().st_size < offset + math.prod(shape) * dtype.itemsize:
        raise ValueError("it is cut short")
    return Rows(path.open("rb", buffering=0), offset, dtype, shape)


def _header(file: IO[bytes]) -> tuple[np.dtype[Any], tuple[int, ...], bool]:
    """Reads the header of an array; returns dtype, shape, and whether rows follow one another."""
    import numpy as np

    version = np.lib.format.read_magic(file)
    reading = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, columns_first, dtype = reading(file)
    if dtype.hasobject:
        raise ValueError("Object arrays are Python objects, which are not read from files")
    return dtype, shape, bool(shape) and not columns_first


def _guarded(path: Path, read: Any) -> Any:
    try:
        return read()
    except EdgeKitError:
        raise
    except Exception as error:  # whatever numpy, zipfile and the codecs raise for a damaged file
        raise EdgeKitError(f"{path} cannot be read: {reason(error)}", "write it again with numpy.savez") from None


def _from_arrays(source: str, arrays: Mapping[str, Any], mean: Sequence[float], std: Sequence[float]) -> Data:
    import numpy as np

    arrays = _with_labels({str(key): _plain(value) for key, value in arrays.items()})
    named = {key: array for key, array in arrays.items() if key not in RESERVED or key == "x"}
    if not named:
        raise EdgeKitError(f"{source} has no inputs: it holds {', '.join(arrays) or 'nothing'}", HELP)
    named = _for_each_sample(named)
    arrays |= named
    batched = {key: arrays[key] for key in (*named, "y", *OBJECTS, "calib_x", "calib_y") if key in arrays}
    for key, array in batched.items():
        if array.ndim == 0 or array.dtype.kind not in "fiub":
            raise EdgeKitError(f"array '{key}' of {source} is not a batch of numbers", HELP)
        if len(array) == 0:
            raise EdgeKitError(f"array '{key}' of {source} holds no samples", HELP)
    target = _target_of(source, arrays)
    for calibrates in (False, True):
        lengths = {key: len(array) for key, array in batched.items() if (key in CALIBRATION) == calibrates}
        if len(set(lengths.values())) > 1:
            raise EdgeKitError(f"the arrays of {source} differ in length: {lengths}", "give each sample one label")
    # A lone `x` is the model's one input, whatever the model calls it.
    lone = set(named) == {"x"}
    inputs: Arrays = {0 if lone else key: array for key, array in named.items()}
    preprocessing, notes, training, shared = None, [], None, None
    images = [array for array in inputs.values() if _is_image(array)]
    if images:
        mean = mean or tuple(float(v) for v in np.ravel(arrays.get("mean", ())))
        std = std or tuple(float(v) for v in np.ravel(arrays.get("std", ())))
        preprocessing = _preprocessing(images[0].shape[1], mean, std)
        if not mean:
            notes.append(f"uint8 images are {NOT_NORMALIZED}: no mean and std given")
    elif mean:
        raise _not_normalizable(source)
    elif "mean" in arrays:
        notes.append(f"mean and std in {source} are left aside: they normalize uint8 images, and it holds none")
    if "calib_x" in arrays and len(inputs) == 1:
        if _is_image(arrays["calib_x"]) != bool(images):
            raise EdgeKitError(
                f"in {source} x holds {next(iter(inputs.values())).dtype} and calib_x {arrays['calib_x'].dtype}: only "
                "uint8 images are scaled and normalized",
                "give both the same way",
            )
        samples = dict.fromkeys(inputs, arrays["calib_x"])
        training = _Slices(samples, arrays.get("calib_y"), preprocessing)
        calibration = replace(training, indices=_spaced(arrays["calib_x"]))
    elif "calib_x" in arrays:
        raise EdgeKitError(
            f"{source} has calib_x beside {len(inputs)} inputs, and it does not tell which it is",
            "leave calib_x out: calibration then reads the evaluation samples",
        )
    else:
        calibration = _Slices(inputs, None, preprocessing, _spaced(next(iter(inputs.values()))))
        shared = f"calibration reads samples that evaluation reads too: {source} has no calib_x of its own"
    labels = tuple(str(label) for label in arrays.get("labels", ()))
    evaluation = _Slices(inputs, target, preprocessing)
    separate = "calib_x" in arrays
    return Data(source, calibration, evaluation, preprocessing, labels, tuple(notes), separate, training, shared)


def _with_labels(arrays: dict[str, Any]) -> dict[str, Any]:
    """Returns `arrays` with `labels` as the targets where they are a class index for each sample, and no names."""
    labels = arrays.get("labels")
    if labels is None or OBJECTS[0] in arrays or "y" in arrays or labels.ndim != 1 or labels.dtype.kind not in "iu":
        return arrays
    samples = {len(array) for key, array in arrays.items() if array.ndim and (key not in RESERVED or key == "x")}
    if samples != {len(labels)}:
        return arrays
    return {**{key: array for key, array in arrays.items() if key != "labels"}, "y": labels}


def _for_each_sample(inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns arrays with a lone number (a sample rate, a threshold) repeated for each sample of the others."""
    import numpy as np

    count = max((len(array) for array in inputs.values() if array.ndim), default=0)
    return {
        key: np.broadcast_to(array, (count,)) if not array.ndim and count else array for key, array in inputs.items()
    }


def _target_of(source: str, arrays: Mapping[str, np.ndarray]) -> np.ndarray | None:
    given = [arrays[key][:] for key in OBJECTS if key in arrays]
    if not given:
        return arrays.get("y")
    if len(given) != len(OBJECTS) or "y" in arrays:
        raise EdgeKitError(
            f"{source} has {' and '.join(k for k in ('y', *OBJECTS) if k in arrays)}",
            f"objects are given by {' and '.join(OBJECTS)} together, and no y beside them",
        )
    return boxes.objects(source, dict(zip(("boxes", "labels"), given, strict=True)))


def _not_normalizable(source: str) -> EdgeKitError:
    return EdgeKitError(
        f"--mean and --std normalize uint8 images, and {source} gives none", "leave them out, or give uint8 images"
    )


def _spaced(samples: Sized) -> np.ndarray:
    """Returns the indices of at most CALIBRATION_SAMPLES samples, spread evenly: sorted sources stay balanced."""
    import numpy as np

    count = len(samples)
    return np.unique(np.linspace(0, count - 1, min(count, CALIBRATION_SAMPLES)).astype(int))


def _preprocessing(channels: int, mean: Sequence[float], std: Sequence[float]) -> Preprocessing:
    check_normalization(mean, std)
    for name, values in (("mean", mean), ("std", std)):
        if values and len(values) not in (1, channels):
            raise EdgeKitError(
                f"{name} has {len(values)} values, the images have {channels} channels", "give one value per channel"
            )
    return Preprocessing(1 / 255, tuple(map(float, mean)), tuple(map(float, std)))


@dataclass(frozen=True)
class _Images:
    """Batches of 16 out of image files: short side resized, center cropped, normalized."""

    files: Sequence[tuple[Path, int]]
    size: tuple[int, int, int]
    preprocessing: Preprocessing | None

    def __len__(self) -> int:
        return len(self.files)

    def __iter__(self) -> Iterator[Batch]:
        import numpy as np

        for start in range(0, len(self.files), 16):
            part = self.files[start : start + 16]
            images = np.stack([_read_image(path, self.size) for path, _ in part])
            labels = np.array([label for _, label in part])
            yield Batch({0: self.preprocessing(images) if self.preprocessing else images}, labels)


def _read_image(path: Path, size: tuple[int, int, int]) -> np.ndarray:
    """Returns the center of an image file as uint8 (channels, height, width), upright as its EXIF data says.

    Raises EdgeKitError for a file that cannot be read, or whose values have no range of their own.
    """
    import warnings

    import numpy as np
    from PIL import Image, ImageOps, UnidentifiedImageError

    channels, height, width = size
    try:
        with warnings.catch_warnings(), Image.open(path) as opened:
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            if opened.width * opened.height > MOST_PIXELS:
                raise ValueError(f"it is {opened.width}x{opened.height} pixels, and {MOST_PIXELS:,} are read at most")
            image = _of_bytes(ImageOps.exif_transpose(opened), opened.format)
            image = image.convert("L" if channels == 1 else "RGB")
            # The usual evaluation crop: 224 out of a short side of 256.
            factor = max(height / image.height, width / image.width) * 256 / 224
            wide, high = math.ceil(image.width * factor), math.ceil(image.height * factor)
            if wide * high > MOST_PIXELS:
                raise ValueError(f"it is {image.width}x{image.height} pixels, too long and narrow to be scaled")
            image = image.resize((wide, high), Image.Resampling.BILINEAR)
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError, ValueError) as error:
        raise EdgeKitError(f"{path} is not a readable image: {error}", "remove it from the data folder") from None
    left, top = (image.width - width) // 2, (image.height - height) // 2
    pixels = np.asarray(image.crop((left, top, left + width, top + height)), dtype=np.uint8)
    return pixels[None] if channels == 1 else pixels.transpose(2, 0, 1)


def _of_bytes(image: Image.Image, format: str | None) -> Image.Image:
    """Returns an image whose values are bytes: those of 16 bits are scaled by their own range, others have none.

    PIL itself cuts off what is above 255.
    """
    import numpy as np
    from PIL import Image

    if image.mode.startswith("I;16") or (image.mode == "I" and format in SIXTEEN_BITS):
        values = np.asarray(image).astype(np.uint32)
        return Image.fromarray(((values + 128) // 257).astype(np.uint8))
    if image.mode in ("I", "F"):
        kind = "32-bit integers" if image.mode == "I" else "floating-point numbers"
        raise ValueError(f"its values are {kind}, whose range nothing tells: save it with 8 or 16 bits")
    return image


def _check_not_parts(folder: Path, classes: Sequence[Path]) -> None:
    """Raises EdgeKitError for the root of a data set that is split into parts."""
    parts = [entry for entry in classes if entry.name.lower() in PARTS]
    if not parts or len(parts) < len(classes):
        return
    if len(parts) == 1 and not any(entry.is_dir() for entry in parts[0].iterdir()):
        return  # one class, by its name
    names = ", ".join(entry.name for entry in parts)
    raise EdgeKitError(
        f"{folder} holds the parts of a data set ({names}), and not one folder for each class",
        f"name one of them: --data {parts[-1]}",
    )


def _from_folder(
    folder: Path, image_size: tuple[int, int, int] | None, mean: Sequence[float], std: Sequence[float]
) -> Data:
    classes = sorted(entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    _check_not_parts(folder, classes)
    numbered = bool(classes) and all(entry.name.isdecimal() for entry in classes)
    files = [
        (path, int(entry.name) if numbered else index)
        for index, entry in enumerate(classes)
        for path in sorted(entry.rglob("*"))
        if path.suffix.lower() in IMAGE_SUFFIXES
    ]
    if not files:
        raise EdgeKitError(f"{folder} holds no images in class folders", "expected FOLDER/<class>/<image>.jpg")
    empty = sorted({entry.name for entry in classes} - {path.relative_to(folder).parts[0] for path, _ in files})
    if empty and not numbered:
        raise EdgeKitError(
            f"{folder / empty[0]} holds no images, and would still count as a class",
            "remove it, or name every folder by its class number",
        )
    if image_size is None:
        raise EdgeKitError(f"{folder} does not tell the size that the model takes", "add --input 1x3x224x224")
    if image_size[0] not in IMAGE_CHANNELS:
        raise EdgeKitError(f"images have 1 or 3 channels, the model takes {image_size[0]}", HELP)
    preprocessing = _preprocessing(image_size[0], mean, std)
    notes = () if mean else (f"images are {NOT_NORMALIZED}: no --mean and --std given",)
    calibration = [files[i] for i in _spaced(files)]
    return Data(
        str(folder),
        _Images(calibration, image_size, preprocessing),
        _Images(files, image_size, preprocessing),
        preprocessing,
        () if numbered else tuple(entry.name for entry in classes),
        notes,
        shared="calibration reads images that evaluation reads too",
    )


@dataclass(frozen=True)
class _Iterable:
    """Batches out of the user's own iterable, or of what the user's function returns anew at each reading."""

    source: str
    make: Any
    limit: int | None = None

    def __iter__(self) -> Iterator[Batch]:
        from edgekit.util.user_code import running

        with running(self.source):
            items = self.make() if callable(self.make) else self.make
            if not isinstance(items, Iterable) and not hasattr(items, "__getitem__"):
                raise EdgeKitError(f"{self.source} is not an iterable of (inputs, target)", HELP)
            iterator = iter(items)
        count = 0
        while self.limit is None or count < self.limit:
            with running(self.source):
                item = next(iterator, None)
            if item is None:
                break
            batch = _as_batch(self.source, item)
            yield batch
            count += len(batch)
        if count == 0:
            raise EdgeKitError(f"{self.source} gave no samples", HELP)


def _from_iterable(source: str, made: Any, mean: Sequence[float]) -> Data:
    if mean:
        raise _not_normalizable(source)
    made = rereadable(made)
    shared = "calibration reads samples that evaluation reads too"
    return Data(source, _Iterable(source, made, CALIBRATION_SAMPLES), _Iterable(source, made), shared=shared)


def _as_batch(source: str, item: Any) -> Batch:
    if isinstance(item, Batch):
        return item
    if not isinstance(item, (tuple, list)) or len(item) != 2:
        raise EdgeKitError(f"{source} must give pairs (inputs, target), not {type(item).__name__}", HELP)
    inputs, target = item
    if isinstance(inputs, Mapping):
        named = {key: _parts(value) for key, value in inputs.items()}
        arrays: dict[str | int, np.ndarray] = {
            key if len(parts) == 1 else f"{key}_{number}": _array(part)
            for key, parts in named.items()
            for number, part in enumerate(parts)
        }
    elif isinstance(inputs, (tuple, list)):
        arrays = dict(enumerate(_array(part) for value in inputs for part in _parts(value)))
    else:
        arrays = {0: _array(inputs)}
    if not arrays:
        raise EdgeKitError(f"{source} gave a batch without inputs", HELP)
    count = len(next(iter(arrays.values())))
    if not all(count in array.shape for array in arrays.values()):  # not each has its batch in front
        raise EdgeKitError(f"the inputs of one batch differ in length: {[len(a) for a in arrays.values()]}", HELP)
    if target is not None:
        objects = boxes.objects(source, target)
        target = _array(target) if objects is None else objects
    if target is not None and len(target) != count:
        raise EdgeKitError(f"{source} gave {count} samples with {len(target)} labels", "give each sample one label")
    return Batch(arrays, target, in_front=False)


def _parts(value: Any) -> list[Any]:
    """The arrays of an argument that is a tuple of them, such as the (h, c) of an LSTM; all else is one."""
    if isinstance(value, (tuple, list)) and value and all(hasattr(part, "shape") and len(part.shape) for part in value):
        return list(value)
    return [value]


def _array(value: Any) -> np.ndarray:
    array = _plain(value)
    if array.ndim == 0 or array.dtype.kind not in "fiub":
        raise EdgeKitError("data must be batched along the first dimension and hold numbers", HELP)
    return array


def _plain(value: Any) -> Any:
    """Returns what a user gave as an array: tensors as dense numbers that numpy has."""
    import numpy as np

    if isinstance(value, Rows):
        return value
    if hasattr(value, "detach"):
        return _of_tensor(value.detach())
    try:
        return np.asarray(value)
    except ValueError:
        raise EdgeKitError("the rows of one array differ in length", HELP) from None


def _of_tensor(tensor: torch.Tensor) -> np.ndarray:
    import torch

    if tensor.is_meta:
        raise EdgeKitError("the data holds a tensor on the meta device, which has no values", "save the samples anew")
    try:
        if tensor.is_quantized:
            tensor = tensor.dequantize()
        if tensor.layout != torch.strided:
            tensor = tensor.to_dense()
        tensor = tensor.cpu()
        # numpy has no bfloat16, nor any type of 8 bits
        return (tensor.float() if tensor.is_floating_point() else tensor.resolve_conj().resolve_neg()).numpy()
    except (RuntimeError, TypeError, NotImplementedError) as error:
        raise EdgeKitError(
            f"the data holds a tensor that is no array of numbers: {reason(error)}", "save it as a plain dense tensor"
        ) from None
