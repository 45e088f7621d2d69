"""Samples to train with: everything that a source holds, in memory or on disk, shuffled anew in each epoch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, Any, Protocol

from edgekit.data import sources
from edgekit.errors import EdgeKitError
from edgekit.loading import with_data
from edgekit.types import TensorSpec
from edgekit.util.disk_arrays import Rows, Shelf

if TYPE_CHECKING:
    import numpy as np
    import torch

    from edgekit.loading.model import Model

    Tensors = tuple[torch.Tensor, ...]

IN_MEMORY = 256 << 20  # bytes of samples that are kept in memory; more lie in a temporary file
BATCHES = (32, 128)  # samples of a step: of few samples, and from MANY on
MANY = 10_000
HELD_OUT_FROM = 2_000  # samples: of fewer, each is worth more in the training
HELD_OUT = 0.05
MOST_HELD_OUT = 1_000


def widened(original: Model, batch: int) -> tuple[TensorSpec, ...]:
    """Returns the inputs of `original` with a batch of `batch`, or as they are where it takes no other batch."""
    import torch

    now = original.inputs[0].shape[0] if original.inputs[0].shape else 0
    if not now or any(not spec.shape or spec.shape[0] != now for spec in original.inputs):
        return original.inputs
    twice = tuple(torch.cat([tensor, tensor]) for tensor in original.example)
    try:
        with torch.no_grad():
            outputs = original.module(*twice)
    except Exception:  # whatever a forward with its batch built in raises
        return original.inputs
    pairs = zip(outputs, original.outputs, strict=True)
    if any(out.ndim == 0 or out.shape[0] != 2 * spec.shape[0] for out, spec in pairs):
        return original.inputs
    return tuple(replace(spec, shape=(batch, *spec.shape[1:])) for spec in original.inputs)


def labeled(
    stream: Iterable[sources.Batch],
    inputs: Sequence[TensorSpec],
    original: Sequence[TensorSpec],
    most: int | None = None,
) -> Iterator[tuple[Tensors, torch.Tensor | None]]:
    """Yields batches shaped as `inputs` say, with labels where there are class indices: `most` samples at most.

    The last batch is smaller, or left out where `inputs` are the model's `original` ones, which it takes in full only.
    """
    import torch

    count = 0
    for arrays, real, target in sources.batches(stream, inputs):
        if most is not None and count >= most:
            return
        fixed = tuple(inputs) == tuple(original)
        if fixed and real < len(arrays[0]) and count:
            return
        part = len(arrays[0]) if fixed else real
        labels = None
        if target is not None and target.ndim == 1 and target.dtype.kind in "iu" and len(target) >= part:
            labels = torch.from_numpy(target[:part]).long()
        yield tuple(torch.from_numpy(array[:part]) for array in arrays), labels
        count += part


def lessons(
    train: Any, original: Model, source: sources.Data | None, mean: Sequence[float], std: Sequence[float]
) -> sources.Data:
    """Opens the source `train`, whose images are of the size that `original` takes.

    Where it does not say how its uint8 images are normalized, they are as those of `source` are. Its notes say so, or
    that they are not.
    """
    size = with_data.image_size(original.inputs[0].shape)
    found = sources.load(train, image_size=size, mean=mean, std=std)
    own, given = found.preprocessing, source.preprocessing if source is not None else None
    if own is None or own == given or own.mean:
        return replace(found, notes=())
    if given is None:
        return replace(
            found, notes=("the training images are scaled to 0..1 and not normalized: no mean and std given",)
        )
    found = sources.load(train, image_size=size, mean=given.mean, std=given.std)
    return replace(found, notes=("the training images are normalized as those of --data",))


class Column(Protocol):
    """One input of all samples: a tensor, or what reads the rows asked for from disk."""

    def __len__(self) -> int: ...

    def __getitem__(self, rows: torch.Tensor) -> torch.Tensor: ...


@dataclass(frozen=True, eq=False)
class Stored:
    """A column whose rows lie in memory or on disk; with `preprocessing` they are uint8 images, and it is applied."""

    rows: np.ndarray | Rows
    preprocessing: sources.Preprocessing | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, rows: torch.Tensor) -> torch.Tensor:
        """Returns the rows of an array of indices."""
        import torch

        found = self.rows[rows.numpy()]
        return torch.from_numpy(found if self.preprocessing is None else self.preprocessing(found))


@dataclass(frozen=True, eq=False)
class HeldOut:
    """Batches of samples that are never trained on, read as they are asked for."""

    inputs: Sequence[Column]
    batches: tuple[torch.Tensor, ...]

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Tensors]:
        for rows in self.batches:
            yield tuple(column[rows] for column in self.inputs)

    def cut(self, batch: int) -> HeldOut:
        """Returns them in batches of `batch`; a part that is no batch is left out."""
        import torch

        if not self.batches:
            return self
        return replace(self, batches=tuple(p for p in torch.cat(self.batches).split(batch) if len(p) == batch))


@dataclass(frozen=True, eq=False)
class Memory:
    """All training samples, a column for each input, cut into shuffled batches; `held_out` has a part of them.

    `rows` are those that are trained on: all where it is None.
    """

    inputs: Sequence[Column]
    labels: torch.Tensor | None
    batch: int
    held_out: HeldOut | tuple[Tensors, ...]
    rows: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.inputs[0] if self.rows is None else self.rows)

    @property
    def steps(self) -> int:
        """Batches of an epoch: what is left over at its end waits for another epoch."""
        return max(len(self) // self.batch, 1)

    def some(self, count: int) -> Tensors:
        """Returns the first `count` samples, or as many as there are."""
        import torch

        return self._take(torch.arange(min(count, len(self))))[0]

    def epoch(self, generator: torch.Generator) -> Iterator[tuple[Tensors, torch.Tensor | None]]:
        """Yields each batch of one epoch."""
        import torch

        order = torch.randperm(len(self), generator=generator)[: self.steps * self.batch]
        for part in order.split(self.batch):
            yield self._take(part)

    def _take(self, part: torch.Tensor) -> tuple[Tensors, torch.Tensor | None]:
        rows = part if self.rows is None else self.rows[part]
        return tuple(column[rows] for column in self.inputs), None if self.labels is None else self.labels[rows]


@dataclass(frozen=True)
class Part:
    """Epochs of `steps` batches each, which are drawn from all samples of `whole`; none are held out."""

    whole: Memory
    steps: int
    held_out: tuple[Tensors, ...] = ()

    def epoch(self, generator: torch.Generator) -> Iterator[tuple[Tensors, torch.Tensor | None]]:
        """Yields each batch of one epoch."""
        return islice(self.whole.epoch(generator), self.steps)


def read(stream: Iterable[sources.Batch], original: Model, seed: int) -> Memory:
    """Reads every sample of `stream`; of many a share is held out, chosen by `seed`.

    Those that take more than IN_MEMORY bytes lie on disk. Raises EdgeKitError where they do not fit there, or do not
    fit the model.
    """
    import torch

    specs = widened(original, BATCHES[0])
    raw, dtypes, preprocessings = sources.unprocessed(stream, specs)
    kinds = tuple(replace(spec, dtype=dtype) for spec, dtype in zip(specs, dtypes, strict=True))
    same = tuple(replace(spec, dtype=dtype) for spec, dtype in zip(original.inputs, dtypes, strict=True))
    shelves = [Shelf(IN_MEMORY // len(specs)) for _ in specs]
    found: list[torch.Tensor | None] = []
    for inputs, labels in labeled(raw, kinds, same):
        found.append(labels)
        for shelf, tensor in zip(shelves, inputs, strict=True):
            shelf.put(tensor.numpy())
    if not found:
        raise EdgeKitError("there are no samples to train with", sources.HELP)
    columns = tuple(Stored(s.rows(), how) for s, how in zip(shelves, preprocessings, strict=True))
    known = [part for part in found if part is not None]
    count = len(columns[0])
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    aside = min(int(HELD_OUT * count), MOST_HELD_OUT) if count >= HELD_OUT_FROM else 0
    step = specs[0].shape[0] if specs[0].shape else 1
    aside -= aside % step  # a model of a fixed batch takes whole ones
    wide = specs != original.inputs and count >= MANY
    held_out = HeldOut(columns, order[:aside].split(step) if aside else ())
    return Memory(
        columns,
        torch.cat(known) if len(known) == len(found) else None,
        BATCHES[1] if wide else step,
        held_out,
        order[aside:] if aside else None,
    )
