"""Object detection: the objects of an image, and the mean average precision of COCO, sample by sample."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from typing import TYPE_CHECKING, Any

from edgekit.data.boxes import FORMS
from edgekit.errors import EdgeKitError
from edgekit.util import ragged_arrays

if TYPE_CHECKING:
    import numpy as np

    from edgekit.metrics.scores import Scores

MOST = 100  # detections of an image that count: COCO's
RECALLS = 101  # at which precision is taken: COCO's
BATCH = 1 << 20  # detections of resamples that are looked at in one go
LARGEST_AREA = 1e10  # objects of every size count


@dataclass(frozen=True, eq=False)
class Ranked:
    """The detections of one class in all images, the most certain first.

    `image` (D,) is where each is, `hits` the places of those that are objects at each of COCO's overlaps, and `objects`
    (N,) how many there are to find in each image.
    """

    image: np.ndarray
    hits: tuple[np.ndarray, ...]
    objects: np.ndarray

    def precision(self, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns the average precision of each resample, (R,), and whether it has an object, (R,).

        Image i is in a resample `weights[:, i]` times. Precision is the highest at any recall from each of RECALLS on,
        and 0 beyond what is reached, as COCO has it: it is taken at the hits, between which it only falls.
        """
        import numpy as np

        present = weights @ self.objects
        ranked = weights[:, self.image]
        every = np.cumsum(ranked, axis=1)
        asked = np.linspace(0, 1, RECALLS)
        total = np.zeros(len(weights))
        for places in self.hits:
            if not len(places):
                continue
            found, seen = np.cumsum(ranked[:, places], axis=1), every[:, places]
            best = np.maximum.accumulate(_share(found, seen)[:, ::-1], axis=1)[:, ::-1]
            recall = _share(found, present[:, None])
            nearest = np.rint(recall * (RECALLS - 1)).astype(np.int64)
            reached = nearest + (asked[nearest] <= recall)  # how many of those asked for
            total += (best * np.diff(reached, axis=1, prepend=0)).sum(axis=1) / RECALLS
        return total / len(self.hits), present > 0

    def found(self) -> np.ndarray:
        """Returns which part of the class's objects each image's hits are, at all overlaps together, (N,)."""
        import numpy as np

        hits = np.bincount(self.image[np.concatenate(self.hits)], minlength=len(self.objects))
        return hits / (len(self.hits) * self.objects.sum())

    def and_again(self, image: int, hit: bool) -> Ranked:
        """Returns these with one more image, N + 1: a copy of `image`, in which no object is found unless `hit`."""
        import numpy as np

        mine = self.image == image
        places = np.arange(len(mine)) + np.cumsum(mine) - mine  # of what was there; each copy comes next
        copies = places[mine] + 1
        images = np.empty(len(mine) + len(copies), np.int64)
        images[places], images[copies] = self.image, len(self.objects)
        hits = tuple(np.sort(np.r_[places[at], places[at[mine[at]]] + 1]) if hit else places[at] for at in self.hits)
        return Ranked(images, hits, np.append(self.objects, self.objects[image]))


