"""Boxes: the objects of images, as data sets of detection tell them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgekit.errors import EdgeKitError

if TYPE_CHECKING:
    import numpy as np


FORMS = (
    "give targets as {'boxes': (N, M, 4), 'labels': (N, M)} with label -1 for no object, or one dict for each sample; "
    "boxes are x1, y1, x2, y2 in pixels"
)


@dataclass(frozen=True, eq=False)
class Boxes:
    """The objects of one image: `boxes` (M, 4), float64, as x1, y1, x2, y2; `labels` (M,), int64."""

    boxes: np.ndarray
    labels: np.ndarray


def objects(source: str, target: Any) -> np.ndarray | None:
    """Returns targets of detection as an array (N,) of Boxes; None where `target` has none of their forms.

    It is a mapping of `boxes` (N, M, 4) and `labels` (N, M), where a negative label stands for no object, or a list
    with such a mapping of (M, 4) and (M,) for each sample. Raises EdgeKitError where the two do not fit each other.
    """
    import numpy as np

    if isinstance(target, Mapping):
        rows = [_arrays(source, target)]
        boxes, labels = rows[0]
        if boxes.ndim != 3 or labels.shape != boxes.shape[:2]:
            raise _misfit(source, boxes, labels)
        pairs = list(zip(boxes, labels, strict=True))
    elif isinstance(target, (list, tuple)) and target and isinstance(target[0], Mapping):
        pairs = [_arrays(source, entry) for entry in target]
    else:
        return None
    found = np.empty(len(pairs), object)
    for i, (boxes, labels) in enumerate(pairs):
        found[i] = _image(source, boxes.reshape(-1, 4) if not boxes.size else boxes, labels)
    return found


def _arrays(source: str, entry: Any) -> tuple[np.ndarray, np.ndarray]:
    import numpy as np

    if not isinstance(entry, Mapping) or not {"boxes", "labels"} <= entry.keys():
        raise EdgeKitError(f"a target of {source} lacks boxes or labels", FORMS)
    given = (entry["boxes"], entry["labels"])
    try:
        boxes, labels = (np.asarray(v.detach().cpu() if hasattr(v, "detach") else v) for v in given)
    except ValueError:
        raise EdgeKitError(f"the boxes of {source} differ in length", FORMS) from None
    return boxes, labels


def _image(source: str, boxes: np.ndarray, labels: np.ndarray) -> Boxes:
    import numpy as np

    if boxes.shape != (*labels.shape, 4) or labels.ndim != 1 or boxes.dtype.kind not in "fiu":
        raise _misfit(source, boxes, labels)
    if labels.size and labels.dtype.kind not in "iu":
        raise EdgeKitError(f"the labels of boxes in {source} are {labels.dtype}, not integers", FORMS)
    boxes, labels = boxes[labels >= 0].astype(np.float64), labels[labels >= 0].astype(np.int64)
    if not np.isfinite(boxes).all() or (boxes[:, 2:] < boxes[:, :2]).any():
        raise EdgeKitError(f"a box in {source} ends before it starts, or is not finite", FORMS)
    return Boxes(boxes, labels)


def _misfit(source: str, boxes: np.ndarray, labels: np.ndarray) -> EdgeKitError:
    shapes = ("x".join(map(str, array.shape)) or "a scalar" for array in (boxes, labels))
    return EdgeKitError("the boxes of {} are {}, their labels {}".format(source, *shapes), FORMS)
