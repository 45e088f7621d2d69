"""Evaluation in chunks: samples are read once, a bounded part at a time, and statistics alone are kept of each.

The seam for whoever changes what is run or compared: `Evaluation` yields chunks, a `Runner` turns a chunk into the
outputs of the original or of one file, and a `Tally` takes both in and keeps what each sample brings. `evaluate` is
the loop over the three.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from edgekit.artifacts import bundles
from edgekit.artifacts.artifact import Artifact
from edgekit.data import batch_axis, sources
from edgekit.data.digests import digest_of, sample_digests
from edgekit.errors import EdgeKitError
from edgekit.measuring import running
from edgekit.metrics.parity import Parity, ParitySums, classifies, worst
from edgekit.types import TensorSpec
from edgekit.util import ragged_arrays

if TYPE_CHECKING:
    import numpy as np

    from edgekit.loading.model import Model
    from edgekit.metrics.scores import Scores
    from edgekit.metrics.table import Metric

    Runner = Callable[["Chunk"], Sequence[np.ndarray]]  # (runs, *output shape) each, of the chunk's feeds

CHUNK_BYTES = 128 << 20  # of the inputs and outputs of one chunk: small data sets are one chunk, and so one job a file


@dataclass(frozen=True, eq=False)
class Chunk:
    """Some samples as feeds of whole batches, (runs, *input shape) each.

    `count` of the samples are real, the rest fills up the last batch. `target` holds one row for each real sample, or
    is None where the data has no labels. `start` is the number of the first run among all of the data. `last` says
    that no samples follow. `outputs` are the specs of the model's outputs.
    """

    feeds: tuple[np.ndarray, ...]
    batch: int
    count: int
    target: np.ndarray | None
    start: int = 0
    last: bool = True
    outputs: tuple[TensorSpec, ...] | None = None

    @property
    def runs(self) -> int:
        """How many batches it holds."""
        return len(self.feeds[0])

    def cut(self, outputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Joins (runs, batch, …) outputs to one row a sample and drops the padding."""
        return [array[: self.count] for array in running.flat(outputs, self.batch, self.outputs)]

    def digests(self, inputs: Sequence[TensorSpec]) -> list[str]:
        """Returns a name for the content of each sample."""
        found: list[str] = []
        for run in range(self.runs):
            real = min(self.batch, self.count - len(found))
            found += sample_digests([feed[run] for feed in self.feeds], inputs, real)
        return found

    @cached_property
    def digest(self) -> str:
        """A name for the content of its feeds."""
        return digest_of(self.feeds)