def _share(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    import numpy as np

    return np.divide(part, whole, out=np.zeros(np.broadcast(part, whole).shape), where=whole > 0)


@dataclass(frozen=True, eq=False)
class AveragePrecision:
    """Scores of detections in `images` images: COCO's AP at overlaps of 0.50 to 0.95, the mean over classes."""

    classes: tuple[Ranked, ...]
    images: int

    def __len__(self) -> int:
        return self.images

    def values(self, weights: np.ndarray) -> np.ndarray:
        """See metrics.Scores."""
        import numpy as np

        largest = max(len(ranked.image) for ranked in self.classes)
        rows = max(BATCH // max(largest, 1), 1)
        found = []
        for start in range(0, len(weights), rows):
            part = weights[start : start + rows]
            pairs = [ranked.precision(part) for ranked in self.classes]
            there = sum(present.astype(float) for _, present in pairs)
            found.append(sum(ap * present for ap, present in pairs) / np.maximum(there, 1))
        return np.concatenate(found)

    def with_loss(self, losing: Any) -> tuple[Scores, Scores]:
        """See metrics.Scores: as much is detected in the lost image as before, and none of it is an object."""
        found: Any = sum(ranked.found() for ranked in self.classes)
        image = int(found.argmax())
        return self._and_again(image, True), losing._and_again(image, False)

    def _and_again(self, image: int, hit: bool) -> AveragePrecision:
        return AveragePrecision(tuple(c.and_again(image, hit) for c in self.classes), self.images + 1)


@dataclass(frozen=True, eq=False)
class Matched:
    """What COCOeval finds in some images: by class, (image, objects there, scores of detections, which are hits).

    Hits are (overlaps, detections). `images` is how many there are, those with nothing in them included.
    """

    classes: Mapping[int, Sequence[tuple[int, int, np.ndarray, np.ndarray]]]
    images: int


def matched(outputs: Sequence[np.ndarray], target: np.ndarray) -> Matched:
    """Matches detections: outputs boxes (N, D, 4), scores (N, D) and labels (N, D); a score of 0 stands for none.

    The model drops overlapping boxes itself. Boxes are matched to objects by pycocotools (COCOeval), up to 100 an
    image. Raises EdgeKitError where outputs or targets have another form.
    """
    import numpy as np

    if target.dtype != object:
        raise EdgeKitError(f"map needs boxes and labels as targets, not {target.dtype} values", FORMS)
    boxes, scores, labels = _detections(outputs, len(target))
    classes = {}
    for category, images in _matched(boxes, scores, labels, target).items():
        classes[category] = [
            (i, len(image["gtIds"]), np.asarray(image["dtScores"]), image["dtMatches"] > 0)
            for i, image in enumerate(images)
            if image is not None
        ]
    return Matched(classes, len(target))


def ranked(parts: Sequence[Matched]) -> AveragePrecision:
    """Ranks the detections of all images, those of each part behind those of the one before.

    Classes of which there is no object do not count. Raises EdgeKitError where there is none at all.
    """
    import numpy as np

    images = sum(part.images for part in parts)
    starts = np.cumsum([0, *(part.images for part in parts)])
    classes = []
    for category in sorted(set().union(*(part.classes for part in parts))):
        there: list[Any] = [
            (int(start) + i, *rest)
            for start, part in zip(starts[:-1], parts, strict=True)
            for i, *rest in part.classes.get(category, ())
        ]
        counts = np.zeros(images)
        counts[[i for i, *_ in there]] = [objects for _, objects, _, _ in there]
        if not counts.any():
            continue
        found = [scores for *_, scores, _ in there]
        order = np.argsort(-np.concatenate(found), kind="mergesort")
        places = np.repeat([i for i, *_ in there], [len(part) for part in found]).astype(np.int64)
        hit = np.concatenate([hits for *_, hits in there], axis=1)
        classes.append(Ranked(places[order], tuple(map(np.flatnonzero, hit[:, order])), counts))
    if not classes:
        raise EdgeKitError("the targets hold no object", FORMS)
    return AveragePrecision(tuple(classes), images)


def _detections(outputs: Sequence[np.ndarray], count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tells boxes, scores and labels apart: by shape, by an integer dtype, or else in this order."""
    import numpy as np

    boxes = [a for a in outputs if a.ndim == 3 and a.shape[2] == 4]
    others = [a for a in outputs if a.ndim == 2]
    others.sort(key=ragged_arrays.holds_integers)
    fits = len(outputs) == 3 and len(boxes) == 1 and len(others) == 2
    if not fits or any(array.shape != (count, boxes[0].shape[1]) for array in others):
        given = ", ".join("x".join(map(str, array.shape)) for array in outputs)
        raise EdgeKitError(
            f"map needs three outputs, boxes (N, D, 4), scores (N, D) and labels (N, D); the model gives {given} for "
            f"{count} samples",
            "let the model end with its box decoding and suppression, or write --metric FILE.py:function",
        )
    scores, labels = others
    absent = np.isnan(boxes[0]).all(axis=2) & np.isnan(scores) & np.isnan(labels)  # padding of a ragged output
    found = np.where(absent[..., None], 0, boxes[0])
    scores, labels = np.where(absent, 0, scores), np.where(absent, 0, labels)
    if not all(np.isfinite(array).all() for array in (found, scores, labels)):
        raise EdgeKitError("the model's outputs hold NaN or infinite values", "check its weights and --data")
    if (labels != np.round(labels)).any():
        raise EdgeKitError(
            "the labels that the model gives are not whole numbers",
            "give the outputs in the order boxes, scores, labels",
        )
    return found.astype(np.float64), scores.astype(np.float64), labels.astype(np.int64)


def _matched(
    boxes: np.ndarray, scores: np.ndarray, labels: np.ndarray, target: np.ndarray
) -> dict[int, list[dict[str, Any] | None]]:
    """Returns what COCOeval finds of each class, of an object or of a detection, in each image."""
    try:
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval
    except ImportError as error:
        raise EdgeKitError("map needs pycocotools, which is not installed", "pip install pycocotools") from error
    true, found = [], []
    for i, image in enumerate(target):
        true += [_annotation(i, *pair) for pair in zip(image.boxes, image.labels, strict=True)]
        there = scores[i] > 0
        rows = zip(boxes[i][there], labels[i][there], scores[i][there], strict=True)
        found += [{**_annotation(i, box, label), "score": float(score)} for box, label, score in rows]
    categories = sorted({entry["category_id"] for entry in (*true, *found)})
    if not categories:
        return {}
    with redirect_stdout(StringIO()):  # it prints its progress
        tables = []
        for entries in (true, found):
            table = COCO()
            table.dataset = {
                "images": [{"id": i} for i in range(len(target))],
                "categories": [{"id": category} for category in categories],
                "annotations": [{**entry, "id": number} for number, entry in enumerate(entries, 1)],  # 0 is no match
            }
            table.createIndex()
            tables.append(table)
        evaluation = COCOeval(*tables, "bbox")
        evaluation.params.areaRng, evaluation.params.areaRngLbl = [[0, LARGEST_AREA]], ["all"]
        evaluation.params.maxDets = [MOST]
        evaluation.evaluate()
    images = len(target)
    return {
        category: evaluation.evalImgs[number * images : (number + 1) * images]
        for number, category in enumerate(categories)
    }


def _annotation(image: int, box: np.ndarray, label: int) -> dict[str, Any]:
    x, y, right, bottom = map(float, box)
    width, height = max(right - x, 0.0), max(bottom - y, 0.0)
    return {
        "image_id": image,
        "category_id": int(label),
        "bbox": [x, y, width, height],
        "area": width * height,
        "iscrowd": 0,
    }
