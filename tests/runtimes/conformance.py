"""What every runtime must do, as functions on its module: they run in this interpreter or, as a script, in another one.

`python conformance.py RUNTIMES MODULE FOLDER SUFFIX CHECK` loads RUNTIMES/MODULE.py and runs one check on the files in
FOLDER: <model><SUFFIX> for every model in INPUTS, with inputs and eager outputs in <model>.npz. It needs numpy alone.
"""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np


class Subject(NamedTuple):
    """A runtime's module, and the folder and suffix of its files."""

    module: Any
    folder: Path
    suffix: str

    def load(self, model: str, **options: Any) -> Any:
        given = {"threads": 1, "inputs": INPUTS[model], "outputs": OUTPUTS[model], **options}
        return self.module.load(str(self.folder / f"{model}{self.suffix}"), **given)

    def feeds(self, model: str) -> dict[str, np.ndarray]:
        return self._arrays(model, INPUTS[model])

    def expected(self, model: str) -> dict[str, np.ndarray]:
        return self._arrays(model, OUTPUTS[model])

    def _arrays(self, model: str, names: tuple[str, ...]) -> dict[str, np.ndarray]:
        with np.load(self.folder / f"{model}.npz") as arrays:
            return {name: arrays[name] for name in names}


INPUTS = {"pair": ("image", "offset"), "cnn": ("image",), "gray": ("image",)}
OUTPUTS = {"pair": ("total", "mean"), "cnn": ("logits",), "gray": ("logits",)}


def raises(call: Callable[[], object], *words: str) -> None:
    try:
        call()
    except ValueError as error:
        assert all(word in str(error) for word in words), error
    else:
        raise AssertionError(f"no ValueError with {words}")


def close_to(got: dict[str, np.ndarray], want: dict[str, np.ndarray]) -> None:
    assert list(got) == list(want)
    for name in want:
        assert got[name].dtype == want[name].dtype and got[name].shape == want[name].shape, name
        np.testing.assert_allclose(got[name], want[name], rtol=1e-5, atol=1e-5)


def equals_eager(subject: Subject) -> None:
    for model in INPUTS:
        close_to(subject.load(model).run(subject.feeds(model)), subject.expected(model))


def describes_itself(subject: Subject) -> None:
    session = subject.load("pair")
    assert session.inputs == (("image", "float32", (1, 2, 4, 4)), ("offset", "int64", (1,)))
    assert session.outputs == (("total", "float32", (1, 2, 4, 4)), ("mean", "float32", (1, 2)))
    assert subject.module.version()[0].isdigit()


def takes_given_order(subject: Subject) -> None:
    """A file with names is reordered by them; a .pte, which has none, is told which name comes where."""
    if subject.suffix == ".pte":
        session = subject.load("pair", inputs=("a", "b"), outputs=("c", "d"))
        feeds = subject.feeds("pair")
        got = session.run({"b": feeds["offset"], "a": feeds["image"]})
        close_to({"total": got["c"], "mean": got["d"]}, subject.expected("pair"))
        return
    session = subject.load("pair", inputs=("offset", "image"), outputs=("mean", "total"))
    assert [info.name for info in session.inputs] == ["offset", "image"]
    expected = subject.expected("pair")
    close_to(session.run(subject.feeds("pair")), {"mean": expected["mean"], "total": expected["total"]})


def has_names_of_its_own(subject: Subject) -> None:
    session = subject.load("pair", inputs=(), outputs=())
    names = ([info.name for info in session.inputs], [info.name for info in session.outputs])
    numbered = (["input_0", "input_1"], ["output_0", "output_1"])
    assert names == (numbered if subject.suffix == ".pte" else (["image", "offset"], ["total", "mean"]))


def refuses_wrong_names(subject: Subject) -> None:
    raises(lambda: subject.load("pair", inputs=("image",)), "image")
    raises(lambda: subject.load("pair", outputs=("total", "mean", "more")), "more")
    feeds = subject.feeds("pair")
    session = subject.load("pair")
    raises(lambda: session.run({"image": feeds["image"]}), "offset")
    raises(lambda: session.run({"image": feeds["image"], "shift": feeds["offset"]}), "offset", "shift")
    raises(lambda: session.run({**feeds, "extra": feeds["offset"]}), "extra")