class Evaluation:
    """The evaluation samples of a source, in chunks; every pass reads the source again, unless one chunk holds all."""

    def __init__(
        self,
        source: sources.Data,
        original: Model,
        stream: Iterable[sources.Batch] | None = None,
        once: bool = False,
        largest: int | None = None,
    ) -> None:
        """Reads the first chunk of `stream`, which is the source's evaluation samples where it is not given.

        With `once` there is one pass over all of them, so that a generator's need not be kept. A chunk has at most
        `largest` bytes of inputs and outputs (CHUNK_BYTES), or one batch. Raises EdgeKitError for samples that do not
        fit the model.
        """
        if stream is None:
            stream = source.read_once() if once else source.evaluation
        self._stream, self._original, self._largest = stream, original, largest or CHUNK_BYTES
        self._pass: Iterator[Chunk] | None = self._read()
        self._head: Chunk | None = next(self._pass)
        head = self._head
        self.batch, self.inputs = head.batch, original.inputs
        self.target = head.target
        """The targets of the first chunk, which tell the kind of all; None where the data has no labels."""
        self.first = tuple(feed[: bundles.GOLDEN_SAMPLES].copy() for feed in head.feeds)
        """The feeds of the first runs, eight at most."""
        self.count = head.count if head.last else 0
        """The number of samples: known after a pass, and 0 before it."""
        size = len(stream) if isinstance(stream, Sized) else None
        self.chunks = None if size is None else max(-(-size // (head.runs * head.batch)), 1)
        """The number of chunks, where the source tells how many samples it has."""

    def __iter__(self) -> Iterator[Chunk]:
        head, chunks = self._head, self._pass
        if head is not None and head.last:
            yield head
            return
        self._head = self._pass = None
        count = 0
        if head is not None:
            count = head.count
            yield head
            del head
        chunks = chunks or self._read()
        while (chunk := next(chunks, None)) is not None:
            count += chunk.count
            yield chunk
            chunk = None  # one is in memory at a time
        self.count = count

    def _read(self) -> Iterator[Chunk]:
        import numpy as np

        inputs = self._original.inputs
        batches = sources.batches(self._stream, inputs)
        capacity = max(self._largest // _bytes_of_run(inputs, self._original.outputs), 1)
        batch, start, seen, labels = batch_axis.batch_of(inputs), 0, 0, 0
        following = next(batches, None)
        if following is None:
            raise EdgeKitError("the data holds no samples", sources.HELP)
        while following is not None:
            room = min(capacity, FIRST_ROOM)
            feeds = [np.empty((room, *array.shape), array.dtype) for array in following[0]]
            targets, runs, count = [], 0, 0
            while following is not None and runs < capacity:
                arrays, real, target = following
                if runs == len(feeds[0]):
                    feeds = [_grown(feed, min(2 * runs, capacity)) for feed in feeds]
                for feed, array in zip(feeds, arrays, strict=True):
                    feed[runs] = array
                if target is not None:
                    targets.append(target[:real])
                    labels += real
                runs, count, seen = runs + 1, count + real, seen + real
                following = next(batches, None)
            if labels not in (0, seen):
                raise EdgeKitError(f"the data has {seen} samples but {labels} labels", "give each sample one label")
            target = sources.joined(targets) if targets else None
            given = tuple(feed[:runs] for feed in feeds)
            yield Chunk(given, batch, count, target, start, following is None, self._original.outputs)
            del feeds
            start += runs


FIRST_ROOM = 64  # batches that a chunk has room for at first


def _grown(array: np.ndarray, rows: int) -> np.ndarray:
    import numpy as np

    larger = np.empty((rows, *array.shape[1:]), array.dtype)
    larger[: len(array)] = array
    return larger


def _bytes_of_run(inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> int:
    import numpy as np

    sizes = (math.prod(map(abs, spec.shape)) * np.dtype(spec.dtype).itemsize for spec in (*inputs, *outputs))
    return max(sum(sizes), 1)


class Scored:
    """What the samples bring to a metric with the outputs of one network or file."""

    def __init__(self, metric: Metric | None) -> None:
        """Without a `metric` there are no scores."""
        self._metric = metric
        self._parts: list[Any] = []

    def add(self, chunk: Chunk, outputs: Sequence[np.ndarray]) -> None:
        """Takes in the outputs of one chunk, one row a sample as `Chunk.cut` gives them.

        Raises EdgeKitError for outputs that do not fit the metric.
        """
        if self._metric is not None and chunk.target is not None:
            self._parts.append(self._metric.part(outputs, chunk.target))

    def scores(self) -> Scores | None:
        """Returns the scores of all samples; None without a metric or labels."""
        return self._metric.join(self._parts) if self._metric is not None and self._parts else None


class Tally:
    """What is kept of the outputs of one file: sums for their parity with the original's, and scores."""

    def __init__(self, metric: Metric | None) -> None:
        """Without a `metric` parity alone is kept."""
        self._sums = ParitySums()
        self._scored = Scored(metric)

    def add(self, chunk: Chunk, reference: Sequence[np.ndarray], outputs: Sequence[np.ndarray]) -> None:
        """Takes in the outputs of one chunk, and those of the original, one row a sample as `Chunk.cut` gives them.

        Raises EdgeKitError for outputs that fit neither the original's nor the metric.
        """
        self._sums.add(*ragged_arrays.matched(reference, outputs, chunk.outputs or ()), classifies(chunk.target))
        if self._sums.finite:
            self._scored.add(chunk, outputs)

    @property
    def parity(self) -> Parity:
        """The parity of the worst output."""
        return self.within(())

    @property
    def outputs(self) -> tuple[Parity, ...]:
        """The parity of each output."""
        return self._sums.parities()

    def within(self, floors: Sequence[float]) -> Parity:
        """Returns the same, with the difference that rounding alone makes in each output."""
        return worst(self._sums.parities(floors))

    def scores(self) -> Scores | None:
        """Returns the scores of all samples; None without a metric or labels, and where an output was not finite."""
        return self._scored.scores() if self._sums.finite else None


def evaluate(
    evaluation: Evaluation,
    original: Runner,
    files: Mapping[Artifact, Runner],
    metric: Metric | None,
    advance: Callable[[], None] = lambda: None,
    look: Callable[[Chunk], None] = lambda chunk: None,
) -> tuple[Scores | None, dict[Artifact, Tally]]:
    """Runs the original and every file on each chunk; returns the original's scores, and the tally of each file.

    `advance` is called after each run, and `look` is shown each chunk.
    """
    scored, tallies = Scored(metric), {artifact: Tally(metric) for artifact in files}
    for chunk in evaluation:
        look(chunk)
        reference = chunk.cut(original(chunk))
        scored.add(chunk, reference)
        advance()
        for artifact, run in files.items():
            tallies[artifact].add(chunk, reference, chunk.cut(run(chunk)))
            advance()
        del chunk, reference
    return scored.scores(), tallies


def score(evaluation: Evaluation, network: Runner, metric: Metric) -> Scores:
    """Returns the scores of one network on labeled samples."""
    found, _ = evaluate(evaluation, network, {}, metric)
    assert found is not None  # they are labeled
    return found


def whole(source: sources.Data, original: Model) -> Chunk:
    """Reads all evaluation samples of `source` into one chunk: for data that is known to be small."""
    import sys

    return next(iter(Evaluation(source, original, largest=sys.maxsize)))
