"""Samples as Python has them, brought to the forms that `edgekit.data.sources.load` takes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from edgekit.errors import EdgeKitError

BATCH = 64
FORMS = (
    "give {'x': x, 'y': y}, a pair (x, y), an array, a torch Dataset or DataLoader, or an iterable of (inputs, target)"
)


def as_source(data: Any) -> Any:
    """Returns `data` in a form that `edgekit.data.sources.load` takes.

    One array is samples without labels, and a pair of arrays samples and labels. A torch Dataset, or a list of single
    samples with a number as target, is batched as it is read. All other data is returned as it is.
    """
    if _is_array(data):
        return {"x": data}
    if isinstance(data, tuple) and len(data) == 2 and _is_batch(data[0]) and (_is_array(data[1]) or data[1] is None):
        inputs, target = data
        if isinstance(inputs, Mapping):
            return dict(inputs) if target is None else {**inputs, "y": target}
        if _is_array(inputs):
            return {"x": inputs} if target is None else {"x": inputs, "y": target}
        return [(inputs, target)]
    if _is_dataset(data) or _is_unbatched(data):
        return Batched(data)
    if data is not None and not isinstance(data, (str, Path, Mapping, Iterable)) and not callable(data):
        raise EdgeKitError(f"a {type(data).__name__} is given as data", FORMS)
    return data


class Batched:
    """Single samples, `(inputs, target)` or inputs alone, as batches of BATCH; read anew at each pass."""

    def __init__(self, samples: Any) -> None:
        """Keep `samples`: a sequence, or an iterable that starts anew."""
        self.samples = samples

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        known = hasattr(self.samples, "__len__") and hasattr(self.samples, "__getitem__")
        items = (self.samples[i] for i in range(len(self.samples))) if known else iter(self.samples)
        while part := list(islice(items, BATCH)):
            pairs = [item if isinstance(item, (tuple, list)) and len(item) == 2 else (item, None) for item in part]
            targets = [target for _, target in pairs]
            labeled = not any(target is None for target in targets)
            yield _stacked([inputs for inputs, _ in pairs]), _targets(targets) if labeled else None


def _stacked(samples: Sequence[Any]) -> Any:
    """Samples of one form, with a batch dimension in front of each of their arrays."""
    import numpy as np

    first = samples[0]
    if isinstance(first, Mapping):
        return {key: _stacked([sample[key] for sample in samples]) for key in first}
    if isinstance(first, (tuple, list)):
        return tuple(_stacked([sample[i] for sample in samples]) for i in range(len(first)))
    arrays = [_plain(sample) for sample in samples]
    if any(array.dtype.kind not in "fiub" for array in arrays):
        raise EdgeKitError(f"a sample is a {type(first).__name__}, not an array of numbers", "transform it to a tensor")
    if len({array.shape for array in arrays}) > 1:
        shapes = ", ".join(str(list(shape)) for shape in sorted({array.shape for array in arrays})[:3])
        raise EdgeKitError(f"samples differ in shape: {shapes}", "bring them to one shape: files take one alone")
    return np.stack(arrays)


def _targets(targets: Sequence[Any]) -> Any:
    return list(targets) if isinstance(targets[0], Mapping) else _stacked(targets)


def _plain(value: Any) -> Any:
    import numpy as np

    return value.detach().cpu().numpy() if hasattr(value, "detach") else np.asarray(value)


def _is_array(value: Any) -> bool:
    """Whether `value` is an array or a tensor with at least one dimension."""
    return hasattr(value, "shape") and hasattr(value, "dtype") and len(value.shape) > 0


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) or (hasattr(value, "shape") and len(value.shape) == 0)


def _is_batch(value: Any) -> bool:
    if not isinstance(value, (Mapping, tuple, list)):
        return _is_array(value)
    parts: Iterable[Any] = value.values() if isinstance(value, Mapping) else value
    return bool(value) and all(map(_is_array, parts))


def _is_dataset(value: Any) -> bool:
    import sys

    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.utils.data.Dataset)


def _is_unbatched(value: Any) -> bool:
    """Whether `value` is a list of single samples: each a pair whose target is one number."""
    if not isinstance(value, (list, tuple)) or not value:
        return False
    first = value[0]
    return isinstance(first, (list, tuple)) and len(first) == 2 and _is_number(first[1])
