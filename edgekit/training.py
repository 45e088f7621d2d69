"""Samples to train with: everything that a source holds, in memory, shuffled anew in each epoch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, Any

from edgekit import data as sources
from edgekit import stages
from edgekit.errors import EdgeKitError
from edgekit.results import TensorSpec

if TYPE_CHECKING:
    import torch

    from edgekit.model import Model

    Tensors = tuple[torch.Tensor, ...]

LARGEST = 8 << 30  # bytes of samples that are kept in memory
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
    size = stages.image_size(original.inputs[0].shape)
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


@dataclass(frozen=True)
class Memory:
    """All training samples as one tensor per input, cut into shuffled batches; `held_out` has a part of them."""

    inputs: Tensors
    labels: torch.Tensor | None
    batch: int
    held_out: tuple[Tensors, ...]

    def __len__(self) -> int:
        return len(self.inputs[0])

    @property
    def steps(self) -> int:
        """Batches of an epoch: what is left over at its end waits for another epoch."""
        return max(len(self) // self.batch, 1)

    def epoch(self, generator: torch.Generator) -> Iterator[tuple[Tensors, torch.Tensor | None]]:
        """Yields each batch of one epoch."""
        import torch

        order = torch.randperm(len(self), generator=generator)[: self.steps * self.batch]
        for part in order.split(self.batch):
            yield tuple(tensor[part] for tensor in self.inputs), None if self.labels is None else self.labels[part]


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

    Raises EdgeKitError where they do not fit into memory, or do not fit the model.
    """
    import torch

    specs = widened(original, BATCHES[0])
    held: list[tuple[Any, Any]] = []
    size = 0
    for inputs, labels in labeled(stream, specs, original.inputs):
        held.append((inputs, labels))
        size += sum(tensor.nbytes for tensor in inputs)
        if size > LARGEST:
            raise EdgeKitError(
                f"the training samples take more than {LARGEST >> 30} GiB of memory", "give fewer: --train with a part"
            )
    if not held:
        raise EdgeKitError("there are no samples to train with", sources.HELP)
    tensors = tuple(torch.cat(parts) for parts in zip(*(inputs for inputs, _ in held), strict=True))
    labels = None if any(part is None for _, part in held) else torch.cat([part for _, part in held])
    count = len(tensors[0])
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    aside = min(int(HELD_OUT * count), MOST_HELD_OUT) if count >= HELD_OUT_FROM else 0
    step = specs[0].shape[0] if specs[0].shape else 1
    aside -= aside % step  # a model of a fixed batch takes whole ones
    wide = specs != original.inputs and count >= MANY
    chosen, rest = order[:aside], order[aside:]
    held_out = tuple(tuple(tensor[part] for tensor in tensors) for part in chosen.split(step)) if aside else ()
    return Memory(
        tuple(tensor[rest] for tensor in tensors) if aside else tensors,
        labels[rest] if aside and labels is not None else labels,
        BATCHES[1] if wide else step,
        held_out,
    )