def refuses_wrong_dtypes(subject: Subject) -> None:
    feeds = subject.feeds("pair")
    session = subject.load("pair")
    for dtype in ("float64", "float16", "int32", ">f4"):
        raises(lambda dtype=dtype: session.run({**feeds, "image": feeds["image"].astype(dtype)}), "image", "float32")
    raises(lambda: session.run({**feeds, "offset": feeds["offset"].astype("int32")}), "offset", "int64", "int32")
    raises(lambda: session.run({**feeds, "offset": [3]}), "offset", "list")


def refuses_wrong_shapes(subject: Subject) -> None:
    feeds = subject.feeds("pair")
    session = subject.load("pair")
    for shape in ((2, 4, 4), (1, 4, 4, 2), (1, 2, 4, 4, 1), (32,)):
        raises(lambda shape=shape: session.run({**feeds, "image": feeds["image"].reshape(shape)}), "image", "1,2,4,4")
    raises(lambda: session.run({**feeds, "offset": np.zeros((), "int64")}), "offset")
    close_to(session.run(feeds), subject.expected("pair"))


def reads_any_layout(subject: Subject) -> None:
    """Strided, channels-last, read-only and byte-offset feeds hold the same numbers."""
    for model in INPUTS:
        session = subject.load(model)
        feeds, expected = subject.feeds(model), subject.expected(model)
        image = feeds["image"]
        channels_last = np.ascontiguousarray(image.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
        every_other = np.repeat(image, 2, axis=3)[..., ::2]
        reversed_ = np.ascontiguousarray(image[:, :, ::-1])[:, :, ::-1]
        read_only = image.copy()
        read_only.flags.writeable = False
        shifted = np.frombuffer(b"x" + image.tobytes(), dtype=image.dtype, offset=1).reshape(image.shape)
        for layout in (channels_last, every_other, reversed_, read_only, shifted):
            before = layout.copy()
            close_to(session.run({**feeds, "image": layout}), expected)
            np.testing.assert_array_equal(layout, before)


def reads_one_channel_channels_last(subject: Subject) -> None:
    """numpy calls such an array contiguous, though its strides are those of channels-last."""
    session = subject.load("gray")
    image = subject.feeds("gray")["image"]
    channels_last = image.transpose(0, 2, 3, 1).copy("C").transpose(0, 3, 1, 2)
    assert channels_last.flags.c_contiguous and channels_last.strides != image.strides
    close_to(session.run({"image": channels_last}), subject.expected("gray"))


def gives_arrays_of_their_own(subject: Subject) -> None:
    for model in INPUTS:
        session = subject.load(model)
        feeds, expected = subject.feeds(model), subject.expected(model)
        first = session.run(feeds)
        session.run({name: feed * 0 for name, feed in feeds.items()})
        close_to(first, expected)
        session.close()
        del session
        close_to(first, expected)


def sessions_coexist(subject: Subject) -> None:
    one, other, again = subject.load("pair"), subject.load("cnn"), subject.load("pair")
    for _ in range(2):
        for session, model in ((one, "pair"), (other, "cnn"), (again, "pair")):
            close_to(session.run(subject.feeds(model)), subject.expected(model))
    one.close()
    close_to(again.run(subject.feeds("pair")), subject.expected("pair"))


def closes(subject: Subject) -> None:
    session = subject.load("cnn")
    session.run(subject.feeds("cnn"))
    session.close()
    session.close()
    raises(lambda: session.run(subject.feeds("cnn")), "closed")


def takes_threads(subject: Subject) -> None:
    for threads in (1, 2):
        session = subject.load("cnn", threads=threads)
        for _ in range(5):
            close_to(session.run(subject.feeds("cnn")), subject.expected("cnn"))


CHECKS = (
    equals_eager,
    describes_itself,
    takes_given_order,
    has_names_of_its_own,
    refuses_wrong_names,
    refuses_wrong_dtypes,
    refuses_wrong_shapes,
    reads_any_layout,
    reads_one_channel_channels_last,
    gives_arrays_of_their_own,
    sessions_coexist,
    closes,
    takes_threads,
)


def main(runtimes: str, module: str, folder: str, suffix: str, check: str) -> None:
    package = types.ModuleType("runtimes_under_test")
    package.__path__ = [runtimes]
    sys.modules[package.__name__] = package
    loaded = importlib.import_module(f"{package.__name__}.{module}")
    next(c for c in CHECKS if c.__name__ == check)(Subject(loaded, Path(folder), suffix))


if __name__ == "__main__":
    main(*sys.argv[1:])
